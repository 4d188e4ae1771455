"""A trajectory has the same bits in one process and across institutions; losses and gradients agree to 1e-9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpm import ring
from lpm.calibration.gvi import fit
from lpm.calibration.priors import Prior
from lpm.errors import InputError
from lpm.estimators import SCORE_RUNS, evaluate
from lpm.evidence import Evidence
from lpm.privacy import ENGINES
from lpm.scenario import load
from lpm.simulation import run
from lpm.worlds.world import Disclosure
from tests import models
from tests.federation.harness import federate, total

ROOT = Path(__file__).resolve().parents[2]
NYC = ROOT / "simulations" / "nyc_boroughs"


def _theta(model):
    return np.array([[models.THETA[parameter.name] for parameter in model.parameters]])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parties=st.integers(3, 5), shuffle=st.integers(0, 2**32 - 1))
def test_any_assignment_of_whole_households_gives_the_same_bits(parties, shuffle):
    whole = models.town(300)
    theta = _theta(whole)
    local = run(whole, theta, steps=12, seed=3)
    labels = models.households(300)
    owner = np.random.default_rng(shuffle).integers(0, parties, labels.size)
    shards = [models.town(300, keep=labels[owner == p]) for p in range(parties)]
    for engine in ENGINES:
        work = [lambda world, m=m: run(m, theta, steps=12, seed=3, world=world) for m in shards]
        runs, _ = federate(work, engine=engine)
        assert np.array_equal(total([each.words for each in runs]), local.words), engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("derivative", ["forward", "reverse", "alternates", "alternates-reverse"])
def test_derivatives_cross_institutions(derivative, engine):
    whole = models.town(240)
    theta = _theta(whole)
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(2, 10, 3, 1))
    pick = {"cotangent": lambda outputs: weights} if derivative.endswith("reverse") else {}
    local = run(whole, theta, steps=10, seed=3, derivative=derivative, **pick)
    labels = models.households(240)
    shards = [models.town(240, keep=labels[p::3]) for p in range(3)]
    runs, _ = federate(
        [
            lambda world, m=m: run(m, theta, steps=10, seed=3, world=world, derivative=derivative, **pick)
            for m in shards
        ],
        engine=engine,
    )
    assert np.array_equal(total([each.words for each in runs]), local.words)
    name = "gradient" if derivative.endswith("reverse") else "tangents"
    mine, theirs = sum(getattr(each, name) for each in runs), getattr(local, name)
    assert np.abs(theirs).max() > 1
    assert np.abs(mine - theirs).max() <= 1e-9 * np.abs(theirs).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_each_institution_holds_its_own_outputs_against_everybodys_decisions(engine):
    whole, labels = models.town(150), models.households(150)
    theta, asked = _theta(whole), {"estimator": "score", "steps": 4, "seed": 3}
    local = evaluate(whole, theta, **asked)
    shards = [models.town(150, keep=labels[p::3]) for p in range(3)]

    def work(world, model):
        return evaluate(model, theta, world=world, **asked), world.opened["decisions", "parties"]

    found, _ = federate([lambda world, m=m: work(world, m) for m in shards], engine=engine)
    assert np.array_equal(total([each.words for each, _ in found]), local.words)
    derivative = sum(each.derivative for each, _ in found)
    assert np.abs(local.derivative).max() > 1
    assert np.abs(derivative - local.derivative).max() <= 1e-9 * np.abs(local.derivative).max()
    # Beside what everybody hears anyway: one sum over all people a run, by step and parameter.
    assert all((opened.rounds, opened.words) == (SCORE_RUNS, SCORE_RUNS * 4 * theta.size) for _, opened in found)


BOROUGHS = ("bronx", "brooklyn", "manhattan", "queens", "staten_island")


@pytest.mark.parametrize(
    "parties",
    [tuple((name,) for name in BOROUGHS), (("queens", "bronx"), ("staten_island", "manhattan"), ("brooklyn",))],
    ids=["five boroughs", "three parties"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_new_york_is_the_same_city_however_it_is_held(parties, engine, request):
    scenario = load(NYC).with_options(steps=45, agents=20_000)
    model = request.getfixturevalue("whole_city")
    theta = np.array([[scenario.defaults[parameter.name] for parameter in model.parameters]])
    local = run(model, theta, steps=45, seed=11)
    shards = [scenario.build(names) for names in parties]
    rule = Disclosure(scenario.minimum_people, scenario.minimum_institutions)
    work = [lambda w, m=m: run(m, theta, steps=45, seed=11, world=w) for m in shards]
    runs, _ = federate(work, disclosure=rule, engine=engine)
    public = len(scenario.outputs)
    together = total([each.words[:, :public] for each in runs])
    assert np.array_equal(together, local.words[:, :public])
    # What is one institution's own is the same too, in whichever shard it is held.
    for own, each in zip(shards, runs, strict=True):
        for k, name in enumerate(own.recorded):
            assert np.array_equal(each.words[:, k], local.words[:, list(model.recorded).index(name)]) or k < public
    assert (local.outputs[:, 0].sum(0) > 1e5).all()  # infections: an epidemic worth the name


def test_new_york_is_the_same_in_any_order_of_agents(whole_city):
    reference = run(whole_city, _default(whole_city), steps=30, seed=11, executor="reference")
    order = np.random.default_rng(3).permutation(whole_city.population.agents)
    mixed = whole_city.shard(order)
    assert not np.array_equal(mixed.population.addresses, whole_city.population.addresses)
    for model in (whole_city, mixed):
        fused = run(model, _default(whole_city), steps=30, seed=11, executor="cpu")
        assert np.array_equal(reference.words, fused.words)


@pytest.fixture(scope="module")
def whole_city():
    return load(NYC).with_options(agents=20_000).build()


def _default(model):
    values = load(NYC).defaults
    return np.array([[values[parameter.name] for parameter in model.parameters]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("estimator", ["fd", "tangent", "st-gumbel"])
def test_federated_losses_and_gradients_equal_the_central_ones(estimator, engine):
    scenario = load(NYC).with_options(steps=14, agents=2000)
    parameters = {"parameters": scenario.parameters, "steps": 14, "held_out": 2, "seed": 5, "step": 0.05}
    names = [p.name for p in scenario.parameters]
    theta = np.array([[scenario.defaults[name] for name in names], [0.9 * scenario.defaults[name] for name in names]])
    whole = Evidence(scenario.build(), [scenario.observation(b) for b in scenario.institutions], **parameters)
    loss, gradient = whole.evaluate(theta, 3, estimator=estimator)
    shards = [Evidence(scenario.build([b]), [scenario.observation(b)], **parameters) for b in scenario.institutions]
    work = [lambda w, e=e: e.evaluate(theta, 3, estimator=estimator, world=w) for e in shards]
    found, _ = federate(work, engine=engine)
    assert np.abs(sum(each[0] for each in found) - loss).max() <= 1e-9 * np.abs(loss).max()
    assert np.abs(sum(each[1] for each in found) - gradient).max() <= 1e-9 * np.abs(gradient).max()


def test_both_engines_calibrate_to_the_same_posterior():
    """Two iterations by one seed: each engine opens the same sums, so the posterior is the same."""
    scenario = load(ROOT / "simulations" / "three_clinics").with_options(steps=14)
    prior, bits = Prior.from_parameters(scenario.parameters), scenario.federation.fraction_bits
    settings = {"parameters": scenario.parameters, "steps": 14, "held_out": 2, "seed": 5, "step": 0.05}
    names = scenario.institutions
    shards = [Evidence(scenario.build([name]), [scenario.observation(name)], **settings) for name in names]
    whole = Evidence(scenario.build(), [scenario.observation(name) for name in names], **settings)

    def through(engine):
        def evaluate(theta, iteration):
            def work(world, shard):
                for tensor, values in zip(
                    ("loss", "gradient"), shard.evaluate(theta, iteration, estimator="fd", world=world), strict=True
                ):
                    world.tell_coordinator(tensor, ring.encode(values.reshape(-1), bits))

            _, hub = federate([lambda world, shard=shard: work(world, shard) for shard in shards], engine=engine)
            opened = {round.tensor: ring.decode(words, bits) for round, words in hub.totals.items()}
            return opened["loss"], opened["gradient"].reshape(theta.shape)

        return evaluate

    def posterior(evaluate):
        fitted = fit(prior, evaluate, iterations=2, draws=2, seed=7)
        return np.concatenate([[each.loss, *each.mean, *each.sd] for each in fitted.records])

    found = {engine: posterior(through(engine)) for engine in ENGINES}
    assert len(found) == 2
    assert np.array_equal(*found.values())
    alone = posterior(lambda theta, iteration: whole.evaluate(theta, iteration, estimator="fd"))
    for each in found.values():
        assert np.abs(each - alone).max() <= 1e-9 * np.abs(alone).max()


def test_small_groups_are_refused_by_name_before_any_infection_is_summed():
    labels = models.households(300)
    theta = _theta(models.town(300))
    shards = [
        models.town(300, keep=labels[:1]),
        models.town(300, keep=labels[1:60]),
        models.town(300, keep=labels[60:]),
    ]
    with pytest.raises(InputError, match=r"Group \d+ of city is too small"):
        federate([lambda w, m=m: run(m, theta, steps=3, seed=1, world=w) for m in shards], disclosure=Disclosure(10, 3))

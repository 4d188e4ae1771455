"""Alternates of protocols of any kind: against contagions' own, exact answers, and finite differences."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import lpm
from lpm.analysis.audit import resolve_estimator
from lpm.errors import InputError
from lpm.estimators import candidates, evaluate
from lpm.kernels.spec import hazards
from lpm.passes.doors import Decision, offers
from lpm.relax import one_minus_exp, sample
from lpm.simulation import Keeper, run
from lpm.worlds.local import LocalWorld
from tests import models
from tests.fellows import spread_out
from tests.test_gradients import _fraction, _households, _slopes

CARE = lpm.Parameter("care", prior="lognormal(-1, 0.5)", bounds=(0.0, 5.0))
WORKING = {"care": 0.5, "layoff": 0.1, "beta_city": 0.7}
LAYOFF = lpm.Parameter("layoff", prior="beta(1, 10)", bounds=(0.0, 1.0))


class ByHand(lpm.Contagion):
    """A susceptible–infectious–recovered contagion written out with `sample` and `step.total`, past the executors."""

    def by_executor(self):
        return False

    def emit(self, step, network):
        return step.total(network, step.arrays(self.name)["stage"][..., 1])

    def transition(self, step, action):
        stage = step.arrays(self.name)["stage"]
        ill = stage[..., 1]
        home, city = step.model.network("household"), step.model.network("city")
        in_city = hazards(city, step.sums[f"{self.name}/city"], step.sizes["city"], step.values["beta_city"])
        at_home = step.total("household", ill).value() / step.sizes["household"][:, None]
        # Nobody who can be infected is infectious, so one's own part need not be taken off.
        hazard = step.values["beta_home"] * at_home[torch.from_numpy(home.cell_of)]
        hazard = hazard + in_city[torch.from_numpy(city.cell_of)]
        word = torch.from_numpy(step.uniform().astype(np.int64))[0, :, None]
        caught = sample(stage[..., 0], [one_minus_exp(hazard)], word)[0]
        better = sample(ill, [step.values["gamma"].expand(1, step.lanes)], word)[0]
        after = torch.stack([stage[..., 0] - caught, ill + caught - better, stage[..., 2] + better], dim=-1)
        flows, counts = torch.stack([caught, better]).sum(1, keepdim=True), after.sum(0).T[:, None]
        return lpm.Change(state={"stage": after}, records={f"{self.name}.flow": flows, f"{self.name}.count": counts})


class Labour(lpm.Protocol):
    """Who works: people stay at home to care for the ill, and firms lay off as their people stay away."""

    name = "labour"

    def expressions(self):
        return (CARE, LAYOFF)

    def networks(self):
        return ("firm",)

    def start(self, step):
        return lpm.Change(state={"works": torch.ones((step.model.population.agents, step.lanes), dtype=torch.float64)})

    def emit(self, step, network):
        return step.total(network, step.state["labour.works"])

    def transition(self, step, action):
        works = step.state["labour.works"]
        home, firm = step.model.network("household"), step.model.network("firm")
        ill = step.total("household", step.model.protocol("disease").occupancy(step, "I")).value()
        share = step.sums["labour/firm"] / step.sizes["firm"][:, None]
        cares = one_minus_exp(step.values["care"] * ill)[torch.from_numpy(home.cell_of)]
        leaves = cares + (1.0 - cares) * (step.values["layoff"] * (1.5 - share))[torch.from_numpy(firm.cell_of)]
        words = torch.from_numpy(step.uniform(0, 2).astype(np.int64))[..., None]
        away = sample(works, [leaves], words[0])[0]
        back = sample(1.0 - works, [torch.full((1, step.lanes), 0.2, dtype=torch.float64)], words[1])[0]
        return lpm.Change(state={"works": works - away + back})


def _working(agents: int, *, dynamic: bool = False) -> lpm.Model:
    """A city where those at work are the ones who infect; with `dynamic`, by a viral load that mobility scales."""
    people = lpm.Population(agents, attributes={"household": np.arange(agents) // 4})
    firm = lpm.Groups("firm", of=np.arange(agents) * 7 % (agents // 100), groups=agents // 100, shared=True)
    city = lpm.Groups("city", of=np.arange(agents) % 4, groups=4, shared=True)
    load = lpm.Dynamics(
        {"load": 0.0},
        lambda y, inputs: {"load": 2.0 * inputs["ill"] * (1.0 - y["load"]) - inputs["clearance"] * y["load"]},
        occupancy={"ill": ("disease", "I")},
        constants={"clearance": CARE},
        name="viral",
    )
    fear = lpm.Event(lpm.on_day(3), lpm.scale("city", by=1.0 - LAYOFF), name="fear")
    disease = lpm.Contagion(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"household": models.BETA_HOME, "city": models.BETA_CITY},
        progression={"I": lpm.leave(probability=models.GAMMA, to={"R": None})},
        initial={"I": np.arange(0, agents, 25)},
        infectivity=lpm.Attribute("viral.load" if dynamic else "labour.works"),
        name="disease",
    )
    return lpm.Model(
        people,
        [people.households, city, firm],
        [fear, load, disease] if dynamic else [Labour(), disease],
        outputs={"infections": lpm.flow("S -> I"), "ill": lpm.count("I")},
    )


def _sir(kind: type[lpm.Contagion], agents: int) -> lpm.Model:
    people = lpm.Population(agents, attributes={"household": np.arange(agents) // 4})
    city = lpm.Groups("city", of=np.arange(agents) % 4, groups=4, shared=True)
    sir = kind(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"household": models.BETA_HOME, "city": models.BETA_CITY},
        progression={"I": lpm.leave(probability=models.GAMMA, to={"R": None})},
        initial={"I": np.arange(0, agents, 25)},
    )
    return lpm.Model(people, [people.households, city], [sir], outputs={"infections": lpm.flow("S -> I")})


def _theta(model: lpm.Model, **more: float) -> np.ndarray:
    return np.array([[{**models.THETA, "beta_home": 0.5, **more}[parameter.name] for parameter in model.parameters]])


def _by_seed(model: lpm.Model, theta: np.ndarray, estimator: str, seeds: int, steps: int, **more) -> np.ndarray:
    """Derivatives of outputs summed over the run [seeds, outputs, P]."""
    found = []
    for seed in range(seeds):
        derivative = evaluate(model, theta, estimator=estimator, steps=steps, seed=seed, **more).derivative
        assert derivative is not None
        found.append(derivative[:, :, 0].sum(0))
    return np.array(found)


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Difference of two means in standard errors."""
    error = np.hypot(*(rows.std(0, ddof=1) / np.sqrt(len(rows)) for rows in (first, second)))
    return (first.mean(0) - second.mean(0)) / error


def test_a_contagion_by_hand_has_the_derivatives_of_the_declared_one():
    declared, by_hand = _sir(lpm.Contagion, 1200), _sir(ByHand, 1200)
    theta = _theta(declared)
    plain = run(declared, theta, steps=8, seed=1)
    first = run(by_hand, theta, steps=8, seed=1, derivative="alternates")
    second = run(declared, theta, steps=8, seed=1, derivative="alternates", executor="reference")
    assert first.executor == second.executor == "reference"
    assert np.array_equal(first.words, plain.words) and np.array_equal(second.words, plain.words)
    assert first.tangents is not None and second.tangents is not None
    np.testing.assert_allclose(first.tangents, second.tangents, rtol=1e-9, atol=1e-9)
    # Contagions' own alternates offer other flips, so the two agree in the mean.
    general = _by_seed(by_hand, theta, "alternates", 5, 8)
    kernel = _by_seed(declared, theta, "alternates", 12, 8)
    assert np.abs(_apart(general, kernel)).max() < 4
    assert (np.abs(general.mean(0)) > 5 * general.std(0, ddof=1) / np.sqrt(5)).all()


def test_they_are_exact_in_reed_frost_households(vectors):
    known = json.loads((vectors / "epidemic" / "reed_frost_households.json").read_text())["cases"]
    case = next(c for c in known if c["household_size"] == 5 and c["initial_infectives"] == 1)
    model = _households(5, 2000)
    for value in case["values"][:2]:
        slopes = _slopes(model, _fraction(value["escape_q"]), "alternates", 6, 2000, executor="reference")
        error = slopes.std(ddof=1) / np.sqrt(len(slopes))
        # Two comparisons, |t| > 5.5 with 5 degrees of freedom: a false alarm in 180 choices of the seeds.
        assert abs(slopes.mean() - float(value["d_expected_d_p"])) < 5.5 * error
        assert error < 0.03 * slopes.mean(), value["escape_q"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_they_agree_with_finite_differences_where_people_work_and_carry_a_load(dynamic):
    """Decisions of a labour market that feed back through firms; a continuous state in each agent and an event."""
    model = _working(2000, dynamic=dynamic)
    theta = _theta(model, **WORKING)
    found = _by_seed(model, theta, "alternates", 6, 7)
    differences = _by_seed(model, theta, "fd", 20, 7, step=0.1)
    z = _apart(found, differences)
    # Twenty comparisons in all, |t| > 5.5 with some 15 degrees of freedom: a false alarm in 800 choices of the seeds.
    assert np.abs(z).max() < 5.5, z

    # And they can fail: most are known to better than a seventh.
    error = np.hypot(found.std(0, ddof=1) / np.sqrt(6), differences.std(0, ddof=1) / np.sqrt(20))
    assert np.median(np.abs(error / differences.mean(0))) < 1 / 7


def test_ranks_and_a_resumed_run_have_the_same_derivatives():
    model = _working(400)
    theta = np.concatenate([_theta(model, **WORKING), _theta(model, **WORKING | {"care": 0.2})])
    asked = {"steps": 5, "seed": 3, "derivative": "alternates"}
    states: list[dict] = []
    whole = run(model, theta, keeper=Keeper(3, states.append), **asked)
    plain = run(model, theta, steps=5, seed=3)
    again = run(model, theta, keeper=Keeper(found=states[0]), **asked)
    assert np.array_equal(whole.words, plain.words) and np.array_equal(whole.tangents, again.tangents)
    assert whole.tangents is not None and np.abs(whole.tangents).max() > 1
    scale = np.abs(whole.tangents).max()
    parts = spread_out(
        model,
        2,
        lambda shard, world: run(
            shard, theta, world=world, keeper=Keeper(found=None if world.group.rank else states[0]), **asked
        ),
    )
    for part in parts:
        assert np.array_equal(part.words, whole.words)
        np.testing.assert_allclose(part.tangents, whole.tangents, rtol=0, atol=1e-9 * scale)
    alone = run(model, theta[1:], **asked)
    np.testing.assert_allclose(alone.tangents[:, :, 0], whole.tangents[:, :, 1], rtol=0, atol=1e-9 * scale)


def test_a_decision_of_several_outcomes_offers_each_other_one_in_the_mean():
    """Over one decision the derivative of each outcome's expected number is known."""
    shares = np.array([0.1, 0.45, 0.3])
    slopes = np.array([0.3, -0.5, 1.0])
    agents = 200_000
    word = torch.from_numpy(np.random.default_rng(1).integers(0, 2**32, (agents, 1)))
    cumulative = torch.from_numpy(np.cumsum(shares))[:, None, None].expand(3, agents, 1)
    slope = torch.from_numpy(np.stack([np.cumsum(slopes), np.zeros(3)]))[:, :, None, None].expand(2, 3, agents, 1)
    outcome = torch.from_numpy(np.searchsorted(np.cumsum(shares), (word.numpy() + 0.5) / 2**32, side="right"))
    found, square = np.zeros(4), np.zeros(4)
    for other, weight in offers(Decision(torch.ones(agents, 1), cumulative, word), slope):
        for k in range(4):
            change = (weight[..., 0] * ((other == k).double() - (outcome == k).double())).numpy()
            found[k] += change.sum()
            square[k] += (change**2).sum()
    z = (found - agents * np.append(slopes, -slopes.sum())) / np.sqrt(square)
    assert np.abs(z).max() < 4.5, z


class _Odd(lpm.Protocol):
    """What alternatives can't follow, in several ways."""

    name = "odd"

    def __init__(self, way: str) -> None:
        self.way = way

    def start(self, step):
        shape = (3,) if self.way == "shape" else (step.model.population.agents, step.lanes)
        return lpm.Change(state={"x": torch.zeros(shape, dtype=torch.float64)})

    def transition(self, step, action):
        x, ill = step.arrays("odd")["x"], step.model.protocol("disease").occupancy(step, "I")
        if self.way == "words":
            return lpm.Change(state={"x": torch.from_numpy(step.uniform().astype(np.float64))[0, :, None] + 0.0 * x})
        if self.way == "sum":
            city = step.model.network("city")
            return lpm.Change(state={"x": x + city.sum(ill)[torch.from_numpy(city.cell_of)]})
        if self.way == "past":
            return lpm.Change(state={"x": x + ill.mean(0)})
        if self.way == "sends":
            city = step.model.network("city")
            heard = step.total("city", ill * ill.mean(0)).value()
            return lpm.Change(state={"x": x + heard[torch.from_numpy(city.cell_of)]})
        return lpm.Change(env={"ill": ill.mean(0)} if self.way == "environment" else {})


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("words", "odd draws random numbers and decides nothing through lpm.relax.sample"),
        ("sum", r"adds up over city by Network.sum.*step.total"),
        ("past", "odd.x depends on other people past the networks"),
        ("sends", "What odd sends over city depends on other people past the networks"),
        ("environment", "ill depends on other people past the networks"),
        ("shape", r"odd.x has shape \(3,\), not \[agents, lanes"),
    ],
)
def test_what_no_alternative_can_follow_is_refused_with_the_remedy(way, words):
    working = _working(400)
    disease = dataclasses.replace(working.protocols[1], infectivity=None)
    model = lpm.Model(working.population, working.networks, [_Odd(way), disease], outputs=working.outputs)
    with pytest.raises(InputError, match=words) as refused:
        run(model, _theta(model), steps=4, seed=1, derivative="alternates")
    assert "gradient=fd" in str(refused.value)


class _CountsTwice(lpm.Contagion):
    """Tells every transition twice."""

    def transition(self, step, action):
        change = super().transition(step, action)
        return dataclasses.replace(change, records={key: 2 * value for key, value in change.records.items()})


def test_outputs_that_stages_do_not_tell_are_refused_by_name():
    model = _sir(_CountsTwice, 200)
    with pytest.raises(InputError, match=r"output infections does not follow from people's stages") as refused:
        run(model, _theta(model), steps=4, seed=1, derivative="alternates")
    assert "gradient=fd" in str(refused.value)


def test_an_audit_says_what_a_protocol_of_ones_own_does_not_allow():
    working = _working(200)
    disease = dataclasses.replace(working.protocols[1], infectivity=None)
    model = lpm.Model(working.population, working.networks, [_Odd("past"), disease], outputs=working.outputs)
    assert "alternates" not in candidates(model)
    audit = lpm.audit_gradients(model, _theta(model)[0], steps=3, seed=1, seeds=2, estimators=["alternates"])
    verdict = audit.verdict("alternates")
    assert (
        audit.chosen == "fd" and verdict.ruling == "not supported" and "odd.x depends on other people" in verdict.note
    )
    # `auto` tries it all the same where a refusal ends nothing.
    chosen, tried = resolve_estimator(model, _theta(model), "auto", steps=3, seed=1)
    assert chosen == "fd" and tried.verdict("alternates").ruling == "not supported"


def _backwards(model: lpm.Model, theta: np.ndarray, weights: np.ndarray, **more) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of Σ weights · outputs, pulled back, and made of the derivatives forwards [B, lanes, P]."""
    asked = {"estimator": "alternates", "steps": weights.shape[1], "seed": 3, **more}
    forward = evaluate(model, theta, **asked)
    back = evaluate(model, theta, mode="reverse", cotangent=lambda outputs: weights * (outputs > 0), **asked)
    assert np.array_equal(forward.words, back.words)
    assert forward.derivative is not None and back.gradient is not None
    made = np.einsum("btok,tokp->bkp", weights * (forward.outputs > 0), forward.derivative)
    return back.gradient, made


@pytest.mark.parametrize("kind", ["labour", "load", "by hand", "declared", "nobody"])
def test_backwards_they_are_what_they_are_forwards(kind):
    more = {}
    if kind in ("labour", "load"):
        model = _working(400, dynamic=kind == "load")
    else:
        model, more = (_sir(ByHand if kind == "by hand" else lpm.Contagion, 400), {"executor": "reference"})
    theta = np.concatenate([_theta(model, **WORKING), _theta(model, **WORKING | {"beta_home": 0.9, "beta_city": 0.2})])
    weights = np.random.default_rng(1).normal(size=(2, 7, len(model.recorded), 2))
    if kind == "nobody":
        theta[:, [p.name for p in model.parameters].index("beta_home")] = 0.0
    found, expected = _backwards(model, theta, weights, **more)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_backwards_too_ranks_and_a_resumed_run_have_the_same_gradient():
    model = _working(400)
    theta, states = _theta(model, **WORKING), []
    asked = {"steps": 5, "seed": 3, "derivative": "alternates-reverse"}
    asked["cotangent"] = lambda outputs: np.ones((1, *outputs.shape))
    whole = run(model, theta, keeper=Keeper(3, states.append), **asked)
    again = run(model, theta, keeper=Keeper(found=states[0]), **asked)
    assert whole.gradient is not None and np.abs(whole.gradient).max() > 1
    assert np.array_equal(whole.words, again.words) and np.array_equal(whole.gradient, again.gradient)
    kept: list[dict] = []
    for part in spread_out(
        model, 2, lambda shard, world: run(shard, theta, world=world, keeper=Keeper(3, kept.append), **asked)
    ):
        assert np.array_equal(part.words, whole.words)
        np.testing.assert_allclose(part.gradient, whole.gradient, rtol=0, atol=1e-9 * np.abs(whole.gradient).max())
    parts = spread_out(
        model,
        2,
        lambda shard, world: run(
            shard, theta, world=world, keeper=Keeper(found=None if world.group.rank else kept[0]), **asked
        ),
    )
    np.testing.assert_allclose(parts[0].gradient, whole.gradient, rtol=0, atol=1e-9 * np.abs(whole.gradient).max())
    with pytest.raises(InputError, match="can't"):
        run(model, theta, world=LocalWorld(), keeper=Keeper(found=kept[0]), **asked)


def test_auto_tries_them_backwards_where_they_are_sure_to_follow():
    model = _working(400, dynamic=True)
    assert "alternates" in candidates(model) and "alternates" in candidates(model, "reverse")
    assert "alternates" not in candidates(_working(400), "reverse")
    assert "alternates" in candidates(_working(400), "reverse", refusable=True)

"""The four kinds of protocol compose in one model, differentiably: contact, ODE, learned network, discrete event."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lpm
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.simulation import run

BETA = lpm.Parameter("beta", prior="lognormal(-1, 0.5)", bounds=(0.0, 5.0))
CLEARANCE = lpm.Parameter("clearance", prior="lognormal(-1, 0.5)", bounds=(0.0, 5.0))
STRICTNESS = lpm.Parameter("strictness", prior="beta(2, 2)", bounds=(0.0, 1.0))
CAUTION = lpm.Parameter("caution", prior="normal(0, 1)", bounds=(-5.0, 5.0))


def _within_host(y, inputs):
    """Logistic growth of a relative viral load while infected, cleared at a constant rate."""
    load = y["load"]
    growing = inputs["infected"] * (load * (1.0 - load) + 0.05)
    return {"load": 2.0 * growing - inputs["clearance"] * load}


def _model(agents: int = 300, when=None, trainable: bool = False) -> lpm.Model:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Sigmoid())
    rng = np.random.default_rng(3)
    people = lpm.Population(agents, attributes={"household": np.sort(rng.integers(0, agents // 3, agents))})
    city = lpm.Groups("city", of=rng.integers(0, 3, agents), groups=3, shared=True)
    mobility = lpm.Learned(
        network,
        inputs=[10.0 * lpm.driver("disease/city"), CAUTION],
        outputs=["mobility"],
        trainable=trainable,
        name="mobility_network",
    )
    lockdown = lpm.Event(when=when or lpm.on_day(8), effect=lpm.scale("city", by=1.0 - STRICTNESS), name="lockdown")
    viral = lpm.Dynamics(
        {"load": 0.0},
        _within_host,
        occupancy={"infected": ("disease", "E I")},
        constants={"clearance": CLEARANCE},
        name="viral",
    )
    disease = lpm.Contagion(
        "S E I R",
        "S -> E",
        {"I": 1.0},
        over={"household": 0.5 * BETA, "city": BETA * lpm.driver("mobility")},
        progression={"E -> I": 0.5, "I -> R": 0.2},
        initial={"I": np.arange(10)},
        infectivity=lpm.Attribute("viral.load"),
        name="disease",
    )
    return lpm.Model(
        people,
        [people.households, city],
        [mobility, lockdown, viral, disease],
        outputs={"infections": lpm.flow("S -> E"), "ill": lpm.count("I")},
    )


THETA = {"beta": 1.5, "clearance": 0.4, "strictness": 0.7, "caution": 0.3}


def _theta(model, **change):
    return np.array([[{**THETA, **change}[parameter.name] for parameter in model.parameters]])


def test_all_four_run_together_and_each_matters():
    model = _model()
    base = run(model, _theta(model), steps=16, seed=3)
    assert base.executor == "reference"
    assert base.outputs[:, 0].sum() > 30
    for name, value in (("clearance", 4.0), ("strictness", 0.0), ("caution", -4.0)):
        assert not np.array_equal(run(model, _theta(model, **{name: value}), steps=16, seed=3).words, base.words), name
    # Until the lockdown its strictness changes no bit.
    other = run(model, _theta(model, strictness=0.0), steps=16, seed=3)
    assert np.array_equal(other.words[:8], base.words[:8])


def test_derivatives_pass_through_all_four():
    model = _model()
    forward = evaluate(model, _theta(model), estimator="tangent", steps=12, seed=2)
    weights = np.random.default_rng(1).normal(size=(1, *forward.words.shape))
    reverse = evaluate(
        model, _theta(model), estimator="tangent", mode="reverse", steps=12, seed=2, cotangent=lambda outputs: weights
    )
    pulled = np.einsum("btok,tokp->bkp", weights, forward.derivative)
    np.testing.assert_allclose(reverse.gradient, pulled, rtol=1e-9, atol=1e-9 * np.abs(pulled).max())
    by_name = dict(
        zip([p.name for p in model.parameters], np.cumsum(forward.derivative[:, 0, 0], axis=0)[-1], strict=True)
    )
    assert by_name["beta"] > 0 and by_name["clearance"] < 0 and by_name["strictness"] < 0
    assert by_name["caution"] != 0


def test_the_first_generation_has_the_exact_gradient():
    """Over one step the conditional expectation is known in closed form, so the tangent must equal its derivative."""
    beta = lpm.Parameter("beta", prior="lognormal(0, 1)")
    sir = lpm.Contagion("S I", "S -> I", {"I": 1.0}, over={"city": beta}, initial={"I": np.arange(20)})
    city = lpm.Groups("city", of=np.zeros(200, dtype=int), groups=1, shared=True)
    model = lpm.Model(lpm.Population(200), [city], [sir], outputs={"new": lpm.flow("S -> I")})
    found = evaluate(model, np.array([[0.7]]), estimator="tangent", steps=1, seed=0)
    assert found.derivative[0, 0, 0, 0] == pytest.approx(180 * 0.1 * np.exp(-0.07), rel=1e-12)


def test_weights_of_the_network_are_parameters_when_asked():
    model = _model(100, trainable=True)
    names = [parameter.name for parameter in model.parameters]
    assert sum(name.startswith("mobility_network_") for name in names) == 2 * 3 + 3 + 3 + 1
    values = {p.name: float(p.arguments[0]) for p in model.parameters if p.name.startswith("mobility_network_")} | THETA
    theta = np.array([[values[name] for name in names]])
    same = run(_model(100), _theta(_model(100)), steps=6, seed=2)
    np.testing.assert_array_equal(run(model, theta, steps=6, seed=2).words, same.words)
    found = evaluate(model, theta, estimator="tangent", steps=6, seed=2)
    assert np.abs(found.derivative).sum((0, 1, 2))[[n.startswith("mobility_network_") for n in names]].max() > 0


def test_a_lockdown_on_a_threshold_begins_when_it_is_crossed():
    model = _model(when=lpm.above("disease/city", 0.02))
    never = _model(when=lpm.above("disease/city", 1e9))
    locked, free = (run(m, _theta(m), steps=16, seed=2).words for m in (model, never))
    first = int(np.flatnonzero((locked != free).any(axis=(1, 2)))[0])
    assert 0 < first < 15
    assert locked[first:, 0].sum() < free[first:, 0].sum()


def test_an_event_on_a_date_needs_a_start_and_ends_when_told():
    event = lpm.Event(when=lpm.on_date("2020-03-22"), effect=lpm.scale("city", by=0.0), lasts=2)
    with pytest.raises(InputError, match="no start"):
        _small([event])
    quiet = _small([event], start=np.datetime64("2020-03-20").astype(object))
    flows = run(quiet, np.array([[2.0]]), steps=6, seed=1).outputs[:, 0, 0]
    assert (flows[2:4] == 0).all() and flows[1] > 0 and flows[4] > 0


def _small(protocols, **more) -> lpm.Model:
    sis = lpm.Contagion(
        "S I", "S -> I", {"I": 1.0}, over={"city": BETA}, progression={"I -> S": 0.5}, initial={"I": np.arange(50)}
    )
    city = lpm.Groups("city", of=np.zeros(100, dtype=int), groups=1, shared=True)
    return lpm.Model(lpm.Population(100), [city], [*protocols, sis], outputs={"new": lpm.flow("S -> I")}, **more)


def test_a_series_that_is_too_short_or_holds_nan_is_refused():
    with pytest.raises(InputError, match="step 1 is not"):
        lpm.Series({"mobility": [1.0, float("nan")]})
    model = _small([lpm.Series({"mobility": [1.0, 1.0]})])
    with pytest.raises(InputError, match=r"mobility has 2 steps, 3 are asked for"):
        run(model, np.array([[1.0]]), steps=3, seed=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": "S I I"}, "stage 'I'"),
        ({"infection": "S => I"}, "is a transition as in"),
        ({"infection": "S -> X"}, "no stage 'X'"),
        ({"stages": "S I R", "infection": {"S -> I": 0.5, "S -> R": 0.9}}, "contagion infects S twice: one arrow"),
        ({"infection": "S -> S"}, "leads back to S"),
        ({"infection": {"S -> I": -0.5}}, "relative susceptibility of 'S -> I' of contagion is -0.5"),
        ({"infection": {"S -> I": float("nan")}}, "relative susceptibility of 'S -> I' of contagion is nan"),
        ({"infection": {"S -> I": float("inf")}}, "relative susceptibility of 'S -> I' of contagion is inf"),
        ({"infection": {"S -> I": BETA}}, "relative susceptibility of 'S -> I' of contagion"),
        ({"infection": {"S -> I": np.array([1.0, 2.0])}}, "relative susceptibility of 'S -> I' of contagion"),
        ({"over": {"moon": 1.0}}, "no network 'moon'"),
        ({"over": {"city": "fast"}}, "'fast' is given where a number or an expression"),
        ({"infectious": {"I": -1.0}}, "infectivity of I is -1.0"),
        ({"infectious": {"I": float("nan")}}, "infectivity of I is nan"),
        ({"infectious": {"I": "high"}}, "infectivity of I is high"),
        ({"infectious": {"I": {"moon": 1.0}}}, "does not spread over moon"),
        ({"progression": {"I": lpm.leave(rate=0.1)}}, "names its target once"),
        ({"progression": {"I": lpm.leave(rate=0.1, to={"S": 0.5})}}, "don't sum to 1"),
        ({"progression": {"I -> I": 0.1}}, "contagion leaves I for I"),
        ({"progression": {"I": lpm.leave(rate=0.1, to={"I": 0.5, "S": None})}}, "contagion leaves I for I"),
        ({"initial": {"I": -0.1}}, "initial share of I of contagion is -0.1"),
        ({"initial": {"I": 1.5}}, "initial share of I of contagion is 1.5"),
        ({"initial": {"I": float("nan")}}, "initial share of I of contagion is nan"),
        ({"initial": {"I": np.array([1.5])}}, "initial agents of I of contagion are a list of whole numbers"),
        ({"initial": {"I": np.array([True, False])}}, "initial agents of I of contagion are a list of whole numbers"),
        ({"initial": {"I": [3, 3]}}, "initial agent of contagion is named twice"),
        ({"initial": {"I": [3], "S": [2, 3]}}, "initial agent of contagion is named twice"),
        ({"progression": {"S -> I": 0.1}}, "can be infected and leaves by itself"),
        ({"susceptibility": [1.0, 2.0]}, "susceptibility"),
        ({"susceptibility": "high"}, "susceptibility of contagion is 'high'"),
        ({"classes": "age"}, "no attribute age"),
        ({"classes": "share"}, "class of share is not a whole number"),
    ],
)
def test_a_contagion_that_does_not_fit_is_refused_by_name(change, words):
    plain = {"stages": "S I", "infection": "S -> I", "infectious": {"I": 1.0}, "over": {"city": BETA}}
    city = lpm.Groups("city", of=np.zeros(10, dtype=int), groups=1, shared=True)
    with pytest.raises(InputError, match=words):
        people = lpm.Population(10, attributes={"share": np.arange(10) * 0.6})
        lpm.Model(people, [city], [lpm.Contagion(**{**plain, **change})], outputs={})


def test_a_driver_that_nobody_sets_and_a_stay_that_is_too_short_are_named():
    late = lpm.Contagion("S I", "S -> I", {"I": 1.0}, over={"city": lpm.driver("weather")}, initial={"I": np.arange(5)})
    city = lpm.Groups("city", of=np.zeros(10, dtype=int), groups=1, shared=True)
    model = lpm.Model(lpm.Population(10), [city], [late], outputs={"new": lpm.flow("S -> I")})
    with pytest.raises(InputError, match="driver weather is not in the environment"):
        run(model, np.zeros((1, 0)), steps=2, seed=0)
    short = lpm.Contagion(
        "S I*3 R", "S -> I", {"I": 1.0}, over={"city": 1.0}, progression={"I": lpm.leave(mean_days=2.0, to={"R": None})}
    )
    model = lpm.Model(lpm.Population(10), [city], [short], outputs={"new": lpm.flow("S -> I")})
    with pytest.raises(InputError, match="probability outside 0 to 1"):
        run(model, np.zeros((1, 0)), steps=2, seed=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lpm.Population(-5), r"population.agents is -5: a whole number from 0"),
        (lambda: lpm.Population(2, ids=[1, 1]), "different numbers"),
        (lambda: lpm.Population(3, ids=[3, 1, 3]), "different numbers"),
        (lambda: lpm.Population(2, attributes={"age": [1]}), "age has shape"),
        (lambda: lpm.Groups("city", of=[0, 3], groups=3, shared=True), "city is out of range"),
        (lambda: lpm.Groups("city", of=[0, 1], shared=True), "number of groups"),
        (lambda: lpm.Groups("home", of=np.arange(100), groups=5), "home is out of range: ids run from 0 to 4"),
        (lambda: lpm.Groups("home", of=[0, 1], groups="two"), "number of groups"),
        (lambda: lpm.Groups("city", of=[0, 1], groups=2, shared=True, mixing=[[1.0]]), "2 × 2"),
        (lambda: lpm.Edges("web", [(0, 5)], agents_in_all=3), "web is out of range"),
        (lambda: lpm.Edges("web", [(-1, 0)]), r"web is out of range: it has agent -1, and agents run from 0\."),
        (lambda: lpm.Edges("web", [(1, 1)]), "with itself"),
        (lambda: lpm.Parameter("b", prior="cauchy(0, 1)"), "prior of b"),
        (lambda: lpm.Parameter("b", bounds=(1.0, 0.0)), "bounds of b"),
        (lambda: lpm.leave(rate=1.0, mean_days=1.0), "exactly one"),
        (lambda: lpm.leave(rate=1.0, to={"R": BETA}), "share of those who leave to R"),
        (lambda: _small([], start="2020-13-01"), "start of the model is '2020-13-01'"),
        (lambda: _small([], start=5), "start of the model is 5"),
    ],
)
def test_parts_that_cannot_be_are_refused_by_name(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("of", [np.array([7, 7, 2**40], dtype=np.uint64), np.array([5, 5, 2**63 + 1], dtype=np.uint64)])
def test_groups_may_be_unsigned_numbers(of):
    assert lpm.Groups("home", of=of).cell_of.tolist() == [0, 0, 1]
    assert lpm.Groups("home", of=np.array([3, 3, 60_000], dtype=np.uint16)).members.tolist() == [2, 1]

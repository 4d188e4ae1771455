"""One loop: the same bits for every executor, order, lane and interruption; forward and reverse agree."""

import dataclasses

import numpy as np
import pytest

import lpm
from lpm.errors import InputError
from lpm.estimators import differences, evaluate
from lpm.simulation import Keeper, run
from tests import models

STEPS = 25


def _theta(model: lpm.Model, *changes: dict[str, float]) -> np.ndarray:
    rows = [{**models.THETA, **change} for change in (changes or ({},))]
    return np.array([[row[parameter.name] for parameter in model.parameters] for row in rows])


def test_executors_agree_to_the_bit():
    model = models.town()
    theta = _theta(model, {}, {"beta_city": 0.8}, {"initial": 0.2}, {"gamma": 0.0}, {"beta_home": 4.9})
    reference = run(model, theta, steps=STEPS, seed=3, executor="reference")
    fused = run(model, theta, steps=STEPS, seed=3, executor="cpu")
    assert (reference.executor, fused.executor) == ("reference", "cpu")
    assert np.array_equal(reference.words, fused.words)
    assert reference.outputs[:, 0].sum() > 50  # there was an epidemic to compare


def test_edges_and_outsiders_agree_across_executors():
    rng = np.random.default_rng(2)
    people = lpm.Population(300)
    networks = [
        lpm.Edges("web", [(k, (7 * k + 3) % 300) for k in range(300) if (7 * k + 3) % 300 != k]),
        lpm.Groups("team", of=np.where(rng.random(300) < 0.5, -1, rng.integers(0, 40, 300))),
    ]
    sir = lpm.Contagion(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"web": 0.2, "team": models.BETA_CITY},
        progression={"I -> R": 0.2},
        initial={"I": np.arange(10)},
    )
    model = lpm.Model(people, networks, [sir], outputs={"infections": lpm.flow("S -> I")})
    runs = [run(model, np.array([[1.5]]), steps=20, seed=1, executor=name).words for name in ("reference", "cpu")]
    assert np.array_equal(*runs) and runs[0].sum() > 0


def test_people_in_no_group_meet_nobody():
    people = lpm.Population(100)
    team = lpm.Groups("team", of=np.full(100, -1))
    sir = lpm.Contagion("S I R", "S -> I", {"I": 1.0}, over={"team": models.BETA_CITY}, initial={"I": np.arange(50)})
    model = lpm.Model(people, [team], [sir], outputs={"infections": lpm.flow("S -> I")})
    assert not run(model, np.array([[5.0]]), steps=5, seed=1).words.any()


def test_the_order_of_agents_changes_no_bit():
    order = np.random.default_rng(5).permutation(600)
    model, mixed = models.town(), models.town(order=order)
    theta = _theta(model)
    assert np.array_equal(run(model, theta, steps=STEPS, seed=3).words, run(mixed, theta, steps=STEPS, seed=3).words)
    a, b = (models.random_graph(500, 8, 1), _reordered_graph(500, 8, 1))
    value = np.array([[0.05, 0.1]])
    assert np.array_equal(run(a, value, steps=STEPS, seed=9).words, run(b, value, steps=STEPS, seed=9).words)


def _reordered_graph(agents: int, degree: int, seed: int) -> lpm.Model:
    """The same graph with its agents stored in another order."""
    model = models.random_graph(agents, degree, seed)
    place = np.random.default_rng(8).permutation(agents)  # agent a now stands at place[a]
    edges = model.networks[0]
    assert isinstance(edges, lpm.Edges)
    ids = np.empty(agents, dtype=np.uint64)
    ids[place] = np.arange(agents)
    sir = model.protocols[0]
    assert isinstance(sir, lpm.Contagion)
    again = lpm.Contagion(
        stages=sir.stages,
        infection=sir.infection,
        infectious=sir.infectious,
        over=sir.over,
        progression=sir.progression,
        initial={"I": place[np.asarray(sir.initial["I"])]},
    )
    return lpm.Model(
        lpm.Population(agents, ids=ids),
        [lpm.Edges("graph", place[np.asarray(edges.pairs)])],
        [again],
        outputs=model.outputs,
    )


def test_a_lane_does_not_depend_on_the_others():
    model = models.town()
    theta = _theta(model, {}, {"beta_city": 0.5}, {"beta_city": 0.9})
    together = run(model, theta, steps=STEPS, seed=3)
    alone = [run(model, theta[k : k + 1], steps=STEPS, seed=3).words[..., 0] for k in range(3)]
    assert np.array_equal(together.words, np.stack(alone, axis=-1))


def test_a_change_that_changes_nothing_changes_no_bit_and_seeds_matter():
    model = models.town()
    theta = _theta(model)
    base = run(model, theta, steps=STEPS, seed=3).words
    assert np.array_equal(base, run(model, theta * (1 + 1e-15), steps=STEPS, seed=3).words)
    assert not np.array_equal(base, run(model, theta, steps=STEPS, seed=4).words)


def test_tangents_leave_the_trajectory_alone_and_reverse_equals_forward():
    model = models.town(300)
    theta = _theta(model, {}, {"beta_city": 0.7})
    plain = run(model, theta, steps=15, seed=3)
    forward = run(model, theta, steps=15, seed=3, derivative="forward")
    weights = np.random.default_rng(1).normal(size=(2, *plain.words.shape))
    reverse = run(model, theta, steps=15, seed=3, derivative="reverse", cotangent=lambda outputs: weights)
    assert np.array_equal(plain.words, forward.words) and np.array_equal(plain.words, reverse.words)
    assert forward.tangents is not None and reverse.gradient is not None
    pulled = np.einsum("btol,tolp->blp", weights, forward.tangents)
    assert np.abs(pulled).max() > 1
    assert np.abs(pulled - reverse.gradient).max() <= 1e-9 * np.abs(pulled).max()


def test_facade_reverse_mode_gives_every_output_at_every_step():
    model = models.town(150)
    forward = lpm.simulate(model, models.THETA, steps=6, seed=1, gradient="tangent")
    reverse = lpm.simulate(model, models.THETA, steps=6, seed=1, gradient="tangent", mode="reverse")
    assert forward.gradient is not None and reverse.gradient is not None
    for name in forward.outputs:
        np.testing.assert_allclose(reverse.gradient[name], forward.gradient[name], rtol=1e-9, atol=1e-9)
    assert forward.gradient["infections"].dims == ("time", "parameter")


@pytest.mark.parametrize("derivative", ["none", "forward", "reverse", "alternates", "alternates-reverse"])
def test_a_resumed_run_gives_the_same_bits(derivative):
    model = models.town(200)
    theta = _theta(model)
    states: list[dict] = []
    pick = {"cotangent": lambda outputs: np.ones((1, *outputs.shape))} if derivative.endswith("reverse") else {}
    whole = run(model, theta, steps=12, seed=3, derivative=derivative, keeper=Keeper(5, states.append), **pick)
    assert [state["step"] for state in states] == [5, 10]
    for found in states:
        again = run(model, theta, steps=12, seed=3, derivative=derivative, keeper=Keeper(0, found=found), **pick)
        assert np.array_equal(again.words, whole.words)
        for mine, theirs in ((again.tangents, whole.tangents), (again.gradient, whole.gradient)):
            assert (mine is None and theirs is None) or np.array_equal(mine, theirs)


def test_finite_differences_are_the_quotients_of_separate_runs():
    model = models.town(300)
    theta = _theta(model, {}, {"beta_city": 0.7})
    found = evaluate(model, theta, estimator="fd", steps=10, seed=3, step=0.05)
    up, down = theta.copy(), theta.copy()
    k = [parameter.name for parameter in model.parameters].index("beta_city")
    up[:, k] *= 1.05
    down[:, k] *= 0.95
    high, low = (run(model, lanes, steps=10, seed=3).outputs for lanes in (up, down))
    assert found.derivative is not None
    np.testing.assert_allclose(found.derivative[..., k], (high - low) / (up - down)[:, k], rtol=1e-12)


def test_differences_stay_within_bounds():
    parameter = lpm.Parameter("x", prior="uniform(0, 1)", bounds=(0.0, 1.0))
    lanes = differences(np.array([[1.0], [0.0], [0.5]]), [parameter], 0.1)
    assert lanes.lanes.min() >= 0 and lanes.lanes.max() <= 1 and (lanes.distance > 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"seed": -1}, r"seed is -1: a whole number from 0 to 2\^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616: a whole number"),
        ({"seed": 1.5}, "seed is 1.5: a whole number"),
        ({"seed": True}, "seed is True: a whole number"),
        ({"seed": "3"}, "seed is '3': a whole number"),
        ({"seed": [1, -1]}, "seed is -1: a whole number"),
        ({"derivative": "backwards"}, "backwards"),
        ({"executor": "gpu"}, "gpu"),
        ({"executor": None}, "executor is None"),
        ({"derivative": "reverse", "executor": "cpu"}, "tangents"),
        ({"derivative": "alternates-reverse", "executor": "torch:cpu"}, "alternates doesn't run this model by"),
        ({"derivative": "alternates-reverse", "executor": "reference"}, "cotangent is None"),
    ],
)
def test_impossible_runs_are_refused_before_work(change, words):
    model = models.town(60)
    settings = {"steps": 3, "seed": 0, **change}
    with pytest.raises(InputError, match=words):
        run(model, _theta(model), **settings)


def test_parameters_are_checked_by_name_and_bounds():
    model = models.town(60)
    with pytest.raises(InputError, match="no parameter nothing"):
        lpm.simulate(model, {**models.THETA, "nothing": 1.0}, steps=3)
    with pytest.raises(InputError, match="gamma has no value"):
        lpm.simulate(model, {name: value for name, value in models.THETA.items() if name != "gamma"}, steps=3)
    with pytest.raises(InputError, match=r"gamma is 1.5: from 0 to 1"):
        lpm.simulate(model, {**models.THETA, "gamma": 1.5}, steps=3)
    with pytest.raises(InputError, match=r"gamma has 3 values, beta_home has 2"):
        lpm.simulate(model, {**models.THETA, "beta_home": [0.1, 0.2], "gamma": [0.1, 0.2, 0.3]}, steps=3)


@pytest.mark.parametrize(
    ("prior", "value", "words"),
    [
        ("lognormal(-1, 0.5)", -1.0, r"x is -1: from 0, as its prior lognormal\(-1, 0.5\) has it"),
        ("gamma(2, 1)", -0.1, "x is -0.1: from 0, as"),
        ("beta(2, 2)", 1.5, "x is 1.5: from 0 to 1, as"),
    ],
)
def test_values_that_the_prior_does_not_have_are_refused(prior, value, words):
    with pytest.raises(InputError, match=words):
        lpm.Parameter("x", prior=prior).require(value)
    lpm.Parameter("x").require(value)


@pytest.mark.parametrize("value", ["fast", "0.5", None, [[0.1, 0.2]], ["a", "b"], 1j, [0.1, [0.2, 0.3]]])
def test_a_parameter_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(InputError, match="parameter gamma"):
        lpm.simulate(models.town(60), {**models.THETA, "gamma": value}, steps=3)


@pytest.mark.parametrize("gradient", ["none", "auto"])
def test_a_seed_is_checked_before_an_audit(gradient):
    with pytest.raises(InputError, match="seed is -1"):
        lpm.simulate(models.town(60), models.THETA, steps=3, seed=-1, gradient=gradient)


def test_numbers_of_numpy_are_numbers():
    model = models.town(60)
    found = [
        run(model, _theta(model), steps=steps, seed=seed).words
        for steps, seed in ((3, 2**63 + 5), (np.int32(3), np.uint64(2**63 + 5)))
    ]
    assert np.array_equal(*found)


def test_people_infected_while_infectious_are_named_where_the_fused_executor_is_asked():
    again = lpm.Contagion("S I J", {"S -> I": 1.0, "I -> J": 0.5}, {"I": 1.0}, over={"home": 0.8})
    home = lpm.Groups("home", of=np.arange(10) // 2)
    model = lpm.Model(lpm.Population(10), [home], [again], outputs={"new": lpm.flow("S -> I")})
    with pytest.raises(InputError, match="nor people who can be infected while infectious"):
        run(model, np.zeros((1, 0)), steps=2, seed=0, executor="cpu")


@pytest.mark.parametrize("executor", ["auto", "reference"])
def test_people_whom_no_pair_names_have_no_neighbours(executor):
    sparse = _graph(12, agents_in_all=None)
    whole = _graph(12, agents_in_all=12)
    theta = np.array([[0.9, 0.2]])
    found = [run(model, theta, steps=8, seed=3, executor=executor).words for model in (sparse, whole)]
    assert np.array_equal(*found)
    with pytest.raises(InputError, match="network web was made for 11 agents, not 12"):
        _graph(12, agents_in_all=11)


def _graph(agents, *, agents_in_all):
    graph = models.random_graph(agents, 2, 1)
    web = lpm.Edges("web", np.array([[0, 1], [1, 2], [2, 3]]), agents_in_all=agents_in_all)
    sir = dataclasses.replace(graph.protocols[0], over={"web": models.BETA_CITY}, initial={"I": np.array([0])})
    return lpm.Model(graph.population, [web], [sir], outputs=graph.outputs)

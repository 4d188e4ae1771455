"""One contract, every executor: the same integers to the bit for any model the spec allows, thread count and order."""

import numpy as np
import pytest
import torch

import lpm
from lpm import ranks
from lpm.kernels import cpu, tangent_steps, tangent_sums, tangents
from lpm.kernels.cell_hazards import cell_hazards
from lpm.kernels.spec import hazards
from lpm.simulation import Keeper, run
from tests.test_device import DEVICES

AGENTS, STEPS = 240, 12


def _stages(rng: np.random.Generator, classes: int) -> dict:
    """A random stage graph with branching, Erlang sub-stages, waning and several susceptible stages."""
    share = rng.uniform(0.1, 0.9, classes)
    infectious: dict = {"P": 1.0, "A": float(rng.uniform(0.1, 1)), "I": {"home": 0.7, "default": 0.3}}
    progression = {
        "E": lpm.leave(mean_days=float(rng.uniform(3, 5)), to={"P": share, "A": None}),
        "P": lpm.leave(rate=0.5, to={"I": 0.6, "R": 0.1, "D": None}),
        "A -> R": lpm.leave(probability=0.3),
        "I -> R": 0.4,
    }
    if rng.random() < 0.5:
        progression["R -> S"] = 0.2
    return {
        "stages": f"S V E*{rng.integers(1, 4)} P A I R D",
        "infection": {"S -> E": 1.0, "V -> E": float(rng.uniform(0, 0.5))},
        "infectious": infectious,
        "progression": progression,
        "initial": {"E": lpm.Parameter("initial", prior="beta(1, 9)"), "V": 0.2, "P": np.arange(3) * 7},
        "susceptibility": rng.uniform(0.3, 2.0, classes),
        "classes": "class" if classes > 1 else None,
    }


def _model(number: int, order: np.ndarray | None = None, agents: int = AGENTS, many: bool = False) -> lpm.Model:
    """Random spec `number`, its agents stored in another order if one is given, with more parameters if `many`."""
    rng = np.random.default_rng(number)
    classes = int(rng.integers(1, 4))
    order = np.arange(agents) if order is None else order
    place = np.argsort(order)
    label = np.sort(rng.integers(0, agents // 3, agents))
    team = rng.integers(-20, 30, agents) * int(rng.integers(1, 1000))  # those below 0 are in none
    pairs = rng.integers(0, agents, (5 * agents // 4, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    cell, mixed = rng.integers(0, 5, agents), rng.integers(0, 4, agents)
    class_of = rng.integers(0, classes, agents)
    networks = [
        lpm.Groups("home", label[order], normalise=str(rng.choice(["size", "none"]))),
        lpm.Groups("team", team[order], normalise=str(rng.choice(["size", "none"]))),
        lpm.Edges("web", place[pairs], agents_in_all=agents, directed=bool(rng.random() < 0.5)),
        lpm.Groups("city", cell[order], groups=5, shared=True, mixing=rng.uniform(0, 0.6, (5, 5)) * (cell[:5] > 0)),
        lpm.Groups("bloc", mixed[order], mixing=rng.uniform(0, 0.6, (4, 4)), normalise="none"),
    ]
    used = [networks[0], *(network for network in networks[1:] if rng.random() < 0.6)]
    graph = _stages(rng, classes)
    graph["initial"]["P"] = place[graph["initial"]["P"]]
    heat = dict.fromkeys((n.name for n in used), lpm.Parameter("heat", prior="lognormal(0, 1)"))
    if many:
        heat = {n.name: lpm.Parameter(f"heat_{n.name}", prior="lognormal(0, 1)") for n in used}
        recovery = lpm.Parameter("recovery", prior="beta(2, 5)")
        graph["progression"] |= {"A -> R": lpm.leave(probability=recovery), "I -> R": recovery * recovery}
    over = {
        n.name: heat[n.name] * float(rng.uniform(0.1, 0.6)) * (0.03 if n.normalise == "none" else 1.0) for n in used
    }
    ids = (order + 2**62) if number % 2 else (order * 3 + 1)
    return lpm.Model(
        lpm.Population(agents, ids=ids.astype(np.uint64), attributes={"class": class_of[order]}),
        used,
        [lpm.Contagion(over=over, **graph)],
        outputs={
            "new": lpm.flow("S -> E"),
            "dead": lpm.flow("P -> D"),
            "ill": lpm.count("P A I"),
            "well": lpm.count("S R"),
        },
        class_counts={"class": classes},
    )


def _theta(model: lpm.Model, lanes: int) -> np.ndarray:
    ends = {"heat": (0.5, 6.0), "initial": (0.02, 0.2), "recovery": (0.2, 0.4)}
    return np.stack([np.linspace(*ends[p.name.partition("_")[0]], lanes) for p in model.parameters], axis=1)


@pytest.mark.parametrize("number", range(12))
def test_any_spec_gives_the_same_bits(number, monkeypatch):
    lanes = 41 if number % 4 == 0 else 1 + number % 3  # more than one block of the kernel for many lanes, or less
    model = _model(number)
    theta = _theta(model, lanes)
    reference = run(model, theta, steps=STEPS, seed=number, executor="reference").words
    assert reference[:, 0].any() and reference[-1, 2:].any()
    monkeypatch.setattr(cpu, "_SMALL", 0)
    shuffled = _model(number, np.random.default_rng(9).permutation(AGENTS))
    for count, many, people in (("1", 1, model), ("2", 1000, model), ("3", 1, shuffled), ("1", 1000, shuffled)):
        monkeypatch.setattr(cpu, "_MANY", many)
        monkeypatch.setenv("NUMBA_NUM_THREADS", count)
        fused = run(people, theta, steps=STEPS, seed=number)
        assert fused.executor == "cpu"
        assert np.array_equal(fused.words, reference), (number, count, many)
    for executor in DEVICES:
        for people in (model, shuffled):
            found = run(people, theta, steps=STEPS, seed=number, executor=executor).words
            assert np.array_equal(found, reference), (number, executor)


@pytest.mark.parametrize("number", range(12))
def test_tangents_carried_beside_the_values_are_those_of_torch(number, monkeypatch):
    # Several blocks of agents, and more than four parameters.
    agents, many = 1500, number % 3 != 0
    model = _model(number, agents=agents, many=many)
    shuffled = _model(number, np.random.default_rng(9).permutation(agents), agents, many)
    theta = _theta(model, 1 + number % 2)
    assert not many or len(model.parameters) == 2 + len(model.networks)
    reference = run(model, theta, steps=STEPS, seed=number, derivative="forward", executor="reference")
    whole = [run(people, theta, steps=STEPS, seed=number, derivative="forward") for people in (model, shuffled)]
    assert reference.executor == "reference" and whole[0].executor == "cpu"
    assert reference.tangents is not None and np.abs(reference.tangents).max() > 1
    # A large population is added up in pieces, the same ones for any number of threads.
    monkeypatch.setattr(cpu, "_SMALL", 0)
    monkeypatch.setattr(tangents, "_LARGE", 1)
    pieces = []
    for count in ("1", "3"):
        monkeypatch.setenv("NUMBA_NUM_THREADS", count)
        pieces += [run(people, theta, steps=STEPS, seed=number, derivative="forward") for people in (model, shuffled)]
    for found in (*whole, *pieces):
        assert np.array_equal(found.words, reference.words)
        apart = np.abs(found.tangents - reference.tangents).max(axis=(0, 2))
        assert (apart <= 1e-9 * np.abs(reference.tangents).max(axis=(0, 2)) + 1e-15).all()
    assert np.array_equal(pieces[0].tangents, pieces[2].tangents)
    assert np.array_equal(pieces[1].tangents, pieces[3].tangents)


def test_blocks_of_agents_are_of_whole_groups():
    rng = np.random.default_rng(0)
    cell = np.repeat(np.arange(3000), rng.integers(1, 300, 3000)).astype(np.int32)
    blocks = tangent_steps.blocks_of(cell, False, cell.size)
    assert blocks[0] == 0 and blocks[-1] == cell.size and np.diff(blocks).max() <= tangent_sums.BLOCK
    assert np.diff(blocks).min() > 0 and (cell[blocks[1:-1]] != cell[blocks[1:-1] - 1]).all()
    # A group longer than a block has none, but those who are in no group may be cut anywhere.
    cell[:1000] = 0
    assert not tangent_steps.blocks_of(cell, False, cell.size).size
    blocks = tangent_steps.blocks_of(cell, True, cell.size)
    assert blocks[-1] == cell.size and np.diff(blocks).max() <= tangent_sums.BLOCK
    inside = blocks[1:-1][cell[blocks[1:-1]] > 0]
    assert (cell[inside] != cell[inside - 1]).all() and (cell[blocks[1:-1]] == 0).any()


def test_tangents_of_what_the_executor_does_not_see_are_left_to_torch():
    model = _model(1)
    disease = model.protocols[0]

    class Counter(lpm.Protocol):
        name = "counter"

        def transition(self, step, action):
            return lpm.Change(env={"ill": disease.occupancy(step, "I").sum(0)})

    both = lpm.Model(
        model.population,
        model.networks,
        [disease, Counter()],
        outputs={"new": lpm.flow("S -> E")},
        class_counts={"class": disease.spec.class_count},
    )
    assert run(both, _theta(both, 1), steps=3, seed=1, derivative="forward").executor == "reference"


def test_a_resumed_run_reads_the_state_afresh():
    model, states = _model(3), []
    theta = _theta(model, 2)
    whole = run(model, theta, steps=STEPS, seed=4, keeper=Keeper(5, states.append))
    again = run(model, theta, steps=STEPS, seed=4, keeper=Keeper(0, found=states[0]))
    assert np.array_equal(whole.words, again.words)


def test_factors_that_change_from_day_to_day_agree():
    city = lpm.Groups("city", np.arange(AGENTS) % 7)
    sir = lpm.Contagion(
        "S I R", "S -> I", {"I": 1.0}, over={"city": 0.9}, progression={"I -> R": 0.1}, initial={"I": np.arange(14)}
    )
    gone = lpm.Event(when=lpm.on_date("2020-03-22"), effect=lpm.scale("city", by=0.3), lasts=3)
    start = np.datetime64("2020-03-20").astype(object)
    model = lpm.Model(lpm.Population(AGENTS), [city], [gone, sir], outputs={"new": lpm.flow("S -> I")}, start=start)
    executors = ("reference", "cpu", *DEVICES)
    words = [run(model, np.zeros((1, 0)), steps=9, seed=2, executor=name).words for name in executors]
    assert all(np.array_equal(words[0], other) for other in words[1:]) and words[0].any()


def test_exits_that_change_from_day_to_day_agree():
    people = lpm.Population(AGENTS)
    disease = lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        over={"all": 0.8},
        progression={"I -> R": lpm.leave(probability=lpm.driver("care") * lpm.Parameter("recovery"))},
        initial={"I": 0.3},
    )
    model = lpm.Model(
        people,
        networks=[lpm.Groups("all", np.zeros(AGENTS, dtype=int))],
        protocols=[lpm.Series({"care": np.linspace(0.0, 1.0, STEPS)}), disease],
        outputs={"recovered": lpm.flow("I -> R"), "ill": lpm.count("I")},
    )
    theta = np.array([[0.2], [0.9]])
    runs = [run(model, theta, steps=STEPS, seed=4, executor=name).words for name in ("reference", "cpu")]
    assert np.array_equal(*runs)
    assert not runs[0][0, 0].any() and runs[0][1:, 0].any()


@pytest.mark.parametrize("number", range(4))
def test_lanes_with_seeds_of_their_own_are_runs_of_their_own(number):
    model, seeds = _model(number), [3, 2**64 - 1, 2**64 - 1, 3, 5]
    theta = _theta(model, len(seeds))
    alone = [run(model, theta[k : k + 1], steps=STEPS, seed=seed).words[..., 0] for k, seed in enumerate(seeds)]
    for executor in ("reference", "cpu"):
        together = run(model, theta, steps=STEPS, seed=seeds, executor=executor).words
        assert np.array_equal(together, np.stack(alone, axis=-1)), executor
    with pytest.raises(lpm.errors.InputError, match="2 seeds for 5 parameter vectors"):
        run(model, theta, steps=STEPS, seed=seeds[:2])
    with pytest.raises(lpm.errors.InputError, match="without derivatives"):
        run(model, theta, steps=STEPS, seed=seeds, derivative="forward")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("normalise", ["size", "none"])
def test_compiled_hazards_of_cells_are_those_of_the_declaration(shared, mixed, normalise):
    rng = np.random.default_rng(7)
    of = rng.integers(0 if shared else -3, 9, 200)
    groups = 9 if shared else None
    mixing = rng.uniform(0, 2, (9 if shared else 10,) * 2) * (rng.random(10) < 0.7)[: 9 if shared else 10]
    network = lpm.Groups("n", of, groups=groups, shared=shared, mixing=mixing if mixed else None, normalise=normalise)
    total = rng.lognormal(0, 3, (network.cells, 5)) * (rng.random((network.cells, 5)) < 0.8)
    total[1, 2] = np.inf
    size = rng.integers(0, 40, network.cells).astype(float) if normalise == "size" else None
    factor = rng.lognormal(0, 2, 5)
    wanted = hazards(
        network, torch.from_numpy(total), None if size is None else torch.from_numpy(size), torch.from_numpy(factor)
    )
    assert np.array_equal(cell_hazards(network, total, size, factor), wanted.numpy(), equal_nan=True)


def test_whoever_is_infected_while_infectious_is_left_to_the_reference():
    again = lpm.Contagion(
        "S I J", {"S -> I": 1.0, "I -> J": 0.5}, {"I": 1.0}, over={"home": 0.8}, initial={"I": np.arange(9)}
    )
    home = lpm.Groups("home", np.arange(AGENTS) // 4)
    model = lpm.Model(lpm.Population(AGENTS), [home], [again], outputs={"new": lpm.flow("S -> I")})
    assert run(model, np.zeros((1, 0)), steps=3, seed=1).executor == "reference"


@pytest.mark.parametrize("wanted", ["0", "many"])
def test_the_number_of_threads_is_a_whole_number(wanted, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", wanted)
    with pytest.raises(lpm.errors.InputError, match=f"NUMBA_NUM_THREADS is '{wanted}'"):
        ranks.threads()

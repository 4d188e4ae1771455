"""Ranks of one owner give one process's bits, for any number of them, with derivatives, and from any checkpoint."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import lpm
from lpm import cli, ranks
from lpm.errors import InputError, RoundRefused
from lpm.estimators import evaluate
from lpm.kernels.spec import Summed
from lpm.passes import alternates_reverse
from lpm.scenario import load
from lpm.simulation import Keeper, run
from lpm.worlds.local import LocalWorld
from tests import models
from tests.e2e.processes import CLINICS
from tests.fellows import spread_out


def theta_of(model: lpm.Model) -> np.ndarray:
    return np.array([[{**models.THETA, "beta_city": beta}[p.name] for p in model.parameters] for beta in (0.35, 0.8)])


def mixture() -> lpm.Model:
    """Named first cases, edges, a viral load in each agent and a lockdown at a threshold, beside groups."""
    agents, rng = 240, np.random.default_rng(4)
    first = np.arange(0, agents, 12)
    sir = lpm.Contagion(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"home": models.BETA_HOME, "city": models.BETA_CITY, "friends": 0.3},
        progression={"I -> R": models.GAMMA},
        initial={"I": np.arange(0, agents, 30)},
        infectivity=lpm.Attribute("load.v", lambda v: v * 0.5 + 0.5),
        name="sir",
    )
    load = lpm.Dynamics(
        {"v": 0.0},
        lambda v, given: {"v": given["ill"] - 0.2 * v["v"]},
        occupancy={"ill": ("sir", "I")},
        name="load",
    )
    lockdown = lpm.Event(lpm.above("sir/city", 0.05), lpm.scale("city", 0.4))
    return lpm.Model(
        lpm.Population(agents, ids=rng.permutation(agents)),
        [
            lpm.Groups("home", of=np.where(np.arange(agents) % 17 == 0, -1, np.arange(agents) // 4)),
            lpm.Groups("city", of=rng.integers(0, 5, agents), groups=5, shared=True),
            lpm.Edges("friends", np.stack([first, first + 7], axis=1), agents_in_all=agents),
        ],
        [lockdown, load, sir],
        outputs={"infections": lpm.flow("S -> I"), "ill": lpm.count("I")},
    )


@pytest.mark.parametrize("number", [2, 3])
def test_trajectories_have_the_bits_of_one_process(number: int) -> None:
    clinics = load(CLINICS).build()
    for model, theta in (
        (models.town(), theta_of(models.town())),
        (mixture(), np.array([[0.6, 0.5, 0.2]])),
        (clinics, np.array([[0.5, 0.05]])),
    ):
        whole = run(model, theta, steps=12, seed=3, world=LocalWorld())
        assert whole.words.any()
        for part in spread_out(model, number, lambda shard, world: run(shard, theta, steps=12, seed=3, world=world)):  # noqa: B023
            assert np.array_equal(part.words, whole.words)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(
    ("estimator", "mode"),
    [
        ("fd", "forward"),
        ("tangent", "forward"),
        ("tangent", "reverse"),
        ("alternates", "forward"),
        ("alternates", "reverse"),
        ("score", "forward"),
        ("st-gumbel", "forward"),
        ("st-gumbel", "reverse"),
    ],
)
def test_gradients_are_those_of_one_process(estimator: str, mode: str, number: int) -> None:
    model = models.town(150)
    weights = np.random.default_rng(1).normal(size=(2, 8, 3, 2))
    asked: dict[str, Any] = {"estimator": estimator, "mode": mode, "steps": 8, "seed": 3, "step": 0.3}
    if mode == "reverse":
        asked["cotangent"] = lambda outputs: weights * (outputs > 0)
    whole = evaluate(model, theta_of(model), world=LocalWorld(), **asked)
    parts = spread_out(model, number, lambda shard, world: evaluate(shard, theta_of(model), world=world, **asked))
    for part in parts:
        assert np.array_equal(part.words, whole.words)
        found, expected = (each.derivative if mode == "forward" else each.gradient for each in (part, whole))
        assert found is not None and expected is not None and np.abs(expected).max() > 1
        assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()


def uneven(agents: int = 240) -> lpm.Model:
    """Clubs and classes whose order by size is another in some shards, and friends, in blocks that can be parted."""
    rng = np.random.default_rng(5)
    block, age = np.arange(agents) // 24, (np.arange(agents) // 24 >= 4).astype(np.int16)
    # In the first blocks clubs of 8 and classes of 6, in the others clubs of 4 and classes of 12.
    club = np.where(block < 4, np.arange(agents) // 8, 100 + np.arange(agents) // 4)
    classes = np.where(block < 4, np.arange(agents) // 6, 100 + np.arange(agents) // 12)
    pairs = block[:, None] * 24 + rng.integers(0, 24, (agents, 2))
    return lpm.Model(
        lpm.Population(agents, ids=rng.permutation(agents), attributes={"age": age}),
        [
            lpm.Groups("club", of=club),
            lpm.Groups("class", of=classes),
            lpm.Edges("friends", pairs=pairs[pairs[:, 0] != pairs[:, 1]]),
            lpm.Groups("city", of=rng.integers(0, 3, agents), groups=3, shared=True),
        ],
        [
            lpm.Contagion(
                "S I R",
                "S -> I",
                {"I": 1.0},
                classes="age",
                susceptibility=[0.4, 1.2],
                over={"club": models.BETA_HOME, "class": 0.2, "friends": 0.3, "city": models.BETA_CITY},
                progression={"I -> R": models.GAMMA},
                initial={"I": models.INITIAL},
            )
        ],
        outputs={"infections": lpm.flow("S -> I")},
        class_counts={"age": 2},
    )


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_what_alternates_follow_is_decided_for_all_ranks_alike(mode: str) -> None:
    model = uneven()
    theta = theta_of(model)
    asked: dict[str, Any] = {"estimator": "alternates", "mode": mode, "steps": 10, "seed": 3}
    if mode == "reverse":
        asked["cotangent"] = lambda outputs: np.ones((1, *outputs.shape))
    whole = evaluate(model, theta, world=LocalWorld(), **asked)
    sizes: list[list[float]] = []

    def work(shard: lpm.Model, world: Any) -> Any:
        sizes.append([float(network.members.mean()) for network in shard.networks[:2]])  # type: ignore[attr-defined]
        return evaluate(shard, theta, world=world, **asked)

    for part in spread_out(model, 3, work):
        found, expected = (each.derivative if mode == "forward" else each.gradient for each in (part, whole))
        assert found is not None and expected is not None
        assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()
    assert {club < classes for club, classes in sizes} == {True, False}  # so each rank alone would order them otherwise


def test_a_decision_is_held_against_its_own_component_on_ranks_too() -> None:
    agents = 120
    model = lpm.Model(
        lpm.Population(agents, ids=np.random.default_rng(2).permutation(agents)),
        [lpm.Groups("home", of=np.arange(agents) // 4)],
        [lpm.Contagion("S I R", "S -> I", {"I": 1.0}, {"home": models.BETA_HOME}, {"I -> R": 0.2}, {"I": 0.2})],
        outputs={"infections": lpm.flow("S -> I")},
    )
    theta = np.array([[0.3], [0.8]])
    whole = evaluate(model, theta, estimator="score", steps=8, seed=3, world=LocalWorld()).derivative
    assert whole is not None and np.abs(whole).max() > 1
    for part in spread_out(
        model, 3, lambda shard, world: evaluate(shard, theta, estimator="score", steps=8, seed=3, world=world)
    ):
        assert np.abs(part.derivative - whole).max() <= 1e-9 * np.abs(whole).max()


@pytest.mark.parametrize("derivative", ["alternates", "alternates-reverse"])
@pytest.mark.parametrize("number", [1, 2])
def test_alternates_go_on_with_as_many_ranks_as_before(
    number: int, derivative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each rank cuts its tape where it has grown too long, which is in other steps than at another.
    monkeypatch.setattr(alternates_reverse, "TAPE_BYTES", 0)
    monkeypatch.setattr(alternates_reverse, "TAPE_BYTES_PER_AGENT", 8)
    model, states = models.town(120), []
    theta = theta_of(model)
    asked: dict[str, Any] = {"steps": 8, "seed": 3, "derivative": derivative}
    if derivative == "alternates-reverse":
        asked["cotangent"] = lambda outputs: np.ones((1, *outputs.shape))

    def work(shard: lpm.Model, world: Any, **more: Any) -> Any:
        return run(shard, theta, world=world, keeper=Keeper(5, **more), **asked)

    if number == 1:
        whole = [work(model, LocalWorld(), save=states.append)]
        again = [work(model, LocalWorld(), found=states[0])]
    else:
        whole = spread_out(model, 2, lambda shard, world: work(shard, world, save=states.append))
        again = spread_out(model, 2, lambda s, world: work(s, world, found=None if world.group.rank else states[0]))
        if derivative == "alternates-reverse":
            names = [name.split(":") for name in states[0] if ":segment:" in name]
            cuts = [{first for _, rank, _, first, *_ in names if rank == f"{each}/2"} for each in range(2)]
            assert cuts[0] - cuts[1] and cuts[1] - cuts[0]
    for one, other in zip(whole, again, strict=True):
        assert np.array_equal(one.words, other.words)
        for found, expected in ((one.tangents, other.tangents), (one.gradient, other.gradient)):
            assert (found is None and expected is None) or np.array_equal(found, expected)
    with pytest.raises(InputError, match="can't"):
        spread_out(model, 3, lambda s, world: work(s, world, found=None if world.group.rank else states[0]))


@pytest.mark.parametrize("derivative", ["none", "forward", "reverse"])
def test_any_number_of_ranks_goes_on_from_any_checkpoint(derivative: str) -> None:
    model = models.town(120)
    theta = theta_of(model)
    asked: dict[str, Any] = {"steps": 8, "seed": 3, "derivative": derivative}
    if derivative == "reverse":
        asked["cotangent"] = lambda outputs: np.ones((1, *outputs.shape))
    whole = run(model, theta, world=LocalWorld(), **asked)

    def checkpoint(number: int) -> dict[str, Any]:
        states: list[dict[str, Any]] = []
        if number == 1:
            run(model, theta, world=LocalWorld(), keeper=Keeper(5, states.append), **asked)
        else:
            spread_out(
                model,
                number,
                lambda shard, world: run(shard, theta, world=world, keeper=Keeper(5, states.append), **asked),
            )
        assert [state["step"] for state in states] == [5]  # one of the ranks alone keeps it
        return states[0]

    for before, after in ((1, 2), (3, 2), (2, 2), (3, 1)):
        state = checkpoint(before)
        if after == 1:
            results = [run(model, theta, world=LocalWorld(), keeper=Keeper(found=state), **asked)]
        else:
            results = spread_out(
                model,
                after,
                lambda shard, world: run(
                    shard,
                    theta,
                    world=world,
                    keeper=Keeper(found=state if world.group.rank == 0 else None),  # noqa: B023
                    **asked,
                ),
            )
        for again in results:
            assert np.array_equal(again.words, whole.words)
            for mine, theirs in ((again.tangents, whole.tangents), (again.gradient, whole.gradient)):
                if theirs is not None:
                    assert mine is not None and np.abs(mine - theirs).max() <= 1e-9 * np.abs(theirs).max()


class Counter(lpm.Protocol):
    """A protocol with an array that is not by agent."""

    name = "counter"

    def start(self, step: Any) -> lpm.Change:
        import torch

        return lpm.Change(state={"seen": torch.zeros(3)})


def test_a_state_that_is_not_by_agent_is_resumed_by_as_many_ranks_only() -> None:
    town = models.town(90)
    model = lpm.Model(
        town.population,
        town.networks,
        [models.disease(), Counter()],
        outputs={"infections": lpm.flow("S -> E")},
        class_counts={"age": 3},
    )
    theta, states = theta_of(model), []

    def work(shard: lpm.Model, world: Any, **more: Any) -> Any:
        return run(shard, theta, steps=4, seed=3, world=world, keeper=Keeper(2, **more))

    whole = spread_out(model, 2, lambda shard, world: work(shard, world, save=states.append))
    again = spread_out(model, 2, lambda s, world: work(s, world, found=None if world.group.rank else states[0]))
    assert np.array_equal(again[0].words, whole[0].words)
    with pytest.raises(InputError, match="written by 2 ranks, and 3 can't"):
        spread_out(model, 3, lambda s, world: work(s, world, found=None if world.group.rank else states[0]))
    with pytest.raises(InputError, match="nproc-per-node 2"):
        run(model, theta, steps=4, seed=3, world=LocalWorld(), keeper=Keeper(found=states[0]))


def test_nothing_is_used_if_digests_differ_or_a_rank_asks_for_another_scale() -> None:
    words = np.arange(3, dtype=np.int64) + 2**62

    def refused(digest: Any, rescale: Any) -> list[RoundRefused | np.ndarray]:
        def one(_: lpm.Model, world: Any) -> Any:
            rank = world.group.rank
            try:
                return world.add("emit", 0, words, digest=digest(rank), rescale=rescale(rank))
            except RoundRefused as problem:
                return problem

        return spread_out(models.town(90), 3, one)

    good = refused(lambda rank: b"same", lambda rank: False)
    assert all(np.array_equal(each, 3 * words) for each in good)  # modulo 2^64
    diverged = refused(lambda rank: bytes([rank == 2]), lambda rank: False)
    assert all(isinstance(each, RoundRefused) and each.diverged for each in diverged)
    rescaled = refused(lambda rank: b"same", lambda rank: rank == 1)
    assert all(isinstance(each, RoundRefused) and each.rescale for each in rescaled)


class Explosive(lpm.Contagion):
    """Tangents too large for the first exponent on one rank alone: the round is repeated at another scale."""

    def emit(self, step: Any, network: str) -> Summed:
        found = super().emit(step, network)
        return Summed(found.words, None if found.soft is None else found.soft * 1e9)


def test_a_rescaled_round_gives_the_same_derivatives() -> None:
    town = models.town(90)
    plain = models.disease()
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__ if name != "spec"}
    model = lpm.Model(
        town.population,
        town.networks,
        [Explosive(**fields)],
        outputs={"infections": lpm.flow("S -> E")},
        class_counts={"age": 3},
    )
    theta = theta_of(model)
    whole = run(model, theta, steps=3, seed=3, derivative="forward", world=LocalWorld()).tangents
    parts = spread_out(model, 2, lambda s, world: run(s, theta, steps=3, seed=3, derivative="forward", world=world))
    assert whole is not None and np.abs(whole).max() > 1e9
    assert np.abs(parts[1].tangents - whole).max() <= 1e-9 * np.abs(whole).max()


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is '2'.*from 0 to 1"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(
    values: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, **values)
    with pytest.raises(InputError, match=words):
        ranks.place()
    assert cli.main(["simulate", str(CLINICS)]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_alone_without_torchrun_and_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("NUMBA_NUM_THREADS", "9")  # which monkeypatch takes back, whatever is set below
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    environment(monkeypatch, WORLD_SIZE="1")
    ranks.set_threads()
    assert ranks.place() == ranks.Place() and "NUMBA_NUM_THREADS" not in os.environ
    environment(monkeypatch, WORLD_SIZE="6", RANK="4", LOCAL_WORLD_SIZE="3", MASTER_ADDR="h", MASTER_PORT="1")
    ranks.set_threads()
    assert ranks.place() == ranks.Place(4, 6, 1, 3)
    assert os.environ["NUMBA_NUM_THREADS"] == "2" and ranks.threads() == 2


def test_what_ranks_can_not_do_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment(monkeypatch, WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert cli.main(["federate", str(CLINICS)]) == 2
    assert "lpm federate` can't be run on several ranks" in capsys.readouterr().err
    for able in ("simulate", "sensitivity", "calibrate", "resume"):
        assert cli.main([able, "--help"]) == 0
        assert ("--deadline" in capsys.readouterr().out) == (able != "resume")  # which goes by what the run was given

"""A party whose contribution its people can't have made is found by the sum; one that lies within the range, by the
commitments it made: replayed from its people and seed before an auditor, they give another root.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.shard import Shard
from lpm import ring
from lpm.errors import SessionRefused
from lpm.estimators import evaluate
from lpm.privacy.commitments import inclusion_proof, merkle_root, require_inclusion
from lpm.privacy.secure_sum import Flags, Round
from lpm.protocol.messages import Task
from lpm.scenario import load
from lpm.worlds.federated import FederatedWorld
from tests.e2e.processes import CLINICS
from tests.federation.harness import federate

SCENARIO = load(CLINICS).with_options(steps=6, agents=240)
THETA = np.array([[0.5, 0.05]])


def honest(name: str) -> Callable[[FederatedWorld], Any]:
    """A party that follows the protocol."""
    model = SCENARIO.build([name], seed=0)
    return lambda world: evaluate(model, THETA, estimator="none", steps=6, seed=5, world=world, trajectory=1)


def lying(name: str, lie: Callable[[np.ndarray], np.ndarray]) -> Callable[[FederatedWorld], Any]:
    """A party that changes what it contributes on day 3."""
    party = honest(name)

    def work(world: FederatedWorld) -> Any:
        truth = world.add

        def add(tensor: str, step: int, words: np.ndarray, **flags: Any) -> np.ndarray:
            return truth(tensor, step, lie(words) if (tensor, step) == ("emit", 3) else words, **flags)

        world.add = add
        return party(world)

    return work


@pytest.mark.parametrize(
    "lie",
    [
        lambda words: np.full_like(words, -ring.encode(100.0)),
        lambda words: np.full_like(words, ring.encode(240.0)),
        lambda words: np.full_like(words, 2**62),
    ],
    ids=["negative", "more than all its people", "overflow"],
)
def test_a_sum_that_people_cant_have_made_stops_the_run(lie: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(SessionRefused, match=r"step 3 is impossible in group 0"):
        federate([honest("north"), lying("south", lie), honest("west")])


def committed(folder: Path, lie: Callable[[np.ndarray], np.ndarray] | None, seed: int = 5) -> list[bytes]:
    """What south commits to in a session, with the people and the seed it has, or lying on day 3."""
    task = Task("simulate", 1, np.array([[0.5, 0.05, 0.6]]), options={"plain": True})
    shards = {
        name: Shard(
            SCENARIO, [name], seed=seed, folder=folder / name, key=b"k" * 32, data=None, every=0, calibrates=False
        )
        for name in ("north", "south", "west")
    }

    def party(name: str) -> Callable[[FederatedWorld], list[bytes]]:
        def work(world: FederatedWorld) -> list[bytes]:
            send = world.engine.open_to_parties
            if name == "south" and lie is not None:
                commit = world._commit

                # A cheat commits to what it sends: the commitment binds it to the lie.
                def bound(round: Round, words: np.ndarray) -> None:
                    commit(round, lie(words) if round.step == 3 else words)

                def sent(round: Round, words: np.ndarray, flags: Flags) -> np.ndarray:
                    return send(round, lie(words) if round.step == 3 else words, flags)

                world._commit, world.engine.open_to_parties = bound, sent  # type: ignore[method-assign]
            shards[name].perform(task, world, consents=False)
            return list(world.committed)

        return work

    return federate([party(name) for name in shards])[0][1]


def test_a_lie_within_the_range_gives_another_root_than_the_replay_before_an_auditor(tmp_path: Path) -> None:
    recorded = committed(tmp_path / "first", None)
    replayed = committed(tmp_path / "replay", None)
    assert merkle_root(recorded) == merkle_root(replayed) and len(recorded) == 1 + SCENARIO.steps + 1
    lied = committed(tmp_path / "lie", np.zeros_like)
    assert merkle_root(lied) != merkle_root(replayed)
    assert [a == b for a, b in zip(lied, replayed, strict=True)].count(False) >= 1 and lied[0] == replayed[0]
    assert merkle_root(committed(tmp_path / "seed", None, seed=6)) != merkle_root(recorded)
    # One step can be shown alone.
    require_inclusion(recorded[4], 4, len(recorded), inclusion_proof(recorded, 4), merkle_root(recorded))
    with pytest.raises(SessionRefused):
        require_inclusion(lied[4], 4, len(recorded), inclusion_proof(recorded, 4), merkle_root(recorded))

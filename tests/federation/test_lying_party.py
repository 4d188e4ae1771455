"""A party whose contribution its people can't have made is found by the sum; one that lies within the range, by the
commitments it made: replayed from its people and seed before an auditor, they are others from the step it lied in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.audit import audit
from clients.config import CONFIG_FILE, ClientConfig
from clients.party import TRANSCRIPT
from clients.shard import Shard
from clients.steward import Steward
from lpm import ring
from lpm.cli import main
from lpm.errors import InputError, SessionRefused
from lpm.estimators import evaluate
from lpm.privacy.commitments import inclusion_proof, require_inclusion
from lpm.privacy.ledger import Ledger, verify
from lpm.privacy.secure_sum import Flags, Round
from lpm.privacy.withheld import tensor_of
from lpm.protocol.identity import load_identity, make_local_authority
from lpm.protocol.manifest import Entry, Manifest, Terms
from lpm.protocol.messages import Task
from lpm.scenario import load
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.transcript import Transcript, read_transcript
from tests.e2e.processes import CLINICS
from tests.federation.harness import federate

SETTINGS = {"scenario.steps": "6", "federation.thresholds": "cases"}
SCENARIO = load(CLINICS).with_options(agents=240, settings=SETTINGS)
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


def lie_on_day_3(world: FederatedWorld, lie: Callable[[np.ndarray], np.ndarray]) -> None:
    """Have a party contribute something else on day 3; it commits to what it sends, which binds it to the lie."""
    commit, send = world._commit, world.engine.open_to_parties

    def bound(round: Round, words: np.ndarray) -> None:
        commit(round, lie(words) if round.step == 3 else words)

    def sent(round: Round, words: np.ndarray, flags: Flags) -> np.ndarray:
        return send(round, lie(words) if round.step == 3 else words, flags)

    world._commit, world.engine.open_to_parties = bound, sent  # type: ignore[method-assign]


TASKS = (
    Task("simulate", 1, np.array([[0.5, 0.05, 0.6]]), options={"plain": True}),
    Task("evaluate", 2, np.array([[0.5, 0.05, 0.6]]), "fd", options={"replicates": 1}),
)


def took_part(folder: Path, lie: Callable[[np.ndarray], np.ndarray] | None = None) -> Path:
    """The run of a session of two tasks, in the second of which south may lie on day 3."""
    names = ("north", "south", "west")
    make_local_authority(folder / "keys", names)
    identities = {name: load_identity(folder / "keys" / "parties" / name) for name in names}
    terms = Terms(SCENARIO.name, SCENARIO.hash, gradient="fd", steps=SCENARIO.steps, agents=SCENARIO.agents)
    roster = tuple(Entry(name, each.certificate, b"e" * 32, bytes(64)) for name, each in identities.items())
    manifest = Manifest(b"s" * 16, roster, terms)

    def party(name: str) -> Callable[[FederatedWorld], None]:
        config = ClientConfig(
            scenario=CLINICS,
            party=name,
            keys=folder / "keys" / "parties" / name,
            out=folder / "run",
            agents=240,
            seed=5,
            settings=SETTINGS,
            unsafe=True,
        )
        config.folder.mkdir(parents=True)
        config.write(config.folder / CONFIG_FILE)
        key = (config.keys / "storage.key").read_bytes()
        steward = Steward(config, identities[name], SCENARIO)
        own = {"seed": 5, "key": key, "data": None, "every": 0, "calibrates": True}
        shard = Shard(SCENARIO, [name], folder=config.folder, **own)  # type: ignore[arg-type]

        def work(world: FederatedWorld) -> None:
            world.witness = transcript = Transcript(config.folder / TRANSCRIPT, key, steward.policy.keep_mib << 20)
            steward.begin(manifest)
            for task in TASKS:
                steward.admit(task, world, shard.question(task), transcript)
                if name == "south" and lie is not None and task.kind == "evaluate":
                    lie_on_day_3(world, lie)
                shard.perform(task, world, consents=False)
                steward.finish(released=False)
            steward.end(None)

        return work

    federate([party(name) for name in names], thresholds=[tensor_of("cases")])
    return folder / "run" / "parties"


def test_an_honest_party_passes_the_audit_and_shows_nothing_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parties = took_part(tmp_path)
    before = {path: path.read_bytes() for path in parties.rglob("*") if path.is_file()}
    found = audit(parties / "south", peers=[parties / "west" / "ledger.jsonl"])
    assert not found.problems and not found.notes and found.tasks == 2
    # Of either task census and steps, and what was told the coordinator: cells and outputs; loss and gradient.
    assert found.commitments == (1 + SCENARIO.steps + 2) + (1 + SCENARIO.steps + 2)
    assert found == audit(parties / "south", scenario=CLINICS, peers=[parties / "north" / "ledger.jsonl"])
    assert audit(parties / "north", trajectories=[2]).tasks == 1
    assert {path: path.read_bytes() for path in parties.rglob("*") if path.is_file()} == before
    # Other people, series or seeds than those of the session are told from a lie.
    config = parties / "south" / CONFIG_FILE
    config.write_text(config.read_text().replace('"seed": 5', '"seed": 6'))
    assert all("are not those that it was answered with" in each for each in audit(parties / "south").problems)
    # The sums that were kept are sealed, and one segment for each time a task was begun.
    key = (tmp_path / "keys" / "parties" / "west" / "storage.key").read_bytes()
    (kept,) = read_transcript(parties / "west" / TRANSCRIPT, key, TASKS[0].digest.hex())
    totals = [total.tobytes() for total in kept.sums.values() if total is not None and np.count_nonzero(total) > 1]
    assert totals and not any(total in data for total in totals for data in before.values())
    # One step can be shown alone, under the root that the ledger has.
    done = next(line for line in verify(parties / "west" / "ledger.jsonl").entries if line.kind == "done")
    leaves, root = [leaf for _, leaf in kept.commitments], bytes.fromhex(done.body["commitments"])
    require_inclusion(leaves[4], 4, len(leaves), inclusion_proof(leaves, 4), root)
    with pytest.raises(SessionRefused):
        require_inclusion(leaves[3], 4, len(leaves), inclusion_proof(leaves, 4), root)
    with pytest.raises(InputError, match=r"RUN/parties/PARTY"):
        audit(tmp_path)
    assert main(["audit-session", str(tmp_path)]) == 2 and "RUN/parties/PARTY" in capsys.readouterr().err


def test_a_party_that_lied_in_one_step_is_named_with_that_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parties = took_part(tmp_path, np.zeros_like)
    (problem,) = audit(parties / "south", peers=[parties / "west" / "ledger.jsonl"]).problems
    assert problem.startswith("evaluate 2: the contribution to emit of step 3 is not what") and "(1 of 9" in problem
    assert main(["audit-session", str(parties / "south")]) == 1
    assert "step 3" in capsys.readouterr().out
    assert not audit(parties / "north").problems and not audit(parties / "west").problems


def test_sums_that_a_party_made_up_are_found_by_the_word_of_another(tmp_path: Path) -> None:
    parties = took_part(tmp_path)
    entries, path = verify(parties / "south" / "ledger.jsonl").entries, tmp_path / "other" / "ledger.jsonl"
    path.parent.mkdir()
    identity = load_identity(tmp_path / "keys" / "parties" / "south")
    other = Ledger(path, "south", identity.certificate, identity.key.sign, lambda *_: None)
    for line in entries[1:]:
        made_up = {"sums": "00" * 32} if line.body.get("task") == TASKS[1].digest.hex() and line.kind == "done" else {}
        other.append(line.kind, {**line.body, **made_up})
    (problem,) = audit(parties / "north", peers=[path]).problems
    assert problem.startswith(
        f"south was told other sums than this party says in the task {TASKS[1].digest.hex()[:16]}"
    )
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "not whole" in audit(parties / "north", trajectories=[1], peers=[path]).problems[0]

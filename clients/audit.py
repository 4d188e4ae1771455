"""The agreed audit of a session: a party replays its shard from its seed, and each commitment it made is opened.

Before every sum a party has committed to its contribution, and its ledger has a root over each task's commitments
(`lpm/privacy/commitments.py`). A party that contributed anything but what its people, series and seed give has bound
itself to the lie: the replay meets another commitment there. It needs the party's own files alone, the sums it was told
included; that they are the true ones is the word of the other parties, whose ledgers hold the same digest of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.config import CONFIG_FILE, ClientConfig, own_folder
from clients.party import TRANSCRIPT, find_seed
from clients.shard import ANSWERED_STEP, Shard
from clients.steward import left_out_of
from lpm.errors import InputError, LpmError, RoundRefused
from lpm.privacy.commitments import leaf_hash, merkle_root
from lpm.privacy.ledger import LEDGER_FILE, Line, verify
from lpm.privacy.policy import read_policy
from lpm.privacy.secure_sum import Consent, Flags, Round, SecureSum
from lpm.protocol.messages import Task, TaskMessage, decode
from lpm.scenario import load
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.transcript import Segment, read_transcript
from lpm.worlds.world import Disclosure

__all__ = ["Finding", "audit"]


@dataclass(frozen=True)
class Finding:
    """What an audit found.

    Attributes:
        party: whose shard was replayed.
        tasks: how many were replayed.
        commitments: how many of their commitments were opened and agree.
        problems: what does not agree, the first step of each task; empty if all does.
        notes: what could not be checked, or rests on this party's word alone.
    """

    party: str
    tasks: int
    commitments: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class _Ends(LpmError):
    """There are no more sums to replay."""


class _Replay(SecureSum):
    """Hands out the sums that a party was told, in place of the other parties, and holds its commitments to account.

    Args:
        parties: how many there were.
        me: which of them this party was.
        segments: of one task.
    """

    def __init__(self, parties: int, me: int, segments: Sequence[Segment]) -> None:
        self.parties, self.me = parties, me
        self.agreed, self.differs, self.seen = 0, list[Round](), set[bytes]()
        self._sums = {address: total for each in segments for address, total in each.sums.items()}
        self._leaves: dict[bytes, set[bytes]] = {}
        self.rounds: dict[bytes, Round] = {}
        for round, leaf in (each for segment in segments for each in segment.commitments):
            self._leaves.setdefault(round.context(), set()).add(leaf)
            self.rounds[round.context()] = round
        # A round of a simulation is numbered by its run: "emit/1"; a kept answer has none.
        self.simulated = any("/" in round.tensor for round in self.rounds.values())

    def committed(self, round: Round, leaf: bytes) -> None:
        """Hold what the replay commits to against what was committed to then."""
        address = round.context()
        then = self._leaves.get(address)
        if then is None:
            return  # the task was cut short before
        self.seen.add(address)
        if then == {leaf}:
            self.agreed += 1
        else:
            self.differs.append(round)

    def opened(self, round: Round, total: NDArray[np.int64]) -> None:
        """Nothing to do."""

    def refused(self, round: Round) -> None:
        """Nothing to do."""

    def open_to_parties(self, round: Round, words: NDArray[np.int64], flags: Flags) -> NDArray[np.int64]:
        """The sum that was opened then."""
        if round.step == ANSWERED_STEP:
            return np.full(words.shape, 0 if self.simulated else self.parties, dtype=np.int64)
        address = round.context()
        if address not in self._sums:
            raise _Ends(f"The sum {round.tensor} of step {round.step} was not kept.")
        total = self._sums[address]
        if total is None:
            raise RoundRefused(rescale=True)
        return total.reshape(words.shape)

    def open_to_coordinator(
        self, round: Round, words: NDArray[np.int64], flags: Flags, consent: Consent | None = None
    ) -> None:
        """Nobody is told anything."""

    def open_if_enough(
        self,
        round: Round,
        words: NDArray[np.int64],
        people: NDArray[np.int64],
        flags: Flags,
        *,
        fewest_people: int,
        fewest_institutions: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """What was opened then, and which cells."""
        totals, told = self.open_to_parties(round, np.empty((2, len(people)), dtype=np.int64), flags)
        return totals[:, None], told.astype(np.bool_)


def audit(
    folder: Path,
    *,
    keys: Path | None = None,
    scenario: Path | None = None,
    trajectories: Sequence[int] = (),
    peers: Sequence[Path] = (),
) -> Finding:
    """Replay a party's tasks of a run, and open the commitments that it made in them.

    Args:
        folder: the party's part of the run.
        keys: its key folder; None: as when it took part.
        scenario: its installation of the scenario; None: as when it took part.
        trajectories: numbers of the tasks to replay; none: all.
        peers: other parties' ledgers, by which the sums that this party was told are checked.

    Returns:
        what was found. Nothing private is in it, and nothing in the folder has changed.

    Raises:
        InputError: if a file is missing that the replay needs.
        CheckpointError: if what was kept was altered.
    """
    config = _configuration(folder, keys, scenario)
    verdict = verify(folder / LEDGER_FILE)
    problems = [f"The ledger is not whole: {each}" for each in verdict.problems]
    notes: list[str] = []
    if not any(line.kind == "session" for line in verdict.entries):
        raise InputError(f"{folder} took part in no session.", "Name parties/PARTY of a finished run.")
    if not peers:
        notes.append("that the sums it was told are the true ones is its own word: give another's ledger with --peer")
    problems += [text for path in peers for text in _compare_sums(verdict.entries, path)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".audit-") as scratch:
        shard, code = _shard(config, verdict.entries, Path(scratch))
        recorded = next(str(line.body["code"]) for line in reversed(verdict.entries) if line.kind == "session")
        if recorded != code:
            problems.append(f"The code, lpm's own included, was {recorded[:16]}… then and is {code[:16]}… now.")
        auditor = _Auditor(config, shard, verdict.entries, problems)
        auditor.work(set(trajectories))
    notes += [f"{len(names)} of the tasks {what} (first: {names[0]})" for what, names in auditor.unchecked.items()]
    return Finding(verdict.party, auditor.tasks, auditor.commitments, tuple(problems), tuple(notes))


def _configuration(folder: Path, keys: Path | None, scenario: Path | None) -> ClientConfig:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} holds no {CONFIG_FILE}.", "Name a party's part of a run: RUN/parties/PARTY.")
    config = ClientConfig.read(folder / CONFIG_FILE)
    return replace(
        config,
        out=folder.resolve().parents[1],
        keys=own_folder(config.keys if keys is None else keys, config.party),
        scenario=config.scenario if scenario is None else scenario,
    )


def _shard(config: ClientConfig, entries: Sequence[Line], scratch: Path) -> tuple[Shard, str]:
    """The party's shard as it was, with nothing of what it has kept but its seed."""
    scenario = load(config.scenario).with_options(agents=config.agents, settings=config.settings)
    key = (config.keys / "storage.key").read_bytes()
    seed = find_seed(config, key)
    if seed is None:
        raise InputError(f"{config.folder} holds no seed: without it the shard can't be replayed.")
    gradient = next(str(line.body["gradient"]) for line in entries if line.kind == "session")
    shard = Shard(
        scenario,
        config.institutions,
        seed=seed,
        folder=scratch,
        key=key,
        data=config.data,
        every=0,
        calibrates=gradient != "none",
        left_out=left_out_of(read_policy(config.policy_file), config.policy_file),
    )
    return shard, scenario.code


def _compare_sums(entries: Sequence[Line], path: Path) -> list[str]:
    """Tasks of whose sums another party's ledger says something else."""
    other = verify(path)
    if other.problems:
        return [f"The ledger {path} is not whole: {other.problems[0]}"]
    theirs = _sums(other.entries)
    return [
        f"{other.party} was told other sums than this party says in the task {task[:16]}…."
        for (session, task), sums in _sums(entries).items()
        if theirs.get((session, task), sums) != sums
    ]


def _sums(entries: Sequence[Line]) -> Mapping[tuple[str, str], str]:
    """(session, task) → digest of the sums, of tasks that were done."""
    found, session = {}, ""
    for line in entries:
        if line.kind == "session":
            session = str(line.body["session"])
        elif line.kind == "done":
            found[session, str(line.body["task"])] = str(line.body["sums"])
    return found


class _Auditor:
    """Goes through a ledger, task by task."""

    def __init__(
        self,
        config: ClientConfig,
        shard: Shard,
        entries: Sequence[Line],
        problems: list[str],
    ) -> None:
        self.tasks = self.commitments = 0
        self.unchecked: dict[str, list[str]] = {}
        self._config, self._shard, self._entries = config, shard, entries
        self._problems = problems
        self._key = (config.keys / "storage.key").read_bytes()
        self._roster: list[str] = []

    def work(self, trajectories: set[int]) -> None:
        """Check roots in the order of the ledger, and replay each task where it was first asked."""
        replayed: set[str] = set()
        roots: list[bytes] = []
        for line in self._entries:
            if line.kind == "session":
                self._roster, roots = list(line.body["roster"]), []
            elif line.kind == "task":
                digest, number = str(line.body["task"]), int(line.body["trajectory"])
                if digest not in replayed and (not trajectories or number in trajectories):
                    replayed.add(digest)
                    self._replay(line.body, digest)
            elif line.kind in ("done", "broken"):
                roots.append(leaf_hash(bytes.fromhex(str(line.body["commitments"]))))
            elif line.kind == "close" and line.body["commitments"] != merkle_root(roots).hex():
                self._problems.append("The root of a session is not that of its tasks.")

    def _replay(self, asked: Mapping[str, Any], digest: str) -> None:
        name = f"{asked['kind']} {asked['trajectory']}"
        segments = read_transcript(self._config.folder / TRANSCRIPT, self._key, digest)
        lines = [each for each in self._entries if each.body.get("task") == digest and each.kind in ("done", "broken")]
        held = {_root(each): each for each in segments}
        for line in lines:
            if str(line.body["commitments"]) not in held:
                self._problems.append(f"{name}: the commitments that were kept have another root than the ledger says.")
                return
        if len(lines) < len(segments):
            self._note("cut off once before the ledger had a root: that part is this party's word", name)
        if any(not line.body["kept"] for line in lines):
            self._note("not replayed, since its sums were not kept (the policy's audit.keep_mib)", name)
            return
        task = self._task(segments, digest)
        if task is None:
            self._problems.append(f"{name}: the task that was kept is not the one in the ledger.")
            return
        if self._shard.question(task) != asked["question"]:
            self._problems.append(
                f"{name}: the people, the series, the seed, the code or the list of those left out are not those that "
                "it was answered with."
            )
            return
        engine = _Replay(len(self._roster), self._roster.index(self._config.party), segments)
        if not engine.simulated and not self._shard.keeps(task):
            if engine.rounds:
                self._note("not replayed, since its answer was kept from a task that was not", name)
            return
        rule = self._shard.scenario
        disclosure = None if self._config.unsafe else Disclosure(rule.minimum_people, rule.minimum_institutions)
        world = FederatedWorld(engine, disclosure)
        world.witness = engine
        try:
            self._shard.perform(task, world, consents=False)
        except LpmError as problem:
            # A task that was cut short ends where its sums do, or at what ended the session then.
            if any(line.kind == "done" for line in lines):
                self._problems.append(f"{name}: the replay does not come to its end: {problem.message}")
        self.tasks += 1
        self.commitments += engine.agreed
        unmet = [round for address, round in engine.rounds.items() if address not in engine.seen]
        if engine.differs or unmet:
            first = (engine.differs or unmet)[0]
            count = len(engine.differs) + len(unmet)
            self._problems.append(
                f"{name}: the contribution to {first.tensor.partition('/')[0]} of {_moment(first)} is not what the "
                f"people, the series and the seed give ({count} of {len(engine.rounds)} commitments)."
            )

    def _note(self, what: str, name: str) -> None:
        self.unchecked.setdefault(what, []).append(name)

    @staticmethod
    def _task(segments: Sequence[Segment], digest: str) -> Task | None:
        sent = decode(segments[0].content) if segments else None
        return sent.task if isinstance(sent, TaskMessage) and sent.task.digest.hex() == digest else None


def _root(segment: Segment) -> str:
    return merkle_root([leaf for _, leaf in segment.commitments]).hex()


def _moment(round: Round) -> str:
    run = round.tensor.partition("/")[2]
    where = f" in run {run}" if run not in ("", "1") else ""
    return (f"step {round.step}" if round.step >= 0 else "the end" if round.step == -2 else "the start") + where

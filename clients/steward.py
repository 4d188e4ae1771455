"""What an institution's steward stands behind in one session: the policy in force, the budget, and the ledger.

The policy is the institution's own file; neither the coordinator nor a flag of another party changes it. Whatever is
asked is judged before it is computed, charged before it is opened, and recorded, refusals too.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clients.config import ClientConfig, own_folder
from lpm.checkpoint import DiskFull
from lpm.errors import InputError, LpmError, PolicyRefused
from lpm.leakage import LEAKAGE_PAGE, read_leakage, write_page
from lpm.oversight import APPROVALS
from lpm.privacy.budget import Budget
from lpm.privacy.commitments import leaf_hash, merkle_root
from lpm.privacy.dp import epsilon_of
from lpm.privacy.ledger import LEDGER_FILE, Ledger
from lpm.privacy.policy import PERMISSIVE, Charge, Policy, Question, Request, read_policy
from lpm.protocol.identity import Identity, verify_certificate, verify_signature
from lpm.protocol.manifest import Manifest
from lpm.protocol.messages import Release, Task, TaskMessage
from lpm.protocol.registrar import SUCCESSION
from lpm.scenario import Scenario
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.transcript import Transcript

__all__ = ["MANIFEST", "STOP", "Steward", "left_out_of"]

STOP = "stop"
"""The kill switch: while a file of this name lies beside the policy, nothing is answered."""

MANIFEST = "manifest.json"
"""The last manifest a party was shown, in its part of the run."""

_log = logging.getLogger(__name__)


class Steward:
    """One party's steward.

    Args:
        config: the institution's own.
        identity: its keys, which sign the ledger.
        scenario: its own installation's, after settings.

    Raises:
        InputError: if the policy or the budget can't be read.
        LedgerBroken: if the ledger of the run's earlier sessions was tampered with.
    """

    def __init__(self, config: ClientConfig, identity: Identity, scenario: Scenario) -> None:
        self._identity, self._config, self._scenario = identity, config, scenario
        self._under_way: tuple[Task, FederatedWorld, Transcript | None] | None = None
        self._roots: list[bytes] = []
        self._file = config.policy_file
        if config.policy is None and not self._file.exists():
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file.write_text(PERMISSIVE)
        self.policy: Policy = read_policy(self._file)
        self.left_out = left_out_of(self.policy, self._file)
        self.budget = Budget(self._file.with_name(f"budget-{config.party}.jsonl"))
        self.ledger = Ledger(
            config.folder / LEDGER_FILE,
            identity.name,
            identity.certificate,
            identity.key.sign,
            self._trust,
            _succession(own_folder(config.keys, config.party)),
        )

    def _trust(self, certificate: bytes, party: str, now: dt.datetime) -> None:
        verify_certificate(certificate, party, self._identity.authority, now)

    @contextmanager
    def _recording(self, asked: str) -> Iterator[None]:
        """Whatever is refused inside is recorded."""
        try:
            yield
        except PolicyRefused as refusal:
            self.ledger.append("refused", {"asked": asked, "why": refusal.message})
            raise

    def watch(self) -> None:
        """Refuse everything while the kill switch is on; called before every contribution.

        Raises:
            PolicyRefused: while the file `stop` lies beside the policy.
        """
        if self._file.with_name(STOP).exists():
            with self._recording("anything"):
                raise PolicyRefused(f"{self._identity.name}'s steward has stopped all answers (the file {STOP!r}).")

    def judge(self, manifest: Manifest) -> None:
        """Refuse, before signing, a session that the policy forbids or that waits for the steward's approval.

        Args:
            manifest: as the coordinator offers it.

        Raises:
            PolicyRefused: with the line of the policy.
        """
        (self._config.folder / MANIFEST).write_bytes(manifest.encode())
        scenario, terms = self._scenario, manifest.terms
        request = Request(
            scenario=scenario.name,
            code=scenario.code,
            settings=scenario.hash,
            engine=terms.sharing,
            institutions=len(manifest.parties),
            people=scenario.minimum_people,
            outputs=terms.outputs,
            resolution_days=terms.resolution_days,
            mode=scenario.privacy.mode,
            honest=scenario.privacy.honest,
            public_seed=self._config.seed is not None,
            no_disclosure_control=self._config.unsafe,
            release_fit=self._config.release_fit and terms.gradient != "none",
        )
        self.watch()
        with self._recording(f"the session {manifest.digest.hex()}"):
            self.policy.judge(request, dt.datetime.now())
            if self.policy.approval == "hand":
                self._require_approval(manifest)

    def _require_approval(self, manifest: Manifest) -> None:
        path = self._file.parent / APPROVALS / f"{manifest.agreement.hex()}.sig"
        try:
            signature = bytes.fromhex(path.read_text())
            verify_signature(
                self._identity.key.public_key(), self._identity.name, b"approval", manifest.agreement, signature
            )
        except (OSError, ValueError, LpmError):
            raise PolicyRefused(
                f"The policy forbids it: {self.policy.line('approval')}. {self._identity.name}'s steward has not signed"
                " these terms.",
                f"There: lpm manifest sign {self._config.folder / MANIFEST} --keys KEYS --policy {self._file}",
            ) from None

    def begin(self, manifest: Manifest) -> None:
        """Record a formed session.

        Args:
            manifest: which all parties signed.
        """
        terms = manifest.terms
        self.ledger.append(
            "session",
            {
                "manifest": manifest.digest.hex(),
                "session": manifest.session.hex(),
                "roster": list(manifest.parties),
                "scenario": terms.scenario,
                "scenario_hash": terms.scenario_hash,
                "code": self._scenario.code,
                "sharing": terms.sharing,
                "outputs": list(terms.outputs),
                "resolution_days": terms.resolution_days,
                "gradient": terms.gradient,
                "privacy": terms.privacy,
                "steps": terms.steps,
                "agents": terms.agents,
                "weaker": list(terms.weaker),
                "institutions": list(self._config.institutions),
                "releases_fit": self._config.release_fit,
                "policy": self.policy.label or "the steward's own",
                "people_left_out": bool(self.left_out),
                "smallest_cell": 1 if self._config.unsafe else self._scenario.minimum_people,
            },
        )

    def admit(self, task: Task, world: FederatedWorld, question: str, transcript: Transcript | None = None) -> None:
        """Judge a task, charge its answer unless it was charged before, and record it, before anything is computed.

        Args:
            task: of the coordinator.
            world: through which it will be answered.
            question: what stands for the answer, as `Shard.question` says.
            transcript: where the task's rounds are to be kept for an audit.

        Raises:
            PolicyRefused: with the line of the policy.
            DiskFull: if the charge can't be written.
        """
        self.watch()
        names = tuple(parameter.name for parameter in self._scenario.parameters)
        noise = self._scenario.mechanism.releases(task.kind)
        asked = Question(task.kind, task.theta, names[: task.theta.shape[1]], task.gradient, noise)
        charged = self.budget.charged(question)
        draws, parameters = task.theta.shape
        with self._recording(f"{task.kind} {task.trajectory}: {draws} draws"):
            self.policy.open_at(dt.datetime.now())
            spent = self.budget.spent
            epsilon = epsilon_of((spent + asked.charge).noise, self.policy.delta)
            cost = self.policy.admit(asked, spent, epsilon, charged=charged)
        if not charged:
            self.budget.charge(question, cost)
        self.ledger.append(
            "task",
            {
                "kind": task.kind,
                "trajectory": task.trajectory,
                "draws": int(draws),
                "parameters": int(parameters),
                "gradient": task.gradient,
                "task": task.digest.hex(),
                "question": question,
                "charged": {} if charged else _plain(cost),
                "answered_before": charged,
                **({"epsilon": epsilon, "delta": self.policy.delta} if noise else {}),
            },
        )
        if transcript is not None:
            transcript.begin(task.digest, TaskMessage(0, task).encode())
        self._under_way = task, world, transcript

    def finish(self, *, released: bool) -> None:
        """Record what the task under way has opened, and to whom.

        Args:
            released: whether the party's own fit goes to the coordinator in the clear.
        """
        self._record("done", {"released": "the fit and its series"} if released else {})

    def _record(self, kind: str, more: Mapping[str, Any]) -> None:
        assert self._under_way is not None
        task, world, transcript = self._under_way
        self._under_way = None
        opened = [
            {"tensor": tensor, "to": to, "first": o.first, "last": o.last, "sums": o.rounds, "words": o.words}
            for (tensor, to), o in world.opened.items()
        ]
        rescaled = sum(trajectory == task.trajectory for trajectory, _, _ in world.rescaled)
        root = merkle_root(world.committed)
        self._roots.append(leaf_hash(root))
        kept = transcript is not None and transcript.complete
        bound = {"commitments": root.hex(), "committed": len(world.committed), "sums": world.sums, "kept": kept}
        self.ledger.append(kind, {"task": task.digest.hex(), "opened": opened, "rescaled": rescaled, **bound, **more})

    def parting(self) -> Release:
        """What the coordinator keeps of the ledger: its head, by which one that is set back later is found out."""
        return Release("ledger", {}, {"head": self.ledger.head, "lines": self.ledger.lines})

    def end(self, problem: BaseException | None) -> None:
        """Record how the session ended.

        Args:
            problem: what ended it; None if its work is done.
        """
        reason = "" if problem is None else str(problem) if isinstance(problem, LpmError) else type(problem).__name__
        try:
            if self._under_way is not None:
                self._record("broken", {})
            self.ledger.append("close", {"reason": reason, "commitments": merkle_root(self._roots).hex()})
            write_page(self._config.folder / LEAKAGE_PAGE, [read_leakage(self.ledger.path)])
        except DiskFull as full:
            if problem is None:
                raise
            _log.warning("%s The ledger does not say how the session ended.", full.message)
        _log.info("The ledger has %d lines; its head is %s.", self.ledger.lines, self.ledger.head)


def _succession(keys: Path) -> dict[str, str]:
    """The old key's word for the present one, if the keys were rotated."""
    path = keys / SUCCESSION
    return {} if not path.is_file() else dict(json.loads(path.read_text()))


def left_out_of(policy: Policy, path: Path) -> tuple[int, ...]:
    """The people whom a policy leaves out.

    Args:
        policy: names the file, if there is one.
        path: of the policy; the file's name is relative to it.

    Returns:
        their ids.

    Raises:
        InputError: naming the file and the line that is no id. The ids themselves are not quoted.
    """
    if not policy.opt_out:
        return ()
    file = path.parent / policy.opt_out
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"The list of people to leave out, {file}, can't be read.", "See people.opt_out.") from None
    ids = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isdecimal() or int(text) >= 2**64:
            raise InputError(f"{file}, line {number}: one id a line, a whole number from 0 and below 2^64.")
        ids.append(int(text))
    return tuple(sorted(set(ids)))


def _plain(cost: Charge) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(cost).items() if value}

"""What an institution's steward stands behind in one session: a ledger of all that was asked, opened and refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from clients.config import ClientConfig
from lpm.checkpoint import DiskFull
from lpm.errors import LpmError
from lpm.privacy.ledger import LEDGER_FILE, Ledger
from lpm.protocol.identity import Identity, verify_certificate
from lpm.protocol.manifest import Manifest
from lpm.protocol.messages import Release, Task
from lpm.worlds.federated import FederatedWorld

__all__ = ["Steward"]

_log = logging.getLogger(__name__)


class Steward:
    """One party's steward.

    Args:
        config: the institution's own.
        identity: its keys, which sign the ledger.

    Raises:
        LedgerBroken: if the ledger of the run's earlier sessions was tampered with.
    """

    def __init__(self, config: ClientConfig, identity: Identity) -> None:
        self._identity = identity
        self._config = config
        self._under_way: tuple[Task, FederatedWorld] | None = None
        self.ledger = Ledger(
            config.folder / LEDGER_FILE,
            identity.name,
            identity.certificate,
            identity.key.sign,
            self._trust,
        )

    def _trust(self, certificate: bytes, party: str, now: datetime) -> None:
        verify_certificate(certificate, party, self._identity.authority, now)

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
                "sharing": terms.sharing,
                "outputs": list(terms.outputs),
                "gradient": terms.gradient,
                "steps": terms.steps,
                "agents": terms.agents,
                "weaker": list(terms.weaker),
                "institutions": list(self._config.institutions),
                "releases_fit": self._config.release_fit,
            },
        )

    def admit(self, task: Task, world: FederatedWorld) -> None:
        """Record what is asked, before anything is computed for it.

        Args:
            task: of the coordinator.
            world: through which it will be answered.
        """
        self._under_way = task, world
        self.ledger.append(
            "task",
            {
                "kind": task.kind,
                "trajectory": task.trajectory,
                "draws": int(task.theta.shape[0]),
                "parameters": int(task.theta.shape[1]),
                "gradient": task.gradient,
                "task": task.digest.hex(),
            },
        )

    def finish(self, *, released: bool) -> None:
        """Record what the task under way has opened, and to whom.

        Args:
            released: whether the party's own fit goes to the coordinator in the clear.
        """
        self._record("done", {"released": "the fit and its series"} if released else {})

    def _record(self, kind: str, more: Mapping[str, Any]) -> None:
        assert self._under_way is not None
        task, world = self._under_way
        self._under_way = None
        opened = [
            {"tensor": tensor, "to": to, "first": o.first, "last": o.last, "sums": o.rounds, "words": o.words}
            for (tensor, to), o in world.opened.items()
        ]
        rescaled = sum(trajectory == task.trajectory for trajectory, _, _ in world.rescaled)
        self.ledger.append(kind, {"task": task.digest.hex(), "opened": opened, "rescaled": rescaled, **more})

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
            self.ledger.append("close", {"reason": reason})
        except DiskFull as full:
            if problem is None:
                raise
            _log.warning("%s The ledger does not say how the session ended.", full.message)
        _log.info("The ledger has %d lines; its head is %s.", self.ledger.lines, self.ledger.head)

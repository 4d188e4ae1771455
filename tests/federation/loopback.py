"""A whole federation on real sockets in one process: each party in a thread, over mutual TLS on loopback."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.config import ClientConfig
from clients.streams import PartySession, join
from lpm.protocol.identity import make_local_authority
from lpm.protocol.manifest import Terms
from server.config import CoordinatorConfig
from server.relay import CoordinatorSession, gather

SCENARIO_HASH = hashlib.sha256(b"a scenario").hexdigest()


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_thread(act: Callable[[], Any]) -> Future[Any]:
    """Run something in a thread of its own.

    Args:
        act: what to run.

    Returns:
        Its result or what it raised.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as problem:
            future.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return future


@dataclass
class Federation:
    """Keys, an address and settings for one run.

    Args:
        keys: a folder for or of `make_local_authority`.
        parties: the roster.
        deadline_seconds: of a round.
        join_seconds: for both sides.
    """

    keys: Path
    parties: Sequence[str] = ("bronx", "queens", "kings")
    deadline_seconds: float = 30.0
    join_seconds: float = 60.0
    port: int = field(default_factory=free_port)
    taps: dict[str, Callable[[str, str, bytes], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.keys.exists():
            make_local_authority(self.keys, self.parties)

    @property
    def address(self) -> str:
        """Where the coordinator listens."""
        return f"127.0.0.1:{self.port}"

    def join(self, party: str, scenario_hash: str = SCENARIO_HASH, **changes: Any) -> PartySession:
        """Join as a party; `changes` are fields of its configuration."""
        settings: dict[str, Any] = {
            "scenario": self.keys,
            "party": party,
            "keys": self.keys,
            "out": self.keys / "run",
            "coordinator": self.address,
        }
        config = ClientConfig(**(settings | changes))
        return join(config, scenario_hash, join_seconds=self.join_seconds, tap=self.taps.get(party))

    def gather(self, **terms: Any) -> CoordinatorSession:
        """Gather the parties; `terms` are fields of the manifest's terms."""
        config = CoordinatorConfig(
            scenario=self.keys,
            keys=self.keys,
            out=self.keys / "run",
            parties=tuple(self.parties),
            data_address=self.address,
            join_seconds=self.join_seconds,
        )
        agreed = Terms("a scenario", SCENARIO_HASH, **({"deadline_seconds": self.deadline_seconds} | terms))
        return gather(config, agreed, tap=self.taps.get("coordinator"))

    def start(self, act: Callable[[PartySession, str], Any]) -> Mapping[str, Future[Any]]:
        """Start every party in its thread: join, act, close."""

        def party(name: str) -> Any:
            with self.join(name) as session:
                return act(session, name)

        return {name: in_thread(lambda name=name: party(name)) for name in self.parties}

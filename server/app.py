"""The coordinator's Flower ServerApp: starts one session at every party, holds it, and collects how it ended.

It asks each party one thing, "start", with the session's name and the address of the data plane, and nothing else: all
rounds run on the data plane (`server.coordinator`). The same app runs over Flower's SuperLink and over `server.grid`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from lpm.errors import RESUME, Interrupted, LpmError, PeerLost, SessionRefused
from server.config import CONFIG_VARIABLE, CoordinatorConfig

__all__ = ["app", "hold_session"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_GRACE_SECONDS = 4.0
_LIFE_SECONDS = 30 * 86_400.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Hold the session that `LPM_COORDINATOR_CONFIG` describes.

    Args:
        grid: carries the messages to the parties.
        context: its state receives the record "status": exit, error (a type's name) and message.
    """
    config = CoordinatorConfig.read(Path(os.environ[CONFIG_VARIABLE]))
    try:
        hold_session(grid, config)
        status: dict[str, int | str] = {"exit": 0}
    except KeyboardInterrupt:
        status = _failed(Interrupted("The session was stopped.", RESUME))
    except LpmError as problem:
        status = _failed(problem)
    except Exception as problem:  # Flower would send its text away; the log keeps it
        logging.getLogger().error("the session failed", exc_info=True)
        status = {
            "exit": 1,
            "error": type(problem).__name__,
            "message": f"The session failed ({type(problem).__name__}); {config.out / 'coordinator.log'} says where.",
        }
    context.state["status"] = ConfigRecord({**status})


def hold_session(grid: Grid, config: CoordinatorConfig) -> None:
    """Start the session at all parties, run the coordinator's side of it, and wait until all have answered.

    Args:
        grid: carries the messages.
        config: the session.

    Raises:
        SessionRefused: a party did not join, or could not begin.
        PeerLost: a party went away.
        Interrupted: the session was stopped from outside.
    """
    from server.coordinator import run  # brings the posterior and torch, while the parties do the same

    nodes = _gather(grid, config)
    messages = []
    for party in config.parties:
        order = ConfigRecord({"session": config.session, "data_address": config.data_address, "task": "start"})
        messages.append(Message(RecordDict({"order": order}), nodes[party], "query.start", ttl=_LIFE_SECONDS))
    identifiers = list(grid.push_messages(messages))
    watch = _Watch(grid, dict(zip(identifiers, config.parties, strict=True)))
    watch.start()
    try:
        run(config)
    except (KeyboardInterrupt, Interrupted):
        if watch.culprit is None:
            raise
        raise watch.culprit from None
    finally:
        watch.finish()


class _Watch(threading.Thread):
    """Collects the parties' answers; one that could not take part ends the session for all."""

    def __init__(self, grid: Grid, asked: dict[str, str]) -> None:
        super().__init__(name="control-watch", daemon=True)
        self.culprit: LpmError | None = None
        self._grid = grid
        self._asked = asked
        self._ending = threading.Event()
        self._holder = threading.get_ident()

    def run(self) -> None:
        """Read answers until all are there, or for a moment after the session has ended."""
        end, pause = float("inf"), threading.Event()
        while self._asked and time.monotonic() < end:
            pause.wait(_POLL_SECONDS)
            if self._ending.is_set():
                end = min(end, time.monotonic() + _GRACE_SECONDS)
            self._read(self._grid.pull_messages(list(self._asked)))
            if self.culprit is not None and not self._ending.is_set():
                # The data plane usually finds out by itself, and with more to say.
                if not self._ending.wait(_GRACE_SECONDS) and self._holder == threading.main_thread().ident:
                    signal.pthread_kill(self._holder, signal.SIGINT)
                return

    def finish(self) -> None:
        """Wait a moment for the last answers."""
        self._ending.set()
        self.join(_GRACE_SECONDS + 2)

    def _read(self, replies: Iterable[Message]) -> None:
        for reply in replies:
            party = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if party is None:
                continue
            if reply.has_error() and self._ending.is_set():
                _log.info("%s left without a word on the control plane.", party)
                continue
            if reply.has_error():
                _log.warning("%s gave no answer on the control plane (%s).", party, reply.error.reason)
                self.culprit = self.culprit or PeerLost(party, "its process went away")
                continue
            status = reply.content.config_records.get("status", ConfigRecord())
            error = str(status.get("error", ""))
            if error:
                _log.warning("%s has ended: %s.", party, error)
            if error and error not in {"PeerLost", "Interrupted"}:  # those two are consequences
                self.culprit = self.culprit or SessionRefused(
                    f"{party} could not take part ({error}).", "Its own log says why."
                )


def _gather(grid: Grid, config: CoordinatorConfig) -> dict[str, int]:
    end = time.monotonic() + config.join_seconds
    pause = threading.Event()
    while True:
        nodes = {node.name: node.node_id for node in grid.get_nodes()}
        missing = [party for party in config.parties if party not in nodes]
        if not missing:
            return nodes
        if time.monotonic() > end:
            raise SessionRefused(
                f"{', '.join(missing)} did not connect within {config.join_seconds:g} seconds.",
                "Start `lpm client` there, and check `--control-address`.",
            )
        pause.wait(_POLL_SECONDS)


def _failed(problem: LpmError) -> dict[str, int | str]:
    return {"exit": problem.exit_code, "error": type(problem).__name__, "message": str(problem)}

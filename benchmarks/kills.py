"""Kills of real processes in the middle of sums by masks: at each message of a simulation's and of a droppable round.

    python benchmarks/kills.py [--json FILE]

Five parties over mutual TLS on loopback; one is a process of its own and kills itself (SIGKILL) as one message is about
to leave it, or has just arrived. Then: in rounds that can lose parties the right sum of who contributed is opened, and
the next one too; in all others nobody opens, everybody is told who is lost, and a new session opens the right sum.
Ten messages, two victims: twenty kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.config import ClientConfig
from clients.streams import join
from lpm.errors import PeerLost
from lpm.privacy.secure_sum import Flags, Round, Stage
from lpm.protocol.identity import make_local_authority
from lpm.protocol.manifest import Terms
from lpm.protocol.messages import Reply, Share, StageMessage, StageReply, Task, decode
from server.config import CoordinatorConfig
from server.relay import CoordinatorSession, gather

PARTIES = ("bronx", "kings", "manhattan", "queens", "richmond")
POINTS = [(kind, way) for kind in ("simulation", *(stage.name for stage in Stage)) for way in ("up", "down")]
_HASH = hashlib.sha256(b"kills").hexdigest()
_STEPS = 3
_KILLED_AT = 1
_WORDS = 200


def words(name: str, step: int) -> NDArray[np.int64]:
    """What a party contributes."""
    return np.random.default_rng([PARTIES.index(name), step]).integers(-(2**40), 2**40, _WORDS)


def everybodys(step: int, parties: Sequence[str] = PARTIES) -> NDArray[np.int64]:
    """What is to be opened."""
    return np.asarray(np.sum([words(name, step) for name in parties], axis=0), dtype=np.int64)


def _fatal(point: tuple[str, str] | None, way: str, frame: bytes) -> bool:
    if point is None or way != point[1]:
        return False
    message = decode(frame)
    if isinstance(message, Share | Reply):
        address = message.header.round if isinstance(message, Share) else message.round
        return point[0] == "simulation" and address.step == _KILLED_AT
    stage = message.stage if isinstance(message, StageMessage | StageReply) else None
    tensor = message.header.round.tensor if isinstance(message, StageMessage) else getattr(message, "round", None)
    tensor = tensor.tensor if isinstance(tensor, Round) else tensor
    return stage is not None and stage.name == point[0] and tensor == "loss"


def take_part(keys: Path, name: str, address: str, point: tuple[str, str] | None = None) -> list[int]:
    """Be a party: three steps of a simulation, a loss, a gradient; which steps were opened to the right sum.

    Args:
        keys: the folder of all keys.
        name: the party.
        address: of the coordinator.
        point: the message at which this process kills itself.
    """

    def tap(way: str, party: str, frame: bytes) -> None:
        if _fatal(point, way, frame):
            os.kill(os.getpid(), signal.SIGKILL)

    config = ClientConfig(scenario=keys, party=name, keys=keys, out=keys, coordinator=address, sharing="masked")
    opened: list[int] = []
    with join(config, _HASH, tap=tap) as session:
        for task in session.tasks():
            for step in range(_STEPS):
                round_ = Round(task.trajectory, step, "city", 0, task.digest)
                total = session.secure_sum.open_to_parties(round_, words(name, step), Flags(b"e"))
                assert (total == everybodys(step)).all(), "a wrong sum"
                opened.append(step)
            for step, tensor in ((_STEPS, "loss"), (_STEPS + 1, "gradient")):
                round_ = Round(task.trajectory, -2, tensor, 0, task.digest)
                session.secure_sum.open_to_coordinator(round_, words(name, step), Flags(b""))
            session.done(task)
    return opened


def _in_thread(act: Any) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as problem:
            future.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return future


class _Federation:
    """One session: the victim in a process of its own, the others in threads."""

    def __init__(self, keys: Path, victim: str, point: tuple[str, str] | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, __file__, "--keys", str(keys), "--address", self.address, "--party", victim]
        self.process = subprocess.Popen([*command, *(["--point", *point] if point else [])])
        self.others = {
            name: _in_thread(lambda name=name: take_part(keys, name, self.address))
            for name in PARTIES
            if name != victim
        }
        self.keys = keys

    def gather(self) -> CoordinatorSession:
        config = CoordinatorConfig(
            scenario=self.keys,
            keys=self.keys,
            out=self.keys,
            parties=PARTIES,
            data_address=self.address,
            sharing="masked",
        )
        return gather(config, Terms("kills", _HASH, sharing="masked", droppable=("gradient", "loss")))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def kill(keys: Path, victim: str, point: tuple[str, str]) -> dict[str, Any]:
    """Kill one party at one message, and see what becomes of the others.

    Args:
        keys: a folder for keys, made if it is not there.
        victim: who dies.
        point: at which message: (its kind, "up" or "down").

    Returns:
        The outcome; it raises if anything but the promised happened.
    """
    if not keys.exists():
        make_local_authority(keys, PARTIES)
    federation = _Federation(keys, victim, point)
    task, rest = Task("evaluate", 0, np.zeros((1, 1))), [name for name in PARTIES if name != victim]
    try:
        with federation.gather() as session:
            began = time.monotonic()
            session.broadcast(task)
            if point[0] == "simulation":
                outcome = "paused"
                _expect_loss(lambda: session.receive("loss", task), victim)
            else:
                left_out = point in (("SEEDS", "up"), ("SEEDS", "down"), ("CONTRIBUTION", "up"))
                outcome = "survivors' sum" if left_out else "everybody's sum"
                for step, tensor in ((_STEPS, "loss"), (_STEPS + 1, "gradient")):
                    opened = session.receive_from(tensor, task)
                    contributed = rest if left_out or tensor == "gradient" else list(PARTIES)
                    assert list(opened.parties) == contributed, opened.parties
                    assert (opened.words == everybodys(step, contributed)).all(), "a wrong sum"
                session.releases(task)
                # What comes next needs everybody.
                _expect_loss(lambda: session.broadcast(Task("evaluate", 1, np.zeros((1, 1)))), victim)
            for party in federation.others.values():
                problem = party.exception(20)
                assert isinstance(problem, PeerLost) and victim in problem.party, problem
            seconds = time.monotonic() - began
        assert federation.process.wait(10) == -signal.SIGKILL
    finally:
        federation.end()
    return {
        "victim": victim,
        "message": " ".join(point),
        "outcome": outcome,
        "resumed": _resume(keys, victim) if point[0] == "simulation" else "",
        "seconds": round(seconds, 2),
    }


def _expect_loss(act: Any, victim: str) -> None:
    try:
        act()
    except PeerLost as problem:
        assert victim in problem.party, problem
    else:
        raise AssertionError("nobody noticed")


def _resume(keys: Path, victim: str) -> str:
    """A new session, new keys, the same steps: all of them are opened to the right sums."""
    federation = _Federation(keys, victim, None)
    try:
        with federation.gather() as session:
            task = Task("evaluate", 0, np.zeros((1, 1)))
            session.broadcast(task)
            for step, tensor in ((_STEPS, "loss"), (_STEPS + 1, "gradient")):
                assert (session.receive(tensor, task) == everybodys(step)).all(), "a wrong sum"
            session.releases(task)
        for party in federation.others.values():
            assert party.result(20) == list(range(_STEPS))
        assert federation.process.wait(10) == 0
    finally:
        federation.end()
    return "to the right sums"


def main() -> int:
    """Run all kills, print a line for each; exit status 1 at the first that ends otherwise than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    for hidden in ("--keys", "--address", "--party"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.party:
        take_part(Path(given.keys), given.party, given.address, tuple(given.point) if given.point else None)
        return 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for victim in (PARTIES[0], PARTIES[3]):
            for point in POINTS:
                found.append(kill(Path(folder) / "keys", victim, point))
                print(*found[-1].values(), sep="  ", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the command `lpm` as its users do, watches what it starts, and sees to it that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CLINICS = ROOT / "simulations" / "three_clinics"
CITY = ROOT / "simulations" / "nyc_boroughs"
PATIENCE = 240.0
"""Seconds after which a wait has failed: far beyond what anything takes, even on a busy machine."""


def until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until something is true, and return it.

    Args:
        true: asked again and again.
        what: for the message.
        seconds: how long at most.
    """
    ticks, pause = int(seconds / 0.01), threading.Event()
    for _ in range(ticks):
        if answer := true():
            return answer
        pause.wait(0.01)
    raise AssertionError(f"{what} did not happen within {seconds:g} seconds")


@dataclass
class Command:
    """One running `lpm`.

    Attributes:
        child: the process.
        run: the run's folder.
        scratch: where its output goes.
        past: processes.json as an earlier session left it.
    """

    child: subprocess.Popen[bytes]
    run: Path
    scratch: Path
    past: str
    pids: dict[str, psutil.Process] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """What it said on standard error so far."""
        return (self.scratch / "err").read_text()

    @property
    def printed(self) -> str:
        """What it printed on standard output so far."""
        return (self.scratch / "out").read_text()

    def answer(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        lines = self.printed.splitlines()
        assert len(lines) == 1, lines
        answer = json.loads(lines[0])
        assert isinstance(answer, dict)
        return answer

    def process(self, name: str) -> psutil.Process:
        """A process of the federation: "coordinator" or a party's name, once all are up.

        Args:
            name: which.
        """

        def found() -> psutil.Process | None:
            if self.child.poll() is not None:
                raise AssertionError(f"it ended before {name} was up: {self.said}")
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                text = _text(self.run / "processes.json")
                for each in json.loads(text) if text != self.past else ():
                    self.pids.setdefault(each["party"] or each["role"], psutil.Process(each["pid"]))
            return self.pids.get(name)

        process = until(found, f"{name} coming up")
        assert isinstance(process, psutil.Process)
        return process

    def reaches(self, line: str) -> None:
        """Wait until the coordinator has logged a line that holds a text, in this session.

        Args:
            line: the text.
        """

        def there() -> bool:
            assert self.child.poll() is None, f"it ended before {line!r}: {self.said}"
            return line in self.said

        until(there, repr(line))

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code.

        Args:
            seconds: how long at most.
        """
        return self.child.wait(seconds)

    def nobody_is_left(self) -> None:
        """All it started has ended."""
        until(lambda: not [each for each in self.pids.values() if _lives(each)], "the end of all processes", 30.0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def lpm(
    arguments: Sequence[str | Path], run: Path, scratch: Path, environment: dict[str, str] | None = None
) -> Iterator[Command]:
    """Start `lpm` with arguments; at the end, nothing it started is left.

    Args:
        arguments: after the command's name.
        run: the run's folder.
        scratch: a folder for its output, made new.
        environment: variables added to this process's own.
    """
    scratch.mkdir(parents=True)
    past = _text(run / "processes.json")
    with (scratch / "out").open("wb") as out, (scratch / "err").open("wb") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "lpm", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
        )
    command = Command(child, run, scratch, past)
    try:
        yield command
    finally:
        if child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in psutil.Process(child.pid).children(recursive=True):
                    command.pids.setdefault(str(each.pid), each)
            child.send_signal(signal.SIGINT)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        left = [each for each in command.pids.values() if _lives(each)]
        _, left = psutil.wait_procs(left, timeout=15)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        assert not left, f"left behind: {left}"


def ended(arguments: Sequence[str | Path], run: Path, scratch: Path, **more: Any) -> Command:
    """Run `lpm` to its end.

    Args:
        arguments: after the command's name.
        run: the run's folder.
        scratch: a folder for its output, made new.
        more: as `lpm` takes.
    """
    with lpm(arguments, run, scratch, **more) as command:
        command.wait()
    return command

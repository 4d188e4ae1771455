"""Processes that never outlive their starter: how the launcher, the coordinator and the parties start and stop others.

A child holds the read end of a pipe on its standard input. When its starter ends, however it ends, the pipe closes and
the child ends too; no process has to be found and none can be forgotten.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TypedDict

from lpm.errors import RESUME, InputError, LpmError

__all__ = [
    "Process",
    "announce",
    "end_with_parent",
    "free_port",
    "keep_flower_quiet",
    "log_to",
    "parse_address",
    "peak_memory_mb",
    "start",
    "stop",
    "terminate_as_interrupt",
    "to_exit_code",
]

_log = logging.getLogger(__name__)

_PARENT_PIPE = "LPM_PARENT_PIPE"
_GRACE_SECONDS = 6.0
_OWN_PACKAGES = ("lpm", "clients", "server", "simulations")


class Process(TypedDict):
    """One line of `processes.json`: who runs where."""

    role: str
    party: str
    pid: int
    address: str


def announce(path: Path | None, processes: Sequence[Process]) -> None:
    """Say that these processes are up, for the launcher to read; whole or not at all.

    Args:
        path: the file to write; None: nobody listens.
        processes: this process and those it started.
    """
    if path is None:
        return
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(list(processes), indent=1))
    draft.replace(path)


def keep_flower_quiet() -> None:
    """Forbid Flower, here and in children, to send usage data or look for updates; call it before importing it."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")  # of what it writes to standard error
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago.

    Args:
        host: the address it is wanted on.

    Returns:
        The port; another process may take it before the caller does, who then has to ask again.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def parse_address(flag: str, address: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Args:
        flag: its name, for the message.
        address: the text.

    Returns:
        Host and port.

    Raises:
        InputError: naming the flag, the text and what would be accepted.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(f"`--{flag}` is {address!r}: HOST:PORT, as in 127.0.0.1:9091.")
    return host.strip("[]"), int(port)


def start(
    command: Sequence[str],
    *,
    output: IO[bytes] | int,
    errors: IO[bytes] | int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child that ends when this process does.

    Args:
        command: program and arguments; the program must call `end_with_parent`.
        output: where its standard output goes.
        errors: where its standard error goes; None: the same place.
        environment: variables added to this process's own.
        folder: its working folder; None: this one's.

    Returns:
        The child, in a session of its own so that a Ctrl-C reaches it only through `stop`.
    """
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if errors is None else errors,
        env={**os.environ, **(environment or {}), _PARENT_PIPE: "stdin"},
        cwd=folder,
        start_new_session=True,
    )


def stop(children: Sequence[subprocess.Popen[bytes]], grace: float = _GRACE_SECONDS) -> None:
    """Ask children to end, and end those that don't.

    Args:
        children: what `start` returned.
        grace: seconds they have, together.
    """
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)
    rest = threading.Event()
    timer = threading.Timer(grace, rest.set)
    timer.daemon = True
    timer.start()
    for child in children:
        while child.poll() is None and not rest.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
    timer.cancel()


def end_with_parent(grace: float = _GRACE_SECONDS) -> None:
    """End this process when the one that started it has gone; does nothing in a process started by hand.

    Args:
        grace: seconds between asking (SIGTERM) and leaving at once.
    """
    if os.environ.get(_PARENT_PIPE) != "stdin":
        return
    descriptor = os.dup(sys.stdin.fileno())
    os.environ.pop(_PARENT_PIPE)  # its own children get a pipe of their own

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(grace)
        os._exit(3)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def terminate_as_interrupt() -> None:
    """Let SIGTERM end the main thread the way Ctrl-C does, so that what is being done is tidied up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # a shell may start us with SIGINT ignored


def log_to(path: Path, name: str) -> None:
    """Send log records to a file, and this project's own progress lines to standard error too.

    Args:
        path: the log file; made private, appended to.
        name: who speaks, put before each line on standard error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    for own in _OWN_PACKAGES:  # the command line's own handlers would say everything twice
        logger = logging.getLogger(own)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.INFO)
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    kept = _LogFile(path)
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(kept)
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    shown.addFilter(_is_progress)
    root.addHandler(shown)
    kept.addFilter(_is_no_chatter)


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short, without a word of its own: what matters is on standard error too."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Let the record go."""


def _is_progress(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OWN_PACKAGES and not record.exc_info


def _is_no_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in _OWN_PACKAGES


def to_exit_code(work: Callable[[], int]) -> int:
    """Do the work of one process and turn what goes wrong into one line and an exit code.

    Args:
        work: returns an exit code itself.

    Returns:
        0 done, 2 bad input, 3 stopped and resumable, 1 anything else.
    """
    try:
        return work()
    except KeyboardInterrupt:
        _log.warning("Stopped. %s", RESUME)
        return 3
    except LpmError as problem:
        _log.error("%s", problem)
        return problem.exit_code
    except Exception as problem:  # the user gets one line, the log file the rest
        _log.error("Failed (%s); the log file says where.", type(problem).__name__)
        logging.getLogger().error("unexpected failure", exc_info=True)
        return 1


def peak_memory_mb() -> float:
    """Peak resident set of this process, MB (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

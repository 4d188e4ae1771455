"""A federation on one machine: the coordinator and one process per party, started, watched and ended together.

`lpm federate` calls this. It imports neither side: it starts `lpm coordinator` and `lpm client` as anybody would by
hand, on loopback ports, each party with its own key folder, and keeps none of them longer than itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from lpm.errors import RESUME, InputError, LpmError
from lpm.node_keys import collect_node_keys
from lpm.options import Options
from lpm.processes import Process, free_port, keep_flower_quiet, start, stop
from lpm.protocol.identity import make_local_authority
from lpm.runs import Run

__all__ = ["Plan", "federate", "group_institutions", "plan", "share_processes"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_UP_SECONDS = 120.0
_END_SECONDS = 8.0
_LOSS_SECONDS = 4.0
_DRAIN_SECONDS = 2.0
_TRIES = 3
MOST_PROCESSES = 6
"""Of parties on a machine with fewer cores than parties: a process costs 200 MB and seconds before it can start."""


def group_institutions(institutions: Sequence[str], parties: int | None) -> dict[str, tuple[str, ...]]:
    """Spread whole institutions over parties, neighbours in the scenario's order together.

    Args:
        institutions: their names, at least 3.
        parties: how many parties; None: each institution is one.

    Returns:
        Party → its institutions; a party of one bears its name, a party of more their joined names.

    Raises:
        InputError: if there are fewer than 3 parties, or more than institutions.
    """
    count = len(institutions) if parties is None else parties
    if not 3 <= count <= len(institutions):
        raise InputError(
            f"`--parties` is {count}: a whole number from 3 to {len(institutions)}, the number of institutions.",
            "" if len(institutions) >= 3 else "A sum of two tells each the other's part.",
        )
    share, more = divmod(len(institutions), count)
    groups: dict[str, tuple[str, ...]] = {}
    first = 0
    for number in range(count):
        size = share + (number < more)
        held = tuple(institutions[first : first + size])
        name = "-".join(held)
        groups[name if len(name) <= 63 else f"party-{number + 1}"] = held
        first += size
    return groups


def share_processes(parties: Sequence[str], processes: int | None) -> list[tuple[str, ...]]:
    """Which parties share a process.

    Args:
        parties: their names.
        processes: how many processes they share; None: one each, or 6 if these are fewer than the parties and the
            machine has fewer cores.

    Returns:
        The parties of each process, neighbours together.
    """
    count = processes
    if count is None:
        enough = len(parties) <= max(MOST_PROCESSES, os.cpu_count() or 1)
        count = len(parties) if enough else max(MOST_PROCESSES, os.cpu_count() or 1)
    count = min(count, len(parties))
    share, more = divmod(len(parties), count)
    ends = list(itertools.accumulate(share + (number < more) for number in range(count)))
    return [tuple(parties[begin:end]) for begin, end in itertools.pairwise([0, *ends])]


def _together(processes: Sequence[tuple[str, ...]]) -> str:
    """What must be said of parties that share processes; "" if none do."""
    parties = sum(map(len, processes))
    if len(processes) == parties:
        return ""
    return (
        f"{parties} parties share {len(processes)} processes of one machine: the protocol runs between all of them, "
        "but nothing isolates those that share a process from each other"
    )


@dataclass(frozen=True)
class Plan:
    """Which processes a federation has.

    Attributes:
        groups: party → its institutions.
        processes: the parties of each process.
        keys: folder of everybody's keys.
    """

    groups: Mapping[str, tuple[str, ...]]
    processes: Sequence[tuple[str, ...]]
    keys: Path


def plan(options: Options, out: Path, institutions: Sequence[str]) -> Plan:
    """Decide on parties and processes, and refuse what can't be started, before anything that takes time.

    Args:
        options: the flags of `lpm federate`.
        out: the run's folder; local keys are made there if none are named.
        institutions: the scenario's.

    Raises:
        InputError: if the parties, the processes or the key folder can't be used.
    """
    groups = group_institutions(institutions, options.parties)
    processes = share_processes(list(groups), options.processes)
    return Plan(groups, processes, _keys(options, out.resolve(), list(groups), _control(options, processes)))


def _control(options: Options, processes: Sequence[tuple[str, ...]]) -> str:
    """The control plane: of parties that share processes, plain streams."""
    return "streams" if _together(processes) else options.control


def federate(options: Options, out: Path, plan: Plan, *, resume: bool = False) -> int:
    """Run one session on this machine and wait for its end.

    Args:
        options: the flags of `lpm federate`.
        out: the run's folder.
        plan: for these options and this folder.
        resume: go on from the checkpoints in `out`.

    Returns:
        0 done, 2 bad input, 3 stopped but resumable, 1 anything else; what went wrong has been said on standard error.

    Raises:
        InputError: if no scenario is named.
    """
    if options.scenario is None:
        raise InputError("No scenario is named: the path of its folder.")
    control = _control(options, plan.processes)
    if together := _together(plan.processes):
        if control != options.control:
            together += f"; the control plane is plain {control}"
        _say(f"{together}.")
        Run.open(out).update(processes=[list(parties) for parties in plan.processes], weaker=together)
    keep_flower_quiet()
    for attempt in range(1, _TRIES + 1):
        federation = _Federation(options.with_(control=control), out.resolve(), plan, resume)
        code = federation.run()
        if not federation.port_was_taken or attempt == _TRIES:
            if code:
                _note_reason(out, federation.reason)
            return code
        _log.info("A port was taken by another process; trying others.")
    raise AssertionError("unreachable")


@dataclass
class _Member:
    """One process we started, and those it said it started."""

    name: str
    child: subprocess.Popen[bytes]
    announcement: Path
    output: Path
    processes: list[Process] = field(default_factory=list)
    seen: list[psutil.Process] = field(default_factory=list)

    def read_announcement(self) -> bool:
        if not self.processes and self.announcement.is_file():
            self.processes = json.loads(self.announcement.read_text())
            for process in self.processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.seen.append(psutil.Process(process["pid"]))
        return bool(self.processes)

    def last_line(self) -> str:
        lines = self.output.read_text(errors="replace").strip().splitlines() if self.output.is_file() else []
        return lines[-1].removeprefix(f"{self.name}: ") if lines else ""


class _Federation:
    """The processes of one attempt."""

    def __init__(self, options: Options, out: Path, plan: Plan, resume: bool) -> None:
        self.port_was_taken = False
        self.reason = ""
        self._options, self._out, self._resume = options, out, resume
        self._groups, self._processes, self._keys = plan.groups, plan.processes, plan.keys
        self._members: list[_Member] = []
        self._grace = _END_SECONDS
        self._quiet = threading.Event()
        self._forward: threading.Thread | None = None

    def run(self) -> int:
        folder = self._out / "control" / "up"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (self._out / "processes.json").unlink(missing_ok=True)
        try:
            self._start(folder)
            code = self._wait_until_up()
            if code is None:
                self._record()
                code = self._supervise()
        except KeyboardInterrupt:
            self.reason = "Stopped; the run is kept."
            _say("Stopping; the run is kept.")
            self._quiet.set()
            code = 3
            with _deaf_to_interrupts():
                # The coordinator first: the parties hear from it that it is over, and none looks lost.
                stop([member.child for member in self._members[:1]], grace=_END_SECONDS)
                self._await(self._members[1:], 3.0)
        finally:
            with _deaf_to_interrupts():
                self._end()
        return code

    def _start(self, folder: Path) -> None:
        options = self._options
        data, control = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        shared = ["--out", str(self._out), "--control", options.control, "--control-address", control]
        shared += ["--sharing", options.sharing or "crypten"]
        for flag in ("agents", "seed", "checkpoint_every"):
            if (value := getattr(options, flag)) is not None:
                shared += [f"--{flag.replace('_', '-')}", str(value)]
        for key, setting in options.settings.items():
            shared += ["--set", f"{key}={setting}"]
        shared += ["--resume"] if self._resume else []
        shared += ["--unsafe-no-disclosure-control"] if options.unsafe else []
        own = ["--parties", ",".join(self._groups), "--data-address", data]
        for flag in ("steps", "iterations", "gradient", "time_limit"):
            if (value := getattr(options, flag)) is not None:
                own += [f"--{flag.replace('_', '-')}", str(value)]
        own += ["--simulate-only"] if options.simulate_only else []
        if options.policy is None:
            own += ["--label", "one machine, one user, and a permissive policy at each party that no steward wrote"]
        if together := _together(self._processes):
            own += ["--label", together]
        own += ["--keys", str(self._keys / "coordinator")]
        self._launch("coordinator", ["coordinator", *own, *shared], folder, self._out / "control" / "output.log")
        for parties in self._processes:
            party, *others = parties
            keys = self._keys if others else self._keys / "parties" / party
            own = ["--party", ",".join(parties), "--coordinator", data, "--keys", str(keys)]
            own += ["--institutions", ";".join(",".join(self._groups[name]) for name in parties)]
            # Whoever runs all institutions on one machine sees their series anyway; on real ones each must consent.
            own += ["--release-fit"]
            for each in parties:
                private = self._out / "parties" / each
                private.mkdir(mode=0o700, parents=True, exist_ok=True)
                if options.policy is not None:
                    (private / "steward").mkdir(mode=0o700, exist_ok=True)
                    shutil.copyfile(options.policy, private / "steward" / "policy.toml")
            name = f"{party} and {len(others)} more" if others else party
            log = self._out / "parties" / party / "output.log"
            self._launch(name, ["client", *own, *shared], folder, log)

    def _launch(self, name: str, arguments: list[str], folder: Path, output: Path) -> None:
        announcement = folder / f"{name}.json"
        command = [sys.executable, "-m", "lpm", arguments[0], str(Path(str(self._options.scenario)).resolve())]
        command += [*arguments[1:], "--announce", str(announcement)]
        output.touch(mode=0o600)
        with output.open("wb") as log:
            coordinates = name == "coordinator"
            child = start(
                command, output=log, errors=subprocess.PIPE if coordinates else None, environment=self._environment()
            )
        self._members.append(_Member(name, child, announcement, output))
        if coordinates and child.stderr is not None:
            self._forward = threading.Thread(target=_forward, args=(child.stderr, output, self._quiet), daemon=True)
            self._forward.start()

    def _environment(self) -> dict[str, str]:
        # Every process alone would take all cores for itself; together they would only wait for each other.
        threads = str(max(1, (os.cpu_count() or 1) // len(self._processes)))
        given = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "MALLOC_ARENA_MAX": "2"}
        return {name: os.environ.get(name, value) for name, value in given.items()}

    def _wait_until_up(self) -> int | None:
        end, pause = time.monotonic() + _UP_SECONDS, threading.Event()
        while not all([member.read_announcement() for member in self._members]):
            # A coordinator that fails takes everybody with it: it is the one to quote.
            for member in self._members:
                code = member.child.poll()
                if code is not None and not member.processes:
                    return self._tell(member, code)
            if time.monotonic() > end:
                late = ", ".join(member.name for member in self._members if not member.processes)
                self.reason = f"{late} did not come up within {_UP_SECONDS:g} seconds."
                _say(self.reason)
                return 1
            pause.wait(_POLL_SECONDS)
        return None

    def _record(self) -> None:
        processes = [process for member in self._members for process in member.processes]
        draft = self._out / "processes.json.draft"
        draft.write_text(json.dumps(processes, indent=1) + "\n")
        draft.replace(self._out / "processes.json")

    def _supervise(self) -> int:
        coordinator, *parties = self._members
        pause, end = threading.Event(), float("inf")
        culprit: _Member | None = None
        while coordinator.child.poll() is None and time.monotonic() < end:
            for member in parties:
                ended = member.child.poll()
                if culprit is None and ended not in {None, 0}:
                    # Of a loss the coordinator hears on the data plane; of a party that never began it may not.
                    lost = ended == 3 or (ended or 0) < 0
                    culprit, end = member, time.monotonic() + (_LOSS_SECONDS if lost else 1.0)
            pause.wait(_POLL_SECONDS)
        code = coordinator.child.poll()
        if code == 0:
            self._await(parties, _END_SECONDS)
            return 0
        if code is not None:
            # Of a party that stopped by itself the coordinator knows no more than that; its own last line says why.
            self._await(parties, _END_SECONDS)
            failed = next((member for member in parties if (member.child.poll() or 0) in {1, 2}), None)
            if failed is not None and code == 3:
                self._tell(failed, failed.child.returncode)
                return int(failed.child.returncode)
        if culprit is None or (code is not None and culprit.child.returncode in {0, 3}):
            # The parties ended in consequence, or are about to.
            killed = next((m for m in parties if (m.child.poll() or 0) < 0), None)
            if killed is None and code is not None:
                return self._tell(coordinator, code, said=True)
            culprit = killed or culprit
        assert culprit is not None
        self._grace = _LOSS_SECONDS
        told = self._tell(culprit, culprit.child.returncode)
        return told if code is None or code < 0 else (code if code in {2, 3} else told)

    def _await(self, members: Sequence[_Member], seconds: float) -> None:
        end, pause = time.monotonic() + seconds, threading.Event()
        while time.monotonic() < end and any(member.child.poll() is None for member in members):
            pause.wait(_POLL_SECONDS)

    def _tell(self, member: _Member, code: int, *, said: bool = False) -> int:
        if code < 0:
            number = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            self.reason = f"{member.name} was killed ({number}). The run is kept."
            _say(self.reason)
            return 3
        if member.name == "coordinator" and self._forward is not None:
            self._forward.join(_DRAIN_SECONDS)  # its last line says why
        line = member.last_line()
        self.reason = line.replace(RESUME, "").strip() or f"{member.name} ended with exit code {code}."
        self.port_was_taken = code == 2 and "can't be listened on" in line
        if not said and not (member.name == "coordinator" or self.port_was_taken):
            self.reason = f"{member.name}: {self.reason}"
            _say(self.reason)
        return code or 1

    def _end(self) -> None:
        stop([member.child for member in self._members], grace=self._grace)
        # What they started ends by itself once they have; whatever does not is ended here, and only that.
        rest = [process for member in self._members for process in member.seen if process.is_running()]
        _, alive = psutil.wait_procs(rest, timeout=3.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _keys(options: Options, out: Path, parties: list[str], control: str) -> Path:
    keys = (options.keys or out / "keys").resolve()
    if options.keys is None and not keys.exists():
        make_local_authority(keys, parties)
    missing = [name for name in parties if not (keys / "parties" / name / "tls.pem").is_file()]
    if missing or not (keys / "coordinator" / "tls.pem").is_file():
        raise InputError(
            f"{keys} holds no keys of {', '.join(missing) or 'the coordinator'}.",
            f"Make a new folder with `lpm keys local DIR --parties {','.join(parties)}` and name it with `--keys`.",
        )
    if control == "flower":
        collect_node_keys(keys, parties)
    return keys


def _forward(lines: IO[bytes], output: Path, quiet: threading.Event) -> None:
    said = ""
    with lines, output.open("ab", buffering=0) as log:
        for line in lines:
            with contextlib.suppress(OSError):  # a full disk: the line is still shown
                log.write(line)
            # How to go on is said once, at the end, by the command.
            text = line.decode("utf-8", "replace").removeprefix("coordinator: ").replace(RESUME, "").strip()
            if text and text != said and not quiet.is_set():
                said = text
                _say(text)


def _note_reason(out: Path, reason: str) -> None:
    # Where there is no record, or no room for it, the reason has still been said.
    with contextlib.suppress(LpmError):
        Run.open(out).update(error=reason)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not leave processes behind; the tidying up has a limit of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)

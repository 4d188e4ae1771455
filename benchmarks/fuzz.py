"""Malformed frames against every protocol state machine, and against a live endpoint over mutual TLS.

    python benchmarks/fuzz.py [--frames 1000000] [--machine NAME] [--live 100000] [--seed 1] [--json FILE]

Frames of an honest session are altered: bits flipped, bytes cut, doubled and moved, lengths and counts replaced by
large ones, kinds and versions changed, two frames joined; others are put together field by field with odd contents;
and, since most of that ends at a signature, messages with altered contents that a dishonest party or coordinator has
*signed*. A machine may take a frame or refuse it by an `LpmError`; anything else is a crash and is printed with the
frame. Told errors are searched for everything secret in the session. What is fed is in `fuzzing/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where a test loads this file

from fuzzing import round_machines, session_machines
from fuzzing.endpoint import fuzz_live
from fuzzing.honest import Honest
from fuzzing.mutator import Mutator
from fuzzing.outcome import Outcome

from lpm.errors import LpmError

__all__ = ["MACHINES", "Honest", "fuzz", "fuzz_live"]

MACHINES: Mapping[str, tuple[Callable[[Honest, Mutator], Callable[[], None]], str]] = {
    "messages": (session_machines.messages, "both"),
    "manifest": (session_machines.manifest, "both"),
    "party": (session_machines.party, "down"),
    "coordinator": (session_machines.coordinator, "up"),
    "round": (round_machines.sealed, "both"),
    "masked": (round_machines.masked, "both"),
    "droppable": (round_machines.droppable, "both"),
    "relay": (session_machines.relay, "up"),
    "control": (session_machines.control, "both"),
}
"""State machine → how it is fed, and whose frames."""


def fuzz(session: Honest, machine: str, frames: int, seed: int) -> Outcome:
    """Give a state machine malformed frames.

    Args:
        session: an honest one.
        machine: one of `MACHINES`.
        frames: how many.
        seed: of the alterations.
    """
    feed, whose = MACHINES[machine]
    honest = {"both": session.up + session.down, "down": session.down, "up": session.up}[whose]
    once = feed(session, Mutator(honest, seed))
    outcome = Outcome()
    process, began, settled = psutil.Process(), time.perf_counter(), 0
    for number in range(frames):
        start = time.perf_counter()
        try:
            once()
            outcome.accepted += 1
        except LpmError as problem:
            outcome.refused[type(problem).__name__] += 1
            said = f"{problem} {problem.args} {problem.__cause__}"
            if any(secret in said for secret in session.secrets):
                outcome.leaks.append(f"{machine}, seed {seed}, frame {number}: {type(problem).__name__}")
        except Exception as problem:
            outcome.crashes.append(f"{machine}, seed {seed}, frame {number}: {type(problem).__name__}: {problem}"[:400])
            if len(outcome.crashes) >= 1000:
                break
        outcome.slowest_ms = max(outcome.slowest_ms, 1e3 * (time.perf_counter() - start))
        if number == frames // 10:
            settled = process.memory_info().rss
        outcome.frames += 1
    outcome.growth_mib = (process.memory_info().rss - settled) / 2**20
    outcome.seconds = time.perf_counter() - began
    return outcome


def main() -> int:
    """Run from the command line; returns 1 if anything crashed or leaked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--frames", type=int, default=1_000_000, help="against each state machine")
    parser.add_argument("--live", type=int, default=100_000, help="against a live endpoint")
    parser.add_argument("--machine", choices=[*MACHINES, "live"], help="one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to put the figures; those of other machines there are kept")
    given = parser.parse_args()
    failed = False
    logging.getLogger("server").setLevel(logging.CRITICAL)  # it would say so of every frame
    with tempfile.TemporaryDirectory() as folder:
        session = Honest.form(Path(folder) / "keys")
        figures = json.loads(given.json.read_text()) if given.json and given.json.is_file() else {}
        for name in [given.machine] if given.machine else [*MACHINES, "live"]:
            if name == "live":
                outcome = fuzz_live(session, Path(folder) / "keys", given.live, given.seed)
            else:
                outcome = fuzz(session, name, given.frames, given.seed)
            failed |= bool(outcome.crashes or outcome.leaks)
            sys.stdout.write(
                f"{name:12} {outcome.frames:>9,} frames: {outcome.accepted:,} taken, {sum(outcome.refused.values()):,} "
                f"refused, {len(outcome.crashes)} crashes, {len(outcome.leaks)} leaks, memory {outcome.growth_mib:+.1f}"
                f" MiB, slowest {outcome.slowest_ms:.0f} ms, {outcome.seconds:.0f} s\n"
            )
            for crash in outcome.crashes[:10]:
                sys.stdout.write(f"    {crash}\n")
            figures[name] = outcome.tell() | {"seed": given.seed}
            if given.json:
                given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

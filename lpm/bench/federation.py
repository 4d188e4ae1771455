"""What one round of a federation costs: real processes on this machine, loopback, mutual TLS, sealed end to end.

A round "to the parties" is what every step of a simulation costs: mask, seal, send up, relay, send down, open, add. A
round "to the coordinator" is what a loss or a gradient costs. The processes are started by their command lines.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lpm.errors import InputError, LpmError
from lpm.options import SHARINGS
from lpm.protocol.identity import make_local_authority

__all__ = ["bench_federation"]


def bench_federation(parties: int, words: int, sharing: str = "crypten", rounds: int = 200) -> dict[str, Any]:
    """Time the rounds of a federation that does nothing else.

    Args:
        parties: how many, from 3.
        words: 64-bit words in a round.
        sharing: engine of the secure sum.
        rounds: timed rounds of each kind, after a warm-up.

    Returns:
        Per round opened to the parties: `round_ms` (median over rounds, then parties), `round_p90_ms`, `party_cpu_ms`
        and `coordinator_cpu_ms` (processor time, all threads; the party with the most), `bytes_per_party` (up and down
        one party's stream). Per round opened to the coordinator: `to_coordinator_ms` and `to_coordinator_bytes`.

    Raises:
        InputError: for fewer than 3 parties or an unknown engine.
        LpmError: if a process fails.
    """
    if parties < 3:
        raise InputError(f"`--parties` is {parties}: a whole number from 3.", "A sum of two tells each the other's.")
    if sharing not in SHARINGS:
        raise InputError(f"`--sharing` is {sharing}: one of {', '.join(SHARINGS)}.")
    if words < 1 or rounds < 1:
        raise InputError(f"`--words` is {words} and `--rounds` is {rounds}: whole numbers from 1.")
    names = tuple(f"party-{number}" for number in range(parties))
    # What the processes do is small: more threads than cores would only take turns.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        make_local_authority(keys, names)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        python = [sys.executable, "-m"]
        started = [
            subprocess.Popen([*python, "clients.rounds", str(keys), name, address, sharing], env=environment)
            for name in names
        ]
        try:
            asked = [str(keys), address, sharing, str(words), str(rounds), *names]
            answer = subprocess.run(
                [*python, "server.rounds", *asked], env=environment, stdout=subprocess.PIPE, check=False
            )
        finally:
            for process in started:
                try:
                    process.wait(60)  # a busy machine ends slowly
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if answer.returncode or any(process.returncode for process in started):
        raise LpmError("A process of the benchmark did not end well.", "Standard error says why.")
    found = json.loads(answer.stdout)
    step, loss = found["parties"], found["coordinator"]
    times = 1e3 * np.array(step["seconds"])
    return {
        "parties": parties,
        "words": words,
        "sharing": sharing,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "round_ms": round(float(np.median(times)), 3),
        "round_p90_ms": round(float(np.quantile(times, 0.9)), 3),
        "party_cpu_ms": round(1e3 * max(step["party_processor"]) / rounds, 3),
        "coordinator_cpu_ms": round(1e3 * step["coordinator_processor"] / rounds, 3),
        "bytes_per_party": round((step["received"] + step["sent"]) / rounds / parties),
        "to_coordinator_ms": round(float(np.median(1e3 * np.array(loss["seconds"]))), 3),
        "to_coordinator_bytes": round((loss["received"] + loss["sent"]) / rounds / parties),
    }

"""What a round and a step of a federation cost: real processes of this machine, loopback, mutual TLS, sealed payloads.

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

__all__ = ["bench_federation", "bench_step"]

_WARM_UP = 20
"""Rounds of each kind that are not timed."""


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
    if words < 1 or rounds < 1:
        raise InputError(f"`--words` is {words} and `--rounds` is {rounds}: whole numbers from 1.")
    tasks = [
        {"opening": opening, "words": words, "rounds": count}
        for opening in ("parties", "coordinator")
        for count in (_WARM_UP, rounds)
    ]
    _, step, _, loss = _session(parties, sharing, tasks)
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


def bench_step(parties: int, agents: int, sharing: str = "crypten", days: int = 60, repeats: int = 5) -> dict[str, Any]:
    """Time a day of a federated simulation against the same computations without a federation.

    Each party simulates its own people of the reference workload, whose communities are shared. The same processes do
    it by themselves too, all at the same time, so that both share the machine's cores in the same way.

    Args:
        parties: how many, from 3.
        agents: of each party.
        sharing: engine of the secure sum.
        days: of a run.
        repeats: runs of each kind, in turn, after one that is not timed.

    Returns:
        `together_ms` and `apart_ms`, a day of the federated and of the separate simulations until the last party has
        finished (median over runs); `extra_ms`, by how much the first is longer (median over pairs of runs), and
        `extra_each_ms`, of each pair.

    Raises:
        InputError: for fewer than 3 parties, an unknown engine, or a number that is none.
        LpmError: if a process fails.
    """
    if min(agents, days, repeats) < 1:
        raise InputError(f"The agents ({agents}), days ({days}) and repeats ({repeats}) are whole numbers from 1.")
    one = {"agents": agents, "days": days}
    tasks = [one | {"together": together} for _ in range(repeats + 1) for together in (False, True)]
    found = _session(parties, sharing, tasks)[2:]
    apart, together = (np.array([1e3 * float(np.max(each["seconds"])) for each in found[kind::2]]) for kind in (0, 1))
    return {
        "parties": parties,
        "agents_each": agents,
        "sharing": sharing,
        "days": days,
        "cores": len(os.sched_getaffinity(0)),
        "together_ms": round(float(np.median(together)), 3),
        "apart_ms": round(float(np.median(apart)), 3),
        "extra_ms": round(float(np.median(together - apart)), 3),
        "extra_each_ms": np.round(together - apart, 3).tolist(),
    }


def _session(parties: int, sharing: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the coordinator gathered of each task, from processes of their own."""
    if parties < 3:
        raise InputError(f"`--parties` is {parties}: a whole number from 3.", "A sum of two tells each the other's.")
    if sharing not in SHARINGS:
        raise InputError(f"`--sharing` is {sharing}: one of {', '.join(SHARINGS)}.")
    names = tuple(f"party-{number}" for number in range(parties))
    # There are more parties than cores: more threads would only take turns.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
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
            asked = [str(keys), address, sharing, json.dumps(tasks), *names]
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
    gathered: list[dict[str, Any]] = json.loads(answer.stdout)
    return gathered

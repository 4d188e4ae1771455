"""W in lpm against a plain numba loop of the same model, written by hand, in the same run.

    python benchmarks/plain_loop.py [--agents 8400000] [--days 60] [--turns 3] [--json FILE]

The loop is the yardstick of the engine: what a careful programmer would write for this one model alone. One byte per
stage, 32-bit group ids, sorted households summed in place, two passes a day over all threads, a cheap integer hash for
random numbers, and the exponential only where the bound 1 − e^(−x) ≤ x has not decided. It is not differentiable, knows
no other stage graph and no shards, and its results depend on nothing but its own hash. Both are given the same places
and take turns, each in a process of its own, so that a busy machine slows both; the figure is the median of the turns'
ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lpm.bench.workload import PARAMETERS, places
from lpm.processes import peak_memory_mb

BAR, GOAL = 2.0, 1.5
_CHUNK = 1 << 16


@nb.njit(inline="always")
def _uniform(seed: int, day: int, agent: int) -> float:
    """A number in [0, 1) by two rounds of a 64-bit finaliser."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(day) * np.uint64(0xD1B54A32D192ED03)
    x += np.uint64(agent) * np.uint64(0x8CB92BA72F3D8DD7)
    for _ in range(2):
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
    return float(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@nb.njit(parallel=True)
def run(
    days: int,
    seed: int,
    household: NDArray[np.int32],
    workplace: NDArray[np.int32],
    community: NDArray[np.int32],
    beta: NDArray[np.float64],
    onset: float,
    recovery: float,
    initial: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The epidemic; daily counts of S, E, I, R [days, 4] and the clock after each day [days + 1]."""
    agents = household.size
    chunks = (agents + _CHUNK - 1) // _CHUNK
    stage = np.zeros(agents, dtype=np.uint8)
    homes, jobs, cells = household[-1] + 1, workplace.max() + 1, community.max() + 1
    home_size, job_size, cell_size = np.zeros(homes), np.zeros(jobs), np.zeros(cells)
    for i in range(agents):
        home_size[household[i]] += 1
        job_size[workplace[i]] += 1
        cell_size[community[i]] += 1
        if _uniform(seed, -1, i) < initial:
            stage[i] = 2
    threads = nb.get_num_threads()
    home_ill = np.zeros(homes, dtype=np.int32)
    job_ill, cell_ill = np.zeros((threads, jobs), dtype=np.int32), np.zeros((threads, cells), dtype=np.int32)
    home_hazard, job_hazard, cell_hazard = np.zeros(homes), np.zeros(jobs), np.zeros(cells)
    counts = np.zeros((days, 4), dtype=np.int64)
    marks = np.zeros(days + 1)
    with nb.objmode(now="float64"):
        now = time.perf_counter()
    marks[0] = now
    # A chunk ends where a household does, so no two threads add to one.
    edge = np.zeros(chunks + 1, dtype=np.int64)
    edge[chunks] = agents
    for c in range(1, chunks):
        at = c * _CHUNK
        while at < agents and household[at] == household[at - 1]:
            at += 1
        edge[c] = at
    for day in range(days):
        home_ill[:] = 0
        job_ill[:] = 0
        cell_ill[:] = 0
        for k in nb.prange(chunks):
            me = nb.get_thread_id()
            for i in range(edge[k], edge[k + 1]):
                if stage[i] == 2:
                    home_ill[household[i]] += 1
                    job_ill[me, workplace[i]] += 1
                    cell_ill[me, community[i]] += 1
        for h in nb.prange(homes):
            home_hazard[h] = beta[0] * home_ill[h] / home_size[h] if home_size[h] > 0 else 0.0
        for w in nb.prange(jobs):
            total = 0
            for me in range(threads):
                total += job_ill[me, w]
            job_hazard[w] = beta[1] * total / job_size[w] if job_size[w] > 0 else 0.0
        for c in range(cells):
            cell_hazard[c] = beta[2] * cell_ill[:, c].sum() / cell_size[c] if cell_size[c] > 0 else 0.0
        seen = np.zeros((chunks, 4), dtype=np.int64)
        for k in nb.prange(chunks):
            n0, n1, n2, n3 = 0, 0, 0, 0
            for i in range(edge[k], edge[k + 1]):
                s = stage[i]
                if s == 0:
                    hazard = home_hazard[household[i]] + job_hazard[workplace[i]] + cell_hazard[community[i]]
                    if hazard > 0.0:
                        u = _uniform(seed, day, i)
                        if u < hazard and u < 1.0 - np.exp(-hazard):
                            s = 1
                elif s == 1:
                    if _uniform(seed, day, i) < onset:
                        s = 2
                elif s == 2:
                    if _uniform(seed, day, i) < recovery:
                        s = 3
                stage[i] = s
                n0 += s == 0
                n1 += s == 1
                n2 += s == 2
                n3 += s == 3
            seen[k, 0], seen[k, 1], seen[k, 2], seen[k, 3] = n0, n1, n2, n3
        counts[day] = seen.sum(0)
        with nb.objmode(now="float64"):
            now = time.perf_counter()
        marks[day + 1] = now
    return counts, marks


def bench_loop(agents: int, days: int, seed: int = 0) -> dict[str, Any]:
    """Time the loop, day by day; the same keys as `lpm bench W`."""

    def epidemic(count: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        where = places(count, seed)
        value = {name: number for name, (number, _) in PARAMETERS.items()}
        beta = np.array([value[name] for name in where])
        rates = (value["onset"], value["recovery"], value["initial"])
        return run(length, seed, *where.values(), beta, *rates)  # type: ignore[no-any-return]

    epidemic(2 * _CHUNK, 2)
    counts, marks = epidemic(agents, days)
    median = statistics.median(np.diff(marks)[1:].tolist())
    return {
        "agents": agents,
        "days": days,
        "median_day_ms": 1e3 * median,
        "agent_steps_per_s": agents / median,
        "peak_rss_mb": peak_memory_mb(),
        "final_counts": counts[-1].tolist(),
    }


def _once(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return dict(json.loads(done.stdout))


def compare(agents: int, days: int, turns: int) -> dict[str, Any]:
    """Both by turns; ratios of the median day, and lpm's memory per agent above an interpreter that ran a small W."""
    sizes = ["--agents", str(agents), "--days", str(days)]
    bench = [sys.executable, "-m", "lpm", "bench", "W", "--json"]
    small = _once([*bench, "--agents", "1000", "--days", "2"])
    rows = []
    for _ in range(turns):
        rows.append((_once([sys.executable, __file__, "--loop", *sizes]), _once([*bench, *sizes])))
    ratio = statistics.median(ours["median_day_ms"] / loop["median_day_ms"] for loop, ours in rows)
    return {
        "agents": agents,
        "days": days,
        "loop_day_ms": statistics.median(loop["median_day_ms"] for loop, _ in rows),
        "lpm_day_ms": statistics.median(ours["median_day_ms"] for _, ours in rows),
        "ratio": ratio,
        "ratios": [ours["median_day_ms"] / loop["median_day_ms"] for loop, ours in rows],
        "bytes_per_agent": (max(ours["peak_rss_mb"] for _, ours in rows) - small["peak_rss_mb"]) * 2**20 / agents,
        "final_counts": {"loop": rows[-1][0]["final_counts"], "lpm": rows[-1][1]["final_counts"]},
    }


def main() -> int:
    """Compare, print, say whether the bar is met by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=8_400_000)
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--loop", action="store_true", help="the loop alone, as JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.loop:
        sys.stdout.write(json.dumps(bench_loop(options.agents, options.days)) + "\n")
        return 0
    found = compare(options.agents, options.days, options.turns)
    table = Table("", "")
    for name, value in found.items():
        table.add_row(name, str(value) if not isinstance(value, float) else f"{value:.3g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["ratio"] > BAR)


if __name__ == "__main__":
    sys.exit(main())

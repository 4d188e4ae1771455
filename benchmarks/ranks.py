"""Ranks against threads on the reference workload: the same days in one process that uses all cores, and on ranks.

    python benchmarks/ranks.py --agents 2000000 --days 40 --ranks 2

Both are started again and again in turn, so that what else the machine does burdens both; the medians are compared.
Workplaces draw from the whole population, so on ranks their sums pass ⊕; households and community cells stay whole.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys


def days_of(agents: int, days: int, shared: bool) -> list[int | float]:
    """Median time of a day (ms), and the people in S, E, I, R on the last day."""
    from lpm import simulation
    from lpm.bench.workload import day_timer, default_values, workload

    networks = ("workplace",) if shared else ()
    simulation.run(workload(20_000, shared=networks), default_values(0), steps=2, seed=0)  # compiles
    model = workload(agents, shared=networks)
    mark, measured = day_timer()
    found = simulation.run(model, default_values(0), steps=days, seed=0, progress=mark)
    return [1e3 * statistics.median(measured()), *map(int, found.outputs[-1, 1:, 0])]


def start(arguments: argparse.Namespace, ranks: int) -> list[int | float]:
    """Run the days in processes of their own: one, or as many ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command += ["--nproc-per-node", str(ranks)]
    command += [__file__, "--child", "--agents", str(arguments.agents), "--days", str(arguments.days)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[int | float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Compare, or be one of those compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=2_000_000)
    parser.add_argument("--days", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = days_of(arguments.agents, arguments.days, os.environ.get("WORLD_SIZE", "1") != "1")
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    threads, ranks = [], []
    for _ in range(arguments.repeats):
        threads.append(start(arguments, 1))
        ranks.append(start(arguments, arguments.ranks))
    assert all(each[1:] == threads[0][1:] for each in threads + ranks), "the results differ"
    one, several = (statistics.median(each[0] for each in side) for side in (threads, ranks))
    print(f"{arguments.agents:,} agents, {arguments.days} days, medians of {arguments.repeats} in turn")
    print(f"  one process, all cores   {one:8.1f} ms a day   {[round(each[0], 1) for each in threads]}")
    print(
        f"  {arguments.ranks} ranks                  {several:8.1f} ms a day   {[round(each[0], 1) for each in ranks]}"
    )
    print(f"  speed of ranks against threads: {one / several:.2f}")


if __name__ == "__main__":
    main()

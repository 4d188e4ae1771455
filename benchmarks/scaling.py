"""How the cost of the reference workload grows: with the agents, with the days, and on two ranks against two threads.

    python benchmarks/scaling.py [--most 30000000] [--repeats 3] [--draw]

Every figure is taken in a process of its own, sizes in turn, and the medians are kept. Writes
benchmarks/figures/scaling.json and docs/figures/scaling.png; `--draw` draws anew what was measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
from ranks import start as start_ranks

from lpm import console
from lpm.errors import InputError
from lpm.memory import require_memory

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PLOT = ROOT / "benchmarks" / "figures" / "scaling.json", ROOT / "docs" / "figures" / "scaling.png"
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
DAYS = 60
LENGTHS, LENGTHS_AGENTS = (30, 60, 120, 240, 480), 1_000_000
RANKS, RANKS_TASKS = 2, ((2_000_000, 40), (8_400_000, 20))
BAR = 0.8
"""The least speed of two ranks on two cores, against the threaded run."""


def measure(agents: int, days: int) -> dict[str, float]:
    """Seconds of all days but the first, and what the model and the run add to the peak memory, in this process."""
    from lpm import simulation
    from lpm.bench.workload import day_timer, default_values, workload
    from lpm.processes import peak_memory_mb

    simulation.run(workload(20_000), default_values(0), steps=2, seed=0)  # compiles
    before = peak_memory_mb()
    model = workload(agents)
    mark, measured = day_timer()
    simulation.run(model, default_values(0), steps=days, seed=0, progress=mark)
    return {"seconds": sum(measured()), "peak_bytes": 2**20 * (peak_memory_mb() - before)}


def start(agents: int, days: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(agents), str(days)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def fits(agents: int) -> bool:
    """Whether this machine's memory holds so many agents."""
    try:
        require_memory(agents)
    except InputError:
        return False
    return True


def take_all(most: int, repeats: int) -> dict[str, Any]:
    """All that is plotted."""
    sizes = [agents for agents in SIZES if agents <= most and fits(agents)]
    tasks = [(agents, DAYS) for agents in sizes] + [(LENGTHS_AGENTS, days) for days in LENGTHS]
    found: dict[tuple[int, int], list[dict[str, float]]] = {task: [] for task in tasks}
    threads: dict[tuple[int, int], list[float]] = {task: [] for task in RANKS_TASKS}
    ranks: dict[tuple[int, int], list[float]] = {task: [] for task in RANKS_TASKS}
    load = psutil.getloadavg()[0]
    with console.progress("Runs", repeats * (len(found) + 2 * len(RANKS_TASKS))) as advance:
        for _ in range(repeats):
            for task, runs in found.items():
                runs.append(start(*task))
                advance(f"{task[0]:,} agents, {task[1]} days")
            for agents, days in RANKS_TASKS:
                given = argparse.Namespace(agents=agents, days=days)
                for processes, times in ((1, threads), (RANKS, ranks)):
                    times[agents, days].append(start_ranks(given, processes)[0])
                    advance(f"{agents:,} agents, {processes} processes")

    def median(task: tuple[int, int], name: str) -> float:
        return statistics.median(run[name] for run in found[task])

    by_size = [
        {
            "agents": agents,
            "day_ms": 1e3 * median((agents, DAYS), "seconds") / (DAYS - 1),
            "ns_per_agent_day": 1e9 * median((agents, DAYS), "seconds") / (DAYS - 1) / agents,
            "bytes_per_agent": median((agents, DAYS), "peak_bytes") / agents,
        }
        for agents in sizes
    ]
    by_length = [{"days": days, "seconds": median((LENGTHS_AGENTS, days), "seconds")} for days in LENGTHS]
    one, several = ({task: statistics.median(times[task]) for task in RANKS_TASKS} for times in (threads, ranks))
    return {
        "what": "W, 60 days unless said; own measurement by benchmarks/scaling.py; medians",
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 2),
        "repeats": repeats,
        "by_size": by_size,
        "exponent_of_size": exponent([each["agents"] for each in by_size], [each["day_ms"] for each in by_size]),
        "agents_by_length": LENGTHS_AGENTS,
        "by_length": by_length,
        "ranks": RANKS,
        "bar_of_ranks": BAR,
        "ranks_against_threads": [
            {
                "agents": task[0],
                "days": task[1],
                "threads_day_ms": one[task],
                "ranks_day_ms": several[task],
                "speed_of_ranks": one[task] / several[task],
            }
            for task in RANKS_TASKS
        ],
    }


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of the straight line through the logarithms: 1 where the cost is proportional."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(found: dict[str, Any]) -> None:
    """Three panels: time by size, memory by size, time by length."""
    agents = np.array([each["agents"] for each in found["by_size"]])
    day = np.array([each["day_ms"] for each in found["by_size"]])
    days = np.array([each["days"] for each in found["by_length"]])
    seconds = np.array([each["seconds"] for each in found["by_length"]])
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    middle = int(np.argmin(np.abs(np.log(agents / 1e6))))
    axes[0].loglog(agents, day, "o-", label=f"measured: agents$^{{{found['exponent_of_size']:.2f}}}$")
    axes[0].loglog(agents, day[middle] * agents / agents[middle], "--", color="0.6", label="proportional")
    axes[0].set(xlabel="agents", ylabel="ms a day", title=f"Size ({DAYS} days)")
    axes[0].legend(frameon=False)
    axes[1].semilogx(agents, [each["bytes_per_agent"] for each in found["by_size"]], "o-")
    axes[1].set(xlabel="agents", ylabel="bytes per agent", title="Peak memory", ylim=(0, None))
    axes[2].plot(days, seconds, "o-", label="measured")
    axes[2].plot(days, seconds[0] * (days - 1) / (days[0] - 1), "--", color="0.6", label="proportional")
    axes[2].set(xlabel="days", ylabel="s", title=f"Length ({found['agents_by_length']:,} agents)", ylim=(0, None))
    axes[2].legend(frameon=False)
    figure.savefig(PLOT, dpi=120)


def main() -> int:
    """Measure, write, draw; exit status 1 if ranks are slower than their bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="agents of the largest run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="draw only")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(*given.child)))
        return 0
    if not given.draw:
        scratch = FIGURES.with_suffix(".part")
        scratch.write_text(json.dumps(take_all(given.most, given.repeats), indent=1) + "\n")
        scratch.replace(FIGURES)
    found = json.loads(FIGURES.read_text())
    draw(found)
    print(json.dumps(found, indent=1))
    return int(min(each["speed_of_ranks"] for each in found["ranks_against_threads"]) < BAR)


if __name__ == "__main__":
    sys.exit(main())

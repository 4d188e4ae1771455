"""A day of an epidemic in lpm, Starsim and Covasim: the same number of agents, comparable networks, in one run.

    python benchmarks/peers.py [--agents 3000000] [--days 30] [--json FILE]

The peers are installed from the package index into a virtual environment of their own, which is kept in the user's
cache. Comparable means: each person has housemates, colleagues and passing contacts, some 8 edges in all for Starsim
(random networks of 1.5, 4 and 2.5 contacts a person) and Covasim's own hybrid population with its default contacts. lpm
runs W, whose households, workplaces and community cells are fully mixed. All record daily counts. The time is that of
the run after everything was made; memory is not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from rich.console import Console
from rich.table import Table

BARS = {"starsim": 30.0, "covasim": 100.0}

STARSIM = """
import json, sys, time
import starsim as ss
agents, days = int(sys.argv[1]), int(sys.argv[2])
def make(n, t):
    contacts = {"home": 1.5, "work": 4, "city": 2.5}
    networks = [ss.RandomNet(n_contacts=ss.poisson(k), name=name) for name, k in contacts.items()]
    sir = ss.SIR(beta=ss.perday(0.06), init_prev=0.001, dur_inf=ss.days(6), p_death=0)
    time = {"start": "2020-01-01", "dur": ss.days(t), "dt": ss.days(1)}
    return ss.Sim(n_agents=n, networks=networks, diseases=sir, verbose=0, **time)
make(1000, 2).run()
sim = make(agents, days)
sim.init()
began = time.perf_counter()
sim.run()
took = time.perf_counter() - began
infected = float(sim.results.sir.cum_infections[-1])
print(json.dumps({"seconds_per_day": took / days, "version": ss.__version__, "infected": infected}))
"""

COVASIM = """
import json, sys, time
import covasim as cv
agents, days = int(sys.argv[1]), int(sys.argv[2])
def make(n, t):
    people = {"pop_size": n, "pop_infected": max(1, n // 1000), "pop_type": "hybrid"}
    return cv.Sim(**people, n_days=t, verbose=0, rescale=False)
make(1000, 2).run()
sim = make(agents, days)
sim.initialize()
began = time.perf_counter()
sim.run()
took = time.perf_counter() - began
infected = float(sim.results["cum_infections"].values[-1])
print(json.dumps({"seconds_per_day": took / days, "version": cv.__version__, "infected": infected}))
"""

PEERS = {"starsim": STARSIM, "covasim": COVASIM}


def peer_python() -> Path:
    """The interpreter of the peers' own environment, which is made if it isn't there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lpm" / "peers"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True, timeout=1800)
        (folder / "complete").touch()
    return python


def measure(agents: int, days: int) -> dict[str, object]:
    """Run all three, one after the other, and compare them per agent and day."""
    peer = peer_python()
    bench = [sys.executable, "-m", "lpm", "bench", "W", "--agents", str(agents), "--days", str(days), "--json"]
    done = subprocess.run(bench, check=True, capture_output=True, text=True, timeout=1800)
    ours = json.loads(done.stdout)["median_day_ms"] / 1e3
    found: dict[str, object] = {"agents": agents, "days": days, "lpm": {"seconds_per_day": ours}}
    for name, program in PEERS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [peer, "-c", program, str(agents), str(days)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600, cwd=folder)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        found[name] = row | {"times_lpm": row["seconds_per_day"] / ours}
    return found


def main() -> int:
    """Compare, print a table, say whether the bars are met by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=3_000_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.agents, options.days)
    table = Table("", "ms a day", "times lpm", "bar")
    for name in ("lpm", *PEERS):
        row = found[name]
        assert isinstance(row, dict)
        ratio = f"{row['times_lpm']:.0f}" if name in BARS else "1"
        table.add_row(name, f"{1e3 * row['seconds_per_day']:.1f}", ratio, f"{BARS.get(name, '')}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(found[name]["times_lpm"] < bar for name, bar in BARS.items()))  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())

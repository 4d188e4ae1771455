"""What a federation adds to a day of simulation, against its bar: 5 parties with 100,000 agents each, loopback, TLS.

    python benchmarks/step.py [--parties 5] [--agents 100000] [--days 60] [--repeats 5] [--sharing crypten,masked]
                              [--json]

The same processes simulate the same people at the same time without a federation; the difference is what counts.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from lpm.bench.federation import bench_step

BAR_MS = 20.0
"""The most that a day may be longer for being federated, on two cores."""


def main() -> int:
    """Measure and print; exit status 1 if the bar is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", type=int, default=5)
    parser.add_argument("--agents", type=int, default=100_000, help="of each party")
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sharing", default="crypten,masked", help="engines, with commas")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    given = parser.parse_args()
    results = [
        bench_step(given.parties, given.agents, sharing, given.days, given.repeats)
        for sharing in given.sharing.split(",")
    ]
    if given.json:
        print(json.dumps({"bars": {"extra_ms": BAR_MS}, "results": results}))
    else:
        table = Table(title=f"A day of {given.parties} parties × {given.agents:,} agents, loopback, mutual TLS (ms)")
        columns = {"sharing": "engine", "apart_ms": "apart", "together_ms": "federated", "extra_ms": "longer by"}
        for column in columns.values():
            table.add_column(column, justify="right")
        for each in results:
            table.add_row(*(str(each[name]) for name in columns))
        Console().print(table)
    return int(any(each["extra_ms"] > BAR_MS for each in results))


if __name__ == "__main__":
    sys.exit(main())

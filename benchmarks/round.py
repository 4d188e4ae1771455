"""The time of one federated round against its bar: n parties as processes of this machine, over mutual TLS on loopback.

    python benchmarks/round.py [--parties 3,5] [--words 10000] [--rounds 300] [--sharing crypten] [--json]

It repeats `lpm bench federation` for several numbers of parties.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from lpm.bench.federation import bench_federation

BARS_MS = {
    ("crypten", 5): {"round_ms": 8.0},
    ("masked", 50): {"round_ms": 300.0, "party_cpu_ms": 5.0, "coordinator_cpu_ms": 50.0},
}
"""The most that a figure of an engine and a number of parties may be, on two cores."""


def main() -> int:
    """Measure and print; exit status 1 if a bar is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", default="3,5", help="how many; several numbers with commas")
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--sharing", default="crypten")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    given = parser.parse_args()
    results = [
        bench_federation(int(number), given.words, given.sharing, given.rounds) for number in given.parties.split(",")
    ]
    if given.json:
        bars = {f"{sharing}, {parties} parties": bar for (sharing, parties), bar in BARS_MS.items()}
        print(json.dumps({"bars": bars, "results": results}))
    else:
        table = Table(title=f"One round of {given.words:,} words, {given.sharing}, loopback, mutual TLS (ms)")
        columns = {
            "parties": "parties",
            "round_ms": "to the parties: median",
            "round_p90_ms": "90 %",
            "party_cpu_ms": "processor, party",
            "coordinator_cpu_ms": "processor, coordinator",
            "bytes_per_party": "bytes per party",
            "to_coordinator_ms": "to the coordinator: median",
        }
        for column in columns.values():
            table.add_column(column, justify="right")
        for each in results:
            table.add_row(*(f"{each[name]:,}" for name in columns))
        Console().print(table)
    return int(
        any(
            each[name] > most
            for each in results
            for name, most in BARS_MS.get((given.sharing, each["parties"]), {}).items()
        )
    )


if __name__ == "__main__":
    sys.exit(main())

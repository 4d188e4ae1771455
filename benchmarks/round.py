"""The time of one federated round: n parties as processes of this machine, over mutual TLS on loopback.

    python benchmarks/round.py [--parties 3,5] [--words 10000] [--rounds 300] [--json]

A round "to the parties" is what every step of a simulation costs: mask, seal, send up, relay, send down, open, add.
A round "to the coordinator" is what a loss or a gradient costs. Times are medians over rounds, then over parties.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from clients.config import ClientConfig
from clients.streams import join
from lpm.privacy.secure_sum import Flags, Round
from lpm.protocol.identity import make_local_authority
from lpm.protocol.manifest import Terms
from lpm.protocol.messages import Release, Task
from server.config import CoordinatorConfig
from server.relay import gather

BAR_MS = 8.0
_HASH = "00" * 32
_WARM_UP = 20


def _party(keys: Path, name: str, address: str) -> None:
    config = ClientConfig(scenario=keys, party=name, keys=keys, out=keys / "run", coordinator=address)
    with join(config, _HASH) as session:
        for task in session.tasks():
            words = np.random.default_rng(0).integers(-(2**40), 2**40, task.options["words"])
            seconds: dict[str, list[float]] = {"parties": [], "coordinator": []}
            for step in range(_WARM_UP + task.options["rounds"]):
                for opening, times in seconds.items():
                    address_of_round = Round(task.trajectory, step, opening, 0, task.digest)
                    start = time.perf_counter()
                    if opening == "parties":
                        session.secure_sum.open_to_parties(address_of_round, words, Flags(b"environment"))
                    else:
                        session.secure_sum.open_to_coordinator(address_of_round, words, Flags(b"environment"))
                    times.append(time.perf_counter() - start)
            cpu = np.array([time.process_time()])
            tables = {name: np.array(times[_WARM_UP:]) for name, times in seconds.items()}
            session.done(task, Release("seconds per round", tables | {"cpu": cpu}))


def measure(parties: int, words: int, rounds: int) -> dict[str, float]:
    """Run a federation of processes that do nothing but rounds.

    Args:
        parties: how many.
        words: 64-bit words in a round.
        rounds: timed rounds of each kind.

    Returns:
        Milliseconds: median and 90th percentile of a round to the parties and of one to the coordinator.
    """
    names = tuple(f"party-{number}" for number in range(parties))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        keys = Path(folder) / "keys"
        make_local_authority(keys, names)
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        # What the processes do is small: more threads than cores would only take turns.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--keys", str(keys), "--address", address, "--party"]
        processes = [subprocess.Popen([*command, name], env=environment) for name in names]
        try:
            config = CoordinatorConfig(
                scenario=keys, keys=keys, out=Path(folder) / "run", parties=names, data_address=address
            )
            with gather(config, Terms("benchmark", _HASH)) as session:
                task = Task("evaluate", 0, np.zeros((1, 1)), options={"words": words, "rounds": rounds})
                session.broadcast(task)
                for _ in range(_WARM_UP + rounds):
                    session.receive("coordinator", task)
                releases = session.releases(task)
        finally:
            for process in processes:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
    result: dict[str, float] = {"parties": parties, "words": words, "rounds": rounds}
    for opening in ("parties", "coordinator"):
        times = 1e3 * np.stack([release.tables[opening] for release in releases.values()])
        result[f"to_{opening}_median_ms"] = round(float(np.median(times)), 2)
        result[f"to_{opening}_p90_ms"] = round(float(np.quantile(times, 0.9)), 2)
    return result


def main() -> int:
    """Measure and print; exit status 1 if five parties exceed the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", default="3,5", help="how many; several numbers with commas")
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    for hidden in ("--keys", "--address", "--party"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.party:
        _party(Path(given.keys), given.party, given.address)
        return 0
    results = [measure(int(number), given.words, given.rounds) for number in given.parties.split(",")]
    cores = len(os.sched_getaffinity(0))
    if given.json:
        print(json.dumps({"cores": cores, "bar_ms": BAR_MS, "results": results}))
    else:
        table = Table(title=f"One round of {given.words:,} words on {cores} cores, loopback, mutual TLS (ms)")
        for column in ("parties", "to the parties: median", "90 %", "to the coordinator: median", "90 %"):
            table.add_column(column, justify="right")
        for each in results:
            table.add_row(*(f"{value:g}" for name, value in each.items() if name not in ("words", "rounds")))
        Console().print(table)
    return int(any(each["parties"] == 5 and each["to_parties_median_ms"] > BAR_MS for each in results))


if __name__ == "__main__":
    sys.exit(main())

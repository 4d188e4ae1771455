"""A party of a benchmark: it does rounds and nothing else, or simulates people of its own, and says how long it took.

python -m clients.rounds KEYS PARTY HOST:PORT ENGINE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.config import ClientConfig
from clients.streams import join
from lpm.privacy.secure_sum import Flags, Round, SecureSum
from lpm.protocol.messages import Release, Task

__all__ = ["main"]


def _simulate(secure_sum: SecureSum, task: Task, options: Mapping[str, Any], seed: int) -> NDArray[np.float64]:
    """Mean seconds of a day [1], by itself or as a part of the federation."""
    # Who does rounds only need not load a simulator.
    from lpm import simulation
    from lpm.bench.workload import default_values, workload

    model = workload(int(options["agents"]), seed, shared=("community",))
    world = None
    if options["together"]:
        from lpm.worlds.federated import FederatedWorld

        world = FederatedWorld(secure_sum, None)
        world.take(task.trajectory, task.digest)
    start = time.perf_counter()
    simulation.run(model, default_values(0), steps=int(options["days"]), seed=seed, world=world)
    return np.array([(time.perf_counter() - start) / int(options["days"])])


def _rounds(secure_sum: SecureSum, task: Task, options: Mapping[str, Any]) -> NDArray[np.float64]:
    """Seconds of each of a number of rounds of one kind."""
    opening, rounds = str(options["opening"]), int(options["rounds"])
    words = np.random.default_rng(0).integers(-(2**40), 2**40, options["words"])
    add = secure_sum.open_to_parties if opening == "parties" else secure_sum.open_to_coordinator
    seconds = np.empty(rounds)
    for step in range(rounds):
        start = time.perf_counter()
        add(Round(task.trajectory, step, opening, 0, task.digest), words, Flags(b"environment"))
        seconds[step] = time.perf_counter() - start
    return seconds


def main(keys: Path, party: str, address: str, sharing: str) -> None:
    """Answer tasks with the seconds of each round, or of a simulated day, and the processor's in all.

    Args:
        keys: the folder of all keys (`lpm keys local`).
        party: this party's name, which ends in its number.
        address: HOST:PORT of the coordinator.
        sharing: engine of the secure sum.
    """
    config = ClientConfig(scenario=keys, party=party, keys=keys, out=keys / "run", coordinator=address, sharing=sharing)
    with join(config, "00" * 32) as session:
        for task in session.tasks():
            busy = time.process_time()
            if "agents" in task.options:
                seconds = _simulate(session.secure_sum, task, task.options, int(party.rpartition("-")[2]))
            else:
                seconds = _rounds(session.secure_sum, task, task.options)
            used = np.array([time.process_time() - busy])
            session.done(task, Release("seconds", {"seconds": seconds, "processor": used}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])

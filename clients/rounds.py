"""A party that does nothing but rounds: what `lpm bench federation` starts to time a secure sum.

python -m clients.rounds KEYS PARTY HOST:PORT ENGINE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from clients.config import ClientConfig
from clients.streams import join
from lpm.privacy.secure_sum import Flags, Round
from lpm.protocol.messages import Release

__all__ = ["main"]


def main(keys: Path, party: str, address: str, sharing: str) -> None:
    """Answer tasks, each a number of rounds of one kind, with the seconds of each and the processor's in all.

    Args:
        keys: the folder of all keys (`lpm keys local`).
        party: this party's name.
        address: HOST:PORT of the coordinator.
        sharing: engine of the secure sum.
    """
    config = ClientConfig(scenario=keys, party=party, keys=keys, out=keys / "run", coordinator=address, sharing=sharing)
    with join(config, "00" * 32) as session:
        for task in session.tasks():
            opening, rounds = str(task.options["opening"]), int(task.options["rounds"])
            words = np.random.default_rng(0).integers(-(2**40), 2**40, task.options["words"])
            add = session.secure_sum.open_to_parties if opening == "parties" else session.secure_sum.open_to_coordinator
            seconds = np.empty(rounds)
            busy = time.process_time()
            for step in range(rounds):
                start = time.perf_counter()
                add(Round(task.trajectory, step, opening, 0, task.digest), words, Flags(b"environment"))
                seconds[step] = time.perf_counter() - start
            used = np.array([time.process_time() - busy])
            session.done(task, Release("seconds per round", {"seconds": seconds, "processor": used}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])

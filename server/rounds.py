"""A coordinator that does nothing but rounds: what `lpm bench federation` starts to time a secure sum.

    python -m server.rounds KEYS HOST:PORT ENGINE WORDS ROUNDS PARTY PARTY PARTY …

It prints one JSON object: for each opening ("parties", "coordinator") the seconds of every round at every party, the
processor's time of coordinator and parties, and the bytes that passed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lpm.protocol.manifest import Terms
from lpm.protocol.messages import Task
from server.config import CoordinatorConfig
from server.relay import gather

__all__ = ["main"]

_WARM_UP = 20


def main(keys: Path, address: str, sharing: str, words: int, rounds: int, parties: tuple[str, ...]) -> dict[str, Any]:
    """Hold a session of rounds.

    Args:
        keys: the folder of all keys (`lpm keys local`).
        address: HOST:PORT to listen on.
        sharing: engine of the secure sum.
        words: 64-bit words in a round.
        rounds: timed rounds of each kind.
        parties: their names.

    Returns:
        What is printed.
    """
    config = CoordinatorConfig(
        scenario=keys, keys=keys, out=keys / "run", parties=parties, data_address=address, sharing=sharing
    )
    found: dict[str, Any] = {}
    with gather(config, Terms("benchmark", "00" * 32, sharing=sharing)) as session:
        for number, (opening, count) in enumerate(
            (opening, count) for opening in ("parties", "coordinator") for count in (_WARM_UP, rounds)
        ):
            options = {"opening": opening, "words": words, "rounds": count}
            task = Task("evaluate", number, np.zeros((1, 1)), options=options)
            busy, traffic = time.process_time(), (session.bytes_received, session.bytes_sent)
            session.broadcast(task)
            if opening == "coordinator":
                for _ in range(count):
                    session.receive(opening, task)
            releases = session.releases(task)
            found[opening] = {  # the warm-up is overwritten
                "seconds": [release.tables["seconds"].tolist() for release in releases.values()],
                "party_processor": [float(release.tables["processor"][0]) for release in releases.values()],
                "coordinator_processor": time.process_time() - busy,
                "received": session.bytes_received - traffic[0],
                "sent": session.bytes_sent - traffic[1],
            }
    return found


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(
            main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), tuple(sys.argv[6:]))
        )
    )

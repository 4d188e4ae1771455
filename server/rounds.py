"""The coordinator of a benchmark: it asks for rounds, or simulated days, and gathers how long they took.

    python -m server.rounds KEYS HOST:PORT ENGINE TASKS PARTY PARTY PARTY …

TASKS is a list in JSON of the options of each task: `opening` ("parties" or "coordinator"), `words` and `rounds`; or
`agents`, `days` and `together`. For each of them one JSON object in a list is printed: the seconds of every round, or
the mean of a day, at every party, the processor's time of coordinator and parties, and the bytes that passed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpm.protocol.manifest import Terms
from lpm.protocol.messages import Task
from server.config import CoordinatorConfig
from server.relay import gather

__all__ = ["main"]


def main(
    keys: Path, address: str, sharing: str, tasks: Sequence[dict[str, Any]], parties: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Hold a session of such tasks.

    Args:
        keys: the folder of all keys (`lpm keys local`).
        address: HOST:PORT to listen on.
        sharing: engine of the secure sum.
        tasks: options of each.
        parties: their names.

    Returns:
        What is printed.
    """
    config = CoordinatorConfig(
        scenario=keys, keys=keys, out=keys / "run", parties=parties, data_address=address, sharing=sharing
    )
    found: list[dict[str, Any]] = []
    with gather(config, Terms("benchmark", "00" * 32, sharing=sharing)) as session:
        for number, options in enumerate(tasks):
            task = Task("evaluate", number, np.zeros((1, 1)), options=options)
            busy, traffic = time.process_time(), (session.bytes_received, session.bytes_sent)
            session.broadcast(task)
            if options.get("opening") == "coordinator":
                for _ in range(options["rounds"]):
                    session.receive("coordinator", task)
            releases = session.releases(task)
            found.append(
                {
                    "seconds": [release.tables["seconds"].tolist() for release in releases.values()],
                    "party_processor": [float(release.tables["processor"][0]) for release in releases.values()],
                    "coordinator_processor": time.process_time() - busy,
                    "received": session.bytes_received - traffic[0],
                    "sent": session.bytes_sent - traffic[1],
                }
            )
    return found


if __name__ == "__main__":
    folder, place, engine, asked, *names = sys.argv[1:]
    sys.stdout.write(json.dumps(main(Path(folder), place, engine, json.loads(asked), tuple(names))))

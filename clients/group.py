"""Several parties in one process, for a machine that can't hold a process for each: a thread for every one.

Each has its own keys, session, shard and part of the run, and takes part exactly as it would alone. But they share a
memory: nothing isolates them from each other. Whoever starts them so has them say it in the manifest (`--label`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message

from clients.app import answer
from clients.config import CONFIG_FILE, ClientConfig
from clients.node import run_node
from lpm.errors import LpmError
from lpm.processes import Process, announce
from lpm.protocol.identity import load_identity

__all__ = ["link_logs", "take_part_together"]


def link_logs(configs: Sequence[ClientConfig]) -> None:
    """Let every party's folder hold the log of the process, which is written in the first one's.

    Args:
        configs: the parties'; their folders are made if they are not there.
    """
    first, *others = configs
    for config in others:
        config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        link = config.folder / "party.log"
        if not link.is_symlink():
            with contextlib.suppress(OSError):  # a file system without links: the first folder has the log
                link.symlink_to(Path("..") / first.party / "party.log")


def take_part_together(
    configs: Sequence[ClientConfig], address: str, patience: float, announcement: Path | None
) -> int:
    """Take part in one session as several parties, over control streams.

    Args:
        configs: the parties'.
        address: HOST:PORT of the coordinator's control plane.
        patience: seconds to wait for the coordinator to listen.
        announcement: where to say that this process is up.

    Returns:
        0 if all parties ended well, else the largest exit code of one.

    Raises:
        LpmError: if a party's keys can't be used, or the first problem of one that could not begin.
    """
    for config in configs:
        load_identity(config.keys, config.party)  # refuses here, before anything is started
        config.write(config.folder / CONFIG_FILE)
    announce(
        announcement,
        [Process(role="client", party=config.party, pid=os.getpid(), address=address) for config in configs],
    )
    codes: dict[str, int] = {}
    problems: list[LpmError] = []

    def take_part(config: ClientConfig) -> None:
        def app(message: Message, context: Context) -> Message:
            return answer(config, message)

        try:
            codes[config.party] = run_node(app, config.keys, address, patience=patience)
        except LpmError as problem:
            problems.append(problem)

    threads = [threading.Thread(target=take_part, args=(config,), name=config.party, daemon=True) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return max(codes.values(), default=1) if len(codes) == len(configs) else 1

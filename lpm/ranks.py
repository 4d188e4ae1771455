"""Which process of a `torchrun` this is: read from the environment, before anything heavy is imported.

A population beyond one device is spread over *ranks*, processes of one owner that `torchrun` starts. Rank 0 alone
writes the run, standard output and JSON. `lpm.worlds.distributed` opens the connections and knows who is lost; this
module imports nothing of that, so that thread counts are set before numba is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from lpm.errors import InputError, LpmError

__all__ = ["Links", "Place", "joined", "link", "lost", "place", "say_end", "set_threads", "speak", "speaks", "threads"]


@dataclass(frozen=True)
class Place:
    """A process among those of a job.

    Attributes:
        rank: its number.
        ranks: how many there are in all.
        local_rank: its number on this machine.
        local_ranks: how many are on this machine.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


def place() -> Place:
    """Where this process stands; alone, where the environment says nothing or `WORLD_SIZE` is 1.

    Raises:
        InputError: for variables that don't fit together.
    """
    ranks = _number("WORLD_SIZE", 1, None, 1)
    if ranks == 1:
        return Place()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"WORLD_SIZE is {ranks}, but {name} is not set.", "Start with torchrun --nproc-per-node R -m lpm …"
            )
    rank = _number("RANK", 0, ranks, 0)
    local_ranks = _number("LOCAL_WORLD_SIZE", 1, ranks + 1, ranks)
    return Place(rank, ranks, _number("LOCAL_RANK", 0, local_ranks, rank % local_ranks), local_ranks)


def _number(name: str, lowest: int, beyond: int | None, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < lowest or (beyond is not None and int(text) >= beyond):
        most = "" if beyond is None else f" to {beyond - 1}"
        raise InputError(
            f"The variable {name} is {text!r}: a whole number from {lowest}{most}.",
            "Start with torchrun, which sets it, or unset it.",
        )
    return int(text)


def set_threads() -> None:
    """Give this rank its share of the machine's cores, unless `NUMBA_NUM_THREADS` says otherwise."""
    try:
        here = place()
    except InputError:  # told when a command begins
        return
    if here.ranks > 1:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, _cores() // here.local_ranks)))


def threads() -> int:
    """How many threads this process uses: `NUMBA_NUM_THREADS`, or the cores it may use.

    Raises:
        InputError: if NUMBA_NUM_THREADS is not a whole number from 1.
    """
    wanted = os.environ.get("NUMBA_NUM_THREADS")
    if wanted is None:
        return _cores()
    if not wanted.isdecimal() or int(wanted) < 1:
        raise InputError(
            f"The variable NUMBA_NUM_THREADS is {wanted!r}: a whole number from 1.",
            "Unset it to use all cores of this process.",
        )
    return int(wanted)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Links(Protocol):
    """What a rank that is joined with the others can ask and tell."""

    def say_end(self, reason: str) -> None:
        """Tell the others that this rank ends and why; no reason if it is not to blame."""
        ...

    def lost(self) -> LpmError | None:
        """Which rank is lost, if any is."""
        ...


_links: list[Links] = []
_speaker: list[bool] = []


def link(links: Links) -> None:
    """From here on this rank is joined with the others."""
    _links.append(links)


def joined() -> bool:
    """Whether this process is joined with other ranks."""
    return bool(_links)


def speak(whether: bool) -> None:
    """Say who tells the user what happened, where rank 0 may be gone."""
    _speaker.append(whether)


def speaks() -> bool:
    """Whether this process tells the user what happens: rank 0, or the one that stands in for it."""
    if _speaker:
        return _speaker[-1]
    try:
        here = place()
    except InputError:
        return True
    # Before the ranks are joined, the first on each machine tells what is wrong there.
    return here.rank == 0 if _links else here.local_rank == 0


def say_end(reason: str) -> None:
    """Tell the other ranks, if there are any, that this one ends and why."""
    for links in _links:
        links.say_end(reason)


def lost() -> LpmError | None:
    """Which rank is lost, if any is."""
    return _links[-1].lost() if _links else None

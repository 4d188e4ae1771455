"""Whether people, and what a run holds of them, fit this machine: said before work begins."""

from __future__ import annotations

import contextlib
import math
import threading
import tracemalloc
from collections.abc import Callable, Hashable
from pathlib import Path

import psutil

from lpm import ranks
from lpm.errors import InputError

__all__ = ["BYTES_PER_AGENT", "available", "making_bytes", "require_memory"]

BYTES_PER_AGENT = 40
"""What an agent of the leanest model takes, its making included; attributes and classes come on top."""

_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_SAMPLE = 50_000
"""People made to see what more of them take: enough that tables which don't grow with them are a small part."""

_MEASURING = threading.Lock()
_measured: dict[Hashable, float] = {}


def making_bytes(make: Callable[[int], object], agents: int, what: Hashable) -> float:
    """What the making of one agent more takes at its peak, in bytes: from two small populations that are thrown away.

    Args:
        make: makes a population of so many agents.
        agents: of the population in question; the small ones are no larger than a half of it.
        what: is made; the same is measured once.
    """
    few = min(_SAMPLE, max(1, agents // 4))
    with _MEASURING:  # what Python allocates is counted for all threads together
        if (what, few) not in _measured:
            _measured[what, few] = _making_bytes(make, few)
        return _measured[what, few]


def _making_bytes(make: Callable[[int], object], few: int) -> float:
    mine = not tracemalloc.is_tracing()
    if mine:
        tracemalloc.start()
    try:
        peaks = []
        for number in (few, few, 2 * few):  # the first reads files and fills caches
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            make(number)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        if mine:
            tracemalloc.stop()
    return max(0, peaks[2] - peaks[1]) / few


def available(device: str = "") -> float:
    """Bytes that this process may still take, so that the other ranks that share them can take as many.

    Args:
        device: the torch device whose memory is meant: this machine's, or that of a GPU, where each rank has its own.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_to_job()) / ranks.place().local_ranks


def _left_to_job() -> float:
    """What the container or batch job that this process is in may still take, where one limits it (cgroup v2)."""
    left = math.inf
    with contextlib.suppress(OSError):
        own = next((line[4:] for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::/")), "")
        for name in (own, *map(str, Path(own).parents)):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                limit, used = (int((_GROUPS / name / f"memory.{what}").read_text()) for what in ("max", "current"))
                stat = dict(line.split() for line in (_GROUPS / name / "memory.stat").read_text().splitlines())
                left = min(left, max(0, limit - used + int(stat.get("inactive_file", 0))))  # cached files give way
    return left


def require_memory(
    agents: int, share: float = 1.0, each: float = BYTES_PER_AGENT, purpose: str = "", device: str = ""
) -> None:
    """Refuse what can't fit.

    Args:
        agents: of the whole population.
        share: the part of them that this process holds.
        each: bytes per agent.
        purpose: what for, if not the population itself.
        device: see `available`.

    Raises:
        InputError: naming the memory needed and the memory available.
    """
    needed, room = agents * share * each, available(device)
    if needed > room:
        gpu = device.startswith("cuda")
        of = " to each rank on this machine" if ranks.place().local_ranks > 1 and not gpu else ""
        raise InputError(
            f"{agents:,} agents need at least {needed / 2**30:,.1f} GiB of memory{purpose and f' for {purpose}'} "
            f"({each:,.0f} bytes each); {room / 2**30:,.1f} GiB are available{of}.",
            f"Ask for at most {int(room / share / each):,} with --agents, or use a larger "
            f"{'GPU' if gpu else 'machine'}.",
        )

"""Whether a population fits this machine: said before any of it is made."""

from __future__ import annotations

import psutil

from lpm.errors import InputError

__all__ = ["BYTES_PER_AGENT", "require_memory"]

BYTES_PER_AGENT = 40
"""What an agent of the leanest model takes, its making included; attributes, classes and more draws come on top."""


def require_memory(agents: int, share: float = 1.0) -> None:
    """Refuse a population that can't fit.

    Args:
        agents: of the whole population.
        share: the part of them that this process makes.

    Raises:
        InputError: naming the memory needed and the memory available.
    """
    needed, available = agents * share * BYTES_PER_AGENT, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"{agents:,} agents need at least {needed / 2**30:,.1f} GiB of memory ({BYTES_PER_AGENT} bytes each); "
            f"{available / 2**30:,.1f} GiB are available.",
            f"Ask for at most {int(available / share / BYTES_PER_AGENT):,} with --agents, or use a larger machine.",
        )

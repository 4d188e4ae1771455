"""Whether a population, and derivatives by cluster alternates, fit this machine: said before work begins."""

from __future__ import annotations

import psutil

from lpm.errors import InputError

__all__ = ["ALTERNATES_BYTES_PER_AGENT", "BYTES_PER_AGENT", "require_memory"]

BYTES_PER_AGENT = 40
"""What an agent of the leanest model takes, its making included; attributes, classes and more draws come on top."""


ALTERNATES_BYTES_PER_AGENT = {"forward": 50, "reverse": 280, "torch": 1_500}
"""What the alternatives of one draw take besides, by mode, at least: with a layer of households and few parameters; in
torch for protocols of other kinds."""


def require_memory(agents: int, share: float = 1.0, each: int = BYTES_PER_AGENT, purpose: str = "") -> None:
    """Refuse what can't fit.

    Args:
        agents: of the whole population.
        share: the part of them that this process holds.
        each: bytes per agent.
        purpose: what for, if not the population itself.

    Raises:
        InputError: naming the memory needed and the memory available.
    """
    needed, available = agents * share * each, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"{agents:,} agents need at least {needed / 2**30:,.1f} GiB of memory{purpose and f' for {purpose}'} "
            f"({each} bytes each); {available / 2**30:,.1f} GiB are available.",
            f"Ask for at most {int(available / share / each):,} with --agents, or use a larger machine.",
        )

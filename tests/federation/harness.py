"""A whole federation in one process: one thread per party over the in-memory channel, real masks, real sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lpm.privacy.memory_channel import MemoryHub, in_memory_sums
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.world import Disclosure


def federate(
    work: Sequence[Callable[[FederatedWorld], Any]],
    *,
    disclosure: Disclosure | None = None,
    engine: str = "crypten",
    thresholds: Sequence[str] = (),
) -> tuple[list[Any], MemoryHub]:
    """Run each party's work in a thread of its own.

    Args:
        work: one callable per party; it gets the party's world.
        disclosure: rule for group sums.
        engine: of the secure sum.
        thresholds: tensors whose cells are opened above a threshold only.

    Returns:
        what the parties returned, and the hub with what the coordinator opened.
    """
    hub, sums = in_memory_sums(len(work), engine, thresholds=thresholds)
    worlds = [FederatedWorld(each, disclosure) for each in sums]
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(_guarded, hub, party, world) for party, world in zip(work, worlds, strict=True)]
        problems = [future.exception() for future in futures]
    for problem in problems:
        if problem is not None:
            raise problem
    return [future.result() for future in futures], hub


def _guarded(hub: MemoryHub, party: Callable[[FederatedWorld], Any], world: FederatedWorld) -> Any:
    try:
        return party(world)
    except Exception as problem:
        hub.fail(problem)
        raise


def total(words: Sequence[np.ndarray]) -> np.ndarray:
    """Σ of the parties' words, as ⊕ adds them."""
    return np.sum(np.stack(list(words)), axis=0, dtype=np.int64)

"""The Local world: all agents on one device, ⊕ in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lpm.errors import RoundRefused
from lpm.worlds.world import Disclosure

__all__ = ["LocalWorld"]


class LocalWorld:
    """One shard: its own words are the sum."""

    name = "local"
    parties = 1
    disclosure: Disclosure | None = None

    def begin(self, trajectory: int, parameters: bytes) -> None:
        """Nothing to agree on."""

    def add(
        self, tensor: str, step: int, words: NDArray[np.int64], *, digest: bytes, rescale: bool
    ) -> NDArray[np.int64]:
        """See `World.add`."""
        if rescale:
            raise RoundRefused(rescale=True)
        return words

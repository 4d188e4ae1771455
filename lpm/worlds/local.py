"""The Local world: all agents on one device, ⊕ in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, RoundRefused
from lpm.worlds.world import Disclosure, Number, Spread

__all__ = ["LocalWorld"]


class LocalWorld:
    """One shard: its own words are the sum."""

    name = "local"
    parties = 1
    one_owner = True
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

    def whole(self, values: NDArray[Number]) -> NDArray[Number]:
        """See `World.whole`."""
        return values

    def gathered(self, state: Mapping[str, Any], spread: Spread) -> Mapping[str, Any]:
        """See `World.gathered`."""
        return state

    def parted(self, found: Mapping[str, Any] | None, spread: Spread) -> Mapping[str, Any] | None:
        """See `World.parted`."""
        if found is not None and any(name.startswith("own:") for name in found):
            ranks = next(name for name in found if name.startswith("own:")).split(":")[1].partition("/")[2]
            raise InputError(
                f"This checkpoint was written by {ranks} ranks, and one process can't go on from it.",
                f"Resume with torchrun --nproc-per-node {ranks} -m lpm resume RUN.",
            )
        return found

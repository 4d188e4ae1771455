"""Outputs that are told above a threshold only, cell by cell: how they are named, and how a withheld one is said.

The parties open the cells that enough people and institutions stand behind among themselves
(`SecureSum.open_if_enough`), and the first in the roster hands the coordinator what was opened. In the place of a
withheld cell stands a word that no sum can be.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lpm import ring

__all__ = ["WITHHELD", "decode_told", "tensor_of"]

WITHHELD = np.int64(-(2**63))
"""Stands for a cell that is withheld: counts are never negative."""


def tensor_of(output: str) -> str:
    """The tensor of an output's cells, as the manifest lists it."""
    return f"cells:{output}"


def decode_told(words: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers of opened outputs; NaN where a cell is withheld."""
    return np.where(words == WITHHELD, np.nan, ring.decode(words))

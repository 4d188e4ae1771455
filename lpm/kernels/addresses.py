"""Columns of numbers per agent that kernels read where they lie, by address.

A kernel that takes a varying number of arrays would have to be compiled for each number, or be given a copy of them,
side by side: for cells and slots 4 bytes per agent and network. An array of addresses is one argument, whatever it
points to. Who owns the columns must keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = ["Addresses", "addresses_of", "column"]

Addresses = NDArray[np.uint64]


def addresses_of(columns: Sequence[NDArray[np.int32] | None]) -> Addresses:
    """Where columns [agents] lie; None, for 0, 1, 2, …, is at address 0.

    Raises:
        ValueError: for a column that `column` can't read.
    """
    for values in columns:
        if values is not None and (values.dtype != np.int32 or not values.flags.c_contiguous):
            raise ValueError("a column is contiguous int32")
    return np.array([0 if values is None else values.ctypes.data for values in columns], dtype=np.uint64)


@intrinsic
def _load(_: Any, address: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return nb.types.int32(nb.types.uint64, nb.types.int64), generate


@nb.njit(_nrt=False, inline="always")
def column(address: np.uint64, i: int) -> int:
    """Entry i of a column."""
    return i if address == np.uint64(0) else int(_load(address, i))

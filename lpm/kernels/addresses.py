"""Columns of numbers, of agents or of cells, that kernels read where they lie, by address.

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
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = [
    "Addresses",
    "addresses_of",
    "byte_column",
    "column",
    "entry",
    "fetch",
    "fetch_byte_column",
    "fetch_column",
    "fetch_float_column",
    "float_column",
]

Addresses = NDArray[np.uint64]


def addresses_of(columns: Sequence[NDArray[np.int32] | NDArray[np.int8] | NDArray[np.float64] | None]) -> Addresses:
    """Where columns lie; None, for the numbers 0, 1, 2, …, for zeros in bytes or for ones, is at address 0.

    Raises:
        ValueError: for a column that none of `column`, `byte_column` and `float_column` can read.
    """
    for values in columns:
        if values is not None and not (values.dtype in (np.int32, np.int8, np.float64) and values.flags.c_contiguous):
            raise ValueError("a column is contiguous, of int32, int8 or float64")
    return np.array([0 if values is None else values.ctypes.data for values in columns], dtype=np.uint64)


def entry(context: Any, builder: Any, kind: Any, where: Any, i: Any, width: Any) -> Any:
    """Where entry i of an array, or of a column of entries of some width, lies: for functions that generate code.

    An array is contiguous, and all its axes are counted as one.
    """
    if isinstance(kind, nb.types.Array):
        first = context.make_array(kind)(context, builder, where).data
    else:
        first = builder.inttoptr(where, width.as_pointer())
    return builder.gep(first, [i])


def _loader(number: Any, width: Any) -> Any:
    """A function of a kernel that reads one entry of a column."""

    @intrinsic
    def load(_: Any, address: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(entry(context, builder, signature.args[0], arguments[0], arguments[1], width))

        return number(nb.types.uint64, nb.types.int64), generate

    return load


def _asker(kind: Any, width: Any) -> Any:
    """What asks for a line of the cache that will be read soon, and waits for nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0i8")
        place = builder.bitcast(entry(context, builder, kind, arguments[0], arguments[1], width), byte)
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return nb.types.void(kind, nb.types.int64), generate


@intrinsic
def fetch(_: Any, array: Any, i: Any) -> Any:
    """Have entry i of a contiguous array, all axes counted as one, at hand: for loops that read here and there."""
    return _asker(array, None)


@intrinsic
def _fetch(_: Any, address: Any, i: Any) -> Any:
    return _asker(nb.types.uint64, ir.IntType(32))


@intrinsic
def _fetch_byte(_: Any, address: Any, i: Any) -> Any:
    return _asker(nb.types.uint64, ir.IntType(8))


@intrinsic
def _fetch_float(_: Any, address: Any, i: Any) -> Any:
    return _asker(nb.types.uint64, ir.DoubleType())


_load = _loader(nb.types.int32, ir.IntType(32))
_load_byte = _loader(nb.types.int8, ir.IntType(8))
_load_float = _loader(nb.types.float64, ir.DoubleType())


@nb.njit(_nrt=False, inline="always")
def column(address: np.uint64, i: int) -> int:
    """Entry i of a column of whole numbers."""
    return i if address == np.uint64(0) else int(_load(address, i))


@nb.njit(_nrt=False, inline="always")
def byte_column(address: np.uint64, i: int) -> int:
    """Entry i of a column of small numbers."""
    return 0 if address == np.uint64(0) else int(_load_byte(address, i))


@nb.njit(_nrt=False, inline="always")
def float_column(address: np.uint64, i: int) -> float:
    """Entry i of a column of numbers."""
    return 1.0 if address == np.uint64(0) else float(_load_float(address, i))


@nb.njit(_nrt=False, inline="always")
def fetch_column(address: np.uint64, i: int) -> None:
    """Have entry i of a column of whole numbers at hand."""
    if address != np.uint64(0):
        _fetch(address, i)


@nb.njit(_nrt=False, inline="always")
def fetch_byte_column(address: np.uint64, i: int) -> None:
    """Have entry i of a column of small numbers at hand."""
    if address != np.uint64(0):
        _fetch_byte(address, i)


@nb.njit(_nrt=False, inline="always")
def fetch_float_column(address: np.uint64, i: int) -> None:
    """Have entry i of a column of numbers at hand."""
    if address != np.uint64(0):
        _fetch_float(address, i)

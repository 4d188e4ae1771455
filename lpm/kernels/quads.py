"""Four float64 numbers side by side, as a type of compiled loops: one register of a processor, where it has such.

A loop whose innermost range is four numbers, and is not known to be when it is compiled, is not made of whole vectors
by the compiler. A `quad` is, on any processor (where registers are shorter, of two or four of them), and each of its
numbers is computed as the same number alone would be: no bit depends on the machine.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model
from numpy.typing import NDArray

from lpm.kernels.addresses import entry

__all__ = ["LENGTH", "load", "load_at", "nothing", "store", "store_at", "zeros"]

LENGTH = 4
_VECTOR = ir.VectorType(ir.DoubleType(), LENGTH)


def zeros(*shape: int) -> NDArray[np.float64]:
    """Zeros of which no quad lies across two lines of the cache, where one costs twice as much."""
    size, line = math.prod(shape), 64
    room = np.zeros(size + line // 8)
    first = -room.ctypes.data % line // 8
    return room[first : first + size].reshape(shape)


class _Quad(types.Type):
    def __init__(self) -> None:
        super().__init__(name="quad")


_quad = _Quad()


@register_model(_Quad)
class _QuadModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _place(context: Any, builder: Any, where: Any, kind: Any, index: Any) -> Any:
    """Address of the numbers from `index` on of an array, or from an address on."""
    return builder.bitcast(entry(context, builder, kind, where, index, ir.DoubleType()), _VECTOR.as_pointer())


def _reader(kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where, index = arguments
        return builder.load(_place(context, builder, where, kind, index), align=8)

    return _quad(kind, types.int64), generate


def _writer(kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where, index, value = arguments
        builder.store(value, _place(context, builder, where, kind, index), align=8)
        return context.get_dummy_value()

    return types.void(kind, types.int64, _quad), generate


@intrinsic
def load(_: Any, array: Any, i: Any) -> Any:
    """Four numbers of a contiguous float64 array of one axis, from the i-th on."""
    return _reader(array)


@intrinsic
def load_at(_: Any, address: Any, i: Any) -> Any:
    """Four float64 numbers in memory, from the i-th after an address on."""
    return _reader(types.uint64)


@intrinsic
def store(_: Any, array: Any, i: Any, value: Any) -> Any:
    """Write four numbers into a contiguous float64 array of one axis, from the i-th on."""
    return _writer(array)


@intrinsic
def store_at(_: Any, address: Any, i: Any, value: Any) -> Any:
    """Write four numbers into memory, from the i-th after an address on."""
    return _writer(types.uint64)


@intrinsic
def splat(_: Any, number: Any) -> Any:
    """The same number four times."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = ir.IntType(32)
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], index(0))
        same = ir.Constant(ir.VectorType(index, LENGTH), [0] * LENGTH)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), same)

    return _quad(types.float64), generate


@intrinsic
def nothing(_: Any) -> Any:
    """Four zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * LENGTH)

    return _quad(), generate


def _operation(name: str) -> Any:
    @intrinsic
    def operate(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return _quad(_quad, _quad), generate

    return operate


def _overload(operation: Callable[[Any, Any], Any], name: str) -> None:
    """Let an operation of numbers be one of quads, and of a quad and a number."""
    operate = _operation(name)

    @overload(operation, strict=False)  # else it would compare annotations
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, _Quad) and isinstance(b, _Quad):
            return lambda a, b: operate(a, b)
        if isinstance(a, _Quad) and isinstance(b, types.Float):
            return lambda a, b: operate(a, splat(b))
        if isinstance(a, types.Float) and isinstance(b, _Quad):
            return lambda a, b: operate(splat(a), b)
        return None


for _operator, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload(_operator, _name)

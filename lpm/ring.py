"""Z_2^64, the ring in which every contribution to ⊕ lives: fixed-point words whose sums are exact in any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpm.errors import InputError

__all__ = ["FRACTION_BITS", "decode", "encode", "require_headroom", "words_from_bytes", "words_to_bytes"]

FRACTION_BITS = 32
"""Fraction bits of a word unless an exponent says otherwise."""

_LIMIT = 2.0**63


def encode(values: ArrayLike, bits: int = FRACTION_BITS) -> NDArray[np.int64]:
    """Round values to fixed-point words, half to even, two's complement.

    Args:
        values: finite numbers of any shape.
        bits: fraction bits f, from -1000 to 1000.

    Returns:
        `round(values · 2^bits)` as int64, of the same shape.

    Raises:
        InputError: for NaN, an infinity, or a word outside [-2^63, 2^63).
    """
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused below
        scaled = np.rint(np.asarray(values, dtype=np.float64) * 2.0**bits)
    # The comparison is false for NaN, so a single test refuses all three.
    if not np.all((scaled >= -_LIMIT) & (scaled < _LIMIT)):
        raise InputError(
            f"A value can't be a word of 64 bits with {bits} fraction bits: it is not finite or too large."
        )
    return scaled.astype(np.int64)


def decode(words: NDArray[np.int64], bits: int = FRACTION_BITS) -> NDArray[np.float64]:
    """The numbers that words stand for: `words · 2^-bits`, rounded to binary64; bits are from -1000 to 1000."""
    # The product with a power of two has the bits of `ldexp`, in a tenth of the time.
    return np.asarray(words).astype(np.float64) * 2.0**-bits


def require_headroom(name: str, parties: int, bound: float, bits: int = FRACTION_BITS) -> None:
    """Refuse a tensor whose sum could leave 64 bits: the wrapped sum itself can't show an overflow.

    Args:
        name: the network or tensor, for the message.
        parties: how many contributions are added.
        bound: the largest absolute value of one party's contribution.
        bits: fraction bits.

    Raises:
        InputError: unless `parties · round(bound · 2^bits) ≤ 2^63 − 1`.
    """
    if not np.isfinite(bound) or bound < 0:
        raise InputError(f"The bound of {name} is {bound}: a finite number from 0.")
    numerator, denominator = float(bound).as_integer_ratio()
    numerator, denominator = (numerator << bits, denominator) if bits >= 0 else (numerator, denominator << -bits)
    quotient, remainder = divmod(numerator, denominator)
    rounded = quotient + (2 * remainder > denominator or (2 * remainder == denominator and quotient % 2 == 1))
    if parties * rounded > 2**63 - 1:
        raise InputError(
            f"The sum of {name} could overflow: {parties} parties of at most {bound:g} each, {bits} fraction bits.",
            f"Lower the bound of {name} in the scenario or its exponent.",
        )


def words_to_bytes(words: NDArray[np.int64]) -> bytes:
    """The wire form of words: consecutive little-endian 64-bit integers."""
    return np.ascontiguousarray(words, dtype="<i8").tobytes()


def words_from_bytes(data: bytes) -> NDArray[np.int64]:
    """Words back from their wire form.

    Raises:
        InputError: if the length is not a multiple of 8.
    """
    if len(data) % 8:
        raise InputError(f"A tensor of {len(data)} bytes is not made of 64-bit words.")
    return np.frombuffer(data, dtype="<i8").astype(np.int64)

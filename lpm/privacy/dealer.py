"""The dealer of triples: correlated randomness from the coordinator, for what the `crypten` engine computes on shares.

A product of two shared numbers needs a triple (a, b, a·b) that nobody knows whole. Here the coordinator makes it and
gives each party its share. That is a weaker trust than in a sum: the coordinator *with one party* could undo the masks
of a product; alone it sees none of the openings, which pass it sealed, and a party alone has only its own shares.

Source: Beaver 1991; the dealer is the "trusted third party" of CrypTen (Knott et al. 2021).
"""

from __future__ import annotations

import enum
import secrets
import struct
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from lpm.errors import SessionRefused

__all__ = ["LABEL", "MOST_WORDS", "Deal", "deal", "read_dealt", "request"]

LABEL = (
    "cells above a threshold are found by computing on shares with the coordinator as dealer: the coordinator together "
    "with any one institution could read the cells that are withheld"
)
"""What manifest, log and report say wherever a dealer serves."""

MOST_WORDS = 1 << 22
"""Most words of one request."""

_REQUEST = struct.Struct("<BI")
_NONCE = bytes(16)


class Deal(enum.IntEnum):
    """What is dealt."""

    PRODUCT = 1
    """(a, b, c) with c = a·b mod 2^64, each shared by addition."""
    CONJUNCTION = 2
    """(a, b, c) with c = a & b, each shared by exclusive or."""
    BIT = 3
    """(r, r) with a bit r, once shared by addition and once by exclusive or."""


def request(what: Deal, count: int) -> bytes:
    """A request, the same from every party.

    Args:
        what: kind.
        count: how many words of each.

    Returns:
        Its bytes.
    """
    return _REQUEST.pack(what, count)


def _parse(data: bytes | memoryview) -> tuple[Deal, int]:
    try:
        what, count = _REQUEST.unpack(data)
        kind = Deal(what)
    except (struct.error, ValueError):
        raise SessionRefused("A request to the dealer can't be read.") from None
    if count > MOST_WORDS:
        raise SessionRefused(f"A request to the dealer is for {count} words: at most {MOST_WORDS}.")
    return kind, count


def deal(data: bytes | memoryview, parties: int) -> list[bytes]:
    """Make what was asked for and split it.

    Args:
        data: the request.
        parties: how many shares.

    Returns:
        Each party's share, in roster order.

    Raises:
        SessionRefused: for a request that can't be read or is too large.

    Guarantee: any n − 1 of the shares are independent of what is shared.
    """
    kind, count = _parse(data)
    if kind == Deal.BIT:
        bit = _random(count) & np.uint64(1)
        values, exclusive = [bit, bit], [False, True]
    else:
        a, b = _random(count), _random(count)
        conjunction = kind == Deal.CONJUNCTION
        values, exclusive = [a, b, a & b if conjunction else a * b], [conjunction] * 3
    shares = [_split(value, parties, by_bits) for value, by_bits in zip(values, exclusive, strict=True)]
    return [b"".join(share[place].tobytes() for share in shares) for place in range(parties)]


def read_dealt(what: Deal, count: int, data: bytes | memoryview) -> list[NDArray[np.int64]]:
    """A party's share of what was dealt.

    Args:
        what: kind that was asked for.
        count: words of each.
        data: what came.

    Returns:
        [count] words each: a, b and c, or the bit's two shares.

    Raises:
        SessionRefused: if it is not as long as it must be.
    """
    parts = 2 if what == Deal.BIT else 3
    if len(data) != 8 * parts * count:
        raise SessionRefused(f"The dealer sent {len(data)} bytes: {8 * parts * count}.")
    return list(np.frombuffer(data, dtype="<i8").reshape(parts, count).astype(np.int64))


def _random(count: int) -> NDArray[np.uint64]:
    stream = Cipher(ChaCha20(secrets.token_bytes(32), _NONCE), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").copy()


def _split(value: NDArray[np.uint64], parties: int, by_bits: bool) -> Sequence[NDArray[np.uint64]]:
    shares = [_random(value.size) for _ in range(parties - 1)]
    last = value.copy()
    for share in shares:
        last = last ^ share if by_bits else last - share
    return [*shares, last]

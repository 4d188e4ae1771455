"""The paper's secure sum among neighbours, as written: each splits its secret into shares that add up to it (eq. 9),
each adds the shares it was given, and the sum of these sums is the sum of the secrets (eq. 10).

This is the protocol for single people as parties, kept as a reference that the engines are held against. It is weaker
than they are, and `WEAKNESSES` says how; nothing in a federation uses it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError

__all__ = ["WEAKNESSES", "add_shares", "open_sum", "split_additively"]

WEAKNESSES: tuple[str, ...] = (
    "a lone neighbour's sum is its secret",
    "a sum of 0 or of all neighbours tells each neighbour's yes or no",
    "whoever goes away takes its shares along: no sum without everybody",
    "all neighbours but one together know the last one's secret from the sum",
    "a share that was altered is not noticed",
)
"""What the plain protocol does not protect against, for reports."""


def split_additively(secret: NDArray[np.int64], parties: int) -> NDArray[np.int64]:
    """Split a secret into shares (eq. 9).

    Args:
        secret: [words] of Z_2^64.
        parties: how many shares, at least 2.

    Returns:
        [parties, words] shares whose sum mod 2^64 is the secret.

    Raises:
        InputError: for fewer than two parties.

    Guarantee: any `parties − 1` of the shares are uniform, whatever the secret.
    """
    if parties < 2:
        raise InputError(f"A secret split among {parties} is no secret: at least 2.")
    words = np.ascontiguousarray(secret, dtype=np.int64).reshape(-1).view(np.uint64)
    shares = np.empty((parties, words.size), dtype=np.uint64)
    shares[1:] = np.frombuffer(secrets.token_bytes(8 * words.size * (parties - 1)), dtype="<u8").reshape(-1, words.size)
    shares[0] = words - shares[1:].sum(axis=0, dtype=np.uint64)
    return shares.view(np.int64)


def add_shares(received: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """What one party makes of the shares it was given, its own among them (eq. 10, inner sum).

    Args:
        received: one share [words] from each party.

    Returns:
        [words] their sum mod 2^64: a share of the total.
    """
    total = np.zeros(received[0].shape, dtype=np.uint64)
    for share in received:
        total += share.view(np.uint64)
    return total.view(np.int64)


def open_sum(sums: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The total, from every party's sum of shares (eq. 10, outer sum).

    Args:
        sums: what `add_shares` gave at each party.

    Returns:
        [words] the sum of all secrets mod 2^64.
    """
    return add_shares(sums)

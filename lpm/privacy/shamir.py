"""Shamir's sharing of a secret among n, of whom any t rebuild it and any t − 1 know nothing (Shamir 1979).

The `masked` engine shares each party's self mask of a round this way, so that the sum of a round can still be opened
when parties are lost (after Bonawitz et al. 2017). Plain sharing can't tell a wrong share among exactly t: who rebuilds
a secret holds shares and result against their commitments (`recovery`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from lpm.errors import InputError, SessionRefused

__all__ = ["PRIME", "Share", "combine", "evaluate", "split", "weights_at_zero"]

PRIME = 2**521 - 1
"""The field's order: a Mersenne prime that holds 64 bytes with room to spare."""


@dataclass(frozen=True, repr=False)
class Share:
    """A point of the polynomial; it can't be printed.

    Args:
        x: the holder's place, not 0.
        y: the polynomial there.
    """

    x: int
    y: int


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
    """A polynomial at a point, by Horner's rule.

    Args:
        coefficients: from the constant term up.
        x: the point.
        prime: the field's order.

    Returns:
        Its value, from 0 and below `prime`.
    """
    y = 0
    for coefficient in reversed(coefficients):
        y = (y * x + coefficient) % prime
    return y


def split(secret: int, threshold: int, points: Sequence[int], prime: int = PRIME) -> list[Share]:
    """Share a secret.

    Args:
        secret: from 0 and below `prime`.
        threshold: how many shares rebuild it.
        points: each holder's x, distinct and none of them 0 in the field.
        prime: the field's order.

    Returns:
        One share for each point.

    Raises:
        InputError: for a secret outside the field, points that can't be used, or too few of them.

    Guarantee: any `threshold − 1` shares are uniform, whatever the secret.
    """
    if not 0 <= secret < prime:
        raise InputError("A secret to be shared lies outside the field.")
    if not 1 <= threshold <= len(points):
        raise InputError(f"A secret shared among {len(points)} can't need {threshold} of them.")
    if len({x % prime for x in points}) < len(points) or any(not 0 < x < prime for x in points):
        raise InputError("The points of a shared secret are distinct and from 1 to the field's order less 1.")
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return [Share(x, evaluate(coefficients, x, prime)) for x in points]


def weights_at_zero(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Lagrange's weights: Σ weight·y is the polynomial at 0.

    Args:
        points: distinct, none of them 0 in the field.
        prime: the field's order.

    Returns:
        One weight for each point.
    """
    return _weights(points, 0, prime)


def _weights(points: Sequence[int], at: int, prime: int) -> list[int]:
    weights = []
    for i, own in enumerate(points):
        above = below = 1
        for j, other in enumerate(points):
            if i != j:
                above = above * (at - other) % prime
                below = below * (own - other) % prime
        weights.append(above * pow(below, -1, prime) % prime)
    return weights


def combine(shares: Sequence[Share], threshold: int, prime: int = PRIME) -> int:
    """Rebuild a secret, and see whether shares beyond the threshold agree.

    Args:
        shares: at least `threshold`.
        threshold: how many rebuild it.
        prime: the field's order.

    Returns:
        The secret.

    Raises:
        SessionRefused: for too few shares, a point twice or at 0, a number outside the field, or more than `threshold`
            shares that lie on no common polynomial.
    """
    if len(shares) < max(1, threshold):
        raise SessionRefused(f"A shared secret has {len(shares)} shares: at least {max(1, threshold)}.")
    points = [share.x for share in shares]
    if any(not 0 < x < prime for x in points) or len(set(points)) < len(points):
        raise SessionRefused("A shared secret has a share at no place of its own.")
    if any(not 0 <= share.y < prime for share in shares):
        raise SessionRefused("A shared secret has a share outside the field.")
    first, rest = shares[:threshold], shares[threshold:]
    known = points[:threshold]
    for share in rest:
        weights = _weights(known, share.x, prime)
        if sum(w * each.y for w, each in zip(weights, first, strict=True)) % prime != share.y:
            raise SessionRefused("The shares of a secret contradict each other: one was altered.")
    weights = weights_at_zero(known, prime)
    return sum(w * each.y for w, each in zip(weights, first, strict=True)) % prime

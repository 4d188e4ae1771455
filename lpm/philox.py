"""Philox4x32-10 (Salmon et al. 2011), compiled: four 32-bit words for each 128-bit counter and 64-bit key."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["fill", "philox"]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@nb.njit(nogil=True, cache=True, inline="always")
def philox(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Ten rounds; all arguments and results are below 2^32, lowest words first."""
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0 = (p1 >> _SHIFT) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> _SHIFT) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@nb.njit(nogil=True, cache=True)
def fill(
    agents: NDArray[np.uint64], c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64, out: NDArray[np.uint64]
) -> None:
    """Words for many agents, whose 64-bit ids are the lower half of the counter.

    Args:
        agents: ids [agents].
        c2: third word of the counter.
        c3: fourth word of the counter.
        k0: lower word of the key.
        k1: upper word of the key.
        out: receives the first words [1 to 4, agents].
    """
    for i in range(agents.size):
        words = philox(agents[i] & _MASK, agents[i] >> _SHIFT, c2, c3, k0, k1)
        for w in range(out.shape[0]):
            out[w, i] = words[w]

"""Philox4x32-10 (Salmon et al. 2011), compiled: four 32-bit words for each 128-bit counter and 64-bit key.

Four neighbouring agents share one block, so a population whose ids are consecutive pays a quarter of a block each, and
blocks are independent of one another, so the compiler vectorises them.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["draw", "fill", "philox", "word"]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_TWO, _THREE = np.uint64(2), np.uint64(3)
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
def word(agent: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64) -> np.uint64:
    """The word of one agent, below 2^32: its id, without the two lowest bits, is the lower half of the counter.

    Args:
        agent: 64-bit id; the two lowest bits say which of the block's four words it is.
        c2: third word of the counter.
        c3: fourth word of the counter.
        k0: lower word of the key.
        k1: upper word of the key.
    """
    block = agent >> _TWO
    w0, w1, w2, w3 = philox(block & _MASK, block >> _SHIFT, c2, c3, k0, k1)
    place = agent & _THREE
    chosen: np.uint64 = w0 if place == np.uint64(0) else w1 if place == np.uint64(1) else w2 if place == _TWO else w3
    return chosen


@nb.njit(nogil=True, cache=True)
def draw(
    first: np.uint64,
    listed: NDArray[np.uint64],
    start: int,
    count: int,
    c2: np.uint64,
    c3: np.uint64,
    k0: np.uint64,
    k1: np.uint64,
    out: NDArray[np.uint32],
) -> int:
    """Words of some of a shard's agents, one after another; returns where in `out` the first of them stands.

    Args:
        first: the first id of the shard, where ids are consecutive.
        listed: every id, where they are not; else empty [agents].
        start: position of the first agent drawn for.
        count: how many agents.
        c2: third word of the counter.
        c3: fourth word of the counter.
        k0: lower word of the key.
        k1: upper word of the key.
        out: receives the words [count + 8].
    """
    if listed.size == 0:
        agent = first + np.uint64(start)
        offset = int(np.int64(agent & np.uint64(3)))
        block = agent >> _TWO
        for b in range((offset + count + 3) // 4):
            at = block + np.uint64(b)
            w0, w1, w2, w3 = philox(at & _MASK, at >> _SHIFT, c2, c3, k0, k1)
            out[4 * b] = np.uint32(w0)
            out[4 * b + 1] = np.uint32(w1)
            out[4 * b + 2] = np.uint32(w2)
            out[4 * b + 3] = np.uint32(w3)
        return offset
    known = False
    last = np.uint64(0)
    w0 = w1 = w2 = w3 = np.uint64(0)
    for j in range(count):
        agent = listed[start + j]
        block = agent >> _TWO
        if not known or block != last:
            w0, w1, w2, w3 = philox(block & _MASK, block >> _SHIFT, c2, c3, k0, k1)
            known = True
            last = block
        place = np.int64(agent & np.uint64(3))
        out[j] = np.uint32(w0 if place == 0 else w1 if place == 1 else w2 if place == 2 else w3)
    return 0


@nb.njit(nogil=True, cache=True)
def fill(
    agents: NDArray[np.uint64], c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64, out: NDArray[np.uint64]
) -> None:
    """Words for agents in any order; neighbours with consecutive ids share the work of a block.

    Args:
        agents: 64-bit ids [agents].
        c2: third word of the counter.
        c3: fourth word of the counter, of the first variate; the next variates follow.
        k0: lower word of the key.
        k1: upper word of the key.
        out: receives the words [variates, agents].
    """
    for v in range(out.shape[0]):
        known = False
        last = np.uint64(0)
        words = (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        for i in range(agents.size):
            block = agents[i] >> _TWO
            if not known or block != last:
                words = philox(block & _MASK, block >> _SHIFT, c2, c3 + np.uint64(v), k0, k1)
                known, last = True, block
            out[v, i] = words[np.int64(agents[i] & _THREE)]

"""Random numbers by address: who and when, never a global generator.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a 128-bit counter and a 64-bit
key to four 32-bit words. The counter is the address, so two different addresses never share a draw:

    key      seed of the agent's shard (64 bits)
    counter  agent id (64 bits) · step + 1 (32 bits) · protocol number and block of variates (16 bits each)

Hence the same bits for any order of agents, any split into shards, any number of threads; and a step is replayed from
its checkpoint without storing noise.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["derive", "philox", "uniform_words"]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Four 32-bit words for each 128-bit counter.

    Args:
        counter: [4, n] words below 2^32, lowest first.
        key: two words below 2^32, lowest first.

    Returns:
        [4, n] words below 2^32.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniform_words(
    seed: int, step: int, protocol: int, agents: NDArray[np.uint64], block: int = 0
) -> NDArray[np.uint64]:
    """Four uniform 32-bit words for each agent at one address.

    Args:
        seed: 64 bits; the shard's.
        step: −1 for the start, then 0, 1, …
        protocol: number of the protocol in its model, below 2^16.
        agents: 64-bit agent ids [agents].
        block: which four variates of that protocol call, below 2^16.

    Returns:
        [4, agents] words below 2^32.
    """
    agents = np.asarray(agents, dtype=np.uint64)
    counter = np.empty((4, agents.size), dtype=np.uint64)
    counter[0] = agents & _MASK
    counter[1] = agents >> _SHIFT
    counter[2] = step + 1
    counter[3] = protocol << 16 | block
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def derive(seed: int, *path: int | str) -> int:
    """A 64-bit seed for a branch of what a seed governs, such as one trajectory of a calibration.

    Args:
        seed: the root.
        path: labels; different paths give unrelated seeds.
    """
    text = "/".join(["lpm/seed/v1", str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

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

__all__ = ["derive", "uniform_words"]


def uniform_words(
    seed: int, step: int, protocol: int, agents: NDArray[np.uint64], block: int = 0, words: int = 4
) -> NDArray[np.uint64]:
    """Up to four uniform 32-bit words for each agent at one address.

    Args:
        seed: 64 bits; the shard's.
        step: −1 for the start, then 0, 1, …
        protocol: number of the protocol in its model, below 2^16.
        agents: 64-bit agent ids [agents].
        block: which four variates of that protocol call, below 2^16.
        words: how many of them.

    Returns:
        [words, agents] words below 2^32.
    """
    from lpm.philox import fill  # numba: not for a process that only derives seeds

    out = np.empty((words, len(agents)), dtype=np.uint64)
    fill(
        np.asarray(agents, dtype=np.uint64),
        np.uint64(step + 1),
        np.uint64(protocol << 16 | block),
        np.uint64(seed & 0xFFFFFFFF),
        np.uint64(seed >> 32 & 0xFFFFFFFF),
        out,
    )
    return out


def derive(seed: int, *path: int | str) -> int:
    """A 64-bit seed for a branch of what a seed governs, such as one trajectory of a calibration.

    Args:
        seed: the root.
        path: labels; different paths give unrelated seeds.
    """
    text = "/".join(["lpm/seed/v1", str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

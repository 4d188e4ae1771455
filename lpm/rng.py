"""Random numbers by address: who and when, never a global generator.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a 128-bit counter and a 64-bit
key to four 32-bit words. The counter is the address, so two different addresses never share a draw:

    key      seed of the agent's shard (64 bits)
    counter  agent id / 4 (64 bits) · step + 1 (32 bits) · protocol number and variate (16 bits each)
    word     agent id modulo 4

Hence the same bits for any order of agents, any split into shards, any number of threads; and a step is replayed from
its checkpoint without storing noise. Four neighbours share a block, since the ten rounds for one word would cost more
than the rest of a simulated day.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpm.errors import InputError

__all__ = ["Address", "Ids", "derive", "require_seed", "require_seeds", "uniform_words", "whole"]


@dataclass(frozen=True, eq=False)
class Ids:
    """64-bit ids of a shard's agents: one number where they follow one another, else all of them.

    Attributes:
        first: the first id, where they are consecutive.
        count: how many agents.
        listed: every id, where they are not consecutive; else empty [agents].
    """

    first: int
    count: int
    listed: NDArray[np.uint64]

    @staticmethod
    def consecutive(count: int, first: int = 0) -> Ids:
        """Ids `first`, `first` + 1, …"""
        return Ids(first, count, np.empty(0, dtype=np.uint64))

    @staticmethod
    def of(values: ArrayLike) -> Ids:
        """Ids as given.

        Raises:
            InputError: if one appears twice.
        """
        ids = np.asarray(values).astype(np.uint64)
        one = np.uint64(1)
        if ids.ndim == 1 and ids.size and bool(np.all(ids[1:] - ids[:-1] == one)) and ids[-1] >= ids[0]:
            return Ids.consecutive(int(ids.size), int(ids[0]))
        ascending = ids.ndim == 1 and bool(np.all(ids[1:] > ids[:-1]))
        if not ascending and (ids.ndim != 1 or np.unique(ids).size != ids.size):
            raise InputError("population.ids are different numbers, one per agent.")
        return Ids(0, int(ids.size), ids)

    def array(self) -> NDArray[np.uint64]:
        """All ids, written out [agents]."""
        if self.listed.size:
            return self.listed
        return np.arange(self.count, dtype=np.uint64) + np.uint64(self.first)


@dataclass(frozen=True, eq=False)
class Address:
    """Where the random words of one protocol's call stand: an executor draws them when it needs them.

    Attributes:
        seed: 64 bits; the shard's.
        step: −1 for the start, then 0, 1, …
        protocol: number of the protocol in its model, below 2^16.
        agents: whose words.
        seeds: of each lane, where lanes have random words of their own; else none: `seed` serves all.
    """

    seed: int
    step: int
    protocol: int
    agents: Ids
    seeds: tuple[int, ...] = ()

    def words(self, variate: int = 0, variates: int = 1) -> NDArray[np.uint64]:
        """Uniform words of all agents, below 2^32 [variates, agents]."""
        return uniform_words(self.seed, self.step, self.protocol, self.agents.array(), variate, variates)

    def by_lane(self) -> NDArray[np.uint64]:
        """First words of all agents [agents, lanes], or [agents, 1] where they serve all lanes."""
        words = {
            seed: uniform_words(seed, self.step, self.protocol, self.agents.array())[0]
            for seed in set(self.seeds or (self.seed,))
        }
        return np.stack([words[seed] for seed in self.seeds or (self.seed,)], axis=1)

    def keys(self, lanes: int) -> NDArray[np.uint64]:
        """The two words of each lane's key, as `lpm.philox` takes them [lanes, 2]."""
        seeds = np.array(self.seeds or (self.seed,) * lanes, dtype=np.uint64)
        return np.stack((seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)), axis=1)

    def counter(self, variate: int = 0) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
        """The last two words of the counter and the two of the key, as `lpm.philox` takes them."""
        return (
            np.uint64(self.step + 1),
            np.uint64(self.protocol << 16 | variate),
            np.uint64(self.seed & 0xFFFFFFFF),
            np.uint64(self.seed >> 32 & 0xFFFFFFFF),
        )


def uniform_words(
    seed: int, step: int, protocol: int, agents: NDArray[np.uint64], variate: int = 0, variates: int = 1
) -> NDArray[np.uint64]:
    """Uniform 32-bit words for each agent, one for each variate of an address.

    Args:
        seed: 64 bits; the shard's.
        step: −1 for the start, then 0, 1, …
        protocol: number of the protocol in its model, below 2^16.
        agents: 64-bit agent ids [agents].
        variate: the first of the random numbers inside that protocol call, below 2^16.
        variates: how many of them.

    Returns:
        [variates, agents] words below 2^32.
    """
    from lpm.philox import fill  # numba: not for a process that only derives seeds

    out = np.empty((variates, len(agents)), dtype=np.uint64)
    where = Address(seed, step, protocol, Ids.consecutive(0))
    fill(np.asarray(agents, dtype=np.uint64), *where.counter(variate), out)
    return out


def whole(value: Any) -> int | None:
    """A whole number of any type, numpy's among them, as an int; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def require_seed(value: Any) -> int:
    """A seed as an int.

    Raises:
        InputError: unless it is a whole number of 64 bits.
    """
    seed = whole(value)
    if seed is None or not 0 <= seed < 2**64:
        raise InputError(f"seed is {value!r}: a whole number from 0 to 2^64 - 1.")
    return seed


def require_seeds(value: Any) -> tuple[int, ...]:
    """One seed, or those of a sequence; see `require_seed`."""
    several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    return tuple(map(require_seed, value)) if several else (require_seed(value),)


def derive(seed: int, *path: int | str) -> int:
    """A 64-bit seed for a branch of what a seed governs, such as one trajectory of a calibration.

    Args:
        seed: the root.
        path: labels; different paths give unrelated seeds.
    """
    text = "/".join(["lpm/seed/v1", str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

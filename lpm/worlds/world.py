"""The contract of ⊕, the only door between shards: words in, the sum of everybody's words out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from typing import Protocol as Contract

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.errors import InputError

__all__ = ["Disclosure", "Exponents", "Spread", "World"]

Number = TypeVar("Number", np.int64, np.float64)

Spread = Callable[[str], tuple[str, int]]
"""Name of an array in a checkpoint → how it is spread over shards, and the axis of agents: "agents" (one entry each),
"sum" (parts that add up), "same" (replicated), or "own" (of the shard alone)."""


class World(Contract):
    """A place that adds up.

    Attributes:
        name: for reports.
        parties: how many shards contribute.
        one_owner: whether all shards belong to one owner, who adds up himself and so gets the same sums at every shard.
        disclosure: what group sums may be opened, or None where all shards have one owner.
    """

    name: str
    parties: int
    one_owner: bool
    disclosure: Disclosure | None

    def begin(self, trajectory: int, parameters: bytes) -> None:
        """A new trajectory with these parameters (their hash); rounds are addressed by it."""
        ...

    def add(
        self, tensor: str, step: int, words: NDArray[np.int64], *, digest: bytes, rescale: bool
    ) -> NDArray[np.int64]:
        """Σ over all shards of `words`, modulo 2^64, opened to every shard.

        Args:
            tensor: what is added; with the step it addresses the round.
            step: −1 at the start, then 0, 1, …
            words: [any number], the same number at every shard.
            digest: of the environment; if the shards' digests differ nothing is opened.
            rescale: this shard can't express its contribution at the present exponents.

        Raises:
            RoundRefused: at every shard, if any asks for another scale or the digests differ. Nothing was opened;
                the call may be repeated (`rescale`) with new words.
            PeerLost: if a shard is gone.
        """
        ...

    def whole(self, values: NDArray[Number]) -> NDArray[Number]:
        """Results of the whole population where all shards have one owner; this shard's own where they don't.

        Args:
            values: of this shard, additive over shards [any shape].
        """
        ...

    def gathered(self, state: Mapping[str, Any], spread: Spread) -> Mapping[str, Any] | None:
        """What to keep of a checkpoint here: of all shards of one owner, or of this one; None if another keeps it.

        Args:
            state: of this shard.
            spread: how each array is spread.
        """
        ...

    def parted(self, found: Mapping[str, Any] | None, spread: Spread) -> Mapping[str, Any] | None:
        """A shard's part of a checkpoint that `gathered` made, also in a world of another number of shards.

        Args:
            found: what was kept here; None where nothing is.
            spread: how each array is spread.

        Raises:
            InputError: if it holds arrays that can't be spread anew.
        """
        ...


@dataclass(frozen=True)
class Disclosure:
    """Which groups may be summed between institutions.

    Attributes:
        people: fewest people in a group.
        institutions: fewest institutions that hold some of them.
    """

    people: int = 10
    institutions: int = 3

    def require(self, network: str, people: NDArray[np.int64], institutions: NDArray[np.int64]) -> None:
        """Refuse groups that are too small; empty ones tell nothing and are let be.

        Raises:
            InputError: naming the first such group.
        """
        small = (people > 0) & ((people < self.people) | (institutions < self.institutions))
        if small.any():
            group = int(np.flatnonzero(small)[0])
            raise InputError(
                f"Group {group} of {network} is too small to be opened ({int(small.sum())} such groups): "
                f"at least {self.people} people and {self.institutions} institutions are needed.",
                "Merge small groups in the scenario, use more agents, or (tests only) --unsafe-no-disclosure-control.",
            )


@dataclass
class Exponents:
    """Public exponents of tangents and cotangents, one per tensor and parameter.

    Everybody derives the same exponents, because they follow from opened sums alone: after an opening, as many fraction
    bits as leave 10 bits of headroom over the largest sum. The rounding error is then below 1e-9 of it.

    Attributes:
        parties: shards whose words are added.
        bits: fraction bits by (tensor, parameter).
    """

    FIRST = 40
    LIMIT = 62
    HEADROOM = 10

    parties: int
    bits: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """The fraction bits of a tensor."""
        return self.bits.setdefault(name, self.FIRST)

    def fits(self, name: str, values: NDArray[np.float64]) -> bool:
        """Whether this shard's part can be expressed without risk of overflow in the sum."""
        largest = float(np.max(np.abs(values), initial=0.0))
        return math.isfinite(largest) and largest * 2.0 ** self.of(name) * self.parties < 2.0**self.LIMIT

    def encode(self, name: str, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Words of one tensor; zeros if they don't fit (the round will be refused)."""
        if not self.fits(name, values):
            return np.zeros(values.shape, dtype=np.int64)
        return ring.encode(values, self.of(name))

    def decode(self, name: str, words: NDArray[np.int64]) -> NDArray[np.float64]:
        """Numbers of an opened sum, whose exponent is then adapted for the next."""
        bits = self.of(name)
        values = ring.decode(words, bits)
        largest = float(np.max(np.abs(values), initial=0.0))
        if largest > 0:
            self.bits[name] = min(self.LIMIT - self.HEADROOM - math.ceil(math.log2(largest)), 200)
        return values

    def lower(self, names: Sequence[str]) -> None:
        """After a refused round: 16 bits more headroom for each."""
        for name in names:
            self.bits[name] = self.of(name) - 16
            if self.bits[name] < -400:
                raise InputError(f"The derivative {name} is not finite.", "Use another estimator: --gradient fd.")

    def export(self) -> Mapping[str, int]:
        """For a checkpoint."""
        return dict(self.bits)

"""People: a struct of arrays, one entry per agent, that one shard holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpm.errors import InputError
from lpm.networks import Groups
from lpm.rng import Ids

__all__ = ["Population"]


@dataclass(frozen=True, eq=False)
class Population:
    """The agents of one shard.

    Args:
        agents: how many.
        ids: 64-bit ids, unique over all shards [agents]; 0, 1, 2, … by default. Random numbers are addressed by them.
        attributes: name → one number per agent [agents].
        weight: how many people one agent stands for.

    Raises:
        InputError: for a negative count, an attribute of another length, or an id twice.
    """

    agents: int
    ids: ArrayLike | None = None
    attributes: Mapping[str, ArrayLike] = field(default_factory=dict)
    weight: float = 1.0
    numbering: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.agents, int | np.integer) or self.agents < 0:
            raise InputError(f"population.agents is {self.agents}: a whole number from 0.")
        if self.ids is not None and np.shape(self.ids) != (self.agents,):
            raise InputError(f"population.ids: {self.agents} different numbers, one per agent.")
        numbering = Ids.consecutive(int(self.agents)) if self.ids is None else Ids.of(self.ids)
        if not self.weight > 0:
            raise InputError(f"population.weight is {self.weight}: a number above 0.")
        arrays = {name: np.asarray(values) for name, values in self.attributes.items()}
        for name, values in arrays.items():
            if values.shape != (self.agents,):
                raise InputError(
                    f"The attribute {name} has shape {values.shape}: one number for each of {self.agents}."
                )
        object.__setattr__(self, "agents", int(self.agents))
        # The ids live once, in the numbering, which is a single number where they are consecutive.
        object.__setattr__(self, "ids", None)
        object.__setattr__(self, "numbering", numbering)
        object.__setattr__(self, "attributes", arrays)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """The agents' ids, written out [agents]."""
        return self.numbering.array()

    def shard(self, positions: NDArray[np.int64]) -> Population:
        """Some of these people, with their ids and attributes.

        Args:
            positions: which, ascending.
        """
        attributes = {name: np.asarray(values)[positions] for name, values in self.attributes.items()}
        return Population(positions.size, self.addresses[positions], attributes, self.weight)

    @property
    def households(self) -> Groups:
        """The attribute `household` as a local network."""
        if "household" not in self.attributes:
            raise InputError("This population has no attribute household.", "Give it, or build lpm.Groups yourself.")
        return Groups("household", of=self.attributes["household"])

"""The declarative spec of a contagion, and the contract that every executor of it obeys.

Stages, transitions, infectivity and networks as plain arrays. A step is: sum infectivity by cell (integers), turn the
sums into hazards (a few float64 operations per *cell*, shared by all executors), decide for each agent (an integer
threshold against an addressed random word), count the transitions by class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol as Contract

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm import ring
from lpm.networks import Groups, Network
from lpm.relax import attach, thresholds
from lpm.rng import Address

__all__ = ["Executor", "Slopes", "Spec", "Summed", "Tables", "decode", "exit_limits", "hazards"]


@dataclass(frozen=True)
class Spec:
    """A contagion as arrays.

    Attributes:
        stages: names of all sub-stages, in order [S].
        agents: how many.
        class_of: class of each agent, for tables and records [agents]; empty where there is only one class.
        class_count: number of classes, C.
        edges: (from, to) of every transition, by sub-stage [E].
        infection: sub-stage → (edge, relative susceptibility), for the stages that can be infected.
        exits: sub-stage → its progression edges, in the order in which outcomes are decided.
        susceptibility: by class [C].
        networks: what it spreads over, in order; hazards are added in this order.
        infectivity: of each sub-stage in each network [networks, S].
    """

    stages: tuple[str, ...]
    agents: int
    class_of: NDArray[np.int16]
    class_count: int
    edges: tuple[tuple[int, int], ...]
    infection: Mapping[int, tuple[int, float]]
    exits: Mapping[int, tuple[int, ...]]
    susceptibility: NDArray[np.float64]
    networks: tuple[Network, ...]
    infectivity: NDArray[np.float64]

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """Class of each agent, written out [agents]."""
        return self.class_of.astype(np.int64) if self.class_of.size else np.zeros(self.agents, dtype=np.int64)

    @cached_property
    def infections(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """`infection` as tables: the edge by which each sub-stage is infected, −1 if by none, and how easily [S]."""
        edge, relative = np.full(len(self.stages), -1, dtype=np.int64), np.zeros(len(self.stages))
        for stage, found in self.infection.items():
            edge[stage], relative[stage] = found
        return edge, relative

    @cached_property
    def exit_edges(self) -> NDArray[np.int64]:
        """`exits` as a table: the progression edges of each sub-stage in order, then −1 [S, most of one stage]."""
        most = max([len(edges) for edges in self.exits.values()], default=1)
        table = np.full((len(self.stages), most), -1, dtype=np.int64)
        for stage, edges in self.exits.items():
            table[stage, : len(edges)] = edges
        return table

    @property
    def infectivity_words(self) -> NDArray[np.int64]:
        """Infectivity as fixed-point words [networks, S]."""
        return ring.encode(self.infectivity)


@dataclass(frozen=True)
class Tables:
    """What a step needs besides the state.

    Attributes:
        cumulative: sub-stage → cumulative probabilities of its exits, each [C, lanes].
        factors: hazard per unit of infectious pressure, by network [lanes].
        sizes: people in each cell, all shards together; None where sums aren't divided [cells].
        uniform: where the agents' random words stand, one 32-bit word each.
        relative: infectivity of each agent relative to its stage, where another protocol sets it [agents, lanes].
    """

    cumulative: Mapping[int, tuple[Tensor, ...]]
    factors: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor | None]
    uniform: Address
    relative: Tensor | None = None


@dataclass(frozen=True)
class Slopes:
    """Derivatives of what a contagion is told in a step; the last axis of each is that of parameters.

    Attributes:
        cumulative: as `Tables.cumulative`, each [C or 1, lanes, P].
        factors: as `Tables.factors`, each [lanes, P].
        sums: opened tangents of the sums of shared networks, for alternates the reference last
            [cells, lanes, P or P + 1].
    """

    cumulative: Mapping[int, tuple[NDArray[np.float64], ...]]
    factors: Mapping[str, NDArray[np.float64]]
    sums: Mapping[str, NDArray[np.float64]]


def exit_limits(spec: Spec, tables: Tables, lanes: int) -> NDArray[np.int64]:
    """Thresholds of a step's exits, in the places of `Spec.exit_edges` [S, most of one stage, C, lanes]."""
    limits = np.zeros((*spec.exit_edges.shape, spec.class_count, lanes), dtype=np.int64)
    for stage, edges in spec.exits.items():
        for place, cumulative in zip(range(len(edges)), tables.cumulative[stage], strict=True):
            limits[stage, place] = thresholds(cumulative.expand(spec.class_count, lanes)).numpy()
    return limits


@dataclass(frozen=True)
class Summed:
    """A shard's contribution to a network: exact words and, where derivatives flow, the same sums as floats.

    Attributes:
        words: Σ round(m · 2^32) [cells, lanes] int64.
        soft: Σ m, differentiable, or None [cells, lanes].
    """

    words: Tensor
    soft: Tensor | None = None

    def value(self) -> Tensor:
        """The exact sum as float64, with the derivative of the soft one."""
        hard = decode(self.words)
        return hard if self.soft is None else attach(hard, self.soft)


def decode(words: Tensor) -> Tensor:
    """Words of 32 fraction bits as float64; torch twin of `ring.decode`."""
    return words.to(torch.float64) * 2.0**-ring.FRACTION_BITS


def hazards(network: Network, total: Tensor, size: Tensor | None, factor: Tensor) -> Tensor:
    """Hazard that a member of each cell feels [cells, lanes].

    Args:
        network: groups or edges.
        total: infectivity sums [cells, lanes].
        size: people per cell, or None for undivided sums [cells].
        factor: [lanes] or scalar.
    """
    pressure = total if size is None else total / torch.clamp(size, min=1.0)[:, None]
    if isinstance(network, Groups) and network.outsiders:
        pressure = torch.cat([torch.zeros_like(pressure[:1]), pressure[1:]])
    terms = network.mixing_terms if isinstance(network, Groups) else None
    if terms is not None:
        mixed = torch.zeros_like(pressure)
        for source, weight in terms:
            mixed = mixed + weight * pressure[source]
        pressure = mixed
    return factor * pressure


class Executor(Contract):
    """The contract: the same integers to the bit, whoever executes."""

    name: str

    def least_memory(self, spec: Spec) -> int:
        """Bytes of each agent and lane that a run takes at least, the people themselves apart."""
        ...

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        """The first state: everybody in sub-stage 0 except those drawn (`cumulative`) or named (`fixed`)."""
        ...

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        """The shard's infectivity sums over one network; they are overwritten by the next `advance`."""
        ...

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One step, given the opened sums of the shared networks.

        Returns:
            The new state, the transitions [E, C, lanes] and the people in each stage [S, C, lanes].
        """
        ...

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        """One-hot stages [agents, lanes, S]."""
        ...

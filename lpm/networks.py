"""Where people meet: groups (household, workplace, city cell) and edges. Sums over them are all that agents exchange.

A *local* network stays inside one shard (households, small workplaces, a contact graph). A *shared* one crosses
shards: its sums pass through ⊕, and nothing else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from typing import Protocol as Contract

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpm import ring
from lpm.errors import InputError
from lpm.relax import attach

__all__ = ["Adder", "Edges", "Groups", "Network", "adding_through", "as_words"]


_PIECE = 1 << 22
"""Agents counted at a time: numpy makes 64-bit copies of what it counts."""


def _compact(of: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int32], int]:
    """Labels as cells 0, 1, … in their order, those below 0 together as the first; and how many there are."""
    top = int(of.max()) if of.size else -1
    nobody = int(of.min(initial=0)) < 0  # never where labels are unsigned, which can't be compared with −1
    if top > 4 * of.size + 1024:
        labels, cell = np.unique(np.maximum(of, -1) if nobody else of, return_inverse=True)
        return cell.astype(np.int32), len(labels)
    seen = np.zeros(max(top, 0) + 2, dtype=np.bool_)  # the last entry stands for label -1
    seen[np.maximum(of, -1) if nobody else of] = True
    if not nobody and bool(seen[:-1].all()):
        return of.astype(np.int32, copy=False), top + 1
    place = np.cumsum(seen[:-1], dtype=np.int32) - np.int32(0 if nobody else 1)
    cells = place[np.maximum(of, 0)] if nobody else place[of]
    if nobody:
        cells[of < 0] = 0
    return cells, int(seen.sum())


class Network:
    """What messages are summed over. `of_agents`: how many agents it was made for."""

    name: str
    shared: bool
    mixing: ArrayLike | None
    normalise: str

    @property
    def agents(self) -> int:
        """How many agents the network was made for."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    @property
    def cells(self) -> int:
        """How many sums it has."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    @property
    def cell_of(self) -> NDArray[np.int32]:
        """The cell whose sum each agent reads [agents]."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    @property
    def members(self) -> NDArray[np.int64]:
        """How many agents of this shard are in each cell [cells]."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    def sum(self, messages: Tensor) -> Tensor:
        """Add up messages [agents, …] by cell → [cells, …]; integers stay integers."""
        adder = _ADDER.get()
        return self.add(messages) if adder is None else adder.sum(self, messages)

    def total(self, hard: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        """Add up messages by cell, each rounded to a word first.

        Args:
            hard: what is sent [agents, lanes].
            soft: a number with the derivative of what is sent, which it need not equal [agents, lanes].

        Returns:
            Words [cells, lanes] int64, and the sum of `soft` [cells, lanes].
        """
        adder = _ADDER.get()
        if adder is not None:
            return adder.total(self, hard, soft)
        return self.add(as_words(hard)), self.add(soft)

    def own(self, hard: Tensor, soft: Tensor) -> Tensor:
        """Each agent's own part of a sum, for whoever takes it off again [agents, lanes]; arguments as of `total`."""
        adder = _ADDER.get()
        return attach(hard, soft) if adder is None else adder.own(self, hard, soft)

    def add(self, messages: Tensor) -> Tensor:
        """`sum`, whoever adds up."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    def shard(self, positions: NDArray[np.int64]) -> Network:
        """The network of some agents.

        Args:
            positions: which, ascending.
        """
        raise TypeError(f"{type(self).__name__} is an interface.")


def as_words(messages: Tensor) -> Tensor:
    """Messages as fixed-point words, each rounded half to even; torch twin of `ring.encode`."""
    return torch.round(messages.detach() * 2.0**ring.FRACTION_BITS).to(torch.int64)


class Adder(Contract):
    """Who adds up in place of a network: how `alternates` shows the protocols two populations at once."""

    def sum(self, network: Network, messages: Tensor) -> Tensor:
        """As `Network.sum`."""
        ...

    def total(self, network: Network, hard: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        """As `Network.total`."""
        ...

    def own(self, network: Network, hard: Tensor, soft: Tensor) -> Tensor:
        """As `Network.own`."""
        ...


_ADDER: ContextVar[Adder | None] = ContextVar("adder", default=None)


@contextlib.contextmanager
def adding_through(adder: Adder) -> Iterator[None]:
    """All networks add up through `adder` in here."""
    token = _ADDER.set(adder)
    try:
        yield
    finally:
        _ADDER.reset(token)


@dataclass(frozen=True, eq=False)
class Groups(Network):
    """People in groups who all meet each other.

    Args:
        name: as protocols and results call it.
        of: the group of each agent [agents]; any integers from 0 for a local network (negative: in none), 0 … groups−1
            for a shared one.
        groups: how many groups a shared network has in all shards together; for a local one, ids are below it if given.
        shared: whether groups cross shards; their sums then pass through ⊕.
        mixing: how much a person of group g meets each of group g' [groups, groups]; identity by default.
        normalise: "size" divides a group's sum by its number of people, "none" does not.
        layer: whether the gradient `alternates` follows these groups exactly, with alternatives of their own. That is
            for small groups (up to 250 people) of a local network without mixing; False makes their sums linear.

    Raises:
        InputError: for ids out of range, a missing number of groups, or a mixing matrix of another shape.
    """

    name: str
    of: ArrayLike
    groups: int | None = None
    shared: bool = False
    mixing: ArrayLike | None = None
    normalise: str = "size"
    layer: bool = True
    _cell: NDArray[np.int32] = field(init=False, repr=False)
    _count: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        of = np.asarray(self.of)
        if of.ndim != 1 or not np.issubdtype(of.dtype, np.integer):
            raise InputError(f"The groups of {self.name} are one whole number per agent.")
        if self.normalise not in ("size", "none"):
            raise InputError(f"normalise of {self.name} is {self.normalise!r}: size or none.")
        if self.shared or self.groups is not None:
            if not isinstance(self.groups, int | np.integer) or self.groups < 1:
                kind = "shared" if self.shared else "local"
                raise InputError(f"The {kind} network {self.name} needs its number of groups: a whole number from 1.")
            if of.size and ((self.shared and of.min() < 0) or of.max() >= self.groups):
                raise InputError(f"A group of {self.name} is out of range: ids run from 0 to {self.groups - 1}.")
        if self.shared:
            assert self.groups is not None
            cell, count = of.astype(np.int32, copy=False), int(self.groups)
        else:
            cell, count = _compact(of)
        # The kernels are compiled for memory that may be written to.
        cell = np.require(cell, requirements=["C", "W"])
        object.__setattr__(self, "_cell", cell)
        object.__setattr__(self, "_count", count)
        if self.mixing is not None:
            matrix = np.asarray(self.mixing, dtype=np.float64)
            if matrix.shape != (count, count) or not np.all(matrix >= 0) or not np.all(np.isfinite(matrix)):
                raise InputError(f"The mixing of {self.name} is a {count} × {count} matrix of numbers from 0.")

    @property
    def agents(self) -> int:
        return int(self._cell.size)

    @property
    def cells(self) -> int:
        return self._count

    @property
    def cell_of(self) -> NDArray[np.int32]:
        return self._cell

    @property
    def is_layer(self) -> bool:
        """Whether its groups have alternatives of their own: said by the model, whatever the partition."""
        return self.layer and not self.shared and self.mixing is None

    @cached_property
    def outsiders(self) -> bool:
        """Whether the first cell of a local network holds those who are in no group, and so meet nobody there."""
        return not self.shared and int(np.min(self.of, initial=0)) < 0

    @cached_property
    def members(self) -> NDArray[np.int64]:
        counts = np.zeros(self._count, dtype=np.int64)
        for start in range(0, self._cell.size, _PIECE):
            counts += np.bincount(self._cell[start : start + _PIECE], minlength=self._count)
        return counts

    @cached_property
    def group_size(self) -> float:
        """People in a group of a local network, on average over the population that this one was cut from."""
        inside = int(np.count_nonzero(self._cell)) if self.outsiders else self._cell.size
        return inside / max(1, self._count - self.outsiders)

    @cached_property
    def _index(self) -> Tensor:
        return torch.from_numpy(self._cell)

    def add(self, messages: Tensor) -> Tensor:
        zeros = torch.zeros((self._count, *messages.shape[1:]), dtype=messages.dtype)
        return zeros.index_add(0, self._index, messages)

    def shard(self, positions: NDArray[np.int64]) -> Groups:
        mixing = self.mixing
        if mixing is not None and not self.shared:
            held = np.unique(self._cell[positions])
            mixing = np.asarray(mixing)[np.ix_(held, held)]
        part = replace(self, of=np.asarray(self.of)[positions], mixing=mixing)
        if self.is_layer:
            vars(part)["group_size"] = self.group_size
        return part

    @cached_property
    def mixing_table(self) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """The mixing matrix as terms: source group and factor of each, in the order in which everybody adds them.

        Each [cells, terms]. A matrix product would add in an order that depends on the library and the shape.
        """
        if self.mixing is None:
            return None
        matrix = np.asarray(self.mixing, dtype=np.float64)
        width = int((matrix != 0).sum(axis=1).max(initial=1))
        order = np.argsort(matrix == 0, axis=1, kind="stable")[:, :width]
        return np.ascontiguousarray(order), np.take_along_axis(matrix, order, axis=1)

    @cached_property
    def mixing_terms(self) -> list[tuple[Tensor, Tensor]] | None:
        """`mixing_table` term by term, as tensors (source group [cells], factor [cells, 1])."""
        if self.mixing_table is None:
            return None
        order, weight = self.mixing_table
        return [
            (torch.from_numpy(order[:, k].copy()), torch.from_numpy(weight[:, k].copy())[:, None])
            for k in range(order.shape[1])
        ]


@dataclass(frozen=True, eq=False)
class Edges(Network):
    """People joined in pairs; everybody reads the sum over their own neighbours. Always local.

    Args:
        name: as protocols and results call it.
        pairs: agents joined, as positions in the population [edges, 2].
        agents_in_all: how many agents there are; by default as many as the model has that takes these edges.
        directed: whether only the second of a pair reads the first.

    Raises:
        InputError: for a pair out of range, or of somebody with themselves.
    """

    name: str
    pairs: ArrayLike
    agents_in_all: int | None = None
    directed: bool = False
    shared: bool = field(init=False, default=False)
    mixing: None = field(init=False, default=None)
    normalise: str = field(init=False, default="none")
    _source: Tensor = field(init=False, repr=False)
    _reader: Tensor = field(init=False, repr=False)
    _agents: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = np.asarray(self.pairs)
        if pairs.size == 0:
            pairs = pairs.reshape(0, 2).astype(np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
            raise InputError(f"The pairs of {self.name} are whole numbers in two columns.")
        count = self.agents_in_all
        if count is None:
            count = int(pairs.max()) + 1 if pairs.size else 0
        if pairs.size and (pairs.min() < 0 or pairs.max() >= count):
            who = pairs.min() if pairs.min() < 0 else pairs.max()
            last = "" if self.agents_in_all is None else f" to {count - 1}"
            raise InputError(f"A pair of {self.name} is out of range: it has agent {who}, and agents run from 0{last}.")
        if np.any(pairs[:, 0] == pairs[:, 1]):
            raise InputError(f"A pair of {self.name} joins an agent with itself.")
        first, second = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64)
        source = first if self.directed else np.concatenate([first, second])
        reader = second if self.directed else np.concatenate([second, first])
        object.__setattr__(self, "_source", torch.from_numpy(source.copy()))
        object.__setattr__(self, "_reader", torch.from_numpy(reader.copy()))
        object.__setattr__(self, "_agents", count)

    @property
    def agents(self) -> int:
        return self._agents

    @property
    def cells(self) -> int:
        return self._agents

    @property
    def cell_of(self) -> NDArray[np.int32]:
        return np.arange(self._agents, dtype=np.int32)

    @property
    def members(self) -> NDArray[np.int64]:
        return np.ones(self._agents, dtype=np.int64)

    def shard(self, positions: NDArray[np.int64]) -> Edges:
        place = np.full(max(self._agents, int(positions.max(initial=-1)) + 1), -1, dtype=np.int64)
        place[positions] = np.arange(positions.size)
        pairs = place[np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2)]
        return replace(self, pairs=pairs[(pairs >= 0).all(axis=1)], agents_in_all=positions.size)

    @cached_property
    def readers_by_source(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets [agents + 1] and readers [edges (both ways)]: those of agent i stand at offsets[i] … offsets[i+1]."""
        source = self._source.numpy()
        order = np.argsort(source, kind="stable")
        return np.searchsorted(source[order], np.arange(self._agents + 1)), self._reader.numpy()[order]

    def sources_in_order(self, number: NDArray[Any] | None = None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The same the other way round: where those whom each agent reads begin [agents + 1], and who they are [edges].

        Args:
            number: of each agent, in whose order they stand; by default their positions [agents].
        """
        if number is None:
            return self._sources
        source, reader = self._source.numpy(), self._reader.numpy()
        order = np.lexsort((number[source], reader))
        begins = np.searchsorted(reader[order], np.arange(self._agents + 1))
        return begins.astype(np.int32), source[order].astype(np.int32)

    @cached_property
    def _sources(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.sources_in_order(np.arange(self._agents))

    @property
    def source(self) -> Tensor:
        """Who is read, edge by edge [edges (both ways)]."""
        return self._source

    @property
    def reader(self) -> Tensor:
        """Who reads, edge by edge [edges (both ways)]."""
        return self._reader

    def add(self, messages: Tensor) -> Tensor:
        zeros = torch.zeros((self._agents, *messages.shape[1:]), dtype=messages.dtype)
        return zeros.index_add(0, self._reader, messages.index_select(0, self._source))

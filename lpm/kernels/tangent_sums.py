"""What everybody passes on, added up by cell: tangents of the sums, and of the hazards that follow from them.

Tables of cells are laid out as agents' rows are (`lpm.kernels.tangent_steps`), so that what an agent feels in a cell is
one piece of memory: quads × cells × 4 numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import Addresses, column, fetch_float_column
from lpm.kernels.decisions import hazard_of
from lpm.kernels.quads import LENGTH, load, load_at, nothing, store, store_at

__all__ = ["BLOCK", "Felt", "Nets", "Parts", "finish", "join", "passed_on", "scatter", "spread"]

BLOCK = 512
"""Agents in a block, at most."""
_SOON = 16
"""So many agents ahead a sum asks for where it will be written: workplaces are all over the memory."""


class Nets(NamedTuple):
    """The networks of a contagion, as the loops read them; the speaking rows of all of them are in one list.

    Attributes:
        cells: group of each agent; address 0 over edges [networks][agents].
        units: which of the network's different sizes each cell has [networks][cells].
        closed: whether the first cell is of those in no group [networks].
        apart: whether nobody meets themselves in their own group, and neither may their tangent come back [networks].
        rows: rows of the stages that pass on more than the least [M of all networks].
        first: where a network's rows begin in `rows`, and the end of all [networks + 1].
        infectivity: [networks, S].
        inner: the network that has no table, or −1.
    """

    cells: Addresses
    units: Addresses
    closed: NDArray[np.bool_]
    apart: NDArray[np.bool_]
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    infectivity: NDArray[np.float64]
    inner: int


class Felt(NamedTuple):
    """What the networks do today.

    Attributes:
        at: where a network's numbers begin in `passed` and `back` [networks].
        passed: what a unit of the tangent of each speaking row passes on, by the agent's own stage
            [networks][units, S, M].
        back: hazard that comes back by it, where nobody meets themselves; 0 for those in no group
            [networks][units, S, M].
        unit_at: where a network's numbers begin in `share` [networks].
        share: one over the people of each unit, and 0 for those in no group [networks][units].
        factors: hazard per unit of pressure [networks].
        moved: its tangents [quads × networks × 4].
        words: infectivity sums of the inner network [its cells].
        hazards: of each cell, but the inner network's [networks][cells].
        tangents: of these [networks][quads, cells, 4].
        lengths: cells of each network [networks].
    """

    at: NDArray[np.int64]
    passed: NDArray[np.float64]
    back: NDArray[np.float64]
    unit_at: NDArray[np.int64]
    share: NDArray[np.float64]
    factors: NDArray[np.float64]
    moved: NDArray[np.float64]
    words: NDArray[np.int64]
    hazards: Addresses
    tangents: Addresses
    lengths: NDArray[np.int64]


class Parts(NamedTuple):
    """Where parts of the population are added up apart.

    Attributes:
        tables: of each network and part [networks, parts][quads, cells of the part, 4].
        first: first cell of a part [networks, parts].
        last: end of its cells [networks, parts].
    """

    tables: Addresses
    first: NDArray[np.int64]
    last: NDArray[np.int64]


@nb.njit(nogil=True, cache=True, inline="always")
def passed_on(
    carried: NDArray[np.float64],
    place: int,
    length: int,
    nets: Nets,
    n: int,
    passed: NDArray[np.float64],
    at: int,
) -> Any:
    """Four tangents of what an agent passes on in network n.

    Args:
        carried: tangents [quads × rows × agents × 4].
        place: of the agent in row 0 of them.
        length: of a row.
        nets: the networks.
        n: which.
        passed: see `Felt`.
        at: the agent's in it.
    """
    first = nets.first[n]
    total = passed[at] * load(carried, place + nets.rows[first] * length)
    for m in range(1, nets.first[n + 1] - first):
        total = total + passed[at + m] * load(carried, place + nets.rows[first + m] * length)
    return total


@nb.njit(nogil=True, cache=True)
def scatter(
    low: int,
    high: int,
    part: int,
    which: NDArray[np.int64],
    stage: NDArray[np.int8],
    nets: Nets,
    begins: NDArray[np.int64],
    passed: NDArray[np.float64],
    carried: NDArray[np.float64],
    rows: int,
    parts: Parts,
) -> None:
    """Add up what the agents `low` to `high` − 1 pass on, by group.

    Args:
        low: first agent.
        high: end of the agents.
        part: which part of the population they are.
        which: the networks, each of groups.
        stage: of each agent [agents].
        nets: all networks.
        begins: see `Felt.at`.
        passed: see `Felt`.
        carried: tangents [quads × rows × agents × 4].
        rows: how many.
        parts: where they are added up.
    """
    agents, stages = stage.size, nets.infectivity.shape[1]
    length = agents * LENGTH
    quads = carried.size // (rows * length)
    for n in which:
        table = parts.tables[n, part]
        for k in range(quads * (parts.last[n, part] - parts.first[n, part])):
            store_at(table, k * LENGTH, nothing())
    for start in range(low, high, BLOCK):
        end = min(start + BLOCK, high)
        for q in range(quads):
            base = q * rows * length
            for n in which:
                many = nets.first[n + 1] - nets.first[n]
                if many == 0:
                    continue
                cell, unit, closed, apart, at = nets.cells[n], nets.units[n], nets.closed[n], nets.apart[n], begins[n]
                table, first = parts.tables[n, part], parts.first[n, part]
                above = q * (parts.last[n, part] - first) - first
                for i in range(start, end):
                    soon = above + column(cell, min(i + _SOON, agents - 1))
                    fetch_float_column(table, soon * LENGTH)
                    g = column(cell, i)
                    if closed and g == 0:
                        continue
                    mine = at + ((column(unit, g) if apart else 0) * stages + stage[i]) * many
                    sent = passed_on(carried, base + i * LENGTH, length, nets, n, passed, mine)
                    store_at(table, (above + g) * LENGTH, load_at(table, (above + g) * LENGTH) + sent)


@nb.njit(nogil=True, cache=True)
def spread(
    n: int,
    stage: NDArray[np.int8],
    offsets: NDArray[np.int64],
    readers: NDArray[np.int64],
    nets: Nets,
    begins: NDArray[np.int64],
    passed: NDArray[np.float64],
    carried: NDArray[np.float64],
    rows: int,
    table: NDArray[np.float64],
) -> None:
    """Add up what everybody's neighbours pass on to them, over the edges of network n [quads × agents × 4]."""
    agents, many = stage.size, nets.first[n + 1] - nets.first[n]
    length = agents * LENGTH
    table[:] = 0.0
    if many == 0:
        return
    for q in range(carried.size // (rows * length)):
        above = q * length
        for i in range(agents):
            if offsets[i] == offsets[i + 1]:
                continue
            place = q * rows * length + i * LENGTH
            sent = passed_on(carried, place, length, nets, n, passed, begins[n] + stage[i] * many)
            for e in range(offsets[i], offsets[i + 1]):
                into = above + readers[e] * LENGTH
                store(table, into, load(table, into) + sent)


@nb.njit(nogil=True, cache=True, inline="always")
def _joined(parts: Parts, n: int, q: int, g: int) -> Any:
    """Four tangents of the sum of a cell: those of all parts that have it."""
    total = nothing()
    for k in range(parts.first.shape[1]):
        first, last = parts.first[n, k], parts.last[n, k]
        if first <= g < last:
            total = total + load_at(parts.tables[n, k], (q * (last - first) + g - first) * LENGTH)
    return total


@nb.njit(nogil=True, cache=True)
def join(n: int, parts: Parts, cells: int, table: NDArray[np.float64]) -> None:
    """Add up the parts of network n [quads × cells × 4]; one of them may be the table itself."""
    for q in range(table.size // (cells * LENGTH)):
        for g in range(cells):
            store(table, (q * cells + g) * LENGTH, _joined(parts, n, q, g))


@nb.njit(nogil=True, cache=True)
def finish(
    low: int,
    high: int,
    n: int,
    words: NDArray[np.int64],
    sizes: NDArray[np.float64],
    closed: bool,
    felt: Felt,
    parts: Parts,
    hazard: NDArray[np.float64],
    table: NDArray[np.float64],
) -> None:
    """Hazards of the cells `low` to `high` − 1 of network n, and their tangents, by its sums and theirs.

    Args:
        low: first cell.
        high: end of the cells.
        n: the network.
        words: infectivity sums [cells].
        sizes: people in each cell; empty where sums aren't divided [cells].
        closed: whether those of cell 0 meet nobody.
        felt: of it, `factors` and `moved`.
        parts: tangents of the sums.
        hazard: the result [cells].
        table: the result; a part may be the table itself [quads × cells × 4].
    """
    factor, cells = felt.factors[n], hazard.size
    for q in range(felt.moved.size // (felt.factors.size * LENGTH)):
        by_factor = load(felt.moved, (q * felt.factors.size + n) * LENGTH)
        for g in range(low, high):
            into = (q * cells + g) * LENGTH
            if closed and g == 0:
                hazard[g] = 0.0
                store(table, into, nothing())
                continue
            size = max(sizes[g], 1.0) if sizes.size else 1.0
            pressure = hazard_of(words[g], True, size, 1.0)
            hazard[g] = factor * pressure
            store(table, into, by_factor * pressure + factor * _joined(parts, n, q, g) / size)

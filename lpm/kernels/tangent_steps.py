"""What a step does to the tangents of each agent: the compiled loops of `lpm.kernels.tangents`.

An agent's tangents are a column for each live stage and parameter, side by side for neighbouring agents, so that the
loops over a block of agents run on whole vectors. The columns of an agent sum to 0 (somebody moves from one stage to
another), which spares the stages that nobody leaves and that pass nothing on.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.decisions import one_minus_exp

__all__ = ["advance", "emit", "finish", "scatter", "spread_edges"]

_BLOCK = 256
_LARGEST = 32.0
"""`one_minus_exp` is constant beyond."""


@nb.njit(nogil=True, cache=True)
def emit(
    start: int,
    count: int,
    stage: NDArray[np.int8],
    cell: NDArray[np.int32],
    unit: NDArray[np.int32],
    kind: NDArray[np.int64],
    speaking: NDArray[np.int64],
    curved: NDArray[np.float64],
    carried: NDArray[np.float64],
    factor: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Tangents of what each agent of a block passes on in one network [P, block].

    Args:
        start: first agent of the block.
        count: how many.
        stage: of each agent [agents].
        cell: group of each agent; empty over edges [agents].
        unit: row of `curved` of each group; empty where there is one row [cells].
        kind: infectivity of each stage, as a column of `curved` [S].
        speaking: rows of `carried` that belong to infectious stages [M].
        curved: what one unit of the tangent of each infectious stage passes on, by the agent's own stage
            [units, kinds, M].
        carried: tangents [rows, P, agents].
        factor: room [block].
        out: the result.
    """
    out[:, :count] = 0.0
    for m in range(speaking.size):
        if unit.size:
            for j in range(count):
                factor[j] = curved[unit[cell[start + j]], kind[stage[start + j]], m]
        else:
            for j in range(count):
                factor[j] = curved[0, kind[stage[start + j]], m]
        for p in range(out.shape[0]):
            row, into = carried[speaking[m], p, start : start + count], out[p]
            for j in range(count):
                into[j] += factor[j] * row[j]


@nb.njit(nogil=True, cache=True)
def scatter(
    low: int,
    high: int,
    first: int,
    stage: NDArray[np.int8],
    cell: NDArray[np.int32],
    unit: NDArray[np.int32],
    kind: NDArray[np.int64],
    speaking: NDArray[np.int64],
    curved: NDArray[np.float64],
    carried: NDArray[np.float64],
    total: NDArray[np.float64],
) -> None:
    """Add up what the agents `low` to `high` − 1 pass on, by group from `first` on [groups, P or more]."""
    parameters = carried.shape[1]
    total[:] = 0.0
    factor, out = np.empty(_BLOCK), np.empty((parameters, _BLOCK))
    for start in range(low, high, _BLOCK):
        count = min(_BLOCK, high - start)
        emit(start, count, stage, cell, unit, kind, speaking, curved, carried, factor, out)
        for j in range(count):
            g = cell[start + j] - first
            for p in range(parameters):
                total[g, p] += out[p, j]


@nb.njit(nogil=True, cache=True)
def spread_edges(
    stage: NDArray[np.int8],
    offsets: NDArray[np.int64],
    readers: NDArray[np.int64],
    kind: NDArray[np.int64],
    speaking: NDArray[np.int64],
    curved: NDArray[np.float64],
    carried: NDArray[np.float64],
    total: NDArray[np.float64],
) -> None:
    """Add up what everybody's neighbours pass on to them [agents, P or more]."""
    parameters = carried.shape[1]
    total[:] = 0.0
    none, units = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    factor, out = np.empty(_BLOCK), np.empty((parameters, _BLOCK))
    for start in range(0, stage.size, _BLOCK):
        count = min(_BLOCK, stage.size - start)
        emit(start, count, stage, none, units, kind, speaking, curved, carried, factor, out)
        for j in range(count):
            for e in range(offsets[start + j], offsets[start + j + 1]):
                for p in range(parameters):
                    total[readers[e], p] += out[p, j]


@nb.njit(nogil=True, cache=True)
def finish(
    low: int,
    high: int,
    words: NDArray[np.int64],
    sizes: NDArray[np.float64],
    factor: float,
    moved: NDArray[np.float64],
    closed: bool,
    table: NDArray[np.float64],
) -> None:
    """Turn tangents of the sums of cells `low` to `high` − 1 into those of hazards, with the hazard in the last column.

    Args:
        low: first cell.
        high: end of the cells.
        words: infectivity sums [cells].
        sizes: people in each cell; empty where sums aren't divided [cells].
        factor: hazard per unit of pressure.
        moved: its tangents [P].
        closed: whether those of cell 0 meet nobody.
        table: tangents of the sums, and room for the hazard [cells, P + 1].
    """
    parameters = moved.size
    for g in range(low, high):
        size = max(sizes[g], 1.0) if sizes.size else 1.0
        pressure = np.float64(words[g]) * 2.0**-32 / size
        if closed and g == 0:
            table[g] = 0.0
            continue
        for p in range(parameters):
            table[g, p] = moved[p] * pressure + factor * table[g, p] / size
        table[g, parameters] = factor * pressure


@nb.njit(nogil=True, cache=True)
def advance(
    low: int,
    high: int,
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    networks: int,
    cells: tuple[NDArray[np.int32], ...],
    tables: tuple[NDArray[np.float64], ...],
    units: tuple[NDArray[np.int32], ...],
    shares: tuple[NDArray[np.float64], ...],
    owns: tuple[NDArray[np.float64], ...],
    speaking: tuple[NDArray[np.int64], ...],
    heard: NDArray[np.bool_],
    kind: NDArray[np.int64],
    infectivity: NDArray[np.float64],
    factors: NDArray[np.float64],
    moved: NDArray[np.float64],
    closed: NDArray[np.bool_],
    susceptibility: NDArray[np.float64],
    infection_edge: NDArray[np.int64],
    infection_scale: NDArray[np.float64],
    exit_edge: NDArray[np.int64],
    share_of_exit: NDArray[np.float64],
    slope: NDArray[np.float64],
    steep: NDArray[np.bool_],
    target: NDArray[np.int64],
    row_of: NDArray[np.int64],
    carried: NDArray[np.float64],
    flow: NDArray[np.float64],
) -> None:
    """One step of the tangents of the agents `low` to `high` − 1, and the tangents of their transitions.

    Args:
        low: first agent.
        high: end of the agents.
        stage: before the step [agents].
        classes: of each agent; empty where there is one class [agents].
        networks: how many; the tuples may be longer.
        cells: group of each agent; empty over edges [agents].
        tables: tangents of each cell's hazard and the hazard itself [cells, P + 1].
        units: see `emit`.
        shares: one over the people of each unit, and 0 for those in no group [units + 1].
        owns: hazard that comes back, by unit of tangent, where nobody meets themselves; 0 for those in no group; else
            empty [units + 1, kinds, M].
        speaking: see `emit`.
        heard: which rows of `carried` are in `speaking` of some network with `owns` [rows].
        kind: see `emit`, by network [networks, S].
        infectivity: [networks, S].
        factors: hazard per unit of pressure [networks].
        moved: its tangents [networks, P].
        closed: whether the first cell is of those in no group [networks].
        susceptibility: [C].
        infection_edge: by which each stage is infected, or −1 [S].
        infection_scale: relative susceptibility of each stage [S].
        exit_edge: progressions of each stage in order, then −1 [S, most].
        share_of_exit: probability of each [S, most, C].
        slope: its tangents [S, most, C, P].
        steep: whether a stage's are not all 0 [S].
        target: stage that each edge leads to [E].
        row_of: row of each stage in `carried`, or −1 if it has none [S].
        carried: tangents [rows, P, agents]; changed.
        flow: tangents of transitions; added to [E, C, P].
    """
    rows, parameters = carried.shape[0], carried.shape[1]
    hazard, chance, here, part = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.zeros(_BLOCK)
    group, unit = np.empty(_BLOCK, dtype=np.int64), np.zeros(_BLOCK, dtype=np.int64)
    felt, back = np.empty((parameters, _BLOCK)), np.empty((rows, _BLOCK))
    change = np.empty((rows, parameters, _BLOCK))
    for start in range(low, high, _BLOCK):
        count = min(_BLOCK, high - start)
        now = stage[start : start + count]
        hazard[:] = 0.0
        felt[:] = 0.0
        back[:] = 0.0
        change[:] = 0.0
        for n in range(networks):
            cell, table, own = cells[n], tables[n], owns[n]
            for j in range(count):
                group[j] = np.int64(cell[start + j]) if cell.size else start + j
            for j in range(count):
                hazard[j] += table[group[j], parameters]
            for p in range(parameters):
                into = felt[p]
                for j in range(count):
                    into[j] += table[group[j], p]
            if not own.size:
                continue
            # Nobody meets themselves: neither what they pass on nor its tangent comes back.
            if units[n].size:
                different = units[n]
                for j in range(count):
                    unit[j] = different[group[j]]
            else:
                unit[:] = 0
            if closed[n]:
                for j in range(count):
                    unit[j] = own.shape[0] - 1 if group[j] == 0 else unit[j]
            speaks, kinds = speaking[n], kind[n]
            for m in range(speaks.size):
                into = back[speaks[m]]
                for j in range(count):
                    into[j] += own[unit[j], kinds[now[j]], m]
            for j in range(count):
                weight = infectivity[n, now[j]]
                if weight > 0.0:
                    share = shares[n][unit[j]]
                    hazard[j] -= factors[n] * share * weight
                    for p in range(parameters):
                        felt[p, j] -= moved[n, p] * share * weight
        for r in range(rows):
            if not heard[r]:
                continue
            less = back[r]
            for p in range(parameters):
                row, into = carried[r, p, start : start + count], felt[p]
                for j in range(count):
                    into[j] -= less[j] * row[j]
        for s in range(infection_edge.size):
            edge = infection_edge[s]
            if edge < 0:
                continue
            for j in range(count):
                c = np.int64(classes[start + j]) if classes.size else 0
                here[j] = susceptibility[c] * infection_scale[s]
            for j in range(count):
                chance[j] = one_minus_exp(hazard[j] * here[j])
            for j in range(count):
                decides = (now[j] == s) & (hazard[j] * here[j] < _LARGEST)
                here[j] = (1.0 - chance[j]) * here[j] if decides else 0.0
            for p in range(parameters):
                row, slopes = carried[row_of[s], p, start : start + count], felt[p]
                for j in range(count):
                    part[j] = row[j] * chance[j] + here[j] * slopes[j]
                _move(start, count, part, classes, row_of[s], row_of[target[edge]], p, change, flow[edge])
        for s in range(exit_edge.shape[0]):
            for b in range(exit_edge.shape[1]):
                edge = exit_edge[s, b]
                if edge < 0:
                    break
                for j in range(count):
                    c = np.int64(classes[start + j]) if classes.size else 0
                    chance[j] = share_of_exit[s, b, c]
                for p in range(parameters):
                    row = carried[row_of[s], p, start : start + count]
                    for j in range(count):
                        part[j] = row[j] * chance[j]
                    if steep[s]:
                        for j in range(count):
                            if now[j] == s:
                                c = np.int64(classes[start + j]) if classes.size else 0
                                part[j] += slope[s, b, c, p]
                    _move(start, count, part, classes, row_of[s], row_of[target[edge]], p, change, flow[edge])
        for r in range(rows):
            for p in range(parameters):
                row, more = carried[r, p, start : start + count], change[r, p]
                for j in range(count):
                    row[j] += more[j]


@nb.njit(nogil=True, cache=True, inline="always")
def _move(
    start: int,
    count: int,
    part: NDArray[np.float64],
    classes: NDArray[np.int16],
    source: int,
    into: int,
    p: int,
    change: NDArray[np.float64],
    flow: NDArray[np.float64],
) -> None:
    """Take a block's flow from one row and add it to another, and to its class."""
    less = change[source, p]
    for j in range(count):
        less[j] -= part[j]
    if into >= 0:
        more = change[into, p]
        for j in range(count):
            more[j] += part[j]
    if classes.size:
        for j in range(count):
            flow[classes[start + j], p] += part[j]
    else:
        # Halves onto halves, which runs on whole vectors and in an order that no machine changes.
        part[count:] = 0.0
        half = _BLOCK // 2
        while half:
            for j in range(half):
                part[j] += part[half + j]
            half //= 2
        flow[0, p] += part[0]

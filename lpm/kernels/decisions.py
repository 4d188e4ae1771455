"""What each agent does in a step, decided by compiled loops: the innermost part of the fused executor (`cpu.py`).

`advance` goes lane by lane, which is fastest where there are few; `advance_lanes` goes agent by agent, which is fastest
where there are many: the draws of an iteration and the copies that finite differences need lie side by side in memory.
Both sift out, in blocks that fit the cache, those for whom something may happen, and decide them by the same function,
in another order, which changes no bit: what they add up is whole. Networks are the outer loop of both, because reaching
into a tuple of arrays costs more than a decision.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.philox import draw
from lpm.relax import RECIPROCALS

__all__ = ["CHUNK", "advance", "advance_lanes", "hazard_of", "one_minus_exp"]

_RECIPROCALS = np.array(RECIPROCALS[::-1])
CHUNK = 4096
_BLOCK = 8192
"""Agents × lanes that `advance_lanes` sifts at a time."""
_ONE_32 = 2.0**-32


@nb.njit(nogil=True, cache=True, inline="always")
def one_minus_exp(x: float) -> float:
    """1 − e^−x: `lpm.relax.one_minus_exp`, operation by operation."""
    y = min(x, 32.0) * 0.0625
    q = 1.0
    for reciprocal in _RECIPROCALS:
        q = 1.0 - (y * reciprocal) * q
    q = y * q
    q = q * (2.0 - q)
    q = q * (2.0 - q)
    q = q * (2.0 - q)
    return q * (2.0 - q)


@nb.njit(nogil=True, cache=True, inline="always")
def hazard_of(total: int, sized: bool, size: float, factor: float) -> float:
    """Hazard of a cell from its sum: `spec.hazards`, operation by operation."""
    pressure = np.float64(total) * _ONE_32
    if sized:
        pressure = pressure / max(size, 1.0)
    return factor * pressure


@nb.njit(nogil=True, cache=True)
def _decide(
    found: int,
    agent: NDArray[np.int64],
    lane: NDArray[np.int32],
    drawn: NDArray[np.uint32],
    hazard: NDArray[np.float64],
    end: int,
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    networks: int,
    cells: tuple[NDArray[np.int32], ...],
    tables: tuple[NDArray[np.float64], ...],
    totals: tuple[NDArray[np.int64], ...],
    sizes: tuple[NDArray[np.float64], ...],
    factors: NDArray[np.float64],
    closed: NDArray[np.bool_],
    susceptibility: NDArray[np.float64],
    infection_edge: NDArray[np.int64],
    infection_scale: NDArray[np.float64],
    exit_edge: NDArray[np.int64],
    exit_threshold: NDArray[np.int64],
    target: NDArray[np.int8],
    infectious: NDArray[np.int64],
    after: NDArray[np.int8],
    flows: NDArray[np.int64],
    changed: NDArray[np.int64],
) -> int:
    """Decide the first `found` of the listed agents and lanes by their random words; the new end of `changed`."""
    lanes = stage.shape[1]
    for m in range(found):
        hazard[m] = 0.0
    for n in range(networks):
        cell, table, total, size, shut = cells[n], tables[n], totals[n], sizes[n], closed[n]
        sized = size.size > 0
        for m in range(found):
            i, k = agent[m], lane[m]
            if infection_edge[stage[i, k]] >= 0:
                g = np.int64(cell[i]) if cell.size else i
                if table.size:
                    hazard[m] = hazard[m] + table[g, k]
                elif not (shut and g == 0):
                    hazard[m] = hazard[m] + hazard_of(total[g, k], sized, size[g] if sized else 1.0, factors[n, k])
    for m in range(found):
        i, k = agent[m], lane[m]
        s = stage[i, k]
        c = classes[i] if classes.size else np.int16(0)
        word = np.int64(drawn[m])
        edge = -1
        if infection_edge[s] >= 0:
            if hazard[m] > 0.0:
                felt = hazard[m] * susceptibility[c]
                felt = felt * infection_scale[s]
                if word < np.int64(np.floor(one_minus_exp(felt) * 4294967296.0)):
                    edge = infection_edge[s]
        else:
            for b in range(exit_edge.shape[1]):
                if exit_edge[s, b] < 0:
                    break
                if word < exit_threshold[s, b, c, k]:
                    edge = exit_edge[s, b]
                    break
        if edge >= 0:
            flows[edge, c, k] += 1
            to = target[edge]
            after[i, k] = to
            if infectious[s] != infectious[to]:
                changed[end] = i * lanes + k
                end += 1
    return end


@nb.njit(nogil=True, cache=True)
def advance(
    low: int,
    high: int,
    first: np.uint64,
    listed: NDArray[np.uint64],
    c2: np.uint64,
    c3: np.uint64,
    keys: NDArray[np.uint64],
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    networks: int,
    cells: tuple[NDArray[np.int32], ...],
    codes: tuple[NDArray[np.uint8], ...],
    tables: tuple[NDArray[np.float64], ...],
    totals: tuple[NDArray[np.int64], ...],
    sizes: tuple[NDArray[np.float64], ...],
    factors: NDArray[np.float64],
    closed: NDArray[np.bool_],
    base: NDArray[np.float64],
    reach: NDArray[np.float64],
    susceptibility: NDArray[np.float64],
    infection_edge: NDArray[np.int64],
    infection_scale: NDArray[np.float64],
    exit_edge: NDArray[np.int64],
    exit_threshold: NDArray[np.int64],
    target: NDArray[np.int8],
    infectious: NDArray[np.int64],
    after: NDArray[np.int8],
    flows: NDArray[np.int64],
    changed: NDArray[np.int64],
) -> int:
    """One step of the agents `low` to `high` − 1, lane by lane; `base` and `reach` are [lanes, S · C].

    Returns the end of what it wrote to `changed` from low · lanes on.
    """
    lanes, class_count = stage.shape[1], susceptibility.size
    words = np.empty(CHUNK + 8, dtype=np.uint32)
    here = np.empty(CHUNK, dtype=np.int8)
    row = np.empty(CHUNK, dtype=np.int32)
    bound = np.empty(CHUNK, dtype=np.int32)
    agent = np.empty(CHUNK + 1, dtype=np.int64)
    lane = np.empty(CHUNK + 1, dtype=np.int32)
    drawn = np.empty(CHUNK + 1, dtype=np.uint32)
    hazard = np.empty(CHUNK)
    end: int = low * lanes
    for start in range(low, high, CHUNK):
        count = min(CHUNK, high - start)
        offset = 0
        for k in range(lanes):
            if k == 0 or keys[k, 0] != keys[k - 1, 0] or keys[k, 1] != keys[k - 1, 1]:
                offset = draw(first, listed, start, count, c2, c3, keys[k, 0], keys[k, 1], words)
            for j in range(count):
                here[j] = stage[start + j, k]
                after[start + j, k] = here[j]
            if classes.size:
                for j in range(count):
                    row[j] = here[j] * class_count + classes[start + j]
            else:
                for j in range(count):
                    row[j] = here[j]
            for j in range(count):
                bound[j] = 0
            for n in range(networks):
                code, cell = codes[n], cells[n]
                if cell.size:
                    for j in range(count):
                        bound[j] += code[cell[start + j], k]
                else:
                    for j in range(count):
                        bound[j] += code[start + j, k]
            found = 0
            for j in range(count):
                r = row[j]
                word = words[offset + j]
                limit = base[k, r] + bound[j] * reach[k, r]
                agent[found] = start + j
                drawn[found] = word
                # A byte of 255 has no upper bound.
                found += (np.float64(word) < limit) | ((bound[j] >= 255) & (reach[k, r] > 0.0))
            for m in range(found):
                lane[m] = k
            end = _decide(
                found,
                agent,
                lane,
                drawn,
                hazard,
                end,
                stage,
                classes,
                networks,
                cells,
                tables,
                totals,
                sizes,
                factors,
                closed,
                susceptibility,
                infection_edge,
                infection_scale,
                exit_edge,
                exit_threshold,
                target,
                infectious,
                after,
                flows,
                changed,
            )
    return end


@nb.njit(nogil=True, cache=True)
def advance_lanes(
    low: int,
    high: int,
    first: np.uint64,
    listed: NDArray[np.uint64],
    c2: np.uint64,
    c3: np.uint64,
    keys: NDArray[np.uint64],
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    networks: int,
    cells: tuple[NDArray[np.int32], ...],
    codes: tuple[NDArray[np.uint8], ...],
    tables: tuple[NDArray[np.float64], ...],
    totals: tuple[NDArray[np.int64], ...],
    sizes: tuple[NDArray[np.float64], ...],
    factors: NDArray[np.float64],
    closed: NDArray[np.bool_],
    base: NDArray[np.float64],
    reach: NDArray[np.float64],
    susceptibility: NDArray[np.float64],
    infection_edge: NDArray[np.int64],
    infection_scale: NDArray[np.float64],
    exit_edge: NDArray[np.int64],
    exit_threshold: NDArray[np.int64],
    target: NDArray[np.int8],
    infectious: NDArray[np.int64],
    after: NDArray[np.int8],
    flows: NDArray[np.int64],
    changed: NDArray[np.int64],
) -> int:
    """The same, agent by agent, for many lanes, which lie side by side; `base` and `reach` are [S · C, lanes]."""
    lanes, class_count = stage.shape[1], susceptibility.size
    draw_of = np.zeros(lanes, dtype=np.int64)
    for k in range(1, lanes):
        other = keys[k, 0] != keys[k - 1, 0] or keys[k, 1] != keys[k - 1, 1]
        draw_of[k] = draw_of[k - 1] + (1 if other else 0)
    block = max(1, _BLOCK // lanes)
    words = np.empty((draw_of[lanes - 1] + 1, block + 8), dtype=np.uint32)
    bound = np.empty((block, lanes), dtype=np.int32)
    agent = np.empty(block * lanes + 1, dtype=np.int64)
    lane = np.empty(block * lanes + 1, dtype=np.int32)
    drawn = np.empty(block * lanes + 1, dtype=np.uint32)
    hazard = np.empty(block * lanes)
    end: int = low * lanes
    for start in range(low, high, block):
        count = min(block, high - start)
        offset = 0
        for k in range(lanes):
            if k == 0 or draw_of[k] != draw_of[k - 1]:
                offset = draw(first, listed, start, count, c2, c3, keys[k, 0], keys[k, 1], words[draw_of[k]])
        bound[:] = 0
        for n in range(networks):
            code, cell = codes[n], cells[n]
            for j in range(count):
                g = np.int64(cell[start + j]) if cell.size else start + j
                for k in range(lanes):
                    bound[j, k] += code[g, k]
        found = 0
        for j in range(count):
            i = start + j
            c = np.int64(classes[i]) if classes.size else 0
            for k in range(lanes):
                s = stage[i, k]
                after[i, k] = s
                r = np.int64(s) * class_count + c
                word = words[draw_of[k], offset + j]
                limit = base[r, k] + bound[j, k] * reach[r, k]
                agent[found] = i
                lane[found] = k
                drawn[found] = word
                found += (np.float64(word) < limit) | ((bound[j, k] >= 255) & (reach[r, k] > 0.0))
        end = _decide(
            found,
            agent,
            lane,
            drawn,
            hazard,
            end,
            stage,
            classes,
            networks,
            cells,
            tables,
            totals,
            sizes,
            factors,
            closed,
            susceptibility,
            infection_edge,
            infection_scale,
            exit_edge,
            exit_threshold,
            target,
            infectious,
            after,
            flows,
            changed,
        )
    return end

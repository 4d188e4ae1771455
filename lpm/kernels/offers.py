"""The actual step of cluster alternates: who decides, which decisions could have come out otherwise, who competes."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.clusters import (
    FLOOR,
    SCALE,
    Day,
    Flips,
    Frame,
    Fresh,
    Ints,
    Slots,
    compete,
    hazard,
    layer_of,
    race,
    threshold,
)
from lpm.kernels.cpu import _one_minus_exp

__all__ = ["decide", "decide_start", "near", "offer"]


@nb.njit(nogil=True, cache=True)
def near(
    stage: NDArray[np.int8],
    words: NDArray[np.uint64],
    frame: Frame,
    bound: NDArray[np.float64],
    limit: Ints,
    low: NDArray[np.int32],
) -> int:
    """Agents whose word may decide something this step, in `low`; returns how many."""
    found = 0
    networks = frame.cells.shape[1]
    for i in range(stage.shape[0]):
        s = stage[i]
        c = frame.classes[i]
        if frame.infection_edge[s] >= 0:
            total = 0.0
            for n in range(networks):
                total += bound[frame.cells[i, n]]
            total *= frame.susceptibility[c] * frame.infection_scale[s]
            if np.int64(words[i]) < total * 4299262263.0:
                low[found] = i
                found += 1
        elif np.int64(words[i]) < limit[s, c]:
            low[found] = i
            found += 1
    return found


@nb.njit(nogil=True, cache=True)
def _linear_reference(frame: Frame, day: Day, i: int) -> float:
    total = 0.0
    last = day.linear.shape[1] - 1
    for n in range(frame.cells.shape[1]):
        if frame.layer[n] < 0:
            total += day.linear[frame.cells[i, n] - frame.first_cell[n] + frame.first_linear[n], last]
    return total


@nb.njit(nogil=True, cache=True)
def decide(
    stage: NDArray[np.int8],
    words: NDArray[np.uint64],
    low: NDArray[np.int32],
    frame: Frame,
    day: Day,
    slots: Slots,
    member: NDArray[np.int32],
    after: NDArray[np.int8],
    flows: Ints,
    flips: Flips,
    fresh: Fresh,
) -> None:
    """The actual step, the flips it offers, and who differs in an alternative from now on."""
    branches = frame.exit_edge.shape[1]
    for e in range(low.shape[0]):
        i = low[e]
        s = stage[i]
        c = frame.classes[i]
        drawn = np.int64(words[i])
        if frame.infection_edge[s] >= 0:
            base = hazard(frame, day, i)
            scale = frame.infection_scale[s]
            total = base * frame.susceptibility[c]
            total = total * scale
            p = _one_minus_exp(total)
            limit = np.int64(np.floor(p * SCALE))
            yes = drawn < limit
            to = frame.target[frame.infection_edge[s]]
            if yes:
                after[i] = to
                flows[frame.infection_edge[s], c] += 1
            elif p < 1.0:
                # d ln(1 − p) by the reference direction, times 1 − p; a window of q offers it at 1/q.
                reference = _linear_reference(frame, day, i) * frame.susceptibility[c] * scale
                mass = abs(reference * (1.0 - p) + p)
                q = min(1.0 - p, mass / FLOOR)
                if mass > 0.0 and drawn < limit + np.int64(np.floor(q * SCALE)):
                    k = flips.length[0]
                    flips.agent[k] = i
                    flips.stage[k] = to
                    flips.branch[k] = -1
                    flips.size[k] = mass / q
                    flips.factor[k] = (1.0 - p) / q
                    flips.length[0] = k + 1
            for layer in range(frame.network.shape[0]):
                n = frame.network[layer]
                if n < 0 or frame.slot[i, layer] < 0:
                    continue
                cell = frame.cells[i, n]
                unit = day.factor[n] * day.share[cell]
                if unit == 0.0:
                    continue
                one = frame.first_slot[layer] + (cell - frame.first_cell[n]) * frame.width[layer]
                for q in range(one, one + frame.width[layer]):
                    if slots.held[q] == 0 or slots.excess[q] == 0.0:
                        continue
                    other = (base + unit * slots.excess[q]) * frame.susceptibility[c] * scale
                    if (drawn < threshold(max(other, 0.0))) == yes:
                        continue
                    known = False
                    for m in range(slots.first[q], slots.first[q] + slots.held[q]):
                        known = known or member[m] == i
                    if not known:
                        k = fresh.length[0]
                        fresh.agent[k] = i
                        fresh.slot[k] = q
                        fresh.stage[k] = s if yes else to
                        fresh.following[k] = slots.head[q]
                        slots.head[q] = k
                        fresh.length[0] = k + 1
        else:
            left = -1
            for b in range(branches):
                if frame.exit_edge[s, b] < 0:
                    break
                if drawn < day.exit[s, b, c]:
                    left = b
                    break
            if left >= 0:
                edge = frame.exit_edge[s, left]
                after[i] = frame.target[edge]
                flows[edge, c] += 1
                if day.window[s, left, c] < 0:
                    _flip_exit(frame, day, flips, i, s, s, left, c)
            else:
                for b in range(branches):
                    if frame.exit_edge[s, b] < 0:
                        break
                    if drawn < day.window[s, b, c]:
                        _flip_exit(frame, day, flips, i, s, frame.target[frame.exit_edge[s, b]], b, c)
                        break


@nb.njit(nogil=True, cache=True)
def _flip_exit(frame: Frame, day: Day, flips: Flips, i: int, s: int, other: int, b: int, c: int) -> None:
    size = abs(day.exit_weight[s, b, c, day.exit_weight.shape[3] - 1])
    if size > 0.0:
        k = flips.length[0]
        flips.agent[k] = i
        flips.stage[k] = other
        flips.branch[k] = b
        flips.size[k] = size
        flips.factor[k] = s
        flips.length[0] = k + 1


@nb.njit(nogil=True, cache=True)
def decide_start(words: NDArray[np.uint64], free: NDArray[np.bool_], window: Ints, stages: Ints, flips: Flips) -> None:
    """Flips of the start: somebody who begins in stage 0 might have begun in another.

    Args:
        words: [agents].
        free: whose first stage was drawn [agents].
        window: begin of the windows, then the end of each [stages drawn + 1].
        stages: [stages drawn].
        flips: receives them; `branch` numbers the stages drawn.
    """
    for i in range(words.shape[0]):
        drawn = np.int64(words[i])
        if not free[i] or drawn < window[0] or drawn >= window[-1]:
            continue
        for b in range(stages.shape[0]):
            if drawn < window[b + 1]:
                k = flips.length[0]
                flips.agent[k] = i
                flips.stage[k] = stages[b]
                flips.branch[k] = b
                flips.length[0] = k + 1
                break


@nb.njit(nogil=True, cache=True)
def offer(
    frame: Frame, day: Day, slots: Slots, flips: Flips, fresh: Fresh, touched: NDArray[np.int32], count: int
) -> int:
    """Flips go to the agent's slot in every layer, fresh differences to those in the other layers."""
    layers = frame.network.shape[0]
    total, best, winner = slots.total, slots.best, slots.winner
    ids, slot, width, first_slot, address = frame.ids, frame.slot, frame.width, frame.first_slot, day.address
    widest = 0
    for layer in range(layers):
        widest = max(widest, width[layer])
    for k in range(flips.length[0]):
        i = flips.agent[k]
        for layer in range(layers):
            q = slot[i, layer]
            if q >= 0:
                key = race(ids[i], address, 1 + layer, flips.size[k])
                count = compete(total, best, winner, touched, count, q, k, flips.size[k], key)
    last = slots.weight.shape[1] - 1
    for k in range(fresh.length[0]):
        i, origin = fresh.agent[k], fresh.slot[k]
        size = abs(slots.weight[origin, last])
        if size == 0.0:
            continue
        home = layer_of(first_slot, origin)
        sub = (origin - first_slot[home]) % width[home]
        for layer in range(layers):
            q = slot[i, layer]
            if layer != home and q >= 0:
                variate = 1 + layers + (home * widest + sub) * layers + layer
                key = race(ids[i], address, variate, size)
                count = compete(total, best, winner, touched, count, q, flips.length[0] + k, size, key)
    return count

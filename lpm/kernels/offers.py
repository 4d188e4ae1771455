"""The actual step of cluster alternates: who decides, and which decisions could have come out otherwise."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import Addresses, column, fetch, fetch_float_column, float_column
from lpm.kernels.clusters import (
    BARE,
    SCALE,
    TOUCHED,
    Day,
    Flips,
    Floats,
    Frame,
    Fresh,
    Ints,
    Slots,
    chance,
    identity_of,
    own_slot,
    word_of,
)
from lpm.kernels.cpu import _byte
from lpm.kernels.decisions import hazard_of, one_minus_exp
from lpm.philox import draw

__all__ = ["decide_start", "encode_layer", "encode_linear", "step"]

_CHUNK = 4096
_INFECTOR_VARIATE = 65535
_BEYOND = 2.0
"""How far the window of a flip may reach, as a multiple of the hazard, unless it is offered seldom (`Day.base`)."""


@nb.njit(nogil=True, cache=True)
def encode_layer(
    low: int,
    high: int,
    total: Ints,
    size: Floats,
    closed: bool,
    among: np.uint64,
    excess: NDArray[np.float32],
    width: int,
    factor: float,
    unit: float,
    pressure: Floats,
    code: NDArray[np.uint8],
) -> None:
    """Pressure in the cells `low` to `high` − 1 of a layer, and a bound of what a word there may decide or offer.

    Args:
        low: first cell.
        high: end of the cells.
        total: infectivity words [cells].
        size: people by whom sums are divided, or empty [cells].
        closed: whether the people of cell 0 meet nobody.
        among: address of how many people a member's infectivity is shared out among.
        excess: of the layer's slots [slots].
        width: slots of a cell.
        factor: hazard per unit of pressure.
        unit: hazard of one unit of `code`.
        pressure: [cells].
        code: [cells].
    """
    sized = size.size > 0
    for g in range(low, high):
        most = 0.0
        for q in range(g * width, (g + 1) * width):
            most = max(most, excess[q])
        felt = 0.0
        if total[g] != 0 and not (closed and g == 0):
            felt = hazard_of(total[g], sized, size[g] if sized else 1.0, 1.0)
        pressure[g] = felt
        code[g] = 0
        if felt != 0.0 or most != 0.0:
            code[g] = _byte(factor * (felt * _BEYOND + most / float_column(among, g)), unit)


@nb.njit(nogil=True, cache=True)
def encode_linear(pressure: Floats, factor: float, moved: Floats, unit: float, code: NDArray[np.uint8]) -> None:
    """The same bound in the cells of a linear network, whose hazard has derivatives `moved` [cells, P + 1]."""
    last = moved.shape[1] - 1
    for g in range(pressure.shape[0]):
        code[g] = _byte(factor * pressure[g] * _BEYOND + abs(moved[g, last]), unit)


@nb.njit(nogil=True, cache=True, inline="always")
def _flip_exit(
    exit_weight: Floats,
    agent: NDArray[np.int32],
    stage: NDArray[np.int8],
    branch: NDArray[np.int8],
    size: NDArray[np.float32],
    factor: NDArray[np.float32],
    via: NDArray[np.int32],
    k: int,
    i: int,
    s: int,
    other: int,
    b: int,
    c: int,
) -> int:
    weight = abs(exit_weight[s, b, c, exit_weight.shape[3] - 1])
    if weight > 0.0:
        agent[k] = i
        stage[k] = other
        branch[k] = b
        size[k] = weight
        factor[k] = s
        if via.shape[0] > 0:
            via[k] = -1
        k += 1
    return k


@nb.njit(**BARE, inline="always")
def _told(i: int, k: int, slot: Addresses, layout: Ints, seed: NDArray[np.int32], via: NDArray[np.int32]) -> bool:
    """Whether k's differences began with i's: then i does not hear of them."""
    for layer in range(slot.shape[0]):
        q = own_slot(slot, layout, layer, k)
        if q >= 0 and seed[q] == k and via[q] == i:
            return True
    return False


@nb.njit(**BARE)
def _infector(
    i: int,
    drawn: np.uint64,
    p: float,
    reach: float,
    sign: float,
    factor: Floats,
    cells: Addresses,
    layer_number: Ints,
    first_linear: Ints,
    linear: Floats,
    graph: Ints,
    sources: Addresses,
    sent: Floats,
    slot: Addresses,
    layout: Ints,
    seed: NDArray[np.int32],
    via: NDArray[np.int32],
) -> int:
    """Whose differences over edges a flip of an infection is due to, or −1: drawn ∝ their shares in its reference.

    Args:
        i: who might have been infected.
        drawn: random word.
        p: probability of the infection: the share of those who meet it anyway.
        reach: derivative of the probability by the hazard, per unit of infectivity.
        sign: of all shares together; those of the other sign count as none.
        factor: see `Day`, as what has the same name.
    """
    last, total, left, found = linear.shape[1] - 1, max(0.0, sign * p), np.inf, -1
    for n in range(graph.shape[0]):
        if graph[n] < 0 and layer_number[n] < 0:
            total += max(0.0, sign * reach * linear[first_linear[n] + column(cells[n], i), last])
    others = total
    for choosing in range(2):
        for n in range(graph.shape[0]):
            begin, end = (column(sources[n, 0], i), column(sources[n, 0], i + 1)) if graph[n] >= 0 else (0, 0)
            for e in range(begin, end):
                k = column(sources[n, 1], e)
                share = max(0.0, sign * reach * factor[n] * sent[graph[n], k])
                if share == 0.0 or _told(i, k, slot, layout, seed, via):
                    continue
                if choosing == 0:
                    total += share
                    continue
                found, left = int(k), left - share
                if left <= 0.0:
                    return found
        if choosing == 0:
            left = (float(np.int64(drawn)) + 0.5) / SCALE * total - others
            if left <= 0.0:
                return -1
    return found


@nb.njit(nogil=True, cache=True)
def step(
    part: int,
    low: int,
    high: int,
    stage: NDArray[np.int8],
    frame: Frame,
    day: Day,
    slots: Slots,
    member: NDArray[np.int32],
    after: NDArray[np.int8],
    flows: Ints,
    changed: Ints,
    flips: Flips,
    fresh: Fresh,
) -> int:
    """The actual step of some agents, the flips it offers, and who differs in an alternative from now on.

    Args:
        part: number of the thread.
        low: first agent.
        high: end of the agents.
        stage: [agents].
        frame: the run's.
        day: the step's.
        slots: their `status` is changed where somebody moved.
        member: who differs in which slot.
        after: receives the stages [agents].
        flows: receives transitions [edges, classes].
        changed: receives who moved, from `low` on [agents].
        flips: receives the flips, from `low` on.
        fresh: receives who differs from now on, from `low` · slots of a person on.

    Returns:
        the end of what it wrote to `changed`.
    """
    cells, slot, layout, classes, ids = frame.cells, frame.slot, frame.layout, frame.classes, frame.ids
    network, layer_number, first_cell, first_slot = frame.network, frame.layer, frame.first_cell, frame.first_slot
    alone, first_linear, widths = frame.alone, frame.first_linear, frame.width
    infection_edge, infection_scale, exit_edge = frame.infection_edge, frame.infection_scale, frame.exit_edge
    target, susceptibility = frame.target, frame.susceptibility
    pressure, among, factor, linear = day.pressure, day.among, day.factor, day.linear
    exits, window, exit_weight = day.exit, day.window, day.exit_weight
    code, base, reach, address = day.code, day.base, day.reach, day.address
    status, held, excess, first = slots.status, slots.held, slots.excess, slots.first
    flip_agent, flip_stage, flip_branch = flips.agent, flips.stage, flips.branch
    flip_size, flip_factor, flip_via = flips.size, flips.factor, flips.via
    sent, graphs = day.sent, day.sent.shape[0]
    fresh_agent, fresh_slot, fresh_stage = fresh.agent, fresh.slot, fresh.stage
    networks, layers, branches = cells.shape[0], network.shape[0], exit_edge.shape[1]
    class_count, last = susceptibility.shape[0], linear.shape[1] - 1
    many = classes.shape[0] > 0
    each = 0
    for layer in range(layers):
        each += widths[layer]
    words = np.empty(_CHUNK + 8, dtype=np.uint32)
    bound = np.empty(_CHUNK, dtype=np.int32)
    row = np.empty(_CHUNK, dtype=np.int32)
    maybe = np.empty(_CHUNK + 1, dtype=np.int32)
    hazard, moved, chances = np.empty(_CHUNK), np.empty(_CHUNK), np.empty(_CHUNK)
    c3 = address[1] << np.uint64(16)
    end, flip, new = low, low, low * each
    for start in range(low, high, _CHUNK):
        count = min(_CHUNK, high - start)
        offset = draw(frame.first_id, ids, start, count, address[0], c3, address[2], address[3], words)
        for j in range(count):
            after[start + j] = stage[start + j]
        if many:
            for j in range(count):
                row[j] = stage[start + j] * class_count + classes[start + j]
        else:
            for j in range(count):
                row[j] = stage[start + j]
        for j in range(count):
            bound[j] = 0
        for n in range(networks):
            place, begin = cells[n], first_cell[n]
            for j in range(count):
                bound[j] += code[begin + column(place, start + j)]
        found = 0
        for j in range(count):
            r = row[j]
            maybe[found] = j
            # A byte of 255 has no upper bound.
            found += (np.float64(words[offset + j]) < base[r] + bound[j] * reach[r]) | (
                (bound[j] >= 255) & (reach[r] > 0.0)
            )
        # In loops of their own, which run on whole vectors.
        hazard[:found] = 0.0
        moved[:found] = 0.0
        for n in range(networks):
            place, begin, by = cells[n], first_cell[n], factor[n]
            for m in range(found):
                hazard[m] = hazard[m] + by * pressure[begin + column(place, start + maybe[m])]
            if layer_number[n] < 0:
                begin = first_linear[n]
                for m in range(found):
                    moved[m] += linear[begin + column(place, start + maybe[m]), last]
        for m in range(found):
            i = start + maybe[m]
            total = hazard[m] * susceptibility[np.int64(classes[i]) if many else 0]
            chances[m] = one_minus_exp(total * infection_scale[stage[i]])
        # Ask for their groups' slots, and for who differs there: workplaces are all over the memory.
        for layer in range(layers):
            n = network[layer]
            for m in range(found if n >= 0 else 0):
                one = first_slot[layer] + column(cells[n], start + maybe[m]) * widths[layer]
                fetch(held, one)
                fetch(excess, one)
                fetch(first, one)
                fetch(status, one)
            for m in range(found if n >= 0 else 0):
                cell = column(cells[n], start + maybe[m])
                one = first_slot[layer] + cell * widths[layer]
                for q in range(one, one + widths[layer]):
                    if held[q] > 0 and excess[q] != 0.0:
                        fetch(member, first[q])
                        fetch_float_column(among[n], cell)
        for m in range(found):
            j = maybe[m]
            i = start + j
            s = stage[i]
            c = np.int64(classes[i]) if many else 0
            drawn = np.int64(words[offset + j])
            edge = -1
            if infection_edge[s] >= 0:
                scale, p = infection_scale[s], chances[m]
                limit = np.int64(np.floor(p * SCALE))
                yes = drawn < limit
                to = target[infection_edge[s]]
                if yes:
                    edge = infection_edge[s]
                elif p < 1.0:
                    # d ln(1 − p) by the reference direction, times 1 − p; a window of q offers it at 1/q.
                    reference = moved[m] * susceptibility[c] * scale
                    mass = abs(reference * (1.0 - p) + p)
                    if mass > 0.0:
                        q_window = min(1.0 - p, chance(mass))
                        if drawn < limit + np.int64(np.floor(q_window * SCALE)):
                            flip_agent[flip] = i
                            flip_stage[flip] = to
                            flip_branch[flip] = -1
                            flip_size[flip] = mass / q_window
                            flip_factor[flip] = (1.0 - p) / q_window
                            if graphs > 0:
                                flip_via[flip] = _infector(
                                    i,
                                    word_of(identity_of(frame.first_id, ids, i), address, _INFECTOR_VARIATE),
                                    p,
                                    (1.0 - p) * susceptibility[c] * scale,
                                    1.0 if reference * (1.0 - p) + p > 0.0 else -1.0,
                                    factor,
                                    cells,
                                    layer_number,
                                    first_linear,
                                    linear,
                                    frame.graph,
                                    frame.sources,
                                    sent,
                                    slot,
                                    layout,
                                    slots.seed,
                                    slots.via,
                                )
                            flip += 1
                for layer in range(layers):
                    n = network[layer]
                    if n < 0 or own_slot(slot, layout, layer, i) < 0:
                        continue
                    cell = column(cells[n], i)
                    one = first_slot[layer] + cell * widths[layer]
                    for q in range(one, one + widths[layer]):
                        if held[q] == 0 or excess[q] == 0.0:
                            continue
                        unit = factor[n] / float_column(among[n], cell)
                        other = (hazard[m] + unit * excess[q]) * susceptibility[c] * scale
                        struck = drawn < np.int64(np.floor(one_minus_exp(max(other, 0.0)) * SCALE))
                        if struck == yes:
                            continue
                        known = False
                        for d in range(first[q], first[q] + held[q]):
                            known = known or member[d] == i
                        if not known:
                            fresh_agent[new] = i
                            fresh_slot[new] = q
                            fresh_stage[new] = s if yes else to
                            new += 1
            else:
                to, way = np.int64(-1), 0
                for b in range(branches):
                    if exit_edge[s, b] < 0:
                        break
                    if drawn < exits[s, b, c]:
                        edge = exit_edge[s, b]
                        if window[s, b, c] < 0:
                            to, way = np.int64(s), b
                        break
                if edge < 0:
                    for b in range(branches):
                        if exit_edge[s, b] < 0:
                            break
                        if drawn < window[s, b, c]:
                            to, way = target[exit_edge[s, b]], b
                            break
                if to >= 0:
                    flip = _flip_exit(
                        exit_weight,
                        flip_agent,
                        flip_stage,
                        flip_branch,
                        flip_size,
                        flip_factor,
                        flip_via,
                        flip,
                        i,
                        s,
                        to,
                        way,
                        c,
                    )
            if edge >= 0:
                after[i] = target[edge]
                flows[edge, c] += 1
                changed[end] = i
                end += 1
                for layer in range(layers):
                    q = own_slot(slot, layout, layer, i)
                    if q < 0:
                        continue
                    one, width = q, 1
                    if network[layer] >= 0 and q < alone[layer]:
                        width = widths[layer]
                        one = q - (q - first_slot[layer]) % width
                    for near in range(one, one + width):
                        if held[near] > 0:
                            status[near] |= TOUCHED
    flips.span[part, 0], flips.span[part, 1] = low, flip
    fresh.span[part, 0], fresh.span[part, 1] = low * each, new
    return end


@nb.njit(nogil=True, cache=True)
def decide_start(
    frame: Frame,
    address: NDArray[np.uint64],
    free: NDArray[np.bool_],
    window: Ints,
    stages: Ints,
    size: Floats,
    flips: Flips,
) -> None:
    """Flips of the start: somebody who begins in stage 0 might have begun in another.

    Args:
        frame: the run's.
        address: as `Day.address`.
        free: whose first stage was drawn [agents].
        window: begin of the windows, then the end of each [stages drawn + 1].
        stages: [stages drawn].
        size: reference weight of each [stages drawn].
        flips: receives them; `branch` numbers the stages drawn.
    """
    agents, k = free.shape[0], 0
    words = np.empty(_CHUNK + 8, dtype=np.uint32)
    c3 = address[1] << np.uint64(16)
    for start in range(0, agents, _CHUNK):
        count = min(_CHUNK, agents - start)
        offset = draw(frame.first_id, frame.ids, start, count, address[0], c3, address[2], address[3], words)
        for j in range(count):
            drawn = np.int64(words[offset + j])
            if not free[start + j] or drawn < window[0] or drawn >= window[-1]:
                continue
            for b in range(stages.shape[0]):
                if drawn < window[b + 1]:
                    flips.agent[k] = start + j
                    flips.stage[k] = stages[b]
                    flips.branch[k] = b
                    flips.size[k] = size[b]
                    flips.factor[k] = 0.0
                    if flips.via.shape[0] > 0:
                        flips.via[k] = -1
                    k += 1
                    break
    flips.span[0, 0], flips.span[0, 1] = 0, k

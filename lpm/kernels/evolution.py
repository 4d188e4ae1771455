"""How cluster alternates go on: they step under the actual words, winners take their slots, differences are counted."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.clusters import (
    NOBODY,
    OLD,
    Day,
    Flips,
    Floats,
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

__all__ = ["evolve", "resolve", "scatter_edges", "scatter_groups", "survey"]

_OLD_VARIATES = 32768


@nb.njit(nogil=True, cache=True)
def _meet(
    frame: Frame, day: Day, slots: Slots, q: int, layer: int, i: int, alternative: int, actual: int, drawn: int
) -> int:
    """Where a differing agent who can be infected stands after the step, in a slot's alternative."""
    c = frame.classes[i]
    edge = frame.infection_edge[alternative]
    total = 0.0
    for n in range(frame.cells.shape[1]):
        cell = frame.cells[i, n]
        pressure, share = day.pressure[cell], day.share[cell]
        own = share * (frame.infectivity[n, alternative] - frame.infectivity[n, actual])
        other = frame.layer[n]
        if other == layer:
            pressure += share * slots.excess[q]
        elif other < 0:
            pressure += own
        elif slots.seed[q] == i:
            # What the seed meets in the source's layer is the source's alternative, as long as that stands.
            source = slots.source[q, other]
            if source >= 0 and slots.link[q, other] == slots.generation[source]:
                pressure += share * slots.excess[source]
            else:
                pressure = 0.0
        else:
            away = frame.slot[i, other]
            if (
                away >= 0
                and slots.seed[away] == i
                and slots.imported[away] == 1
                and slots.source[away, layer] == q
                and slots.link[away, layer] == slots.generation[q]
            ):
                pressure += share * slots.excess[away]
            else:
                pressure += own
        total = total + day.factor[n] * max(pressure, 0.0)
    total = total * frame.susceptibility[c]
    total = total * frame.infection_scale[alternative]
    return int(frame.target[edge]) if drawn < threshold(total) else alternative


@nb.njit(nogil=True, cache=True)
def _count_flow(edge_of: Ints, c: int, flow: Floats, weight: Floats, q: int, source: int, to: int, sign: float) -> None:
    if source != to:
        e = edge_of[source, to]
        for k in range(flow.shape[2]):
            flow[e, c, k] += sign * weight[q, k]


@nb.njit(nogil=True, cache=True)
def _uncounted(seed: int, imported: int, layer: int) -> int:
    """Whose difference doesn't count, or −1: a seed counts only in the first layer, and only where it began."""
    return seed if layer > 0 or imported == 1 else -1


@nb.njit(nogil=True, cache=True)
def evolve(
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    words: NDArray[np.uint64],
    frame: Frame,
    day: Day,
    slots: Slots,
    active: NDArray[np.int32],
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    fresh: Fresh,
    new_member: NDArray[np.int32],
    new_alternative: NDArray[np.int8],
    flow: Floats,
    touched: NDArray[np.int32],
    count: int,
) -> tuple[int, int]:
    """Every alternative steps under the same random words; returns the length of the lists and the slots touched.

    Args:
        flow: derivatives of the transitions [edges, classes, P].
        touched: slots in which something competes; so far `count`.
    """
    used = 0
    last = slots.weight.shape[1] - 1
    first, held, head, ids = slots.first, slots.held, slots.head, frame.ids
    infection_edge, exit_edge, first_slot = frame.infection_edge, frame.exit_edge, frame.first_slot
    total, best, winner, weight = slots.total, slots.best, slots.winner, slots.weight
    edge_of, classes, target, exits = frame.edge_of, frame.classes, frame.target, day.exit
    width, address, seed, imported = frame.width, day.address, slots.seed, slots.imported
    for a in range(active.shape[0]):
        q = active[a]
        layer = layer_of(first_slot, q)
        begin = used
        smallest = -1
        uncounted = _uncounted(seed[q], imported[q], layer)
        for m in range(first[q], first[q] + held[q]):
            i, old = member[m], alternative[m]
            new = old
            # Whoever has nothing left to decide, most of those who differ late in an epidemic, costs no call.
            if infection_edge[old] >= 0:
                new = _meet(frame, day, slots, q, layer, i, old, stage[i], np.int64(words[i]))
            else:
                for b in range(exit_edge.shape[1]):
                    if exit_edge[old, b] < 0:
                        break
                    if np.int64(words[i]) < exits[old, b, classes[i]]:
                        new = target[exit_edge[old, b]]
                        break
            if i != uncounted and (old != new or stage[i] != after[i]):
                _count_flow(edge_of, classes[i], flow, weight, q, old, new, 1.0)
                _count_flow(edge_of, classes[i], flow, weight, q, stage[i], after[i], -1.0)
            if new != after[i]:
                new_member[used] = i
                new_alternative[used] = new
                used += 1
                if smallest < 0 or ids[i] < ids[smallest]:
                    smallest = i
        k = head[q]
        head[q] = -1
        while k >= 0:
            i, new = fresh.agent[k], fresh.stage[k]
            if i != uncounted:
                _count_flow(edge_of, classes[i], flow, weight, q, stage[i], new, 1.0)
                _count_flow(edge_of, classes[i], flow, weight, q, stage[i], after[i], -1.0)
            new_member[used] = i
            new_alternative[used] = new
            used += 1
            if smallest < 0 or ids[i] < ids[smallest]:
                smallest = i
            k = fresh.following[k]
        first[q] = begin
        held[q] = used - begin
        size = abs(weight[q, last])
        if used > begin and size > 0.0:
            variate = _OLD_VARIATES + layer * 64 + (q - first_slot[layer]) % width[layer]
            key = race(ids[smallest], address, variate, size)
            count = compete(total, best, winner, touched, count, q, OLD, size, key)
        elif total[q] == 0.0:
            touched[count] = q
            count += 1
    return used, count


@nb.njit(nogil=True, cache=True)
def _flip_weight(stage: NDArray[np.int8], frame: Frame, day: Day, flips: Flips, k: int, to: Floats) -> None:
    """Weights of a direct flip, by parameter and for the reference."""
    i, b = flips.agent[k], flips.branch[k]
    last = to.shape[0] - 1
    c = frame.classes[i]
    if b >= 0:
        s = int(flips.factor[k])
        for x in range(last + 1):
            to[x] = day.exit_weight[s, b, c, x]
        return
    for x in range(last + 1):
        to[x] = 0.0
    for n in range(frame.cells.shape[1]):
        cell = frame.cells[i, n]
        for x in range(last):
            to[x] += day.factor_dot[n, x] * day.pressure[cell]
        if frame.layer[n] < 0:
            row = cell - frame.first_cell[n] + frame.first_linear[n]
            for x in range(last + 1):
                to[x] += day.linear[row, x]
    scale = frame.susceptibility[c] * frame.infection_scale[stage[i]]
    for x in range(last + 1):
        to[x] *= scale * flips.factor[k]
    # The reference raises the probability itself too: p/(1 − p) beside the linear networks' part.
    total = hazard(frame, day, i) * frame.susceptibility[c]
    p = _one_minus_exp(total * frame.infection_scale[stage[i]])
    to[last] += flips.factor[k] * p / (1.0 - p)


@nb.njit(nogil=True, cache=True)
def resolve(
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    touched: NDArray[np.int32],
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    used: int,
    imports: Floats,
    flow: Floats,
    active: NDArray[np.int32],
) -> int:
    """The winners take their slots; returns how many slots are active now.

    Args:
        imports: room for the weights of imported alternatives, taken before any weight changes [touched, P + 1].
        active: receives the active slots, in the order of `touched`.
    """
    width = slots.weight.shape[1]
    weight, edge_of, classes = slots.weight, frame.edge_of, frame.classes
    direct = flips.length[0]
    for a in range(touched.shape[0]):
        q = touched[a]
        if slots.winner[q] >= direct:
            k = slots.winner[q] - direct
            size = abs(slots.weight[fresh.slot[k], width - 1])
            for x in range(width):
                imports[a, x] = slots.weight[fresh.slot[k], x] * (slots.total[q] / size)
    found = 0
    for a in range(touched.shape[0]):
        q = touched[a]
        w = slots.winner[q]
        layer = layer_of(frame.first_slot, q)
        if w == NOBODY:
            slots.generation[q] += 1
            slots.seed[q] = -1
            slots.held[q] = 0
            slots.excess[q] = 0.0
            continue
        active[found] = q
        found += 1
        if w == OLD:
            ratio = slots.total[q] / abs(slots.weight[q, width - 1])
            for x in range(width):
                slots.weight[q, x] *= ratio
            continue
        slots.generation[q] += 1
        slots.first[q] = used
        slots.held[q] = 1
        if w < direct:
            i = flips.agent[w]
            _flip_weight(stage, frame, day, flips, w, slots.weight[q])
            ratio = slots.total[q] / flips.size[w]
            for x in range(width):
                slots.weight[q, x] *= ratio
            slots.imported[q] = 0
            alternative[used] = flips.stage[w]
            if layer == 0:
                _count_flow(edge_of, classes[i], flow, weight, q, stage[i], flips.stage[w], 1.0)
                _count_flow(edge_of, classes[i], flow, weight, q, stage[i], after[i], -1.0)
            for other in range(slots.source.shape[1]):
                slots.source[q, other] = frame.slot[i, other] if other != layer else -1
        else:
            k = w - direct
            i = fresh.agent[k]
            for x in range(width):
                slots.weight[q, x] = imports[a, x]
            slots.imported[q] = 1
            alternative[used] = fresh.stage[k]
            origin = layer_of(frame.first_slot, fresh.slot[k])
            for other in range(slots.source.shape[1]):
                slots.source[q, other] = frame.slot[i, other] if other != layer else -1
            if slots.source.shape[1] > 0:
                slots.source[q, origin] = fresh.slot[k]
        slots.seed[q] = i
        member[used] = i
        used += 1
    for a in range(touched.shape[0]):
        q = touched[a]
        w = slots.winner[q]
        if w < 0:
            continue
        layer = layer_of(frame.first_slot, q)
        for other in range(slots.link.shape[1]):
            source = slots.source[q, other]
            slots.link[q, other] = -1
            if source < 0:
                continue
            theirs = slots.winner[source]
            if w >= direct and source == fresh.slot[w - direct]:
                stands = theirs == OLD
            elif w >= direct:
                stands = theirs >= direct and slots.seed[source] == slots.seed[q]
                stands = stands and fresh.slot[theirs - direct] == fresh.slot[w - direct]
            else:
                stands = theirs == w
            if stands:
                slots.link[q, other] = slots.generation[source]
    return found


@nb.njit(nogil=True, cache=True)
def survey(
    after: NDArray[np.int8],
    frame: Frame,
    slots: Slots,
    active: NDArray[np.int32],
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    touched: NDArray[np.int32],
    count: Floats,
) -> None:
    """What the alternatives hold after the step: their infectivity, and derivatives of people per stage.

    Args:
        count: derivatives [stages, classes, P].
        touched: slots whose competition is over.
    """
    for a in range(touched.shape[0]):
        q = touched[a]
        slots.total[q] = 0.0
        slots.winner[q] = NOBODY
    first, held, seed, imported, weight = slots.first, slots.held, slots.seed, slots.imported, slots.weight
    infectivity, classes, first_slot = frame.infectivity, frame.classes, frame.first_slot
    for a in range(active.shape[0]):
        q = active[a]
        layer = layer_of(first_slot, q)
        n = frame.network[layer]
        uncounted = _uncounted(seed[q], imported[q], layer)
        excess = 0.0
        for m in range(first[q], first[q] + held[q]):
            i, s = member[m], alternative[m]
            if n >= 0:
                excess += infectivity[n, s] - infectivity[n, after[i]]
            if i != uncounted:
                c = classes[i]
                for k in range(count.shape[2]):
                    count[s, c, k] += weight[q, k]
                    count[after[i], c, k] -= weight[q, k]
        slots.excess[q] = excess


@nb.njit(nogil=True, cache=True)
def scatter_groups(
    stage: NDArray[np.int8],
    frame: Frame,
    slots: Slots,
    active: NDArray[np.int32],
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    n: int,
    total: Floats,
) -> None:
    """Derivatives and reference of a linear network's infectivity sums [cells, P + 1]."""
    first, held, infectivity, first_slot = slots.first, slots.held, frame.infectivity, frame.first_slot
    seed, imported, weight = slots.seed, slots.imported, slots.weight
    cells, begin = frame.cells, frame.first_cell[n]
    for a in range(active.shape[0]):
        q = active[a]
        uncounted = _uncounted(seed[q], imported[q], layer_of(first_slot, q))
        for m in range(first[q], first[q] + held[q]):
            i = member[m]
            d = infectivity[n, alternative[m]] - infectivity[n, stage[i]]
            if d != 0.0 and i != uncounted:
                cell = cells[i, n] - begin
                for x in range(total.shape[1]):
                    total[cell, x] += d * weight[q, x]


@nb.njit(nogil=True, cache=True)
def scatter_edges(
    stage: NDArray[np.int8],
    frame: Frame,
    slots: Slots,
    active: NDArray[np.int32],
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    n: int,
    offsets: Ints,
    readers: Ints,
    total: Floats,
) -> None:
    """The same for edges: everybody who reads a differing agent."""
    for a in range(active.shape[0]):
        q = active[a]
        uncounted = _uncounted(slots.seed[q], slots.imported[q], layer_of(frame.first_slot, q))
        for m in range(slots.first[q], slots.first[q] + slots.held[q]):
            i = member[m]
            d = frame.infectivity[n, alternative[m]] - frame.infectivity[n, stage[i]]
            if d != 0.0 and i != uncounted:
                for e in range(offsets[i], offsets[i + 1]):
                    for x in range(total.shape[1]):
                        total[readers[e], x] += d * slots.weight[q, x]

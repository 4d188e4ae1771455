"""The loops of cluster alternates (`lpm.kernels.alternates`): numba, compiled on first use and cached on disk.

Only agents near an infection cost more than a plain day. An agent's decision word says "yes" below its probability p;
the words just above it, a window of q, offer the flip "infected after all" with weight ṗ/q. So the dense loop reads the
same tables as a plain one and merely compares with a larger bound, and all else runs over short lists.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.cpu import _one_minus_exp
from lpm.philox import word

__all__ = [
    "Day",
    "Flips",
    "Frame",
    "Fresh",
    "Slots",
    "decide",
    "decide_start",
    "evolve",
    "near",
    "offer",
    "resolve",
    "scatter_edges",
    "scatter_groups",
    "survey",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FLOOR = 0.05
"""Smallest size of an offered flip: a smaller one, n, is offered with probability n/FLOOR at 1/that weight."""

_SCALE = 4294967296.0
_NOBODY, _OLD = -2, -1
_OLD_VARIATES = 32768


class Frame(NamedTuple):
    """What does not change in a run.

    Attributes:
        cells: cell of each agent in each network, networks numbered one after another [agents, networks].
        slot: the agent's slot in each layer, −1 for none [agents, layers].
        classes: [agents].
        ids: [agents].
        network: the network of each layer, −1 for the layer of single people [layers].
        layer: the layer of each network, −1 for linear ones [networks].
        first_cell: where a network's cells begin [networks].
        first_slot: where a layer's slots begin [layers + 1].
        first_linear: where a linear network's cells begin among those of linear networks [networks].
        width: slots per group [layers].
        infectivity: [networks, stages].
        infection_edge: or −1 [stages].
        infection_scale: [stages].
        exit_edge: or −1 [stages, branches].
        advance: 1 where leaving adds infectiousness or an outcome, 0 where it takes some [stages, branches].
        edge_of: transition from one stage to another, or −1 [stages, stages].
        target: [edges].
        susceptibility: [classes].
    """

    cells: NDArray[np.int32]
    slot: NDArray[np.int32]
    classes: Ints
    ids: NDArray[np.uint64]
    network: Ints
    layer: Ints
    first_cell: Ints
    first_slot: Ints
    first_linear: Ints
    width: Ints
    infectivity: Floats
    infection_edge: Ints
    infection_scale: Floats
    exit_edge: Ints
    advance: Ints
    edge_of: Ints
    target: Ints
    susceptibility: Floats


class Day(NamedTuple):
    """What a step needs, of one lane.

    Attributes:
        pressure: infectious pressure in each cell [cells].
        share: pressure from one unit of infectivity of a member [cells].
        factor: hazard per unit of pressure [networks].
        factor_dot: its derivatives [networks, P].
        linear: derivatives and reference (last) of the hazard in cells of linear networks [linear cells, P + 1].
        exit: thresholds [stages, branches, classes].
        window: ends of the windows in which a flip is offered [stages, branches, classes].
        exit_weight: derivatives and reference (last) of a flip [stages, branches, classes, P + 1].
        address: step + 1, protocol number, and the two words of the seed [4].
    """

    pressure: Floats
    share: Floats
    factor: Floats
    factor_dot: Floats
    linear: Floats
    exit: Ints
    window: Ints
    exit_weight: Floats
    address: NDArray[np.uint64]


class Slots(NamedTuple):
    """The alternatives of one lane, one per slot.

    Attributes:
        weight: by parameter, the reference last [slots, P + 1].
        excess: infectivity in the own layer less the actual one [slots].
        first: where the list of differing agents begins [slots].
        held: how many they are; 0 for an empty slot [slots].
        seed: the agent it began with, or −1 [slots].
        imported: whether the seed came from another layer [slots].
        generation: grows when the alternative is replaced [slots].
        source: slot of each layer in which the seed differs too, or −1 [slots, layers].
        link: that slot's generation then, or −1 [slots, layers].
        total: sizes of the alternatives that compete [slots].
        best: smallest key among them [slots].
        winner: which has it [slots].
        head: first fresh difference, or −1 [slots].
    """

    weight: Floats
    excess: Floats
    first: Ints
    held: NDArray[np.int32]
    seed: NDArray[np.int32]
    imported: NDArray[np.int8]
    generation: NDArray[np.int32]
    source: NDArray[np.int32]
    link: NDArray[np.int32]
    total: Floats
    best: Floats
    winner: NDArray[np.int32]
    head: NDArray[np.int32]


class Flips(NamedTuple):
    """Decisions of this step that could have come out otherwise.

    Attributes:
        agent: who [flips].
        stage: where they would be now [flips].
        branch: −1 for an infection, else which exit [flips].
        size: |reference weight| [flips].
        factor: of the derivatives of the hazard (infections) [flips].
        length: how many there are [1].
    """

    agent: NDArray[np.int32]
    stage: NDArray[np.int8]
    branch: NDArray[np.int8]
    size: Floats
    factor: Floats
    length: Ints


class Fresh(NamedTuple):
    """Agents who differ in a slot from this step on.

    Attributes:
        agent: who [fresh].
        slot: where [fresh].
        stage: the alternative one [fresh].
        following: next of the same slot, or −1 [fresh].
        length: how many there are [1].
    """

    agent: NDArray[np.int32]
    slot: NDArray[np.int32]
    stage: NDArray[np.int8]
    following: NDArray[np.int32]
    length: Ints


# Functions that run once per slot or agent take arrays, not the tuples above: a call counts references to every array
# of a tuple, which costs more than what the function does.


@nb.njit(nogil=True, cache=True)
def _race(identity: np.uint64, address: NDArray[np.uint64], variate: int, size: float) -> float:
    """The key of a candidate: the smallest of several wins with probability ∝ its size, in any order."""
    chosen = word(identity, address[0], address[1] << np.uint64(16) | np.uint64(variate), address[2], address[3])
    return float(-np.log((float(chosen) + 0.5) / _SCALE) / size)


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
def _hazard(frame: Frame, day: Day, i: int) -> float:
    """The actual hazard of somebody fully susceptible, in the plain executor's order."""
    total = 0.0
    for n in range(frame.cells.shape[1]):
        total = total + day.factor[n] * day.pressure[frame.cells[i, n]]
    return total


@nb.njit(nogil=True, cache=True)
def _threshold(total: float) -> int:
    return int(np.floor(_one_minus_exp(total) * _SCALE))


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
            base = _hazard(frame, day, i)
            scale = frame.infection_scale[s]
            total = base * frame.susceptibility[c]
            total = total * scale
            p = _one_minus_exp(total)
            threshold = np.int64(np.floor(p * _SCALE))
            yes = drawn < threshold
            to = frame.target[frame.infection_edge[s]]
            if yes:
                after[i] = to
                flows[frame.infection_edge[s], c] += 1
            elif p < 1.0:
                # d ln(1 − p) by the reference direction, times 1 − p; a window of q offers it at 1/q.
                reference = _linear_reference(frame, day, i) * frame.susceptibility[c] * scale
                mass = abs(reference * (1.0 - p) + p)
                q = min(1.0 - p, mass / FLOOR)
                if mass > 0.0 and drawn < threshold + np.int64(np.floor(q * _SCALE)):
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
                    if (drawn < _threshold(max(other, 0.0))) == yes:
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
def _compete(
    total: Floats,
    best: Floats,
    winner: NDArray[np.int32],
    touched: NDArray[np.int32],
    count: int,
    q: int,
    candidate: int,
    size: float,
    key: float,
) -> int:
    if winner[q] == _NOBODY and total[q] == 0.0:
        touched[count] = q
        count += 1
        best[q] = np.inf
    total[q] += size
    if key < best[q]:
        best[q] = key
        winner[q] = candidate
    return count


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
                key = _race(ids[i], address, 1 + layer, flips.size[k])
                count = _compete(total, best, winner, touched, count, q, k, flips.size[k], key)
    last = slots.weight.shape[1] - 1
    for k in range(fresh.length[0]):
        i, origin = fresh.agent[k], fresh.slot[k]
        size = abs(slots.weight[origin, last])
        if size == 0.0:
            continue
        home = _layer_of(first_slot, origin)
        sub = (origin - first_slot[home]) % width[home]
        for layer in range(layers):
            q = slot[i, layer]
            if layer != home and q >= 0:
                variate = 1 + layers + (home * widest + sub) * layers + layer
                key = _race(ids[i], address, variate, size)
                count = _compete(total, best, winner, touched, count, q, flips.length[0] + k, size, key)
    return count


@nb.njit(nogil=True, cache=True)
def _layer_of(first_slot: Ints, q: int) -> int:
    layer = 0
    while q >= first_slot[layer + 1]:
        layer += 1
    return layer


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
    return int(frame.target[edge]) if drawn < _threshold(total) else alternative


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
        layer = _layer_of(first_slot, q)
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
            key = _race(ids[smallest], address, variate, size)
            count = _compete(total, best, winner, touched, count, q, _OLD, size, key)
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
    total = _hazard(frame, day, i) * frame.susceptibility[c]
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
        layer = _layer_of(frame.first_slot, q)
        if w == _NOBODY:
            slots.generation[q] += 1
            slots.seed[q] = -1
            slots.held[q] = 0
            slots.excess[q] = 0.0
            continue
        active[found] = q
        found += 1
        if w == _OLD:
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
            origin = _layer_of(frame.first_slot, fresh.slot[k])
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
        layer = _layer_of(frame.first_slot, q)
        for other in range(slots.link.shape[1]):
            source = slots.source[q, other]
            slots.link[q, other] = -1
            if source < 0:
                continue
            theirs = slots.winner[source]
            if w >= direct and source == fresh.slot[w - direct]:
                stands = theirs == _OLD
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
        slots.winner[q] = _NOBODY
    first, held, seed, imported, weight = slots.first, slots.held, slots.seed, slots.imported, slots.weight
    infectivity, classes, first_slot = frame.infectivity, frame.classes, frame.first_slot
    for a in range(active.shape[0]):
        q = active[a]
        layer = _layer_of(first_slot, q)
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
        uncounted = _uncounted(seed[q], imported[q], _layer_of(first_slot, q))
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
        uncounted = _uncounted(slots.seed[q], slots.imported[q], _layer_of(frame.first_slot, q))
        for m in range(slots.first[q], slots.first[q] + slots.held[q]):
            i = member[m]
            d = frame.infectivity[n, alternative[m]] - frame.infectivity[n, stage[i]]
            if d != 0.0 and i != uncounted:
                for e in range(offsets[i], offsets[i + 1]):
                    for x in range(total.shape[1]):
                        total[readers[e], x] += d * slots.weight[q, x]

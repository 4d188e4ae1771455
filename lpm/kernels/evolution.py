"""How cluster alternates go on: they step under the actual words, and winners take their slots."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import Addresses, column, fetch, fetch_byte_column, fetch_column, float_column
from lpm.kernels.clusters import (
    BARE,
    GONE,
    HELD,
    NOBODY,
    NOWHERE,
    OLD,
    SCALE,
    TOUCHED,
    Day,
    Flips,
    Floats,
    Frame,
    Fresh,
    Ints,
    Outcome,
    Part,
    Slots,
    active,
    identity_of,
    key_of,
    layer_of,
    own_slot,
    race,
)
from lpm.kernels.decisions import one_minus_exp
from lpm.kernels.differences import LIST, PEOPLE, PLACE, fetch_list, uncounted_seed
from lpm.philox import philox

__all__ = ["evolve", "link", "offer", "resolve", "unlink"]

_OLD_VARIATES = 32768
_NO_BLOCK = np.uint64(1 << 63)

Words = tuple[np.uint64, np.uint64, np.uint64, np.uint64]


@nb.njit(**BARE, inline="always")
def _among(other: int, layer: int) -> int:
    """The column of another layer in what slots of a layer keep of each."""
    return other - 1 if other > layer else other


@nb.njit(**BARE, inline="always")
def _origin(slot: Addresses, layout: Ints, apart: NDArray[np.int8], q: int, layer: int, other: int, i: int) -> int:
    """The slot of another layer in which the seed i of slot q differs too, or −1."""
    away = apart[q, _among(other, layer)]
    return -1 if away == NOWHERE else own_slot(slot, layout, other, i) + away


@nb.njit(**BARE, inline="always")
def _block(block: np.uint64, counter: np.uint64, address: NDArray[np.uint64]) -> Words:
    """The words of four neighbouring ids."""
    lower, upper = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
    found: Words = philox(lower, upper, address[0], counter, address[2], address[3])
    return found


@nb.njit(**BARE, inline="always")
def _of_block(words: Words, identity: np.uint64) -> np.uint64:
    place = identity & np.uint64(3)
    return words[0] if place == 0 else words[1] if place == 1 else words[2] if place == 2 else words[3]


@nb.njit(**BARE, inline="always")
def _add(to: Floats, run: int, row: int, c: int, weight: Floats, q: int, by: float) -> None:
    for k in range(to.shape[3]):
        to[run, row, c, k] += by * weight[q, k]


@nb.njit(**BARE, inline="always")
def _move(
    edge_of: Ints,
    flow: Floats,
    count: Floats,
    run: int,
    c: int,
    weight: Floats,
    q: int,
    source: int,
    to: int,
    by: float,
) -> None:
    """Count a transition of somebody who differs, or take away the one that they don't make."""
    if source != to:
        e = edge_of[source, to]
        if e >= 0:
            _add(flow, run, e, c, weight, q, by)
        _add(count, run, to, c, weight, q, by)
        _add(count, run, source, c, weight, q, -by)


@nb.njit(**BARE)
def offer(part: Part, frame: Frame, day: Day, slots: Slots, flips: Flips, fresh: Fresh) -> None:
    """Offer flips to the agent's slot in every layer, fresh differences to those in the other layers.

    Args:
        part: the slots that are offered something.
        frame: the run's.
        day: the step's.
        slots: their `winner` becomes the last offer, and their `status` says so.
        flips: of the step.
        fresh: of the step.
    """
    layers, last, address = frame.network.shape[0], slots.weight.shape[1] - 1, day.address
    low, high = part.low, part.high
    slot, layout, first_slot, ids, first_id = frame.slot, frame.layout, frame.first_slot, frame.ids, frame.first_id
    winner, weight, status = slots.winner, slots.weight, slots.status
    agent, before, word, span = flips.agent, flips.following, flips.chosen, flips.span
    for layer in range(layers):
        # There are many flips, in the order of agents: neighbours share a block of random words.
        counter = address[1] << np.uint64(16) | np.uint64(1 + layer)
        block, words = _NO_BLOCK, (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        for t in range(span.shape[0]):
            for k in range(span[t, 0], span[t, 1]):
                i = agent[k]
                q = own_slot(slot, layout, layer, i)
                if q < low[layer] or q >= high[layer]:
                    continue
                identity = identity_of(first_id, ids, i)
                if identity >> np.uint64(2) != block:
                    block = identity >> np.uint64(2)
                    words = _block(block, counter, address)
                word[k, layer] = _of_block(words, identity)
                before[k, layer] = winner[q]
                winner[q] = k
                status[q] |= TOUCHED
    newcomer, where, following, direct = fresh.agent, fresh.slot, fresh.following, agent.shape[0]
    for t in range(fresh.span.shape[0]):
        for k in range(fresh.span[t, 0], fresh.span[t, 1]):
            i, origin = newcomer[k], where[k]
            home = layer_of(first_slot, origin)
            lasts = weight[origin, last] != 0.0
            for layer in range(layers):
                q = origin if layer == home else own_slot(slot, layout, layer, i)
                if q >= low[layer] and q < high[layer] and (lasts or layer == home):
                    following[k, layer] = winner[q]
                    winner[q] = direct + k
                    status[q] |= TOUCHED


@nb.njit(**BARE, inline="always")
def _fetch_reference(q: int, weight: Floats) -> None:
    """Ask for a slot's reference weight, the last of its weights."""
    fetch(weight, (q + 1) * weight.shape[1] - 1)


@nb.njit(**BARE, inline="always")
def _fetch_offer(one: int, flips: Flips, fresh: Fresh) -> None:
    """Ask for an offer to a slot, if there is one."""
    direct = flips.agent.shape[0]
    if one >= direct:
        fetch(fresh.agent, one - direct)
        fetch(fresh.slot, one - direct)
        fetch(fresh.following, (one - direct) * fresh.following.shape[1])
    elif one >= 0:
        fetch(flips.size, one)
        fetch(flips.chosen, one * flips.chosen.shape[1])
        fetch(flips.following, one * flips.chosen.shape[1])


@nb.njit(**BARE, inline="always")
def _fetch_winner(w: int, flips: Flips, fresh: Fresh) -> None:
    """Ask for what an offer brings, if it has won."""
    direct = flips.agent.shape[0]
    if w >= direct:
        fetch(fresh.agent, w - direct)
        fetch(fresh.stage, w - direct)
    elif w >= 0:
        fetch(flips.agent, w)
        fetch(flips.stage, w)
        fetch(flips.branch, w)
        fetch(flips.factor, w)


@nb.njit(**BARE, inline="always")
def _fetch_slot(slot: Addresses, layer: int, i: int) -> None:
    """Ask for what tells somebody's slot in a layer."""
    fetch_column(slot[layer, 0], i)
    fetch_byte_column(slot[layer, 1], i)


@nb.njit(**BARE, inline="always")
def _fetch_person(i: int, stage: NDArray[np.int8], after: NDArray[np.int8], frame: Frame) -> None:
    """Ask for somebody's stage, cells and slots."""
    fetch(stage, i)
    fetch(after, i)
    for n in range(frame.cells.shape[0]):
        fetch_column(frame.cells[n], i)
    for layer in range(frame.slot.shape[0]):
        _fetch_slot(frame.slot, layer, i)


@nb.njit(**BARE, inline="always")
def _fetch_pressure(i: int, frame: Frame, pressure: Floats) -> None:
    """Ask for the pressure where somebody is."""
    for n in range(frame.cells.shape[0]):
        fetch(pressure, frame.first_cell[n] + column(frame.cells[n], i))


@nb.njit(**BARE, inline="always")
def _stands_with(slots: Slots, q: int, layer: int, other: int, origin: int) -> bool:
    """Whether the slot of another layer still holds what slot q was linked to."""
    return bool(slots.link[q, _among(other, layer)] == slots.generation[origin])


@nb.njit(**BARE, inline="always")
def _felt(i: int, old: int, actual: int, layer: int, q: int, frame: Frame, day: Day, slots: Slots) -> float:
    """The hazard that somebody meets in the alternative of a slot, before their own factors.

    Args:
        i: who.
        old: their stage there.
        actual: their stage in truth.
        layer: of the slot.
        q: the slot.
        frame: the run's.
        day: the step's.
        slots: all slots.
    """
    slot, layout, seed = frame.slot, frame.layout, slots.seed
    felt = 0.0
    for n in range(frame.cells.shape[0]):
        cell = column(frame.cells[n], i)
        there = day.pressure[frame.first_cell[n] + cell]
        other = frame.layer[n]
        # The difference from the actual sum that the agent meets.
        more = frame.infectivity[n, old] - frame.infectivity[n, actual]
        if other == layer:
            more = slots.excess[q]
        elif other >= 0 and seed[q] == i:
            # What the seed meets in the source's layer is the source's alternative, while that stands.
            origin = _origin(slot, layout, slots.apart, q, layer, other, i)
            if origin >= 0 and _stands_with(slots, q, layer, other, origin):
                more = slots.excess[origin]
            else:
                there = more = 0.0
        elif other >= 0:
            away = own_slot(slot, layout, other, i)
            if (
                away >= 0
                and seed[away] == i
                and slots.imported[away] == 1
                and _origin(slot, layout, slots.apart, away, other, layer, i) == q
                and _stands_with(slots, away, other, layer, q)
            ):
                more = slots.excess[away]
        if more != 0.0:
            there += more / float_column(day.among[n], cell)
        felt = felt + day.factor[n] * max(there, 0.0)
    return felt


@nb.njit(**BARE, inline="always")
def _earlier(one: int, layer: int, flips: Flips, fresh: Fresh) -> int:
    """The offer before this one to the same slot of a layer, or −1."""
    direct = flips.agent.shape[0]
    return int(flips.following[one, layer] if one < direct else fresh.following[one - direct, layer])


@nb.njit(**BARE, inline="always")
def _best_offer(
    q: int, layer: int, widest: int, frame: Frame, day: Day, slots: Slots, flips: Flips, fresh: Fresh
) -> tuple[float, float, int]:
    """The race of all that is offered to a slot, but for what happened in it: sum of the sizes, best key and whose."""
    layers, last, direct = frame.network.shape[0], slots.weight.shape[1] - 1, flips.agent.shape[0]
    total, best, w = 0.0, np.inf, NOBODY
    one = slots.winner[q]
    while one >= 0:
        large, key = 0.0, np.inf
        if one < direct:
            large = flips.size[one]
            key = key_of(flips.chosen[one, layer], large)
        elif fresh.slot[one - direct] != q:
            origin = fresh.slot[one - direct]
            home = layer_of(frame.first_slot, origin)
            sub = (origin - frame.first_slot[home]) % frame.width[home]
            variate = 1 + layers + (home * widest + sub) * layers + layer
            large = abs(slots.weight[origin, last])
            key = race(identity_of(frame.first_id, frame.ids, fresh.agent[one - direct]), day.address, variate, large)
        if large > 0.0:
            total += large
            if key < best:
                best, w = key, int(one)
        one = _earlier(one, layer, flips, fresh)
    return total, best, w


@nb.njit(**BARE)
def evolve(
    part: Part,
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    used: int,
    outcome: Outcome,
    flow: Floats,
    count: Floats,
) -> int:
    """What slots hold steps under the same words, and offers compete for them.

    Args:
        part: the slots that step.
        stage: actual, before [agents].
        after: actual, after [agents].
        frame: the run's.
        day: the step's.
        slots: their lists step; `winner` says who has them from now on.
        flips: of the step.
        fresh: of the step.
        member: lists of who differs.
        alternative: where they are.
        used: end of the lists of these slots.
        outcome: receives how they were competed for; no weight changes yet.
        flow: derivatives of transitions [runs, edges, classes, P].
        count: derivatives of people [runs, stages, classes, P].

    Returns:
        the end of the lists.
    """
    layers, last = frame.network.shape[0], slots.weight.shape[1] - 1
    ids, first_id, classes, first_slot, width = frame.ids, frame.first_id, frame.classes, frame.first_slot, frame.width
    infection_edge, infection_scale, exit_edge = frame.infection_edge, frame.infection_scale, frame.exit_edge
    edge_of, target, susceptibility = frame.edge_of, frame.target, frame.susceptibility
    pressure, exits, address = day.pressure, day.exit, day.address
    first, held, winner, weight, status = slots.first, slots.held, slots.winner, slots.weight, slots.status
    seed, imported = slots.seed, slots.imported
    many = classes.shape[0] > 0
    size, direct, widest = flips.size, flips.agent.shape[0], 0
    for layer in range(layers):
        widest = max(widest, width[layer])
    newcomer, where, fresh_stage = fresh.agent, fresh.slot, fresh.stage
    ratios, imports = outcome.ratio, outcome.imports
    contests, taken = 0, 0
    # The words of the actual step, which everybody here had too; neighbours share a block.
    block, words = _NO_BLOCK, (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
    for s in range(part.stretch.shape[0]):
        layer, run = part.stretch[s, 0], part.stretch[s, 1]
        found = active(part.stretch[s, 2], part.stretch[s, 3], status, part.room)
        if s == 0 or layer != part.stretch[s - 1, 0]:
            outcome.begin[layer] = contests
        for a in range(found):
            if a + LIST < found:
                soon = part.room[a + LIST]
                _fetch_reference(soon, weight)
                fetch_list(soon, slots, member, alternative)
                _fetch_offer(winner[soon], flips, fresh)
            if a + PEOPLE < found:
                soon = part.room[a + PEOPLE]
                for m in range(first[soon], first[soon] + held[soon]):
                    _fetch_person(member[m], stage, after, frame)
                if winner[soon] >= direct:
                    _fetch_reference(where[winner[soon] - direct], weight)
            if a + PLACE < found:
                soon = part.room[a + PLACE]
                for m in range(first[soon], first[soon] + held[soon]):
                    _fetch_pressure(member[m], frame, pressure)
            q = part.room[a]
            uncounted = uncounted_seed(seed, imported, layer, q)
            begin, end = first[q], first[q]
            smallest = np.int64(-1)
            for m in range(begin, begin + held[q]):
                i, old = member[m], alternative[m]
                c = np.int64(classes[i]) if many else 0
                new = np.int64(old)
                identity = identity_of(first_id, ids, i)
                if identity >> np.uint64(2) != block:
                    block = identity >> np.uint64(2)
                    words = _block(block, address[1] << np.uint64(16), address)
                drawn = np.int64(_of_block(words, identity))
                if infection_edge[old] >= 0:
                    felt = _felt(i, old, stage[i], layer, q, frame, day, slots)
                    felt = felt * susceptibility[c]
                    felt = felt * infection_scale[old]
                    if drawn < np.int64(np.floor(one_minus_exp(felt) * SCALE)):
                        new = target[infection_edge[old]]
                else:
                    for b in range(exit_edge.shape[1]):
                        if exit_edge[old, b] < 0:
                            break
                        if drawn < exits[old, b, c]:
                            new = target[exit_edge[old, b]]
                            break
                if last > 0 and i != uncounted and (old != new or stage[i] != after[i]):
                    _move(edge_of, flow, count, run, c, weight, q, old, new, 1.0)
                    _move(edge_of, flow, count, run, c, weight, q, stage[i], after[i], -1.0)
                if new != after[i]:
                    member[end] = i
                    alternative[end] = new
                    end += 1
                    if smallest < 0 or identity < identity_of(first_id, ids, smallest):
                        smallest = np.int64(i)
            # Who differs from now on.
            moved = False
            one = winner[q]
            while one >= 0:
                f = one - direct
                if f >= 0 and where[f] == q:
                    if not moved:
                        # The list grows: it moves to where there is room.
                        for m in range(begin, end):
                            member[used + m - begin] = member[m]
                            alternative[used + m - begin] = alternative[m]
                        begin, end, moved = used, used + end - begin, True
                    i, new = newcomer[f], np.int64(fresh_stage[f])
                    if last > 0 and i != uncounted:
                        c = np.int64(classes[i]) if many else 0
                        _move(edge_of, flow, count, run, c, weight, q, stage[i], new, 1.0)
                        _move(edge_of, flow, count, run, c, weight, q, stage[i], after[i], -1.0)
                    member[end] = i
                    alternative[end] = new
                    end += 1
                    if smallest < 0 or identity_of(first_id, ids, i) < identity_of(first_id, ids, smallest):
                        smallest = np.int64(i)
                one = _earlier(one, layer, flips, fresh)
            if moved:
                used = end
                first[q] = begin
            held[q] = end - begin
            total, best, w = _best_offer(q, layer, widest, frame, day, slots, flips, fresh)
            large = abs(weight[q, last])
            lasts = end > begin and large > 0.0
            if w == NOBODY:
                winner[q] = OLD if lasts else GONE
                continue
            if lasts:
                total += large
                variate = _OLD_VARIATES + layer * 64 + (q - first_slot[layer]) % width[layer]
                if race(identity_of(first_id, ids, smallest), address, variate, large) < best:
                    w = HELD
            large = size[w] if 0 <= w < direct else abs(weight[q if w == HELD else where[w - direct], last])
            # What is kept of it, so that the way back has the same.
            ratios[contests] = total / large
            if w >= direct:
                for x in range(last + 1):
                    imports[taken, x] = weight[where[w - direct], x] * ratios[contests]
                taken += 1
            contests += 1
            winner[q] = w
    return used


@nb.njit(**BARE)
def resolve(
    part: Part,
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    used: int,
    outcome: Outcome,
    flow: Floats,
    count: Floats,
) -> int:
    """The winners take their slots, which are as `evolve` left them; returns the end of the lists."""
    networks, last = frame.cells.shape[0], slots.weight.shape[1] - 1
    cells, slot, layout, classes = frame.cells, frame.slot, frame.layout, frame.classes
    layer_number, first_slot, first_cell, first_linear = (
        frame.layer,
        frame.first_slot,
        frame.first_cell,
        frame.first_linear,
    )
    edge_of, infection_scale, susceptibility = frame.edge_of, frame.infection_scale, frame.susceptibility
    pressure, factor, factor_dot, linear, exit_weight = (
        day.pressure,
        day.factor,
        day.factor_dot,
        day.linear,
        day.exit_weight,
    )
    first, held, weight, excess = slots.first, slots.held, slots.weight, slots.excess
    seed, imported, generation, apart = slots.seed, slots.imported, slots.generation, slots.apart
    winner, status, ratios, imports = slots.winner, slots.status, outcome.ratio, outcome.imports
    via, left, seeded = slots.via, slots.left, seed.shape[0] > 0
    many, others, direct = classes.shape[0] > 0, apart.shape[1], flips.agent.shape[0]
    contests, taken = 0, 0
    for s in range(part.stretch.shape[0]):
        layer, run = part.stretch[s, 0], part.stretch[s, 1]
        found = active(part.stretch[s, 2], part.stretch[s, 3], status, part.room)
        for a in range(found):
            if a + LIST < found:
                soon = part.room[a + LIST]
                if winner[soon] != OLD:
                    _fetch_reference(soon, weight)
                    fetch_list(soon, slots, member, alternative)
                    _fetch_winner(winner[soon], flips, fresh)
            if a + PEOPLE < found:
                soon = winner[part.room[a + PEOPLE]]
                if 0 <= soon < direct:
                    _fetch_person(flips.agent[soon], stage, after, frame)
            if a + PLACE < found:
                soon = winner[part.room[a + PLACE]]
                if 0 <= soon < direct:
                    _fetch_pressure(flips.agent[soon], frame, pressure)
            q = part.room[a]
            w = winner[q]
            if w == OLD:
                continue
            ratio = 0.0
            if w != GONE:
                ratio = ratios[contests]
                contests += 1
            # What the slot holds counts with another weight, or no longer.
            change = ratio if w == HELD else 0.0
            if change != 1.0 and last > 0:
                uncounted = uncounted_seed(seed, imported, layer, q)
                for m in range(first[q], first[q] + held[q]):
                    i = member[m]
                    if i != uncounted:
                        c = np.int64(classes[i]) if many else 0
                        _add(count, run, alternative[m], c, weight, q, change - 1.0)
                        _add(count, run, after[i], c, weight, q, 1.0 - change)
            if w == HELD:
                for x in range(last + 1):
                    weight[q, x] *= ratio
                continue
            if others > 0:
                generation[q] += 1
            if seeded:
                seed[q] = -1
            if w == GONE:
                held[q] = 0
                excess[q] = 0.0
                continue
            if first[q] < 0:
                first[q] = used
                used += 1
            held[q] = 1
            place = first[q]
            if w < direct:
                i, b = flips.agent[w], flips.branch[w]
                c = np.int64(classes[i]) if many else 0
                gain = flips.factor[w]
                if b >= 0:
                    for x in range(last + 1):
                        weight[q, x] = exit_weight[np.int64(gain), b, c, x]
                else:
                    for x in range(last + 1):
                        weight[q, x] = 0.0
                    hazard = 0.0
                    for n in range(networks):
                        cell = first_cell[n] + column(cells[n], i)
                        felt = pressure[cell]
                        hazard = hazard + factor[n] * felt
                        for x in range(last):
                            weight[q, x] += factor_dot[n, x] * felt
                        if layer_number[n] < 0:
                            row = cell - first_cell[n] + first_linear[n]
                            for x in range(last + 1):
                                weight[q, x] += linear[row, x]
                    scale = susceptibility[c] * infection_scale[stage[i]]
                    for x in range(last + 1):
                        weight[q, x] *= scale * gain
                    # The reference raises the probability itself too: p/(1 − p) beside the linear networks' part.
                    hazard = hazard * susceptibility[c]
                    p = one_minus_exp(hazard * infection_scale[stage[i]])
                    weight[q, last] += gain * p / (1.0 - p)
                for x in range(last + 1):
                    weight[q, x] *= ratio
                alternative[place] = flips.stage[w]
                if layer == 0:
                    _move(edge_of, flow, count, run, c, weight, q, stage[i], flips.stage[w], 1.0)
                    _move(edge_of, flow, count, run, c, weight, q, stage[i], after[i], -1.0)
            else:
                k = w - direct
                i = fresh.agent[k]
                for x in range(last + 1):
                    weight[q, x] = imports[taken, x]
                taken += 1
                alternative[place] = fresh.stage[k]
            if seeded:
                seed[q], imported[q] = i, w >= direct
            if via.shape[0] > 0:
                via[q] = flips.via[w] if w < direct else -1
                for g in range(left.shape[1]):
                    left[q, g] = 1.0
            if others > 0:
                for other in range(others + 1):
                    if other != layer:
                        there = own_slot(slot, layout, other, i) >= 0
                        apart[q, _among(other, layer)] = np.int8(0) if there else NOWHERE
                if w >= direct:
                    origin = fresh.slot[w - direct]
                    other = layer_of(first_slot, origin)
                    apart[q, _among(other, layer)] = origin - own_slot(slot, layout, other, i)
            member[place] = i
    return used


@nb.njit(**BARE)
def link(part: Part, frame: Frame, slots: Slots, flips: Flips, fresh: Fresh) -> None:
    """Slots that were taken learn which others go together with them; all winners have taken theirs."""
    slot, layout, winner, seed, status = frame.slot, frame.layout, slots.winner, slots.seed, slots.status
    generation, apart, to = slots.generation, slots.apart, slots.link
    where, direct, layers = fresh.slot, flips.agent.shape[0], frame.network.shape[0]
    for s in range(part.stretch.shape[0]):
        layer = part.stretch[s, 0]
        found = active(part.stretch[s, 2], part.stretch[s, 3], status, part.room)
        for a in range(found):
            if a + PEOPLE < found:
                soon = part.room[a + PEOPLE]
                for other in range(layers if winner[soon] >= 0 else 0):
                    _fetch_slot(slot, other, seed[soon])
            if a + PLACE < found:
                soon = part.room[a + PLACE]
                for other in range(layers if winner[soon] >= 0 else 0):
                    origin = _origin(slot, layout, apart, soon, layer, other, seed[soon]) if other != layer else -1
                    if origin >= 0:
                        fetch(winner, origin)
                        fetch(generation, origin)
            q = part.room[a]
            w = winner[q]
            for other in range(layers if w >= 0 else 0):
                origin = _origin(slot, layout, apart, q, layer, other, seed[q]) if other != layer else -1
                if origin < 0:
                    continue
                theirs = winner[origin]
                if w >= direct and origin == where[w - direct]:
                    stands = theirs == OLD or theirs == HELD
                elif w >= direct:
                    stands = theirs >= direct and seed[origin] == seed[q]
                    stands = stands and where[theirs - direct] == where[w - direct]
                else:
                    stands = theirs == w
                if stands:
                    to[q, _among(other, layer)] = generation[origin]
                else:
                    apart[q, _among(other, layer)] = NOWHERE


@nb.njit(**BARE)
def unlink(part: Part, frame: Frame, slots: Slots) -> None:
    """Forget the links that don't stand any more: which generation the others stand with then doesn't matter."""
    seed, generation, apart, to = slots.seed, slots.generation, slots.apart, slots.link
    for layer in range(frame.network.shape[0]):
        for q in range(part.low[layer], part.high[layer]):
            for other in range(frame.network.shape[0] if seed[q] >= 0 else 0):
                if other != layer:
                    origin = _origin(frame.slot, frame.layout, apart, q, layer, other, seed[q])
                    if origin >= 0 and to[q, _among(other, layer)] != generation[origin]:
                        apart[q, _among(other, layer)] = NOWHERE

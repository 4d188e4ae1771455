"""What a step does to the tangents of each agent: the compiled loops of `lpm.kernels.tangents`.

The tangents of a live stage are a row: P numbers of each agent, filled up to whole quads of four (`lpm.kernels.quads`),
agent after agent. An agent's rows sum to 0 (somebody moves from one stage to another), which spares the stages that
nobody leaves and that pass nothing on.

Agents go in blocks that fit a cache of their core. Where a network's agents are stored group by group and no group is
longer than a block, blocks are of whole groups, and what a group passes on is added up where it is read: this network,
the `inner` one, has no table. It is the households of most populations, and with a third of all agents as cells their
table would be the longest of all.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import column, float_column
from lpm.kernels.decisions import hazard_of, one_minus_exp
from lpm.kernels.quads import LENGTH, load, load_at, nothing, store, zeros
from lpm.kernels.tangent_sums import BLOCK, Felt, Nets, passed_on

__all__ = ["Course", "Room", "advance", "begin", "blocks_of", "room_for"]

_LARGEST = 32.0
"""`one_minus_exp` is constant beyond."""


class Course(NamedTuple):
    """Who moves where in a step.

    Attributes:
        moves: every transition out of a live stage, in such an order that the ones into a stage come after those out of
            it: its stage, its edge, whether it is an infection, its place among the stage's exits, whether it is the
            first and whether it is the last out of its stage [moves, 6].
        row: of the stage of each [moves].
        into: row of the stage that it leads to, or −1 if it has none [moves].
        early: whether it comes before those out of that stage, as on a way round [moves].
        late: rows that early moves lead into [late rows].
        heard: rows that speak in some network where nobody meets themselves [heard rows].
        susceptibility: [C].
        scale: relative susceptibility of each stage [S].
        chance: probability of each exit [S, most, C].
        slopes: its tangents [quads × S × most × C × 4].
        steep: whether a stage's are not all 0 [S].
    """

    moves: NDArray[np.int64]
    row: NDArray[np.int64]
    into: NDArray[np.int64]
    early: NDArray[np.bool_]
    late: NDArray[np.int64]
    heard: NDArray[np.int64]
    susceptibility: NDArray[np.float64]
    scale: NDArray[np.float64]
    chance: NDArray[np.float64]
    slopes: NDArray[np.float64]
    steep: NDArray[np.bool_]


class Room(NamedTuple):
    """Where the loops over a block keep what they need of it: what a loop makes itself is counted at every use.

    Attributes:
        hazard: that each agent feels [block].
        chance: of each move [moves, block].
        group: of each agent in the inner network, as they come in the block [block].
        begins: where each of those begins, and the end of the last [block + 1].
        cell: each of them [block].
        share: one over the people of each [block].
        pressure: in each [block].
        speaks: whether a stage passes something on where nobody meets themselves, and last whether one does that can
            be infected [S + 1].
        who: who decides on an infection, as far as the tangent of their hazard matters; one more is written than
            counts [block + 1].
        move: by which move [block].
        slope: of its probability by the hazard [block].
        back: what comes back of the tangents of theirs [rows, block].
        quads: what those feel, what is left in a stage, and early arrivals in each row [(2 + rows) × block × 4].
    """

    hazard: NDArray[np.float64]
    chance: NDArray[np.float64]
    group: NDArray[np.int64]
    begins: NDArray[np.int64]
    cell: NDArray[np.int64]
    share: NDArray[np.float64]
    pressure: NDArray[np.float64]
    speaks: NDArray[np.bool_]
    who: NDArray[np.int64]
    move: NDArray[np.int64]
    slope: NDArray[np.float64]
    back: NDArray[np.float64]
    quads: NDArray[np.float64]


def room_for(nets: Nets, course: Course, rows: int) -> Room:
    """Room for one thread's blocks."""
    speaks = np.logical_or.reduce(nets.infectivity[nets.apart] > 0.0, axis=0)
    infected = course.moves[course.moves[:, 2] == 1, 0]
    return Room(
        hazard=np.empty(BLOCK),
        chance=np.empty((course.row.size, BLOCK)),
        group=np.empty(BLOCK, dtype=np.int64),
        begins=np.zeros(BLOCK + 1, dtype=np.int64),
        cell=np.empty(BLOCK, dtype=np.int64),
        share=np.empty(BLOCK),
        pressure=np.empty(BLOCK),
        speaks=np.append(speaks, speaks[infected].any()),
        who=np.empty(BLOCK + 1, dtype=np.int64),
        move=np.empty(BLOCK, dtype=np.int64),
        slope=np.empty(BLOCK),
        back=np.empty((rows, BLOCK)),
        quads=zeros((2 + rows) * BLOCK * LENGTH),
    )


@nb.njit(nogil=True, cache=True)
def blocks_of(cell: NDArray[np.int32], closed: bool, agents: int) -> NDArray[np.int64]:
    """Where blocks begin, and the end of the last; empty where some group is longer than a block.

    Args:
        cell: group of each agent, if blocks are of whole groups; else empty [agents].
        closed: whether those of cell 0 are in no group.
        agents: how many.
    """
    found = np.empty(2 * (agents // BLOCK) + 2, dtype=np.int64)
    start, count = 0, 0
    found[0] = 0
    while start < agents:
        end = min(start + BLOCK, agents)
        if cell.size and end < agents:
            while end > start and cell[end] == cell[end - 1] and not (closed and cell[end] == 0):
                end -= 1
            if end == start:
                return found[:0]
        count += 1
        found[count] = end
        start = end
    return found[: count + 1].copy()


@nb.njit(nogil=True, cache=True)
def begin(
    low: int,
    high: int,
    taking_part: NDArray[np.bool_],
    moved: NDArray[np.float64],
    row: int,
    rows: int,
    carried: NDArray[np.float64],
) -> None:
    """Add the same to one row of all who take part, of the agents `low` to `high` − 1.

    Args:
        low: first agent.
        high: end of the agents.
        taking_part: who does [agents].
        moved: what is added [quads × 4].
        row: which.
        rows: how many.
        carried: tangents; changed [quads × rows × agents × 4].
    """
    length = taking_part.size * LENGTH
    for q in range(moved.size // LENGTH):
        more, base = load(moved, q * LENGTH), (q * rows + row) * length
        for i in range(low, high):
            if taking_part[i]:
                store(carried, base + i * LENGTH, load(carried, base + i * LENGTH) + more)


@nb.njit(nogil=True, cache=True, _nrt=False)
def advance(
    low: int,
    high: int,
    room: Room,
    blocks: NDArray[np.int64],
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    nets: Nets,
    felt: Felt,
    course: Course,
    carried: NDArray[np.float64],
    rows: int,
    flow: NDArray[np.float64],
) -> None:
    """One step of the tangents of the agents of the blocks `low` to `high` − 1, and those of their transitions.

    Args:
        low: first block.
        high: end of the blocks.
        room: of this thread.
        blocks: first agent of each, and the end of all [blocks + 1].
        stage: before the step [agents].
        classes: of each agent; empty where there is one class [agents].
        nets: the networks.
        felt: what they do.
        course: who moves where.
        carried: tangents; changed [quads × rows × agents × 4].
        rows: how many.
        flow: tangents of transitions; added to [quads × E × C × 4].
    """
    length = stage.size * LENGTH
    quads = carried.size // (rows * length)
    edges = flow.size // (quads * course.susceptibility.size * LENGTH)
    for m in range(course.row.size):
        if not course.moves[m, 2]:
            for j in range(BLOCK):
                room.chance[m, j] = course.chance[course.moves[m, 0], course.moves[m, 3], 0]
    for b in range(low, high):
        start, count = blocks[b], blocks[b + 1] - blocks[b]
        _meet(start, count, stage, nets, felt, room)
        found = _decide(start, count, stage, classes, course, room)
        _come_back(start, found, stage, nets, felt, course, room)
        for q in range(quads):
            base = q * rows * length + start * LENGTH
            _feel(q, start, found, base, length, stage, nets, felt, course, carried, room)
            _move(q, start, count, found, base, length, edges, stage, classes, course, carried, room, flow)


@nb.njit(nogil=True, cache=True, _nrt=False, inline="always")
def _meet(start: int, count: int, stage: NDArray[np.int8], nets: Nets, felt: Felt, room: Room) -> None:
    """Hazard that each agent of a block feels; nobody meets themselves."""
    hazard, group, n = room.hazard, room.group, nets.inner
    if n < 0:
        for j in range(count):
            hazard[j] = 0.0
    else:
        # Without branches: where a group ends is what a processor cannot guess.
        k, before = -1, -1
        for j in range(count):
            g = column(nets.cells[n], start + j)
            k += g != before
            before, group[j], room.cell[k], room.begins[k + 1] = g, k, g, j + 1
        for k in range(group[count - 1] + 1):
            g = room.cell[k]
            room.share[k] = felt.share[felt.unit_at[n] + column(nets.units[n], g)]
            room.pressure[k] = hazard_of(felt.words[g], False, 1.0, room.share[k])
        for j in range(count):
            hazard[j] = felt.factors[n] * room.pressure[group[j]]
    for n in range(nets.apart.size):
        if n != nets.inner:
            cell, known = nets.cells[n], felt.hazards[n]
            for j in range(count):
                hazard[j] += float_column(known, column(cell, start + j))
    few, who = 0, room.who
    for j in range(count):
        who[few] = j
        few += room.speaks[stage[start + j]]
    for n in range(nets.apart.size):
        for k in range(few if nets.apart[n] else 0):
            u = column(nets.units[n], column(nets.cells[n], start + who[k]))
            weight = nets.infectivity[n, stage[start + who[k]]]
            hazard[who[k]] -= felt.factors[n] * felt.share[felt.unit_at[n] + u] * weight


@nb.njit(nogil=True, cache=True, _nrt=False, inline="always")
def _decide(
    start: int, count: int, stage: NDArray[np.int8], classes: NDArray[np.int16], course: Course, room: Room
) -> int:
    """Probability of each move, and who decides on an infection; how many."""
    hazard, found = room.hazard, 0
    for m in range(course.row.size):
        s, infects, place, scale = course.moves[m, 0], course.moves[m, 2], course.moves[m, 3], 0.0
        chance = room.chance[m]
        if not infects:
            if classes.size:
                for j in range(count):
                    chance[j] = course.chance[s, place, classes[start + j]]
            continue
        if classes.size:
            for j in range(count):
                chance[j] = hazard[j] * (course.susceptibility[classes[start + j]] * course.scale[s])
        else:
            scale = course.susceptibility[0] * course.scale[s]
            for j in range(count):
                chance[j] = hazard[j] * scale
        first = found
        for j in range(count):
            room.who[found] = j
            found += (stage[start + j] == s) & (chance[j] < _LARGEST)
        for j in range(count):
            chance[j] = one_minus_exp(chance[j])
        for k in range(first, found):
            if classes.size:
                scale = course.susceptibility[classes[start + room.who[k]]] * course.scale[s]
            room.move[k], room.slope[k] = m, (1.0 - chance[room.who[k]]) * scale
    return found


@nb.njit(nogil=True, cache=True, _nrt=False, inline="always")
def _come_back(
    start: int, found: int, stage: NDArray[np.int8], nets: Nets, felt: Felt, course: Course, room: Room
) -> None:
    """What comes back of the tangents of those who decide."""
    who, back, stages = room.who, room.back, nets.infectivity.shape[1]
    for r in course.heard:
        for k in range(found):
            back[r, k] = 0.0
    for n in range(nets.apart.size):
        cell, unit, first = nets.cells[n], nets.units[n], nets.first[n]
        many = nets.first[n + 1] - first if nets.apart[n] else 0
        for m in range(many):
            r, at = nets.rows[first + m], felt.at[n] + m
            for k in range(found):
                u = column(unit, column(cell, start + who[k]))
                back[r, k] += felt.back[at + (u * stages + stage[start + who[k]]) * many]


@nb.njit(nogil=True, cache=True, _nrt=False, inline="always")
def _feel(
    q: int,
    start: int,
    found: int,
    base: int,
    length: int,
    stage: NDArray[np.int8],
    nets: Nets,
    felt: Felt,
    course: Course,
    carried: NDArray[np.float64],
    room: Room,
) -> None:
    """Four tangents of the hazard that those feel who decide on an infection [block × 4].

    Nobody meets themselves: neither what they pass on nor its tangent comes back.
    """
    who, out = room.who, room.quads
    networks, stages = nets.infectivity.shape
    if nets.inner < 0:
        for k in range(found):
            store(out, k * LENGTH, nothing())
    else:
        n = nets.inner
        many = nets.first[n + 1] - nets.first[n]
        before, total, by_factor = -1, nothing(), load(felt.moved, (q * networks + n) * LENGTH)
        for k in range(found):
            group = room.group[who[k]]
            if group != before:
                u = column(nets.units[n], column(nets.cells[n], start + who[k]))
                before, total = group, nothing()
                if many:
                    for i in range(room.begins[group], room.begins[group + 1]):
                        at = felt.at[n] + (u * stages + stage[start + i]) * many
                        total = total + passed_on(carried, base + i * LENGTH, length, nets, n, felt.passed, at)
                total = felt.factors[n] * room.share[group] * total + room.pressure[group] * by_factor
            store(out, k * LENGTH, total)
    for n in range(networks):
        if n != nets.inner:
            cell, table, above = nets.cells[n], felt.tangents[n], q * felt.lengths[n]
            for k in range(found):
                its = load_at(table, (above + column(cell, start + who[k])) * LENGTH)
                store(out, k * LENGTH, load(out, k * LENGTH) + its)
    for r in course.heard:
        row = base + r * length
        for k in range(found):
            own = room.back[r, k] * load(carried, row + who[k] * LENGTH)
            store(out, k * LENGTH, load(out, k * LENGTH) - own)
    for n in range(networks if room.speaks[stages] else 0):
        by_factor = load(felt.moved, (q * networks + n) * LENGTH)
        for k in range(found if nets.apart[n] else 0):
            u = column(nets.units[n], column(nets.cells[n], start + who[k]))
            less = felt.share[felt.unit_at[n] + u] * nets.infectivity[n, stage[start + who[k]]]
            store(out, k * LENGTH, load(out, k * LENGTH) - less * by_factor)


@nb.njit(nogil=True, cache=True, _nrt=False, inline="always")
def _move(
    q: int,
    start: int,
    count: int,
    found: int,
    base: int,
    length: int,
    edges: int,
    stage: NDArray[np.int8],
    classes: NDArray[np.int16],
    course: Course,
    carried: NDArray[np.float64],
    room: Room,
    flow: NDArray[np.float64],
) -> None:
    """Take four tangents of what flows from a block's rows and add them to others, and to their class."""
    quads, left = room.quads, BLOCK * LENGTH
    stages, most, class_count = course.chance.shape
    for r in course.late:
        for j in range(count):
            store(quads, (2 + r) * left + j * LENGTH, nothing())
    for m in range(course.row.size):
        s, edge, place = course.moves[m, 0], course.moves[m, 1], course.moves[m, 3]
        is_first, is_last = course.moves[m, 4] == 1, course.moves[m, 5] == 1
        row, into = base + course.row[m] * length, course.into[m]
        rest, rest_at = (carried, row) if is_first else (quads, left)
        out, out_at = (carried, row) if is_last else (quads, left)
        to, to_at = (quads, (2 + into) * left) if course.early[m] else (carried, base + into * length)
        chance, steep = room.chance[m], course.steep[s] and course.moves[m, 2] == 0
        slope_at = ((q * stages + s) * most + place) * class_count
        flow_at = (q * edges + edge) * class_count * LENGTH
        total = nothing()
        for j in range(count):
            part = chance[j] * load(carried, row + j * LENGTH)
            if steep and stage[start + j] == s:
                c = np.int64(classes[start + j]) if classes.size else 0
                part = part + load(course.slopes, (slope_at + c) * LENGTH)
            store(out, out_at + j * LENGTH, load(rest, rest_at + j * LENGTH) - part)
            if into >= 0:
                store(to, to_at + j * LENGTH, load(to, to_at + j * LENGTH) + part)
            if classes.size:
                its = flow_at + classes[start + j] * LENGTH
                store(flow, its, load(flow, its) + part)
            else:
                total = total + part
        store(flow, flow_at, load(flow, flow_at) + total)
    for r in course.late:
        row = base + r * length
        for j in range(count):
            late = load(quads, (2 + r) * left + j * LENGTH)
            store(carried, row + j * LENGTH, load(carried, row + j * LENGTH) + late)
    # Who decides moves on by the tangent of their hazard too, now that what was in a row before the step has left it.
    for k in range(found):
        j, m = room.who[k], room.move[k]
        into, edge = course.into[m], course.moves[m, 1]
        part = room.slope[k] * load(quads, k * LENGTH)
        row = base + course.row[m] * length + j * LENGTH
        store(carried, row, load(carried, row) - part)
        if into >= 0:
            to_at = base + into * length + j * LENGTH
            store(carried, to_at, load(carried, to_at) + part)
        c = np.int64(classes[start + j]) if classes.size else 0
        its = ((q * edges + edge) * class_count + c) * LENGTH
        store(flow, its, load(flow, its) + part)

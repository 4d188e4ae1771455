"""The way back through cluster alternates: what a step did to the weights, and its transpose (paper, eq. 8).

No choice depends on a parameter, so a step is a linear map of the alternatives' weights: an old one is scaled, an
imported one copies its source's, a flip begins with derivatives of what the contagion was told. A tape keeps that map
and the backward pass carries one number per slot, whatever the number of parameters.

The tape holds only what changes. Being in a stage has a *worth*: what the outputs and sums of all later steps answer
to it. A slot's adjoint is kept less the worth of the differences it holds; so a difference that merely stays costs
nothing, neither room on the tape nor time on the way back, and the tape grows with people who fall ill, not with days.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import Addresses, column
from lpm.kernels.clusters import BARE, GONE, HELD, OLD, Day, Flips, Frame, Fresh, Outcome, Part, Sent, Slots, layer_of
from lpm.kernels.cpu import share_out
from lpm.kernels.differences import uncounted_seed
from lpm.kernels.frames import make_sent

__all__ = ["Before", "Cotangents", "Tape", "before", "gather_edges", "pull", "pull_sent", "record", "shifts"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Slots32 = NDArray[np.int32]
Stages = NDArray[np.int8]

_LAYER = np.iinfo(np.int64).min
_GONE, _SCALED, _FLIP, _IMPORT = 0, 1, 2, 3


class Tape(NamedTuple):
    """What one step did to the weights of one lane; only differences that count (rule 4 of `alternates`).

    Attributes:
        moved_slot: slots in which somebody moved, in the alternative or in truth [moves].
        moved_agent: who [moves].
        moved: stage in the alternative before and after, in truth before and after [moves, 4].
        slot: slots whose weight changed, in their order [turns].
        kind: gone, scaled, flip or import [turns].
        ratio: of the new weight to what it was made of [turns].
        held: how many of those whom the slot held count [turns].
        member: who differed just before, turn after turn [listed].
        stages: where, in the alternative and in truth [listed, 2].
        source: slot from which the weight came, of one import after another [imports].
        flip_agent: whose decision it was, of one flip after another [flips].
        flip_stages: before, in the alternative and in truth after [flips, 3].
        flip_branch: −1 for an infection, else which exit [flips].
        gain: derivative of a flip by that of the hazard (infections) [flips].
        pressure: what the agent felt in each network (infections) [flips, networks].
        factor: hazard per unit of pressure [networks].
        reference: reference weight of a flip of an exit [stages, branches, classes].
        sent: what seeds added to sums over edges.
    """

    moved_slot: Slots32
    moved_agent: Slots32
    moved: Stages
    slot: Slots32
    kind: Stages
    ratio: NDArray[np.float32]
    held: NDArray[np.uint8]
    member: Slots32
    stages: Stages
    source: Slots32
    flip_agent: Slots32
    flip_stages: Stages
    flip_branch: Stages
    gain: Floats
    pressure: Floats
    factor: Floats
    reference: Floats
    sent: Sent

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(array.nbytes for array in (*self[:-1], *self.sent))


class Cotangents(NamedTuple):
    """What flows back through one lane; the last axis of each is the batch, B.

    Attributes:
        slot: of each weight, less the worth of what the slot holds [slots, B].
        people: worth of being in a stage, by later counts [stages, classes, B].
        reach: worth of a unit of infectivity, by later sums [rows of linear networks, B].
        flow: of this step's transitions [edges, classes, B].
        factor: of the hazards per unit of pressure [networks, B].
        linear: of the hazards in linear networks [rows, B].
        exits: of the weights of flips of exits [stages, branches, classes, B].
    """

    slot: Floats
    people: Floats
    reach: Floats
    flow: Floats
    factor: Floats
    linear: Floats
    exits: Floats


class Before(NamedTuple):
    """Slots in which somebody may move, and what they held before the step, which they then change in place.

    Attributes:
        slot: which, in their order [slots].
        first: where the copy of a slot's list begins [slots + 1].
        member: who [listed].
        alternative: where [listed].
    """

    slot: Slots32
    first: Slots32
    member: Slots32
    alternative: Stages


def before(slots: Slots, member: Slots32, alternative: Stages) -> Before:
    """Copy the lists that may change in the step.

    Args:
        slots: before it.
        member: lists of who differs.
        alternative: where they are.
    """
    count, room = _moving(slots.status, slots.held)
    copy = Before(
        np.empty(count, dtype=np.int32),
        np.zeros(count + 1, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
    )
    _copy(slots.status, slots.held, slots.first, member, alternative, *copy)
    return copy


@nb.njit(**BARE, inline="always")
def _class(classes: NDArray[np.int16], i: int) -> int:
    return int(classes[i]) if classes.shape[0] > 0 else 0


@nb.njit(**BARE)
def _moving(status: NDArray[np.uint8], held: Slots32) -> tuple[int, int]:
    count, room = 0, 0
    for q in range(status.shape[0]):
        if status[q] != 0 and held[q] > 0:
            count += 1
            room += held[q]
    return count, room


@nb.njit(**BARE)
def _copy(
    status: NDArray[np.uint8],
    held: Slots32,
    first: Slots32,
    member: Slots32,
    alternative: Stages,
    to_slot: Slots32,
    to_first: Slots32,
    to_member: Slots32,
    to_alternative: Stages,
) -> None:
    a, end = 0, 0
    for q in range(status.shape[0]):
        if status[q] != 0 and held[q] > 0:
            to_slot[a] = q
            for m in range(first[q], first[q] + held[q]):
                to_member[end] = member[m]
                to_alternative[end] = alternative[m]
                end += 1
            a += 1
            to_first[a] = end


def record(
    stage: Stages,
    after: Stages,
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    old: Before,
    member: Slots32,
    alternative: Stages,
    parts: Sequence[Part],
    outcomes: Sequence[Outcome],
    sent: Sequence[Sent],
) -> Tape:
    """Write down a step, once all alternatives have stepped and competed and before any weight changes.

    Args:
        stage: actual, before [agents].
        after: actual, after [agents].
        frame: the run's.
        day: the step's.
        slots: alternatives after their step.
        flips: of the step.
        fresh: of the step.
        old: what changed in the step.
        member: who differs after the step.
        alternative: where they are.
        parts: the slots of each thread.
        outcomes: how those were competed for.
        sent: what seeds added to the sums over each graph's edges.
    """
    threads, layers = len(parts), frame.network.size
    move_cuts = np.linspace(0, old.slot.size, threads + 1).astype(np.int64)
    newcomers, networks = int(np.diff(fresh.span, axis=1).sum()), frame.cells.size
    # Only what is written of this room is ever backed by memory.
    moves = [_room_of_moves(int(old.first[high] - old.first[low]) + newcomers) for low, high in pairwise(move_cuts)]
    turning = [
        (int(part.low[n]), int(part.high[n]), outcome.begin[n], outcome.ratio)
        for n in range(layers)
        for part, outcome in zip(parts, outcomes, strict=True)
    ]
    turns = [_room_of_turns(high - low, member.size, networks) for low, high, *_ in turning]
    lists = (member, alternative)
    jobs: list[Callable[[], Any]] = [
        partial(_moves, low, high, stage, after, frame.first_slot, slots, *old, *lists, *to)
        for (low, high), to in zip(pairwise(move_cuts), moves, strict=True)
    ]
    jobs += [
        partial(_turns, *part, stage, after, frame, day, slots, flips, fresh, *lists, *to)
        for part, to in zip(turning, turns, strict=True)
    ]
    used = share_out(jobs, threads)

    def joined(parts: list[tuple[NDArray[Any], ...]], field: int, ends: list[int]) -> NDArray[Any]:
        return np.concatenate([part[field][:end] for part, end in zip(parts, ends, strict=True)])

    ends = [used[:threads], *([each[k] for each in used[threads:]] for k in range(4))]
    # How long each of the arrays of turns is: as the turns, the lists, the imports or the flips.
    lengths = (1, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 4)
    arrays: list[Any] = [joined(moves, field, ends[0]) for field in range(3)]
    arrays += [joined(turns, field, ends[length]) for field, length in enumerate(lengths)]
    arrays += [day.factor.copy(), day.exit_weight[..., -1].copy()]
    arrays.append(Sent._make(np.concatenate(column) for column in zip(make_sent(0), *sent, strict=True)))
    return Tape(*arrays)


def _room_of_moves(room: int) -> tuple[NDArray[Any], ...]:
    """As the fields of a tape."""
    return np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32), np.empty((room, 4), dtype=np.int8)


def _room_of_turns(room: int, listed: int, networks: int) -> tuple[NDArray[Any], ...]:
    """As the fields of a tape, from `slot` to `pressure`."""
    return (
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.float32),
        np.empty(room, dtype=np.uint8),
        np.empty(listed, dtype=np.int32),
        np.empty((listed, 2), dtype=np.int8),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty((room, 3), dtype=np.int8),
        np.empty(room, dtype=np.int8),
        np.empty(room),
        np.empty((room, networks)),
    )


@nb.njit(**BARE)
def _moves(
    low: int,
    high: int,
    stage: Stages,
    after: Stages,
    first_slot: Ints,
    slots: Slots,
    active: Slots32,
    first: Slots32,
    old_member: Slots32,
    old_alternative: Stages,
    member: Slots32,
    alternative: Stages,
    to_slot: Slots32,
    to_agent: Slots32,
    to_stages: Stages,
) -> int:
    """Whoever counts and moved, in the slots `low` to `high` − 1 of `active`, or began to differ; returns how many."""
    found = 0
    for a in range(low, high):
        q = active[a]
        uncounted = uncounted_seed(slots.seed, slots.imported, layer_of(first_slot, q), q)
        # Those who still differ come in the order they had, those who differ from now on after them.
        at, end = slots.first[q], slots.first[q] + slots.held[q]
        last = first[a + 1]
        m = first[a]
        while m < last or at < end:
            if m < last:
                i, before = old_member[m], old_alternative[m]
                m += 1
                if at < end and member[at] == i:
                    new = alternative[at]
                    at += 1
                else:
                    new = after[i]
            else:
                i, new = member[at], alternative[at]
                before = stage[i]
                at += 1
            if i != uncounted and (before != new or stage[i] != after[i]):
                to_slot[found] = q
                to_agent[found] = i
                to_stages[found, 0] = before
                to_stages[found, 1] = new
                to_stages[found, 2] = stage[i]
                to_stages[found, 3] = after[i]
                found += 1
    return found


@nb.njit(**BARE)
def _turns(
    low: int,
    high: int,
    contests: int,
    ratios: NDArray[np.float32],
    stage: Stages,
    after: Stages,
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    member: Slots32,
    alternative: Stages,
    slot: Slots32,
    kind: Stages,
    ratio: NDArray[np.float32],
    held: NDArray[np.uint8],
    listed: Slots32,
    stages: Stages,
    source: Slots32,
    flip_agent: Slots32,
    flip_stages: Stages,
    flip_branch: Stages,
    gain: Floats,
    pressure: Floats,
) -> tuple[int, int, int, int]:
    """Those of the slots `low` to `high` − 1 of a layer whose weight changes, with what they hold and what comes.

    Args:
        contests: how many of the thread's contests, of which there are `ratios`, were for slots before.

    Returns:
        The numbers of turns, of entries of their lists, of imports and of flips.
    """
    winner, holding, first = slots.winner, slots.held, slots.first
    seed, imported, status, first_slot = slots.seed, slots.imported, slots.status, frame.first_slot
    cells, first_cell = frame.cells, frame.first_cell
    classes, susceptibility, infection_scale = frame.classes, frame.susceptibility, frame.infection_scale
    direct = flips.agent.shape[0]
    # The start, which nobody is infected by, has no pressure.
    networks = cells.shape[0] if day.pressure.shape[0] > 0 else 0
    turns, used, imports, new = 0, 0, 0, 0
    for q in range(low, high):
        if status[q] == 0 or winner[q] == OLD:
            continue
        w = winner[q]
        if w == GONE:
            if holding[q] == 0:
                continue
            kind[turns], ratio[turns] = _GONE, 0.0
        else:
            ratio[turns] = ratios[contests]
            contests += 1
        if w == HELD:
            if ratio[turns] == 1.0:
                continue
            kind[turns] = _SCALED
        elif w >= direct:
            kind[turns], source[imports] = _IMPORT, fresh.slot[w - direct]
            imports += 1
        elif w >= 0:
            kind[turns] = _FLIP
            i = flips.agent[w]
            flip_agent[new], flip_branch[new] = i, flips.branch[w]
            flip_stages[new, 0], flip_stages[new, 1], flip_stages[new, 2] = stage[i], flips.stage[w], after[i]
            gain[new] = susceptibility[_class(classes, i)] * infection_scale[stage[i]] * flips.factor[w]
            for n in range(networks):
                pressure[new, n] = day.pressure[first_cell[n] + column(cells[n], i)]
            new += 1
        slot[turns] = q
        uncounted = uncounted_seed(seed, imported, layer_of(first_slot, q), q)
        begin = used
        for m in range(first[q], first[q] + holding[q]):
            i = member[m]
            if i != uncounted:
                listed[used] = i
                stages[used, 0] = alternative[m]
                stages[used, 1] = after[i]
                used += 1
        held[turns] = used - begin
        turns += 1
    return turns, used, imports, new


@nb.njit(**BARE, inline="always")
def _add_worth(
    to: Floats,
    at: int,
    sign: float,
    i: int,
    one: int,
    other: int,
    classes: NDArray[np.int16],
    cells: Addresses,
    shift: Ints,
    infectivity: Floats,
    people: Floats,
    reach: Floats,
) -> None:
    """Add ± the worth of somebody's being in one stage rather than another to a row of `to`.

    Args:
        shift: from a network's cells to rows of `reach`; `_LAYER` for layers, whose sums are followed [networks].
    """
    if one != other:
        c = _class(classes, i)
        for b in range(to.shape[1]):
            to[at, b] += sign * (people[one, c, b] - people[other, c, b])
        for n in range(shift.shape[0]):
            d = infectivity[n, one] - infectivity[n, other]
            if shift[n] != _LAYER and d != 0.0:
                row = shift[n] + column(cells[n], i)
                for b in range(to.shape[1]):
                    to[at, b] += sign * d * reach[row, b]


@nb.njit(**BARE, inline="always")
def _add_flow(to: Floats, at: int, sign: float, c: int, source: int, end: int, edge_of: Ints, flow: Floats) -> None:
    if source != end:
        e = edge_of[source, end]
        for b in range(to.shape[1]):
            to[at, b] += sign * flow[e, c, b]


def pull(frame: Frame, shift: Ints, tape: Tape, back: Cotangents, threads: int) -> None:
    """Take the cotangents of one lane back over a step.

    Args:
        frame: the run's.
        shift: see `shifts`.
        tape: of the step.
        back: `slot`, `factor`, `linear` and `exits` are changed.
        threads: that may work on it; each has slots of its own.
    """
    batch = back.slot.shape[1]
    flipped, imported = np.zeros((tape.flip_agent.size, batch)), np.zeros((tape.source.size, batch))
    jobs = []
    for low, high in pairwise(np.linspace(0, tape.slot.size, threads + 1).astype(np.int64)):
        listed = int(tape.held[:low].sum(dtype=np.int64))
        flips, imports = (int(np.count_nonzero(tape.kind[:low] == kind)) for kind in (_FLIP, _IMPORT))
        worth = np.zeros((1, batch))
        places = (int(low), int(high), listed, flips, imports)
        jobs.append(partial(_pull_turns, *places, frame, shift, tape, back, flipped, imported, worth))
    share_out(jobs, threads)
    _pull_origins(frame, shift, tape, back, flipped, imported)
    # All moves in a slot are one thread's.
    edges = [0, *(_begin_of_slot(tape.moved_slot, k * tape.moved_slot.size // threads) for k in range(1, threads))]
    edges.append(tape.moved_slot.size)
    share_out([partial(_pull_moves, low, high, frame, shift, tape, back) for low, high in pairwise(edges)], threads)


def _begin_of_slot(slot: Slots32, k: int) -> int:
    return int(np.searchsorted(slot, slot[k])) if slot.size else 0


@nb.njit(**BARE)
def _pull_turns(
    low: int,
    high: int,
    begin: int,
    flip: int,
    place: int,
    frame: Frame,
    shift: Ints,
    tape: Tape,
    back: Cotangents,
    flipped: Floats,
    imported: Floats,
    worth: Floats,
) -> None:
    """The turns `low` to `high` − 1.

    Args:
        begin: where their lists begin.
        flip: the first flip among them.
        place: the first import among them.
        flipped: receives what goes to each flip [flips, B].
        imported: receives what goes to the source of each import [imports, B].
        worth: room [1, B].
    """
    classes, cells, infectivity, edge_of = frame.classes, frame.cells, frame.infectivity, frame.edge_of
    slot, kind, ratio, held, member, stages = tape.slot, tape.kind, tape.ratio, tape.held, tape.member, tape.stages
    adjoint, people, reach, flow = back.slot, back.people, back.reach, back.flow
    batch, second_layer = adjoint.shape[1], frame.first_slot[1]
    for e in range(low, high):
        q = slot[e]
        for b in range(batch):
            worth[0, b] = 0.0
        for m in range(begin, begin + held[e]):
            one, other = stages[m, 0], stages[m, 1]
            _add_worth(worth, 0, 1.0, member[m], one, other, classes, cells, shift, infectivity, people, reach)
        begin += held[e]
        if kind[e] == _SCALED:
            for b in range(batch):
                adjoint[q, b] = ratio[e] * (adjoint[q, b] + worth[0, b]) - worth[0, b]
            continue
        if kind[e] == _IMPORT:
            for b in range(batch):
                imported[place, b] = adjoint[q, b] * ratio[e]
            place += 1
        elif kind[e] == _FLIP:
            for b in range(batch):
                flipped[flip, b] = adjoint[q, b]
            if q < second_layer:
                # Only in the first layer does the seed of a flip count.
                i = tape.flip_agent[flip]
                before, one, other = tape.flip_stages[flip, 0], tape.flip_stages[flip, 1], tape.flip_stages[flip, 2]
                _add_worth(flipped, flip, 1.0, i, one, other, classes, cells, shift, infectivity, people, reach)
                _add_flow(flipped, flip, 1.0, _class(classes, i), before, one, edge_of, flow)
                _add_flow(flipped, flip, -1.0, _class(classes, i), before, other, edge_of, flow)
            for b in range(batch):
                flipped[flip, b] *= ratio[e]
            flip += 1
        for b in range(batch):
            adjoint[q, b] = -worth[0, b]


@nb.njit(**BARE)
def _pull_origins(frame: Frame, shift: Ints, tape: Tape, back: Cotangents, flipped: Floats, imported: Floats) -> None:
    """What new weights were made of: a source's weight, or what the contagion was told."""
    classes, cells, batch = frame.classes, frame.cells, imported.shape[1]
    for k in range(imported.shape[0]):
        for b in range(batch):
            back.slot[tape.source[k], b] += imported[k, b]
    for f in range(flipped.shape[0]):
        i, branch = tape.flip_agent[f], tape.flip_branch[f]
        if branch >= 0:
            for b in range(batch):
                back.exits[tape.flip_stages[f, 0], branch, _class(classes, i), b] += flipped[f, b]
            continue
        for n in range(shift.shape[0]):
            for b in range(batch):
                back.factor[n, b] += flipped[f, b] * tape.gain[f] * tape.pressure[f, n]
            if shift[n] != _LAYER:
                row = shift[n] + column(cells[n], i)
                for b in range(batch):
                    back.linear[row, b] += flipped[f, b] * tape.gain[f]


@nb.njit(**BARE)
def _pull_moves(low: int, high: int, frame: Frame, shift: Ints, tape: Tape, back: Cotangents) -> None:
    """The moves `low` to `high` − 1."""
    classes, cells, infectivity, edge_of = frame.classes, frame.cells, frame.infectivity, frame.edge_of
    slot, agent, moved = tape.moved_slot, tape.moved_agent, tape.moved
    adjoint, people, reach, flow = back.slot, back.people, back.reach, back.flow
    for k in range(low, high):
        q, i = slot[k], agent[k]
        old, new, stage, after = moved[k, 0], moved[k, 1], moved[k, 2], moved[k, 3]
        _add_worth(adjoint, q, 1.0, i, new, after, classes, cells, shift, infectivity, people, reach)
        _add_worth(adjoint, q, -1.0, i, old, stage, classes, cells, shift, infectivity, people, reach)
        _add_flow(adjoint, q, 1.0, _class(classes, i), old, new, edge_of, flow)
        _add_flow(adjoint, q, -1.0, _class(classes, i), stage, after, edge_of, flow)


def shifts(frame: Frame) -> Ints:
    """From a network's cells to rows of linear networks; see `pull` [networks]."""
    return np.where(frame.layer < 0, frame.first_linear, _LAYER)


@nb.njit(**BARE)
def pull_sent(
    n: int, infectivity: Floats, offsets: Ints, readers: Ints, returned: Floats, sent: Sent, to: Floats
) -> None:
    """What seeds add to the sums over edges of network n less than their whole difference, which `reach` counts.

    Args:
        n: number of the network.
        infectivity: in it [stages].
        offsets: where the readers of each agent begin [agents + 1].
        readers: [edges].
        returned: cotangents of the readers' sums [agents, B].
        sent: of the step.
        to: cotangents of the slots' weights before it [slots, B].
    """
    for k in range(sent.slot.shape[0]):
        if sent.network[k] == n:
            i, q = sent.agent[k], sent.slot[k]
            more = infectivity[sent.stages[k, 0]] - infectivity[sent.stages[k, 1]]
            for e in range(offsets[i], offsets[i + 1]):
                reader = readers[e]
                part = (0.0 if reader == sent.via[k] else sent.part[k]) - 1.0
                for b in range(to.shape[1]):
                    to[q, b] += more * part * returned[reader, b]


@nb.njit(**BARE)
def gather_edges(offsets: Ints, readers: Ints, returned: Floats, reach: Floats) -> None:
    """Add to each agent's reach what comes back from all who read them.

    Args:
        offsets: where the readers of each agent begin [agents + 1].
        readers: [edges].
        returned: cotangents of the readers' sums [agents, B].
        reach: of each agent [agents, B].
    """
    for i in range(offsets.shape[0] - 1):
        for e in range(offsets[i], offsets[i + 1]):
            for b in range(reach.shape[1]):
                reach[i, b] += returned[readers[e], b]

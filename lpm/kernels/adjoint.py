"""The way back through cluster alternates: what a step did to the weights, and its transpose (paper, eq. 8).

No choice depends on a parameter, so a step is a linear map of the alternatives' weights: an old one is scaled, an
imported one copies its source's, a flip begins with derivatives of what the contagion was told. A tape keeps that map
and the backward pass carries one number per slot, whatever the number of parameters.

The tape holds only what changes. Being in a stage has a *worth*: what the outputs and sums of all later steps answer
to it. A slot's adjoint is kept less the worth of the differences it holds; so a difference that merely stays costs
nothing, neither room on the tape nor time on the way back, and the tape grows with people who fall ill, not with days.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.clusters import GONE, NOBODY, OLD, Day, Flips, Frame, Fresh, Slots, layer_of
from lpm.kernels.evolution import uncounted_seed

__all__ = ["Cotangents", "Tape", "gather_edges", "pull", "record", "shifts"]

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
        slot: slots whose weight changed [turns].
        kind: gone, scaled, flip or import [turns].
        ratio: of the new weight to what it was made of [turns].
        origin: the source's slot (import) or the place among the flips; else −1 [turns].
        first: where the list of what the slot held begins [turns + 1].
        member: who differed just before [listed].
        stages: where, in the alternative and in truth [listed, 2].
        flip_agent: whose decision it was [flips].
        flip_stages: before, in the alternative and in truth after [flips, 3].
        flip_branch: −1 for an infection, else which exit [flips].
        gain: derivative of a flip by that of the hazard (infections) [flips].
        pressure: what the agent felt in each network (infections) [flips, networks].
        factor: hazard per unit of pressure [networks].
        reference: reference weight of a flip of an exit [stages, branches, classes].
    """

    moved_slot: Slots32
    moved_agent: Slots32
    moved: Stages
    slot: Slots32
    kind: Stages
    ratio: Floats
    origin: Slots32
    first: Slots32
    member: Slots32
    stages: Stages
    flip_agent: Slots32
    flip_stages: Stages
    flip_branch: Stages
    gain: Floats
    pressure: Floats
    factor: Floats
    reference: Floats


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


def record(
    stage: Stages,
    after: Stages,
    frame: Frame,
    day: Day,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    old: tuple[NDArray[Any], ...],
    member: Slots32,
    alternative: Stages,
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
        old: slots in which somebody may move, `first` and `held`, `member` and `alternative` before the step.
        member: who differs after the step.
        alternative: where they are.
    """
    active, first, held, old_member, old_alternative = old
    room = int(held.sum()) + int(np.diff(fresh.span, axis=1).sum())
    moved_slot, moved_agent = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32)
    moved = np.empty((room, 4), dtype=np.int8)
    moves = _moves(
        stage,
        after,
        frame.first_slot,
        slots,
        active,
        first,
        held,
        old_member,
        old_alternative,
        member,
        alternative,
        moved_slot,
        moved_agent,
        moved,
    )
    touched = np.flatnonzero(slots.winner != NOBODY).astype(np.int32)
    most, direct, room = touched.size, flips.agent.size, int(slots.held[touched].sum())
    slot, kind, ratio = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int8), np.empty(most)
    origin, begin = np.empty(most, dtype=np.int32), np.zeros(most + 1, dtype=np.int32)
    listed, stages = np.empty(room, dtype=np.int32), np.empty((room, 2), dtype=np.int8)
    place = np.full(direct, -1, dtype=np.int32)
    turns, used = _turns(
        after,
        frame.first_slot,
        slots,
        flips,
        fresh,
        touched,
        member,
        alternative,
        slot,
        kind,
        ratio,
        origin,
        begin,
        listed,
        stages,
        place,
    )
    winners = np.flatnonzero(place >= 0)
    winners = winners[np.argsort(place[winners])]
    who, branch = flips.agent[winners], flips.branch[winners]
    # The start, which nobody is infected by, has no pressure.
    felt = day.pressure[frame.cells[who]] if day.pressure.size else np.zeros((who.size, 0))
    scale = frame.susceptibility[frame.classes[who] if frame.classes.size else 0] * frame.infection_scale[stage[who]]
    return Tape(
        moved_slot[:moves].copy(),
        moved_agent[:moves].copy(),
        moved[:moves].copy(),
        slot[:turns].copy(),
        kind[:turns].copy(),
        ratio[:turns].copy(),
        origin[:turns].copy(),
        begin[: turns + 1].copy(),
        listed[:used].copy(),
        stages[:used].copy(),
        who,
        np.stack([stage[who], flips.stage[winners], after[who]], axis=1),
        branch,
        scale * flips.factor[winners],
        felt,
        day.factor.copy(),
        day.exit_weight[..., -1].copy(),
    )


@nb.njit(nogil=True, cache=True)
def _moves(
    stage: Stages,
    after: Stages,
    first_slot: Ints,
    slots: Slots,
    active: Slots32,
    first: Ints,
    held: Slots32,
    old_member: Slots32,
    old_alternative: Stages,
    member: Slots32,
    alternative: Stages,
    to_slot: Slots32,
    to_agent: Slots32,
    to_stages: Stages,
) -> int:
    """Whoever counts and moved in an alternative, in truth, or began to differ; returns how many."""
    found = 0
    for a in range(active.shape[0]):
        q = active[a]
        uncounted = uncounted_seed(slots.seed[q], slots.imported[q], layer_of(first_slot, q))
        # Those who still differ come in the order they had, those who differ from now on after them.
        at, end = slots.first[q], slots.first[q] + slots.held[q]
        last = first[a] + held[a]
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


@nb.njit(nogil=True, cache=True)
def _turns(
    after: Stages,
    first_slot: Ints,
    slots: Slots,
    flips: Flips,
    fresh: Fresh,
    touched: Slots32,
    member: Slots32,
    alternative: Stages,
    slot: Slots32,
    kind: Stages,
    ratio: Floats,
    origin: Slots32,
    begin: Slots32,
    listed: Slots32,
    stages: Stages,
    place: Slots32,
) -> tuple[int, int]:
    """Slots whose weight changes, with what they hold; returns how many, and the length of the lists.

    Args:
        place: receives the place of each flip that won [flips].
    """
    weight, total, winner = slots.weight, slots.total, slots.winner
    last, direct = weight.shape[1] - 1, flips.agent.shape[0]
    turns, won, used = 0, 0, 0
    for a in range(touched.shape[0]):
        q = touched[a]
        w = winner[q]
        origin[turns] = -1
        if w == GONE:
            if slots.held[q] == 0:
                continue
            kind[turns], ratio[turns] = _GONE, 0.0
        elif w == OLD:
            if total[q] == 0.0:
                continue
            scale = total[q] / abs(weight[q, last])
            if scale == 1.0:
                continue
            kind[turns], ratio[turns] = _SCALED, scale
        elif w < direct:
            if place[w] < 0:
                place[w] = won
                won += 1
            kind[turns], ratio[turns], origin[turns] = _FLIP, total[q] / flips.size[w], place[w]
        else:
            source = fresh.slot[w - direct]
            kind[turns], ratio[turns], origin[turns] = _IMPORT, total[q] / abs(weight[source, last]), source
        slot[turns] = q
        uncounted = uncounted_seed(slots.seed[q], slots.imported[q], layer_of(first_slot, q))
        for m in range(slots.first[q], slots.first[q] + slots.held[q]):
            i = member[m]
            if i != uncounted:
                listed[used] = i
                stages[used, 0] = alternative[m]
                stages[used, 1] = after[i]
                used += 1
        turns += 1
        begin[turns] = used
    return turns, used


@nb.njit(nogil=True, cache=True, inline="always")
def _class(classes: NDArray[np.int16], i: int) -> int:
    return int(classes[i]) if classes.shape[0] > 0 else 0


@nb.njit(nogil=True, cache=True)
def _add_worth(
    to: Floats,
    at: int,
    sign: float,
    i: int,
    one: int,
    other: int,
    classes: NDArray[np.int16],
    cells: Slots32,
    shift: Ints,
    infectivity: Floats,
    people: Floats,
    reach: Floats,
) -> None:
    """Add ± the worth of somebody's being in one stage rather than another to a row of `to`.

    Args:
        shift: from a network's cells to rows of `reach`; `_LAYER` for layers, whose sums are followed [networks].
    """
    if one == other:
        return
    c = _class(classes, i)
    for b in range(to.shape[1]):
        to[at, b] += sign * (people[one, c, b] - people[other, c, b])
    for n in range(shift.shape[0]):
        d = infectivity[n, one] - infectivity[n, other]
        if shift[n] != _LAYER and d != 0.0:
            row = cells[i, n] + shift[n]
            for b in range(to.shape[1]):
                to[at, b] += sign * d * reach[row, b]


@nb.njit(nogil=True, cache=True)
def _add_flow(to: Floats, at: int, sign: float, c: int, source: int, end: int, edge_of: Ints, flow: Floats) -> None:
    if source != end:
        e = edge_of[source, end]
        for b in range(to.shape[1]):
            to[at, b] += sign * flow[e, c, b]


@nb.njit(nogil=True, cache=True)
def pull(frame: Frame, shift: Ints, tape: Tape, back: Cotangents) -> None:
    """Take the cotangents of one lane back over a step.

    Args:
        frame: the run's.
        shift: see `shifts`.
        tape: of the step.
        back: `slot`, `factor`, `linear` and `exits` are changed.
    """
    classes, cells, infectivity, edge_of = frame.classes, frame.cells, frame.infectivity, frame.edge_of
    slot, kind, ratio, origin, begin = tape.slot, tape.kind, tape.ratio, tape.origin, tape.first
    adjoint, people, reach, flow = back.slot, back.people, back.reach, back.flow
    turns, batch = slot.shape[0], adjoint.shape[1]
    taken = np.zeros((turns, batch))
    worth = np.zeros((1, batch))
    for e in range(turns):
        q = slot[e]
        worth[:] = 0.0
        for m in range(begin[e], begin[e + 1]):
            one, other = tape.stages[m, 0], tape.stages[m, 1]
            _add_worth(worth, 0, 1.0, tape.member[m], one, other, classes, cells, shift, infectivity, people, reach)
        if kind[e] == _SCALED:
            for b in range(batch):
                adjoint[q, b] = ratio[e] * (adjoint[q, b] + worth[0, b]) - worth[0, b]
            continue
        for b in range(batch):
            taken[e, b] = adjoint[q, b]
            adjoint[q, b] = -worth[0, b]
        if kind[e] == _FLIP and q < frame.first_slot[1]:
            # Only in the first layer does the seed of a flip count.
            f = origin[e]
            i = tape.flip_agent[f]
            before, one, other = tape.flip_stages[f, 0], tape.flip_stages[f, 1], tape.flip_stages[f, 2]
            _add_worth(taken, e, 1.0, i, one, other, classes, cells, shift, infectivity, people, reach)
            _add_flow(taken, e, 1.0, _class(classes, i), before, one, edge_of, flow)
            _add_flow(taken, e, -1.0, _class(classes, i), before, other, edge_of, flow)
        for b in range(batch):
            taken[e, b] *= ratio[e]
    for e in range(turns):
        if kind[e] == _IMPORT:
            for b in range(batch):
                adjoint[origin[e], b] += taken[e, b]
        elif kind[e] == _FLIP:
            f = origin[e]
            i, branch = tape.flip_agent[f], tape.flip_branch[f]
            if branch >= 0:
                for b in range(batch):
                    back.exits[tape.flip_stages[f, 0], branch, _class(classes, i), b] += taken[e, b]
                continue
            for n in range(shift.shape[0]):
                for b in range(batch):
                    back.factor[n, b] += taken[e, b] * tape.gain[f] * tape.pressure[f, n]
                if shift[n] != _LAYER:
                    row = cells[i, n] + shift[n]
                    for b in range(batch):
                        back.linear[row, b] += taken[e, b] * tape.gain[f]
    for k in range(tape.moved_slot.shape[0]):
        q, i = tape.moved_slot[k], tape.moved_agent[k]
        old, new, stage, after = tape.moved[k, 0], tape.moved[k, 1], tape.moved[k, 2], tape.moved[k, 3]
        _add_worth(adjoint, q, 1.0, i, new, after, classes, cells, shift, infectivity, people, reach)
        _add_worth(adjoint, q, -1.0, i, old, stage, classes, cells, shift, infectivity, people, reach)
        _add_flow(adjoint, q, 1.0, _class(classes, i), old, new, edge_of, flow)
        _add_flow(adjoint, q, -1.0, _class(classes, i), stage, after, edge_of, flow)


def shifts(frame: Frame) -> Ints:
    """From a network's cells to rows of linear networks; see `pull` [networks]."""
    return np.where(frame.layer < 0, frame.first_linear - frame.first_cell, _LAYER)


@nb.njit(nogil=True, cache=True)
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

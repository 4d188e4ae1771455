"""Who differs in cluster alternates, list by list: surveyed after a step, packed, and added up into sums."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import column, fetch, fetch_column
from lpm.kernels.clusters import BARE, LIVE, NOBODY, Floats, Frame, Ints, Part, Sent, Slots, active
from lpm.kernels.decisions import one_minus_exp

__all__ = ["LIST", "PEOPLE", "PLACE", "SUM", "fetch_list", "pack", "scatter", "survey", "uncounted_seed"]

# Slots are read in their order, but people of one workplace live all over the city, and so do offers to it: a loop
# would wait for the memory at each, longer than for all it computes. So it asks beforehand, link by link of a chain,
# for what it will read so many slots later.
LIST, PEOPLE, PLACE, SUM = 36, 24, 12, 6
"""How many slots ahead a loop asks for a list, for its people, for where they are, for the sum there."""


@nb.njit(**BARE, inline="always")
def uncounted_seed(seed: NDArray[np.int32], imported: NDArray[np.int8], layer: int, q: int) -> int:
    """Whose difference doesn't count, or −1: a seed counts only in the first layer, and only where it began."""
    return int(seed[q]) if seed.shape[0] > 0 and (layer > 0 or imported[q] == 1) else -1


@nb.njit(**BARE, inline="always")
def fetch_list(q: int, slots: Slots, member: NDArray[np.int32], alternative: NDArray[np.int8]) -> None:
    """Ask for a slot's list."""
    if slots.held[q] > 0:
        fetch(member, slots.first[q])
        fetch(alternative, slots.first[q])


@nb.njit(**BARE)
def survey(
    part: Part,
    after: NDArray[np.int8],
    frame: Frame,
    slots: Slots,
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
) -> None:
    """What the alternatives hold after the step: their infectivity, and whether anything is still to come.

    Args:
        part: the slots that are looked at.
        after: stages after the step [agents].
        frame: the run's.
        slots: their `excess` and `status` are changed, and nothing competes any more.
        member: lists of who differs.
        alternative: where they are.
    """
    first, held, excess, status = slots.first, slots.held, slots.excess, slots.status
    infectivity, busy, loud = frame.infectivity, frame.busy, frame.loud
    for s in range(part.stretch.shape[0]):
        n = frame.network[part.stretch[s, 0]]
        found = active(part.stretch[s, 2], part.stretch[s, 3], status, part.room)
        for a in range(found):
            if a + PEOPLE < found:
                fetch_list(part.room[a + PEOPLE], slots, member, alternative)
            if a + PLACE < found:
                soon = part.room[a + PLACE]
                for m in range(first[soon], first[soon] + held[soon]):
                    fetch(after, member[m])
            q = part.room[a]
            slots.winner[q] = NOBODY
            more = 0.0
            alive = False
            for m in range(first[q], first[q] + held[q]):
                i, other = member[m], alternative[m]
                alive = alive or busy[other] == 1 or loud[after[i]] == 1
                if n >= 0:
                    more += infectivity[n, other] - infectivity[n, after[i]]
            excess[q] = more
            status[q] = LIVE if alive else np.uint8(0)


@nb.njit(**BARE)
def pack(part: Part, slots: Slots, values: NDArray[Any], to: NDArray[Any], begin: int, last: bool) -> int:
    """Copy one of the arrays of the lists of slots close together; returns the end.

    Args:
        part: whose lists.
        slots: their `first` follows with the last of the arrays.
        values: of the lists.
        to: receives them.
        begin: from where on.
        last: whether no other array is still where it was.
    """
    first, held = slots.first, slots.held
    for layer in range(part.low.shape[0]):
        for q in range(part.low[layer], part.high[layer]):
            for m in range(held[q]):
                to[begin + m] = values[first[q] + m]
            if last:
                first[q] = begin if held[q] > 0 else -1
            begin += held[q]
    return begin


@nb.njit(**BARE, inline="always")
def _share(x: float) -> float:
    """(1 − e^−x)/x: what a hazard adds to a probability, to what its derivative does."""
    return one_minus_exp(x) / x if abs(x) > 1e-9 else 1.0


@nb.njit(**BARE)
def scatter(
    stage: NDArray[np.int8],
    frame: Frame,
    slots: Slots,
    member: NDArray[np.int32],
    alternative: NDArray[np.int8],
    stretch: Ints,
    room: NDArray[np.int32],
    n: int,
    offsets: Ints,
    readers: Ints,
    rate: float,
    sent: Floats,
    kept: Sent,
    total: Floats,
) -> int:
    """Derivatives and reference of a linear network's infectivity sums: what differences that count add to them.

    Args:
        stage: actual [agents].
        frame: the run's.
        slots: all.
        member: lists of who differs.
        alternative: where they are.
        stretch: of all slots in their order; see `Part`.
        room: see `Part`.
        n: number of the network.
        offsets: over edges, where the readers of each agent begin [agents + 1]; empty where people meet in cells.
        readers: over edges, who reads [edges].
        rate: over edges, the hazard that a unit of infectivity is to a reader.
        sent: over edges, receives the reference of what each agent's differences add to a sum [graphs, agents].
        kept: over edges, receives what seeds add, for the way back; may be empty.
        total: added to [cells, P + 1].

    Returns:
        how many entries of `kept` there are.
    """
    infectivity, place = frame.infectivity, frame.cells[n]
    seed, imported, first, held, weight = slots.seed, slots.imported, slots.first, slots.held, slots.weight
    via, left = slots.via, slots.left
    by_edges, g, last, entries = offsets.shape[0] > 0, frame.graph[n], weight.shape[1] - 1, 0
    for s in range(stretch.shape[0]):
        layer = stretch[s, 0]
        found = active(stretch[s, 2], stretch[s, 3], slots.status, room)
        for a in range(found):
            if a + PEOPLE < found:
                fetch_list(room[a + PEOPLE], slots, member, alternative)
            if a + PLACE < found:
                soon = room[a + PLACE]
                fetch(weight, soon * weight.shape[1])
                for m in range(first[soon], first[soon] + held[soon]):
                    fetch(stage, member[m])
                    if not by_edges:
                        fetch_column(place, member[m])
            if a + SUM < found and not by_edges:
                soon = room[a + SUM]
                for m in range(first[soon], first[soon] + held[soon]):
                    fetch(total, column(place, member[m]) * (last + 1))
            q = room[a]
            uncounted = uncounted_seed(seed, imported, layer, q)
            for m in range(first[q], first[q] + held[q]):
                i = member[m]
                d = infectivity[n, alternative[m]] - infectivity[n, stage[i]]
                if d == 0.0 or i == uncounted:
                    continue
                if not by_edges:
                    cell = column(place, i)
                    for x in range(last + 1):
                        total[cell, x] += d * weight[q, x]
                    continue
                source, part = -1, 1.0
                if seed[q] == i:
                    # As much of a difference as makes a neighbour's chance what it is with all of it.
                    source, part = via[q], np.float64(np.float32(left[q, g] * _share(rate * d)))
                    if kept.slot.shape[0] > 0:
                        kept.network[entries], kept.slot[entries], kept.agent[entries] = n, q, i
                        kept.stages[entries, 0], kept.stages[entries, 1] = alternative[m], stage[i]
                        kept.via[entries], kept.part[entries] = source, part
                        entries += 1
                    if d > 0.0:
                        left[q, g] *= np.exp(-rate * d)
                sent[g, i] += d * part * weight[q, last]
                for e in range(offsets[i], offsets[i + 1]):
                    reader = readers[e]
                    if reader != source:
                        for x in range(last + 1):
                            total[reader, x] += d * part * weight[q, x]
    return entries

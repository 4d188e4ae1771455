"""The arrays that cluster alternates work on: the frame of a run, its slots, and room for what a step finds.

They are made once, in numpy; the loops over them are in `clusters`, `offers`, `evolution` and `adjoint`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels import clusters
from lpm.kernels.addresses import addresses_of
from lpm.kernels.clusters import Flips, Frame, Fresh, Outcome, Part, Sent, Slots
from lpm.kernels.spec import Spec
from lpm.networks import Edges, Groups, Network
from lpm.rng import Ids

__all__ = [
    "clear_slots",
    "make_among",
    "make_flips",
    "make_frame",
    "make_fresh",
    "make_outcome",
    "make_parts",
    "make_sent",
    "make_slots",
]


def make_among(network: Network, size: Tensor | None) -> NDArray[np.float64] | None:
    """How many people one unit of infectivity of a member is shared out among in their own cell; None: one [cells]."""
    people = None if size is None else size.numpy()
    if isinstance(network, Edges):
        return np.full(network.cells, np.inf)
    if network.mixing is not None:
        own = np.diagonal(np.asarray(network.mixing, dtype=np.float64))
        with np.errstate(divide="ignore"):
            return (1.0 if people is None else np.maximum(people, 1.0)) / own
    if isinstance(network, Groups) and network.outsiders:
        people = np.ones(network.cells) if people is None else people.copy()
        people[0] = np.inf
    return people


def make_parts(frame: Frame, threads: int) -> list[Part]:
    """The slots of each thread; whole runs."""
    runs = -(-np.diff(frame.first_slot) // frame.run)
    cuts = np.arange(threads + 1)[:, None] * runs // threads
    edges = np.minimum(frame.first_slot[:-1] + cuts * frame.run, frame.first_slot[1:])
    earlier = np.cumsum(runs) - runs
    parts = []
    for low, high, begin, end in zip(edges[:-1], edges[1:], cuts[:-1], cuts[1:], strict=True):
        stretches = [
            (layer, earlier[layer] + run, a, min(a + clusters.LONGEST, first + frame.run[layer], high[layer]))
            for layer in range(low.size)
            for run in range(begin[layer], end[layer])
            for first in [frame.first_slot[layer] + run * frame.run[layer]]
            for a in range(first, min(first + frame.run[layer], high[layer]), clusters.LONGEST)
        ]
        stretch = np.array(stretches, dtype=np.int64).reshape(-1, 4)
        parts.append(Part(low, high, stretch, np.empty(clusters.LONGEST + 1, dtype=np.int32)))
    return parts


def make_flips(room: int, threads: int, layers: int, graphs: int) -> Flips:
    """Room for the flips of a step, shared out among threads."""
    return Flips(
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.float32),
        np.empty(room, dtype=np.float32),
        np.empty(room if graphs else 0, dtype=np.int32),
        np.empty((room, layers), dtype=np.int32),
        np.empty((room, layers), dtype=np.uint32),
        np.zeros((threads, 2), dtype=np.int64),
    )


def make_fresh(room: int, threads: int, layers: int) -> Fresh:
    """Room for those who come to differ in a step, shared out among threads."""
    return Fresh(
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
        np.empty((room, layers), dtype=np.int32),
        np.zeros((threads, 2), dtype=np.int64),
    )


def make_outcome(part: Part, parameters: int) -> Outcome:
    """Room for how the slots of a thread are competed for."""
    slots = int((part.high - part.low).sum())
    return Outcome(
        np.empty(slots, dtype=np.float32),
        np.zeros(part.low.size, dtype=np.int64),
        np.empty((slots, parameters + 1)),
    )


def make_sent(room: int) -> Sent:
    """Room for what seeds add to a sum over edges."""
    return Sent(
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty((room, 2), dtype=np.int8),
        np.empty(room, dtype=np.float32),
    )


def make_slots(slots: int, parameters: int, layers: int, graphs: int) -> Slots:
    """Slots without alternatives."""
    linked, joined = slots if layers > 1 else 0, slots if graphs else 0
    return Slots(
        weight=np.zeros((slots, parameters + 1)),
        excess=np.zeros(slots, dtype=np.float32),
        status=np.zeros(slots, dtype=np.uint8),
        first=np.full(slots, -1, dtype=np.int32),
        held=np.zeros(slots, dtype=np.uint8),
        winner=np.full(slots, clusters.NOBODY, dtype=np.int32),
        seed=np.full(max(linked, joined), -1, dtype=np.int32),
        imported=np.zeros(max(linked, joined), dtype=np.int8),
        generation=np.zeros(linked, dtype=np.uint16),
        apart=np.full((linked, layers - 1), clusters.NOWHERE, dtype=np.int8),
        link=np.zeros((linked, layers - 1), dtype=np.uint16),
        via=np.full(joined, -1, dtype=np.int32),
        left=np.ones((joined, graphs), dtype=np.float32),
    )


def clear_slots(slots: Slots) -> None:
    """Take the alternatives out of slots, as `make_slots` makes them."""
    empty = make_slots(1, slots.weight.shape[1] - 1, slots.link.shape[1] + 1, slots.left.shape[1])
    for name, value in empty._asdict().items():
        getattr(slots, name)[:] = value


def make_frame(
    spec: Spec, ids: Ids, layers: Sequence[int], linear: Sequence[int]
) -> tuple[Frame, list[NDArray[np.int32] | NDArray[np.int8]]]:
    """What does not change in a run: who is in which slot, and what each stage can do.

    Returns:
        The frame, and what must be kept besides the spec, because the frame has only its address.
    """
    agents, networks, stages = spec.agents, spec.networks, len(spec.stages)
    first_cell = np.cumsum([0, *(network.cells for network in networks)])
    # Where people meet over edges, each has a cell.
    cells = [None if isinstance(network, Edges) else network.cell_of for network in networks]
    graph = np.full(len(networks), -1, dtype=np.int64)
    graphs = [k for k, network in enumerate(networks) if isinstance(network, Edges)]
    graph[graphs] = np.arange(len(graphs))
    shuffled = ids.listed if np.any(ids.listed[1:] < ids.listed[:-1]) else None
    sources = [
        network.sources_in_order(shuffled) if isinstance(network, Edges) else (None, None) for network in networks
    ]
    layer = np.full(len(networks), -1, dtype=np.int64)
    layer[list(layers)] = np.arange(len(layers))
    first_linear = np.zeros(len(networks), dtype=np.int64)
    first_linear[list(linear)] = np.cumsum([0, *(networks[k].cells for k in linear)])[:-1]

    groups = [network for network in (networks[k] for k in layers) if isinstance(network, Groups)]
    width = [1 if network.group_size < 6 else 3 for network in groups] or [1]
    first_slot, alone_from = [0], []
    slot: list[NDArray[np.int32] | NDArray[np.int8] | None] = []
    layout = []
    own: list[NDArray[np.int32] | NDArray[np.int8]] = [c for both in sources for c in both if c is not None]
    for place, network in enumerate(groups):
        begin = first_slot[-1]
        inside = begin + network.cells * width[place]
        alone = network.cell_of == 0 if network.outsiders else np.zeros(0, dtype=np.bool_)
        people = int(alone.sum()) if place == 0 else 0
        turn = _turns(network, width[place], ids) if width[place] > 1 else None
        if network.outsiders:
            number = network.cell_of * np.int32(width[place]) + np.int32(begin)
            if turn is not None:
                number += turn
            number[alone] = np.arange(inside, inside + people) if place == 0 else -1
            slot += [number, None]
            own.append(number)
            layout.append((0, 1))
        else:
            slot += [network.cell_of, turn]
            own += [] if turn is None else [turn]
            layout.append((begin, width[place]))
        alone_from.append(inside)
        first_slot.append(inside + people)
    if not layers:
        slot += [None, None]
        layout.append((0, 1))
        first_slot.append(agents)
        alone_from.append(0)

    edge_of = np.full((stages, stages), -1, dtype=np.int64)
    for e, (source, to) in enumerate(spec.edges):
        edge_of[source, to] = e
    infection_edge, infection_scale = spec.infections
    advance = np.zeros_like(spec.exit_edges)
    ahead = _infectiousness_ahead(spec)
    for s, edges in spec.exits.items():
        advance[s, : len(edges)] = [ahead[spec.edges[e][1]] >= ahead[s] for e in edges]
    loud = np.any(spec.infectivity != 0.0, axis=0).astype(np.int8)
    busy = loud.copy()
    busy[[*spec.infection, *spec.exits]] = 1
    return Frame(
        cells=addresses_of(cells),
        slot=addresses_of(slot).reshape(-1, 2),
        layout=np.array(layout, dtype=np.int64),
        classes=spec.class_of,
        first_id=np.uint64(ids.first),
        ids=ids.listed,
        network=np.array(layers or [-1], dtype=np.int64),
        layer=layer,
        first_cell=first_cell[:-1].astype(np.int64),
        first_slot=np.array(first_slot, dtype=np.int64),
        alone=np.array(alone_from, dtype=np.int64),
        run=np.maximum(-(-np.diff(first_slot) // clusters.RUNS), clusters.SHORTEST),
        graph=graph,
        sources=addresses_of([column for both in sources for column in both]).reshape(-1, 2),
        first_linear=first_linear,
        width=np.array(width, dtype=np.int64),
        infectivity=np.ascontiguousarray(spec.infectivity),
        infection_edge=infection_edge,
        infection_scale=infection_scale,
        exit_edge=spec.exit_edges,
        busy=busy,
        loud=loud,
        advance=advance,
        edge_of=edge_of,
        target=np.array([to for _, to in spec.edges], dtype=np.int64),
        susceptibility=spec.susceptibility,
    ), own


def _turns(network: Groups, width: int, ids: Ids) -> NDArray[np.int8]:
    """Which of its group's slots each agent takes: in turn, in the order of their ids [agents]."""
    agents = network.agents
    order = np.argsort(ids.listed, kind="stable") if ids.listed.size else np.arange(agents)
    begin = np.cumsum(network.members) - network.members
    rank = np.arange(agents) - np.repeat(begin, network.members)
    turns = np.empty(agents, dtype=np.int8)
    turns[order[np.argsort(network.cell_of[order], kind="stable")]] = rank % width
    return turns


def _infectiousness_ahead(spec: Spec) -> NDArray[np.float64]:
    """What is surely still to come, each stage counted as one day: who leaves for less loses infectiousness."""
    own: NDArray[np.float64] = spec.infectivity.max(axis=0, initial=0.0)
    ahead = own.copy()
    for _ in spec.stages:
        for s, edges in spec.exits.items():
            ahead[s] = own[s] + min(ahead[spec.edges[e][1]] for e in edges)
    return ahead

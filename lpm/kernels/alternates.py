"""Cluster alternates: derivatives that are true where people meet the same few others every day (paper, eq. 8).

Beside the actual state every small group keeps alternatives: what would be if one decision had come out otherwise, with
a weight by parameter. Inside the group nothing is linearised: the alternative steps with the same random words. What
it sends to large groups is its difference from the actual, times the weight, and so goes through ⊕ as a tangent.

The rules, for layers of groups (households, workplaces) that overlap:
1. A decision that came out against more infectiousness ("not infected", "recovered") offers its opposite, with the
   derivative of the probability over it as weight, to the agent's slot in every layer. Derivatives through the layers'
   own sums are left out: they happen inside the alternatives.
2. Somebody who differs in a slot from today on is offered, with that slot's weight, to their slots in the other
   layers. So each clump of differences is followed where it grows, and grows on elsewhere as a clump of its own.
3. In its own layer an alternative meets its own sum, in the others the actual one less the agent's own part; but a
   seed that came from another slot meets that slot's sum, as long as that alternative stands, and the other way round.
4. Every difference counts, except a seed outside the first layer and an imported one anywhere: each once.
5. Where several compete for a slot one is kept, at random with probability ∝ its reference weight, and its weight
   divided by that. The reference is the derivative in the direction that raises every probability by the same factor:
   so no choice depends on the parameters, and all weights are linear with coefficients that don't either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.kernels import clusters, evolution, offers
from lpm.kernels.clusters import Day, Flips, Frame, Fresh, Slots
from lpm.kernels.cpu import Fused
from lpm.kernels.spec import Spec, Summed, Tables, decode, hazards
from lpm.networks import Edges, Groups, Network
from lpm.relax import thresholds
from lpm.rng import Address

__all__ = ["Alternates", "Slopes", "layers_of"]

LARGEST = 100
"""Most people of one group of a layer: the cost grows with the group, and a larger one is near enough to linear."""

_STEEP = 0.95
"""Probability of leaving beyond which a flip withholds the exit rather than adds one."""


@dataclass(frozen=True)
class Slopes:
    """Derivatives of what a contagion is told in a step; the last axis of each is that of parameters.

    Attributes:
        cumulative: as `Tables.cumulative`, each [C or 1, lanes, P].
        factors: as `Tables.factors`, each [lanes, P].
        sums: opened tangents of the sums of shared networks, the reference last [cells, lanes, P + 1].
    """

    cumulative: Mapping[int, tuple[NDArray[np.float64], ...]]
    factors: Mapping[str, NDArray[np.float64]]
    sums: Mapping[str, NDArray[np.float64]]


def layers_of(networks: Sequence[Network]) -> list[int]:
    """Which networks are layers, those of the smallest groups first.

    Raises:
        InputError: naming a layer with a group of more than `LARGEST` people.
    """
    found = []
    for number, network in enumerate(networks):
        if not (isinstance(network, Groups) and network.is_layer):
            continue
        sizes = network.members[1:] if network.outsiders else network.members
        largest = int(sizes.max(initial=0))
        if largest > LARGEST:
            raise InputError(
                f"the layer {network.name} has a group of {largest} people: at most {LARGEST};",
                f"declare it lpm.Groups({network.name!r}, …, layer=False): its sums are then linear.",
            )
        found.append((float(sizes.mean()) if sizes.size else 0.0, number))
    return [number for _, number in sorted(found)]


class Alternates:
    """Executor of plain values, to the bit, that keeps alternatives beside them.

    Args:
        parameters: P.
    """

    name = "cpu"

    def __init__(self, parameters: int) -> None:
        self._plain = Fused()
        self._parameters = parameters
        self._clusters: dict[int, _Clusters] = {}
        self._told: dict[int, Slopes] = {}

    def tell(self, spec: Spec, slopes: Slopes) -> None:
        """Derivatives of what the next `start` or `advance` of a contagion is given."""
        self._told[id(spec)] = slopes

    def sums(self, spec: Spec, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents and reference of a shard's infectivity sums [cells, lanes, P + 1]."""
        return self._clusters[id(spec)].sums(network, stage)

    def records(self, spec: Spec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Derivatives of the last step's transitions [E, C, lanes, P] and people in stages [S, C, lanes, P]."""
        mine = self._clusters[id(spec)]
        return mine.flow, mine.count

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        state = self._plain.start(spec, cumulative, fixed, uniform, lanes)
        mine = self._clusters[id(spec)] = _Clusters(spec, uniform.agents.array(), lanes, self._parameters)
        words = uniform.words()[0]
        for lane in range(lanes):
            mine.start(lane, state["stage"].numpy(), cumulative, fixed, words, self._told[id(spec)], _address(uniform))
        return state

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        return self._plain.emit(spec, state, tables, network)

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return self._plain.occupancy(spec, state)

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        mine = self._clusters[id(spec)]
        words, address = tables.uniform.words()[0], _address(tables.uniform)
        stage = state["stage"].numpy()
        totals = {
            network.name: shared[network.name] if network.shared else decode(self.emit(spec, state, tables, k).words)
            for k, network in enumerate(spec.networks)
        }
        after = np.empty_like(stage)
        flows = np.zeros((len(spec.edges), spec.class_count, stage.shape[1]), dtype=np.int64)
        for lane in range(stage.shape[1]):
            after[:, lane], flows[..., lane] = mine.advance(
                lane, np.ascontiguousarray(stage[:, lane]), words, tables, totals, self._told[id(spec)], address
            )
        counts = np.zeros((len(spec.stages), spec.class_count, stage.shape[1]), dtype=np.int64)
        for lane in range(stage.shape[1]):
            flat = np.bincount(
                after[:, lane].astype(np.int64) * spec.class_count + spec.classes, minlength=counts[..., lane].size
            )
            counts[..., lane] = flat.reshape(len(spec.stages), spec.class_count)
        return {"stage": torch.from_numpy(after)}, torch.from_numpy(flows), torch.from_numpy(counts)

    def snapshot(self, spec: Spec) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs."""
        return self._clusters[id(spec)].snapshot()

    def restore(self, spec: Spec, ids: NDArray[np.uint64], lanes: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint."""
        mine = self._clusters[id(spec)] = _Clusters(spec, ids, lanes, self._parameters)
        mine.restore(found)


class _Clusters:
    """The alternatives of one contagion in all lanes."""

    def __init__(self, spec: Spec, ids: NDArray[np.uint64], lanes: int, parameters: int) -> None:
        self.spec, self.parameters = spec, parameters
        layers = layers_of(spec.networks)
        self.linear = [k for k in range(len(spec.networks)) if k not in layers]
        self.frame = _frame(spec, ids, layers, self.linear)
        slots = int(self.frame.first_slot[-1])
        self.slots = [_slots(slots, parameters, self.frame.network.size) for _ in range(lanes)]
        self.active = [np.empty(0, dtype=np.int32) for _ in range(lanes)]
        self.member = [np.empty(0, dtype=np.int32) for _ in range(lanes)]
        self.alternative = [np.empty(0, dtype=np.int8) for _ in range(lanes)]
        self.flow = np.zeros((len(spec.edges), spec.class_count, lanes, parameters))
        self.count = np.zeros((len(spec.stages), spec.class_count, lanes, parameters))

    def start(
        self,
        lane: int,
        stage: NDArray[np.int8],
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: NDArray[np.uint64],
        slopes: Slopes,
        address: NDArray[np.uint64],
    ) -> None:
        """Alternatives to the draw of who begins where."""
        spec = self.spec
        if not cumulative:
            return
        drawn = list(cumulative)
        ends = [float(cumulative[s].detach().expand(1, len(self.slots))[0, lane]) for s in drawn]
        begun = np.diff([0.0, *ends])
        moved = np.diff(
            np.array(
                [
                    np.broadcast_to(slopes.cumulative[s][0], (1, len(self.slots), self.parameters))[0, lane]
                    for s in drawn
                ]
            ),
            axis=0,
            prepend=0.0,
        )
        rest = 1.0 - ends[-1]
        if rest <= 0.0:
            return
        mass = begun / rest
        width = np.minimum(mass / clusters.FLOOR, 1.0) * rest
        if width.sum() > rest:
            width *= rest / width.sum()
        window = np.floor(np.cumsum([ends[-1], *width]) * 2.0**32).astype(np.int64)
        free = np.ones(spec.classes.size, dtype=np.bool_)
        for positions in fixed.values():
            free[positions] = False
        word = uniform.astype(np.int64)
        most = int(((word >= window[0]) & (word < window[-1])).sum())
        flips, fresh = _flips(most), _fresh(0)
        offers.decide_start(uniform, free, window, np.array(drawn, dtype=np.int64), flips)
        # Shaped as an exit from stage 0 into each stage drawn.
        weight = np.zeros((len(spec.stages), len(drawn), spec.class_count, self.parameters + 1))
        safe = np.where(width > 0, width, 1.0)
        weight[0, :, :, :-1] = (moved / safe[:, None])[:, None, :]
        weight[0, :, :, -1] = (begun / safe)[:, None]
        flips.size[: flips.length[0]] = np.abs(weight[0, flips.branch[: flips.length[0]], 0, -1])
        flips.factor[:] = 0.0
        empty = np.zeros((0,))
        day = Day(
            empty,
            empty,
            empty,
            np.zeros((0, self.parameters)),
            np.zeros((0, self.parameters + 1)),
            np.zeros((0, 0, 0), dtype=np.int64),
            np.zeros((0, 0, 0), dtype=np.int64),
            weight,
            address,
        )
        now = np.ascontiguousarray(stage[:, lane])
        flow = np.zeros((*self.flow.shape[:2], 0))
        self._settle(lane, now, now, uniform, day, flips, fresh, flow)

    def _settle(
        self,
        lane: int,
        stage: NDArray[np.int8],
        after: NDArray[np.int8],
        words: NDArray[np.uint64],
        day: Day,
        flips: Flips,
        fresh: Fresh,
        flow: NDArray[np.float64],
    ) -> None:
        """Old and new alternatives compete, and the winners are what the next step begins with."""
        frame, slots, active = self.frame, self.slots[lane], self.active[lane]
        layers = frame.network.size
        most = active.size + layers * (int(flips.length[0]) + int(fresh.length[0]))
        touched = np.empty(most, dtype=np.int32)
        room = int(slots.held[active].sum()) + int(fresh.length[0]) + most
        member, alternative = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int8)
        count = offers.offer(frame, day, slots, flips, fresh, touched, 0)
        used, count = evolution.evolve(
            stage,
            after,
            words,
            frame,
            day,
            slots,
            active,
            self.member[lane],
            self.alternative[lane],
            fresh,
            member,
            alternative,
            flow,
            touched,
            count,
        )
        touched = touched[:count]
        imports = np.empty((count, self.parameters + 1))
        winners = np.empty(count, dtype=np.int32)
        found = evolution.resolve(
            stage, after, frame, day, slots, flips, fresh, touched, member, alternative, used, imports, flow, winners
        )
        self.active[lane], self.member[lane], self.alternative[lane] = winners[:found].copy(), member, alternative
        counted = np.zeros((*self.count.shape[:2], self.parameters))
        evolution.survey(after, frame, slots, self.active[lane], member, alternative, touched, counted)
        self.count[:, :, lane] = counted

    def advance(
        self,
        lane: int,
        stage: NDArray[np.int8],
        words: NDArray[np.uint64],
        tables: Tables,
        totals: Mapping[str, Tensor],
        slopes: Slopes,
        address: NDArray[np.uint64],
    ) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """One step of one lane: the stages after it and the transitions [E, C]."""
        spec, frame, slots = self.spec, self.frame, self.slots[lane]
        day, bound = self._day(lane, stage, tables, totals, slopes, address)
        limit = np.maximum(day.exit.max(axis=1, initial=0), day.window.max(axis=1, initial=0))
        low = np.empty(stage.size, dtype=np.int32)
        low = low[: offers.near(stage, words, frame, bound, limit, low)]
        after = stage.copy()
        flows = np.zeros((len(spec.edges), spec.class_count), dtype=np.int64)
        flips = _flips(low.size)
        fresh = _fresh(low.size * int((frame.width * (frame.network >= 0)).sum()))
        offers.decide(stage, words, low, frame, day, slots, self.member[lane], after, flows, flips, fresh)
        flow = np.zeros((*self.flow.shape[:2], self.parameters))
        self._settle(lane, stage, after, words, day, flips, fresh, flow)
        self.flow[:, :, lane] = flow
        return after, flows

    def _day(
        self,
        lane: int,
        stage: NDArray[np.int8],
        tables: Tables,
        totals: Mapping[str, Tensor],
        slopes: Slopes,
        address: NDArray[np.uint64],
    ) -> tuple[Day, NDArray[np.float64]]:
        spec, frame, slots = self.spec, self.frame, self.slots[lane]
        one = torch.ones((), dtype=torch.float64)
        pressure, share, linear, bound = [], [], [np.zeros((0, self.parameters + 1))], []
        factor = np.empty(len(spec.networks))
        factor_dot = np.empty((len(spec.networks), self.parameters))
        for k, network in enumerate(spec.networks):
            size = tables.sizes[network.name]
            factor[k] = tables.factors[network.name].expand(len(self.slots))[lane]
            factor_dot[k] = np.broadcast_to(slopes.factors[network.name], (len(self.slots), self.parameters))[lane]
            pressure.append(hazards(network, totals[network.name][:, lane : lane + 1], size, one)[:, 0].numpy())
            share.append(_share(network, size))
            widest = pressure[-1] * (1.0 + 1.0 / clusters.FLOOR)
            if k in self.linear:
                sums = slopes.sums[network.name][:, lane] if network.shared else self._sums(lane, k, stage)
                moved = hazards(network, torch.from_numpy(np.ascontiguousarray(sums)), size, one).numpy() * factor[k]
                linear.append(moved)
                bound.append(factor[k] * widest + np.abs(moved[:, -1]) / clusters.FLOOR)
            else:
                layer, cells = int(frame.layer[k]), network.cells
                width = int(frame.width[layer])
                begin = int(frame.first_slot[layer])
                most = slots.excess[begin : begin + cells * width].reshape(cells, width).max(axis=1)
                bound.append(factor[k] * (widest + share[-1] * np.maximum(most, 0.0)))
        exits, window, weight = self._exits(lane, tables, slopes)
        day = Day(
            np.concatenate(pressure),
            np.concatenate(share),
            factor,
            factor_dot,
            np.concatenate(linear),
            exits,
            window,
            weight,
            address,
        )
        return day, np.concatenate(bound)

    def _exits(
        self, lane: int, tables: Tables, slopes: Slopes
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Thresholds, windows in which flips are offered (−1: exits are withheld instead), and weights of flips."""
        spec, lanes = self.spec, len(self.slots)
        shape = (len(spec.stages), self.frame.exit_edge.shape[1], spec.class_count)
        exits, window = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        weight = np.zeros((*shape, self.parameters + 1))
        for s, edges in spec.exits.items():
            table = np.stack(
                [t.detach().expand(spec.class_count, lanes)[:, lane].numpy() for t in tables.cumulative[s]]
            )
            slope = np.stack(
                [np.broadcast_to(d, (spec.class_count, lanes, self.parameters))[:, lane] for d in slopes.cumulative[s]]
            )
            chance, moved = np.diff(table, axis=0, prepend=0.0), np.diff(slope, axis=0, prepend=0.0)
            rest = 1.0 - table[-1]
            exits[s, : len(edges)] = thresholds(torch.from_numpy(table)).numpy()
            withheld = (self.frame.advance[s, : len(edges), None] == 0) | (rest < 1.0 - _STEEP)
            # Windows of the exits that may be added share the words of those who stay.
            safe = np.where(rest > 0, rest, 1.0)
            width = np.where(withheld, 0.0, np.minimum(chance / safe / clusters.FLOOR, 1.0) * rest)
            total = width.sum(axis=0)
            width = width * np.where(total > rest, rest / np.where(total > 0, total, 1.0), 1.0)
            ends = np.floor((table[-1] + np.cumsum(width, axis=0)) * 2.0**32).astype(np.int64)
            window[s, : len(edges)] = np.where(withheld, -1, ends)
            divisor = np.where(withheld, -chance, width)
            divisor = np.where(divisor == 0.0, np.inf, divisor)[..., None]
            weight[s, : len(edges), :, :-1] = moved / divisor
            weight[s, : len(edges), :, -1] = chance / divisor[..., 0]
        return exits, window, weight

    def sums(self, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents and reference of the infectivity sums [cells, lanes, P + 1]."""
        columns = [self._sums(lane, network, np.ascontiguousarray(stage[:, lane])) for lane in range(len(self.slots))]
        return np.stack(columns, axis=1)

    def _sums(self, lane: int, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        place = self.spec.networks[network]
        total = np.zeros((place.cells, self.parameters + 1))
        lists = (self.active[lane], self.member[lane], self.alternative[lane])
        if isinstance(place, Edges):
            evolution.scatter_edges(
                stage, self.frame, self.slots[lane], *lists, network, *place.readers_by_source, total
            )
        else:
            evolution.scatter_groups(stage, self.frame, self.slots[lane], *lists, network, total)
        return total

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """All that the next step needs, by name."""
        found: dict[str, NDArray[Any]] = {}
        for lane, slots in enumerate(self.slots):
            found |= {f"{lane}:{name}": array.copy() for name, array in slots._asdict().items()}
            found |= {
                f"{lane}:active": self.active[lane],
                f"{lane}:member": self.member[lane],
                f"{lane}:alternative": self.alternative[lane],
            }
        return found

    def restore(self, found: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `snapshot`."""
        for lane in range(len(self.slots)):
            self.slots[lane] = Slots(**{name: found[f"{lane}:{name}"].copy() for name in Slots._fields})
            self.active[lane] = found[f"{lane}:active"].astype(np.int32)
            self.member[lane] = found[f"{lane}:member"].astype(np.int32)
            self.alternative[lane] = found[f"{lane}:alternative"].astype(np.int8)


def _address(uniform: Address) -> NDArray[np.uint64]:
    """Step + 1, protocol, and the two words of the seed."""
    seed = uniform.seed
    return np.array([uniform.step + 1, uniform.protocol, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint64)


def _share(network: Network, size: Tensor | None) -> NDArray[np.float64]:
    """Pressure that one unit of infectivity of a member makes in their own cell [cells]."""
    if isinstance(network, Edges):
        return np.zeros(network.cells)
    own = np.ones(network.cells) if size is None else 1.0 / np.maximum(size.numpy(), 1.0)
    if network.mixing is not None:
        own = own * np.diagonal(np.asarray(network.mixing, dtype=np.float64))
    if isinstance(network, Groups) and network.outsiders:
        own[0] = 0.0
    return own


def _flips(room: int) -> Flips:
    return Flips(
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.int8),
        np.empty(room),
        np.empty(room),
        np.zeros(1, dtype=np.int64),
    )


def _fresh(room: int) -> Fresh:
    return Fresh(
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int32),
        np.empty(room, dtype=np.int8),
        np.empty(room, dtype=np.int32),
        np.zeros(1, dtype=np.int64),
    )


def _slots(slots: int, parameters: int, layers: int) -> Slots:
    others = layers if layers > 1 else 0
    return Slots(
        weight=np.zeros((slots, parameters + 1)),
        excess=np.zeros(slots),
        first=np.zeros(slots, dtype=np.int64),
        held=np.zeros(slots, dtype=np.int32),
        seed=np.full(slots, -1, dtype=np.int32),
        imported=np.zeros(slots, dtype=np.int8),
        generation=np.zeros(slots, dtype=np.int32),
        source=np.full((slots, others), -1, dtype=np.int32),
        link=np.full((slots, others), -1, dtype=np.int32),
        total=np.zeros(slots),
        best=np.full(slots, np.inf),
        winner=np.full(slots, -2, dtype=np.int32),
        head=np.full(slots, -1, dtype=np.int32),
    )


def _frame(spec: Spec, ids: NDArray[np.uint64], layers: Sequence[int], linear: Sequence[int]) -> Frame:
    agents, networks, stages = spec.classes.size, spec.networks, len(spec.stages)
    first_cell = np.cumsum([0, *(network.cells for network in networks)])
    cells = np.empty((agents, len(networks)), dtype=np.int32)
    for k, network in enumerate(networks):
        cells[:, k] = network.cell_of + first_cell[k]
    layer = np.full(len(networks), -1, dtype=np.int64)
    layer[list(layers)] = np.arange(len(layers))
    first_linear = np.zeros(len(networks), dtype=np.int64)
    first_linear[list(linear)] = np.cumsum([0, *(networks[k].cells for k in linear)])[:-1]

    # Agents of a group take its slots in turn, in the order of their ids.
    order = np.argsort(ids, kind="stable")
    width = [1 if networks[k].members.mean() < 6 else 3 for k in layers] if layers else [1]
    slot = np.full((agents, max(len(layers), 1)), -1, dtype=np.int32)
    first_slot = [0]
    for place, k in enumerate(layers):
        network = networks[k]
        assert isinstance(network, Groups)
        cell = network.cell_of[order]
        rank = np.empty(agents, dtype=np.int64)
        rank[np.argsort(cell, kind="stable")] = (
            np.concatenate([np.arange(count) for count in network.members]) if agents else 0
        )
        slot[order, place] = first_slot[-1] + cell * width[place] + rank % width[place]
        total = network.cells * width[place]
        if network.outsiders:
            alone = network.cell_of == 0
            slot[alone, place] = first_slot[-1] + total + np.arange(int(alone.sum())) if place == 0 else -1
            total += int(alone.sum()) if place == 0 else 0
        first_slot.append(first_slot[-1] + total)
    if not layers:
        slot[:, 0] = np.arange(agents)
        first_slot.append(agents)

    edge_of = np.full((stages, stages), -1, dtype=np.int64)
    for e, (source, to) in enumerate(spec.edges):
        edge_of[source, to] = e
    infection_edge, infection_scale = np.full(stages, -1, dtype=np.int64), np.zeros(stages)
    for s, (edge, relative) in spec.infection.items():
        infection_edge[s], infection_scale[s] = edge, relative
    branches = max([len(edges) for edges in spec.exits.values()], default=1)
    exit_edge = np.full((stages, branches), -1, dtype=np.int64)
    advance = np.zeros((stages, branches), dtype=np.int64)
    ahead = _infectiousness_ahead(spec)
    for s, edges in spec.exits.items():
        exit_edge[s, : len(edges)] = edges
        advance[s, : len(edges)] = [ahead[spec.edges[e][1]] >= ahead[s] for e in edges]
    return Frame(
        cells=cells,
        slot=slot,
        classes=spec.classes,
        ids=ids,
        network=np.array(layers or [-1], dtype=np.int64),
        layer=layer,
        first_cell=first_cell[:-1].astype(np.int64),
        first_slot=np.array(first_slot, dtype=np.int64),
        first_linear=first_linear,
        width=np.array(width, dtype=np.int64),
        infectivity=np.ascontiguousarray(spec.infectivity),
        infection_edge=infection_edge,
        infection_scale=infection_scale,
        exit_edge=exit_edge,
        advance=advance,
        edge_of=edge_of,
        target=np.array([to for _, to in spec.edges], dtype=np.int64),
        susceptibility=spec.susceptibility,
    )


def _infectiousness_ahead(spec: Spec) -> NDArray[np.float64]:
    """What is surely still to come, each stage counted as one day: who leaves for less loses infectiousness."""
    own: NDArray[np.float64] = spec.infectivity.max(axis=0, initial=0.0)
    ahead = own.copy()
    for _ in spec.stages:
        for s, edges in spec.exits.items():
            ahead[s] = own[s] + min(ahead[spec.edges[e][1]] for e in edges)
    return ahead

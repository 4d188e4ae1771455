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
6. Over edges somebody meets the same few others for days, so what a seed adds to a neighbour's sum is only what has
   not infected them yet, and nothing to the neighbour whose difference it began with: drawn ∝ the shares in the flip's
   reference. Without it every case would be counted again as it comes back, and a lasting contact more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.kernels import adjoint, clusters, differences, evolution, offers
from lpm.kernels.addresses import addresses_of
from lpm.kernels.cell_hazards import cell_hazards
from lpm.kernels.clusters import LONGEST, Day, Frame, Part, Sent, Slots
from lpm.kernels.cpu import MARGIN, Fused, share_out, workers
from lpm.kernels.frames import (
    clear_slots,
    make_among,
    make_flips,
    make_frame,
    make_fresh,
    make_outcome,
    make_parts,
    make_sent,
    make_slots,
)
from lpm.kernels.spec import Slopes, Spec, Summed, Tables, decode
from lpm.kernels.windows import ExitWindows, exit_windows, start_windows
from lpm.networks import Edges, Groups, Network
from lpm.rng import Address, Ids

__all__ = ["Alternates", "layers_of"]

LARGEST = 250
"""Most people of one group of a layer: the cost grows with the group, and `Slots.held` counts to 255."""

_KEPT = ("weight", "excess", "status")
"""What a slot that holds somebody takes into the next step, besides its list."""

_LINKED = ("seed", "imported", "apart", "via", "left")
"""What it takes with it where there are several layers or edges."""

_IN_CELLS = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

_TOP = 0.5
"""Hazards up to this and their windows have bytes that tell them apart."""


def layers_of(networks: Sequence[Network]) -> list[int]:
    """Which networks are layers, those of the smallest groups first.

    Raises:
        InputError: naming a layer with a group of more than `LARGEST` people.
    """
    found = []
    for number, network in enumerate(networks):
        if not (isinstance(network, Groups) and network.is_layer):
            continue
        members = network.members[1:] if network.outsiders else network.members
        largest = int(members.max(initial=0))
        if largest > LARGEST:
            raise InputError(
                f"the layer {network.name} has a group of {largest} people: at most {LARGEST};",
                f"declare it lpm.Groups({network.name!r}, …, layer=False): its sums are then linear.",
            )
        found.append((network.group_size, number))
    return [number for _, number in sorted(found)]


class Alternates:
    """Executor of plain values, to the bit, that keeps alternatives beside them.

    Args:
        parameters: P.
        taped: whether each step's part in the weights is kept, for reverse mode.
    """

    name = "cpu"

    def __init__(self, parameters: int, taped: bool = False) -> None:
        self._plain = Fused()
        self.floats = parameters + 1
        self._parameters, self._taped = parameters, taped
        self._clusters: dict[int, _Clusters] = {}
        self._told: dict[int, Slopes] = {}

    def least_memory(self, spec: Spec) -> int:
        return 280 if self._taped else 50  # measured with a layer of households and few parameters

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
        mine = self._empty(spec, uniform.agents, lanes)
        for lane in range(lanes):
            mine.start(lane, state["stage"].numpy(), cumulative, fixed, self._told[id(spec)], _address(uniform))
        return state

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        return self._plain.emit(spec, state, tables, network)

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return self._plain.occupancy(spec, state)

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        mine = self._clusters[id(spec)]
        stage = state["stage"].numpy()
        agents, lanes = stage.shape
        totals, changed = self._plain.known(spec, state)
        after = np.empty((lanes, agents), dtype=np.int8)
        flows = np.zeros((len(spec.edges), spec.class_count, lanes), dtype=np.int64)
        bounds = []
        for lane in range(lanes):
            room = changed[lane * agents : (lane + 1) * agents]
            flows[..., lane], found = mine.advance(
                lane,
                np.ascontiguousarray(stage[:, lane]),
                after[lane],
                tables,
                [total[:, lane] for total in totals],
                shared,
                self._told[id(spec)],
                _address(tables.uniform),
                room,
            )
            for low, high in found:
                if lanes > 1:
                    room[low:high] = room[low:high] * lanes + lane
                bounds.append((lane * agents + low, lane * agents + high))
        # With one lane no copy is made.
        return self._plain.follow(spec, state, np.ascontiguousarray(after.T), np.array(bounds, dtype=np.int64), flows)

    def snapshot(self, spec: Spec) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs."""
        return self._clusters[id(spec)].snapshot()

    def restore(self, spec: Spec, ids: Ids, lanes: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint."""
        self._empty(spec, ids, lanes).restore(found)

    def _empty(self, spec: Spec, ids: Ids, lanes: int) -> _Clusters:
        """A contagion without alternatives; a run that goes back and starts again keeps its memory."""
        mine = self._clusters.get(id(spec))
        if mine is None:
            mine = self._clusters[id(spec)] = _Clusters(spec, ids, lanes, self._parameters, self._taped)
        else:
            mine.clear()
        return mine

    def frame(self, spec: Spec) -> Frame:
        """What does not change in a run."""
        return self._clusters[id(spec)].frame

    def take_tapes(self, spec: Spec) -> dict[int, adjoint.Tape]:
        """What the last step did to the weights, by lane; where nobody could start otherwise, the start did nothing."""
        mine = self._clusters[id(spec)]
        taken, mine.tapes = mine.tapes, {}
        return taken


class _Clusters:
    """The alternatives of one contagion in all lanes."""

    def __init__(self, spec: Spec, ids: Ids, lanes: int, parameters: int, taped: bool) -> None:
        self.spec, self.parameters, self.taped = spec, parameters, taped
        layers = layers_of(spec.networks)
        self.linear = [k for k in range(len(spec.networks)) if k not in layers]
        self.frame, self._columns = make_frame(spec, ids, layers, self.linear)
        agents, slots = spec.agents, int(self.frame.first_slot[-1])
        count, graphs = self.frame.network.size, int(np.count_nonzero(self.frame.graph >= 0))
        self.threads = workers(agents)
        self.parts = make_parts(self.frame, self.threads)
        stretches = np.concatenate([part.stretch for part in self.parts])
        self.stretches = stretches[np.argsort(stretches[:, 2])]
        self.slots = [make_slots(slots, parameters, count, graphs) for _ in range(lanes)]
        # Lists of who differs; each thread's slots have a stretch of their own, used so far up to `ends`.
        self.member = [np.empty(0, dtype=np.int32) for _ in range(lanes)]
        self.alternative = [np.empty(0, dtype=np.int8) for _ in range(lanes)]
        self.ends = [np.zeros(self.threads, dtype=np.int64) for _ in range(lanes)]
        self.limits = [np.zeros(self.threads, dtype=np.int64) for _ in range(lanes)]
        self.tapes: dict[int, adjoint.Tape] = {}
        self.flow = np.zeros((len(spec.edges), spec.class_count, lanes, parameters))
        self.count = np.zeros((len(spec.stages), spec.class_count, lanes, parameters))
        # What one step of one lane needs; only what is written of it is ever backed by memory.
        cells = int(sum(network.cells for network in spec.networks))
        self.pressure = np.zeros(cells)
        self.code = np.zeros(cells, dtype=np.uint8)
        self.moved = np.empty((sum(spec.networks[k].cells for k in self.linear), parameters + 1))
        self.flips = make_flips(agents, self.threads, count, graphs)
        self.outcomes = [make_outcome(part, parameters) for part in self.parts]
        self.fresh = make_fresh(agents * int(self.frame.width.sum()), self.threads, count)
        strength = float(np.outer(self.frame.infection_scale, spec.susceptibility).max(initial=0.0))
        self.unit = _TOP / 254.0 / (strength or 1.0)
        self._divisors: list[NDArray[np.float64] | None] = []
        self.among = np.zeros(len(spec.networks), dtype=np.uint64)
        # Over edges: what each agent's differences add to a sum, and what of it the way back must know.
        self.sent = np.zeros((graphs, agents if graphs else 0))
        self.kept: dict[int, Sent] = {}
        # Of a neighbour, whoever it is: not by this shard's people, so that derivatives are those of one process.
        self.susceptible = float(np.mean(spec.susceptibility))
        self._left: dict[int, tuple[Any, Any, ExitWindows]] = {}

    def start(
        self,
        lane: int,
        stage: NDArray[np.int8],
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        slopes: Slopes,
        address: NDArray[np.uint64],
    ) -> None:
        """Alternatives to the draw of who begins where."""
        found = start_windows(self.spec, cumulative, slopes, lane, len(self.slots), self.parameters)
        if found is None:
            return
        free = np.ones(self.spec.agents, dtype=np.bool_)
        for positions in fixed.values():
            free[positions] = False
        self.flips.span[:], self.fresh.span[:] = 0, 0
        offers.decide_start(self.frame, address, free, found.window, found.stage, found.size, self.flips)
        nothing = np.zeros((0, 0, 0), dtype=np.int64)
        day = Day(
            self.pressure,
            self.code,
            np.zeros(0),
            np.zeros(0),
            self.among,
            np.zeros(0),
            np.zeros((0, self.parameters)),
            np.zeros((0, self.parameters + 1)),
            self.sent,
            nothing,
            nothing,
            found.weight,
            address,
        )
        now = np.ascontiguousarray(stage[:, lane])
        self._settle(lane, now, now, day)

    def _settle(self, lane: int, stage: NDArray[np.int8], after: NDArray[np.int8], day: Day) -> None:
        """Old and new alternatives compete, and the winners are what the next step begins with."""
        frame, slots, flips, fresh = self.frame, self.slots[lane], self.flips, self.fresh
        self._make_room(lane)
        member, alternative, ends = self.member[lane], self.alternative[lane], self.ends[lane]
        runs = int(-(-np.diff(frame.first_slot) // frame.run).sum())
        flow = np.zeros((runs, *self.flow.shape[:2], self.parameters))
        count = np.zeros((runs, *self.count.shape[:2], self.parameters))
        lists = (member, alternative)

        def in_turn(function: Callable[..., Any]) -> None:
            """Each thread's slots add to their own stretch of the lists."""
            common = (stage, after, frame, day, slots, flips, fresh, *lists)
            jobs = [
                partial(function, self.parts[t], *common, ends[t], self.outcomes[t], flow, count)
                for t in range(self.threads)
            ]
            ends[:] = share_out(jobs, self.threads)

        old = adjoint.before(slots, *lists) if self.taped else None
        offered = (frame, day, slots, flips, fresh)
        share_out([partial(evolution.offer, part, *offered) for part in self.parts], self.threads)
        in_turn(evolution.evolve)
        if old is not None:
            sent = [self.kept[k] for k in sorted(self.kept)]
            found = (old, *lists, self.parts, self.outcomes, sent)
            self.tapes[lane] = adjoint.record(stage, after, frame, day, slots, flips, fresh, *found)
        in_turn(evolution.resolve)
        if slots.link.shape[1]:
            share_out([partial(evolution.link, part, frame, slots, flips, fresh) for part in self.parts], self.threads)
        seen = (after, frame, slots, *lists)
        share_out([partial(differences.survey, part, *seen) for part in self.parts], self.threads)
        self.flow[:, :, lane] = flow.sum(axis=0)
        self.count[:, :, lane] += count.sum(axis=0)

    def _make_room(self, lane: int) -> None:
        """Room for all that the offers of this step may add to the lists."""
        slots, layers = self.slots[lane], self.frame.network.size
        grown = found = 0
        for low, high in self.fresh.span:
            where = self.fresh.slot[low:high]
            grown, found = grown + int(slots.held[where].sum()) + where.size, found + where.size
        offered = layers * (found + int(np.diff(self.flips.span, axis=1).sum()))
        need = grown + min(offered, slots.held.size)
        if (self.ends[lane] + need > self.limits[lane]).any():
            held = _held(slots, self.parts)
            begins = np.cumsum([0, *(number + number // 4 + need + 1024 for number in held)])
            self.limits[lane] = begins[1:]
            # One array after the other, so that only one is there twice.
            for lists, last in ((self.alternative, False), (self.member, True)):
                to = np.empty(int(begins[-1]), dtype=lists[lane].dtype)
                jobs = [
                    partial(differences.pack, part, slots, lists[lane], to, int(begin), last)
                    for part, begin in zip(self.parts, begins, strict=False)
                ]
                self.ends[lane][:] = share_out(jobs, self.threads)
                lists[lane] = to

    def advance(
        self,
        lane: int,
        stage: NDArray[np.int8],
        after: NDArray[np.int8],
        tables: Tables,
        totals: Sequence[NDArray[np.int64]],
        shared: Mapping[str, Tensor],
        slopes: Slopes,
        address: NDArray[np.uint64],
        changed: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """One step of one lane.

        Args:
            lane: which.
            stage: [agents].
            after: receives the stages after it [agents].
            tables: what the contagion is told.
            totals: infectivity words of each network [cells].
            shared: opened sums of shared networks.
            slopes: derivatives of what it is told.
            address: of the random words.
            changed: receives who moves [agents].

        Returns:
            the transitions [E, C], and begins and ends of what was written to `changed`.
        """
        spec = self.spec
        day = self._day(lane, stage, tables, totals, shared, slopes, address)
        flows = np.zeros((self.threads, len(spec.edges), spec.class_count), dtype=np.int64)
        edge = [int(cut) for cut in np.linspace(0, stage.size, self.threads + 1)]
        cuts = [
            partial(
                offers.step,
                t,
                edge[t],
                edge[t + 1],
                stage,
                self.frame,
                day,
                self.slots[lane],
                self.member[lane],
                after,
                flows[t],
                changed,
                self.flips,
                self.fresh,
            )
            for t in range(self.threads)
        ]
        ends = share_out(cuts, self.threads)
        self._settle(lane, stage, after, day)
        return flows.sum(axis=0), list(zip(edge[:-1], ends, strict=True))

    def _day(
        self,
        lane: int,
        stage: NDArray[np.int8],
        tables: Tables,
        totals: Sequence[NDArray[np.int64]],
        shared: Mapping[str, Tensor],
        slopes: Slopes,
        address: NDArray[np.uint64],
    ) -> Day:
        spec, frame, slots = self.spec, self.frame, self.slots[lane]
        one = np.ones(self.parameters + 1)
        factor = np.empty(len(spec.networks))
        factor_dot = np.empty((len(spec.networks), self.parameters))
        if not self._divisors:
            self._divisors = [make_among(network, tables.sizes[network.name]) for network in spec.networks]
            self.among = addresses_of(self._divisors)
        jobs: list[Callable[[], Any]] = []
        self.sent[:], self.kept = 0.0, {}

        def encode(k: int, place: Network, people: NDArray[np.float64] | None, here: slice) -> None:
            """A linear network: the derivatives of its sums, and what they make of its hazard."""
            felt = self.pressure[here, None]
            felt[:, 0] = shared[place.name][:, lane] if place.shared else decode(torch.from_numpy(totals[k]))
            cell_hazards(place, felt, people, one[:1], felt)
            rows = self.moved[int(frame.first_linear[k]) :][: place.cells]
            if place.shared:
                rows[:] = slopes.sums[place.name][:, lane]
            else:
                self._sum(lane, k, stage, factor[k], rows)
            cell_hazards(place, rows, people, factor[k] * one, rows)
            offers.encode_linear(self.pressure[here], factor[k], rows, self.unit, self.code[here])

        for k, network in enumerate(spec.networks):
            size = tables.sizes[network.name]
            here = slice(int(frame.first_cell[k]), int(frame.first_cell[k]) + network.cells)
            factor[k] = tables.factors[network.name].expand(len(self.slots))[lane]
            factor_dot[k] = np.broadcast_to(slopes.factors[network.name], (len(self.slots), self.parameters))[lane]
            people = None if size is None else size.numpy()
            if k in self.linear:
                jobs.insert(0, partial(encode, k, network, people, here))  # the longest first
                continue
            layer = int(frame.layer[k])
            excess = slots.excess[int(frame.first_slot[layer]) :]
            closed = isinstance(network, Groups) and network.outsiders
            for low in range(0, network.cells, 1 << 18):
                jobs.append(
                    partial(
                        offers.encode_layer,
                        low,
                        min(network.cells, low + (1 << 18)),
                        np.ascontiguousarray(totals[k]),
                        np.empty(0) if people is None else people,
                        closed,
                        self.among[k],
                        excess,
                        int(frame.width[layer]),
                        factor[k],
                        self.unit,
                        self.pressure[here],
                        self.code[here],
                    )
                )
        share_out(jobs, self.threads)
        exits, window, weight = self._exits(lane, tables, slopes)
        limit = np.maximum(exits.max(axis=1, initial=0), window.max(axis=1, initial=0))
        limit[list(spec.infection)] = int(clusters.SELDOM * 2.0**32) + 1
        reach = np.outer(frame.infection_scale, spec.susceptibility).reshape(-1) * (self.unit * MARGIN)
        return Day(
            self.pressure,
            self.code,
            limit.astype(np.float64).reshape(-1),
            reach,
            self.among,
            factor,
            factor_dot,
            self.moved,
            self.sent,
            exits,
            window,
            weight,
            address,
        )

    def _exits(self, lane: int, tables: Tables, slopes: Slopes) -> ExitWindows:
        """Thresholds and windows of the exits; as in the step before if the contagion is told the same."""
        known = self._left.get(lane)
        if known is None or known[0] is not tables.cumulative or known[1] is not slopes.cumulative:
            found = exit_windows(self.spec, self.frame, tables, slopes, lane, len(self.slots), self.parameters)
            known = self._left[lane] = (tables.cumulative, slopes.cumulative, found)
        return known[2]

    def sums(self, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents and reference of the infectivity sums of a shared network [cells, lanes, P + 1]."""
        columns = []
        for lane in range(len(self.slots)):
            total = np.empty((self.spec.networks[network].cells, self.parameters + 1))
            self._sum(lane, network, np.ascontiguousarray(stage[:, lane]), 0.0, total)
            columns.append(total)
        return np.stack(columns, axis=1)

    def _sum(self, lane: int, network: int, stage: NDArray[np.int8], factor: float, total: NDArray[np.float64]) -> None:
        """`sums` of one lane, into `total` [cells, P + 1]."""
        total[:] = 0.0
        place, slots = self.spec.networks[network], self.slots[lane]
        along = isinstance(place, Edges)
        readers = place.readers_by_source if isinstance(place, Edges) else _IN_CELLS
        kept = make_sent(slots.held.size if along and self.taped else 0)
        lists, room = (self.member[lane], self.alternative[lane]), np.empty(LONGEST + 1, dtype=np.int32)
        entries = differences.scatter(
            stage,
            self.frame,
            slots,
            *lists,
            self.stretches,
            room,
            network,
            *readers,
            factor * self.susceptible,
            self.sent,
            kept,
            total,
        )
        if along:
            self.kept[network] = Sent._make(array[:entries].copy() for array in kept)

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """All that the next step needs, by name: of slots that hold somebody, compactly."""
        found: dict[str, NDArray[Any]] = {"count": self.count.copy()}
        for lane, slots in enumerate(self.slots):
            slot = np.flatnonzero(slots.held).astype(np.int32)
            held = slots.held[slot]
            listed = _listed(slots.first[slot], held)
            parts = {
                "slot": slot,
                "held": held,
                "member": self.member[lane][listed],
                "alternative": self.alternative[lane][listed],
                **{name: getattr(slots, name)[slot] for name in _KEPT},
            }
            if slots.link.size:
                for part in self.parts:
                    evolution.unlink(part, self.frame, slots)
            parts |= {name: getattr(slots, name)[slot] for name in _LINKED if getattr(slots, name).size}
            found |= {f"{lane}:{name}": array for name, array in parts.items()}
        return found

    def restore(self, found: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `snapshot`, where nobody has alternatives yet."""
        self.count[:] = found["count"]
        for lane, slots in enumerate(self.slots):
            slot, held = found[f"{lane}:slot"], found[f"{lane}:held"]
            slots.held[slot] = held
            slots.first[slot] = np.cumsum(held, dtype=np.int64) - held
            for name in (*_KEPT, *_LINKED):
                if getattr(slots, name).size:
                    getattr(slots, name)[slot] = found[f"{lane}:{name}"]
            self.member[lane] = found[f"{lane}:member"].copy()
            self.alternative[lane] = found[f"{lane}:alternative"].copy()
            # Whoever goes on may have other threads: the lists are copied before anything is added.
            self.ends[lane][:], self.limits[lane][:] = self.member[lane].size, 0

    def clear(self) -> None:
        """Without alternatives, as at the start, in the same memory."""
        for lane, slots in enumerate(self.slots):
            clear_slots(slots)
            self.member[lane], self.alternative[lane] = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int8)
            self.ends[lane][:], self.limits[lane][:] = 0, 0
        self.flow[:], self.count[:], self.kept = 0.0, 0.0, {}


def _held(slots: Slots, parts: Sequence[Part]) -> list[int]:
    """How many differ in the slots of each thread."""
    return [sum(int(slots.held[a:b].sum()) for a, b in zip(part.low, part.high, strict=True)) for part in parts]


def _listed(first: NDArray[np.int32], held: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where the entries of some slots stand in the lists, one slot after another."""
    begin = np.cumsum(held, dtype=np.int64) - held
    return np.repeat(first - begin, held) + np.arange(int(held.sum()))


def _address(uniform: Address) -> NDArray[np.uint64]:
    """Step + 1, protocol, and the two words of the seed."""
    seed = uniform.seed
    return np.array([uniform.step + 1, uniform.protocol, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint64)

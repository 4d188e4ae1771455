"""Tangents of the conditional expectation beside the plain values, for the fused executor (`lpm.relax`; paper, eq. 8).

The reference executor has tangents by torch, of one-hot stages. Here the same numbers (to 1e-9) are carried for each
agent in compiled loops: ż' = żᵀM + zᵀṀ, where the actual stage z is hard, so that Ṁ matters in one row alone. Sums of
large networks are linear in ż; in a group of a few people they are the discrete difference of the escape probability,
and nobody meets themselves, as in `lpm.kernels.reference`. The values are those of the plain run, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels import tangent_steps, tangent_sums
from lpm.kernels.addresses import addresses_of
from lpm.kernels.cell_hazards import cell_hazards
from lpm.kernels.cpu import Fused, share_out, workers
from lpm.kernels.quads import LENGTH, zeros
from lpm.kernels.spec import Slopes, Spec, Summed, Tables, decode
from lpm.kernels.tangent_steps import Course
from lpm.kernels.tangent_sums import Felt, Nets, Parts
from lpm.networks import Edges, Groups, Network
from lpm.rng import Address, Ids

__all__ = ["Tangents"]

_PIECES = 4
"""Parts of a large population that are added up apart: fixed, so that no bit depends on the number of threads."""
_LARGE = 100_000
_NO_WORDS, _NO_SIZES = np.empty(0, dtype=np.int64), np.empty(0)


class Tangents:
    """Executor of plain values, to the bit, that carries P tangents of each agent beside them.

    Args:
        parameters: P.
    """

    name = "cpu"

    def __init__(self, parameters: int) -> None:
        self.floats = parameters
        self._plain = Fused()
        self._carried: dict[int, _Carried] = {}
        self._told: dict[int, Slopes] = {}

    def least_memory(self, spec: Spec) -> int:
        return 8 * LENGTH * len(_live(spec)) * -(-self.floats // LENGTH)

    def tell(self, spec: Spec, slopes: Slopes) -> None:
        """Derivatives of what the next `start` or `advance` of a contagion is given."""
        self._told[id(spec)] = slopes

    def sums(self, spec: Spec, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents of a shard's infectivity sums [cells, lanes, P]."""
        return self._carried[id(spec)].sums(network, stage)

    def records(self, spec: Spec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Derivatives of the last step's transitions [E, C, lanes, P] and people in stages [S, C, lanes, P]."""
        mine = self._carried[id(spec)]
        return mine.flow, mine.count

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        mine = self._carried[id(spec)] = _Carried(spec, lanes, self.floats)
        mine.start(list(cumulative), fixed, self._told[id(spec)])
        return self._plain.start(spec, cumulative, fixed, uniform, lanes)

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        return self._plain.emit(spec, state, tables, network)

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return self._plain.occupancy(spec, state)

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        totals, _ = self._plain.known(spec, state)
        stage, slopes = state["stage"].numpy(), self._told[id(spec)]
        self._carried[id(spec)].advance(stage, tables, totals, shared, slopes)
        return self._plain.advance(spec, state, tables, shared)

    def snapshot(self, spec: Spec) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs: tangents by agent [lanes × rows × P, agents], and of counts [S, C, lanes, P]."""
        mine = self._carried[id(spec)]
        by_agent = np.stack([mine.tangent(p) for p in range(self.floats)], axis=2)
        return {"by-agent": by_agent.reshape(-1, spec.agents), "in-all": mine.count.copy()}

    def restore(self, spec: Spec, ids: Ids, lanes: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint."""
        mine = self._carried[id(spec)] = _Carried(spec, lanes, self.floats)
        by_agent = found["by-agent"].reshape(lanes, mine.rows, self.floats, spec.agents)
        for p in range(self.floats):
            mine.tangent(p)[:] = by_agent[:, :, p]
        mine.count[:] = found["in-all"]


def _pieces(size: int, agents: int) -> list[tuple[int, int]]:
    """What a population consists of, cut into the ranges that are added up apart."""
    cuts = np.linspace(0, size, (_PIECES if agents >= _LARGE else 1) + 1).astype(np.int64)
    return list(pairwise(cuts.tolist()))


def _in_quads(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers by parameter as the loops read them: [..., P] → [quads, ..., 4], filled up with 0."""
    more = -values.shape[-1] % LENGTH
    filled = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, more)])
    return np.ascontiguousarray(np.moveaxis(filled.reshape(*values.shape[:-1], -1, LENGTH), -2, 0))


def _by_parameter(quads: NDArray[np.float64], parameters: int) -> NDArray[np.float64]:
    """The inverse of `_in_quads`; the same memory, if there is one quad."""
    apart = np.moveaxis(quads, 0, -2)
    return apart.reshape(*apart.shape[:-2], -1)[..., :parameters]


def _live(spec: Spec) -> list[int]:
    """The stages that somebody leaves or that pass something on."""
    return sorted({*spec.infection, *spec.exits, *np.flatnonzero(spec.infectivity.any(axis=0)).tolist()})


class _Carried:
    """The tangents of one contagion in all lanes.

    Attributes:
        rows: how many stages are live.
        carried: tangents of each agent [lanes, quads, rows, agents, 4].
        flow: of the last step's transitions [E, C, lanes, P].
        count: of the people in each stage [S, C, lanes, P].
    """

    def __init__(self, spec: Spec, lanes: int, parameters: int) -> None:
        self.spec, self.lanes, self.parameters = spec, lanes, parameters
        stages = len(spec.stages)
        live = _live(spec)
        self.rows, self.row_of = len(live), np.full(stages, -1, dtype=np.int64)
        self.row_of[live] = np.arange(len(live))
        quads = -(-parameters // LENGTH)
        self.carried = zeros(lanes, quads, self.rows, spec.agents, LENGTH)
        self.flat = self.carried.reshape(lanes, -1)  # as the loops take it
        self.flow = np.zeros((len(spec.edges), spec.class_count, lanes, parameters))
        self.count = np.zeros((stages, spec.class_count, lanes, parameters))
        self.threads = workers(spec.agents)
        self.nets = [_Net(spec, k, self.row_of) for k in range(len(spec.networks))]
        self.inner, self.blocks = self._cut()
        self.lists = Nets(
            cells=addresses_of([net.cell for net in self.nets]),
            units=addresses_of([net.unit for net in self.nets]),
            closed=np.array([net.closed for net in self.nets], dtype=np.bool_),
            apart=np.array([net.apart for net in self.nets], dtype=np.bool_),
            rows=np.concatenate([_NO_WORDS, *[net.speaking for net in self.nets]]),
            first=np.cumsum([0, *[net.speaking.size for net in self.nets]]),
            infectivity=np.ascontiguousarray(spec.infectivity),
            inner=self.inner,
        )
        lengths = [0 if k == self.inner else net.network.cells for k, net in enumerate(self.nets)]
        self.tables = [zeros(quads, length, LENGTH) for length in lengths]
        self.hazards = [np.zeros(length) for length in lengths]
        self.addresses = addresses_of(self.hazards), addresses_of(self.tables), np.array(lengths, dtype=np.int64)
        self.local = [
            k for k, net in enumerate(self.nets) if k != self.inner and net.cell is not None and not net.network.shared
        ]
        self.pieces = _pieces(spec.agents, spec.agents)
        self._kept, self.parts = self._apart()  # the first is what the second has addresses of
        heard = {row for net in self.nets if net.apart for row in net.speaking.tolist()}
        self.course = _course(spec, self.row_of, sorted(heard))
        self.rooms = [tangent_steps.room_for(self.lists, self.course, self.rows) for _ in self.pieces]

    def tangent(self, p: int) -> NDArray[np.float64]:
        """The tangents by one parameter, a view [lanes, rows, agents]."""
        return self.carried[:, p // LENGTH, :, :, p % LENGTH]

    def _cut(self) -> tuple[int, NDArray[np.int64]]:
        """The network that needs no table, the one of the most groups, or −1; and blocks of whole groups of it."""
        for k, net in sorted(enumerate(self.nets), key=lambda found: -found[1].network.cells):
            if net.apart and net.cell is not None and bool(np.all(net.cell[1:] >= net.cell[:-1])):
                blocks = tangent_steps.blocks_of(net.cell, net.closed, self.spec.agents)
                if blocks.size:
                    return k, blocks
        return -1, tangent_steps.blocks_of(np.empty(0, dtype=np.int32), False, self.spec.agents)

    def _apart(self) -> tuple[list[NDArray[np.float64]], Parts]:
        """Where the pieces of the population are added up: in the table itself if there is one piece."""
        kept, shape = [], (len(self.nets), len(self.pieces))
        where, first, last = np.zeros(shape, np.uint64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for k, (net, table) in enumerate(zip(self.nets, self.tables, strict=True)):
            for place, (low, high) in enumerate(self.pieces if net.cell is not None else [(0, 0)]):
                if k == self.inner:
                    continue
                mine = table
                last[k, place] = table.shape[1]
                if net.cell is not None and len(self.pieces) > 1:
                    first[k, place], last[k, place] = net.cell[low:high].min(), net.cell[low:high].max() + 1
                    mine = zeros(len(table), int(last[k, place] - first[k, place]), LENGTH)
                kept.append(mine)
                where[k, place] = mine.ctypes.data
        return kept, Parts(where, first, last)

    def start(self, drawn: list[int], fixed: Mapping[int, NDArray[np.int64]], slopes: Slopes) -> None:
        """Tangents of the draw of who begins where: the same for all who take part in it."""
        spec = self.spec
        taking_part = np.ones(spec.agents, dtype=np.bool_)
        for positions in fixed.values():
            taking_part[positions] = False
        people = np.bincount(spec.classes[taking_part], minlength=spec.class_count).astype(np.float64)
        before = np.zeros((self.lanes, self.parameters))
        for stage in drawn:
            reached = np.broadcast_to(slopes.cumulative[stage][0], before.shape)
            for s, moved in ((stage, reached - before), (0, before - reached)):
                self.count[s] += people[:, None, None] * moved
                for lane in range(self.lanes if self.row_of[s] >= 0 else 0):
                    more = _in_quads(moved[lane]).reshape(-1)
                    how = (taking_part, more, int(self.row_of[s]), self.rows, self.flat[lane])
                    share_out([partial(tangent_steps.begin, *cut, *how) for cut in self.pieces], self.threads)
            before = reached

    def sums(self, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents of a network's sums, which are linear [cells, lanes, P]."""
        linear, found = _in_line([net.linear for net in self.nets]), []
        for lane in range(self.lanes):
            self._scatter([network], lane, np.ascontiguousarray(stage[:, lane]), *linear)
            found.append(self._joined(network).copy())  # the table is the next lane's too
        return np.stack(found, axis=1)

    def advance(
        self,
        stage: NDArray[np.int8],
        tables: Tables,
        totals: list[NDArray[np.int64]],
        shared: Mapping[str, Tensor],
        slopes: Slopes,
    ) -> None:
        """One step of all lanes."""
        self.flow[:] = 0.0
        for lane in range(self.lanes):
            self._advance(lane, np.ascontiguousarray(stage[:, lane]), tables, totals, shared, slopes)
        for edge, (source, target) in enumerate(self.spec.edges):
            self.count[source] -= self.flow[edge]
            self.count[target] += self.flow[edge]

    def _scatter(
        self,
        which: list[int],
        lane: int,
        stage: NDArray[np.int8],
        begins: NDArray[np.int64],
        passed: NDArray[np.float64],
    ) -> None:
        """Add up the tangents of what all agents pass on in networks of groups, piece by piece."""
        if which:
            how = (np.array(which), stage, self.lists, begins, passed, self.flat[lane], self.rows, self.parts)
            jobs = [partial(tangent_sums.scatter, *cut, part, *how) for part, cut in enumerate(self.pieces)]
            share_out(jobs, self.threads)

    def _joined(self, network: int) -> NDArray[np.float64]:
        """Tangents of a network's sums, of all pieces together [cells, P]."""
        table = self.tables[network]
        tangent_sums.join(network, self.parts, table.shape[1], table.reshape(-1))
        return _by_parameter(table, self.parameters)

    def _advance(
        self,
        lane: int,
        stage: NDArray[np.int8],
        tables: Tables,
        totals: list[NDArray[np.int64]],
        shared: Mapping[str, Tensor],
        slopes: Slopes,
    ) -> None:
        names = [net.network.name for net in self.nets]
        sizes = [tables.sizes[name] for name in names]
        factors = np.array([float(tables.factors[name].detach().expand(self.lanes)[lane]) for name in names])
        every = (self.lanes, self.parameters)
        moved = np.array([np.broadcast_to(slopes.factors[name], every)[lane] for name in names])
        moved = moved.reshape(len(names), self.parameters)
        words = [np.ascontiguousarray(total[:, lane]) for total in totals]
        felt = self._felt(factors, moved, sizes, words)
        self._scatter(self.local, lane, stage, felt.at, felt.passed)
        for k, net in enumerate(self.nets):
            if k == self.inner:
                continue
            if net.told:
                if net.network.shared:
                    value, tangents = shared[names[k]][:, lane].numpy(), slopes.sums[names[k]][:, lane]
                else:
                    value, tangents = decode(torch.from_numpy(words[k])).numpy(), self._joined(k)
                hazard, tangents = _mixed(net.network, value, tangents, sizes[k], float(factors[k]), moved[k])
                self.hazards[k][:], self.tables[k][:] = hazard, _in_quads(tangents)
            else:
                self._finish(k, lane, stage, felt, words[k], sizes[k])
        chance, slope = self._exits(lane, tables, slopes)
        steep = np.logical_or.reduce(slope != 0.0, axis=(1, 2, 3))
        course = self.course._replace(chance=chance, slopes=_in_quads(slope).reshape(-1), steep=steep)
        cuts = _pieces(self.blocks.size - 1, self.spec.agents)
        flow = np.zeros((len(cuts), self.carried.shape[1], len(self.spec.edges), self.spec.class_count, LENGTH))
        how = (self.blocks, stage, self.spec.class_of, self.lists, felt, course, self.flat[lane])
        jobs = [
            partial(tangent_steps.advance, *cut, room, *how, self.rows, part.reshape(-1))
            for cut, room, part in zip(cuts, self.rooms, flow, strict=True)
        ]
        share_out(jobs, self.threads)
        self.flow[:, :, lane] = _by_parameter(flow.sum(axis=0), self.parameters)

    def _felt(
        self,
        factors: NDArray[np.float64],
        moved: NDArray[np.float64],
        sizes: list[Tensor | None],
        words: list[NDArray[np.int64]],
    ) -> Felt:
        """What the networks do in a step, tables aside: those are filled afterwards."""
        today = [net.today(factor, size) for net, factor, size in zip(self.nets, factors, sizes, strict=True)]
        at, passed = _in_line([passed for passed, _, _ in today])
        unit_at, share = _in_line([share for _, _, share in today])
        return Felt(
            at=at,
            passed=passed,
            back=_in_line([back for _, back, _ in today])[1],
            unit_at=unit_at,
            share=share,
            factors=factors,
            moved=_in_quads(moved).reshape(-1),
            words=words[self.inner] if self.inner >= 0 else _NO_WORDS,
            hazards=self.addresses[0],
            tangents=self.addresses[1],
            lengths=self.addresses[2],
        )

    def _finish(
        self, k: int, lane: int, stage: NDArray[np.int8], felt: Felt, words: NDArray[np.int64], size: Tensor | None
    ) -> None:
        """Tangents of a local network's sums become tangents of hazards, and its sums hazards."""
        net, table, hazard = self.nets[k], self.tables[k].reshape(-1), self.hazards[k]
        if isinstance(net.network, Edges):
            readers = net.network.readers_by_source
            tangent_sums.spread(k, stage, *readers, self.lists, felt.at, felt.passed, self.flat[lane], self.rows, table)
        sizes = _NO_SIZES if size is None else size.numpy()
        jobs = [
            partial(tangent_sums.finish, *cut, k, words, sizes, net.closed, felt, self.parts, hazard, table)
            for cut in _pieces(hazard.size, self.spec.agents)
        ]
        share_out(jobs, self.threads)

    def _exits(self, lane: int, tables: Tables, slopes: Slopes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probability of each exit [S, most, C], and its tangents [S, most, C, P]."""
        spec = self.spec
        chance = np.zeros((*spec.exit_edges.shape, spec.class_count))
        slope = np.zeros((*chance.shape, self.parameters))
        for stage in spec.exits:
            before, moved = np.zeros(spec.class_count), np.zeros((spec.class_count, self.parameters))
            for place, reached in enumerate(tables.cumulative[stage]):
                value = reached.detach().expand(spec.class_count, self.lanes)[:, lane].numpy()
                shape = (spec.class_count, self.lanes, self.parameters)
                tangent = np.broadcast_to(slopes.cumulative[stage][place], shape)[:, lane]
                chance[stage, place], slope[stage, place] = value - before, tangent - moved
                before, moved = value, tangent
        return chance, slope


def _in_line(arrays: list[NDArray[np.float64]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Arrays one after the other, and where each begins."""
    begins = np.cumsum([0, *[array.size for array in arrays]])[:-1]
    return begins.astype(np.int64), np.concatenate([np.empty(0), *[array.reshape(-1) for array in arrays]])


def _course(spec: Spec, row_of: NDArray[np.int64], heard: list[int]) -> Course:
    """Every transition out of a live stage in order, exits without their probabilities."""
    ways = {
        stage: [(spec.infection[stage][0], 1, 0)] if stage in spec.infection else []
        for stage in np.flatnonzero(row_of >= 0).tolist()
    }
    for stage, edges in spec.exits.items():
        ways[stage] += [(edge, 0, place) for place, edge in enumerate(edges)]
    seen: set[int] = set()
    order: dict[int, int] = {}

    # Depth first: the stages that a stage leads to come before it, except on a way round.
    def visit(stage: int) -> None:
        if stage in ways and stage not in seen:
            seen.add(stage)
            for edge, _, _ in ways[stage]:
                visit(spec.edges[edge][1])
            order[stage] = len(order)

    for stage in ways:
        visit(stage)
    moves, early = [], []
    for stage in order:
        for turn, (edge, infects, place) in enumerate(ways[stage]):
            moves.append((stage, edge, infects, place, turn == 0, turn == len(ways[stage]) - 1))
            early.append(order.get(spec.edges[edge][1], -1) >= order[stage])
    listed = np.array(moves, dtype=np.int64).reshape(-1, 6)
    into = np.array([row_of[spec.edges[edge][1]] for edge in listed[:, 1]], dtype=np.int64)
    waits = np.array(early, dtype=np.bool_)
    return Course(
        moves=listed,
        row=row_of[listed[:, 0]],
        into=into,
        early=waits,
        late=np.unique(into[waits]),
        heard=np.array(heard, dtype=np.int64),
        susceptibility=spec.susceptibility,
        scale=spec.infections[1],
        chance=np.zeros((*spec.exit_edges.shape, spec.class_count)),
        slopes=np.zeros(0),
        steep=np.zeros(len(spec.stages), dtype=np.bool_),
    )


class _Net:
    """One network of a contagion, as the loops need it.

    Attributes:
        network: itself.
        cell: group of each agent; None over edges [agents].
        closed: whether the first cell is of those in no group.
        told: whether its sums are opened, or mixed, before anybody feels them.
        apart: whether nobody meets themselves in their own group.
        unit: which of the different sizes each cell has, in a network where nobody does; else None [cells].
        speaking: rows of the stages that pass on more than the least [M].
        linear: what a unit of their tangents passes on where sums are linear [1, S, M].
    """

    def __init__(self, spec: Spec, number: int, row_of: NDArray[np.int64]) -> None:
        self.network, infectivity = spec.networks[number], spec.infectivity[number]
        self.cell, self.closed = None, False
        if isinstance(self.network, Groups):
            self.cell, self.closed = self.network.cell_of, self.network.outsiders
        self.told = self.network.shared or self.network.mixing is not None
        self.apart = self.cell is not None and not self.told
        self.unit = np.zeros(self.network.cells, dtype=np.int32) if self.apart else None
        self._infectivity, self._least = infectivity, infectivity.min()
        speaking = np.flatnonzero(infectivity > self._least)
        self._weight, self.speaking = infectivity[speaking], row_of[speaking]
        self.linear = np.repeat((self._weight - self._least)[None, None], len(infectivity), axis=1)
        self._sizes: tuple[Tensor | None, NDArray[np.float64]] | None = None

    def today(
        self, factor: float, sizes: Tensor | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """What a unit of tangent passes on and what of it comes back [units, S, M], and one over each size [units]."""
        if self.told:
            return self.linear, np.zeros_like(self.linear), np.zeros(1)
        share = self._by_size(sizes)
        passed = self._curve(factor * share)
        return passed, factor * share[:, None, None] * passed, share

    def _by_size(self, sizes: Tensor | None) -> NDArray[np.float64]:
        """One over each of the different sizes, and 0 for those in no group; `unit` says which a cell has [units]."""
        if self._sizes is None or self._sizes[0] is not sizes:
            different = np.ones(1)
            if sizes is not None:
                people = np.maximum(sizes.numpy(), 1.0).astype(np.int64)
                found = np.bincount(people) > 0
                different = np.flatnonzero(found).astype(np.float64)
                if self.unit is not None:
                    self.unit[:] = (np.cumsum(found) - 1)[people]
            if self.closed and self.unit is not None:
                self.unit[0] = different.size
            self._sizes = sizes, np.append(1.0 / different, 0.0)
        return self._sizes[1]

    def _curve(self, per_unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a unit of tangent passes on in a small group: see `lpm.kernels.reference._difference`.

        Args:
            per_unit: hazard per unit of infectivity, by size [units].

        Returns:
            [units, S, M], less that of the least infectivity: the tangents of an agent sum to 0.
        """

        def change(step: NDArray[np.float64]) -> NDArray[np.float64]:
            b = per_unit[:, None, None]
            safe = np.where(b == 0, 1.0, b)
            return np.where(b == 0, step, -np.expm1(-b * step) / safe)

        now = self._infectivity[None, :, None]
        return change(self._weight[None, None] - now) - change(self._least - now)


def _mixed(
    network: Network,
    value: NDArray[np.float64],
    tangents: NDArray[np.float64],
    size: Tensor | None,
    factor: float,
    moved: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hazards of a network whose sums are opened, or mixed [cells], and their tangents [cells, P]."""
    sizes = None if size is None else size.numpy()
    pressure = cell_hazards(network, value[:, None], sizes, np.ones(1))
    by_sums = cell_hazards(network, tangents, sizes, np.full(len(moved), factor))
    return factor * pressure[:, 0], moved * pressure + by_sums

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

from lpm.kernels import tangent_steps
from lpm.kernels.cell_hazards import cell_hazards
from lpm.kernels.cpu import Fused, padded, share_out, workers
from lpm.kernels.spec import Slopes, Spec, Summed, Tables, decode
from lpm.networks import Edges, Groups, Network
from lpm.rng import Address, Ids

__all__ = ["Tangents"]

_PIECES = 4
"""Parts of a large population that are added up apart: fixed, so that no bit depends on the number of threads."""
_LARGE = 100_000
_NO_UNITS, _NO_SHARES, _NOT_BACK = np.empty(0, dtype=np.int32), np.empty(0), np.empty((0, 0, 0))


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
        """What a checkpoint needs: tangents by agent [rows, agents], and of counts [S, C, lanes, P]."""
        mine = self._carried[id(spec)]
        return {"by-agent": mine.carried.reshape(-1, spec.agents).copy(), "in-all": mine.count.copy()}

    def restore(self, spec: Spec, ids: Ids, lanes: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint."""
        mine = self._carried[id(spec)] = _Carried(spec, lanes, self.floats)
        mine.carried[:] = found["by-agent"].reshape(mine.carried.shape)
        mine.count[:] = found["in-all"]


def _cuts(agents: int) -> NDArray[np.int64]:
    """Where a population is cut into pieces."""
    return np.linspace(0, agents, (_PIECES if agents >= _LARGE else 1) + 1).astype(np.int64)


class _Carried:
    """The tangents of one contagion in all lanes."""

    def __init__(self, spec: Spec, lanes: int, parameters: int) -> None:
        self.spec, self.lanes, self.parameters = spec, lanes, parameters
        stages = len(spec.stages)
        live = {*spec.infection, *spec.exits, *np.flatnonzero(spec.infectivity.any(axis=0)).tolist()}
        self.row_of = np.full(stages, -1, dtype=np.int64)
        self.row_of[sorted(live)] = np.arange(len(live))
        self.carried = np.zeros((lanes, len(live), parameters, spec.agents))
        self.flow = np.zeros((len(spec.edges), spec.class_count, lanes, parameters))
        self.count = np.zeros((stages, spec.class_count, lanes, parameters))
        self.edge, self.scale = spec.infections
        self.target = np.array([to for _, to in spec.edges], dtype=np.int64)
        self.nets = [_Net(spec, k, self.row_of, parameters + 1) for k in range(len(spec.networks))]
        self.cells = padded([net.cell for net in self.nets], np.empty(0, dtype=np.int32))
        self.speaking = padded([net.speaking for net in self.nets], np.empty(0, dtype=np.int64))
        self.heard = np.zeros(len(live), dtype=np.bool_)
        for net in self.nets:
            if isinstance(net.network, Groups) and not net.network.shared and net.network.mixing is None:
                self.heard[net.speaking] = True
        self.kind = np.array([net.kind for net in self.nets]).reshape(len(self.nets), stages)
        self.closed = np.array([net.closed for net in self.nets], dtype=np.bool_)
        self.infectivity = np.ascontiguousarray(spec.infectivity)
        self.cuts = _cuts(spec.agents)
        self.threads = workers(spec.agents)

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
                if self.row_of[s] >= 0:
                    self.carried[:, self.row_of[s]] += moved[..., None] * taking_part
            before = reached

    def sums(self, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """Tangents of a network's sums, which are linear [cells, lanes, P]."""
        net, now = self.nets[network], [np.ascontiguousarray(stage[:, lane]) for lane in range(self.lanes)]
        found = [self._add_up(net, lane, now[lane], net.linear, _NO_UNITS)[:, :-1].copy() for lane in range(self.lanes)]
        return np.stack(found, axis=1)

    def _add_up(
        self, net: _Net, lane: int, stage: NDArray[np.int8], curved: NDArray[np.float64], unit: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        """Tangents of a network's sums, and room for one more number [cells, P + 1]; the same memory each time."""
        how = (net.kind, net.speaking, curved, self.carried[lane])
        if isinstance(net.network, Edges):
            tangent_steps.spread_edges(stage, *net.network.readers_by_source, *how, net.total)
            return net.total
        jobs = [
            partial(tangent_steps.scatter, *piece, stage, net.cell, unit, *how, part)
            for piece, part in zip(net.pieces, net.parts, strict=True)
        ]
        share_out(jobs, self.threads)
        if not net.apart:
            net.total[:] = 0.0
            for (_, _, first), part in zip(net.pieces, net.parts, strict=True):
                net.total[first : first + len(part)] += part
        return net.total

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

    def _advance(
        self,
        lane: int,
        stage: NDArray[np.int8],
        tables: Tables,
        totals: list[NDArray[np.int64]],
        shared: Mapping[str, Tensor],
        slopes: Slopes,
    ) -> None:
        spec = self.spec
        factors = np.array([float(tables.factors[n.name].detach().expand(self.lanes)[lane]) for n in spec.networks])
        moved = np.array(
            [np.broadcast_to(slopes.factors[n.name], (self.lanes, self.parameters))[lane] for n in spec.networks]
        ).reshape(len(spec.networks), self.parameters)
        felt, units, shares, owns = [], [], [], []
        for k, net in enumerate(self.nets):
            name = net.network.name
            size = tables.sizes[name]
            if net.network.shared or net.network.mixing is not None:
                if net.network.shared:
                    value, tangents = shared[name][:, lane].numpy(), slopes.sums[name][:, lane]
                else:
                    value = decode(torch.from_numpy(totals[k][:, lane])).numpy()
                    tangents = self._add_up(net, lane, stage, net.linear, _NO_UNITS)[:, :-1]
                felt.append(_mixed(net.network, value, tangents, size, float(factors[k]), moved[k]))
                unit, share, own = _NO_UNITS, _NO_SHARES, _NOT_BACK
            else:
                unit, share = net.by_size(size)
                curved = net.curve(factors[k] * share)
                table = self._add_up(net, lane, stage, curved, unit)
                self._finish(net, totals[k], lane, size, float(factors[k]), moved[k], table)
                felt.append(table)
                own = _NOT_BACK  # over edges nobody is their own neighbour
                if isinstance(net.network, Groups):
                    own = np.concatenate([factors[k] * share[:, None, None] * curved, np.zeros((1, *curved.shape[1:]))])
            units.append(unit)
            shares.append(np.append(share, 0.0))
            owns.append(own)
        chance, slope = self._exits(lane, tables, slopes)
        common = (
            stage,
            spec.class_of,
            len(spec.networks),
            self.cells,
            padded(felt, np.empty((0, 0))),
            padded(units, _NO_UNITS),
            padded(shares, _NO_SHARES),
            padded(owns, _NOT_BACK),
            self.speaking,
            self.heard,
            self.kind,
            self.infectivity,
            factors,
            moved,
            self.closed,
            spec.susceptibility,
            self.edge,
            self.scale,
            spec.exit_edges,
            chance,
            slope,
            slope.any(axis=(1, 2, 3)),
            self.target,
            self.row_of,
            self.carried[lane],
        )
        flow = np.zeros((len(self.cuts) - 1, len(spec.edges), spec.class_count, self.parameters))
        jobs = [
            partial(tangent_steps.advance, *cut, *common, part)
            for cut, part in zip(pairwise(self.cuts), flow, strict=True)
        ]
        share_out(jobs, self.threads)
        self.flow[:, :, lane] = flow.sum(axis=0)

    def _finish(
        self,
        net: _Net,
        words: NDArray[np.int64],
        lane: int,
        size: Tensor | None,
        factor: float,
        moved: NDArray[np.float64],
        table: NDArray[np.float64],
    ) -> None:
        """Tangents of sums become tangents of hazards, with the hazards in the last column."""
        cuts = np.linspace(0, net.network.cells, len(self.cuts)).astype(np.int64)
        own, sizes = np.ascontiguousarray(words[:, lane]), np.empty(0) if size is None else size.numpy()
        jobs = [
            partial(tangent_steps.finish, low, high, own, sizes, factor, moved, net.closed, table)
            for low, high in pairwise(cuts)
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


class _Net:
    """One network of a contagion, as the loops need it.

    Attributes:
        network: itself.
        cell: group of each agent; empty over edges [agents].
        closed: whether the first cell is of those in no group.
        values: the different infectivities, from the least [kinds].
        kind: which of them each stage has [S].
        weight: infectivity of the stages that pass on more than the least [M].
        speaking: their rows of tangents [M].
        linear: what a unit of their tangents passes on where sums are linear [1, kinds, M].
        total: where they are added up, and room for the hazard [cells, P + 1].
        pieces: first agent, end of the agents and first cell of each part of the population that is added up apart.
        parts: where each is [cells of the piece, P + 1].
        apart: whether the pieces have no cell in common, and `parts` are pieces of `total`.
    """

    def __init__(self, spec: Spec, number: int, row_of: NDArray[np.int64], width: int) -> None:
        self.network, infectivity = spec.networks[number], spec.infectivity[number]
        self.cell, self.closed = np.empty(0, dtype=np.int32), False
        if isinstance(self.network, Groups):
            self.cell, self.closed = self.network.cell_of, self.network.outsiders
        self.values, self.kind = np.unique(infectivity, return_inverse=True)
        speaking = np.flatnonzero(self.kind > 0)
        self.weight, self.speaking = infectivity[speaking], row_of[speaking]
        self.linear = np.repeat((self.weight - self.values[0])[None, None], len(self.values), axis=1)
        self.total = np.zeros((self.network.cells, width))
        self._sizes: tuple[Tensor, NDArray[np.int32], NDArray[np.float64]] | None = None
        cuts = _cuts(self.cell.size)
        self.apart = len(cuts) == 2 or bool(np.all(self.cell[1:] >= self.cell[:-1]))
        if self.apart and len(cuts) > 2:
            # Stored by group: pieces that begin with a group have no other in common.
            cuts = np.unique([*np.searchsorted(self.cell, self.cell[cuts[:-1]]), self.cell.size])
        parts = np.split(self.cell, cuts[1:-1]) if len(cuts) > 2 else []
        ranges = [(int(part.min()), int(part.max()) + 1) for part in parts] or [(0, self.network.cells)]
        self.pieces = [(*cut, first) for cut, (first, _) in zip(pairwise(cuts), ranges, strict=True)]
        self.parts = [
            self.total[first:last] if self.apart else np.zeros((last - first, width)) for first, last in ranges
        ]

    def by_size(self, sizes: Tensor | None) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Which of the different sizes each cell has (empty: all the same), and one over each of them."""
        if sizes is None:
            return _NO_UNITS, np.ones(1)
        if self._sizes is None or self._sizes[0] is not sizes:
            different, unit = np.unique(np.maximum(sizes.numpy(), 1.0), return_inverse=True)
            self._sizes = sizes, unit.astype(np.int32), 1.0 / different
        return self._sizes[1:]

    def curve(self, per_unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a unit of tangent passes on in a small group: see `lpm.kernels.reference._difference`.

        Args:
            per_unit: hazard per unit of infectivity, by size [units].

        Returns:
            [units, kinds, M], less that of the least infectivity: the tangents of an agent sum to 0.
        """

        def change(step: NDArray[np.float64]) -> NDArray[np.float64]:
            b = per_unit[:, None, None]
            safe = np.where(b == 0, 1.0, b)
            return np.where(b == 0, step, -np.expm1(-b * step) / safe)

        step = self.weight[None, None] - self.values[None, :, None]
        return np.ascontiguousarray(change(step) - change(self.values[0] - self.values[None, :, None]))


def _mixed(
    network: Network,
    value: NDArray[np.float64],
    tangents: NDArray[np.float64],
    size: Tensor | None,
    factor: float,
    moved: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Tangents of the hazards of a network whose sums are opened, or mixed, with the hazards last [cells, P + 1]."""
    sizes = None if size is None else size.numpy()
    pressure = cell_hazards(network, value[:, None], sizes, np.ones(1))
    by_sums = cell_hazards(network, tangents, sizes, np.full(len(moved), factor))
    return np.concatenate([moved * pressure + by_sums, factor * pressure], axis=1)

"""The fused executor for CPUs: numba, compiled on first use and cached on disk.

The state is one byte per agent and lane. An agent's random word is drawn once and serves all its lanes (common random
numbers), and only hazards of *cells* are floats in memory. Every float64 operation stands in the same order as in the
reference executor, without contraction, so the thresholds are the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels.spec import Spec, Summed, Tables, decode, hazards
from lpm.networks import Edges
from lpm.relax import RECIPROCALS, thresholds
from lpm.rng import Address

__all__ = ["Fused"]

_RECIPROCALS = np.array(RECIPROCALS[::-1])


@nb.njit(nogil=True, cache=True, inline="always")
def _one_minus_exp(x: float) -> float:
    y = min(x, 32.0) * 0.0625
    q = 1.0
    for reciprocal in _RECIPROCALS:
        q = 1.0 - (y * reciprocal) * q
    q = y * q
    q = q * (2.0 - q)
    q = q * (2.0 - q)
    q = q * (2.0 - q)
    return q * (2.0 - q)


@nb.njit(nogil=True, cache=True)
def _sum_groups(
    stage: NDArray[np.int8], cell: NDArray[np.int64], words: NDArray[np.int64], total: NDArray[np.int64]
) -> None:
    for i in range(stage.shape[0]):
        g = cell[i]
        for k in range(stage.shape[1]):
            total[g, k] += words[stage[i, k]]


@nb.njit(nogil=True, cache=True)
def _sum_edges(
    stage: NDArray[np.int8],
    offsets: NDArray[np.int64],
    readers: NDArray[np.int64],
    words: NDArray[np.int64],
    total: NDArray[np.int64],
) -> None:
    # Few agents are infectious at a time: only their edges are visited.
    for i in range(stage.shape[0]):
        speaks = False
        for k in range(stage.shape[1]):
            speaks = speaks or words[stage[i, k]] != 0
        if speaks:
            for e in range(offsets[i], offsets[i + 1]):
                for k in range(stage.shape[1]):
                    total[readers[e], k] += words[stage[i, k]]


@nb.njit(nogil=True, cache=True)
def _advance(
    stage: NDArray[np.int8],
    classes: NDArray[np.int64],
    cells: NDArray[np.int64],
    hazard: NDArray[np.float64],
    susceptibility: NDArray[np.float64],
    uniform: NDArray[np.uint64],
    infection_edge: NDArray[np.int64],
    infection_scale: NDArray[np.float64],
    exit_edge: NDArray[np.int64],
    exit_threshold: NDArray[np.int64],
    target: NDArray[np.int64],
    after: NDArray[np.int8],
    flows: NDArray[np.int64],
) -> None:
    agents, lanes = stage.shape
    networks = cells.shape[1]
    branches = exit_edge.shape[1]
    for i in range(agents):
        c = classes[i]
        word = np.int64(uniform[i])
        for k in range(lanes):
            s = stage[i, k]
            edge = -1
            if infection_edge[s] >= 0:
                total = 0.0
                for n in range(networks):
                    total = total + hazard[cells[i, n], k]
                if total > 0.0:
                    total = total * susceptibility[c]
                    total = total * infection_scale[s]
                    # 1 − e^−x is at most x: most words are decided without it. The margin is for rounding.
                    if word < total * 4299262263.0:
                        p = _one_minus_exp(total)
                        if word < np.int64(np.floor(p * 4294967296.0)):
                            edge = infection_edge[s]
            else:
                for b in range(branches):
                    if exit_edge[s, b] < 0:
                        break
                    if word < exit_threshold[s, b, c, k]:
                        edge = exit_edge[s, b]
                        break
            if edge >= 0:
                flows[edge, c, k] += 1
                after[i, k] = target[edge]
            else:
                after[i, k] = s


class Fused:
    """Executor for plain runs on CPUs: any spec without per-agent infectivity."""

    name = "cpu"

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        word = uniform.words()[0].astype(np.int64)[:, None]
        stage = np.zeros((spec.classes.size, lanes), dtype=np.int8)
        for s in reversed(list(cumulative)):
            stage[word < thresholds(cumulative[s].expand(1, lanes)).numpy()] = s
        for s, positions in fixed.items():
            stage[positions] = s
        return {"stage": torch.from_numpy(stage)}

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return torch.nn.functional.one_hot(state["stage"].to(torch.int64), len(spec.stages)).to(torch.float64)

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        place = spec.networks[network]
        stage = state["stage"].numpy()
        total = np.zeros((place.cells, stage.shape[1]), dtype=np.int64)
        words = spec.infectivity_words[network]
        if isinstance(place, Edges):
            _sum_edges(stage, *place.readers_by_source, words, total)
        else:
            _sum_groups(stage, place.cell_of, words, total)
        return Summed(torch.from_numpy(total))

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        stage = state["stage"].numpy()
        agents, lanes = stage.shape
        blocks, offset = [], 0
        cells = np.empty((agents, len(spec.networks)), dtype=np.int64)
        for k, network in enumerate(spec.networks):
            total = shared[network.name] if network.shared else decode(self.emit(spec, state, tables, k).words)
            block = hazards(network, total, tables.sizes[network.name], tables.factors[network.name])
            blocks.append(block.expand(network.cells, lanes))
            cells[:, k] = network.cell_of + offset
            offset += network.cells
        hazard = torch.cat(blocks).contiguous().numpy()

        count = len(spec.stages)
        width = max([len(edges) for edges in spec.exits.values()], default=1)
        infection_edge, infection_scale = np.full(count, -1, dtype=np.int64), np.zeros(count)
        for s, (edge, relative) in spec.infection.items():
            infection_edge[s], infection_scale[s] = edge, relative
        exit_edge = np.full((count, width), -1, dtype=np.int64)
        exit_threshold = np.zeros((count, width, spec.class_count, lanes), dtype=np.int64)
        for s, edges in spec.exits.items():
            for b, (edge, table) in enumerate(zip(edges, tables.cumulative[s], strict=True)):
                exit_edge[s, b] = edge
                exit_threshold[s, b] = thresholds(table.expand(spec.class_count, lanes)).numpy()

        after = np.empty_like(stage)
        flows = np.zeros((len(spec.edges), spec.class_count, lanes), dtype=np.int64)
        target = np.array([to for _, to in spec.edges], dtype=np.int64)
        _advance(
            stage,
            spec.classes,
            cells,
            hazard,
            spec.susceptibility,
            tables.uniform.words()[0],
            infection_edge,
            infection_scale,
            exit_edge,
            exit_threshold,
            target,
            after,
            flows,
        )
        counts = np.zeros((count, spec.class_count, lanes), dtype=np.int64)
        _count(after, spec.classes, counts)
        return {"stage": torch.from_numpy(after)}, torch.from_numpy(flows), torch.from_numpy(counts)


@nb.njit(nogil=True, cache=True)
def _count(stage: NDArray[np.int8], classes: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    for i in range(stage.shape[0]):
        for k in range(stage.shape[1]):
            counts[stage[i, k], classes[i], k] += 1

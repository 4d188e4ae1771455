"""The fused executor for CPUs: numba, compiled on first use and cached on disk, at the speed of the memory.

What costs is memory traffic, so the state is one byte per agent and lane, and a day reads each agent once:
- *Sums follow changes.* Only those who became infectious or ceased to be so are added to their cells; integers make
  that the same sum as adding up everybody.
- *A byte per cell decides most agents.* Beside the sum each cell has its hazard as one byte, rounded up on a scale
  common to all networks, so that the table of the workplaces, which is read in random order, fits the cache. The bytes
  of an agent's cells bound its hazard from above; a random word beyond that bound (nearly all are) says no at once.
  For the others the hazard is worked out in float64, every operation in the order of the reference executor and
  without contraction: the same thresholds, hence the same bits.
- *Random words are drawn in blocks* where they are used, and serve all neighbouring lanes with the same seed (common
  random numbers).

Agents are cut into as many parts as there are threads. The kernels hold no lock and run in a pool of this module's own:
several federated parties may live in one process, which numba's own threading layer does not allow. Which thread does
what changes no bit, since threads only add integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels.cell_hazards import cell_hazards
from lpm.kernels.decisions import CHUNK, advance, advance_lanes, hazard_of
from lpm.kernels.spec import Spec, Summed, Tables, exit_limits
from lpm.networks import Edges, Groups
from lpm.philox import draw
from lpm.ranks import threads
from lpm.relax import thresholds
from lpm.rng import Address

__all__ = ["MARGIN", "Fused", "padded", "share_out", "workers"]

_MANY = 8
"""Lanes from which `advance_lanes` is faster than `advance`."""
_SMALL = 100_000
"""Agents × lanes below which one thread is faster than two."""
_PLACES = 8
"""Networks are handed to the kernels in tuples of this length, or multiples, to compile them once."""
MARGIN = 4299262263.0
"""2^32, and a thousandth more: 1 − e^−x is at most x, and the margin is for rounding."""


def workers(size: int) -> int:
    """How many threads work on `size` agents × lanes."""
    return threads() if size >= _SMALL else 1


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="lpm-kernel")


def share_out(jobs: Sequence[Callable[[], Any]], count: int) -> list[Any]:
    """Results of all jobs, done by `count` threads."""
    if count == 1 or len(jobs) == 1:
        return [job() for job in jobs]
    return [future.result() for future in [_pool(count).submit(job) for job in jobs]]


@nb.njit(nogil=True, cache=True)
def _begin(
    first: np.uint64,
    listed: NDArray[np.uint64],
    c2: np.uint64,
    c3: np.uint64,
    keys: NDArray[np.uint64],
    stages: NDArray[np.int8],
    limits: NDArray[np.int64],
    stage: NDArray[np.int8],
) -> None:
    """First stages: the first of `stages` whose limit [stages, lanes] lies above the agent's word, else 0."""
    out = np.empty(CHUNK + 8, dtype=np.uint32)
    for start in range(0, stage.shape[0], CHUNK):
        count = min(CHUNK, stage.shape[0] - start)
        offset = 0
        for k in range(stage.shape[1]):
            if k == 0 or keys[k, 0] != keys[k - 1, 0] or keys[k, 1] != keys[k - 1, 1]:
                offset = draw(first, listed, start, count, c2, c3, keys[k, 0], keys[k, 1], out)
            for j in range(count):
                word = np.int64(out[offset + j])
                stage[start + j, k] = 0
                for s in range(stages.size):
                    if word < limits[s, k]:
                        stage[start + j, k] = stages[s]
                        break


@nb.njit(nogil=True, cache=True)
def _count(stage: NDArray[np.int8], classes: NDArray[np.int16], counts: NDArray[np.int64]) -> None:
    """Add the people of each stage, class and lane to `counts` [S, C, lanes]."""
    for i in range(stage.shape[0]):
        c = classes[i] if classes.size else np.int16(0)
        for k in range(stage.shape[1]):
            counts[stage[i, k], c, k] += 1


@nb.njit(nogil=True, cache=True)
def _sum_groups(
    stage: NDArray[np.int8], cell: NDArray[np.int32], words: NDArray[np.int64], total: NDArray[np.int64]
) -> None:
    for i in range(stage.shape[0]):
        for k in range(stage.shape[1]):
            word = words[stage[i, k]]
            if word != 0:
                total[cell[i], k] += word


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
        for k in range(stage.shape[1]):
            word = words[stage[i, k]]
            if word != 0:
                for e in range(offsets[i], offsets[i + 1]):
                    total[readers[e], k] += word


@nb.njit(nogil=True, cache=True, inline="always")
def _byte(hazard: float, scale: float) -> int:
    """A hazard as a byte, rounded up; 255 stands for anything larger."""
    if hazard <= 0.0:
        return 0
    steps = np.ceil(hazard / scale)
    # Also for a hazard that is not a number: it is then worked out, as in the reference.
    return max(1, int(steps)) if steps < 255.0 else 255


@nb.njit(nogil=True, cache=True)
def _bytes_of_table(hazard: NDArray[np.float64], scale: NDArray[np.float64], code: NDArray[np.uint8]) -> None:
    for g in range(hazard.shape[0]):
        for k in range(hazard.shape[1]):
            code[g, k] = _byte(hazard[g, k], scale[k])


@nb.njit(nogil=True, cache=True)
def _bytes_of_sums(
    low: int,
    high: int,
    total: NDArray[np.int64],
    sizes: NDArray[np.float64],
    factor: NDArray[np.float64],
    scale: NDArray[np.float64],
    closed: bool,
    code: NDArray[np.uint8],
) -> None:
    """The bytes of cells `low` to `high` − 1; with `closed`, those of cell 0 meet nobody."""
    sized = sizes.size > 0
    for g in range(low, high):
        for k in range(total.shape[1]):
            word = total[g, k]
            code[g, k] = 0
            if word != 0 and not (closed and g == 0):
                code[g, k] = _byte(hazard_of(word, sized, sizes[g] if sized else 1.0, factor[k]), scale[k])


@nb.njit(nogil=True, cache=True)
def _follow_groups(
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    changed: NDArray[np.int64],
    bounds: NDArray[np.int64],
    cell: NDArray[np.int32],
    words: NDArray[np.int64],
    total: NDArray[np.int64],
    sizes: NDArray[np.float64],
    factor: NDArray[np.float64],
    scale: NDArray[np.float64],
    closed: bool,
    code: NDArray[np.uint8],
) -> None:
    """Add to the sums, and to the bytes if there is a `factor`, what changed (agent · lanes + lane, [parts, 2])."""
    lanes = stage.shape[1]
    sized = sizes.size > 0
    for part in range(bounds.shape[0]):
        for e in range(bounds[part, 0], bounds[part, 1]):
            i, k = (changed[e], 0) if lanes == 1 else (changed[e] // lanes, changed[e] % lanes)
            word = words[after[i, k]] - words[stage[i, k]]
            if word != 0:
                g = cell[i]
                total[g, k] += word
                if factor.size and not (closed and g == 0):
                    size = sizes[g] if sized else 1.0
                    code[g, k] = _byte(hazard_of(total[g, k], sized, size, factor[k]), scale[k])


@nb.njit(nogil=True, cache=True)
def _follow_edges(
    stage: NDArray[np.int8],
    after: NDArray[np.int8],
    changed: NDArray[np.int64],
    bounds: NDArray[np.int64],
    offsets: NDArray[np.int64],
    readers: NDArray[np.int64],
    words: NDArray[np.int64],
    total: NDArray[np.int64],
    factor: NDArray[np.float64],
    scale: NDArray[np.float64],
    code: NDArray[np.uint8],
) -> None:
    """The same over edges."""
    lanes = stage.shape[1]
    for part in range(bounds.shape[0]):
        for e in range(bounds[part, 0], bounds[part, 1]):
            i, k = changed[e] // lanes, changed[e] % lanes
            word = words[after[i, k]] - words[stage[i, k]]
            if word != 0:
                for edge in range(offsets[i], offsets[i + 1]):
                    reader = readers[edge]
                    total[reader, k] += word
                    code[reader, k] = _byte(hazard_of(total[reader, k], False, 1.0, factor[k]), scale[k])


@dataclass(frozen=True, eq=False)
class _Plan:
    """What follows from the spec alone, in the kernels' own types."""

    spec: Spec
    cells: tuple[NDArray[np.int32], ...]
    closed: NDArray[np.bool_]
    words: NDArray[np.int64]
    infectious: NDArray[np.int64]
    infection_edge: NDArray[np.int64]
    infection_scale: NDArray[np.float64]
    exit_edge: NDArray[np.int64]
    target: NDArray[np.int8]

    @staticmethod
    def of(spec: Spec) -> _Plan:
        count = len(spec.stages)
        nobody = np.empty(0, dtype=np.int32)
        cells = [n.cell_of if isinstance(n, Groups) else nobody for n in spec.networks]
        closed = [isinstance(n, Groups) and n.outsiders for n in spec.networks]
        words = np.ascontiguousarray(spec.infectivity_words)
        # Stages with the same infectivity in every network are one kind: a move between them changes no sum.
        kinds = np.unique(words, axis=1, return_inverse=True)[1].reshape(-1) if len(spec.networks) else np.zeros(count)
        return _Plan(
            spec,
            padded(cells, nobody),
            np.array(closed, dtype=np.bool_),
            words,
            kinds.astype(np.int64),
            *spec.infections,
            spec.exit_edges,
            np.array([to for _, to in spec.edges], dtype=np.int8),
        )


def padded(arrays: Sequence[NDArray[Any]], blank: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """A tuple of such a length that the kernels need not be compiled anew for it."""
    return (*arrays, *[blank] * (-len(arrays) % _PLACES or (_PLACES if not arrays else 0)))


@dataclass(eq=False)
class _Held:
    """What is known of the newest state, so that the next step need not read everybody again.

    Attributes:
        stage: the state it belongs to.
        counts: people by stage and class [S, C, lanes].
        totals: infectivity words by network [cells, lanes].
        codes: hazards as bytes, by network [cells, lanes].
        factors: of each network, with which the bytes were made [networks, lanes]; None: none are made.
        scale: hazard of one unit of a byte [lanes].
        changed: where the threads write what changed; the same memory each day.
        exits: cumulative probabilities of the exits, with the limits that were made of them.
    """

    stage: Tensor
    counts: NDArray[np.int64]
    totals: list[NDArray[np.int64]]
    codes: list[NDArray[np.uint8]]
    changed: NDArray[np.int64]
    factors: NDArray[np.float64] | None = None
    scale: NDArray[np.float64] | None = None
    exits: tuple[Mapping[int, tuple[Tensor, ...]], NDArray[np.int64], NDArray[np.float64]] | None = None


class Fused:
    """Executor for plain runs on CPUs: any spec without per-agent infectivity."""

    name = "cpu"

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}
        self._known: dict[int, _Held] = {}

    def least_memory(self, spec: Spec) -> int:
        return 5  # the stages before and after a step, and who changed

    def _plan(self, spec: Spec) -> _Plan:
        if id(spec) not in self._plans:
            self._plans[id(spec)] = _Plan.of(spec)
        return self._plans[id(spec)]

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        stage = np.empty((spec.agents, lanes), dtype=np.int8)
        limits = np.array([thresholds(value.expand(lanes)).numpy() for value in cumulative.values()], dtype=np.int64)
        ids = uniform.agents
        _begin(
            np.uint64(ids.first),
            ids.listed,
            *uniform.counter()[:2],
            uniform.keys(lanes),
            np.array(list(cumulative), dtype=np.int8),
            limits.reshape(len(cumulative), lanes),
            stage,
        )
        for s, positions in fixed.items():
            stage[positions] = s
        return {"stage": torch.from_numpy(stage)}

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return torch.nn.functional.one_hot(state["stage"].to(torch.int64), len(spec.stages)).to(torch.float64)

    def _hold(self, spec: Spec, state: Mapping[str, Tensor]) -> _Held:
        """What is known of this state; read from everybody unless it is the one that the last step made."""
        known = self._known.get(id(spec))
        if known is not None and known.stage is state["stage"]:
            return known
        plan = self._plan(spec)
        stage = state["stage"].numpy()
        counts = np.zeros((len(spec.stages), spec.class_count, stage.shape[1]), dtype=np.int64)
        _count(stage, spec.class_of, counts)
        totals, codes = [], []
        for n, network in enumerate(spec.networks):
            total = np.zeros((network.cells, stage.shape[1]), dtype=np.int64)
            if isinstance(network, Edges):
                _sum_edges(stage, *network.readers_by_source, plan.words[n], total)
            else:
                _sum_groups(stage, plan.cells[n], plan.words[n], total)
            totals.append(total)
            codes.append(np.zeros(total.shape, dtype=np.uint8))
        # Only what the threads write of it is ever backed by memory.
        changed = np.empty(stage.size, dtype=np.int64) if known is None else known.changed
        self._known[id(spec)] = _Held(state["stage"], counts, totals, codes, changed)
        return self._known[id(spec)]

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        return Summed(torch.from_numpy(self._hold(spec, state).totals[network]))

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        plan, held = self._plan(spec), self._hold(spec, state)
        stage = state["stage"].numpy()
        agents, lanes = stage.shape
        count = workers(stage.size)
        table, sizes, factors = self._hazards(spec, held, tables, shared, lanes)
        self._encode(spec, plan, held, table, sizes, factors, count)
        assert held.scale is not None

        # A word at or above base + reach · (sum of bytes) says that nothing happens.
        exit_threshold, base = self._exit_limits(spec, held, tables, lanes)
        reach = (plan.infection_scale[:, None] * spec.susceptibility).reshape(-1)
        reach = held.scale[:, None] * reach * MARGIN
        step, reach = (advance_lanes, np.ascontiguousarray(reach.T)) if lanes >= _MANY else (advance, reach)

        after = np.empty_like(stage)
        ids, counter, keys = tables.uniform.agents, tables.uniform.counter()[:2], tables.uniform.keys(lanes)
        edge = np.linspace(0, agents, count + 1).astype(np.int64)
        flows = np.zeros((count, len(spec.edges), spec.class_count, lanes), dtype=np.int64)
        cuts = [
            partial(
                step,
                edge[part],
                edge[part + 1],
                np.uint64(ids.first),
                ids.listed,
                *counter,
                keys,
                stage,
                spec.class_of,
                len(spec.networks),
                plan.cells,
                padded(held.codes, np.empty((0, 0), dtype=np.uint8)),
                padded(table, np.empty((0, 0))),
                padded(held.totals, np.empty((0, 0), dtype=np.int64)),
                padded(sizes, np.empty(0)),
                factors,
                plan.closed,
                base,
                reach,
                spec.susceptibility,
                plan.infection_edge,
                plan.infection_scale,
                plan.exit_edge,
                exit_threshold,
                plan.target,
                plan.infectious,
                after,
                flows[part],
                held.changed,
            )
            for part in range(count)
        ]
        ends = share_out(cuts, count)
        bounds = np.array([edge[:-1] * lanes, ends], dtype=np.int64).T.copy()
        self._follow(spec, plan, held, stage, after, bounds, table, sizes, factors, count)
        return self._finish(spec, held, after, flows.sum(axis=0))

    def _exit_limits(
        self, spec: Spec, held: _Held, tables: Tables, lanes: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """`exit_limits`, and the largest by stage and class as `step` reads it; as before if nothing moved them."""
        if held.exits is None or held.exits[0] is not tables.cumulative:
            limits = exit_limits(spec, tables, lanes)
            base = limits.max(axis=1).astype(np.float64).reshape(-1, lanes)
            base = base if lanes >= _MANY else np.ascontiguousarray(base.T)
            held.exits = tables.cumulative, limits, base
        return held.exits[1:]

    def _finish(
        self, spec: Spec, held: _Held, after: NDArray[np.int8], moved: NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        for (source, to), flow in zip(spec.edges, moved, strict=True):
            held.counts[source] -= flow
            held.counts[to] += flow
        held.stage = torch.from_numpy(after)
        return {"stage": held.stage}, torch.from_numpy(moved), torch.from_numpy(held.counts.copy())

    def known(self, spec: Spec, state: Mapping[str, Tensor]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Infectivity words by network [cells, lanes], and room to write down who changes: see `follow`."""
        held = self._hold(spec, state)
        return held.totals, held.changed

    def follow(
        self,
        spec: Spec,
        state: Mapping[str, Tensor],
        after: NDArray[np.int8],
        bounds: NDArray[np.int64],
        moved: NDArray[np.int64],
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Take over a step that somebody else's kernel has worked out; returns what `advance` returns.

        Args:
            spec: of the contagion.
            state: before the step.
            after: stages after it [agents, lanes].
            bounds: begins and ends of the entries, agent · lanes + lane, in the room for changes [parts, 2].
            moved: transitions [E, C, lanes].
        """
        plan, held, stage = self._plan(spec), self._hold(spec, state), state["stage"].numpy()
        # No bytes are made of these sums: without a factor every cell has the byte 0.
        nothing, lanes = [np.empty(0) for _ in spec.networks], stage.shape[1]
        held.scale, factors = np.ones(lanes), np.zeros((len(spec.networks), lanes))
        self._follow(spec, plan, held, stage, after, bounds, nothing, nothing, factors, workers(stage.size))
        return self._finish(spec, held, after, moved)

    def _hazards(
        self, spec: Spec, held: _Held, tables: Tables, shared: Mapping[str, Tensor], lanes: int
    ) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], NDArray[np.float64]]:
        """Hazards by cell for networks that are shared or mixed (few cells); sizes and factors for the others."""
        table, sizes = [], []
        factors = np.zeros((len(spec.networks), lanes))
        for n, network in enumerate(spec.networks):
            size = tables.sizes[network.name]
            factors[n] = tables.factors[network.name].expand(lanes).numpy()
            if network.shared or network.mixing is not None:
                total = shared[network.name] if network.shared else Summed(torch.from_numpy(held.totals[n])).value()
                table.append(cell_hazards(network, total.numpy(), None if size is None else size.numpy(), factors[n]))
                sizes.append(np.empty(0))
            else:
                table.append(np.empty((0, lanes)))
                sizes.append(np.empty(0) if size is None else size.numpy())
        return table, sizes, factors

    def _encode(
        self,
        spec: Spec,
        plan: _Plan,
        held: _Held,
        table: Sequence[NDArray[np.float64]],
        sizes: Sequence[NDArray[np.float64]],
        factors: NDArray[np.float64],
        count: int,
    ) -> None:
        """Bring the bytes up to date: all of them where a factor has changed, else those of the tables."""
        lanes = factors.shape[1]
        largest = [value.max(axis=0, initial=0.0) for value in table]
        fits = held.scale is not None and all(bool(np.all(top <= 254.0 * held.scale)) for top in largest)
        if held.factors is None or not fits or not np.array_equal(held.factors, factors):
            tops = [
                # Twice what an opened sum gives today leaves room for growth; a divided sum is at most 1 · infectivity.
                2.0 * largest[n]
                if value.size
                else factors[n] * spec.infectivity[n].max(initial=0.0) * (1.0 if sizes[n].size else 4.0)
                for n, value in enumerate(table)
            ]
            top = np.max(tops, axis=0, initial=0.0) if tops else np.zeros(lanes)
            held.scale = np.where((top > 1e-300) & np.isfinite(top), top, 1.0) / 254.0
            held.factors = factors.copy()
            jobs = []
            for n, network in enumerate(spec.networks):
                if not table[n].size:
                    for low in range(0, network.cells, 1 << 18):
                        high = min(network.cells, low + (1 << 18))
                        parts = (held.totals[n], sizes[n], factors[n], held.scale, plan.closed[n], held.codes[n])
                        jobs.append(partial(_bytes_of_sums, low, high, *parts))
            if jobs:
                share_out(jobs, count)
        for n, value in enumerate(table):
            if value.size:
                _bytes_of_table(value, held.scale, held.codes[n])

    def _follow(
        self,
        spec: Spec,
        plan: _Plan,
        held: _Held,
        stage: NDArray[np.int8],
        after: NDArray[np.int8],
        bounds: NDArray[np.int64],
        table: Sequence[NDArray[np.float64]],
        sizes: Sequence[NDArray[np.float64]],
        factors: NDArray[np.float64],
        count: int,
    ) -> None:
        """Add what changed to the sums, one network per job."""
        jobs: list[Callable[[], Any]] = []
        moves = (stage, after, held.changed, bounds)
        for n, network in enumerate(spec.networks):
            words, total, code = plan.words[n], held.totals[n], held.codes[n]
            if isinstance(network, Edges):
                where = network.readers_by_source
                jobs.append(partial(_follow_edges, *moves, *where, words, total, factors[n], held.scale, code))
            else:
                rate = np.empty(0) if table[n].size else factors[n]
                cell, shut = plan.cells[n], plan.closed[n]
                jobs.append(partial(_follow_groups, *moves, cell, words, total, sizes[n], rate, held.scale, shut, code))
        if jobs:
            share_out(jobs, count)

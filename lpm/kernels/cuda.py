"""The fused executor for GPUs: three Triton kernels, at the speed of the device's memory.

As on the CPU (`lpm/kernels/cpu.py`), the state is one byte per agent and lane, a day reads each agent once, and *sums
follow changes*: only who became infectious or ceased to be so is added, which for integers is the same sum. A day is
1. the hazard of every cell, from its sum (float64, each operation in the order of the reference executor);
2. one pass over the agents: random word, hazard, decision, next stage, transitions, and what changed in the sums;
3. where there are edges, one pass over them for what changed.

One small array goes to the device each day, and the transitions come back; sums cross to the host only where they pass
⊕ or mix. Fused multiply-add is off and division is IEEE's, so thresholds are the same integers as everywhere; atomic
additions are of integers, so their order changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels.device import Device
from lpm.kernels.spec import Spec, Summed, Tables, decode, exit_limits, hazards
from lpm.networks import Edges, Groups
from lpm.relax import RECIPROCALS
from lpm.rng import Address

__all__ = ["Compiled"]

_BLOCK, _WARPS = 512, 4
"""Agents × lanes that one program handles, by how many groups of 32 threads."""
_HEADER = 5
"""Words of the day's small array before its thresholds: two of the counter, two of the key, the first id."""
_COPIES, _MOST_COUNTERS = 64, 1 << 20
"""Transitions are counted in this many copies, so that few agents wait for the same counter."""
_RECIPROCALS = tl.constexpr(RECIPROCALS[::-1])
_TERMS = tl.constexpr(len(RECIPROCALS))


@triton.jit
def _felt(
    totals: tl.tensor,
    sizes: tl.tensor,
    factors: tl.tensor,
    bounds: tl.tensor,
    tabled: tl.tensor,
    hazard: tl.tensor,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Hazards [cells, lanes] of every network whose hazards no table gives: `spec.hazards`."""
    n = tl.program_id(1)
    first, beyond = tl.load(bounds + n) * LANES, tl.load(bounds + n + 1) * LANES
    at = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < beyond) & (tl.load(tabled + n) == 0)
    pressure = tl.load(totals + at, mask=inside, other=0).to(tl.float64) * 2.3283064365386963e-10
    pressure = pressure / tl.load(sizes + at // LANES, mask=inside, other=1.0)
    factor = tl.load(factors + n * LANES + at % LANES, mask=inside, other=0.0)
    tl.store(hazard + at, factor * pressure, mask=inside)


@triton.jit(do_not_specialize=["stages", "class_count", "counters", "copies"])
def _advance(
    stage: tl.tensor,
    after: tl.tensor,
    classes: tl.tensor,
    ids: tl.tensor,
    cells: tl.tensor,
    offsets: tl.tensor,
    hazard: tl.tensor,
    totals: tl.tensor,
    today: tl.tensor,
    susceptibility: tl.tensor,
    infection_edge: tl.tensor,
    infection_scale: tl.tensor,
    exit_edge: tl.tensor,
    target: tl.tensor,
    words: tl.tensor,
    flows: tl.tensor,
    agents: tl.int64,
    stages: tl.int32,
    class_count: tl.int32,
    counters: tl.int32,
    copies: tl.int32,
    NETWORKS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    CLASSES: tl.constexpr,
    LISTED: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One step of everybody, and what it changes in the sums of groups."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < agents * LANES
    agent, lane = at // LANES, at % LANES
    now = tl.load(stage + at, mask=inside, other=0).to(tl.int32)
    group = tl.zeros([BLOCK], tl.int32)
    if CLASSES:
        group = tl.load(classes + agent, mask=inside, other=0).to(tl.int32)

    # The random word: `rng.uniform_words`.
    if LISTED:
        who = tl.load(ids + agent, mask=inside, other=0).to(tl.uint64)
    else:
        who = (tl.load(today + 4) + agent).to(tl.uint64)
    block = who >> 2
    zero = tl.zeros([BLOCK], tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + tl.load(today).to(tl.uint32),
        zero + tl.load(today + 1).to(tl.uint32),
        zero + tl.load(today + 2).to(tl.uint32),
        zero + tl.load(today + 3).to(tl.uint32),
    )
    place = (who & 3).to(tl.int32)
    word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3)).to(tl.int64)

    # Infection: 1 − e^−x by `relax.one_minus_exp`, as an integer threshold.
    edge = tl.load(infection_edge + now)
    open_to = inside & (edge >= 0)
    total = tl.zeros([BLOCK], tl.float64)
    for n in tl.static_range(NETWORKS):
        cell = tl.load(cells + n * agents + agent, mask=open_to, other=0) + tl.load(offsets + n)
        total = total + tl.load(hazard + cell * LANES + lane, mask=open_to, other=0.0)
    total = total * tl.load(susceptibility + group)
    total = total * tl.load(infection_scale + now)
    y = tl.minimum(total, 32.0) * 0.0625
    q = tl.full([BLOCK], 1.0, tl.float64)
    for k in tl.static_range(_TERMS):
        q = 1.0 - (y * _RECIPROCALS[k]) * q
    q = y * q
    for _ in tl.static_range(4):
        q = q * (2.0 - q)
    edge = tl.where(open_to & (word < tl.floor(q * 4294967296.0).to(tl.int64)), edge, -1)

    # Progression: the first outcome whose cumulative threshold lies above the word.
    for k in tl.static_range(WIDTH):
        b = WIDTH - 1 - k
        leaving = tl.load(exit_edge + now * WIDTH + b)
        able = inside & (leaving >= 0)
        limit = today + HEADER + ((now * WIDTH + b) * class_count + group).to(tl.int64) * LANES + lane
        edge = tl.where(able & (word < tl.load(limit, mask=able, other=0)), leaving, edge)

    moved = edge >= 0
    then = tl.where(moved, tl.load(target + edge, mask=moved, other=0), now)
    tl.store(after + at, then.to(tl.int8), mask=inside)
    counter = (tl.program_id(0) % copies).to(tl.int64) * counters + (edge * class_count + group).to(tl.int64) * LANES
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(flows + counter + lane, one, mask=moved, sem="relaxed")
    for n in tl.static_range(NETWORKS):
        change = tl.load(words + n * stages + then) - tl.load(words + n * stages + now)
        changed = moved & (change != 0)
        cell = tl.load(cells + n * agents + agent, mask=changed, other=0) + tl.load(offsets + n)
        tl.atomic_add(totals + cell * LANES + lane, change, mask=changed, sem="relaxed")


@triton.jit(do_not_specialize=["pairs"])
def _along_edges(
    source: tl.tensor,
    reader: tl.tensor,
    stage: tl.tensor,
    after: tl.tensor,
    words: tl.tensor,
    total: tl.tensor,
    pairs: tl.int64,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add what changed to the sums of those who read along edges."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs * LANES
    edge, lane = at // LANES, at % LANES
    who = tl.load(source + edge, mask=inside, other=0).to(tl.int64) * LANES + lane
    before = tl.load(words + tl.load(stage + who, mask=inside, other=0).to(tl.int32))
    change = tl.load(words + tl.load(after + who, mask=inside, other=0).to(tl.int32)) - before
    changed = inside & (change != 0)
    reads = tl.load(reader + edge, mask=changed, other=0).to(tl.int64) * LANES + lane
    tl.atomic_add(total + reads, change, mask=changed, sem="relaxed")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What of a spec stays on the device.

    Attributes:
        spec: what it is made from.
        bounds: network n has the cells bounds[n] to bounds[n + 1] − 1 of all [networks + 1].
        offsets: the same on the device [networks + 1].
        tabled: whether a network's hazards come as a table from the host, by network.
        tabled_there: the same on the device [networks].
        widest: the most cells of a network whose hazards are worked out on the device.
        cells: cell of each agent within its network; of edges its own number [networks, agents].
        classes: class of each agent, or empty where there is one class [agents].
        words: infectivity as words [networks, S].
        group_words: the same, and 0 for edges, which `_along_edges` follows [networks, S].
        infection_edge: the edge by which a stage is infected, or −1 [S].
        infection_scale: its relative susceptibility [S].
        exit_edge: progression edges in order, or −1 [S, width].
        width: the most progression edges of a stage.
        target: the stage to which an edge leads [E].
        susceptibility: by class [C].
    """

    spec: Spec
    bounds: NDArray[np.int64]
    offsets: Tensor
    tabled: list[bool]
    tabled_there: Tensor
    widest: int
    cells: Tensor
    classes: Tensor
    words: Tensor
    group_words: Tensor
    infection_edge: Tensor
    infection_scale: Tensor
    exit_edge: Tensor
    width: int
    target: Tensor
    susceptibility: Tensor

    @staticmethod
    def of(spec: Spec, device: torch.device) -> _Plan:
        count, number = len(spec.stages), len(spec.networks)
        cells = torch.empty((number, spec.agents), dtype=torch.int32, device=device)
        for n, network in enumerate(spec.networks):
            cells[n] = torch.from_numpy(network.cell_of).to(device)
        words = spec.infectivity_words.reshape(number, count)
        along = np.array([isinstance(network, Edges) for network in spec.networks], dtype=np.bool_)
        # Few cells, and the tables of mixing are on the host.
        tabled = [network.shared or network.mixing is not None for network in spec.networks]
        bounds = np.cumsum([0, *(network.cells for network in spec.networks)], dtype=np.int64)

        def placed(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return _Plan(
            spec,
            bounds,
            placed(bounds),
            tabled,
            placed(np.array(tabled, dtype=np.int32)),
            max([network.cells for network, table in zip(spec.networks, tabled, strict=True) if not table], default=0),
            cells,
            placed(spec.class_of),
            placed(words),
            placed(np.where(along[:, None], 0, words)),
            placed(spec.infections[0].astype(np.int32)),
            placed(spec.infections[1]),
            placed(spec.exit_edges.astype(np.int32)),
            spec.exit_edges.shape[1],
            placed(np.array([to for _, to in spec.edges], dtype=np.int32)),
            placed(spec.susceptibility),
        )


@dataclass(eq=False)
class _Held:
    """What is known of the newest state, so that the next step need not add up everybody again.

    Attributes:
        stage: the state it belongs to.
        counts: people by stage and class, on the host [S, C, lanes].
        totals: infectivity words of all networks' cells [cells, lanes].
        hazard: room for the hazards of all networks' cells [cells, lanes].
        flows: transitions since this was made, in several copies [copies, E · C · lanes].
        moved: their sum up to the newest state, on the host [E · C · lanes].
    """

    stage: Tensor
    counts: Tensor
    totals: Tensor
    hazard: Tensor
    flows: Tensor
    moved: Tensor


class Compiled:
    """Executor for plain runs on a GPU: any spec without per-agent infectivity.

    Args:
        device: where; the CPU only under Triton's interpreter (`TRITON_INTERPRET=1`), to test.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = f"triton:{device}"
        self._tensors = Device(device)
        self._plans: dict[int, _Plan] = {}
        self._known: dict[int, _Held] = {}
        self._ids: tuple[NDArray[np.uint64], Tensor] | None = None
        self._sizes: tuple[Spec, list[Tensor | None], Tensor] | None = None

    def least_memory(self, spec: Spec) -> int:
        return self._tensors.least_memory(spec)

    def _plan(self, spec: Spec) -> _Plan:
        if id(spec) not in self._plans:
            self._plans[id(spec)] = _Plan.of(spec, self.device)
        return self._plans[id(spec)]

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        return self._tensors.start(spec, cumulative, fixed, uniform, lanes)

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return self._tensors.occupancy(spec, state)

    def _hold(self, spec: Spec, state: Mapping[str, Tensor]) -> _Held:
        """What is known of this state; read from everybody unless it is the one that the last step made."""
        known = self._known.get(id(spec))
        if known is not None and known.stage is state["stage"]:
            return known
        plan = self._plan(spec)
        stage = state["stage"].to(self.device)
        sums = [
            self._tensors.sum(stage, network, plan.cells[n], plan.words[n]) for n, network in enumerate(spec.networks)
        ]
        totals = torch.cat([torch.zeros((0, stage.shape[1]), dtype=torch.int64, device=self.device), *sums])
        del sums
        counts = self._tensors.count(spec, stage, plan.classes)
        hazard = torch.empty(totals.shape, dtype=torch.float64, device=self.device) if known is None else known.hazard
        counters = len(spec.edges) * spec.class_count * stage.shape[1]
        copies = max(1, min(_COPIES, _MOST_COUNTERS // max(counters, 1)))
        flows = torch.zeros((copies, counters), dtype=torch.int64, device=self.device)
        moved = torch.zeros(counters, dtype=torch.int64)
        self._known[id(spec)] = _Held(state["stage"], counts, totals, hazard, flows, moved)
        return self._known[id(spec)]

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        held, bounds = self._hold(spec, state), self._plan(spec).bounds
        return Summed(held.totals[bounds[network] : bounds[network + 1]].clone().cpu())

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        plan, held = self._plan(spec), self._hold(spec, state)
        stage = state["stage"].to(self.device)
        agents, lanes = stage.shape
        today, factors = self._today(spec, plan, tables, lanes)
        for n, network in enumerate(spec.networks):
            if plan.tabled[n]:
                part = slice(plan.bounds[n], plan.bounds[n + 1])
                total = shared[network.name] if network.shared else decode(held.totals[part].cpu())
                felt = hazards(network, total, tables.sizes[network.name], tables.factors[network.name])
                held.hazard[part] = felt.to(self.device)
        if plan.widest:
            _felt[(triton.cdiv(plan.widest * lanes, _BLOCK), len(spec.networks))](
                held.totals,
                self._people(spec, plan, tables),
                factors,
                plan.offsets,
                plan.tabled_there,
                held.hazard,
                LANES=lanes,
                BLOCK=_BLOCK,
                enable_fp_fusion=False,
            )
        after = torch.empty_like(stage)
        ids = tables.uniform.agents
        if stage.numel():
            _advance[(triton.cdiv(stage.numel(), _BLOCK),)](
                stage,
                after,
                plan.classes,
                self._listed(ids.listed) if ids.listed.size else plan.offsets,
                plan.cells,
                plan.offsets,
                held.hazard,
                held.totals,
                today,
                plan.susceptibility,
                plan.infection_edge,
                plan.infection_scale,
                plan.exit_edge,
                plan.target,
                plan.group_words,
                held.flows,
                agents,
                len(spec.stages),
                spec.class_count,
                held.flows.shape[1],
                held.flows.shape[0],
                NETWORKS=len(spec.networks),
                WIDTH=plan.width,
                LANES=lanes,
                CLASSES=spec.class_count > 1,
                LISTED=bool(ids.listed.size),
                HEADER=_HEADER,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
        for n, network in enumerate(spec.networks):
            if isinstance(network, Edges) and network.source.numel():
                source, reader = self._tensors.pairs(network)
                _along_edges[(triton.cdiv(source.numel() * lanes, _BLOCK),)](
                    source,
                    reader,
                    stage,
                    after,
                    plan.words[n],
                    held.totals[plan.bounds[n] : plan.bounds[n + 1]],
                    source.numel(),
                    LANES=lanes,
                    BLOCK=_BLOCK,
                )
        ever = held.flows.sum(0).cpu()
        moved = (ever - held.moved).reshape(len(spec.edges), spec.class_count, lanes)
        held.moved = ever
        for (source_stage, to), flow in zip(spec.edges, moved, strict=True):
            held.counts[source_stage] -= flow
            held.counts[to] += flow
        held.stage = after
        return {"stage": after}, moved, held.counts.clone()

    def _people(self, spec: Spec, plan: _Plan, tables: Tables) -> Tensor:
        """What the sum of each cell is divided by: its people, 1 where sums aren't divided [cells]."""
        sizes = [tables.sizes[network.name] for network in spec.networks]
        known = self._sizes
        # The same tensors all through a run.
        if known is None or known[0] is not spec or any(a is not b for a, b in zip(known[1], sizes, strict=True)):
            divisor = torch.ones(int(plan.bounds[-1]), dtype=torch.float64)
            for n, (network, size) in enumerate(zip(spec.networks, sizes, strict=True)):
                if size is not None:
                    divisor[plan.bounds[n] : plan.bounds[n + 1]] = torch.clamp(size, min=1.0)
                if isinstance(network, Groups) and network.outsiders:
                    divisor[plan.bounds[n]] = torch.inf  # who is in no group meets nobody
            known = self._sizes = spec, sizes, divisor.to(self.device)
        return known[2]

    def _listed(self, ids: NDArray[np.uint64]) -> Tensor:
        if self._ids is None or self._ids[0] is not ids:
            self._ids = ids, torch.from_numpy(ids.view(np.int64)).to(self.device)
        return self._ids[1]

    def _today(self, spec: Spec, plan: _Plan, tables: Tables, lanes: int) -> tuple[Tensor, Tensor]:
        """The day's numbers, sent in one piece: address and thresholds as words; factors [networks, lanes]."""
        limits = exit_limits(spec, tables, lanes)
        factors = np.empty((len(spec.networks), lanes))
        for n, network in enumerate(spec.networks):
            factors[n] = tables.factors[network.name].expand(lanes).numpy()
        address = np.array([*tables.uniform.counter(), np.uint64(tables.uniform.agents.first)], dtype=np.uint64)
        sent = np.concatenate([address.view(np.int64), limits.reshape(-1), factors.view(np.int64).reshape(-1)])
        today = torch.from_numpy(sent).to(self.device)
        return today, today[_HEADER + limits.size :].view(torch.float64).reshape(factors.shape)

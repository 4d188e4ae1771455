"""The executor for any torch device: the spec in integer tensor operations, in chunks of agents.

One byte per agent and lane stays on the device, and what never changes is sent there once; sums that pass ⊕ or mix,
hazards of those cells and counts cross to the host. Every float64 operation is a tensor operation of its own, in the
order of the reference executor, so nothing is contracted and thresholds are the same integers on every device.

A GPU with Triton has a faster one (`lpm/kernels/cuda.py`), which begins runs with the functions of this one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.kernels.spec import Executor, Spec, Summed, Tables, decode, exit_limits, hazards
from lpm.networks import Edges, Groups, Network
from lpm.ranks import place
from lpm.relax import one_minus_exp, thresholds
from lpm.rng import Address, Ids

__all__ = ["Device", "choose", "find_device", "philox_words"]

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_HOST_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 22


def find_device(name: str) -> torch.device:
    """A device by name; under `torchrun`, `cuda` is the GPU with the rank's number on its machine.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: for another name, or a device that is absent.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise InputError(f"The device is {name!r}: cpu, cuda, or cuda:N for a certain GPU.")
    if kind == "cpu":
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise InputError(
            f"The device {name} is absent: torch {torch.__version__} finds no GPU here.",
            "Leave --device out to run on the CPU, or install a torch with CUDA on a machine with a GPU.",
        )
    wanted = int(number) if colon else place().local_rank
    if wanted >= there:
        raise InputError(
            f"The device cuda:{wanted} is absent: this machine has {there} GPU{'s' if there > 1 else ''}.",
            f"Use at most {there} ranks on this machine, or a device from cuda:0 to cuda:{there - 1}.",
        )
    return torch.device("cuda", wanted)


def _high(product: Tensor) -> Tensor:
    """The upper 32 bits of a product modulo 2^64, which int64 holds in two's complement."""
    return (product >> 32) & _MASK


def _philox(c0: Tensor, c1: Tensor, address: Address) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 for the blocks whose counters begin with c0 and c1, as int64 words below 2^32."""
    third, fourth, lower, upper = (int(word) for word in address.counter())
    c2, c3 = torch.full_like(c0, third), torch.full_like(c0, fourth)
    for round in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        k0, k1 = (lower + round * _W0) & _MASK, (upper + round * _W1) & _MASK
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & _MASK, _high(p0) ^ c3 ^ k1, p0 & _MASK
    return c0, c1, c2, c3


def philox_words(address: Address, chunk: slice, device: torch.device) -> Tensor:
    """The random words of some agents, as `rng.uniform_words` gives them [agents in the chunk] int64.

    Args:
        address: seed, step, protocol and all agents.
        chunk: which of the agents, by position.
        device: where.
    """
    ids: Ids = address.agents
    if not ids.listed.size:
        first, beyond = ids.first + chunk.start, ids.first + chunk.stop
        # As two's complement: ids reach 2^64.
        start = (first >> 2) - (1 << 64) * (first >> 2 >= 1 << 63)
        block = start + torch.arange((beyond - 1 >> 2) - (first >> 2) + 1, dtype=torch.int64, device=device)
        words = torch.stack(_philox(block & _MASK, _high(block), address), dim=1).reshape(-1)
        return words[first & 3 : (first & 3) + chunk.stop - chunk.start]
    numbers = torch.from_numpy(ids.listed[chunk].view(np.int64)).to(device)
    block = (numbers >> 2) & ((1 << 62) - 1)
    four = torch.stack(_philox(block & _MASK, _high(block), address))
    return four.gather(0, (numbers & 3)[None, :])[0]


@dataclass(frozen=True)
class _Placed:
    """What of a spec stays on the device.

    Attributes:
        classes: class of each agent, or None where there is one class [agents].
        cells: cell of each agent by network, or None for edges, where agent i reads sum i [agents].
    """

    classes: Tensor | None
    cells: list[Tensor | None]


class Device:
    """Executor for plain runs on a torch device: any spec without per-agent infectivity.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = f"torch:{device}"
        self._placed: dict[int, tuple[Spec, _Placed]] = {}
        self._sizes: dict[str, tuple[Tensor, Tensor]] = {}
        self._pairs: dict[int, tuple[Edges, Tensor, Tensor]] = {}

    def least_memory(self, spec: Spec) -> int:
        return 5

    def size(self, name: str, people: Tensor) -> Tensor:
        """People per cell of a network, on the device: sent once, since a run never changes them [cells]."""
        if name not in self._sizes or self._sizes[name][0] is not people:
            self._sizes[name] = people, people.to(self.device)
        return self._sizes[name][1]

    def pairs(self, network: Edges) -> tuple[Tensor, Tensor]:
        """Source and reader of each edge, on the device, each [edges (both ways)] int32."""
        if id(network) not in self._pairs:
            ends = (network.source.to(torch.int32).to(self.device), network.reader.to(torch.int32).to(self.device))
            self._pairs[id(network)] = network, *ends
        return self._pairs[id(network)][1:]

    def _place(self, spec: Spec) -> _Placed:
        if id(spec) not in self._placed:
            classes = None
            if spec.class_count > 1:
                kind = np.int32 if spec.class_count > 127 else np.int8
                classes = torch.from_numpy(spec.class_of.astype(kind)).to(self.device)
            cells = [
                None if isinstance(n, Edges) else torch.from_numpy(n.cell_of.astype(np.int32)).to(self.device)
                for n in spec.networks
            ]
            self._placed[id(spec)] = spec, _Placed(classes, cells)
        return self._placed[id(spec)][1]

    def _chunks(self, agents: int, lanes: int) -> Iterator[slice]:
        most = _HOST_CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK
        size = max(1, most // lanes)
        return (slice(start, min(start + size, agents)) for start in range(0, agents, size))

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        stage = torch.zeros((spec.agents, lanes), dtype=torch.int8, device=self.device)
        for chunk in self._chunks(spec.agents, lanes):
            word = philox_words(uniform, chunk, self.device)[:, None]
            for s in reversed(list(cumulative)):
                stage[chunk].masked_fill_(word < thresholds(cumulative[s].expand(1, lanes)).to(self.device), s)
        for s, positions in fixed.items():
            stage[torch.from_numpy(positions).to(self.device)] = s
        return {"stage": stage}

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        stage = state["stage"].cpu().to(torch.int64)
        return torch.nn.functional.one_hot(stage, len(spec.stages)).to(torch.float64)

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        return Summed(self._sum(spec, state["stage"].to(self.device), network).cpu())

    def _sum(self, spec: Spec, stage: Tensor, number: int) -> Tensor:
        words = torch.from_numpy(spec.infectivity_words[number]).to(self.device)
        return self.sum(stage, spec.networks[number], self._place(spec).cells[number], words)

    def sum(self, stage: Tensor, network: Network, cells: Tensor | None, words: Tensor) -> Tensor:
        """Infectivity by cell; only those who are infectious are added up.

        Args:
            stage: of each agent [agents, lanes].
            network: over which.
            cells: cell of each agent; not used for edges [agents].
            words: infectivity of each stage [S].

        Returns:
            Words [cells, lanes].
        """
        agents, lanes = stage.shape
        total = torch.zeros((network.cells, lanes), dtype=torch.int64, device=self.device)
        if isinstance(network, Edges):
            source, reader = self.pairs(network)
            for chunk in self._chunks(source.numel(), lanes):
                message = words[stage[source[chunk].to(torch.int64)].to(torch.int64)]
                total.index_add_(0, reader[chunk].to(torch.int64), message)
            return total
        assert cells is not None
        for chunk in self._chunks(agents, lanes):
            message = words[stage[chunk].to(torch.int64)]
            speaks = (message != 0).any(dim=1).nonzero()[:, 0]
            total.index_add_(0, cells[chunk][speaks].to(torch.int64), message[speaks])
        return total

    def count(self, spec: Spec, stage: Tensor, classes: Tensor) -> Tensor:
        """People in each stage, on the host [S, C, lanes] int64.

        Args:
            spec: whose stages and classes.
            stage: of each agent [agents, lanes].
            classes: of each agent, or empty where there is one class [agents].
        """
        lanes = stage.shape[1]
        shape = (len(spec.stages), spec.class_count, lanes)
        lane = torch.arange(lanes, device=self.device)[None, :]
        found = torch.zeros(int(np.prod(shape)), dtype=torch.int64, device=self.device)
        for chunk in self._chunks(stage.shape[0], lanes):
            row = stage[chunk].to(torch.int64) * spec.class_count
            if classes.numel():
                row = row + classes[chunk].to(torch.int64)[:, None]
            found += torch.bincount((row * lanes + lane).reshape(-1), minlength=found.numel())
        return found.reshape(shape).cpu()

    def _hazards(self, spec: Spec, stage: Tensor, tables: Tables, shared: Mapping[str, Tensor]) -> list[Tensor]:
        """The hazard that a member of each cell feels, by network [cells, lanes]."""
        found = []
        for k, network in enumerate(spec.networks):
            size, factor = tables.sizes[network.name], tables.factors[network.name]
            if network.shared or (isinstance(network, Groups) and network.mixing is not None):
                # Few cells, and the tables of mixing are on the host.
                total = shared[network.name] if network.shared else decode(self._sum(spec, stage, k).cpu())
                block = hazards(network, total, size, factor).to(self.device)
            else:
                size = None if size is None else self.size(network.name, size)
                block = hazards(network, decode(self._sum(spec, stage, k)), size, factor.to(self.device))
            found.append(block.expand(network.cells, stage.shape[1]))
        return found

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        stage = state["stage"].to(self.device)
        agents, lanes = stage.shape
        placed = self._place(spec)
        blocks = self._hazards(spec, stage, tables, shared)
        count, classes = len(spec.stages), spec.class_count

        def table(values: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(self.device)

        of_infection, of_scale = map(table, spec.infections)
        of_exit, limits = table(spec.exit_edges), table(exit_limits(spec, tables, lanes))
        susceptibility = table(spec.susceptibility)
        target = table(np.array([to for _, to in spec.edges], dtype=np.int64))
        lane = torch.arange(lanes, device=self.device)[None, :]

        after = torch.empty_like(stage)
        flows = torch.zeros(len(spec.edges) * classes * lanes, dtype=torch.int64, device=self.device)
        counts = torch.zeros(count * classes * lanes, dtype=torch.int64, device=self.device)
        for chunk in self._chunks(agents, lanes):
            now = stage[chunk].to(torch.int64)
            word = philox_words(tables.uniform, chunk, self.device)[:, None]
            group = torch.zeros((), dtype=torch.int64, device=self.device)
            if placed.classes is not None:
                group = placed.classes[chunk].to(torch.int64)[:, None]
            hazard = torch.zeros(now.shape, dtype=torch.float64, device=self.device)
            for block, cells in zip(blocks, placed.cells, strict=True):
                hazard = hazard + (block[chunk] if cells is None else block[cells[chunk].to(torch.int64)])
            hazard = hazard * susceptibility[group]
            caught = word < thresholds(one_minus_exp(hazard * of_scale[now]))
            edge = torch.where(caught, of_infection[now], -1)
            for b in reversed(range(of_exit.shape[1])):
                leaving = of_exit[now, b]
                leaves = (leaving >= 0) & (word < limits[now, b, group, lane])
                edge = torch.where(leaves, leaving, edge)
            moved = edge >= 0
            then = torch.where(moved, target[edge.clamp(min=0)], now)
            after[chunk] = then.to(torch.int8)
            place_of = group * lanes + lane
            flows += torch.bincount((edge * (classes * lanes) + place_of)[moved], minlength=flows.numel())
            counts += torch.bincount((then * (classes * lanes) + place_of).reshape(-1), minlength=counts.numel())
        return (
            {"stage": after},
            flows.reshape(-1, classes, lanes).cpu(),
            counts.reshape(count, classes, lanes).cpu(),
        )


def choose(kind: str, name: str) -> Executor:
    """The executor of plain runs on a device.

    Args:
        kind: "torch" for tensor operations, "triton" for Triton kernels, "device" for the faster that can run there.
        name: the device: "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: for a device that is absent, or Triton kernels without Triton.
    """
    device = find_device(name)
    compiles = importlib.util.find_spec("triton") is not None
    if kind == "triton" and not (compiles and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")):
        raise InputError(
            f"The executor triton:{name} needs a GPU and the package triton, which torch's builds with CUDA bring.",
            f"Use device:{name}.",
        )
    if kind == "triton" or (kind == "device" and compiles and device.type == "cuda"):
        from lpm.kernels.cuda import Compiled

        return Compiled(device)
    return Device(device)

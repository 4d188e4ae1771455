"""The plain torch executor: every line of it can be differentiated, and the fused executors must match its bits.

The state is one-hot float64, hard in value; its tangent is the tangent of the conditional expectation (`lpm.relax`).
All rows of the transition matrix are computed, also those an agent is not in, because a susceptible row matters to an
agent whose tangent there isn't 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.kernels.spec import Spec, Summed, Tables, hazards
from lpm.networks import Groups, Network
from lpm.relax import one_minus_exp, sample
from lpm.rng import Address

__all__ = ["Reference"]


class Reference:
    """Executor in plain torch, for any spec and for derivatives."""

    name = "reference"

    def least_memory(self, spec: Spec) -> int:
        return 70 * len(spec.stages)  # measured: some nine numbers for each stage that somebody could be in

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        agents = spec.agents
        ones = torch.ones((agents, lanes), dtype=torch.float64)
        word = torch.from_numpy(uniform.by_lane().astype(np.int64))
        targets = list(cumulative)
        drawn = sample(ones, [cumulative[s].expand(1, lanes) for s in targets], word)
        columns = [torch.zeros_like(ones) for _ in spec.stages]
        rest = ones
        for stage, outcome in zip(targets, drawn, strict=True):
            columns[stage] = columns[stage] + outcome
            rest = rest - outcome
        columns[0] = columns[0] + rest
        occupied = torch.stack(columns, dim=-1)
        for stage, positions in fixed.items():
            row = torch.zeros(len(spec.stages), dtype=torch.float64)
            row[stage] = 1.0
            keep = torch.ones((agents, 1, 1), dtype=torch.float64)
            keep[torch.from_numpy(positions)] = 0.0
            occupied = occupied * keep + row * (1.0 - keep)
        return {"stage": occupied}

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        return state["stage"]

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        slope = torch.from_numpy(spec.infectivity[network])
        return _sum(spec.networks[network], state["stage"], slope, slope, tables.relative)

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        occupied = state["stage"]
        lanes = occupied.shape[1]
        hazard = torch.zeros(occupied.shape[:2], dtype=torch.float64)
        for k, network in enumerate(spec.networks):
            size, factor = tables.sizes[network.name], tables.factors[network.name]
            cells = torch.from_numpy(network.cell_of)
            slope = torch.from_numpy(spec.infectivity[k])
            if network.shared:
                hazard = hazard + hazards(network, shared[network.name], size, factor)[cells]
            elif network.mixing is not None:
                total = _sum(network, occupied, slope, slope, tables.relative).value()
                hazard = hazard + hazards(network, total, size, factor)[cells]
            else:
                soft = _difference(network, occupied, slope, size, factor)
                total = _sum(network, occupied, slope, soft, tables.relative).value()
                hazard = hazard + hazards(network, total, size, factor)[cells]
                if isinstance(network, Groups):
                    # Nobody meets themselves. Whoever can be infected isn't infectious, so this takes nothing from a
                    # hazard that is used; but neither the row nor the derivative of the own stage may come back.
                    own = network.own(*_messages(occupied, slope, soft, tables.relative))
                    if network.outsiders:
                        own = own * (cells > 0).to(torch.float64)[:, None]
                    hazard = hazard - (factor if size is None else factor / size[cells][:, None]) * own
        classes = torch.from_numpy(spec.classes)
        hazard = hazard * torch.from_numpy(spec.susceptibility)[classes][:, None]

        word = torch.from_numpy(tables.uniform.by_lane().astype(np.int64))
        flows: list[Tensor] = [torch.zeros(0)] * len(spec.edges)
        for stage, (edge, relative) in spec.infection.items():
            flows[edge] = sample(occupied[..., stage], [one_minus_exp(hazard * relative)], word)[0]
        for stage, edges in spec.exits.items():
            cumulative = [table.expand(spec.class_count, lanes)[classes] for table in tables.cumulative[stage]]
            for edge, flow in zip(edges, sample(occupied[..., stage], cumulative, word), strict=True):
                flows[edge] = flow

        columns = list(occupied.unbind(-1))
        for (source, target), flow in zip(spec.edges, flows, strict=True):
            columns[source] = columns[source] - flow
            columns[target] = columns[target] + flow
        after = torch.stack(columns, dim=-1)
        return {"stage": after}, _by_class(torch.stack(flows, dim=-1), spec), _by_class(after, spec)


def _sum(network: Network, occupied: Tensor, hard: Tensor, soft: Tensor, relative: Tensor | None) -> Summed:
    """Infectivity by cell: `hard` gives the value, `soft` (which may depend on the reader's cell) the derivative."""
    return Summed(*network.total(*_messages(occupied, hard, soft, relative)))


def _messages(occupied: Tensor, hard: Tensor, soft: Tensor, relative: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each agent sends, and a number with its derivative [agents, lanes]."""
    sent, gentle = (occupied.detach() * hard).sum(-1), (occupied * soft).sum(-1)
    if relative is None:
        return sent, gentle
    # A difference of one's own stage to itself is 0, so the derivative of `relative` comes from what is sent.
    fixed = relative.detach()
    return sent * fixed, gentle * fixed + sent * (relative - fixed)


def _difference(network: Network, occupied: Tensor, slope: Tensor, size: Tensor | None, factor: Tensor) -> Tensor:
    """Infectivities whose linear sum gives the discrete difference of the escape probability.

    Moving one housemate from its stage c to s multiplies the escape probability by e^(−b(w_s−w_c)), where b is the
    hazard per unit of infectivity of a reader with susceptibility 1; as a change of hazard that is
    (1 − e^(−b(w_s−w_c)))/b. Only the derivative uses it, never a value.
    """
    per_unit = factor.detach() if size is None else factor.detach() / torch.clamp(size, min=1.0)[:, None]
    if size is not None:
        per_unit = per_unit[torch.from_numpy(network.cell_of)]
    b = per_unit.expand(occupied.shape[:2])[..., None]
    step = slope - (occupied.detach() * slope).sum(-1, keepdim=True)
    curved = -torch.expm1(-b * step) / torch.where(b == 0, torch.ones_like(b), b)
    return torch.where(b == 0, step, curved)


def _by_class(values: Tensor, spec: Spec) -> Tensor:
    """Sum [agents, lanes, X] by class → [X, C, lanes]. Sums of 0 and 1 are exact in any order."""
    zeros = torch.zeros((spec.class_count, *values.shape[1:]), dtype=values.dtype)
    return zeros.index_add(0, torch.from_numpy(spec.classes), values).permute(2, 0, 1)

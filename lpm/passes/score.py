"""The likelihood ratio of every decision, through a run: the estimator `score` (paper, eq. 11).

The derivative of an expected output is E[y · ∂ log p(decisions)], plus what derivative y has along the trajectory
itself. It is unbiased for any model whose chances depend smoothly on the parameters, and noisy, since every decision
speaks to every output; so a decision is held only against outputs of its own *component*, the agents that can ever
have heard of it, where components are closed. Where a shared network joins all shards, each holds its own outputs
against the decisions of everybody: their scores, one sum over all people by step and parameter, are opened at the end.
`lpm.estimators` takes the mean of several runs off as baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lpm.flame.contagion import Contagion
from lpm.flame.dynamics import Dynamics
from lpm.flame.events import Event, Series
from lpm.flame.learned import Learned
from lpm.flame.model import Model
from lpm.networks import Edges, Groups
from lpm.passes.plain import Plain
from lpm.passes.steps import Arrays, Rounds, Steps, push, soft, split
from lpm.relax import recording_likelihood

__all__ = ["Score", "components"]


def components(model: Model) -> NDArray[np.int64]:
    """Which agents can influence one another [agents], numbered from 0; all are in one where somebody meets everybody.

    A shared network joins all, since shards know its sums alone; so does a protocol of the user's own, which may look
    at anybody.
    """
    agents = model.population.agents
    together = np.zeros(agents, dtype=np.int64)
    rows, columns, nodes = [np.arange(agents)], [np.arange(agents)], agents
    for protocol in model.protocols:
        if not isinstance(protocol, (Contagion, Dynamics, Event, Series, Learned)):
            return together
        for name in protocol.networks():
            network = model.network(name)
            if network.shared or network.mixing is not None:
                return together
            if isinstance(network, Edges):
                rows.append(network.source.numpy())
                columns.append(network.reader.numpy())
                continue
            cell = network.cell_of
            member = np.arange(agents)
            if isinstance(network, Groups) and network.outsiders:
                member = member[cell > 0]
            rows.append(member)
            columns.append(nodes + cell[member].astype(np.int64))
            nodes += network.cells
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(row), dtype=np.int8), (row, column)), shape=(nodes, nodes))
    _, label = connected_components(graph, directed=False)
    return np.unique(label[:agents], return_inverse=True)[1].astype(np.int64)


class Score(Plain):
    """Values, the scores of the decisions by component, and what tangents there are beside decisions."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        lanes, count = loop.theta.shape
        self.directions = torch.eye(count, dtype=torch.float64)[:, None, :].expand(count, lanes, count).contiguous()
        self.component = torch.from_numpy(components(loop.model))
        self.tangents: Arrays = {}
        self.scores = torch.zeros(0)
        self.recorded: list[tuple[Tensor, Tensor, Tensor]] = []  # outputs, scores, tangents of outputs, step by step

    def start(self) -> None:
        super().start()

        def begin(theta: Tensor) -> tuple[Arrays, Tensor]:
            with recording_likelihood() as decisions:
                carry = self.loop.start(theta)
            return split(carry)[0], self._total(decisions)

        self.tangents, scores = push(begin, (self.loop.theta,), (self.directions,))
        self.scores = self._gather(scores)

    def step(self, t: int) -> Arrays:
        floats, others = split(self.carry)
        theta, before = self.loop.theta, self.carry
        summed = self.loop.emit(t, theta, before)

        def soft_sums(theta: Tensor, floats: Arrays) -> Arrays:
            return {key: soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

        pushed = push(soft_sums, (theta, floats), (self.directions, self.tangents)) if summed else {}
        sums, moved = self.open_along(t, summed, pushed)

        def values(theta: Tensor, floats: Arrays, sums: Arrays) -> tuple[Arrays, Tensor, Tensor]:
            with recording_likelihood() as decisions:
                carry, records = self.loop.advance(t, theta, floats | others, sums)
            return split(carry)[0], self.loop.model.values(records), self._total(decisions)

        self.carry, records = self.loop.advance(t, theta, before, sums)
        self.tangents, path, scores = push(values, (theta, floats, sums), (self.directions, self.tangents, moved))
        self.scores = self.scores + self._gather(scores)
        own = self.loop.model.by_agent(before, self.carry)
        self.recorded.append((self._gather(own), self.scores, path))
        self.rounds.see(self.loop.env(self.carry))
        return records

    def _total(self, decisions: list[Tensor]) -> Tensor:
        """Log-likelihood of all decisions of each agent [agents, lanes]."""
        total = torch.zeros((self.component.shape[0], self.loop.lanes), dtype=torch.float64)
        for each in decisions:
            total = total + each
        return total

    def _gather(self, values: Tensor) -> Tensor:
        """Sum [X, agents, lanes] by component → [X, components, lanes]."""
        count = int(self.component.max()) + 1 if self.component.numel() else 1
        zeros = torch.zeros((values.shape[0], count, values.shape[2]), dtype=values.dtype)
        return zeros.index_add(1, self.component, values)

    def snapshot(self) -> dict[str, NDArray[Any]]:
        outputs, scores, path = (torch.stack(each) for each in zip(*self.recorded, strict=True))
        return (
            super().snapshot()
            | {f"tangent:{key}": value.numpy() for key, value in self.tangents.items()}
            | {"outputs": outputs.numpy(), "scores": scores.numpy(), "path": path.numpy()}
        )

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.tangents = {key[8:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("tangent:")}
        parts = [torch.from_numpy(found[key].copy()) for key in ("outputs", "scores", "path")]
        self.recorded = list(zip(*parts, strict=True))
        self.scores = parts[1][-1]

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        outputs, own, path = (torch.stack(each) for each in zip(*self.recorded, strict=True))
        scores = own.permute(0, 2, 3, 1).numpy()
        if self.loop.pairs:
            by_parameter = {"decisions": np.moveaxis(scores, 3, 0)}
            _, opened = self.rounds.add_each("decisions", len(self.recorded) - 1, {}, by_parameter, "~")
            scores = np.moveaxis(opened["decisions"], 0, 3)
        return {"tangents": path.permute(0, 2, 3, 1).numpy(), "by_component": (outputs.numpy(), scores)}

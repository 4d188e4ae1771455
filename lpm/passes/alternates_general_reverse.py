"""Alternates of protocols of any kind backwards: one scalar's gradient by any number of parameters (paper, eq. 8).

Forwards the run carries two directions: the reference, and a change of all parameters at once, on which alone it
depends which alternatives are kept (`alternates_general`). Given those choices, weights and tangents of a step are a
linear map of those before it and of the parameters. What the map is made of is kept, sparsely: which alternatives went
on, by which factors, and by how much they differ in what they send and in the outputs. The way back pulls cotangents
through the map, by torch through the actual people's step, and by hand through the weights; the cotangents of opened
sums are added up in one more round per step, as those of the tangent are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vjp, vmap

from lpm import ring
from lpm.passes.alternates_general import AlternatesGeneral, Change, Choice
from lpm.passes.doors import Besides, Decision, offers
from lpm.passes.kept import Kept
from lpm.passes.steps import Arrays, Rounds, Steps, split

__all__ = ["AlternatesGeneralReverse"]

Parts = dict[str, Tensor]
"""Of what the linear map of a step is made, by name: sparse."""

_EMITTED, _SENT, _OFFER = "emitted", "sent", "offer"


class AlternatesGeneralReverse(AlternatesGeneral):
    """Values and two directions forwards, cotangents back."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        # What each step began with and was given; and the parts of its map, those of the start before them.
        self.kept = Kept()
        self.parts: list[Parts] = []

    def _directions(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        together = torch.stack([unit, torch.zeros_like(unit)])
        return together, torch.ones((unit.shape[0], 1), dtype=torch.float64)

    def _remember_start(self, choice: Choice) -> None:
        self._keep_parts(self._chosen(choice))

    def _remember(self, change: Change) -> None:
        self.kept.add(change.before, change.sums)
        parts = self._chosen(change.choice)
        parts |= {"old": self._by_cluster(change.old), "new": self._by_cluster(change.new), "stays": change.choice.old}
        for kind, calls in ((_EMITTED, change.emitted), (_SENT, change.sent)):
            parts |= {f"{kind}:{k}:{network.name}:{int(sums)}": more for k, (network, sums, more) in enumerate(calls)}
        self._keep_parts(parts)

    def _keep_parts(self, parts: Parts) -> None:
        self.parts.append({name: value.to_sparse() for name, value in parts.items()})

    def _chosen(self, choice: Choice) -> Parts:
        """Which alternatives go on into the next step, after `_keep`."""
        found = {f"{_OFFER}:{k}": factor for k, factor in enumerate(choice.offers)}
        found["differs"] = self.differs.to(torch.float64)
        return found

    def _by_cluster(self, values: Tensor) -> Tensor:
        """Sum [O, agents, lanes] by cluster → [O, clusters, lanes]."""
        zeros = torch.zeros((values.shape[0], self.clusters, values.shape[2]), dtype=torch.float64)
        return zeros.index_add(1, self.label, values)

    # ---- the way back

    def finish(self, words: NDArray[np.int64], cotangent: Any) -> dict[str, Any]:
        pulled = torch.tensor(cotangent(ring.decode(words)), dtype=torch.float64)
        batch, theta = pulled.shape[0], self.loop.theta
        after = {k: torch.zeros((batch, *v.shape), dtype=torch.float64) for k, v in split(self.carry)[0].items()}
        weight = torch.zeros((batch, self.clusters, self.loop.lanes), dtype=torch.float64)
        total = torch.zeros((batch, *theta.shape), dtype=torch.float64)
        for t in reversed(range(len(self.kept))):
            by_theta, after, weight = self._back(t, after, weight, pulled[:, t])
            total = total + by_theta
        parts = _dense(self.parts[0])
        pull, aside = _pulling(lambda theta: _aside(self._begin(theta)), theta)
        slopes = self._pull_offers(aside, parts, weight * parts["differs"])
        if after or slopes:
            total = total + vmap(pull)((after, slopes))[0]
        return {"gradient": total.numpy()}

    def _back(self, t: int, after: Arrays, weight: Tensor, pulled: Tensor) -> tuple[Tensor, Arrays, Tensor]:
        """Cotangents before a step from those after it, each with a leading axis [B, …].

        Args:
            t: the step.
            after: of the floating part of the carry.
            weight: of the clusters' weights [B, clusters, lanes].
            pulled: of the outputs [B, O, lanes].

        Returns:
            What the parameters get in this step, and the others before it.
        """
        carry, sums = self.kept[t]
        floats, others = split(carry)
        parts, theta = _dense(self.parts[1 + t]), self.loop.theta
        sent, emitted = self._calls(parts, _SENT), self._calls(parts, _EMITTED)
        nothing = [torch.zeros_like(each) for each in _moved(sent, self.label, weight[0])]
        pull, aside = _pulling(
            lambda *along: _aside(self._values(t, others, *along), outputs=True), theta, floats, sums, nothing
        )
        chosen = weight * parts["differs"] + torch.einsum("bol,ocl->bcl", pulled, parts["new"])
        slopes = self._pull_offers(aside, parts, chosen)
        by_theta, before, by_sums, by_moved = vmap(pull)((after, pulled, slopes))
        earlier = parts["stays"] * chosen + torch.einsum("bol,ocl->bcl", pulled, parts["old"])
        earlier = earlier + self._pull_moved(sent, by_moved)
        if sums:
            returned = self.rounds.add_back(t, by_sums)
            nothing = [torch.zeros_like(each) for each in _moved(emitted, self.label, weight[0])]
            pull = vjp(partial(self._soft_sums, t, others), theta, floats, nothing)[1]
            more_theta, more_floats, by_moved = vmap(pull)(returned)
            by_theta = by_theta + more_theta
            before = {key: value + more_floats[key] for key, value in before.items()}
            earlier = earlier + self._pull_moved(emitted, by_moved)
        return by_theta, before, earlier

    def _calls(self, parts: Parts, kind: str) -> list[Besides]:
        """What alternatives sent besides, call by call."""
        found = []
        for name, more in parts.items():
            if name.startswith(f"{kind}:"):
                network, sums = name.split(":")[2:]
                found.append((self.loop.model.network(network), sums == "1", more))
        return found

    def _pull_moved(self, calls: Sequence[Besides], by_moved: list[Tensor]) -> Tensor:
        """Cotangents of the weights from those of what alternatives sent besides [B, clusters, lanes]."""
        zeros = torch.zeros((self.clusters, self.loop.lanes), dtype=torch.float64)
        if not calls:
            return zeros[None]
        pull = vjp(lambda weight: _moved(calls, self.label, weight), zeros)[1]
        found: Tensor = vmap(pull)(by_moved)[0]
        return found

    def _pull_offers(
        self, calls: tuple[list[Tensor], list[tuple[Tensor, Tensor]]], parts: Parts, chosen: Tensor
    ) -> list[Tensor]:
        """Cotangents of the decisions' cumulative chances, each [B, outcomes, agents, lanes].

        Args:
            calls: cumulative chances of each decision; who decided by which words.
            parts: factors of what was offered.
            chosen: cotangents of the weights of what is kept [B, clusters, lanes].
        """
        if not calls[0]:
            return []
        decisions = [
            Decision(occupied, cumulative, word)
            for cumulative, (occupied, word) in zip(calls[0], calls[1], strict=True)
        ]

        def offered(slopes: list[Tensor]) -> list[Tensor]:
            # The last direction is the reference, which has a part of its own: it is none of those asked for.
            return [
                weight[..., 0]
                for decision, slope in zip(decisions, slopes, strict=True)
                for _, weight in offers(decision, torch.stack([slope, torch.zeros_like(slope)]))
            ]

        pull = vjp(offered, [torch.zeros_like(each) for each in calls[0]])[1]
        factors = [parts[f"{_OFFER}:{k}"] for k in range(sum(name.startswith(f"{_OFFER}:") for name in parts))]
        mine = [chosen[:, self.label] * factor for factor in factors]
        found: list[Tensor] = vmap(pull)(mine)[0]
        return found

    # ---- checkpoints

    def snapshot(self) -> dict[str, NDArray[Any]]:
        found = self._followed() | self.kept.snapshot()
        for t, parts in enumerate(self.parts):
            for name, value in parts.items():
                value = value.coalesce()
                found[f"parts:{t}:index:{name}"] = value.indices().numpy()
                found[f"parts:{t}:value:{name}"] = value.values().numpy()
                found[f"parts:{t}:shape:{name}"] = np.array(value.shape)
        return found

    def restore(self, found: Mapping[str, Any]) -> None:
        self._follow_on(found)
        self.kept = Kept.restored(found)
        self.parts = [{} for _ in range(1 + len(self.kept))]
        for name, index in found.items():
            head, *rest = name.split(":", 3)
            if head == "parts" and rest[1] == "index":
                t, _, part = rest
                value, shape = (found[f"parts:{t}:{kind}:{part}"] for kind in ("value", "shape"))
                self.parts[int(t)][part] = torch.sparse_coo_tensor(
                    torch.from_numpy(index.copy()),
                    torch.from_numpy(value.copy()),
                    tuple(int(n) for n in shape),
                    check_invariants=True,
                )


def _pulling(function: Callable[..., Any], *primals: Any) -> tuple[Callable[..., Any], Any]:
    """How cotangents of what a function returns first are pulled back, and what it returns beside it."""
    found: Any = vjp(function, *primals, has_aux=True)
    return found[1], found[2]


def _aside(
    found: tuple[Arrays, Tensor, list[Tensor], list[tuple[Tensor, Tensor]]], outputs: bool = False
) -> tuple[tuple[Any, ...], tuple[list[Tensor], list[tuple[Tensor, Tensor]]]]:
    """What has derivatives, and beside it what a decision is, without them."""
    floats, values, chances, deciders = found
    differentiable = (floats, values, chances) if outputs else (floats, chances)
    return differentiable, ([each.detach() for each in chances], deciders)


def _moved(calls: Sequence[Besides], label: Tensor, weight: Tensor) -> list[Tensor]:
    """The derivative of what each call gives, by a weight of each cluster [clusters, lanes]."""
    return [network.add(weight[label] * more) if sums else weight[label] * more for network, sums, more in calls]


def _dense(parts: Parts) -> Parts:
    return {name: value.to_dense() for name, value in parts.items()}

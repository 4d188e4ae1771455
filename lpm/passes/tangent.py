"""The tangent of the conditional expectation (`lpm.relax`) through a run, forwards and backwards (paper, eq. 8, 11).

Forward mode pushes P tangents through the pure functions and sends the tangents of the sums in the *same* round.
Reverse mode keeps each step's inputs, pulls cotangents back through them, and needs one more round per step, in which
the cotangents of the sums are added up (the adjoint of a sum is a sum, then a broadcast).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vjp, vmap

from lpm import ring
from lpm.passes.kept import Kept
from lpm.passes.plain import Plain
from lpm.passes.steps import Arrays, Rounds, Steps, push, soft, split

__all__ = ["Forward", "Reverse"]


class Forward(Plain):
    """P tangents beside the values, in the same rounds."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        lanes, count = loop.theta.shape
        # Direction p moves parameter p of every lane.
        self.directions = torch.eye(count, dtype=torch.float64)[:, None, :].expand(count, lanes, count).contiguous()
        self.tangents: Arrays = {}
        self.recorded: list[Tensor] = []

    def start(self) -> None:
        super().start()
        self.tangents = push(lambda theta: split(self.loop.start(theta))[0], (self.loop.theta,), (self.directions,))

    def step(self, t: int) -> Arrays:
        floats, others = split(self.carry)
        theta = self.loop.theta
        summed = self.loop.emit(t, theta, self.carry)

        def soft_sums(theta: Tensor, floats: Arrays) -> Arrays:
            return {key: soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

        pushed = {}
        if summed:
            pushed = push(soft_sums, (theta, floats), (self.directions, self.tangents))
        sums, moved = self.open_along(t, summed, pushed)

        def values(theta: Tensor, floats: Arrays, sums: Arrays) -> tuple[Arrays, Tensor]:
            carry, records = self.loop.advance(t, theta, floats | others, sums)
            return split(carry)[0], self.loop.model.values(records)

        self.carry, records = self.loop.advance(t, theta, self.carry, sums)
        self.tangents, outputs = push(values, (theta, floats, sums), (self.directions, self.tangents, moved))
        self.recorded.append(outputs)
        self.rounds.see(self.loop.env(self.carry))
        return records

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return (
            super().snapshot()
            | {f"tangent:{key}": value.numpy() for key, value in self.tangents.items()}
            | {"recorded": torch.stack(self.recorded).numpy()}
        )

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.tangents = {key[8:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("tangent:")}
        self.recorded = list(torch.from_numpy(found["recorded"].copy()))

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        return {"tangents": torch.stack(self.recorded).permute(0, 2, 3, 1).numpy()}


@dataclass
class Reverse(Plain):
    """Keeps each step's inputs and pulls cotangents back through them."""

    loop: Steps
    rounds: Rounds
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        self.carry: Arrays = {}

    def step(self, t: int) -> Arrays:
        before = self.carry
        summed = self.loop.emit(t, self.loop.theta, before)
        sums, _ = self.open(t, summed, {})
        self.kept.add(before, sums)
        self.carry, records = self.loop.advance(t, self.loop.theta, before, sums)
        self.rounds.see(self.loop.env(self.carry))
        return records

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return super().snapshot() | self.kept.snapshot()

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.kept = Kept.restored(found)

    def finish(self, words: NDArray[np.int64], cotangent: Any) -> dict[str, Any]:
        pulled = torch.tensor(cotangent(ring.decode(words)), dtype=torch.float64)
        batch, theta = pulled.shape[0], self.loop.theta
        total = torch.zeros((batch, *theta.shape), dtype=torch.float64)
        floats, _ = split(self.carry)
        after = {key: torch.zeros((batch, *value.shape), dtype=torch.float64) for key, value in floats.items()}
        for t in reversed(range(len(self.kept))):
            carry, sums = self.kept[t]
            floats, others = split(carry)

            def values(
                theta: Tensor, floats: Arrays, sums: Arrays, t: int = t, others: Arrays = others
            ) -> tuple[Arrays, Tensor]:
                state, records = self.loop.advance(t, theta, floats | others, sums)
                return split(state)[0], self.loop.model.values(records)

            pull = vjp(values, theta, floats, sums)[1]
            by_theta, by_floats, by_sums = vmap(pull)((after, pulled[:, t]))
            total = total + by_theta
            if sums:
                returned = self.rounds.add_back(t, by_sums)

                def soft_sums(theta: Tensor, floats: Arrays, t: int = t, others: Arrays = others) -> Arrays:
                    return {key: soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

                pull = vjp(soft_sums, theta, floats)[1]
                more_theta, more_floats = vmap(pull)(returned)
                total = total + more_theta
                by_floats = {key: value + more_floats[key] for key, value in by_floats.items()}
            after = by_floats
        pull = vjp(lambda theta: split(self.loop.start(theta))[0], theta)[1]
        total = total + vmap(pull)(after)[0]
        return {"gradient": total.numpy()}

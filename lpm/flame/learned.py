"""Learned protocols: a neural network that sets quantities of the environment, such as mobility.

It runs on the replicated environment, never on a batch shaped by the shard, so every party computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from lpm.flame.protocol import Change, Protocol, Step
from lpm.parameters import Expression, Parameter, expression

__all__ = ["Learned"]


@dataclass(eq=False)
class Learned(Protocol):
    """A torch module from expressions of the environment to drivers.

    Args:
        module: maps [inputs] to [outputs], in float64.
        inputs: expressions of drivers and parameters, the module's inputs.
        outputs: names of the drivers that it sets.
        trainable: makes every weight a parameter `name_0`, `name_1`, … with prior normal(its present value, 1).
        name: of the protocol.
    """

    module: torch.nn.Module
    inputs: Sequence[Expression | float]
    outputs: Sequence[str]
    trainable: bool = False
    name: str = "learned"

    def __post_init__(self) -> None:
        self.module = self.module.to(torch.float64).requires_grad_(False)
        self._inputs = [expression(value) for value in self.inputs]
        flat = torch.cat([weight.reshape(-1) for weight in self.module.parameters()]).tolist() if self.trainable else []
        self.weights = [Parameter(f"{self.name}_{k}", prior=f"normal({value!r}, 1)") for k, value in enumerate(flat)]

    def expressions(self) -> Iterable[Expression]:
        yield from self._inputs
        yield from self.weights

    def by_executor(self) -> bool:
        return True

    def observe(self, step: Step) -> Tensor:
        return torch.stack([step.value(value).expand(step.lanes) for value in self._inputs], dim=-1)

    def policy(self, step: Step, observation: Tensor) -> Tensor:
        if not self.weights:
            return torch.stack([self.module(row) for row in observation.unbind(0)])
        flat = torch.stack([step.values[weight.name] for weight in self.weights], dim=-1)

        def one(row: Tensor, weights: Tensor) -> Tensor:
            shaped, used = {}, 0
            for name, weight in self.module.named_parameters():
                shaped[name] = weights[used : used + weight.numel()].reshape(weight.shape)
                used += weight.numel()
            result: Tensor = functional_call(self.module, shaped, (row,))
            return result

        return vmap(one)(observation, flat)

    def transition(self, step: Step, action: Any) -> Change:
        return Change(env={name: action[:, k] for k, name in enumerate(self.outputs)})

"""Continuous-time dynamics inside each agent: an ordinary differential equation, integrated a day at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from lpm.errors import InputError
from lpm.flame.contagion import Contagion
from lpm.flame.protocol import Change, Protocol, Step
from lpm.parameters import Expression, expression

if TYPE_CHECKING:
    from lpm.flame.model import Model

__all__ = ["Dynamics"]


@dataclass(eq=False)
class Dynamics(Protocol):
    """An element-wise ODE per agent, such as a within-host viral load.

    Args:
        variables: name → value at the start.
        rate: (variables, inputs) → name → time derivative (1/day). All are [agents, lanes]; with + − × ÷ alone the
            result has the same bits in every shard.
        occupancy: input name → (contagion, stages): 1 where the agent is in one of those stages.
        constants: input name → expression of parameters and drivers.
        substeps: steps of torchdiffeq's fourth-order Runge–Kutta (3/8 rule) in a day.
        name: in the state; an array is `name.variable`.
    """

    variables: Mapping[str, float]
    rate: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]
    occupancy: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    constants: Mapping[str, Expression | float] = field(default_factory=dict)
    substeps: int = 4
    name: str = "dynamics"

    def __post_init__(self) -> None:
        if self.substeps < 1:
            raise InputError(f"substeps of {self.name} is {self.substeps}: a whole number from 1.")
        self._constants = {key: expression(value) for key, value in self.constants.items()}

    def expressions(self) -> Iterable[Expression]:
        return self._constants.values()

    def prepare(self, model: Model) -> None:
        for protocol, stages in self.occupancy.values():
            for stage in stages.split():
                contagion = model.protocol(protocol)
                if not isinstance(contagion, Contagion):
                    raise InputError(f"{protocol}, whose stages {self.name} reads, is not a contagion.")
                contagion.stage(stage)

    def start(self, step: Step) -> Change:
        shape = (step.model.population.agents, step.lanes)
        return Change(
            state={key: torch.full(shape, float(value), dtype=torch.float64) for key, value in self.variables.items()}
        )

    def observe(self, step: Step) -> dict[str, Tensor]:
        seen = {}
        for key, (protocol, stages) in self.occupancy.items():
            contagion = step.model.protocol(protocol)
            assert isinstance(contagion, Contagion)
            seen[key] = contagion.occupancy(step, stages)
        return seen

    def transition(self, step: Step, action: Any) -> Change:
        inputs = {**action, **{key: step.value(value) for key, value in self._constants.items()}}
        names = list(self.variables)
        arrays = step.arrays(self.name)

        def derivative(_: Tensor, values: Tensor) -> Tensor:
            rates = self.rate(dict(zip(names, values, strict=True)), inputs)
            return torch.stack([rates[name].expand(values.shape[1:]) for name in names])

        day = torch.tensor([0.0, 1.0], dtype=torch.float64)
        path = odeint(
            derivative,
            torch.stack([arrays[name] for name in names]),
            day,
            method="rk4",
            options={"step_size": 1.0 / self.substeps},
        )
        return Change(state=dict(zip(names, path[-1], strict=True)))

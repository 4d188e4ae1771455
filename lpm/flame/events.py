"""Discrete events and measured series: a lockdown on a date or on a threshold, mobility as it was.

An event's moment is a decision of the environment: it is the same at every party. Its effect is differentiable; its
moment, as a function of a threshold, is not (a finite difference sees a jump of the moment, the tangent does not).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.flame.protocol import Change, Protocol, Step
from lpm.parameters import Driver, Expression, expression

if TYPE_CHECKING:
    from lpm.flame.model import Model

__all__ = [
    "Above",
    "Event",
    "OnDate",
    "OnDay",
    "Scale",
    "Series",
    "SetDriver",
    "above",
    "on_date",
    "on_day",
    "scale",
    "set_driver",
]


@dataclass(frozen=True)
class OnDay:
    """From a step on."""

    day: int


@dataclass(frozen=True)
class OnDate:
    """From a date on; the model's `start` says which step that is, unless it is given here."""

    date: dt.date
    start: dt.date | None = None


@dataclass(frozen=True, eq=False)
class Above:
    """Once an expression of the environment exceeds a value."""

    what: Expression
    value: Expression


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply a network's hazards."""

    network: str
    by: Expression


@dataclass(frozen=True, eq=False)
class SetDriver:
    """Set a driver."""

    name: str
    value: Expression


def on_day(day: int) -> OnDay:
    """From step `day` on."""
    return OnDay(day)


def _date(value: str | dt.date) -> dt.date:
    if isinstance(value, dt.date):
        return value
    try:
        return dt.date.fromisoformat(value)
    except ValueError:
        raise InputError(f"The date {value!r} can't be read: as in 2020-03-22.") from None


def on_date(date: str | dt.date, start: str | dt.date | None = None) -> OnDate:
    """From a date on."""
    return OnDate(_date(date), None if start is None else _date(start))


def above(what: Expression | str, value: Expression | float) -> Above:
    """Once `what` (a driver by name, such as `contagion/city`: infectivity per person) exceeds `value`."""
    return Above(Driver(what) if isinstance(what, str) else what, expression(value))


def scale(network: str, by: Expression | float) -> Scale:
    """Multiply the hazards of a network."""
    return Scale(network, expression(by))


def set_driver(name: str, value: Expression | float) -> SetDriver:
    """Set a driver."""
    return SetDriver(name, expression(value))


@dataclass(eq=False)
class Event(Protocol):
    """Something that happens once and lasts.

    Args:
        when: `on_day`, `on_date` or `above`.
        effect: `scale` or `set_driver`.
        lasts: steps until it ends; for good by default.
        name: of the protocol; `name.since` in e counts the steps since it began, −1 before.
    """

    when: OnDay | OnDate | Above
    effect: Scale | SetDriver
    lasts: int | None = None
    name: str = "event"

    def by_executor(self) -> bool:
        return True

    def expressions(self) -> Iterable[Expression]:
        if isinstance(self.when, Above):
            yield from (self.when.what, self.when.value)
        yield self.effect.by if isinstance(self.effect, Scale) else self.effect.value

    def prepare(self, model: Model) -> None:
        if isinstance(self.effect, Scale):
            model.network(self.effect.network)
        if isinstance(self.when, OnDate):
            start = self.when.start or model.start
            if start is None:
                raise InputError(
                    f"The event {self.name} has a date, but the model has no start.", "Give Model(start=…)."
                )
            self._day = (self.when.date - start).days
        elif isinstance(self.when, OnDay):
            self._day = self.when.day

    def start(self, step: Step) -> Change:
        return Change(env={f"{self.name}.since": torch.full((step.lanes,), -1.0, dtype=torch.float64)})

    def observe(self, step: Step) -> Tensor:
        if isinstance(self.when, Above):
            return (step.value(self.when.what) > step.value(self.when.value)).expand(step.lanes)
        return torch.full((step.lanes,), step.t >= self._day)

    def policy(self, step: Step, observation: Tensor) -> Tensor:
        since = step.env[f"{self.name}.since"]
        return torch.where(since >= 0, since + 1.0, torch.where(observation, 0.0, -1.0))

    def transition(self, step: Step, action: Any) -> Change:
        active = (action >= 0) & (action < (self.lasts if self.lasts is not None else float("inf")))
        if isinstance(self.effect, Scale):
            key = f"scale/{self.effect.network}"
            now, then = step.env.get(key, torch.ones((), dtype=torch.float64)), step.value(self.effect.by)
            then = now * then
        else:
            key = self.effect.name
            now, then = step.driver(key), step.value(self.effect.value)
        return Change(env={key: torch.where(active, then, now), f"{self.name}.since": action})


@dataclass(eq=False)
class Series(Protocol):
    """Drivers as they were measured.

    Args:
        values: driver → one finite number per step [steps].
        name: of the protocol.
    """

    values: Mapping[str, ArrayLike]
    name: str = "series"

    def by_executor(self) -> bool:
        return True

    def __post_init__(self) -> None:
        self._values: dict[str, NDArray[np.float64]] = {}
        for key, values in self.values.items():
            array = np.asarray(values, dtype=np.float64)
            if array.ndim != 1 or not np.all(np.isfinite(array)):
                missing = np.argwhere(~np.isfinite(array))
                where = f" (step {missing[0][0]} is not)" if array.ndim == 1 else ""
                raise InputError(f"The series {key} of {self.name} is one finite number per step{where}.")
            self._values[key] = array

    def require_steps(self, steps: int) -> None:
        for key, values in self._values.items():
            if steps > values.size:
                raise InputError(
                    f"The series {key} has {values.size} steps, {steps} are asked for.",
                    "Give a longer series or a smaller --steps.",
                )

    def transition(self, step: Step, action: Any) -> Change:
        return Change(
            env={key: torch.tensor(values[step.t], dtype=torch.float64) for key, values in self._values.items()}
        )

"""Parameters and the expressions made of them: what a model may vary, with its prior, bounds and unit.

An expression is evaluated for many parameter vectors (draws, and the perturbed copies of finite differences) at once,
in float64 and with + − × ÷ alone, so that its bits do not depend on who evaluates it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lpm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILIES", "Constant", "Driver", "Expression", "Parameter", "driver", "expression", "parse_prior"]

FAMILIES: Mapping[str, int] = {
    "normal": 2,
    "lognormal": 2,
    "uniform": 2,
    "beta": 2,
    "gamma": 2,
    "halfnormal": 1,
    "exponential": 1,
}
"""Prior families and how many arguments each takes."""

_ENDS = {"normal": (-math.inf, math.inf), "uniform": (-math.inf, math.inf), "beta": (0.0, 1.0)}
"""What a quantity with such a prior can be; from 0 with any other. A counterfactual may go past what a uniform prior
thought likely."""


def parse_prior(text: str, name: str = "a parameter") -> tuple[str, tuple[float, ...]]:
    """Read a prior such as `lognormal(-2, 0.5)`.

    Raises:
        InputError: naming the family and the number of arguments that would be accepted.
    """
    match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
    family = match.group(1) if match else ""
    if not match or family not in FAMILIES:
        raise InputError(f"The prior of {name} is {text!r}: one of {', '.join(FAMILIES)}, as in lognormal(-2, 0.5).")
    try:
        arguments = tuple(float(part) for part in match.group(2).split(","))
    except ValueError:
        raise InputError(f"The prior of {name} is {text!r}: its arguments are numbers.") from None
    if len(arguments) != FAMILIES[family] or not all(map(math.isfinite, arguments)):
        raise InputError(f"The prior of {name} is {text!r}: {family} takes {FAMILIES[family]} finite number(s).")
    positive = {
        "normal": (1,),
        "lognormal": (1,),
        "beta": (0, 1),
        "gamma": (0, 1),
        "halfnormal": (0,),
        "exponential": (0,),
    }
    if any(arguments[i] <= 0 for i in positive.get(family, ())) or (
        family == "uniform" and arguments[0] >= arguments[1]
    ):
        raise InputError(f"The prior of {name} is {text!r}: its scale is positive, its interval not empty.")
    return family, arguments


class Expression:
    """A number that depends on parameters and drivers, built with + − × ÷ and `abs`-free arithmetic."""

    def evaluate(self, values: Mapping[str, Tensor], drivers: Callable[[str], Tensor]) -> Tensor:
        """The value for each lane.

        Args:
            values: parameter name → [lanes] float64.
            drivers: driver name → [lanes] or scalar float64 at the current step.
        """
        raise TypeError(f"{type(self).__name__} is an interface.")

    def leaves(self) -> Iterator[Parameter | Driver]:
        """The parameters and drivers it is made of, in order of appearance."""
        raise TypeError(f"{type(self).__name__} is an interface.")

    def __add__(self, other: Expression | float) -> Expression:
        return _Operation("+", self, expression(other))

    def __radd__(self, other: float) -> Expression:
        return _Operation("+", expression(other), self)

    def __sub__(self, other: Expression | float) -> Expression:
        return _Operation("-", self, expression(other))

    def __rsub__(self, other: float) -> Expression:
        return _Operation("-", expression(other), self)

    def __mul__(self, other: Expression | float) -> Expression:
        return _Operation("*", self, expression(other))

    def __rmul__(self, other: float) -> Expression:
        return _Operation("*", expression(other), self)

    def __truediv__(self, other: Expression | float) -> Expression:
        return _Operation("/", self, expression(other))

    def __rtruediv__(self, other: float) -> Expression:
        return _Operation("/", expression(other), self)


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A fixed number."""

    value: float

    @cached_property
    def _tensor(self) -> Tensor:
        import torch  # not for a process that only reads a scenario

        return torch.tensor(self.value, dtype=torch.float64)

    def evaluate(self, values: Mapping[str, Tensor], drivers: Callable[[str], Tensor]) -> Tensor:
        return self._tensor

    def leaves(self) -> Iterator[Parameter | Driver]:
        return iter(())


@dataclass(frozen=True, eq=False)
class _Operation(Expression):
    symbol: str
    left: Expression
    right: Expression

    def evaluate(self, values: Mapping[str, Tensor], drivers: Callable[[str], Tensor]) -> Tensor:
        a, b = self.left.evaluate(values, drivers), self.right.evaluate(values, drivers)
        if self.symbol == "+":
            return a + b
        if self.symbol == "-":
            return a - b
        return a * b if self.symbol == "*" else a / b

    def leaves(self) -> Iterator[Parameter | Driver]:
        yield from self.left.leaves()
        yield from self.right.leaves()


@dataclass(frozen=True)
class Driver(Expression):
    """A public quantity of the environment, by name: a measured series, or what a protocol sets each step."""

    name: str

    def evaluate(self, values: Mapping[str, Tensor], drivers: Callable[[str], Tensor]) -> Tensor:
        return drivers(self.name)

    def leaves(self) -> Iterator[Parameter | Driver]:
        yield self


@dataclass(frozen=True)
class Parameter(Expression):
    """A named scalar that can be set, differentiated and calibrated.

    Args:
        name: as in `scenario.toml` and in results.
        prior: text such as `lognormal(-2, 0.5)`; see `FAMILIES` (scipy's meaning; lognormal of the logarithm's mean
            and sd, gamma of shape and rate).
        bounds: values outside are refused, and the prior is truncated to them.
        unit: for tables and axes.
        label: a few words for tables and axes.

    Raises:
        InputError: if the prior or the bounds can't be read.
    """

    name: str
    prior: str = "normal(0, 1)"
    bounds: tuple[float, float] | None = None
    unit: str = ""
    label: str = ""
    family: str = field(init=False, compare=False, repr=False)
    arguments: tuple[float, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name):
            raise InputError(f"The parameter name {self.name!r} is not an identifier.")
        family, arguments = parse_prior(self.prior, self.name)
        object.__setattr__(self, "family", family)
        object.__setattr__(self, "arguments", arguments)
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise InputError(f"The bounds of {self.name} are {self.bounds}: a lower below an upper number.")

    def require(self, value: float) -> None:
        """Refuse a value outside the bounds, or of a sign or a share that the prior's family excludes, naming both."""
        if not math.isfinite(value):
            raise InputError(f"The parameter {self.name} is {value}: a finite number.")
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            raise InputError(f"The parameter {self.name} is {value:g}: from {self.bounds[0]:g} to {self.bounds[1]:g}.")
        low, high = _ENDS.get(self.family, (0.0, math.inf))
        if not low <= value <= high:
            top = f" to {high:g}" if high < math.inf else ""
            raise InputError(
                f"The parameter {self.name} is {value:g}: from {low:g}{top}, as its prior {self.prior} has it."
            )

    def evaluate(self, values: Mapping[str, Tensor], drivers: Callable[[str], Tensor]) -> Tensor:
        return values[self.name]

    def leaves(self) -> Iterator[Parameter | Driver]:
        yield self


def driver(name: str) -> Driver:
    """A public series or environment quantity, by name."""
    return Driver(name)


def expression(value: Expression | float | int) -> Expression:
    """A number or an expression, as an expression."""
    try:
        return value if isinstance(value, Expression) else Constant(float(value))
    except (TypeError, ValueError):
        raise InputError(f"{value!r} is given where a number or an expression of parameters belongs.") from None

"""A private random effect of an institution: how much more or less it sees than the common model explains.

Institutions differ in ways no common parameter holds (who left town, who is poor, who comes from elsewhere). A factor
e^z on all its series, z normal around 0, is integrated out where the series are: the institution's likelihood is the
marginal one, and the factor itself is never told to anybody.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.observation import CountSeries, Observation

__all__ = ["InstitutionEffect"]

_REACH = 4.0
"""Standard deviations of z that are integrated over, on each side."""

_SPACING = 0.03
"""Between nodes of z: a season fixes it to about as much, and the trapezoidal rule is then exact to 1e-4."""


@dataclass(frozen=True, eq=False)
class InstitutionEffect:
    """An observation with a factor of its own on all that it expects. It serves wherever an `Observation` does.

    Args:
        observation: without the factor.
        sd: standard deviation of the factor's logarithm among institutions.
        learn: days of the series that forecasts may learn the factor from.

    Raises:
        InputError: for an sd that is not above 0, or days beyond the series.

    Guarantee: days from `learn` on never change the factor, so a forecast of them is one.
    """

    observation: Observation
    sd: float
    learn: int
    _nodes: Tensor = field(init=False, repr=False)
    _log_prior: Tensor = field(init=False, repr=False)
    _last: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor], int, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.sd < 3:
            raise InputError(f"The sd of an institution's effect is {self.sd}: a number above 0, below 3.")
        if not 0 <= self.learn <= self.observation.steps:
            raise InputError(f"learn is {self.learn}: a number of days from 0 to {self.observation.steps}.")
        half = max(round(_REACH * self.sd / _SPACING), 8)
        z = torch.linspace(-_REACH * self.sd, _REACH * self.sd, 2 * half + 1, dtype=torch.float64)
        object.__setattr__(self, "_nodes", z)
        object.__setattr__(self, "_last", [])
        object.__setattr__(self, "_log_prior", torch.log_softmax(-0.5 * (z / self.sd) ** 2, dim=0))

    @property
    def institution(self) -> str:
        """Whose observation it is."""
        return self.observation.institution

    @property
    def start(self) -> dt.date:
        """The first simulated day."""
        return self.observation.start

    @property
    def series(self) -> tuple[CountSeries, ...]:
        """The series, without the factor."""
        return tuple(self.observation.series)

    def _by_node(self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], window: slice) -> Tensor:
        """Log-likelihood of a window given each node's factor [nodes, K]."""
        draws = next(iter(theta.values())).shape[0]
        count = self._nodes.numel()
        factor = torch.exp(self._nodes).repeat_interleave(draws)
        used = {each.output for each in self.observation.series}
        scaled = {
            name: value.to(torch.float64).repeat(count, 1) * factor[:, None]
            for name, value in outputs.items()
            if name in used
        }
        repeated = {name: value.repeat(count) for name, value in theta.items()}
        return self.observation.log_likelihood(scaled, repeated, window).reshape(count, draws)

    def _known(self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], days: int) -> Tensor:
        """Log-probability of each node after the first days [nodes, K]."""
        prior = self._log_prior[:, None]
        if days == 0:
            return prior
        # A forecast asks day by day, with the same outputs: what the fitted days tell is worked out once.
        for seen, at, learned, found in self._last:
            if seen is outputs and at is theta and learned == days:
                return found
        found = torch.log_softmax(prior + self._by_node(outputs, theta, slice(0, days)), dim=0)
        self._last[:] = [] if found.requires_grad else [(outputs, theta, days, found)]
        return found

    def log_likelihood(
        self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], window: slice = slice(None)
    ) -> Tensor:
        """The log-likelihood of a window, the factor integrated out given the days before it (as far as `learn`).

        Args:
            outputs: output → [K, T] simulated counts a day.
            theta: parameter → [K].
            window: the days that count.

        Returns:
            [K].
        """
        first = window.indices(self.observation.steps)[0]
        known = self._known(outputs, theta, min(first, self.learn))
        return torch.logsumexp(known + self._by_node(outputs, theta, window), dim=0)

    def predict(
        self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, NDArray[np.float64]]:
        """Predictive draws: series → [K, T], each with a factor drawn from what the first `learn` days tell of it."""
        with torch.no_grad():
            chance = torch.exp(self._known(outputs, theta, self.learn)).T
            draws = next(iter(theta.values())).shape[0]
            node = torch.multinomial(chance.expand(draws, -1), 1, generator=generator)[:, 0]
            factor = torch.exp(self._nodes[node])[:, None]
            scaled = {name: value.to(torch.float64) * factor for name, value in outputs.items()}
            return self.observation.predict(scaled, theta, generator)

    def persistence_log_score(self, window: slice) -> float:
        """The log score of the baseline that carries each series' last week before the window forward."""
        return self.observation.persistence_log_score(window)

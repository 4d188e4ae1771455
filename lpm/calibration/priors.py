"""Priors, and the map between parameters and the standard-normal space in which the posterior lives (paper, 5.1).

Every parameter is the (truncated) quantile function of its prior applied to Φ(u) with u ~ N(0, 1). So the prior is
N(0, I) in u for any family and bounds, the flow works on numbers of size one, and bounds can't be left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lpm.errors import InputError
from lpm.parameters import Parameter

__all__ = ["Prior"]

_FAR = 8.0
"""Standard deviations beyond which u is held: Φ(−8) is 6e-16, so no prior mass is lost in double precision."""

_SCIPY: dict[str, Callable[..., Any]] = {
    "normal": lambda mean, sd: stats.norm(mean, sd),
    "lognormal": lambda mu, sigma: stats.lognorm(s=sigma, scale=math.exp(mu)),
    "uniform": lambda low, high: stats.uniform(low, high - low),
    "beta": lambda a, b: stats.beta(a, b),
    "gamma": lambda shape, rate: stats.gamma(shape, scale=1.0 / rate),
    "halfnormal": lambda scale: stats.halfnorm(scale=scale),
    "exponential": lambda rate: stats.expon(scale=1.0 / rate),
}

Array = NDArray[np.float64]


class _Marginal:
    """The prior of one parameter, truncated to its bounds."""

    def __init__(self, parameter: Parameter) -> None:
        self.distribution = _SCIPY[parameter.family](*parameter.arguments)
        low, high = (float(end) for end in self.distribution.support())
        if parameter.bounds is not None:
            low, high = max(low, parameter.bounds[0]), min(high, parameter.bounds[1])
        self.low, self.high = low, high
        # Both tails are kept, so that quantiles far out on either side lose no digits.
        below, above = (self._cdf(low), self._cdf(high)), (self._sf(low), self._sf(high))
        # A truncation far out in the upper tail has its mass as a difference of survival, not of cumulative values.
        self.mass = max(below[1] - below[0], above[0] - above[1])
        if not low < high or not self.mass > 0.0:
            raise InputError(
                f"The prior of {parameter.name}, {parameter.prior}, has no mass inside the bounds {parameter.bounds}.",
                "Widen the bounds or move the prior.",
            )
        self.below, self.above = below, above

    def _cdf(self, value: float) -> float:
        return float(self.distribution.cdf(value))

    def _sf(self, value: float) -> float:
        return float(self.distribution.sf(value))

    def quantile(self, u: Array) -> Array:
        u = np.clip(u, -_FAR, _FAR)
        lower = self.below[0] + stats.norm.cdf(u) * self.mass
        upper = self.above[1] + stats.norm.cdf(-u) * self.mass
        value = np.where(
            lower < 0.5, self.distribution.ppf(np.minimum(lower, 1.0)), self.distribution.isf(np.minimum(upper, 1.0))
        )
        return np.asarray(np.clip(value, self.low, self.high))

    def slope(self, u: Array, theta: Array) -> Array:
        u = np.clip(u, -_FAR, _FAR)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slope = np.exp(stats.norm.logpdf(u) + math.log(self.mass) - self.distribution.logpdf(theta))
        # An end of the support where the density is 0 or infinite is approached ever more slowly in u.
        return np.where(np.isfinite(slope), slope, 0.0)

    def standard(self, theta: Array) -> Array:
        lower = (self.distribution.cdf(theta) - self.below[0]) / self.mass
        upper = (self.distribution.sf(theta) - self.above[1]) / self.mass
        u = np.where(lower < 0.5, stats.norm.ppf(np.clip(lower, 0.0, 1.0)), stats.norm.isf(np.clip(upper, 0.0, 1.0)))
        return np.asarray(np.clip(u, -_FAR, _FAR))

    def log_prob(self, theta: Array) -> Array:
        inside = (theta >= self.low) & (theta <= self.high)
        with np.errstate(divide="ignore"):
            return np.where(inside, self.distribution.logpdf(theta) - math.log(self.mass), -np.inf)


class _Quantile(torch.autograd.Function):
    """θ(u) with its derivative φ(u)·(F(b) − F(a)) / f(θ)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, marginals: tuple[_Marginal, ...]) -> Tensor:
        columns = u.detach().to(torch.float64).reshape(-1, len(marginals)).numpy()
        theta = np.stack([m.quantile(columns[:, p]) for p, m in enumerate(marginals)], axis=-1)
        slope = np.stack([m.slope(columns[:, p], theta[:, p]) for p, m in enumerate(marginals)], axis=-1)
        ctx.save_for_backward(torch.from_numpy(slope).reshape(u.shape))
        return torch.from_numpy(theta).reshape(u.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


class Prior:
    """Independent priors of P parameters, each truncated to its bounds.

    Args:
        parameters: at least one, with different names.

    Raises:
        InputError: for two parameters of one name, or a prior without mass inside its bounds.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.names = tuple(parameter.name for parameter in self.parameters)
        if not self.names:
            raise InputError("There is no parameter to calibrate: name at least one with a prior.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise InputError(f"The parameter {twice[0]} is given twice: each name once.")
        self._marginals = tuple(_Marginal(parameter) for parameter in self.parameters)

    @classmethod
    def from_parameters(cls, parameters: Sequence[Parameter]) -> Prior:
        """The prior that these parameters declare."""
        return cls(parameters)

    def __len__(self) -> int:
        return len(self.names)

    def to_parameter(self, u: Tensor) -> Tensor:
        """Parameters from standard-normal numbers, differentiable once.

        Args:
            u: [..., P]; held at ±8.

        Returns:
            θ [..., P] float64, inside the bounds.
        """
        self._require_width(u)
        theta: Tensor = _Quantile.apply(u, self._marginals)  # type: ignore[no-untyped-call]
        return theta

    def to_standard(self, theta: Tensor) -> Tensor:
        """The standard-normal numbers of parameters [..., P]; the inverse of `to_parameter`, not differentiable."""
        return self._by_column(theta, lambda marginal, column: marginal.standard(column))

    def slope(self, u: Tensor) -> Tensor:
        """dθ/du of each parameter at u [..., P]."""
        theta = self.to_parameter(u.detach()).reshape(-1, len(self)).numpy()
        columns = u.detach().to(torch.float64).reshape(-1, len(self)).numpy()
        slope = [m.slope(columns[:, p], theta[:, p]) for p, m in enumerate(self._marginals)]
        return torch.from_numpy(np.stack(slope, axis=-1)).reshape(u.shape)

    def log_prob(self, theta: Tensor) -> Tensor:
        """The log density [...] of parameters [..., P]: −∞ outside the bounds, not differentiable."""
        return self._by_column(theta, lambda marginal, column: marginal.log_prob(column)).sum(dim=-1)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Draws [K, P] of the prior."""
        return self.to_parameter(torch.randn(draws, len(self), generator=generator, dtype=torch.float64))

    def _by_column(self, theta: Tensor, function: Callable[[_Marginal, Array], Array]) -> Tensor:
        self._require_width(theta)
        columns = theta.detach().to(torch.float64).reshape(-1, len(self)).numpy()
        values = [function(m, columns[:, p]) for p, m in enumerate(self._marginals)]
        return torch.from_numpy(np.stack(values, axis=-1)).reshape(theta.shape)

    def _require_width(self, values: Tensor) -> None:
        if values.shape[-1] != len(self):
            raise InputError(f"{values.shape[-1]} numbers for the {len(self)} parameters {', '.join(self.names)}.")

"""What a series says about a simulation: log-likelihoods of counts given a simulated mean (the loss of paper 5.1).

All take torch tensors, are differentiable in the simulated mean and the dispersion, sum over time and pass over
missing (NaN) days. With squared error alone the width of a posterior is set by its weight and not by the data, so a
proper likelihood is the rule: negative binomial for counts, synthetic where the simulator's own noise is what matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpm.errors import InputError

__all__ = [
    "SyntheticLikelihood",
    "estimate_synthetic",
    "interval_censored",
    "negative_binomial",
    "poisson",
    "squared_error",
    "synthetic",
]

_SMALLEST_MEAN = 1e-12
_SMALLEST_DISPERSION = 1e-6
"""Below it, differences of log-gammas lose their digits; a Poisson with a millionth is a Poisson."""


def negative_binomial(y: Tensor, mean: Tensor, dispersion: Tensor | float) -> Tensor:
    """Log-likelihood of counts with variance = mean + dispersion · mean².

    Args:
        y: [T] counts, NaN where missing.
        mean: [..., T] expected counts.
        dispersion: number or [...], above 0; held from 1e-6.

    Returns:
        [...] sums over the days that are not missing.
    """
    seen, y = _observed(y, mean)
    spread = torch.as_tensor(dispersion, dtype=mean.dtype)
    return _total(_negative_binomial_terms(y, mean, spread[..., None] if spread.ndim else spread), seen)


def _negative_binomial_terms(y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    mean, spread = mean.clamp_min(_SMALLEST_MEAN), spread.clamp_min(_SMALLEST_DISPERSION)
    size = 1.0 / spread
    combinations = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1.0)
    return combinations - (size + y) * torch.log1p(mean * spread) + y * torch.log(mean * spread)


def poisson(y: Tensor, mean: Tensor) -> Tensor:
    """Log-likelihood [...] of counts y [T] (NaN where missing) with expected counts [..., T]."""
    seen, y = _observed(y, mean)
    return _total(_poisson_terms(y, mean), seen)


def _poisson_terms(y: Tensor, mean: Tensor) -> Tensor:
    mean = mean.clamp_min(_SMALLEST_MEAN)
    return y * torch.log(mean) - mean - torch.lgamma(y + 1.0)


def interval_censored(lower: Tensor, upper: Tensor, mean: Tensor, dispersion: Tensor | float | None = None) -> Tensor:
    """Log-probability of counts of which only an interval is told, such as a suppressed cell's "fewer than five".

    The probabilities of all counts of the interval are added up, so that value and derivatives are exact.

    Args:
        lower: [T] smallest count that is possible, NaN where there is no interval.
        upper: [T] largest count that is possible, NaN at the same days.
        mean: [..., T] expected counts.
        dispersion: of the negative binomial, number or [...]; None for a Poisson.

    Returns:
        [...] sums over the days that have an interval.

    Raises:
        InputError: for an interval that ends before it begins.
    """
    seen, first = _observed(lower, mean)
    last = torch.where(seen, upper, torch.zeros_like(first))
    if bool((~(last >= first)).any()):
        raise InputError("An interval of a censored count ends before it begins.")
    counts = first[..., None] + torch.arange(int((last - first).max()) + 1, dtype=first.dtype)
    if dispersion is None:
        terms = _poisson_terms(counts, mean[..., None])
    else:
        spread = torch.as_tensor(dispersion, dtype=mean.dtype)
        terms = _negative_binomial_terms(counts, mean[..., None], spread[..., None, None] if spread.ndim else spread)
    beyond = counts > last[..., None]
    return _total(torch.logsumexp(torch.where(beyond, -torch.inf, terms), dim=-1), seen)


def squared_error(y: Tensor, mean: Tensor, sd: float = 1.0) -> Tensor:
    """−½ Σ ((y − mean)/sd)² [...]: a Gaussian log-likelihood without its constant; `sd` sets the posterior's width."""
    seen, y = _observed(y, mean)
    return _total(-0.5 * ((y - mean) / sd).square(), seen)


@dataclass(frozen=True)
class SyntheticLikelihood:
    """A Gaussian likelihood on a transformed scale, with the covariance of the simulator's own noise.

    Args:
        scale: `sqrt` (of y + ⅜) or `log` (of y + 1).
        covariance: [T, T] on that scale, positive definite.
        shrinkage: how far correlations were drawn to 0, from 0 to 1.
    """

    scale: str
    covariance: NDArray[np.float64]
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if self.scale not in ("sqrt", "log"):
            raise InputError(f"The scale of a synthetic likelihood is {self.scale!r}: sqrt or log.")
        self.covariance.setflags(write=False)

    def transform(self, values: Tensor) -> Tensor:
        """Counts on the likelihood's scale."""
        values = values.clamp_min(0.0)
        return torch.sqrt(values + 0.375) if self.scale == "sqrt" else torch.log1p(values)

    def untransform(self, values: Tensor) -> Tensor:
        """Counts back from the likelihood's scale, not below 0."""
        back = values.clamp_min(0.0).square() - 0.375 if self.scale == "sqrt" else torch.expm1(values)
        return back.clamp_min(0.0)

    def __call__(self, y: Tensor, mean: Tensor, window: slice = slice(None)) -> Tensor:
        """Log-likelihood [...] of y [T'] given simulated series [..., T']: the T' days of the window."""
        return self.paired(y, mean, mean, window)

    def paired(self, y: Tensor, first: Tensor, second: Tensor, window: slice = slice(None)) -> Tensor:
        """Log-likelihood [...] of y [T'] given two independent simulations [..., T'] of the same parameters.

        A single noisy simulation x makes −½(y − x)ᵀΣ⁻¹(y − x) too small by its own noise, which depends on the
        parameters and so moves the optimum. With one factor from each simulation the noise averages out: value and
        gradient are unbiased for the mean of simulations on the likelihood's scale.
        """
        covariance = torch.from_numpy(self.covariance.copy())[window, window]
        if covariance.shape[0] != y.shape[-1]:
            raise InputError(
                f"A series of {y.shape[-1]} days and a covariance of {covariance.shape[0]}: equal lengths."
            )
        seen = ~torch.isnan(y)
        factor = torch.linalg.cholesky(covariance[seen][:, seen])
        rests = torch.stack([self.transform(y[seen]) - self.transform(x[..., seen]) for x in (first, second)])
        white = torch.linalg.solve_triangular(factor, rests[..., None], upper=False)[..., 0]
        constant = factor.diagonal().log().sum() + 0.5 * int(seen.sum()) * float(np.log(2.0 * np.pi))
        total: Tensor = -0.5 * (white[0] * white[1]).sum(dim=-1) - constant
        return total


def synthetic(y: Tensor, mean: Tensor, noise: SyntheticLikelihood) -> Tensor:
    """Log-likelihood [...] of y [T] given the simulated series [..., T] and the covariance of simulation noise."""
    return noise(y, mean)


def estimate_synthetic(
    series: ArrayLike, scale: str = "sqrt", *, runs_averaged: int | None = None, floor: float = 0.01
) -> SyntheticLikelihood:
    """The synthetic likelihood whose covariance is estimated from repeated simulations.

    Correlations are shrunk to 0 by the intensity that minimises the expected squared error (Schäfer & Strimmer 2005),
    so that the covariance of a few simulations of many days can be inverted.

    Args:
        series: [R, T] simulations with the same parameters and R different seeds; R from 4.
        scale: `sqrt` or `log`.
        runs_averaged: if the simulated mean given to the likelihood is itself the average of so many runs, its own
            noise is added: the covariance times 1 + 1/runs. None: that mean is exact.
        floor: smallest variance on the scale, as a share of the mean variance over days.

    Raises:
        InputError: for fewer than four simulations, or values that are not finite.

    Source: Wood (2010), synthetic likelihood; Schäfer & Strimmer (2005), shrinkage.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 4 or not np.isfinite(values).all():
        raise InputError(f"The simulations have shape {values.shape}: at least 4 finite series, one a row.")
    blank = SyntheticLikelihood(scale, np.eye(values.shape[1]))
    rows = blank.transform(torch.from_numpy(values)).numpy()
    count = rows.shape[0]
    centred = rows - rows.mean(axis=0)
    variance = centred.var(axis=0, ddof=1)
    typical = variance.mean() if variance.mean() > 0 else 1.0
    sd = np.sqrt(np.maximum(variance, floor * typical))
    standard = centred / sd
    products = standard[:, :, None] * standard[:, None, :]
    mean_product = products.mean(axis=0)
    correlation = mean_product * count / (count - 1)
    error = ((products - mean_product) ** 2).sum(axis=0) * count / (count - 1) ** 3
    off = ~np.eye(values.shape[1], dtype=bool)
    signal = (correlation[off] ** 2).sum()
    shrinkage = float(np.clip(error[off].sum() / signal, 0.0, 1.0)) if signal > 0 else 1.0
    shrunk = (1.0 - shrinkage) * correlation
    np.fill_diagonal(shrunk, 1.0)
    # R simulations never show more than R − 1 directions; a little of the identity keeps the inverse bounded.
    ridge = max(0.0, 1e-6 - float(np.linalg.eigvalsh(shrunk).min()))
    covariance = (shrunk + ridge * np.eye(len(sd))) * np.outer(sd, sd)
    if runs_averaged is not None:
        covariance *= 1.0 + 1.0 / runs_averaged
    return SyntheticLikelihood(scale, covariance, shrinkage)


def _observed(y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Which days are seen, and y with 0 in the place of missing days."""
    if y.shape[-1] != mean.shape[-1]:
        raise InputError(f"A series of {y.shape[-1]} days and a simulation of {mean.shape[-1]}: equal lengths.")
    seen = ~torch.isnan(y)
    return seen, torch.where(seen, y, torch.zeros_like(y))


def _total(terms: Tensor, seen: Tensor) -> Tensor:
    # `where` rather than a product: a missing day contributes neither a value nor a gradient.
    return torch.where(seen, terms, torch.zeros_like(terms)).sum(dim=-1)

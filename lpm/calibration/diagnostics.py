"""Whether a posterior is to be believed, and how good its forecasts are: coverage, ranks, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from lpm.errors import InputError

__all__ = [
    "Check",
    "Checks",
    "Tarp",
    "coverage_check",
    "coverage_limits",
    "credible_interval",
    "crps",
    "effective_sample_size",
    "interval_coverage",
    "log_score",
    "sbc_p_values",
    "sbc_ranks",
    "tarp",
    "weighted_interval_score",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and the figures that say so."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Checks:
    """The checks a result carries."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return all(check.passed for check in self.checks)

    def headline(self) -> str:
        """The first line of a result: what failed, with its figures, or that nothing did."""
        failed = [check for check in self.checks if not check.passed]
        if not self.checks:
            return "UNCHECKED: no check was made."
        if not failed:
            return f"All {len(self.checks)} checks passed: {', '.join(check.name for check in self.checks)}."
        told = "; ".join(f"{check.name} ({check.detail})" for check in failed)
        return f"FAILED {len(failed)} of {len(self.checks)} checks: {told}."


@dataclass(frozen=True)
class Tarp:
    """Expected coverage of the joint posterior at each credibility level, and whether it is the level.

    Args:
        levels: [L] credibility.
        coverage: [L] share of truths inside; equal to `levels` for a true posterior, above for one too wide.
        p_value: of a Kolmogorov-Smirnov test of equality.
    """

    levels: Array
    coverage: Array
    p_value: float


def credible_interval(draws: ArrayLike, level: float = 0.9) -> tuple[Array, Array]:
    """The equal-tailed interval over the first axis of draws [S, ...]: lower and upper ends [...]."""
    tail = 0.5 * (1.0 - _a_level(level))
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [tail, 1.0 - tail], axis=0)
    return low, high


def interval_coverage(draws: ArrayLike, truths: ArrayLike, level: float = 0.9) -> Array:
    """How often the equal-tailed interval holds the truth.

    Args:
        draws: [R, S, P] posterior draws of R repetitions.
        truths: [R, P] the parameters that made the data.
        level: credibility.

    Returns:
        [P] shares of the R repetitions.
    """
    values, true = _draws_and_truths(draws, truths)
    low, high = credible_interval(np.moveaxis(values, 1, 0), level)
    return np.asarray(((low <= true) & (true <= high)).mean(axis=0))


def coverage_limits(repetitions: int, level: float = 0.9, confidence: float = 0.99) -> tuple[int, int]:
    """The counts between which a well-calibrated interval holds the truth with that confidence, both included."""
    outside = 0.5 * (1.0 - _a_level(confidence))
    binomial = stats.binom(repetitions, _a_level(level))
    return int(binomial.ppf(outside)), int(binomial.ppf(1.0 - outside))


def coverage_check(
    draws: ArrayLike, truths: ArrayLike, names: Sequence[str], level: float = 0.9, confidence: float = 0.99
) -> Check:
    """Whether each parameter's interval holds the truth about as often as it says."""
    values, _ = _draws_and_truths(draws, truths)
    repetitions = len(values)
    held = np.rint(interval_coverage(draws, truths, level) * repetitions).astype(int)
    low, high = coverage_limits(repetitions, level, confidence)
    detail = ", ".join(f"{name} {count}/{repetitions}" for name, count in zip(names, held, strict=True))
    return Check(
        f"{level:.0%} coverage", bool(((held >= low) & (held <= high)).all()), f"{detail}; {low} to {high} expected"
    )


def sbc_ranks(draws: ArrayLike, truths: ArrayLike) -> NDArray[np.int64]:
    """Ranks [R, P] of the truths [R, P] among posterior draws [R, S, P]: uniform on 0..S if the posterior is right.

    Source: Talts et al. (2018), simulation-based calibration.
    """
    values, true = _draws_and_truths(draws, truths)
    return np.asarray((values < true[:, None, :]).sum(axis=1), dtype=np.int64)


def sbc_p_values(ranks: ArrayLike, draws: int, bins: int | None = None) -> Array:
    """A chi-square test of the uniformity of ranks.

    Args:
        ranks: [R, P] from `sbc_ranks`.
        draws: S, the draws behind each rank.
        bins: about equal ones; None: as many as leave 5 expected in each, at most 20.

    Returns:
        [P] p-values.
    """
    values = np.asarray(ranks)
    repetitions = values.shape[0]
    bins = max(2, min(20, repetitions // 5, draws + 1)) if bins is None else bins
    edges = np.rint(np.linspace(0, draws + 1, bins + 1)) - 0.5
    expected = np.diff(edges) / (draws + 1) * repetitions
    p_values = [stats.chisquare(np.histogram(values[:, p], edges)[0], expected).pvalue for p in range(values.shape[1])]
    return np.asarray(p_values, dtype=np.float64)


def tarp(draws: ArrayLike, truths: ArrayLike, seed: int, levels: int = 20) -> Tarp:
    """Coverage of the joint posterior by distances to random points.

    Args:
        draws: [R, S, P].
        truths: [R, P].
        seed: of the random points, which are uniform over the range of the truths.
        levels: number of credibility levels.

    Source: Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023), tests of accuracy with random points.
    """
    values, true = _draws_and_truths(draws, truths)
    low, span = true.min(axis=0), np.ptp(true, axis=0)
    span = np.where(span > 0, span, 1.0)
    points = np.random.default_rng(seed).random(true.shape)
    distance = np.linalg.norm((values - low) / span - points[:, None, :], axis=-1)
    true_distance = np.linalg.norm((true - low) / span - points, axis=-1)
    # A rank plus ½ among S + 1 places: uniform for a true posterior, with no mass at the ends.
    inside = ((distance < true_distance[:, None]).sum(axis=1) + 0.5) / (values.shape[1] + 1)
    grid = np.linspace(0.0, 1.0, levels + 1)
    coverage = (inside[:, None] <= grid).mean(axis=0)
    return Tarp(grid, coverage, float(stats.kstest(inside, "uniform").pvalue))


def effective_sample_size(log_weights: ArrayLike) -> float:
    """How many independent draws importance weights are worth: (Σw)² / Σw², from 1 to their number.

    Args:
        log_weights: [S], up to a constant; −∞ is a weight of 0.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if np.isnan(values).any() or not np.isfinite(values.max(initial=-np.inf)):
        raise InputError("No importance weight is above 0, or one is not a number.")
    return float(np.exp(2.0 * special.logsumexp(values) - special.logsumexp(2.0 * values)))


def log_score(log_likelihoods: ArrayLike) -> float:
    """The log predictive density of held-out data, log mean exp over draws [S]; larger is better."""
    values = np.asarray(log_likelihoods, dtype=np.float64)
    return float(special.logsumexp(values) - np.log(values.size))


def crps(draws: ArrayLike, observed: ArrayLike) -> Array:
    """The continuous ranked probability score of predictive draws [S, ...] against what came [...]; smaller is better.

    Source: Gneiting & Raftery (2007); the unbiased estimator E|X − y| − ½ E|X − X'|.
    """
    values = np.sort(np.asarray(draws, dtype=np.float64), axis=0)
    count = values.shape[0]
    if count < 2:
        raise InputError(f"{count} predictive draw: at least 2.")
    near = np.abs(values - np.asarray(observed, dtype=np.float64)).mean(axis=0)
    rank = (2.0 * np.arange(count) - (count - 1)).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(near - (rank * values).sum(axis=0) / (count * (count - 1)))


def weighted_interval_score(
    draws: ArrayLike, observed: ArrayLike, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)
) -> Array:
    """The weighted interval score of predictive draws [S, ...] against what came [...]; smaller is better.

    Source: Bracher, Ray, Gneiting & Reich (2021).
    """
    values, y = np.asarray(draws, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    total = 0.5 * np.abs(y - np.median(values, axis=0))
    for level in levels:
        alpha = 1.0 - level
        low, high = credible_interval(values, level)
        miss = np.maximum(low - y, 0.0) + np.maximum(y - high, 0.0)
        total = total + 0.5 * alpha * (high - low + 2.0 / alpha * miss)
    return np.asarray(total / (len(levels) + 0.5))


def _a_level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise InputError(f"The level is {level}: between 0 and 1.")
    return level


def _draws_and_truths(draws: ArrayLike, truths: ArrayLike) -> tuple[Array, Array]:
    values, true = np.asarray(draws, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    if values.ndim != 3 or true.shape != (values.shape[0], values.shape[2]):
        raise InputError(
            f"The draws and truths have shapes {values.shape} and {true.shape}: (R, S, P) and (R, P) go together."
        )
    return values, true

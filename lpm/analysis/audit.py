"""The gradient audit: bias, noise and cost of an estimator against finite differences, on the very scenario.

No estimator is trusted unseen. Both run with the same seeds, so that their difference is less noisy than either; the
measure is the relative L1 distance over steps and outputs of the mean derivative of cumulative outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.flame.model import Model

__all__ = ["LIMIT", "Audit", "Verdict", "audit_gradients", "judge"]

LIMIT = 0.10
"""Bias beyond which no estimator is used without a warning."""


@dataclass(frozen=True)
class Verdict:
    """What is known of one estimator.

    Attributes:
        estimator: its name.
        bias: relative L1 distance of its mean from that of `fd`, worst parameter.
        uncertainty: standard error of `bias`.
        sd: standard deviation of one run relative to the size of the mean, worst parameter.
        seconds: a run's time relative to a plain one.
    """

    estimator: str
    bias: float
    uncertainty: float
    sd: float
    cost: float


@dataclass(frozen=True)
class Audit:
    """The outcome: `chosen`, why, and the figures.

    Attributes:
        chosen: the estimator to use.
        reason: one sentence.
        verdicts: figures of each estimator.
        seeds: how many runs of each.
    """

    chosen: str
    reason: str
    verdicts: tuple[Verdict, ...]
    seeds: int


def judge(candidate: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Compare an estimator's derivatives with the reference's, seed by seed.

    Args:
        candidate: [seeds, X, P], X being steps × outputs.
        reference: the same of finite differences.

    Returns:
        bias, its standard error, and the relative sd of one run of candidate and of reference; each of the parameter
        with the largest bias.
    """
    seeds = candidate.shape[0]
    size = np.abs(reference.mean(0)).sum(0)
    size = np.where(size > 0, size, np.inf)

    def relative(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.abs(rows.mean(0)).sum(0) / size)

    difference = candidate - reference
    bias = relative(difference)
    if seeds > 1:
        # Jackknife: leave one seed out at a time; it also takes off the upward bias that noise gives an absolute value.
        left = np.stack([relative(np.delete(difference, k, axis=0)) for k in range(seeds)])
        bias = np.maximum(seeds * bias - (seeds - 1) * left.mean(0), 0.0)
        error = np.sqrt((seeds - 1) * left.var(0))
        spread = [rows.std(0, ddof=1).sum(0) / size for rows in (candidate, reference)]
    else:
        error, spread = np.full(bias.shape, np.inf), [np.full(bias.shape, np.nan)] * 2
    worst = int(np.argmax(bias)) if bias.size else 0
    return float(bias[worst]), float(error[worst]), float(spread[0][worst]), float(spread[1][worst])


def audit_gradients(
    model: Model,
    theta: NDArray[np.float64],
    *,
    steps: int,
    seed: int,
    seeds: int = 24,
    step: float = 0.02,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit `tangent` against `fd` and choose.

    Args:
        model: a model whose people are all in this process.
        theta: one parameter vector [P].
        steps: T.
        seed: of the first run.
        seeds: at most so many runs of each; fewer if the answer is clear before.
        step: of finite differences, relative.
        progress: called with (runs done, runs).

    Returns:
        The choice: `tangent` only if its bias was shown to be below `LIMIT`.
    """
    theta = np.atleast_2d(theta)
    if not model.parameters:
        raise InputError("The model has no parameters to differentiate by.")
    took = {"none": 0.0, "fd": 0.0, "tangent": 0.0}
    rows: dict[str, list[NDArray[np.float64]]] = {"fd": [], "tangent": []}

    def once(estimator: str, k: int) -> NDArray[np.float64] | None:
        began = time.perf_counter()
        result = evaluate(model, theta, estimator=estimator, steps=steps, seed=(seed + k) % 2**64, step=step)
        took[estimator] += time.perf_counter() - began
        if result.derivative is None:
            return None
        return np.cumsum(result.derivative[:, :, 0, :], axis=0).reshape(-1, len(model.parameters))

    bias, error, spread, noise = np.inf, np.inf, np.nan, np.nan
    for k in range(seeds):
        once("none", k)
        for estimator in rows:
            found = once(estimator, k)
            assert found is not None
            rows[estimator].append(found)
        if progress is not None:
            progress(k + 1, seeds)
        if k >= 3:
            bias, error, spread, noise = judge(np.stack(rows["tangent"]), np.stack(rows["fd"]))
            if bias - 3 * error > LIMIT or bias + 3 * error < LIMIT:
                break
    runs = len(rows["fd"])
    cost = {name: seconds / max(took["none"], 1e-9) for name, seconds in took.items()}
    verdicts = (Verdict("tangent", bias, error, spread, cost["tangent"]), Verdict("fd", 0.0, 0.0, noise, cost["fd"]))
    if bias + 2 * error < LIMIT:
        return Audit("tangent", f"the tangent's bias is {bias:.3f} ± {error:.3f}, below {LIMIT}", verdicts, runs)
    if bias - 2 * error > LIMIT:
        return Audit("fd", f"the tangent's bias is {bias:.3g} ± {error:.2g}, beyond {LIMIT}", verdicts, runs)
    return Audit(
        "fd", f"the tangent's bias ({bias:.2g} ± {error:.2g}) was not shown to be below {LIMIT}", verdicts, runs
    )

"""An estimator against known derivatives of cumulative infections: what `gradients.py` and `frontier.py` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import lpm
from lpm.estimators import evaluate

__all__ = ["CLEAR", "Distance", "cumulative", "distance", "measure"]

CLEAR = 5.0
"""Standard errors by which a reference differs from 0 where its sign counts."""

Floats = NDArray[np.float64]


class Distance(NamedTuple):
    """Of the mean of some runs from a reference, by parameter [P]; all but `wrong_signs` relative to the reference.

    Attributes:
        relative_l1: over days.
        own_error: standard error of the mean.
        reference_error: that of the reference.
        both_errors: the two together.
        sd: standard deviation of a run.
        wrong_signs: days with another sign than the reference's, where that is clear.
    """

    relative_l1: Floats
    own_error: Floats
    reference_error: Floats
    both_errors: Floats
    sd: Floats
    wrong_signs: NDArray[np.int64]


def cumulative(model: lpm.Model, theta: Floats, estimator: str, days: int, seed: int, **more: Any) -> Floats:
    """Derivatives of the model's first output, added up over days [days, P]."""
    found = evaluate(model, theta, estimator=estimator, steps=days, seed=seed, **more).derivative
    assert found is not None
    return np.cumsum(found[:, 0, 0], axis=0)


def measure(
    model: lpm.Model, theta: Floats, estimator: str, days: int, seeds: Iterable[int], advance: Callable[[], object]
) -> tuple[Floats, float]:
    """Runs of an estimator [seeds, days, P], and processor time in plain runs, mixed with them one by one."""
    rows, own, plain = [], 0.0, 0.0
    for name in ("none", estimator):
        evaluate(model, theta, estimator=name, steps=2, seed=0)  # compiles
    for seed in seeds:
        began = time.process_time()
        evaluate(model, theta, estimator="none", steps=days, seed=seed)
        between = time.process_time()
        rows.append(cumulative(model, theta, estimator, days, seed))
        own, plain = own + time.process_time() - between, plain + between - began
        advance()
    return np.array(rows), own / plain


def distance(rows: Floats, reference: Floats, error: Floats) -> Distance:
    """Compare runs [seeds, days, P] with a reference and its standard error [days, P]."""
    mean, sd, size = rows.mean(0), rows.std(0, ddof=1), np.abs(reference).sum(0)
    own = sd / np.sqrt(len(rows))
    both = np.hypot(own, error)
    wrong = (np.abs(reference) > CLEAR * both) & (np.sign(mean) != np.sign(reference))
    sizes = np.where(size > 0, size, np.inf)
    relative = (each.sum(0) / sizes for each in (np.abs(mean - reference), own, error, both, sd))
    return Distance(*relative, wrong.sum(0))

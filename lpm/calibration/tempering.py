"""How much the prior counts against the data: the weight of the KL term, chosen by simulated coverage (paper, 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lpm.calibration.diagnostics import coverage_limits, interval_coverage
from lpm.calibration.priors import Prior
from lpm.errors import InputError

__all__ = ["WeightChoice", "choose_weight"]

Array = NDArray[np.float64]
Data = TypeVar("Data")


@dataclass(frozen=True)
class WeightChoice:
    """The weight chosen, and what was seen.

    Args:
        weight: the smallest that covers, or the largest tried.
        covers: whether any did.
        coverage: weight → [P] share of truths inside their intervals, for the weights that were tried.
        repetitions: simulated data sets behind each share.
    """

    weight: float
    covers: bool
    coverage: dict[float, tuple[float, ...]]
    repetitions: int


def choose_weight(
    prior: Prior,
    simulate: Callable[[Array, int], Data],
    calibrate: Callable[[Data, float, int], Array],
    *,
    candidates: Sequence[float] = (1.0, 2.0, 4.0),
    repetitions: int = 20,
    level: float = 0.9,
    seed: int = 0,
) -> WeightChoice:
    """The smallest weight, that is the narrowest posterior, whose intervals hold simulated truths as often as they say.

    A weight above 1 tempers a likelihood that is too sure of itself (days that are not independent, noise of the
    simulator that it leaves out); one below 1 sharpens one that is too modest. The same data sets serve all candidates,
    which are tried from the smallest, so the last one tried is the answer.

    Args:
        prior: from which the truths are drawn.
        simulate: (θ [P], seed) → a data set.
        calibrate: (data set, weight, seed) → posterior draws [S, P], the same S each time.
        candidates: weights to try.
        repetitions: data sets; with 20, a coverage of 75 % still passes for 90 %.
        level: credibility of the intervals.
        seed: of truths and data sets.
    """
    weights = sorted({float(weight) for weight in candidates})
    if not weights or weights[0] <= 0.0:
        raise InputError(f"The weights to choose from are {list(candidates)}: at least one, all above 0.")
    truths = prior.sample(repetitions, torch.Generator().manual_seed(seed)).numpy()
    seeds = np.random.default_rng(seed).integers(2**31, size=(2, repetitions))
    data = [simulate(truth, int(number)) for truth, number in zip(truths, seeds[0], strict=True)]
    least, _ = coverage_limits(repetitions, level, 0.95)
    coverage: dict[float, tuple[float, ...]] = {}
    for weight in weights:
        draws = np.stack([calibrate(one, weight, int(number)) for one, number in zip(data, seeds[1], strict=True)])
        held = interval_coverage(draws, truths, level)
        coverage[weight] = tuple(held.tolist())
        if (np.rint(held * repetitions) >= least).all():
            return WeightChoice(weight, True, coverage, repetitions)
    return WeightChoice(weights[-1], False, coverage, repetitions)

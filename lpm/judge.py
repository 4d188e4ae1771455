"""The judge of gradient estimators: one measure, one limit and one rule of choice for every audit (paper, eq. 11).

No estimator is trusted unseen. A candidate and the reference (`fd`, central differences with common random numbers)
run with the same seeds, so that their difference is less noisy than either. `lpm.analysis.audit` brings derivatives of
outputs, `lpm.calibration.study` gradients of a loss; neither knows the other, and both are judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

__all__ = ["LIMIT", "REFERENCE", "Figures", "Verdict", "choose", "compare", "rule", "still_worth"]

LIMIT = 0.10
"""Bias beyond which no estimator is used without a warning."""

REFERENCE = "fd"
"""The yardstick, and what is used where nothing else is shown to be true."""

ACQUIT_AFTER = 4
"""Pairs of runs from which on a bias can be shown to be small: a standard error from fewer is too uncertain."""

_CLEAR = 5.0
"""Standard errors by which a derivative of the reference must differ from 0 for its sign to count."""


@dataclass(frozen=True)
class Figures:
    """An estimator against the reference.

    Attributes:
        biases: relative L1 distance of the mean derivative from the reference's, by parameter [P].
        uncertainties: standard errors of `biases`, were the size of the reference known [P].
        excess: the distance less `LIMIT` times the reference's size, in units of that size as it was found [P].
        excess_error: standard error of `excess`, the doubt about that size included [P].
        sd: standard deviation of one run relative to the size of the mean, root mean square over parameters.
        wrong_signs: derivatives with the other sign than the reference's, where that is clear (5 standard errors).
        clear: how many are.
    """

    biases: NDArray[np.float64]
    uncertainties: NDArray[np.float64]
    excess: NDArray[np.float64]
    excess_error: NDArray[np.float64]
    sd: float
    wrong_signs: int = 0
    clear: int = 0

    @property
    def bias(self) -> float:
        """Of the worst parameter."""
        return float(self.biases.max(initial=0.0))

    @property
    def uncertainty(self) -> float:
        """Of the worst parameter."""
        return float(self.uncertainties[np.argmax(self.biases)]) if self.biases.size else 0.0


@dataclass(frozen=True)
class Verdict:
    """What is known of one estimator.

    Attributes:
        estimator: its name.
        bias: of the worst parameter; see `Figures`.
        uncertainty: its standard error.
        sd: see `Figures`.
        cost: time of a run relative to a plain one (in a calibration: to one of `fd`).
        wrong_signs: see `Figures`.
        clear: see `Figures`.
        runs: pairs of runs.
        ruling: "true" (its bias is shown to be below `LIMIT`), "biased" (above), "open", "reference", "not pursued"
            (it needs far more time than another for the same precision), or "not supported".
        note: why it is not supported, or what it is good for.
        eligible: whether `auto` may choose it at all.
    """

    estimator: str
    bias: float = float("nan")
    uncertainty: float = float("nan")
    sd: float = float("nan")
    cost: float = float("nan")
    wrong_signs: int = 0
    clear: int = 0
    runs: int = 0
    ruling: str = "open"
    note: str = ""
    eligible: bool = True

    @property
    def effort(self) -> float:
        """Time for a given precision: cost × variance of one run; infinite where either is unknown."""
        value = self.cost * self.sd**2
        return float(value) if np.isfinite(value) else float("inf")

    def words(self) -> str:
        """The bias for people."""
        return f"{self.bias:.2g} ± {self.uncertainty:.1g}"


def compare(candidate: NDArray[np.float64], reference: NDArray[np.float64]) -> Figures:
    """Compare derivatives of the same seeds.

    Args:
        candidate: [seeds, X, P], X being what is differentiated (steps × outputs).
        reference: the same of the reference.
    """
    seeds, everyone = candidate.shape[0], np.arange(candidate.shape[0])

    def lengths(kept: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of the mean difference and of the reference [2, P]."""
        rows = (candidate[kept] - reference[kept], reference[kept])
        return np.stack([np.abs(each.mean(0)).sum(0) for each in rows])

    whole = lengths(everyone)
    size = np.where(whole[1] > 0, whole[1], np.inf)
    if not np.isfinite(whole).all():
        endless = np.full(size.shape, np.inf)
        return Figures(endless, endless, endless, endless, float("inf"))
    if seeds == 1:
        bias, unknown = whole[0] / size, np.full(size.shape, np.inf)
        return Figures(bias, unknown, bias - LIMIT, unknown, float("nan"))
    # Jackknife: leave one seed out at a time; it also takes off the upward bias that noise gives an absolute value. No
    # ratio is judged: few runs may put what it is divided by near 0.
    left = np.stack([lengths(np.delete(everyone, k)) for k in range(seeds)])
    left[:, 1] = left[:, 0] - LIMIT * left[:, 1]
    whole[1] = whole[0] - LIMIT * whole[1]
    bias, excess = (seeds * whole - (seeds - 1) * left.mean(0)) / size
    error, excess_error = np.sqrt((seeds - 1) * left.var(0)) / size
    excess = np.where(np.isfinite(size), excess, -LIMIT)  # nothing answers to the parameter: nothing to be wrong in
    spread = candidate.std(0, ddof=1).sum(0) / size
    mean = reference.mean(0)
    clear = np.abs(mean) > _CLEAR * reference.std(0, ddof=1) / np.sqrt(seeds)
    wrong = clear & (np.sign(candidate.mean(0)) != np.sign(mean))
    sd = float(np.sqrt(np.mean(spread**2)))
    return Figures(np.maximum(bias, 0.0), error, excess, excess_error, sd, int(wrong.sum()), int(clear.sum()))


def rule(found: Figures, runs: int, *, most: int, convict_after: int = ACQUIT_AFTER) -> str:
    """What so many pairs of runs show: "true" (of every parameter), "biased" (of one) or "open".

    Args:
        found: the comparison.
        runs: pairs so far.
        most: pairs at which the audit ends: there two standard errors acquit and three convict; before, three and
            four, by Student's t. Who looks after every pair sees chance often, and a conviction is not looked at again.
        convict_after: pairs from which on a bias can be shown to be large. After a single pair only a distance larger
            than the gradient itself is no chance.
    """
    if not np.isfinite(found.bias):
        return "biased"
    if runs == 1:
        return "biased" if convict_after == 1 and found.bias > 1.0 else "open"
    # A standard error from few runs is often far too small: Student's t, not the normal distribution.
    convict, acquit = (stdtrit(runs - 1, ndtr(sigmas)) for sigmas in ((3.0, 2.0) if runs >= most else (4.0, 3.0)))
    if runs >= convict_after and (found.excess > convict * found.excess_error).any():
        return "biased"
    if runs >= ACQUIT_AFTER and (found.excess < -acquit * found.excess_error).all():
        return "true"
    return "open"


def still_worth(candidate: Verdict, reference: Verdict) -> bool:
    """Whether an estimator could still be chosen: not if it needs many times the reference's time."""
    return not (candidate.runs >= ACQUIT_AFTER and candidate.effort > 8.0 * reference.effort)


def choose(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """The estimator to use, and why.

    Args:
        verdicts: of all estimators, the reference among them.

    Returns:
        The name of the one that needs least time for the same precision, among the reference and those whose bias is
        shown to be below `LIMIT`; and one sentence.
    """
    reference = next(each for each in verdicts if each.estimator == REFERENCE)
    true = [each for each in verdicts if each.ruling == "true" and each.eligible]
    best = min([reference, *true], key=lambda each: each.effort)
    if best is not reference:
        gain = reference.effort / best.effort if best.effort > 0 else float("inf")
        return best.estimator, (
            f"the bias of {best.estimator} is {best.words()}, below {LIMIT:.0%}, and for the same precision it needs "
            f"{1 / gain:.2g} of the time of {REFERENCE}"
        )
    judged = [each for each in verdicts if each.eligible and each is not reference and each.runs]
    parts = []
    for each in judged:
        if each.ruling == "true":
            parts.append(
                f"{each.estimator} is true ({each.words()}) but needs {each.effort / reference.effort:.2g} times the "
                f"time for the same precision"
                if reference.effort > 0
                else f"{each.estimator} is true ({each.words()}) but not better"
            )
        elif each.ruling == "biased":
            parts.append(f"the bias of {each.estimator} is {each.words()}, beyond {LIMIT:.0%}")
        elif each.ruling == "not pursued":
            parts.append(
                f"{each.estimator} needs {each.effort / reference.effort:.2g} times the time for the same precision"
            )
        else:
            parts.append(f"the bias of {each.estimator} ({each.words()}) was not shown to be below {LIMIT:.0%}")
    return REFERENCE, "; ".join(parts) or (
        "the others are for comparison only"
        if any(each.runs for each in verdicts if each is not reference)
        else "no other estimator supports the model"
    )

"""The gradient audit: bias, noise, cost and signs of every estimator against finite differences, on the very model.

All run with the same seeds, so that differences are less noisy than either; what is compared is the derivative of
cumulative outputs, over steps and outputs. `lpm.judge` measures and rules; here are the runs, and the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lpm.errors import InputError
from lpm.estimators import REGISTRY, candidates, evaluate, require_parameters, to_lanes
from lpm.flame.model import Model
from lpm.judge import ACQUIT_AFTER, REFERENCE, Verdict, choose, compare, rule, still_worth
from lpm.rng import require_seed
from lpm.worlds.process_group import agreed

__all__ = ["Audit", "audit_gradients", "require_known", "resolve_estimator"]


@dataclass(frozen=True)
class Audit:
    """The outcome: what to use, why, and the figures.

    Attributes:
        chosen: the estimator to use.
        reason: one sentence.
        verdicts: figures of each estimator, the reference `fd` first.
        seeds: how many runs of `fd`.
    """

    chosen: str
    reason: str
    verdicts: tuple[Verdict, ...]
    seeds: int

    def verdict(self, estimator: str) -> Verdict:
        """The figures of one estimator."""
        return next(each for each in self.verdicts if each.estimator == estimator)

    def require_mode(self, mode: str) -> None:
        """Refuse what the estimator to use can't do."""
        if mode not in REGISTRY[self.chosen].modes:
            raise InputError(
                f"No estimator with a {mode} mode was shown to be true here ({self.reason}).",
                "Go forward, or name an estimator that goes back (alternates or tangent) and mind its bias.",
            )

    def table(self) -> pd.DataFrame:
        """One row per estimator.

        Returns:
            Columns `estimator`, `label` (says where it is known to be biased), `ruling`, `bias` and `bias_se` (relative
            L1 on cumulative outputs, worst parameter), `sd` (of one run, relative), `cost` (time relative to a plain
            run), `effort` (cost × sd²: time for a given precision), `wrong_signs` of `clear_signs`, `runs`, `note`,
            `chosen`.
        """
        return pd.DataFrame(
            [
                {
                    "estimator": each.estimator,
                    "label": REGISTRY[each.estimator].label,
                    "ruling": each.ruling,
                    "bias": each.bias,
                    "bias_se": each.uncertainty,
                    "sd": each.sd,
                    "cost": each.cost,
                    "effort": each.effort if np.isfinite(each.effort) else np.nan,
                    "wrong_signs": each.wrong_signs,
                    "clear_signs": each.clear,
                    "runs": each.runs,
                    "note": each.note,
                    "chosen": each.estimator == self.chosen,
                }
                for each in self.verdicts
            ]
        )


def audit_gradients(
    model: Model,
    params: Mapping[str, Any] | NDArray[np.float64] | None = None,
    *,
    steps: int,
    seed: int = 0,
    seeds: int = 24,
    estimators: Sequence[str] | None = None,
    step: float = 0.02,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Measure every estimator that the model supports against `fd`, and recommend one.

    Args:
        model: a model whose people are all in this process.
        params: parameter name → value, or one vector in the model's order [P].
        steps: T.
        seed: of the first run.
        seeds: at most so many runs of each; an estimator's end once its answer is clear.
        estimators: names to try beside `fd`; all there are by default.
        step: of finite differences, relative.
        progress: called with (runs done, runs).

    Returns:
        The table of figures and the recommendation: the estimator that needs the least time for the same precision,
        among `fd` and those whose bias is shown to be below a tenth.

    Raises:
        InputError: for a model without parameters, an unknown estimator, or fewer than 2 seeds.
    """
    theta = np.atleast_2d(to_lanes(model.parameters, params or {}) if not isinstance(params, np.ndarray) else params)
    require_parameters(model)
    if theta.shape != (1, len(model.parameters)):
        raise InputError("A gradient audit is made at one value of each parameter.")
    seed = require_seed(seed)
    if seeds < 2:
        raise InputError(f"seeds is {seeds}: a whole number from 2, for a bias needs a standard error.")
    names = [name for name in (REGISTRY if estimators is None else estimators) if name != REFERENCE]
    require_known(names)
    found: dict[str, Verdict] = {}
    for name in names:
        reason = REGISTRY[name].refuses(model)
        known = "for comparison only" if REGISTRY[name].biased else ""
        found[name] = Verdict(
            name,
            ruling="open" if reason is None else "not supported",
            note=reason or known,
            eligible=reason is None and not REGISTRY[name].biased,
        )
    rows: dict[str, list[NDArray[np.float64]]] = {REFERENCE: [], **{name: [] for name in names}}
    took: dict[str, list[float]] = {"none": [], **{name: [] for name in rows}}

    def once(estimator: str, k: int) -> None:
        began = time.perf_counter()
        result = evaluate(model, theta, estimator=estimator, steps=steps, seed=(seed + k) % 2**64, step=step)
        took[estimator].append(agreed(time.perf_counter() - began))
        if result.derivative is not None:
            cumulative = np.cumsum(result.derivative[:, :, 0, :], axis=0)
            rows[estimator].append(cumulative.reshape(-1, len(model.parameters)))

    def cost(estimator: str) -> float:
        # Medians: the first run compiles, and a machine is never idle for long.
        return median(took[estimator]) / max(median(took["none"]), 1e-9)

    evaluate(model, theta, estimator="none", steps=1, seed=seed)  # compiles
    reference = Verdict(REFERENCE, ruling="reference")
    for k in range(seeds):
        open_ones = [name for name in names if found[name].ruling == "open"]
        if not open_ones and k >= ACQUIT_AFTER:
            break
        once("none", k)
        once(REFERENCE, k)
        own = compare(np.stack(rows[REFERENCE]), np.stack(rows[REFERENCE]))
        reference = Verdict(REFERENCE, 0.0, 0.0, own.sd, cost(REFERENCE), 0, own.clear, k + 1, "reference")
        for name in open_ones:
            try:
                once(name, k)
            except InputError as refused:
                # The others have run: what this one can't do showed in the run.
                found[name] = Verdict(name, ruling="not supported", note=str(refused), eligible=False)
                continue
            seen = compare(np.stack(rows[name]), np.stack(rows[REFERENCE]))
            verdict = Verdict(
                name,
                seen.bias,
                seen.uncertainty,
                seen.sd,
                cost(name),
                seen.wrong_signs,
                seen.clear,
                k + 1,
                rule(seen, k + 1, most=seeds),
                found[name].note,
                found[name].eligible,
            )
            if verdict.ruling == "open" and not still_worth(verdict, reference):
                verdict = Verdict(**{**vars(verdict), "ruling": "not pursued"})
            found[name] = verdict
        if progress is not None:
            progress(k + 1, seeds)
    verdicts = (reference, *found.values())
    chosen, reason = choose(verdicts)
    if estimators and not names:
        reason = "no other estimator was asked for"
    return Audit(chosen, reason, verdicts, reference.runs)


def require_known(estimators: Sequence[str]) -> None:
    """Refuse names of estimators there are not.

    Raises:
        InputError: naming those there are.
    """
    for name in estimators:
        if name not in REGISTRY:
            raise InputError(f"There is no estimator {name!r}: there are {', '.join(REGISTRY)}.")


def resolve_estimator(
    model: Model,
    theta: NDArray[np.float64],
    gradient: str,
    *,
    steps: int,
    seed: int,
    step: float = 0.02,
    mode: str = "forward",
) -> tuple[str, Audit | None]:
    """`auto` becomes what the audit of this model at the first draw chooses; any other name stays.

    Args:
        model: with all its people.
        theta: draws [K, P].
        gradient: "auto", or an estimator.
        steps: T.
        seed: of the first run.
        step: of finite differences, relative.
        mode: only estimators that have it are candidates, and `fd`.
    """
    if gradient != "auto":
        return gradient, None
    tried = candidates(model, mode, refusable=True)
    audit = audit_gradients(model, theta[0], steps=steps, seed=seed, step=step, estimators=tried)
    return audit.chosen, audit

"""A whole calibration: choose the gradient by an audit, fit the posterior, forecast, and say whether to believe it.

It knows no simulator: a backend (this process, or a federation) evaluates losses and forecasts. Every run of the
backend has a number of its own, which does not depend on how often the calibration was interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from typing import Protocol as Contract

import numpy as np
import torch
from numpy.typing import NDArray

from lpm import judge
from lpm.calibration.gvi import Fit, GviState, IterationRecord, fit
from lpm.calibration.priors import Prior
from lpm.options import BIASED
from lpm.parameters import Parameter
from lpm.rng import derive

__all__ = ["AUDIT", "POSTERIOR", "PRIOR", "Backend", "Choice", "Scores", "Settings", "Study", "choose", "run"]

logger = logging.getLogger(__name__)

AUDIT, PRIOR, POSTERIOR = 1 << 40, 2 << 40, 3 << 40
"""Numbers of the first audit run, the prior forecast and the posterior forecast; iteration i is run i."""


class Backend(Contract):
    """Who evaluates."""

    def evaluate(
        self, theta: NDArray[np.float64], trajectory: int, estimator: str, *, replicates: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Loss [K] and gradient [K, P] of all institutions together; replicates as the scenario says if None."""
        ...

    def forecast(self, theta: NDArray[np.float64], trajectory: int, label: str) -> NDArray[np.float64]:
        """Held-out log score of the forecast and of persistence, and the number of observations [3], all together."""
        ...

    def outputs(self, theta: NDArray[np.float64], trajectory: int) -> NDArray[np.float64]:
        """Public outputs [T, O, K]."""
        ...


@dataclass(frozen=True)
class Settings:
    """What is asked for; see `gvi.fit`. `iterations` is the most: a fit ends once it has converged.

    `candidates` are the estimators that `auto` tries beside finite differences; `reason` says why `gradient` is what it
    is, if it is not `auto`.
    """

    iterations: int
    draws: int
    weight: float
    predictive_draws: int
    seed: int
    gradient: str = "auto"
    audit_runs: int = 4
    candidates: tuple[str, ...] = ("tangent",)
    reason: str = "as asked"


@dataclass(frozen=True)
class Choice:
    """The estimator of a calibration, and why."""

    estimator: str
    reason: str
    bias: float = float("nan")
    uncertainty: float = float("nan")
    runs: int = 0


@dataclass(frozen=True)
class Scores:
    """Mean log score of a held-out observation (higher is better): posterior and prior forecasts, and persistence."""

    posterior: float
    prior: float
    persistence: float
    observations: int


@dataclass(frozen=True, eq=False)
class Study:
    """The outcome.

    Attributes:
        fit: the posterior and its convergence.
        choice: the estimator.
        scores: of the held-out days; None if none are held out.
        draws: of the posterior, used for the forecasts [M, P].
        outputs: public outputs at those draws [T, O, M].
    """

    fit: Fit
    choice: Choice
    scores: Scores | None
    draws: NDArray[np.float64]
    outputs: NDArray[np.float64]

    def headline(self) -> str:
        """One line that begins with what failed."""
        found = [self.fit.headline()]
        if self.scores is not None:
            better = [
                name
                for name, other in (("the prior", self.scores.prior), ("persistence", self.scores.persistence))
                if self.scores.posterior <= other
            ]
            if better:
                found.insert(0, f"FORECAST NO BETTER than {' and '.join(better)} on the held-out days.")
            else:
                found.append("The forecast of the held-out days beats the prior and persistence.")
        if self.choice.estimator in BIASED:
            found.insert(0, f"GRADIENT BIASED: {self.choice.estimator} is for comparison only.")
        return " ".join(found)


def choose(parameters: Sequence[Parameter], backend: Backend, settings: Settings) -> Choice:
    """Audit the candidates against finite differences, as gradients of the loss, at draws near the prior's centre.

    All use the same random numbers, so that differences are less noisy than either; `lpm.judge` rules.
    """
    if settings.gradient != "auto":
        return Choice(settings.gradient, settings.reason)
    prior = Prior.from_parameters(parameters)
    generator = torch.Generator().manual_seed(derive(settings.seed, "audit") >> 1)
    u = 0.3 * torch.randn((settings.audit_runs, len(parameters)), generator=generator, dtype=torch.float64)
    thetas, slopes = prior.to_parameter(u).numpy(), prior.slope(u).numpy()
    rows: dict[str, list[NDArray[np.float64]]] = {judge.REFERENCE: [], **{name: [] for name in settings.candidates}}
    took: dict[str, list[float]] = {name: [] for name in rows}
    found = {name: judge.Verdict(name) for name in settings.candidates}
    reference = judge.Verdict(judge.REFERENCE, ruling="reference")
    for k in range(settings.audit_runs):
        theta, scale = thetas[k : k + 1], slopes[k : k + 1]
        open_ones = [name for name in settings.candidates if found[name].ruling == "open"]
        if not open_ones:
            break
        for estimator in (judge.REFERENCE, *open_ones):
            began = time.perf_counter()
            # An estimator is as biased in the mean of several simulations as in one, which costs less.
            gradient = backend.evaluate(theta, AUDIT + k, estimator, replicates=1)[1]
            took[estimator].append(time.perf_counter() - began)
            # In the prior's standard-normal space, so that parameters of different units weigh alike: one vector,
            # whose distances are measured as a whole.
            rows[estimator].append((gradient * scale).reshape(-1, 1))
        known = np.stack(rows[judge.REFERENCE])
        usual = median(took[judge.REFERENCE])
        reference = judge.Verdict(
            judge.REFERENCE, 0.0, 0.0, judge.compare(known, known).sd, 1.0, runs=k + 1, ruling="reference"
        )
        for name in open_ones:
            seen = judge.compare(np.stack(rows[name]), known)
            found[name] = judge.Verdict(
                name,
                seen.bias,
                seen.uncertainty,
                seen.sd,
                median(took[name]) / max(usual, 1e-9),
                runs=k + 1,
                ruling=judge.rule(seen, k + 1, most=settings.audit_runs, convict_after=1),
            )
    estimator, reason = judge.choose((reference, *found.values()))
    # Of the estimator that was taken, or else of the one that came nearest.
    shown = found.get(estimator) or min(found.values(), key=lambda each: each.bias, default=reference)
    return Choice(estimator, reason, shown.bias, shown.uncertainty, reference.runs)


@dataclass
class Progress:
    """What a resumable calibration has done so far, for checkpoints."""

    choice: Choice | None = None
    prior_score: NDArray[np.float64] | None = None
    state: GviState | None = None

    def pack(self) -> dict[str, Any]:
        """Arrays, tensors and plain values."""
        return {
            "choice": None if self.choice is None else dataclasses.astuple(self.choice),
            "prior_score": self.prior_score,
            "state": None if self.state is None else self.state.pack(),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Progress:
        """What `pack` packed."""
        choice, state = packed["choice"], packed["state"]
        return cls(
            None if choice is None else Choice(*choice),
            packed["prior_score"],
            None if state is None else GviState.unpack(state),
        )

    @property
    def step(self) -> int:
        """Iterations done: the order of checkpoints."""
        return 0 if self.state is None else self.state.iteration


def run(
    parameters: Sequence[Parameter],
    backend: Backend,
    settings: Settings,
    *,
    held_out: bool,
    progress: Progress | None = None,
    save: Callable[[Progress], object] = lambda progress: None,
    on_iteration: Callable[[IterationRecord, int], None] = lambda record, iterations: None,
    deadline_passed: Callable[[], bool] = lambda: False,
) -> Study:
    """Calibrate.

    Args:
        parameters: with priors.
        backend: who evaluates.
        settings: what is asked for.
        held_out: whether days are held out for scoring.
        progress: of an interrupted calibration, to the same bits.
        save: called whenever something is done that need not be done again.
        on_iteration: for progress bars.
        deadline_passed: asked after each iteration; the fit ends early when it says so.
    """
    done = progress or Progress()
    if done.choice is None:
        done.choice = choose(parameters, backend, settings)
        logger.info("Gradient: %s (%s).", done.choice.estimator, done.choice.reason)
        save(done)
    estimator = done.choice.estimator
    prior = Prior.from_parameters(parameters)
    if held_out and done.prior_score is None:
        generator = torch.Generator().manual_seed(derive(settings.seed, "prior") >> 1)
        theta = prior.sample(settings.predictive_draws, generator).numpy()
        done.prior_score = backend.forecast(theta, PRIOR, "prior")
        save(done)

    def after(record: IterationRecord, state: GviState) -> bool:
        done.state = state
        save(done)
        on_iteration(record, settings.iterations)
        return deadline_passed()

    fitted = fit(
        prior,
        lambda theta, iteration: backend.evaluate(theta, iteration, estimator),
        iterations=settings.iterations,
        draws=settings.draws,
        weight=settings.weight,
        seed=settings.seed,
        stop_when_converged=True,
        on_iteration=after,
        state=done.state,
    )
    generator = torch.Generator().manual_seed(derive(settings.seed, "posterior") >> 1)
    draws = fitted.posterior.sample(settings.predictive_draws, generator)[0].numpy()
    score = backend.forecast(draws, POSTERIOR, "posterior")
    outputs = backend.outputs(draws, POSTERIOR + 1)
    scores = None
    if held_out and done.prior_score is not None and score[2] > 0:
        scores = Scores(
            float(score[0] / score[2]), float(done.prior_score[0] / score[2]), float(score[1] / score[2]), int(score[2])
        )
    return Study(fitted, done.choice, scores, draws, outputs)

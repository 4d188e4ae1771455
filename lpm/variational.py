"""`lpm.calibrate` on one device: federated variational calibration with a federation of one shard.

All institutions' people and series are in this process. Losses, gradients and forecasts are those that a federation
would open as sums, to the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.calibration.gvi import IterationRecord
from lpm.calibration.study import Progress, Settings, Study
from lpm.calibration.study import run as run_study
from lpm.errors import InputError
from lpm.estimators import candidates
from lpm.evidence import Evidence, Forecast
from lpm.flame.model import Model
from lpm.observation import Observation
from lpm.parameters import Parameter
from lpm.scenario import Scenario

__all__ = ["LocalBackend", "calibrate", "evidence_of"]


class LocalBackend:
    """A `study.Backend` in this process."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.forecasts: dict[str, Forecast] = {}

    def evaluate(
        self, theta: NDArray[np.float64], trajectory: int, estimator: str, *, replicates: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `study.Backend`."""
        return self.evidence.evaluate(theta, trajectory, estimator=estimator, replicates=replicates)

    def forecast(self, theta: NDArray[np.float64], trajectory: int, label: str) -> NDArray[np.float64]:
        """See `study.Backend`."""
        self.forecasts[label] = self.evidence.forecast(theta, trajectory)
        return self.forecasts[label].score

    def outputs(self, theta: NDArray[np.float64], trajectory: int) -> NDArray[np.float64]:
        """See `study.Backend`."""
        return ring.decode(self.evidence.words(theta, trajectory))


def evidence_of(scenario: Scenario, seed: int, executor: str = "auto") -> Evidence:
    """All institutions of a scenario as one shard."""
    observations = [scenario.observation(name) for name in scenario.institutions]
    return Evidence(
        scenario.build(),
        observations,
        parameters=scenario.parameters,
        steps=scenario.steps,
        held_out=scenario.held_out,
        seed=seed,
        step=scenario.gradient.step,
        replicates=scenario.calibration.replicates,
        executor=executor,
    )


def calibrate(
    model: Model | Scenario,
    data: Sequence[Observation] | Observation | None = None,
    *,
    steps: int | None = None,
    held_out: int = 0,
    iterations: int = 60,
    draws: int = 4,
    weight: float = 1.0,
    predictive_draws: int = 128,
    gradient: str = "auto",
    step: float = 0.05,
    seed: int = 0,
    on_iteration: Callable[[IterationRecord, int], None] = lambda record, iterations: None,
) -> Study:
    """Calibrate a model to series by variational inference.

    Args:
        model: a model with all its people; or a scenario, which brings data and settings (the arguments below are then
            ignored, but for `seed`).
        data: one `lpm.observation.Observation` per institution.
        steps: T; the length of the series by default.
        held_out: last steps that are scored but not fitted.
        iterations: optimiser steps.
        draws: parameter draws per step.
        weight: of the KL term; 1 is Bayes.
        predictive_draws: draws of the forecasts.
        gradient: "auto" (an audit chooses), "fd", "tangent" or "alternates".
        step: of finite differences, relative.
        seed: of draws and simulations.
        on_iteration: receives each iteration's record and their number.

    Returns:
        The posterior with its checks; `headline()` begins with what failed.

    Raises:
        InputError: for missing data, or a parameter that is declared twice, differently.
    """
    if isinstance(model, Scenario):
        return resumable(
            evidence_of(model, seed), model, seed, None, lambda progress: None, on_iteration, lambda: False
        )[0]
    if data is None:
        raise InputError("There is nothing to calibrate to.", "Give data=[lpm.observation.Observation(…)].")
    observations = [data] if isinstance(data, Observation) else list(data)
    parameters = joined(model, observations)
    evidence = Evidence(
        model,
        observations,
        parameters=parameters,
        steps=steps or observations[0].steps,
        held_out=held_out,
        seed=seed,
        step=step,
    )
    settings = Settings(iterations, draws, weight, predictive_draws, seed, gradient, candidates=candidates(model))
    return run_study(parameters, LocalBackend(evidence), settings, held_out=held_out > 0, on_iteration=on_iteration)


def joined(model: Model, observations: Sequence[Observation]) -> tuple[Parameter, ...]:
    """The model's parameters, then those that only the observations have."""
    found: dict[str, Parameter] = {parameter.name: parameter for parameter in model.parameters}
    for observation in observations:
        for parameter in observation.parameters:
            if found.setdefault(parameter.name, parameter) != parameter:
                raise InputError(f"The parameter {parameter.name} is declared twice, differently.")
    return tuple(found.values())


def resumable(
    evidence: Evidence,
    scenario: Scenario,
    seed: int,
    found: Mapping[str, Any] | None,
    save: Callable[[Progress], object],
    on_iteration: Callable[[IterationRecord, int], None],
    deadline_passed: Callable[[], bool],
) -> tuple[Study, LocalBackend]:
    """A scenario's calibration with checkpoints, for the command."""
    backend = LocalBackend(evidence)
    study = run_study(
        scenario.parameters,
        backend,
        dataclasses.replace(scenario.study_settings(seed), candidates=candidates(evidence.model)),
        held_out=scenario.held_out > 0,
        progress=None if found is None else Progress.unpack(found),
        save=save,
        on_iteration=on_iteration,
        deadline_passed=deadline_passed,
    )
    return study, backend

"""`lpm.simulate` and `lpm.calibrate` on one device: the Local world, with results as labelled arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lpm.analysis.audit import Audit, resolve_estimator
from lpm.estimators import REGISTRY, Evaluation, evaluate, require_estimator, to_lanes
from lpm.flame.model import Model
from lpm.labels import to_dataset
from lpm.rng import require_seed
from lpm.simulation import Keeper

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True, eq=False)
class Simulation:
    """The result of `simulate`.

    Attributes:
        outputs: one variable per output: time (× draw), with units.
        gradient: one variable per output: time (× draw) × parameter, or None.
        estimator: what gave the gradient.
        executor: what ran the contagions.
        audit: the gradient audit, where `gradient="auto"`.
        words: the exact outputs, 32 fraction bits [T, O, K].
    """

    outputs: xr.Dataset
    gradient: xr.Dataset | None
    estimator: str
    executor: str
    audit: Audit | None
    words: NDArray[np.int64]


def simulate(
    model: Model,
    params: Mapping[str, Any] | None = None,
    *,
    steps: int,
    seed: int = 0,
    gradient: str = "none",
    mode: str = "forward",
    step: float = 0.02,
    executor: str = "auto",
    keeper: Keeper | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Simulate a model in this process, with derivatives if asked.

    Args:
        model: with all its people.
        params: parameter name → value, or K values for K draws that share their random numbers.
        steps: number of steps (days).
        seed: of all random numbers.
        gradient: "none", an estimator of `lpm.estimators.REGISTRY`, or "auto" (an audit on this model chooses).
        mode: "forward", or "reverse" (one pass back for every output and step, where the estimator has it).
        step: of finite differences, relative to the parameter.
        executor: "auto", "reference", "cpu", or "device:cuda"; see `simulation.choose_executor`.
        keeper: checkpoints.
        progress: called with (steps done, steps).

    Returns:
        Labelled outputs and, if asked, their gradient: output × time × parameter.

    Raises:
        InputError: before any work.

    Guarantee: for one seed the outputs are the same to the bit for any executor and order of agents.
    """
    theta, seed = to_lanes(model.parameters, params or {}), require_seed(seed)
    if gradient != "auto":
        require_estimator(gradient, model, mode)
    estimator, audit = resolve_estimator(model, theta, gradient, steps=steps, seed=seed, step=step, mode=mode)
    if estimator in REGISTRY and mode not in REGISTRY[estimator].modes:
        mode = "forward"  # what the audit chose has no other
    result = evaluate(
        model,
        theta,
        estimator=estimator,
        steps=steps,
        seed=seed,
        mode=mode,
        step=step,
        executor=executor,
        cotangent=every_output if mode == "reverse" else None,
        keeper=keeper,
        progress=progress,
    )
    several = theta.shape[0] > 1
    derivative = _derivative(result, len(model.recorded), steps)
    return Simulation(
        to_dataset(model, result.outputs, draws=several),
        None if derivative is None else to_dataset(model, derivative, draws=several, parameters=True),
        estimator,
        result.executor,
        audit,
        result.words,
    )


def every_output(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cotangents that pick each output at each step in turn [T·O, T, O, K]."""
    steps, count, draws = outputs.shape
    picks = np.eye(steps * count).reshape(steps * count, steps, count, 1)
    return np.broadcast_to(picks, (*picks.shape[:3], draws))


def _derivative(result: Evaluation, outputs: int, steps: int) -> NDArray[np.float64] | None:
    if result.gradient is not None:
        return result.gradient.reshape(steps, outputs, *result.gradient.shape[1:])
    return result.derivative

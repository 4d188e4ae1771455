"""What derivatives cost on W, the reference workload, beside a plain run in the same process."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lpm.bench.workload import default_values, workload
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.processes import peak_memory_mb

__all__ = ["bench_gradients"]

FUSED = {"alternates": ("forward", "reverse"), "tangent": ("forward",)}
"""The modes in which the compiled executor carries an estimator."""


def bench_gradients(
    agents: int, days: int, parameters: int = 4, layers: int = 1, seed: int = 0, estimator: str = "alternates"
) -> dict[str, Any]:
    """Time a plain run, forward mode and, where it is fused too, reverse mode of W over a whole epidemic.

    Args:
        agents: how many.
        days: how many, from 2.
        parameters: P.
        layers: 1 for households, 2 for workplaces too.
        seed: of population and epidemic.
        estimator: `alternates` or `tangent`.

    Returns:
        agents, days, parameters, layers, estimator, attack_rate, plain_day_ms, forward_day_ms, reverse_day_ms, of
        one scalar (None for `tangent`, whose way back runs in torch), and peak_rss_mb, of this process; times are
        means over all days, the start included.

    Raises:
        InputError: fewer than two days, or another estimator.
    """
    if days < 2:
        raise InputError(f"`--days` is {days}: a whole number from 2.")
    if estimator not in FUSED:
        raise InputError(f"`--gradient` is {estimator!r}: one of {', '.join(FUSED)} is timed.")
    names = ("household", "workplace")[:layers]
    theta = default_values(parameters)
    took: dict[str, float | None] = {"plain": None, "forward": None, "reverse": None}
    runs = {"plain": ("none", "forward"), **{mode: (estimator, mode) for mode in FUSED[estimator]}}
    attack = 0.0
    populations = (5_000, agents)  # the first compiles
    models = [workload(people, seed, parameters=parameters, layers=names) for people in populations]
    for people, model in zip(populations, models, strict=True):
        for name, (method, mode) in runs.items():
            began = time.perf_counter()
            found = evaluate(
                model,
                theta,
                estimator=method,
                mode=mode,
                steps=days if people == agents else 2,
                seed=seed,
                cotangent=lambda outputs: np.ones((1, *outputs.shape)),
            )
            took[name] = 1e3 * (time.perf_counter() - began) / days
            attack = 1.0 - found.outputs[-1, 1, 0] / people
    return {
        "agents": agents,
        "days": days,
        "parameters": parameters,
        "layers": layers,
        "estimator": estimator,
        "attack_rate": attack,
        **{f"{name}_day_ms": value for name, value in took.items()},
        "peak_rss_mb": peak_memory_mb(),
    }

"""All sensitivities of the reference workload in one go: every output of every day by every parameter."""

from __future__ import annotations

import time
from typing import Any

from lpm.analysis.sensitivity import sensitivity
from lpm.bench.workload import PARAMETERS, workload
from lpm.errors import InputError
from lpm.processes import peak_memory_mb

__all__ = ["bench_sensitivity"]


def bench_sensitivity(
    agents: int, days: int, parameters: int, gradient: str, seed: int = 0, executor: str = "auto"
) -> dict[str, Any]:
    """Time the sensitivities of W.

    Args:
        agents: how many.
        days: how many.
        parameters: the first so many of `PARAMETERS`.
        gradient: an estimator; the reference workload is too large for an audit.
        seed: of population and epidemic.
        executor: see `simulation.choose_executor`.

    Returns:
        `building_s` and `computing_s`, `peak_rss_mb`, `attack_rate`, how many `derivatives` were found, and for each
        parameter the elasticity of all infections.

    Raises:
        InputError: for a number of parameters that there isn't, or `gradient="auto"`.
    """
    if gradient in ("auto", "none"):
        raise InputError(f"`--gradient` is {gradient}: name an estimator.", "An audit would repeat the run many times.")
    if not 1 <= parameters <= len(PARAMETERS):
        raise InputError(f"`--parameters` is {parameters}: a whole number from 1 to {len(PARAMETERS)}.")
    began = time.perf_counter()
    model = workload(agents, seed, parameters=parameters)
    built = time.perf_counter()
    values = {name: value for name, (value, _) in list(PARAMETERS.items())[:parameters]}
    found = sensitivity(
        model, values, steps=days, seed=seed, gradient=gradient, targets=["infections:total"], executor=executor
    )
    done = time.perf_counter()
    elasticity = found.targets.set_index("parameter")["elasticity"]
    return {
        "agents": agents,
        "days": days,
        "gradient": found.label,
        "executor": found.executor,
        "building_s": round(built - began, 2),
        "computing_s": round(done - built, 2),
        "peak_rss_mb": round(peak_memory_mb(), 1),
        "attack_rate": round(float(found.outputs["infections"].sum()) / agents, 4),
        "derivatives": parameters * days * len(model.recorded),
        **{f"elasticity_{name}": round(float(elasticity[name]), 4) for name in values},
    }

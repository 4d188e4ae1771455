"""W, the reference workload: a city of households, workplaces and community cells with an SEIR epidemic.

Made of the public interface alone, so that what is timed is what a modeller gets. Households have 1 to 6 people (2.5 on
average) and are sorted; everybody is also in a workplace or school (mean 20), drawn from the whole population, and in a
community cell of neighbouring households (mean 1,000).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpm import simulation
from lpm.errors import InputError
from lpm.flame.contagion import Contagion, leave
from lpm.flame.model import Model, count, flow
from lpm.memory import require_memory
from lpm.networks import Groups
from lpm.parameters import Expression, Parameter
from lpm.population.people import Population
from lpm.processes import peak_memory_mb

__all__ = ["PARAMETERS", "STAGES", "bench_workload", "day_timer", "default_values", "places", "workload"]

STAGES = ("S", "E", "I", "R")

PARAMETERS: dict[str, tuple[float, str]] = {
    "household": (0.20, "1/day"),
    "workplace": (0.16, "1/day"),
    "community": (0.12, "1/day"),
    "recovery": (1 / 6, "1/day"),
    "onset": (1 / 3, "1/day"),
    "initial": (0.001, ""),
}
"""Value and unit; the first P of them are parameters of `workload(parameters=P)`, the others constants."""

_HOUSEHOLD_SIZES = (0.31, 0.28, 0.16, 0.14, 0.07, 0.04)
_WORKPLACE, _COMMUNITY = 20, 1000


def places(agents: int, seed: int = 0) -> dict[str, NDArray[np.int32]]:
    """Household, workplace and community cell of each agent, each [agents], sorted by household.

    Args:
        agents: how many.
        seed: of the sizes and of who works where.
    """
    rng = np.random.default_rng(seed)
    # Enough households for all agents whatever the draw: the mean is 2.5, and sizes are independent.
    enough = int(agents / 2.5 + 4 * np.sqrt(agents) + 8)
    sizes = rng.choice(np.arange(1, 7, dtype=np.int8), size=enough, p=_HOUSEHOLD_SIZES)
    first = np.cumsum(sizes, dtype=np.int32) - sizes
    household = np.repeat(np.arange(enough, dtype=np.int32), sizes)[:agents]
    return {
        "household": household,
        "workplace": rng.integers(0, max(1, agents // _WORKPLACE), size=agents, dtype=np.int32),
        "community": (first // np.int32(_COMMUNITY))[household],
    }


def workload(
    agents: int,
    seed: int = 0,
    *,
    parameters: int = 0,
    shared: tuple[str, ...] = (),
    layers: tuple[str, ...] = ("household", "workplace"),
) -> Model:
    """W as a model.

    Args:
        agents: how many.
        seed: of the population.
        parameters: how many of `PARAMETERS`, in their order, may vary; the rest are constants.
        shared: networks whose sums pass ⊕, for runs on several ranks.
        layers: small groups that the gradient `alternates` follows exactly.

    Raises:
        InputError: for fewer agents than a workplace has or more than fit the memory, or a number of parameters that
            there isn't.
    """
    if agents < _WORKPLACE:
        raise InputError(f"The workload has {agents} agents: a whole number from {_WORKPLACE}.")
    if not 0 <= parameters <= len(PARAMETERS):
        raise InputError(f"The workload has {parameters} parameters: from 0 to {len(PARAMETERS)}.")
    require_memory(agents)
    value: dict[str, Expression | float] = {
        name: Parameter(name, prior=f"lognormal({np.log(number):.6g}, 0.2)", unit=unit) if k < parameters else number
        for k, (name, (number, unit)) in enumerate(PARAMETERS.items())
    }
    where = places(agents, seed)
    disease = Contagion(
        stages=" ".join(STAGES),
        infection="S -> E",
        infectious={"I": 1.0},
        over={name: value[name] for name in where},
        progression={"I -> R": leave(probability=value["recovery"]), "E -> I": leave(probability=value["onset"])},
        initial={"I": value["initial"]},
    )
    networks = [
        Groups(
            name,
            of=of,
            shared=name in shared,
            groups=int(of.max()) + 1 if name in shared else None,
            layer=name in layers,  # of the gradient `alternates`: a community is too large to be one
        )
        for name, of in where.items()
    ]
    outputs = {"infections": flow("S -> E")} | {stage: count(stage) for stage in STAGES}
    return Model(Population(agents), networks, [disease], outputs=outputs)


def default_values(parameters: int) -> NDArray[np.float64]:
    """W's values of its first P parameters, as one draw [1, P]."""
    return np.array([[value for value, _ in list(PARAMETERS.values())[:parameters]]])


def day_timer() -> tuple[Callable[[int, int], None], Callable[[], list[float]]]:
    """A progress callback, and what it has measured: seconds of each day after the first."""
    marks: list[float] = []
    return lambda done, steps: marks.append(time.perf_counter()), lambda: np.diff(marks).tolist()


def bench_workload(agents: int, days: int, seed: int = 0, executor: str = "auto") -> dict[str, Any]:
    """Time W, day by day, without the making of the population.

    Args:
        agents: how many.
        days: how many, from 2.
        seed: of population and epidemic.
        executor: see `simulation.choose_executor`.

    Returns:
        agents, days, median_day_ms, agent_steps_per_s, peak_rss_mb (of this process, the interpreter and the making of
        the population included), final_counts (people in S, E, I, R on the last day); on a GPU also peak_device_mb.
    """
    if days < 2:
        raise InputError(f"`--days` is {days}: a whole number from 2, since the first day warms up.")
    model = workload(agents, seed)
    # The hot loop is compiled, or loaded from the cache, before anything is timed.
    simulation.run(workload(10 * _COMMUNITY), default_values(0), steps=2, seed=seed, executor=executor)
    mark, measured = day_timer()
    found = simulation.run(model, default_values(0), steps=days, seed=seed, executor=executor, progress=mark)
    median = statistics.median(measured())
    device = found.executor.partition(":")[2]
    on_device = {"peak_device_mb": torch.cuda.max_memory_allocated(device) / 2**20} if "cuda" in device else {}
    return {
        "agents": agents,
        "days": days,
        "median_day_ms": 1e3 * median,
        "agent_steps_per_s": agents / median,
        "peak_rss_mb": peak_memory_mb(),
        "final_counts": [int(number) for number in found.outputs[-1, 1:, 0]],
        **on_device,
    }

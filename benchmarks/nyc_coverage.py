"""How often the calibration of the five boroughs holds the truth: simulated waves with known parameters, one by one.

    python benchmarks/nyc_coverage.py [--repetitions 20]        # goes on where it was stopped

A truth is drawn from the prior. The same model with all 8.3 million people, one agent each (other people, other random
numbers), makes every borough's expected series; each borough gets a factor of its own, and reporting noise.
`nyc_boroughs` at its own size is then calibrated to these series as it would be to real ones, on the fitted days alone.

Writes benchmarks/figures/nyc_coverage.json. The posterior is Gaussian in the prior's standard-normal space (u), where
every prior sd is 1, so its mean and sd there hold all that intervals need. Other weights of the KL term are judged from
the same gradients, by the quadratic model that the fit itself ends with, and are labelled so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lpm import console  # noqa: E402
from lpm.calibration.diagnostics import coverage_limits  # noqa: E402
from lpm.calibration.gvi import Fit, fit  # noqa: E402
from lpm.calibration.natural_gradient import model_of_gradients, natural_step  # noqa: E402
from lpm.calibration.priors import Prior  # noqa: E402
from lpm.evidence import Evidence  # noqa: E402
from lpm.institution_effect import InstitutionEffect  # noqa: E402
from lpm.rng import derive  # noqa: E402
from lpm.scenario import Scenario, load  # noqa: E402
from lpm.simulation import run as simulate  # noqa: E402

WEIGHTS = (1.0, 2.0, 3.0, 4.0, 8.0)
LEVEL, REACH = 0.9, 1.6449
"""Credibility of the intervals, and their half width in standard deviations."""


def synthetic(
    observation: InstitutionEffect, outputs: dict[str, torch.Tensor], theta: dict[str, torch.Tensor], seed: int
) -> InstitutionEffect:
    """The observation with series that were made by known parameters; days that are not scored stay unscored."""
    inner = observation.observation
    z = observation.sd * np.random.default_rng(seed).standard_normal()
    scaled = {name: value * float(np.exp(z)) for name, value in outputs.items()}
    made = inner.predict(scaled, theta, torch.Generator().manual_seed(seed))
    series = [
        dataclasses.replace(each, values=np.where(np.isnan(each.values), np.nan, made[each.name][0]))
        for each in inner.series
    ]
    return InstitutionEffect(dataclasses.replace(inner, series=series), observation.sd, observation.learn)


def at_weight(found: Fit, weight: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [P] and sd [P] in u for another weight, from the gradients of the last half of a fit."""
    state = found.state
    recent = state.when >= state.iteration // 2
    location, factor = found.posterior.location, found.posterior.factor
    for _ in range(20):
        model = model_of_gradients(
            state.u[recent], state.gradient[recent], state.when[recent], location, factor, weight
        )
        step = natural_step(model, weight)
        location, factor = step.location, step.factor
    return location.numpy(), factor.square().sum(dim=1).sqrt().numpy()


def repeat(
    number: int, scenario: Scenario, larger: Scenario, worlds: tuple[Any, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One truth, its data, its calibration."""
    prior = Prior.from_parameters(scenario.parameters)
    seed = derive(arguments.seed, "coverage", number) >> 1
    true_u = torch.randn((1, len(prior)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    true = prior.to_parameter(true_u)
    town, city = worlds
    names = list(prior.names)
    columns = [names.index(parameter.name) for parameter in city.parameters]
    executor = "auto" if arguments.device is None else f"device:{arguments.device}"
    values = true[:, columns].numpy()
    made = simulate(city, values, steps=larger.steps, seed=derive(seed, "truth"), executor=executor)
    outputs = {name: torch.from_numpy(made.outputs[:, k]).T for k, name in enumerate(city.recorded)}
    theta = {name: true[:, k] for k, name in enumerate(names)}
    observations = [
        synthetic(scenario.observation(name), outputs, theta, derive(seed, "reports", name) >> 1)
        for name in scenario.institutions
    ]
    evidence = Evidence(
        town,
        observations,
        parameters=scenario.parameters,
        steps=scenario.steps,
        held_out=0,
        seed=derive(seed, "fit"),
        step=scenario.gradient.step,
        replicates=scenario.calibration.replicates,
        executor=executor,
    )
    with console.progress(f"Wave {number + 1}", scenario.calibration.iterations) as advance:
        found = fit(
            prior,
            lambda values, iteration: evidence.evaluate(values, iteration, estimator="fd"),
            iterations=scenario.calibration.iterations,
            draws=scenario.calibration.draws,
            weight=scenario.calibration.weight,
            seed=number,
            on_iteration=lambda record, state: advance(f"loss {record.loss:.1f}"),
        )
    last = found.records[-1]
    others = {weight: at_weight(found, weight) for weight in WEIGHTS}
    susceptible = made.outputs[:, list(city.recorded).index("susceptible"), 0]
    return {
        "repetition": number,
        "truth": dict(zip(names, true[0].tolist(), strict=True)),
        "infected_share": float(1.0 - susceptible[-1] / scenario.people),
        "reported": sum(float(np.nansum(series.values)) for each in observations for series in each.series),
        "u_truth": true_u[0].tolist(),
        "u_mean": list(last.mean),
        "u_sd": list(last.sd),
        "converged": found.converged,
        "advice": found.advice,
        "other_weights": {str(w): {"u_mean": m.tolist(), "u_sd": s.tolist()} for w, (m, s) in others.items()},
    }


def summary(scenario: Scenario, agents: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the repetitions say."""
    names = [parameter.name for parameter in scenario.parameters]
    truth = np.array([each["u_truth"] for each in found])

    def covered(mean: NDArray[np.float64], sd: NDArray[np.float64]) -> dict[str, Any]:
        inside = (np.abs(truth - mean) <= REACH * sd).sum(axis=0)
        error = np.sqrt((((truth - mean) / sd) ** 2).mean(axis=0))
        return {
            "held": dict(zip(names, inside.tolist(), strict=True)),
            "held_share": round(float(inside.sum() / truth.size), 3),
            "posterior_sd_over_prior_sd": dict(zip(names, np.median(sd, axis=0).round(3).tolist(), strict=True)),
            "rms_error_in_posterior_sd": dict(zip(names, error.round(2).tolist(), strict=True)),
        }

    def stacked(key: str, source: list[dict[str, Any]]) -> NDArray[np.float64]:
        return np.array([each[key] for each in source])

    low, high = coverage_limits(len(found), LEVEL, 0.95)
    settings = scenario.calibration
    return {
        "what": "90 % intervals of nyc_boroughs on simulated waves; own computation by benchmarks/nyc_coverage.py",
        "agents": scenario.agents,
        "agents_of_the_truth": agents,
        "days": scenario.steps,
        "iterations": settings.iterations,
        "draws": settings.draws,
        "replicates": settings.replicates,
        "weight": settings.weight,
        "step": scenario.gradient.step,
        "repetitions": len(found),
        "converged": sum(each["converged"] for each in found),
        "expected_of_90_percent_intervals": f"{low} to {high} of {len(found)}",
        "as_fitted": covered(stacked("u_mean", found), stacked("u_sd", found)),
        "other_weights_by_the_quadratic_model": {
            str(weight): covered(
                stacked("u_mean", [each["other_weights"][str(weight)] for each in found]),
                stacked("u_sd", [each["other_weights"][str(weight)] for each in found]),
            )
            for weight in WEIGHTS
        },
        "waves": found,
    }


def main() -> None:
    """Run what is missing and write after each repetition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first, to share the work among processes")
    parser.add_argument("--agents-of-truth", type=int, default=8_336_817)
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--replicates", type=int, default=None)
    parser.add_argument("--weight", type=float, default=None)
    parser.add_argument("--device", help="a torch device to run on, to the same bits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="files of other processes to take in")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "figures" / "nyc_coverage.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenario = load(ROOT / "simulations" / "nyc_boroughs")
    asked = {"iterations": arguments.iterations, "replicates": arguments.replicates, "weight": arguments.weight}
    calibration = dataclasses.replace(
        scenario.calibration, **{name: value for name, value in asked.items() if value is not None}
    )
    fitted = scenario.steps - scenario.held_out
    scenario = dataclasses.replace(scenario, steps=fitted, held_out=0, calibration=calibration)
    larger = dataclasses.replace(scenario, agents=arguments.agents_of_truth)
    found: dict[int, dict[str, Any]] = {}
    for path in [arguments.out, *arguments.merge]:
        if path.is_file():
            found |= {each["repetition"]: each for each in json.loads(path.read_text())["waves"]}
    missing = [k for k in range(arguments.first, arguments.first + arguments.repetitions) if k not in found]
    worlds = (scenario.build(), larger.build(seed=1)) if missing else (None, None)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for number in missing:
        found[number] = repeat(number, scenario, larger, worlds, arguments)
        _write(arguments.out, scenario, larger, found)
    if found:
        _write(arguments.out, scenario, larger, found)


def _write(path: Path, scenario: Scenario, larger: Scenario, found: dict[int, dict[str, Any]]) -> None:
    text = json.dumps(summary(scenario, larger.agents, [found[k] for k in sorted(found)]), indent=1) + "\n"
    scratch = path.with_suffix(".part")
    scratch.write_text(text)
    scratch.replace(path)


if __name__ == "__main__":
    main()

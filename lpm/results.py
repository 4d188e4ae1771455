"""From what was computed to what a person reads: outputs, posterior, figures and page of a run.

The coordinator and the Local world write the same files; neither needs a simulator for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from lpm.calibration.priors import Prior
from lpm.calibration.study import Study
from lpm.report import (
    Fact,
    Fit,
    Material,
    Score,
    summarise_outputs,
    summarise_parameters,
    tabulate_fits,
    write_report,
)
from lpm.rng import derive
from lpm.runs import Run
from lpm.scenario import Scenario

__all__ = ["label_outputs", "parameter_rows", "summarise", "write_simulation", "write_study"]


def label_outputs(scenario: Scenario, values: NDArray[np.float64]) -> xr.Dataset:
    """Public outputs [T, O] or [T, O, M] as a dataset with dates and units."""
    dates = (np.datetime64(scenario.start, "D") + np.arange(values.shape[0])).astype("datetime64[ns]")
    dims = ("time",) if values.ndim == 2 else ("time", "draw")
    return xr.Dataset(
        {
            name: (dims, values[:, k], {"units": output.unit, "long_name": output.description or name})
            for k, (name, output) in enumerate(scenario.outputs.items())
        },
        coords={"time": dates},
        attrs={"scenario": scenario.name, "scenario_hash": scenario.hash},
    )


def write_simulation(
    run: Run,
    scenario: Scenario,
    outputs: xr.Dataset,
    *,
    facts: Sequence[Fact],
    gradient: xr.Dataset | None = None,
    headline: str,
    values: Mapping[str, float],
) -> dict[str, Any]:
    """Write a simulation's files and say in a few values what came out.

    Returns:
        the summary that `--json` prints.
    """
    run.write_outputs(outputs)
    if gradient is not None:
        gradient.to_netcdf(run.path / "gradient.nc", engine="h5netcdf")
    rows = parameter_rows(scenario, values)
    report = write_report(
        run, Material(headline=[headline], parameters=rows, outputs=outputs, gradient=gradient, privacy=facts)
    )
    return summarise(run, scenario, headline, rows, outputs, report, {})


def write_study(
    run: Run,
    scenario: Scenario,
    study: Study,
    *,
    fits: Sequence[Fit],
    withheld: Sequence[str],
    facts: Sequence[Fact],
    seed: int,
) -> dict[str, Any]:
    """Write a calibration's files and say in a few values what came out.

    Returns:
        the summary that `--json` prints.
    """
    outputs = label_outputs(scenario, study.outputs)
    run.write_outputs(outputs)
    posterior = study.fit.posterior.to_frame(2000, derive(seed, "frame") >> 1)
    run.write_posterior(posterior)
    if fits:
        run.write_fits(tabulate_fits(fits))
    names = [parameter.name for parameter in scenario.parameters]
    generator = torch.Generator().manual_seed(derive(seed, "prior frame") >> 1)
    prior = posterior[names].copy()
    prior[names] = Prior.from_parameters(scenario.parameters).sample(len(prior), generator).numpy()
    rows = summarise_parameters(
        posterior[names],
        prior,
        {p.name: p.unit for p in scenario.parameters},
        {p.name: p.label for p in scenario.parameters},
    )
    headline = study.headline()
    scores = {}
    table = []
    if study.scores is not None:
        found = study.scores
        scores = {
            "posterior": found.posterior,
            "prior": found.prior,
            "persistence": found.persistence,
            "observations": found.observations,
            "meaning": "mean log score of a held-out observation",
        }
        table = [
            Score(
                "all together",
                found.posterior * found.observations,
                found.prior * found.observations,
                found.persistence * found.observations,
                found.observations,
            )
        ]
    history = [{"iteration": record.iteration, "loss": record.loss, "kl": record.kl} for record in study.fit.records]
    passed = study.fit.converged and (
        study.scores is None or study.scores.posterior > max(study.scores.prior, study.scores.persistence)
    )
    report = write_report(
        run,
        Material(
            headline=[headline],
            passed=passed,
            parameters=rows,
            fits=fits,
            withheld=withheld,
            scores=table,
            prior=prior,
            posterior=posterior[names],
            history=history,
            outputs=outputs,
            privacy=facts,
            checks={
                "gradient": f"{study.choice.estimator}: {study.choice.reason}",
                "convergence": study.fit.headline(),
            },
        ),
    )
    summary = summarise(run, scenario, headline, rows, outputs, report, scores)
    return summary | {"gradient": study.choice.estimator, "converged": study.fit.converged}


def parameter_rows(scenario: Scenario, values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters of a run that changes nothing but them, for tables."""
    return [
        {
            "name": each.parameter.name,
            "unit": each.parameter.unit,
            "label": each.parameter.label,
            "value": values.get(each.parameter.name, each.value),
        }
        for each in scenario.declared
        if each.role == "dynamics"
    ]


def summarise(
    run: Run,
    scenario: Scenario,
    headline: str,
    rows: Sequence[Mapping[str, Any]],
    outputs: xr.Dataset,
    report: Any,
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """What came out, in a few values: what `--json` prints."""
    record = run.record()
    return {
        "run": str(run.path),
        "scenario": scenario.name,
        "world": record.get("world", ""),
        "headline": headline,
        "parameters": list(rows),
        "scores": dict(scores),
        "outputs": summarise_outputs(outputs),
        "timings": record.get("timings", {}),
        "report": str(report),
    }

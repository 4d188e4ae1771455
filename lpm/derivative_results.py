"""From derivatives to what a person reads: the files of a sensitivity and of a gradient audit.

Beside `lpm.results`, which a coordinator uses too and which therefore knows no simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lpm.analysis.audit import Audit
from lpm.analysis.sensitivity import Sensitivity
from lpm.checkpoint import atomic_file
from lpm.estimators import REGISTRY
from lpm.judge import LIMIT
from lpm.report import Fact, Material, Panel, write_report
from lpm.report.derivatives import draw_audit, draw_elasticities, plain_rows, rows_of
from lpm.results import parameter_rows, summarise
from lpm.runs import Run
from lpm.scenario import Scenario

__all__ = ["write_audit", "write_sensitivity"]


def write_sensitivity(run: Run, scenario: Scenario, found: Sensitivity, *, facts: Sequence[Fact]) -> dict[str, Any]:
    """Write a sensitivity's files and say in a few values what came out.

    Returns:
        the summary that `--json` prints.
    """
    public = list(scenario.outputs)
    outputs = found.outputs[public]
    for name, each in scenario.outputs.items():
        outputs[name].attrs.update(units=each.unit, long_name=each.description or name)
    run.write_outputs(outputs)
    with atomic_file(run.path / "sensitivity.nc") as temporary:
        found.dataset().to_netcdf(temporary, engine="h5netcdf")
    for name, table in (("targets", found.targets), ("ranking", found.ranking)):
        with atomic_file(run.path / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    of_public = found.ranking[found.ranking["output"].str.partition(":")[0].isin(public)]
    headline = _strongest(found.ranking if of_public.empty else of_public)  # or what was asked for by its name
    if REGISTRY[found.estimator].biased:
        headline.insert(0, f"DERIVATIVES BIASED: {found.estimator} is for comparison only.")
    own = found.derivative is not None
    shown = {"output": "output" if own else "target", "rank": "rank", "parameter": "parameter"} | (
        {"importance": "mean |elasticity|", "elasticity_of_total": "elasticity of the total"}
        if own
        else {"elasticity": "elasticity"}
    )
    if "importance_se" in found.ranking:
        shown["importance_se"] = "standard error"
    leading = found.ranking[found.ranking["rank"] <= 10]  # of each output
    rows = rows_of(leading, list(shown))
    report = write_report(
        run,
        Material(
            headline=headline,
            parameters=parameter_rows(scenario, found.theta),
            outputs=outputs,
            gradient=None if found.derivative is None else found.derivative[public],
            privacy=facts,
            panels=[
                Panel(
                    "elasticities",
                    "What each output answers to",
                    "Per cent of an output for one per cent of a parameter. A total is over all days; a peak is the "
                    "value on the day of the largest.",
                    lambda path: draw_elasticities(found.targets, path),
                    list(shown.values()),
                    [[str(cell).replace("_", " ") if isinstance(cell, str) else cell for cell in row] for row in rows],
                )
            ],
        ),
    )
    summary = summarise(run, scenario, " ".join(headline), parameter_rows(scenario, found.theta), outputs, report, {})
    return summary | {
        "gradient": found.estimator,
        "mode": found.mode,
        "replicates": found.replicates,
        "sensitivities": plain_rows(found.targets),
        "ranking": plain_rows(found.ranking),
    }


def _strongest(ranking: pd.DataFrame) -> list[str]:
    """One line per output or target: its strongest parameters, by the mean of |elasticity| over time."""
    lines = []
    for name, table in ranking.groupby("output", sort=False):
        first = table[table["importance"] > 0].head(3)
        words = ", ".join(f"{row.parameter} ({row.importance:.2f})" for row in first.itertuples())
        lines.append(f"{name} answers most to {words}." if words else f"{name} answers to no parameter.")
    return lines if len(lines) <= 6 else [*lines[:6], f"And {len(lines) - 6} more in ranking.csv."]


def write_audit(run: Run, scenario: Scenario, audit: Audit, *, facts: Sequence[Fact]) -> dict[str, Any]:
    """Write a gradient audit's files and say in a few values what came out.

    Returns:
        the summary that `--json` prints.
    """
    table = audit.table()
    with atomic_file(run.path / "audit.csv") as temporary:
        table.to_csv(temporary, index=False)
    columns = {
        "label": "estimator",
        "ruling": "ruling",
        "bias": "bias",
        "bias_se": "its s.e.",
        "sd": "sd of one run",
        "cost": "time (plain run = 1)",
        "wrong_signs": "wrong signs",
        "clear_signs": "of",
        "runs": "runs",
        "note": "note",
    }
    headline = f"Use {audit.chosen}: {audit.reason}."
    report = write_report(
        run,
        Material(
            headline=[headline],
            parameters=parameter_rows(scenario, scenario.defaults),
            privacy=facts,
            panels=[
                Panel(
                    "audit",
                    "How true each estimator is here",
                    "Against finite differences with the same seeds, on derivatives of cumulative outputs: relative L1 "
                    "distance of the means, worst parameter. Signs count where finite differences are clear (5 "
                    "standard errors).",
                    lambda path: draw_audit(table, LIMIT, path),
                    list(columns.values()),
                    rows_of(table, list(columns)),
                )
            ],
        ),
    )
    record = run.record()
    return {
        "run": str(run.path),
        "scenario": scenario.name,
        "headline": headline,
        "chosen": audit.chosen,
        "reason": audit.reason,
        "estimators": plain_rows(table),
        "timings": record.get("timings", {}),
        "report": str(report),
    }

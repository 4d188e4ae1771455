"""What a report is made of: plain values that a command collects, and the tables that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Fact", "Fit", "Material", "Panel", "Score", "summarise_outputs", "summarise_parameters", "tabulate_fits"]


@dataclass(frozen=True, eq=False)
class Fit:
    """What one institution released of the fit to one of its series.

    Args:
        institution: who released it.
        series: the series' name, such as `admissions`.
        dates: [T] datetime64, one per value.
        observed: [T]; NaN where nothing was observed.
        quantiles: [5, T] of the posterior predictive at 5, 25, 50, 75 and 95 %.
        held_out: index of the first value that was not fitted to; None: all were.
        unit: of the values.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    institution: str
    series: str
    dates: NDArray[np.datetime64]
    observed: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    held_out: int | None = None
    unit: str = "people/day"

    def __post_init__(self) -> None:
        """Turn everything into arrays and compare their shapes."""
        object.__setattr__(self, "dates", np.asarray(self.dates, dtype="datetime64[D]"))
        object.__setattr__(self, "observed", np.asarray(self.observed, dtype=np.float64))
        object.__setattr__(self, "quantiles", np.asarray(self.quantiles, dtype=np.float64))
        steps = len(self.dates)
        if self.observed.shape != (steps,) or self.quantiles.shape != (5, steps):
            raise ValueError(
                f"{self.institution}/{self.series}: {steps} dates, observed {self.observed.shape}, "
                f"quantiles {self.quantiles.shape}; (T,) and (5, T)"
            )


def tabulate_fits(fits: Sequence[Fit]) -> pd.DataFrame:
    """Released fits as one table: a row per institution, series and day.

    Args:
        fits: what the institutions released.

    Returns:
        Columns `institution`, `series`, `date`, `unit`, `observed` (NaN where nothing was), the quantiles `q05`,
        `q25`, `q50`, `q75`, `q95` of the posterior predictive, and `held_out`, whether the day was not fitted to.
    """
    import pandas as pd

    tables = []
    for fit in fits:
        table = pd.DataFrame({"date": fit.dates.astype("datetime64[ns]"), "unit": fit.unit, "observed": fit.observed})
        table[["q05", "q25", "q50", "q75", "q95"]] = fit.quantiles.T
        table["held_out"] = np.arange(len(fit.dates)) >= (len(fit.dates) if fit.held_out is None else fit.held_out)
        table.insert(0, "series", fit.series)
        table.insert(0, "institution", fit.institution)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Score:
    """Log scores of the held-out days of one institution, summed (or of all together); higher is better.

    Args:
        institution: whose days.
        posterior: of the posterior predictive.
        prior: of the prior predictive.
        persistence: of the last fitted week carried forward.
        days: how many values were scored.
    """

    institution: str
    posterior: float
    prior: float
    persistence: float
    days: int = 0


@dataclass(frozen=True)
class Fact:
    """A statement on who could see what.

    Args:
        label: a few words, such as `Group sums`.
        text: one sentence.
        weaker: whether it describes a mode that protects less than the default.
    """

    label: str
    text: str
    weaker: bool = False


@dataclass(frozen=True, eq=False)
class Panel:
    """A section of the page that one command alone has: a figure, a table, or both.

    Args:
        name: of the figure's file.
        title: of the section.
        note: one sentence or two under it.
        draw: draws the figure into a PNG file.
        columns: of the table.
        rows: numbers are shown to three digits, None as "n/a".
    """

    name: str
    title: str
    note: str = ""
    draw: Callable[[Path], None] | None = None
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, eq=False)
class Material:
    """All that a report shows beside what `run.json` and `processes.json` hold; what is absent is left out.

    Args:
        headline: the first lines of the page; the first says whether the calibration passed its checks.
        passed: whether it did; None: nothing was checked.
        parameters: rows as `summarise_parameters` makes them, or {name, unit, label, value} for a plain simulation.
        fits: what the institutions released.
        withheld: institutions that did not release their fit.
        scores: held-out log scores, one per institution or one for all.
        prior: draws, one column per parameter.
        posterior: draws, one column per parameter.
        history: one mapping per iteration with `iteration`, `loss` and `kl`.
        outputs: dims time × …, each with `units` (a dim `draw` becomes bands).
        gradient: output → time × parameter.
        privacy: who could see what.
        checks: name → verdict, such as `effective sample size` → `310 of 512`.
        panels: sections that one command alone has, shown before the outputs.
    """

    headline: Sequence[str] = ()
    passed: bool | None = None
    parameters: Sequence[Mapping[str, Any]] = ()
    fits: Sequence[Fit] = ()
    withheld: Sequence[str] = ()
    scores: Sequence[Score] = ()
    prior: pd.DataFrame | None = None
    posterior: pd.DataFrame | None = None
    history: Sequence[Mapping[str, Any]] = ()
    outputs: xr.Dataset | None = None
    gradient: xr.Dataset | None = None
    privacy: Sequence[Fact] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    panels: Sequence[Panel] = ()


def summarise_parameters(
    posterior: pd.DataFrame,
    prior: pd.DataFrame | None = None,
    units: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The table of parameters.

    Args:
        posterior: draws, one column per parameter.
        prior: draws of the prior, the same columns.
        units: parameter → unit.
        labels: parameter → a few words.

    Returns:
        One row per parameter: name, label, unit, `prior` and `posterior`, each {median, low, high} (5 and 95 %), and
        `shrinkage`, 1 − (posterior sd / prior sd), where there is a prior.
    """
    rows = []
    for name in posterior.columns:
        if str(name) in ("log_q", "weight"):
            continue
        row: dict[str, Any] = {
            "name": str(name),
            "label": (labels or {}).get(str(name)) or str(name).replace("_", " "),
            "unit": (units or {}).get(str(name), ""),
        }
        if prior is not None:
            row["prior"] = _interval(prior[name].to_numpy(np.float64))
        row["posterior"] = _interval(posterior[name].to_numpy(np.float64))
        if prior is not None and len(prior) > 1 and len(posterior) > 1:
            spread = float(prior[name].std())
            row["shrinkage"] = 1.0 - float(posterior[name].std()) / spread if spread > 0 else None
        rows.append(row)
    return rows


def summarise_outputs(outputs: xr.Dataset) -> dict[str, dict[str, Any]]:
    """Peak and total of each output; other dims than time are added up, draws are averaged.

    Args:
        outputs: dims time × …, each with `units`.

    Returns:
        Output → {peak, peak_date, total, unit}; the total is None where the unit is not one per day (adding up the
        people who are ill each day counts nobody).
    """
    found: dict[str, dict[str, Any]] = {}
    for name in outputs.data_vars:
        series = outputs[name]
        if "draw" in series.dims:
            series = series.mean("draw")
        time = str(series.dims[0])
        values = series.sum([dim for dim in series.dims if dim != time]).to_numpy().astype(np.float64)
        unit = str(series.attrs.get("units", ""))
        if not np.isfinite(values).any():
            found[str(name)] = {"peak": None, "peak_date": "", "total": None, "unit": unit}
            continue
        at = int(np.nanargmax(values))
        when = series[time].to_numpy()[at]
        found[str(name)] = {
            "peak": float(values[at]),
            "peak_date": str(when.astype("datetime64[D]"))
            if np.issubdtype(when.dtype, np.datetime64)
            else f"day {when}",
            "total": float(np.nansum(values)) if unit.endswith("/day") else None,
            "unit": unit,
        }
    return found


def _interval(draws: NDArray[np.float64]) -> dict[str, float]:
    low, median, high = np.quantile(draws, [0.05, 0.5, 0.95])
    return {"median": float(median), "low": float(low), "high": float(high)}

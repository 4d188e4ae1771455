"""What an institution sees of an epidemic: its own daily or weekly series, their delays, under-reporting and noise.

An observation turns a simulation's outputs into expected counts (a delay, a mean over the reporting week, a scale, then
a small background) and gives their log-likelihood. Of a suppressed cell it knows the interval. It stays at the
institution; only sums of log-likelihoods over institutions are opened. Its
messages name files, columns, lines and days, never a value.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import optimize
from scipy.linalg import toeplitz
from torch import Tensor

from lpm.calibration import objective
from lpm.errors import InputError
from lpm.parameters import Expression, Parameter

__all__ = ["BACKGROUND", "LIKELIHOODS", "CountSeries", "Observation"]

LIKELIHOODS = ("negative_binomial", "poisson", "squared_error")
"""What `likelihood=` accepts by name; an `objective.SyntheticLikelihood` is accepted as well."""

BACKGROUND = 0.05
"""Expected counts a day that come from outside the simulation: a simulated 0 then makes a real 1 unlikely, not
impossible, and still has a gradient."""

_WEEK = 7


@dataclass(frozen=True, eq=False)
class CountSeries:
    """One private series and how it is observed.

    Args:
        name: of the series, in results.
        output: the simulation's output it observes.
        values: [T] counts, NaN where missing or known by an interval only.
        scale: factor on the output (an under-reporting, for example); None is 1.
        dispersion: of the negative binomial, variance = mean + dispersion · mean²; None for other likelihoods.
        delay: [D] probabilities of being seen 0, 1, … days later; None is no delay.
        likelihood: one of `LIKELIHOODS`, or a synthetic likelihood over T days.
        background: counts a day added to the mean.
        average: days whose mean a value is, up to and with its own: 7 for weekly means, whose values stand on the last
            days of the weeks.
        intervals: [T, 2] smallest and largest whole count that a censored value may have, NaN elsewhere; None: none.

    Raises:
        InputError: for negative or infinite counts, a delay that is no distribution, a dispersion that is missing
            or not used, an interval that is none, or a mean over days before the first.
    """

    name: str
    output: str
    values: NDArray[np.float64] = field(repr=False)
    scale: Expression | None = None
    dispersion: Expression | None = None
    delay: NDArray[np.float64] | None = None
    likelihood: str | objective.SyntheticLikelihood = "negative_binomial"
    background: float = BACKGROUND
    average: int = 1
    intervals: NDArray[np.float64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise InputError(f"The series {self.name} has shape {values.shape}: one count a day.")
        bad = np.flatnonzero((values < 0) | np.isinf(values))
        if bad.size:
            raise InputError(
                f"The series {self.name} has {bad.size} count(s) below 0 or infinite, the first on day {bad[0] + 1}:",
                "counts from 0, or NaN where missing.",
            )
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        if self.delay is not None:
            delay = np.array(self.delay, dtype=np.float64)
            if delay.ndim != 1 or delay.size == 0 or not (delay >= 0).all() or abs(delay.sum() - 1.0) > 1e-6:
                raise InputError(f"The delay of {self.name} is not a distribution: probabilities from 0 that sum to 1.")
            delay.setflags(write=False)
            object.__setattr__(self, "delay", delay)
        if isinstance(self.likelihood, str) and self.likelihood not in LIKELIHOODS:
            raise InputError(f"The likelihood of {self.name} is {self.likelihood!r}: one of {', '.join(LIKELIHOODS)}.")
        if (self.likelihood == "negative_binomial") != (self.dispersion is not None):
            raise InputError(f"The series {self.name} needs a dispersion if, and only if, it is negative binomial.")
        if self.intervals is not None:
            self._require_intervals(np.array(self.intervals, dtype=np.float64))
        if not 1 <= self.average <= values.size or self.observed[: self.average - 1].any():
            raise InputError(f"A value of {self.name} is a mean over {self.average} days: all of them are simulated.")

    def _require_intervals(self, intervals: NDArray[np.float64]) -> None:
        if self.likelihood not in ("negative_binomial", "poisson"):
            raise InputError(f"The series {self.name} has intervals: it is negative binomial or Poisson.")
        if intervals.shape != (self.values.size, 2):
            raise InputError(f"The intervals of {self.name} have shape {intervals.shape}: two counts a day.")
        lower, upper = intervals.T
        seen = ~np.isnan(lower)
        whole = (
            (lower >= 0)
            & (upper >= lower)
            & np.isfinite(upper)
            & (np.floor([lower, upper]) == [lower, upper]).all(axis=0)
        )
        bad = np.flatnonzero((seen != ~np.isnan(upper)) | (seen & ~whole) | (seen & ~np.isnan(self.values)))
        if bad.size:
            raise InputError(
                f"{bad.size} interval(s) of {self.name} can't be used, the first on day {bad[0] + 1}:",
                "two whole counts from 0, the second not below the first, on days that have no value.",
            )
        intervals.setflags(write=False)
        object.__setattr__(self, "intervals", intervals)

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Which days tell something, by a value or an interval [T]."""
        seen = ~np.isnan(self.values)
        return seen if self.intervals is None else seen | ~np.isnan(self.intervals[:, 0])

    @classmethod
    def from_csv(
        cls,
        path: Path | str,
        column: str,
        start: dt.date,
        steps: int,
        *,
        output: str,
        name: str | None = None,
        date_column: str = "date",
        where: Mapping[str, str] | None = None,
        **options: Any,
    ) -> CountSeries:
        """A series from a file with one row a day.

        Args:
            path: a csv file, which may begin with lines of comment (`#`).
            column: of the counts; an empty cell is a missing day.
            start: first day.
            steps: number of days T.
            output: the simulation's output it observes.
            name: of the series; None takes the column's.
            date_column: of the dates, as 2020-03-01.
            where: column → text that rows must have, for files that hold several series.
            options: the other fields of `CountSeries`.

        Raises:
            InputError: naming file, column and line, for an unreadable date, a day that is missing or given twice, a
                cell that is no count, or a file that does not hold all days.
        """
        counts = _read_days(Path(path), column, start, steps, date_column, where or {})
        return cls(name=name or column, output=output, values=counts, **options)

    @classmethod
    def from_weekly_csv(
        cls,
        path: Path | str,
        start: dt.date,
        steps: int,
        *,
        output: str,
        name: str,
        columns: tuple[str, str] = ("lower", "upper"),
        date_column: str = "week",
        where: Mapping[str, str] | None = None,
        **options: Any,
    ) -> CountSeries:
        """A series of weekly means from a file with one row a week and two columns of bounds.

        Args:
            path: a csv file, which may begin with lines of comment (`#`).
            start: first day.
            steps: number of days T; weeks that are not wholly among them are left out.
            output: the simulation's output it observes.
            name: of the series.
            columns: of the smallest and the largest count a week's mean may have: equal where the count is published,
                different where it is suppressed, both empty where the week is missing.
            date_column: of the first days of the weeks, as 2020-11-06.
            where: column → text that rows must have, for files that hold several series.
            options: the other fields of `CountSeries`.

        Raises:
            InputError: as `from_csv`; and for one bound without the other, or the largest below the smallest.
        """
        path = Path(path)
        bounds = _read_rows(path, columns, date_column, where or {}, _WEEK)
        lower, upper = (bounds[column] for column in columns)
        _refuse_first(
            lower.isna() != upper.isna(), path, columns[1], f"is empty and {columns[0]} is not, or the reverse"
        )
        _refuse_first(upper < lower, path, columns[1], f"is below the row's {columns[0]}")
        unequal = (lower < upper) & ((lower % 1 != 0) | (upper % 1 != 0))
        _refuse_first(unequal, path, columns[1], "ends an interval that is not of whole counts")
        last = (bounds["date"] - pd.Timestamp(start)).dt.days.to_numpy() + _WEEK - 1
        if last[0] > 2 * (_WEEK - 1) or last[-1] < steps - _WEEK:
            raise InputError(
                f"{path} holds the weeks from {bounds['date'].iloc[0].date()} to {bounds['date'].iloc[-1].date()}: "
                f"those from {start} to {start + dt.timedelta(days=steps - 1)} are needed.",
                "Give those rows (empty cells are a missing week), or change the start or the number of days.",
            )
        inside = (last >= _WEEK - 1) & (last < steps)
        given = bounds[list(columns)].to_numpy(dtype=np.float64)[inside]
        exact = given[:, 0] == given[:, 1]
        values, intervals = np.full(steps, np.nan), np.full((steps, 2), np.nan)
        values[last[inside][exact]] = given[exact, 0]
        intervals[last[inside][~exact]] = given[~exact]
        return cls(name=name, output=output, values=values, average=_WEEK, intervals=intervals, **options)

    def expected(self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """Expected counts [K, T] from the outputs [K, T] of a simulation with parameters [K]."""
        if self.output not in outputs:
            raise InputError(f"The series {self.name} observes {self.output!r}: the model gives {', '.join(outputs)}.")
        mean = outputs[self.output].to(torch.float64)
        if mean.shape[-1] != len(self.values):
            raise InputError(f"The series {self.name} has {len(self.values)} days, the simulation {mean.shape[-1]}.")
        if self.delay is not None:
            # The convolution as a matrix product: torch's conv1d is a hundred times slower in float64.
            first = np.zeros(len(self.values))
            row = first.copy()
            row[: len(self.delay)] = self.delay[: len(row)]
            first[0] = row[0]
            mean = mean @ torch.from_numpy(toeplitz(first, row))
        if self.average > 1:
            # A difference of running sums, over the days there are where fewer than a week have passed.
            total = torch.cat([torch.zeros_like(mean[..., :1]), mean.cumsum(dim=-1)], dim=-1)
            end = torch.arange(1, mean.shape[-1] + 1)
            begin = (end - self.average).clamp_min(0)
            mean = (total[..., end] - total[..., begin]) / (end - begin)
        if self.scale is not None:
            mean = mean * _value(self.scale, theta)[..., None]
        return mean + self.background

    def log_likelihood(self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], window: slice) -> Tensor:
        """Log-likelihood [K] of the days in the window."""
        mean = self.expected(outputs, theta)
        if isinstance(self.likelihood, objective.SyntheticLikelihood):
            return self.likelihood(torch.from_numpy(self.values.copy())[window], mean[:, window], window)
        # Of a weekly series six days in seven say nothing, and log-gammas cost.
        days = np.arange(self.values.size)[window]
        days = days[self.observed[days]]
        mean, y = mean[:, days], torch.from_numpy(self.values[days])
        if self.likelihood == "squared_error":
            return objective.squared_error(y, mean)
        spread = None if self.dispersion is None else _value(self.dispersion, theta)
        exact = objective.poisson(y, mean) if spread is None else objective.negative_binomial(y, mean, spread)
        if self.intervals is None or days.size == 0:
            return exact
        lower, upper = torch.from_numpy(self.intervals[days]).T
        return exact + objective.interval_censored(lower, upper, mean, spread)

    def predict(
        self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], generator: torch.Generator
    ) -> NDArray[np.float64]:
        """One draw [K, T] of what would be reported, for each of K simulations."""
        with torch.no_grad():
            mean = self.expected(outputs, theta)
            # numpy has the negative binomial; its generator is seeded by, and so repeats with, torch's.
            random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
            if isinstance(self.likelihood, objective.SyntheticLikelihood):
                factor = np.linalg.cholesky(self.likelihood.covariance)
                noise = torch.from_numpy(random.standard_normal(tuple(mean.shape)) @ factor.T)
                return self.likelihood.untransform(self.likelihood.transform(mean) + noise).numpy()
            expected = mean.numpy()
            if self.dispersion is not None:
                spread = np.maximum(_value(self.dispersion, theta).numpy(), 1e-6)[..., None]
                return np.asarray(
                    random.negative_binomial(1.0 / spread, 1.0 / (1.0 + spread * expected)).astype(np.float64)
                )
            if self.likelihood == "poisson":
                return random.poisson(expected).astype(np.float64)
            return expected + random.standard_normal(expected.shape)

    def persistence_log_score(self, window: slice) -> float:
        """The log score of carrying the last week before the window forward.

        The forecast is a negative binomial around the mean of the last seven days that are not missing, or of the last
        weekly mean; of an interval the middle counts. Its dispersion is the one that would have served best for
        forecasts as far ahead, made from every earlier day.

        Args:
            window: the held-out days, after at least two weeks of others.
        """
        days = range(*window.indices(len(self.values)))
        if len(days) == 0 or days.start < 2 * _WEEK:
            raise InputError(f"Persistence of {self.name} needs two weeks before a window that is not empty.")
        known = self.values.copy()
        intervals = np.full((known.size, 2), np.nan) if self.intervals is None else self.intervals
        known = np.where(np.isnan(known), intervals.mean(axis=1), known)
        recent = max(1, _WEEK // self.average)
        origins = range(_WEEK, days.start)
        ahead = [np.arange(at, min(at + len(days), days.start)) for at in origins]
        came = np.concatenate(ahead)
        means = np.concatenate(
            [np.full(each.size, _latest(known[:at], recent)) for at, each in zip(origins, ahead, strict=True)]
        )
        usable = np.isfinite(means) & self.observed[came]
        came, means = came[usable], means[usable]
        if not usable.any():
            raise InputError(f"The series {self.name} has no two days before the window to learn from.")

        def score(at: NDArray[np.int64], mean: NDArray[np.float64], dispersion: float) -> float:
            expected = torch.from_numpy(mean)
            lower, upper = torch.from_numpy(intervals[at]).T
            total = objective.negative_binomial(torch.from_numpy(self.values[at]), expected, dispersion)
            return float(total + objective.interval_censored(lower, upper, expected, dispersion))

        best = optimize.minimize_scalar(
            lambda log_dispersion: -score(came, means, float(np.exp(log_dispersion))),
            bounds=(np.log(1e-4), np.log(1e2)),
            method="bounded",
        )
        held_out = np.array(days)
        forecast = np.full(held_out.size, _latest(known[: days.start], recent))
        return score(held_out, forecast, float(np.exp(best.x)))


@dataclass(frozen=True, eq=False)
class Observation:
    """All series of one institution.

    Args:
        institution: its name.
        start: the first simulated day.
        series: one or more, of equal length and different names.

    Raises:
        InputError: for no series, unequal lengths, or a name given twice.
    """

    institution: str
    start: dt.date
    series: Sequence[CountSeries]

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", tuple(self.series))
        names = [series.name for series in self.series]
        if not names:
            raise InputError(f"The observation of {self.institution} has no series: at least one.")
        if len(set(names)) < len(names):
            raise InputError(f"The observation of {self.institution} names a series twice: {', '.join(names)}.")
        lengths = {len(series.values) for series in self.series}
        if len(lengths) > 1:
            raise InputError(f"The series of {self.institution} have different lengths: {sorted(lengths)} days.")

    @property
    def steps(self) -> int:
        """Number of days T."""
        return len(self.series[0].values)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The simulation's outputs that are needed."""
        return tuple(dict.fromkeys(series.output for series in self.series))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the observation itself (scales and dispersions)."""
        expressions = [part for series in self.series for part in (series.scale, series.dispersion) if part is not None]
        leaves = [leaf for part in expressions for leaf in part.leaves() if isinstance(leaf, Parameter)]
        return tuple({leaf.name: leaf for leaf in leaves}.values())

    def log_likelihood(
        self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], window: slice = slice(None)
    ) -> Tensor:
        """The log-likelihood of all series, differentiable in outputs and parameters.

        Args:
            outputs: output → [K, T] simulated counts a day.
            theta: parameter → [K].
            window: the days that count.

        Returns:
            [K].
        """
        return torch.stack([series.log_likelihood(outputs, theta, window) for series in self.series]).sum(dim=0)

    def predict(
        self, outputs: Mapping[str, Tensor], theta: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, NDArray[np.float64]]:
        """Predictive draws: series → [K, T], one reported series for each simulation; repeated by the generator."""
        return {series.name: series.predict(outputs, theta, generator) for series in self.series}

    def persistence_log_score(self, window: slice) -> float:
        """The log score of the baseline that carries each series' last week before the window forward."""
        return sum(series.persistence_log_score(window) for series in self.series)


def _no_driver(name: str) -> Tensor:
    raise InputError(f"An observation depends on the driver {name!r}: only on parameters and numbers.")


def _value(part: Expression, theta: Mapping[str, Tensor]) -> Tensor:
    missing = [leaf.name for leaf in part.leaves() if isinstance(leaf, Parameter) and leaf.name not in theta]
    if missing:
        raise InputError(f"The observation needs the parameter {missing[0]!r}: given are {', '.join(theta) or 'none'}.")
    return part.evaluate(theta, _no_driver).to(torch.float64)


def _latest(past: NDArray[np.float64], count: int) -> float:
    seen = past[~np.isnan(past)][-count:]
    return max(float(seen.mean()), BACKGROUND) if seen.size else float("nan")


def _read_days(
    path: Path, column: str, start: dt.date, steps: int, date_column: str, where: Mapping[str, str]
) -> NDArray[np.float64]:
    table = _read_rows(path, (column,), date_column, where, 1)
    days, counts = table["date"], table[column]
    first, last = pd.Timestamp(start), pd.Timestamp(start) + pd.Timedelta(days=steps - 1)
    if days.iloc[0] > first or days.iloc[-1] < last:
        raise InputError(
            f"{path} holds {days.iloc[0].date()} to {days.iloc[-1].date()}: "
            f"the days {first.date()} to {last.date()} are needed.",
            "Give those rows (an empty cell is a missing day), or change the start or the number of days.",
        )
    return np.asarray(
        counts[((days >= first) & (days <= last)).to_numpy()].to_numpy(dtype=np.float64), dtype=np.float64
    )


def _read_rows(
    path: Path, columns: Sequence[str], date_column: str, where: Mapping[str, str], every: int
) -> pd.DataFrame:
    """The columns as counts, and `date`, of a file with a row every so many days; the index is the line's number."""
    if not path.is_file():
        wanted = ", ".join((date_column, *columns[:-1]))
        raise InputError(f"{path} is missing: a csv file with the columns {wanted} and {columns[-1]}.")
    with path.open(encoding="utf-8") as file:
        comments = 0
        for line in file:
            if not line.startswith("#"):
                break
            comments += 1
    try:
        table = pd.read_csv(path, skiprows=comments, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        raise InputError(f"{path} can't be read as a table: a header, then rows of as many cells.") from None
    table.columns = table.columns.str.strip()
    for name in (date_column, *columns, *where):
        if name not in table.columns:
            # The names that are there stay untold: a file without a header has a row of counts in their place.
            raise InputError(f"{path}, line {comments + 1}: the header has no column {name!r}.")
    # Line numbers as an editor shows them: the comment, the header, then rows from 1.
    table.index = pd.RangeIndex(comments + 2, comments + 2 + len(table))
    for name, text in where.items():
        table = table[table[name].str.strip() == text]
    if table.empty:
        raise InputError(f"{path} has no row where {', '.join(f'{name} is {text}' for name, text in where.items())}.")
    days = pd.to_datetime(table[date_column].str.strip(), format="%Y-%m-%d", errors="coerce")
    _refuse_first(days.isna(), path, date_column, "is no date: as 2020-03-01")
    step = days.diff().dt.days
    why = "the day after the row before: every day" if every == 1 else f"{every} days after the row before: every week"
    _refuse_first(step.notna() & (step != every), path, date_column, f"is not {why} once")
    read: dict[str, Any] = {"date": days}
    for column in columns:
        cells = table[column].str.strip()
        # Only an empty cell is missing on purpose: a NaN is what a failed computation leaves behind.
        blank = cells == ""
        counts = pd.to_numeric(cells.mask(blank), errors="coerce").astype(np.float64)
        _refuse_first(counts.isna() & ~blank, path, column, "is no number: a count from 0, or empty where missing")
        _refuse_first((counts < 0) | np.isinf(counts), path, column, "is below 0 or infinite: a count from 0, or empty")
        read[column] = counts
    return pd.DataFrame(read)


def _refuse_first(bad: pd.Series[bool], path: Path, column: str, why: str) -> None:
    if bad.any():
        raise InputError(f"{path}, line {bad.idxmax()}, column {column}: the cell {why}.")

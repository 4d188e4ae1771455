"""What an institution sees: expected counts, likelihood, prediction, the baseline, and files that are not in order."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lpm.calibration import objective
from lpm.errors import InputError
from lpm.observation import BACKGROUND, CountSeries, Observation
from lpm.parameters import Parameter, driver

START = dt.date(2020, 3, 1)
SCALE, SPREAD = Parameter("rho", "beta(2, 2)"), Parameter("phi", "exponential(5)")
DELAY = np.array([0.2, 0.5, 0.3])
VALUES = np.array([0.0, 2.0, np.nan, 7.0, 12.0, 20.0])
SIMULATED = torch.tensor([[0.0, 5.0, 10.0, 20.0, 40.0, 80.0], [1.0, 1.0, 2.0, 3.0, 5.0, 8.0]], dtype=torch.float64)
THETA = {"rho": torch.tensor([0.5, 0.9], dtype=torch.float64), "phi": torch.tensor([0.1, 0.4], dtype=torch.float64)}


def admissions(**changes: object) -> CountSeries:
    """A series with a delay, a scale and a dispersion."""
    fields = {"output": "hospitalised", "values": VALUES, "scale": SCALE, "dispersion": SPREAD, "delay": DELAY}
    return CountSeries("admissions", **{**fields, **changes})  # type: ignore[arg-type]


def test_expected_counts_are_delayed_then_scaled() -> None:
    got = admissions().expected({"hospitalised": SIMULATED}, THETA)
    delayed = np.stack([np.convolve(row, DELAY)[:6] for row in SIMULATED.numpy()])
    np.testing.assert_allclose(got, delayed * np.array([[0.5], [0.9]]) + BACKGROUND)
    scaled = admissions(scale=2.0 * SCALE, delay=None, background=0.0).expected({"hospitalised": SIMULATED}, THETA)
    np.testing.assert_allclose(scaled, SIMULATED * torch.tensor([[1.0], [1.8]]))


def test_the_likelihood_is_that_of_the_days_in_the_window() -> None:
    observation = Observation(
        "bronx", START, [admissions(), CountSeries("deaths", "died", VALUES, likelihood="poisson", background=0.5)]
    )
    outputs = {"hospitalised": SIMULATED, "died": 2 * SIMULATED}
    mean = admissions().expected(outputs, THETA).numpy()
    spread = THETA["phi"].numpy()[:, None]
    terms = stats.nbinom.logpmf(VALUES, 1 / spread, 1 / (1 + spread * mean))
    terms = np.nan_to_num(terms) + np.nan_to_num(stats.poisson.logpmf(VALUES, 2 * SIMULATED.numpy() + 0.5))
    np.testing.assert_allclose(observation.log_likelihood(outputs, THETA), terms.sum(axis=1))
    np.testing.assert_allclose(observation.log_likelihood(outputs, THETA, slice(3, 5)), terms[:, 3:5].sum(axis=1))
    assert observation.outputs == ("hospitalised", "died") and observation.steps == 6
    assert [parameter.name for parameter in observation.parameters] == ["rho", "phi"]


def test_the_likelihood_is_differentiable_in_outputs_and_parameters() -> None:
    outputs = (SIMULATED + 0.1).requires_grad_()
    rho, phi = (value.clone().requires_grad_() for value in THETA.values())
    observation = Observation("bronx", START, [admissions()])
    assert torch.autograd.gradcheck(
        lambda x, r, p: observation.log_likelihood({"hospitalised": x}, {"rho": r, "phi": p}, slice(1, 6)),
        (outputs, rho, phi),
    )


def test_a_synthetic_likelihood_and_its_window() -> None:
    noise = objective.SyntheticLikelihood("sqrt", 0.2 * np.eye(6) + 0.1)
    series = CountSeries("prevalence", "ill", VALUES, likelihood=noise)
    mean = series.expected({"ill": SIMULATED}, {})
    got = series.log_likelihood({"ill": SIMULATED}, {}, slice(2, 5))
    torch.testing.assert_close(got, noise(torch.from_numpy(VALUES.copy())[2:5], mean[:, 2:5], slice(2, 5)))
    drawn = series.predict({"ill": SIMULATED.mean(0).expand(4000, -1)}, {}, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(np.cov(np.sqrt(drawn[:, 3:] + 0.375).T), 0.2 * np.eye(3) + 0.1, atol=0.04)


def test_predictions_have_the_mean_and_variance_of_the_likelihood_and_repeat() -> None:
    theta = {"rho": torch.full((20_000,), 0.5), "phi": torch.full((20_000,), 0.3)}
    outputs = {"hospitalised": torch.full((20_000, 6), 40.0)}
    observation = Observation("bronx", START, [admissions(delay=None)])
    drawn = observation.predict(outputs, theta, torch.Generator().manual_seed(4))["admissions"]
    assert np.array_equal(drawn, observation.predict(outputs, theta, torch.Generator().manual_seed(4))["admissions"])
    mean = 20.0 + BACKGROUND
    np.testing.assert_allclose(drawn.mean(axis=0), mean, rtol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), mean + 0.3 * mean**2, rtol=0.06)
    poisson = CountSeries("cases", "hospitalised", VALUES, likelihood="poisson")
    counts = poisson.predict(outputs, theta, torch.Generator().manual_seed(4))
    np.testing.assert_allclose(counts.var(axis=0), 40.0, rtol=0.06)


def test_persistence_carries_the_last_week_forward_with_a_fitted_dispersion() -> None:
    rng = np.random.default_rng(1)
    values = rng.negative_binomial(5.0, 5.0 / (5.0 + 50.0), size=200).astype(float)  # dispersion 0.2
    values[190] = np.nan
    series = admissions(values=values)
    window = slice(186, 200)
    mean, came = values[179:186].mean(), values[window]
    scores = {
        spread: np.nansum(stats.nbinom.logpmf(came, 1 / spread, 1 / (1 + spread * mean))) for spread in (0.15, 0.2, 0.3)
    }
    assert series.persistence_log_score(window) == pytest.approx(max(scores.values()), abs=2.0)
    with pytest.raises(InputError, match="twice"):
        Observation("bronx", START, [series, series])
    assert series.persistence_log_score(slice(186, None)) == series.persistence_log_score(window)
    with pytest.raises(InputError, match="two weeks"):
        series.persistence_log_score(slice(10, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.array([1.0, np.nan, -3.0])}, r"1 count\(s\) below 0 or infinite, the first on day 3"),
        ({"values": np.array([1.0, np.inf])}, "day 2"),
        ({"values": np.ones((2, 2))}, "one count a day"),
        ({"delay": np.array([0.5, 0.6])}, "sum to 1"),
        ({"delay": np.array([-0.5, 1.5])}, "sum to 1"),
        ({"dispersion": None}, "needs a dispersion"),
        ({"likelihood": "poisson"}, "needs a dispersion"),
        ({"likelihood": "cauchy"}, "'cauchy': one of"),
    ],
)
def test_bad_series_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        admissions(**changes)


def test_an_observation_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="the model gives died"):
        admissions().expected({"died": SIMULATED}, THETA)
    with pytest.raises(InputError, match="6 days, the simulation 3"):
        admissions().expected({"hospitalised": SIMULATED[:, :3]}, THETA)
    with pytest.raises(InputError, match="needs the parameter 'phi'"):
        admissions().log_likelihood({"hospitalised": SIMULATED}, {"rho": THETA["rho"]}, slice(None))
    with pytest.raises(InputError, match="driver 'mobility'"):
        admissions(scale=driver("mobility") * 2.0).expected({"hospitalised": SIMULATED}, THETA)
    with pytest.raises(InputError, match="different lengths"):
        shorter = CountSeries("deaths", "died", np.ones(5), likelihood="poisson")
        Observation("bronx", START, [admissions(), shorter])
    with pytest.raises(InputError, match="at least one"):
        Observation("bronx", START, [])


HEADER = "# Source: a hospital\n# Days of admission\ndate,area,admissions\n"


def write(folder: Path, rows: str) -> Path:
    """A file of counts."""
    path = folder / "counts.csv"
    path.write_text(HEADER + rows)
    return path


def read(path: Path, steps: int = 3, **options: object) -> CountSeries:
    """Its admissions from 1 March 2020."""
    fields = {"output": "hospitalised", "dispersion": SPREAD, **options}
    return CountSeries.from_csv(path, "admissions", START, steps, **fields)  # type: ignore[arg-type]


def test_a_file_is_read(tmp_path: Path) -> None:
    rows = "2020-02-29,x,9\n2020-03-01,x,4\n2020-03-02,x,\n2020-03-03,x, 6.0\n2020-03-04,x,8\n"
    series = read(write(tmp_path, rows), name="beds", scale=SCALE)
    np.testing.assert_array_equal(series.values, [4.0, np.nan, 6.0])
    assert "6." not in repr(series) and "values" not in repr(series)
    assert series.name == "beds" and series.scale is SCALE
    pairs = [(day, area, factor) for area, factor in (("x", 1), ("y", 10)) for day in (1, 2, 3)]
    both = "".join(f"2020-03-0{day},{area},{day * factor}\n" for day, area, factor in pairs)
    np.testing.assert_array_equal(read(write(tmp_path, both), where={"area": "y"}).values, [10.0, 20.0, 30.0])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("2020-03-01,x,4111\n2020-03-02,x,-5\n2020-03-03,x,6\n", ["line 5", "column admissions", "below 0"]),
        ("2020-03-01,x,4111\n2020-03-02,x,\n2020-03-03,x,-6\n", ["line 6", "below 0"]),
        ("2020-03-01,x,4111\n2020-03-02,x,many\n2020-03-03,x,6\n", ["line 5", "no number"]),
        ("2020-03-01,x,4111\n2020-03-02,x,NaN\n2020-03-03,x,6\n", ["line 5", "column admissions", "no number"]),
        ("2020-03-01,x,4111\n2020-03-03,x,6\n2020-03-04,x,6\n", ["line 5", "column date", "not the day after"]),
        ("2020-03-01,x,4111\n2020-03-01,x,6\n2020-03-02,x,6\n", ["line 5", "every day once"]),
        ("2020-03-01,x,4111\n2/3/2020,x,5\n2020-03-03,x,6\n", ["line 5", "column date", "no date"]),
        ("2020-03-01,x,4111\n2020-03-02,x,5\n", ["2020-03-01 to 2020-03-02", "2020-03-01 to 2020-03-03"]),
        ("2020-03-01,x,4111\n2020-03-02,x,inf\n2020-03-03,x,6\n", ["line 5", "infinite"]),
        ("2020-03-01,x,4111\n2020-03-02,x,5,7,8\n2020-03-03,x,6\n", ["can't be read as a table", "counts.csv"]),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_without_its_values(
    tmp_path: Path, rows: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        read(write(tmp_path, rows))
    message = str(caught.value)
    assert "counts.csv" in message and all(word in message for word in words), message
    told = message.replace(str(tmp_path), "")
    assert "4111" not in told and "-5" not in told and ": many" not in told
    assert caught.value.__cause__ is None  # pandas' own messages quote cells


def test_missing_files_columns_and_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv is missing"):
        read(tmp_path / "nowhere.csv")
    path = write(tmp_path, "2020-03-01,x,4\n")
    with pytest.raises(InputError, match="line 3: the header has no column 'day'"):
        read(path, date_column="day")
    with pytest.raises(InputError, match="no row where area is z"):
        read(path, where={"area": "z"})
    (tmp_path / "empty.csv").write_text("# nothing\n")
    with pytest.raises(InputError, match="can't be read"):
        read(tmp_path / "empty.csv")


WEEKS = "2020-03-01,3,3\n2020-03-08,0,4\n2020-03-15,,\n2020-03-22,11,11\n"


def weekly(folder: Path, rows: str = WEEKS, steps: int = 30, **options: object) -> CountSeries:
    """Weekly means from 28 February 2020, the fourth of four weeks beginning on the 22nd of March."""
    path = folder / "weeks.csv"
    path.write_text("# Source: a hospital\nweek,lower,upper\n" + rows)
    fields = {"output": "beds", "name": "census", "dispersion": SPREAD, **options}
    return CountSeries.from_weekly_csv(path, dt.date(2020, 2, 28), steps, **fields)  # type: ignore[arg-type]


def test_a_weekly_mean_stands_on_its_last_day_and_a_suppressed_one_is_an_interval(tmp_path: Path) -> None:
    series = weekly(tmp_path)
    assert series.intervals is not None
    values = {int(day): value for day, value in enumerate(series.values) if not np.isnan(value)}
    assert values == {8: 3.0, 29: 11.0}
    assert np.flatnonzero(~np.isnan(series.intervals[:, 0])).tolist() == [15]
    assert series.intervals[15].tolist() == [0.0, 4.0]
    assert np.flatnonzero(series.observed).tolist() == [8, 15, 29]
    # A week that has not ended by the last day is left out.
    assert np.flatnonzero(weekly(tmp_path, steps=29).observed).tolist() == [8, 15]


def test_weekly_means_are_compared_with_the_mean_of_the_weeks_days(tmp_path: Path) -> None:
    series = weekly(tmp_path, scale=SCALE)
    beds = torch.from_numpy(np.random.default_rng(3).uniform(1, 30, (2, 30)))
    outputs = {"beds": beds}
    mean = np.stack([beds[:, end - 6 : end + 1].mean(dim=1) for end in (8, 15, 29)], axis=1)
    mean = mean * np.array([[0.5], [0.9]]) + BACKGROUND
    np.testing.assert_allclose(series.expected(outputs, THETA)[:, [8, 15, 29]], mean, rtol=1e-12)
    law = stats.nbinom(1 / THETA["phi"].numpy()[:, None], 1 / (1 + THETA["phi"].numpy()[:, None] * mean))
    terms = np.stack([law.logpmf(3)[:, 0], np.log(law.cdf(4))[:, 1], law.logpmf(11)[:, 2]], axis=1)
    np.testing.assert_allclose(series.log_likelihood(outputs, THETA, slice(None)), terms.sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(series.log_likelihood(outputs, THETA, slice(10, 16)), terms[:, 1], rtol=1e-9)
    assert series.log_likelihood(outputs, THETA, slice(16, 29)).tolist() == [0.0, 0.0]
    moved = beds.clone().requires_grad_()
    series.log_likelihood({"beds": moved}, THETA, slice(10, 16)).sum().backward()
    assert moved.grad is not None
    assert np.flatnonzero(moved.grad[0].numpy()).tolist() == list(range(9, 16))


def test_persistence_of_weekly_means_carries_the_last_one_forward(tmp_path: Path) -> None:
    week = dt.date(2020, 3, 1)
    rng = np.random.default_rng(5)
    told = ["4,9" if k == 30 else f"{n},{n}" for k, n in enumerate(rng.negative_binomial(8, 0.25, 60))]
    told[57:] = ["20,20", "18,18", "0,4"]
    rows = "".join(f"{week + k * dt.timedelta(days=7)},{cells}\n" for k, cells in enumerate(told))
    series = weekly(tmp_path, rows, steps=2 + 60 * 7)
    window = slice(2 + 58 * 7, 2 + 60 * 7)

    def at(spread: float) -> float:
        law = stats.nbinom(1 / spread, 1 / (1 + spread * 20.0))
        return float(law.logpmf(18) + np.log(law.cdf(4)))

    scores = [at(spread) for spread in np.geomspace(0.05, 1.0, 400)]
    assert min(scores) <= series.persistence_log_score(window) <= max(scores)
    changed = dict(enumerate(told)) | {58: "500,500"}
    rows = "".join(f"{week + k * dt.timedelta(days=7)},{cells}\n" for k, cells in changed.items())
    assert weekly(tmp_path, rows, steps=2 + 60 * 7).persistence_log_score(window) < series.persistence_log_score(window)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("2020-03-01,41,41\n2020-03-09,5,5\n", ["line 4", "column week", "7 days after"]),
        ("2020-03-01,41,41\n2020-03-08,5,\n", ["line 4", "column upper", "is empty and lower is not"]),
        ("2020-03-01,41,41\n2020-03-08,5,4\n", ["line 4", "column upper", "below the row's lower"]),
        ("2020-03-01,41,41\n2020-03-08,0.5,4\n", ["line 4", "not of whole counts"]),
        ("2020-03-08,41,41\n2020-03-15,5,5\n2020-03-22,5,5\n", ["from 2020-03-08 to 2020-03-22", "2020-02-28"]),
        ("2020-03-01,41,41\n2020-03-08,5,5\n", ["to 2020-03-08", "2020-03-28"]),
    ],
)
def test_a_bad_weekly_file_is_refused_with_its_line_and_without_its_values(
    tmp_path: Path, rows: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        weekly(tmp_path, rows)
    told = str(caught.value).replace(str(tmp_path), "")
    assert "weeks.csv" in told and all(word in told for word in words), told
    assert "41" not in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intervals": np.full((5, 2), np.nan)}, "two counts a day"),
        ({"intervals": np.array([[np.nan, np.nan]] * 5 + [[0.0, 3.0]])}, "first on day 6"),
        ({"intervals": np.array([[np.nan, np.nan]] * 2 + [[0.0, np.inf]] + [[np.nan, np.nan]] * 3)}, "first on day 3"),
        ({"average": 7}, "mean over 7 days"),
        ({"average": 2}, "mean over 2 days"),
    ],
)
def test_intervals_and_means_that_can_not_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        admissions(**changes)

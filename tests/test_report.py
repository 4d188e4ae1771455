"""Figures and page: what was released is drawn and nothing else, the page stands alone and tells a failure first."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.image import imread

from lpm.checkpoint import DiskFull
from lpm.report import (
    Fact,
    Fit,
    Material,
    Score,
    figures,
    summarise_outputs,
    summarise_parameters,
    tabulate_fits,
    write_report,
)
from lpm.report.page import number, render
from lpm.runs import Run

DAYS = np.arange("2020-03-01", "2020-04-10", dtype="datetime64[D]")
SHADE = tuple(int(figures._HELD_OUT[i : i + 2], 16) / 255 for i in (1, 3, 5))


def fit(institution: str, series: str = "admissions", held_out: int | None = 30, **changes: Any) -> Fit:
    """A wave of forty days with bands around it."""
    mean = 100 * np.exp(-0.5 * ((np.arange(40) - 20) / 8) ** 2) + 1
    values: dict[str, Any] = {
        "dates": DAYS,
        "observed": np.where(np.arange(40) == 7, np.nan, mean + 5 * np.sin(np.arange(40))),
        "quantiles": mean * np.array([[0.6], [0.85], [1.0], [1.2], [1.6]]),
        **changes,
    }
    return Fit(institution, series, held_out=held_out, **values)


def draws(seed: int, spread: float) -> pd.DataFrame:
    """Draws of two parameters, the first of them positive."""
    z = np.random.default_rng(seed).normal(size=(300, 2))
    return pd.DataFrame({"beta": 0.1 * np.exp(spread * z[:, 0]), "distancing": spread * z[:, 1]})


def outputs() -> xr.Dataset:
    """One flow, one stock by age, one flow in draws."""
    wave = np.exp(-0.5 * ((np.arange(40) - 20) / 8) ** 2)
    return xr.Dataset(
        {
            "admissions": ("time", 50 * wave, {"units": "people/day"}),
            "ill": (("time", "age"), np.stack([80 * wave, 40 * wave], axis=1), {"units": "people"}),
            "deaths": (("draw", "time"), np.outer([1.0, 2.0, 3.0], wave), {"units": "people/day"}),
        },
        coords={"time": DAYS.astype("datetime64[ns]"), "age": ["0-64", "65+"]},
    ).transpose("time", ...)


def history() -> list[dict[str, float]]:
    """Thirty iterations, the first far off, one of them without a finite loss."""
    return [
        {"iteration": i, "loss": float("nan") if i == 9 else 200 + 5000 * np.exp(-i), "kl": i / 10} for i in range(30)
    ]


@pytest.fixture
def material() -> Material:
    """A calibration of three institutions, one of which keeps its fit to itself."""
    posterior, prior = draws(1, 0.1), draws(2, 0.5)
    return Material(
        headline=["The calibration passed its checks.", "It took 30 iterations."],
        passed=True,
        parameters=summarise_parameters(posterior, prior, {"beta": "1/day"}, {"distancing": "effect of distancing"}),
        fits=[fit("bronx"), fit("bronx", "deaths"), fit("staten_island")],
        withheld=["queens"],
        scores=[Score("bronx", -50.0, -80.0, -60.0, 10), Score("staten_island", -30.0, -31.0, -20.5, 10)],
        prior=prior,
        posterior=posterior,
        history=history(),
        privacy=[Fact("Engine", "crypten."), Fact("Seed", "A public seed.", weaker=True)],
        checks={"effective sample size": "210 of 300"},
    )


class Page(html.parser.HTMLParser):
    """The words of a page, and all its references to other things."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.references, self.tags, self._hidden = "", [], [], False
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag == "style" or (self._hidden and tag != "body")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words += " " + data


def page(material: Material, record: Mapping[str, Any] | None = None) -> Page:
    """A page without figures."""
    return Page(render(record or {"scenario": {"name": "nyc_boroughs"}, "status": "done"}, [], material, {}))


def shaded(path: Path) -> np.ndarray:
    """Which columns of a picture have much of the held-out colour."""
    match = np.abs(imread(path)[..., :3] - np.array(SHADE)).max(axis=-1) < 0.02
    return match.sum(axis=0) > 40


def test_a_report_is_written_with_one_figure_per_released_fit(tmp_path: Path, material: Material) -> None:
    run = Run.create(tmp_path / "run", {"command": "federate", "scenario": "nyc", "seed": 1}, "nyc_boroughs")
    (run.path / "processes.json").write_text(
        '[{"role": "client", "party": "bronx", "pid": 7, "address": "localhost:1"}]'
    )
    run.update(peak_memory={"bronx": 3 * 2**20}, scenario={"hash": "ab12"}, bytes=2048, timings={"set_up": 1.5})
    run.update(leakage="leakage.html")
    path = write_report(run, material)
    assert sorted(figure.name for figure in run.figures.iterdir()) == [
        "fit.png",
        "fit_bronx.png",
        "fit_staten_island.png",
        "loss.png",
        "posterior.png",
    ]
    found = Page(path.read_text())
    drawn = [reference for reference in found.references if reference != "leakage.html"]
    assert len(drawn) == 5 == len(found.references) - 1
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in drawn)
    assert not {"script", "link", "iframe"} & set(found.tags) and "url(" not in path.read_text()
    for text in (
        "localhost:1",
        "3.0 MiB",
        "2.0 KiB",
        "ab12",
        "lpm federate nyc --seed 1",
        "1.50 s",
        "Not released: queens",
    ):
        assert text in found.words, text
    assert run.record()["versions"]["torch"] in found.words


def test_the_headline_comes_first_and_a_failure_is_marked(material: Material) -> None:
    failed = Material(headline=["The calibration failed: its intervals are too narrow.", "More."], passed=False)
    text = render({"scenario": {"name": "a"}}, [], failed, {})
    assert '<section class="headline failed">' in text
    words = Page(text).words
    assert words.index("intervals are too narrow") < words.index("checks failed") < words.index("What ran")
    assert "checks passed" in page(material).words and "210 of 300" in page(material).words
    assert "checks" not in page(Material(headline=["60 days."])).words


def test_the_page_compares_the_scores_as_they_are(material: Material) -> None:
    words = page(material).words
    assert "the posterior predictive beats the prior predictive by 31.0 and falls behind" not in words
    assert "beats the prior predictive by 31.0 and beats persistence by 0.5 nats" in words
    lost = Material(scores=[Score("all", -10.0, -9.0, -8.0), Score("bronx", 0.0, -99.0, -99.0)])
    words = page(lost).words
    assert "falls behind the prior predictive by 1.0 and falls behind persistence by 2.0 nats" in words
    assert "n/a" in page(Material(scores=[Score("bronx", -1.0, float("nan"), -2.0)])).words


def test_what_ran_is_told_as_it_is_recorded() -> None:
    record = {
        "scenario": {"name": "nyc"},
        "status": "running",
        "gradient": {"estimator": "fd", "reason": "the tangent failed its audit"},
        "bytes": {"received": 2048, "sent": 3 * 2**20},
        "timings": {"computing_s": 12.0},
        "peak_memory_mb": {"coordinator": 512.0},
    }
    words = page(Material(), record).words
    for text in (
        "fd (the tangent failed its audit)",
        "2.0 KiB received, 3.0 MiB sent",
        "Time, computing 12.0 s",
        "coordinator 512.0 MiB",
    ):
        assert text in words, text
    assert "running" not in words and "paused" in page(Material(), {**record, "status": "paused"}).words


def test_whatever_is_named_is_escaped(material: Material) -> None:
    evil = "<script>alert(1)</script>"
    text = render(
        {"scenario": {"name": evil, "title": evil}, "status": evil, "command": {"settings": {evil: evil}}},
        [{"role": evil, "party": evil}],
        Material(
            headline=[evil],
            passed=True,
            parameters=[{"name": evil, "value": 1.0, "unit": evil}],
            withheld=[evil],
            scores=[Score(evil, 0, 0, 0)],
            privacy=[Fact(evil, evil)],
            checks={evil: evil},
        ),
        {},
    )
    assert "<script" not in text and text.count("&lt;script&gt;") > 8


def test_the_table_of_parameters_holds_the_quantiles() -> None:
    values = pd.DataFrame({"beta": np.linspace(0, 1, 1001), "log_q": 0.0})
    (row,) = summarise_parameters(values, 2 * values, {"beta": "1/day"})
    assert (row["name"], row["unit"]) == ("beta", "1/day")
    assert row["posterior"] == pytest.approx({"median": 0.5, "low": 0.05, "high": 0.95})
    assert row["prior"] == pytest.approx({"median": 1.0, "low": 0.1, "high": 1.9})
    assert row["shrinkage"] == pytest.approx(0.5)
    words = page(Material(parameters=[row])).words
    assert "0.500 0.0500 to 0.950 1/day" in words


def test_the_table_of_outputs_adds_up_flows_only() -> None:
    found = summarise_outputs(outputs())
    assert found["admissions"]["peak"] == pytest.approx(50) and found["admissions"]["peak_date"] == "2020-03-21"
    assert found["admissions"]["total"] == pytest.approx(float(outputs()["admissions"].sum()))
    assert found["ill"]["peak"] == pytest.approx(120) and found["ill"]["total"] is None
    assert found["deaths"]["peak"] == pytest.approx(2)
    numbered = xr.Dataset({"a": ("day", [1.0, 3.0], {"units": "people/day"})}, coords={"day": [0, 1]})
    assert summarise_outputs(numbered)["a"]["peak_date"] == "day 1"
    assert summarise_outputs(numbered * np.nan)["a"]["peak"] is None


def test_the_held_out_days_are_shaded_and_no_others(tmp_path: Path) -> None:
    figures.draw_fit([fit("bronx", held_out=None)], tmp_path / "none.png")
    figures.draw_fit([fit("bronx", held_out=30)], tmp_path / "some.png")
    assert not shaded(tmp_path / "none.png").any()
    columns = np.flatnonzero(shaded(tmp_path / "some.png"))
    width = imread(tmp_path / "some.png").shape[1]
    assert columns.min() > 0.72 * width and 0.18 * width < len(columns) < 0.28 * width


def test_released_fits_are_one_table(material: Material) -> None:
    table = tabulate_fits(material.fits)
    assert len(table) == sum(len(fit.dates) for fit in material.fits)
    for fit in material.fits:
        rows = table[(table.institution == fit.institution) & (table.series == fit.series)]
        np.testing.assert_array_equal(rows.date, fit.dates)
        np.testing.assert_array_equal(rows.observed, fit.observed)
        np.testing.assert_array_equal(rows[["q05", "q25", "q50", "q75", "q95"]].T, fit.quantiles)
        assert rows.held_out.sum() == (0 if fit.held_out is None else len(fit.dates) - fit.held_out)


def test_a_fit_shows_its_data_and_draws_the_same_bytes_again(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    figures.draw_fit([fit("bronx")], paths[0])
    figures.draw_fit([fit("bronx")], paths[1])
    figures.draw_fit([fit("bronx", observed=np.full(40, np.nan))], paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_a_prediction_that_is_not_finite_is_not_drawn_as_if_it_were(tmp_path: Path) -> None:
    broken = fit("bronx", quantiles=np.full((5, 40), np.nan))
    figures.draw_fit([broken], tmp_path / "fit.png")
    assert imread(tmp_path / "fit.png").shape[0] > 100


@pytest.mark.parametrize("changes", [{"quantiles": np.zeros((3, 40))}, {"observed": np.zeros(39)}])
def test_a_fit_of_other_shapes_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bronx/admissions: 40 dates"):
        fit("bronx", **changes)


@pytest.mark.parametrize("names", [["beta"], ["beta", "distancing"]])
def test_the_posterior_is_drawn_for_any_number_of_parameters(tmp_path: Path, names: list[str]) -> None:
    figures.draw_posterior(draws(1, 0.1)[names], draws(2, 0.5)[names], tmp_path / "a.png")
    figures.draw_posterior(draws(1, 0.1)[names], None, tmp_path / "b.png")
    constant = draws(1, 0.1)[names] * 0 + 1
    figures.draw_posterior(constant, None, tmp_path / "c.png")
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 3


def test_a_density_integrates_to_one_with_and_without_bounds() -> None:
    random = np.random.default_rng(3)
    for values, limits in ((random.normal(size=2000), (-6.0, 6.0)), (random.uniform(size=2000), (-0.2, 1.2))):
        grid = np.linspace(*limits, 400)
        density = figures._density(values, grid, limits)
        assert float(np.trapezoid(density, grid)) == pytest.approx(1.0, abs=0.03)
    assert density[(grid > 0.02) & (grid < 0.98)].min() > 0.75, "a uniform density falls off at its bounds"


@pytest.mark.parametrize("known", [True, False])
def test_outputs_are_drawn_with_their_gradient(tmp_path: Path, known: bool) -> None:
    table = np.stack([np.sin(np.arange(40)), np.zeros(40)], axis=1)
    gradient = xr.Dataset(
        {"admissions": (("time", "parameter"), table)},
        coords={"time": outputs()["time"], "parameter": ["beta", "distancing"]},
    )
    rows = [{"name": "beta", "value": 0.1}, {"name": "distancing", "value": 0.5}] if known else []
    material = Material(outputs=outputs(), gradient=gradient, parameters=rows)
    drawn = figures.draw_all(material, tmp_path)
    wide = imread(drawn["outputs"]).shape[1]
    plain = figures.draw_all(Material(outputs=outputs()), tmp_path)
    assert wide > imread(plain["outputs"]).shape[1]


def test_outputs_by_day_number_and_a_single_day_are_drawn(tmp_path: Path) -> None:
    numbered = xr.Dataset({"a": ("day", [3.0], {"units": "people"})}, coords={"day": [0]})
    gradient = xr.Dataset({"a": (("day", "parameter"), [[1.0]])}, coords={"day": [0], "parameter": ["beta"]})
    figures.draw_outputs(numbered, tmp_path / "a.png", gradient)
    assert (tmp_path / "a.png").is_file()


def test_the_loss_is_drawn_also_for_one_iteration(tmp_path: Path) -> None:
    figures.draw_loss(history(), tmp_path / "a.png")
    figures.draw_loss(history()[:1], tmp_path / "b.png")
    figures.draw_loss([{"iteration": 0, "loss": None, "kl": None}], tmp_path / "c.png")


def test_an_empty_report_is_a_page_still(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    assert "What ran" in Page(write_report(run, Material()).read_text()).words


def test_a_full_disk_is_told(tmp_path: Path, material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = Run.create(tmp_path / "run", {})
    (run.path / "report.html").write_text("the one before")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DiskFull, match="disk is full"):
        write_report(run, Material())
    assert (run.path / "report.html").read_text() == "the one before"


def test_numbers_are_written_for_people() -> None:
    shown = {
        1858: "1,858",
        52000.4: "52,000",
        0.12345: "0.123",
        -0.5: "−0.500",
        100.0: "100",
        0.00091: "0.000910",
        2.5e-7: "2.50 × 10⁻⁷",
        0.0: "0",
        None: "n/a",
        "flower": "flower",
    }
    assert {value: number(value) for value in shown} == shown
    assert number(float("nan")) == "n/a"


def test_file_names_are_plain() -> None:
    assert figures.file_name("St. John's / Queens") == "st_john_s_queens"
    assert re.fullmatch(r"[\w-]+", figures.file_name("../.."))

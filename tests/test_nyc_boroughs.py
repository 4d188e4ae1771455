"""The world of five boroughs: its wave, and what a borough observes; see also test_new_york.py."""

from __future__ import annotations

import csv
import datetime as dt
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lpm
from lpm import scenario as scenarios
from lpm.scenario import Scenario
from simulations.nyc_boroughs import make_figures

FOLDER = Path(__file__).resolve().parent.parent / "simulations" / "nyc_boroughs"
SMALL = 2000


@pytest.fixture(scope="module")
def world() -> Scenario:
    """The scenario at the size from which its groups may be opened."""
    return scenarios.load(FOLDER).with_options(agents=20_000)


@pytest.fixture(scope="module")
def code(world: Scenario) -> ModuleType:
    """Its model.py."""
    return world.module()


def test_fitted_tables_are_marked_as_no_observation() -> None:
    assert "NOT observed" in make_figures.SOURCES["population/household_size_by_borough_SYNTHETIC.csv"].publisher
    assert "SYNTHETIC" in (FOLDER / "figures" / "household_sizes.csv").read_text()


# ---- the epidemic


def test_nothing_spreads_without_transmission(world: Scenario) -> None:
    small = world.with_options(agents=SMALL)
    values = {name: small.defaults[name] for name in small.dynamics} | {"transmissibility": 0.02, "initial": 0.05}
    run = lpm.simulate(small.build(seed=3), values, steps=30, seed=3)
    still = 1 - run.outputs["susceptible"][-1].item() / small.people
    assert 0.04 < still < 0.12


def test_distancing_and_closed_schools_slow_the_wave(world: Scenario) -> None:
    model = world.build(seed=2)
    values = {name: world.defaults[name] for name in world.dynamics}
    draws = {name: [value] * 2 for name, value in values.items()} | {"distancing": [0.4, 1.2]}
    run = lpm.simulate(model, draws, steps=40, seed=2)
    cumulative = run.outputs["infections"].sum("time").values
    assert cumulative[0] > 1.5 * cumulative[1]


def test_a_reasonable_point_of_the_prior_makes_the_real_wave(world: Scenario) -> None:
    """City sums at the default values: the size and day of the peak, and the share that the serosurvey found."""
    peaks, days, shares = [], [], []
    observations = [world.observation(name) for name in world.institutions]
    theta = {name: torch.tensor([value], dtype=torch.float64) for name, value in world.defaults.items()}
    for seed in (1, 2):
        model = world.build(seed=seed)
        run = lpm.simulate(model, {name: world.defaults[name] for name in world.dynamics}, steps=world.steps, seed=seed)
        outputs = {k: torch.from_numpy(np.array(v.values, dtype=np.float64))[None] for k, v in run.outputs.items()}
        total = sum(o.series[0].expected(outputs, theta)[0] for o in observations).numpy()
        peaks.append(total.max())
        days.append(total.argmax())
        shares.append(1 - run.outputs["susceptible"].values[(dt.date(2020, 3, 29) - world.start).days] / world.people)
    real = sum(o.series[0].values for o in observations)
    assert np.nanmax(real) == 1858
    assert 0.6 < np.mean(peaks) / 1858 < 1.6
    assert abs(np.mean(days) - np.nanargmax(real)) <= 4
    assert 0.15 < np.mean(shares) < 0.32  # the survey: 0.227


def test_private_outputs_are_the_institutions_own(world: Scenario) -> None:
    model = world.build(["queens"], seed=1)
    assert set(model.private_outputs) == {"admissions/queens", "deaths/queens"}
    both = world.build(["bronx", "queens"], seed=1)
    values = {name: world.defaults[name] for name in world.dynamics}
    run = lpm.simulate(both, values, steps=10, seed=1)
    assert run.outputs["admissions/bronx"].sum() > 0
    assert run.outputs["admissions/queens"].sum() > 0


# ---- what an institution observes


def test_the_shipped_series_are_the_citys(world: Scenario, code: ModuleType, shared_data: Path) -> None:
    with (shared_data / "nyc_covid" / "daily_by_borough.csv").open() as stream:
        real = {(r["date"], r["area"]): r for r in csv.DictReader(stream)}
    series = world.observation("staten_island").series
    for t, k in itertools.product((code.BURN_IN, 30, world.steps - 1), (0, 1)):
        row = real[str(world.start + dt.timedelta(days=t)), "Staten Island"]
        assert series[k].values[t] == float(row["hospitalized" if k == 0 else "deaths"])
    assert np.isnan(series[0].values[: code.BURN_IN]).all()
    assert not np.isnan(series[0].values[code.BURN_IN :]).any()
    whole = world.observation("staten_island", shared_data).series
    assert all(np.array_equal(a.values, b.values, equal_nan=True) for a, b in zip(series, whole, strict=True))


def test_delays_are_distributions_with_the_means_of_the_table(code: ModuleType) -> None:
    days = np.arange(60)
    turn, late = (6.6, 4.9), code.REGISTRATION["bronx"]
    once = code.delay(turn)
    assert once.sum() == pytest.approx(1.0)
    assert once @ days == pytest.approx(6.6, abs=0.1)
    assert code.delay(turn, late=late) @ days == pytest.approx(once @ days + np.arange(3) @ late, abs=0.05)
    assert code.delay(turn, (10.7, 4.8)) @ days == pytest.approx(17.3, abs=0.2)

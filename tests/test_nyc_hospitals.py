"""The world of 42 hospitals: its wave, and what a hospital observes; see also test_new_york.py."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lpm
from lpm import scenario as scenarios
from lpm.scenario import Scenario
from simulations.nyc_hospitals import make_figures

FOLDER = Path(__file__).resolve().parent.parent / "simulations" / "nyc_hospitals"
SMALL = 4200


@pytest.fixture(scope="module")
def world() -> Scenario:
    """The scenario as it is shipped."""
    return scenarios.load(FOLDER)


@pytest.fixture(scope="module")
def code(world: Scenario) -> ModuleType:
    """Its model.py."""
    return world.module()


@pytest.fixture(scope="module")
def city(world: Scenario) -> lpm.Model:
    """The whole city's model at its default size, as every session builds it."""
    return world.build(seed=0)


# ---- what a hospital observes


def test_suppressed_weeks_are_intervals_that_hold_what_was_there(world: Scenario, shared_data: Path) -> None:
    """The file's sums over seven days tell most of the suppressed means: each lies in its interval."""
    with gzip.open(shared_data / "hospital" / "hospital_weekly_nyc.csv.gz", "rt") as stream:
        real = {(r["hospital_pk"], r["collection_week"]): r for r in csv.DictReader(stream) if r["core"] == "1"}
    told = 0
    for number, name in make_figures.HOSPITALS.items():
        series = world.observation(name).series[0]
        for day in np.flatnonzero(~np.isnan(series.intervals[:, 0])):
            week = str(world.start + dt.timedelta(days=int(day) - 6))
            row = real[number, week]
            assert float(row["total_adult_confirmed_covid_7day_avg"]) == make_figures.SUPPRESSED
            assert series.intervals[day].tolist() == [0, 4]
            patients = float(row["total_adult_confirmed_covid_7day_sum"])
            told += patients >= 0
            assert patients < 0 or round(patients / 7) <= 4
        for day in np.flatnonzero(~np.isnan(series.values)):
            row = real[number, str(world.start + dt.timedelta(days=int(day) - 6))]
            assert series.values[day] == round(float(row["total_adult_confirmed_covid_7day_avg"]))
    assert told >= 15  # of 19


def test_the_citys_beds_are_those_of_the_winter_wave(world: Scenario) -> None:
    series = [world.observation(name).series[0] for name in world.institutions]
    total = np.nansum([s.values for s in series], axis=0)
    peak = int(np.argmax(total))
    assert world.start + dt.timedelta(days=peak) == dt.date(2021, 1, 28)
    assert 4060 < total[peak] < 4100
    assert all(not s.observed[:13].any() for s in series)
    stopped = world.observation("richmond").series[0]
    assert np.flatnonzero(stopped.observed).max() < (dt.date(2020, 12, 4) - world.start).days
    assert sum(int(s.observed[-28:].sum()) for s in series) == 41 * 4


# ---- the epidemic


def test_beds_are_counted_by_the_chance_of_a_hospital_at_each_age(world: Scenario, code: ModuleType) -> None:
    """The city's expected beds are the sum of the hospitals', and every stay ends after its days."""
    small = world.with_options(agents=SMALL)
    model = small.build(seed=0)
    values = {name: small.defaults[name] for name in small.dynamics} | {"transmissibility": 0.02, "initial": 0.02}
    run = lpm.simulate(model, {k: [v] * 2 for k, v in values.items()} | {"stay": [6.0, 18.0]}, steps=70, seed=3)
    own = sum(run.outputs[f"census/{name}"].values for name in world.institutions)
    np.testing.assert_allclose(own, run.outputs["census"].values, rtol=1e-9)
    short, long = run.outputs["census"].values.T
    assert long[20] > 1.5 * short[20]
    assert long[-1] < 0.1 * long.max()
    # Longer stays send nobody else to a hospital.
    assert np.array_equal(run.outputs["admissions"].values[:, 0], run.outputs["admissions"].values[:, 1])


def test_changes_of_transmission_and_distancing_do_what_they_say(world: Scenario, code: ModuleType) -> None:
    small = world.with_options(agents=SMALL)
    draws = {name: [small.defaults[name]] * 3 for name in small.dynamics} | {"transmissibility": [0.15] * 3}
    draws |= {"december": [1.0, 1.4, 1.0], "distancing": [1.0, 1.0, 2.0], "initial": [0.02] * 3}
    run = lpm.simulate(small.build(seed=0), draws, steps=60, seed=3)
    infections = run.outputs["infections"].values
    total = infections.sum(axis=0)
    assert total[1] > total[0] > total[2]
    begins = (code.CHANGES["december"][0] - world.start).days
    assert np.array_equal(infections[: begins + 1, 0], infections[: begins + 1, 1])
    assert 0.69 < run.outputs["susceptible"].values[0, 0] / small.people < 1 - code.IMMUNE


def test_stages_at_the_start_are_those_of_steady_growth(code: ModuleType) -> None:
    days = {"E": 4.5, "P": 1.1, "A": 3.5, "B": 4.5, "I": 2.4, "L": 4.2, "T": 1.4, "H": 7.6}
    assert code._held(days, 0.0) == days
    growth = code.figures().growth
    assert growth == pytest.approx(np.log(12011 / 4951) / 21)  # cases of the week before, and of three weeks earlier
    held, age = code._held(days, growth), 0.0
    for stage in ("E", "P", "I", "L", "T", "H"):
        ends = age + days[stage]
        assert held[stage] == pytest.approx((np.exp(-growth * age) - np.exp(-growth * ends)) / growth, rel=0.01)
        age = ends


def test_infections_start_where_cases_were(world: Scenario, code: ModuleType) -> None:
    f = code.figures()
    borough = np.array([each.people for each in f.city.districts])
    assert f.seeding @ borough == pytest.approx(borough.sum())
    model = world.build(["kings_county", "bellevue"], seed=0)
    values = {name: world.defaults[name] for name in world.dynamics} | {"initial": 0.05}
    run = lpm.simulate(model, values, steps=10, seed=1)
    patients = [run.outputs[f"census/{name}"].values[5] for name in ("kings_county", "bellevue")]
    people = [f.city.people[f.city.institutions.index(name)] for name in ("kings_county", "bellevue")]
    wanted = f.seeding[1] / f.seeding[2]
    assert patients[0] / people[0] > 0.7 * wanted * patients[1] / people[1]


def test_default_values_make_the_real_wave(world: Scenario, city: lpm.Model) -> None:
    theta = {name: torch.tensor([value], dtype=torch.float64) for name, value in world.defaults.items()}
    values = {name: world.defaults[name] for name in world.dynamics}
    observations = [world.observation(name) for name in world.institutions]
    real = sum(np.nan_to_num(o.series[0].values) for o in observations)
    weeks = np.arange(13, world.steps, 7)
    made = np.zeros(weeks.size)
    for seed in (1, 2):
        run = lpm.simulate(city, values, steps=world.steps, seed=seed)
        outputs = {k: torch.from_numpy(np.array(v.values, dtype=np.float64))[None] for k, v in run.outputs.items()}
        made += sum(o.series[0].expected(outputs, theta)[0].numpy() for o in observations)[weeks] / 2
    assert 0.75 < made.max() / real.max() < 1.3
    assert abs(int(made.argmax()) - int(real[weeks].argmax())) <= 3
    assert np.all(np.abs(np.log(made / real[weeks])) < np.log(1.5))

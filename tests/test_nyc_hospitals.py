"""The world of 42 hospitals: its tables are what the full files say; catchments and groups keep what is promised."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import gzip
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lpm
from lpm import scenario as scenarios
from lpm.errors import DataMissing, InputError
from lpm.launch import group_institutions
from lpm.population.synthesis import apportion
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


def owners(model: lpm.Model) -> np.ndarray:
    """The hospital of each agent, from its id [agents]."""
    return (model.population.addresses >> np.uint64(40)).astype(np.int64) - 1


# ---- tables of figures


def test_the_tables_are_what_the_full_files_say(shared_data: Path, tmp_path: Path) -> None:
    make_figures.make(shared_data, tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    shipped = {path.name: path.read_text() for path in (FOLDER / "figures").glob("*.csv")}
    assert made == shipped


def test_every_table_says_its_source_and_what_was_changed() -> None:
    tables = list((FOLDER / "figures").glob("*.csv"))
    assert len(tables) == 61
    for path in tables:
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(line.startswith("# Source: ") and "https://" in line for line in header), path.name
        assert any(line.startswith("# Changes made: ") for line in header), path.name
        assert path.stat().st_size < 20_000, path.name


def test_no_table_comes_from_a_file_that_may_not_be_carried() -> None:
    for name in make_figures.SOURCES:
        assert "nta_" not in name
        assert "multi_region" not in name


def test_a_missing_full_file_says_where_it_can_be_had_and_its_name(shared_data: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    for name in make_figures.SOURCES:
        if (shared_data / name).is_file() and not name.startswith("hospital/hospital_weekly"):
            (some / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared_data / name, some / name)
    with pytest.raises(DataMissing) as missing:
        make_figures.make(some, tmp_path / "out")
    text = str(missing.value)
    assert "hospital/hospital_weekly_nyc.csv.gz" in text
    assert "https://healthdata.gov" in text
    assert "LPM_DATA" in text


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
    assert told >= 35


def test_the_citys_beds_are_those_of_the_winter_wave(world: Scenario) -> None:
    series = [world.observation(name).series[0] for name in world.institutions]
    total = np.nansum([s.values for s in series], axis=0)
    peak = int(np.argmax(total))
    assert world.start + dt.timedelta(days=peak) == dt.date(2021, 1, 28)
    assert 4060 < total[peak] < 4100
    assert all(not s.observed[:14].any() for s in series)
    stopped = world.observation("richmond").series[0]
    assert np.flatnonzero(stopped.observed).max() < (dt.date(2020, 12, 4) - world.start).days
    assert sum(int(s.observed[-28:].sum()) for s in series) == 41 * 4


# ---- people


def test_catchments_are_shares_of_boroughs(world: Scenario, code: ModuleType, city: lpm.Model) -> None:
    f = code.figures()
    assert f.institutions == world.institutions and len(f.institutions) == 42
    np.testing.assert_allclose(
        np.bincount(f.borough, f.people), [1418207, 2559903, 1628706, 2253858, 476143], rtol=1e-5
    )
    assert np.bincount(owners(city)).tolist() == apportion(world.agents, f.people).tolist()
    assert np.bincount(owners(city)).min() >= 30
    assert city.population.weight * city.population.agents == pytest.approx(world.people, rel=1e-5)


def test_shards_are_pieces_of_the_city(world: Scenario, city: lpm.Model) -> None:
    whole = {int(a): k for k, a in enumerate(city.population.addresses)}
    for names in (("elmhurst",), ("richmond", "calvary", "bellevue")):
        shard = world.build(names, seed=0)
        at = np.array([whole[int(a)] for a in shard.population.addresses])
        assert np.array_equal(city.population.attributes["age"][at], shard.population.attributes["age"])
        for network in ("work", "community"):
            assert np.array_equal(city.network(network).cell_of[at], shard.network(network).cell_of)
        for network in ("household", "school", "team"):
            # Groups are numbered within a shard: the same people are together, and nobody of another hospital.
            here, there = shard.network(network).cell_of, city.network(network).cell_of[at]
            assert np.unique(np.stack([here, there]), axis=1).shape[1] == np.unique(here).size == np.unique(there).size


def test_households_stay_inside_a_catchment(city: lpm.Model) -> None:
    for network in ("household", "school", "team"):
        groups = city.network(network)
        inside = groups.cell_of >= int(groups.outsiders)
        pairs = np.unique(np.stack([groups.cell_of[inside], owners(city)[inside]]), axis=1)
        assert pairs.shape[1] == np.unique(groups.cell_of[inside]).size


# ---- shared groups


def test_shared_groups_may_be_opened_however_the_hospitals_are_joined(world: Scenario, city: lpm.Model) -> None:
    for network in city.networks:
        if not network.shared:
            assert network.name not in world.networks
            continue
        assert world.networks[network.name].groups == network.cells
        table = np.zeros((42, network.cells), dtype=np.int64)
        np.add.at(table, (owners(city), network.cell_of), 1)
        assert table.sum(axis=0).min() >= world.minimum_people
        for parties in range(3, 43):
            groups = group_institutions(world.institutions, parties)
            number = {name: k for k, names in enumerate(groups.values()) for name in names}
            joined = np.zeros((parties, network.cells), dtype=np.int64)
            np.add.at(joined, [number[name] for name in world.institutions], table)
            assert (joined > 0).sum(axis=0).min() >= world.minimum_institutions, (network.name, parties)


def test_the_groups_fit_a_round(world: Scenario) -> None:
    groups = sum(network.groups for network in world.networks.values())
    assert world.calibration.draws * (1 + 2 * len(world.dynamics)) * groups <= 10_000


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


def test_immunity_season_and_distancing_do_what_they_say(world: Scenario) -> None:
    small = world.with_options(agents=SMALL)
    model = small.build(seed=0)
    draws = {name: [small.defaults[name]] * 4 for name in small.dynamics} | {"transmissibility": [0.15] * 4}
    draws |= {"season": [0.4, 0.8, 0.4, 0.4], "immune": [0.24, 0.24, 0.4, 0.24], "distancing": [1.1, 1.1, 1.1, 1.4]}
    run = lpm.simulate(model, draws | {"initial": [0.02] * 4}, steps=60, seed=3)
    total = run.outputs["infections"].sum("time").values
    assert total[1] > total[0] > max(total[2], total[3])
    susceptible = run.outputs["susceptible"].values[0] / small.people
    assert 0.70 < susceptible[0] < 0.76 and 0.54 < susceptible[2] < 0.60


def test_infections_start_where_cases_were(world: Scenario, code: ModuleType) -> None:
    f = code.figures()
    assert f.seeding @ f.borough_people == pytest.approx(f.borough_people.sum())
    model = world.build(["kings_county", "bellevue"], seed=0)
    values = {name: world.defaults[name] for name in world.dynamics} | {"initial": 0.05, "immune": 0.1}
    run = lpm.simulate(model, values, steps=10, seed=1)
    patients = [run.outputs[f"census/{name}"].values[5] for name in ("kings_county", "bellevue")]
    people = [f.people[f.institutions.index(name)] for name in ("kings_county", "bellevue")]
    wanted = f.seeding[1] / f.seeding[2]
    assert patients[0] / people[0] > 0.7 * wanted * patients[1] / people[1]


def test_default_values_make_the_real_wave(world: Scenario, city: lpm.Model) -> None:
    theta = {name: torch.tensor([value], dtype=torch.float64) for name, value in world.defaults.items()}
    values = {name: world.defaults[name] for name in world.dynamics}
    observations = [world.observation(name) for name in world.institutions]
    real = sum(np.nan_to_num(o.series[0].values) for o in observations)
    weeks = np.arange(20, world.steps, 7)
    made = np.zeros(weeks.size)
    for seed in (1, 2):
        run = lpm.simulate(city, values, steps=world.steps, seed=seed)
        outputs = {k: torch.from_numpy(np.array(v.values, dtype=np.float64))[None] for k, v in run.outputs.items()}
        made += sum(o.series[0].expected(outputs, theta)[0].numpy() for o in observations)[weeks] / 2
    assert 0.6 < made.max() / real.max() < 1.6
    assert abs(int(made.argmax()) - int(real[weeks].argmax())) <= 3
    assert np.all(np.abs(np.log(made / real[weeks])) < np.log(2.5))


# ---- what a hospital observes


def test_a_hospitals_own_file_is_read_and_its_faults_are_named(world: Scenario, tmp_path: Path) -> None:
    lines = (FOLDER / "figures" / "observed_elmhurst.csv").read_text().splitlines()
    (tmp_path / "elmhurst.csv").write_text("\n".join(lines))
    assert np.nansum(world.observation("elmhurst", tmp_path).series[0].values) > 100
    bad = next(k for k, line in enumerate(lines) if line.startswith("2020-12-04"))
    for broken in (lines[:bad] + lines[bad + 1 :], [*lines[:bad], "2020-12-04,7431,-1", *lines[bad + 1 :]]):
        (tmp_path / "elmhurst.csv").write_text("\n".join(broken))
        with pytest.raises(InputError, match=r"elmhurst\.csv") as refused:
            world.observation("elmhurst", tmp_path)
        assert "7431" not in str(refused.value)
    with pytest.raises(InputError, match=r"bellevue\.csv"):
        world.observation("bellevue", tmp_path)


def test_an_unknown_hospital_too_few_agents_and_a_start_without_mobility_are_refused(
    world: Scenario, code: ModuleType
) -> None:
    with pytest.raises(InputError, match="hoboken"):
        code.catchment("hoboken", 1000, 1)
    with pytest.raises(InputError, match="Raise --agents"):
        code.catchment("eye_and_ear", 100, 1)
    early = dataclasses.replace(world, start=dt.date(2019, 1, 1))
    with pytest.raises(InputError, match="mobility runs from"):
        early.build(["elmhurst"], seed=1)

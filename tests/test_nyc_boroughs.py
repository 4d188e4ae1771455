"""The New York world: its tables are what the full files say, and its people and groups keep what is promised."""

from __future__ import annotations

import csv
import datetime as dt
import itertools
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lpm
from lpm import scenario as scenarios
from lpm.errors import DataMissing, InputError
from lpm.population.synthesis import apportion
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


@pytest.fixture(scope="module")
def city(world: Scenario) -> lpm.Model:
    """The whole city's model."""
    return world.build(seed=1)


def owners(model: lpm.Model) -> np.ndarray:
    """The borough of each agent, from its id [agents]."""
    return (model.population.addresses >> np.uint64(40)).astype(np.int64) - 1


# ---- tables of figures


def test_the_tables_are_what_the_full_files_say(shared_data: Path, tmp_path: Path) -> None:
    make_figures.make(shared_data, tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    shipped = {path.name: path.read_text() for path in (FOLDER / "figures").glob("*.csv")}
    assert made == shipped


def test_every_table_says_its_source_and_what_was_changed() -> None:
    for path in (FOLDER / "figures").glob("*.csv"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(line.startswith("# Source: ") and "https://" in line for line in header), path.name
        assert any(line.startswith("# Changes made: ") for line in header), path.name
        assert path.stat().st_size < 20_000, path.name


def test_no_table_comes_from_a_file_that_may_not_be_carried() -> None:
    for name in make_figures.SOURCES:
        assert "nta_" not in name
        assert "multi_region" not in name
    assert "NOT observed" in make_figures.SOURCES["population/household_size_by_borough_SYNTHETIC.csv"].publisher
    assert "SYNTHETIC" in (FOLDER / "figures" / "household_sizes.csv").read_text()


def test_a_missing_full_file_says_where_it_can_be_had_and_its_name(shared_data: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    (some / "population").mkdir(parents=True)
    name = "population/nys_county_age_sex_2019.csv"
    shutil.copy(shared_data / name, some / name)
    with pytest.raises(DataMissing) as missing:
        make_figures.make(some, tmp_path / "out")
    text = str(missing.value)
    assert "population/households_by_county_acs2018.csv" in text
    assert "https://data.census.gov" in text
    assert "LPM_DATA" in text


# ---- people


def test_a_borough_has_its_share_of_agents_and_their_weight_makes_the_city(world: Scenario, city: lpm.Model) -> None:
    people = [1418207, 2559903, 1628706, 2253858, 476143]
    assert np.bincount(owners(city)).tolist() == apportion(20_000, people).tolist()
    assert city.population.weight * city.population.agents == pytest.approx(world.people)


def test_a_boroughs_people_are_the_same_whoever_else_is_in_the_shard(code: ModuleType) -> None:
    for name in ("staten_island", "queens"):
        one, again = code.shard(name, SMALL, 7), code.shard(name, SMALL, 7)
        other = code.shard(name, SMALL, 8)
        assert all(
            np.array_equal(getattr(one, f), getattr(again, f)) for f in ("age", "household", "team", "community")
        )
        assert not np.array_equal(one.age, other.age)


@pytest.mark.parametrize(
    "parties", [(("queens",),), (("staten_island", "bronx"),), (("manhattan", "queens", "brooklyn"),)]
)
def test_shards_are_pieces_of_the_city(world: Scenario, city: lpm.Model, parties: tuple[tuple[str, ...], ...]) -> None:
    whole = {int(a): k for k, a in enumerate(city.population.addresses)}
    for names in parties:
        shard = world.build(names, seed=1)
        at = np.array([whole[int(a)] for a in shard.population.addresses])
        assert np.array_equal(city.population.attributes["age"][at], shard.population.attributes["age"])
        for network in ("work", "community"):
            assert np.array_equal(city.network(network).cell_of[at], shard.network(network).cell_of)
        for network in ("household", "school", "team"):
            # Groups are numbered within a shard: the same people are together.
            here, there = shard.network(network).cell_of, city.network(network).cell_of[at]
            pairs = np.unique(np.stack([here, there]), axis=1)
            assert pairs.shape[1] == np.unique(here).size == np.unique(there).size


def test_pupils_are_in_classes_and_workers_in_teams(code: ModuleType) -> None:
    borough = code.shard("brooklyn", 20_000, 1)
    pupil = borough.school >= 0
    assert np.array_equal(pupil, (borough.age >= 5) & (borough.age < 18))
    assert 14 <= np.bincount(borough.school[pupil]).min() <= np.bincount(borough.school[pupil]).max() <= 28
    groups = code.figures().work_groups
    worker = borough.work < groups
    assert np.array_equal(worker, borough.team >= 0)
    assert worker.mean() == pytest.approx(1_142_200 / 2_559_903, abs=0.002)
    assert borough.age[worker].min() >= 15
    assert np.bincount(borough.team[worker]).max() <= 18
    for team in np.unique(borough.team[worker])[:50]:  # a team works in one stratum
        assert np.unique(borough.work[borough.team == team]).size <= 2  # two where small strata were merged


# ---- shared groups


def test_the_declared_numbers_of_groups_fit_a_round(world: Scenario, city: lpm.Model) -> None:
    groups = 0
    for network in city.networks:
        if network.shared:
            assert world.networks[network.name].groups == network.cells
            groups += network.cells
        else:
            assert network.name not in world.networks
    draws = world.calibration.draws
    assert draws * (1 + 2 * len(world.parameters)) * groups <= 10_000
    assert groups <= 150
    assert world.steps <= 100


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_shared_group_has_people_of_every_borough(world: Scenario, seed: int) -> None:
    model = world.build(seed=seed)
    for network in model.networks:
        if network.shared:
            table = np.zeros((5, network.cells), dtype=np.int64)
            np.add.at(table, (owners(model), network.cell_of), 1)
            assert table.sum(axis=0).min() >= world.minimum_people
            # With somebody of each borough in it, a group has three parties for any three made of whole boroughs.
            assert table.min() >= 1


def test_a_person_of_any_age_and_place_has_the_communitys_contacts(code: ModuleType) -> None:
    mixing = code.figures().mixing
    assert mixing.sum(axis=1) == pytest.approx(np.full(43, 2.79), rel=0.01)
    assert np.all(mixing > 0)


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


def test_an_institutions_own_file_is_read_and_its_faults_are_named(world: Scenario, tmp_path: Path) -> None:
    lines = (FOLDER / "figures" / "observed_bronx.csv").read_text().splitlines()
    (tmp_path / "bronx.csv").write_text("\n".join(lines))
    assert np.nansum(world.observation("bronx", tmp_path).series[0].values) > 1000
    bad = next(k for k, line in enumerate(lines) if line.startswith("2020-04-02"))
    for broken in (lines[:bad] + lines[bad + 1 :], [*lines[:bad], "2020-04-02,-7431,1", *lines[bad + 1 :]]):
        (tmp_path / "bronx.csv").write_text("\n".join(broken))
        with pytest.raises(InputError, match=r"bronx\.csv") as refused:
            world.observation("bronx", tmp_path)
        assert "7431" not in str(refused.value)
    with pytest.raises(InputError, match=r"queens\.csv"):
        world.observation("queens", tmp_path)


def test_delays_are_distributions_with_the_means_of_the_table(code: ModuleType) -> None:
    days = np.arange(60)
    turn, late = (6.6, 4.9), code.REGISTRATION["bronx"]
    once = code.delay(turn)
    assert once.sum() == pytest.approx(1.0)
    assert once @ days == pytest.approx(6.6, abs=0.1)
    assert code.delay(turn, late=late) @ days == pytest.approx(once @ days + np.arange(3) @ late, abs=0.05)
    assert code.delay(turn, (10.7, 4.8)) @ days == pytest.approx(17.3, abs=0.2)


def test_an_unknown_institution_and_a_start_without_mobility_are_refused(world: Scenario, code: ModuleType) -> None:
    with pytest.raises(InputError, match="hoboken"):
        code.shard("hoboken", 100, 1)
    with pytest.raises(InputError, match="Raise --agents"):
        code.shard("staten_island", 3, 1)
    early = scenarios.dataclasses.replace(world, start=dt.date(2019, 1, 1))
    with pytest.raises(InputError, match="mobility runs from"):
        early.build(["queens"], seed=1)

"""What the worlds of New York share: their tables, their people, and groups that may be opened."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lpm
from lpm import scenario as scenarios
from lpm.errors import DataMissing, InputError
from lpm.launch import group_institutions
from lpm.population.city import City
from lpm.population.synthesis import apportion
from lpm.scenario import Scenario
from simulations.nyc_boroughs import make_figures as boroughs
from simulations.nyc_hospitals import make_figures as hospitals

SIMULATIONS = Path(__file__).resolve().parent.parent / "simulations"


@dataclass(frozen=True)
class World:
    """A scenario at the size from which its groups may be opened, and its whole city."""

    scenario: Scenario
    code: ModuleType
    model: lpm.Model
    figures: ModuleType

    @property
    def city(self) -> City:
        """Its tables."""
        city: City = self.code.figures().city
        return city

    @property
    def owners(self) -> np.ndarray:
        """The institution of each agent, from its id [agents]."""
        return (self.model.population.addresses >> np.uint64(40)).astype(np.int64) - 1


@pytest.fixture(scope="module", params=[("nyc_boroughs", 20_000), ("nyc_hospitals", 42_000)], ids=lambda p: p[0])
def world(request: pytest.FixtureRequest) -> World:
    """Each of the worlds."""
    name, agents = request.param
    scenario = scenarios.load(SIMULATIONS / name).with_options(agents=agents)
    made = {"nyc_boroughs": boroughs, "nyc_hospitals": hospitals}[name]
    return World(scenario, scenario.module(), scenario.build(seed=1), made)


# ---- tables of figures


def test_the_tables_are_what_the_full_files_say(world: World, shared_data: Path, tmp_path: Path) -> None:
    world.figures.make(shared_data, tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    shipped = {path.name: path.read_text() for path in (world.scenario.folder / "figures").glob("*.csv")}
    assert made == shipped


def test_every_table_says_its_source_and_what_was_changed(world: World) -> None:
    tables = list((world.scenario.folder / "figures").glob("*.csv"))
    assert len(tables) >= 15 + len(world.scenario.institutions)
    for path in tables:
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(line.startswith("# Source: ") and "https://" in line for line in header), path.name
        assert any(line.startswith("# Changes made: ") for line in header), path.name
        assert path.stat().st_size < 20_000, path.name


def test_no_table_comes_from_a_file_that_may_not_be_carried(world: World) -> None:
    for name in world.figures.SOURCES:
        assert "nta_" not in name
        assert "multi_region" not in name


@pytest.mark.parametrize(
    ("made", "missing", "page"),
    [
        (boroughs, "population/households_by_county_acs2018.csv", "https://data.census.gov"),
        (hospitals, "hospital/hospital_weekly_nyc.csv.gz", "https://healthdata.gov"),
    ],
)
def test_a_missing_full_file_says_where_it_can_be_had_and_its_name(
    made: ModuleType, missing: str, page: str, shared_data: Path, tmp_path: Path
) -> None:
    for name in made.SOURCES:
        if name != missing:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared_data / name, tmp_path / name)
    with pytest.raises(DataMissing) as refused:
        made.make(tmp_path, tmp_path / "out")
    assert all(part in str(refused.value) for part in (missing, page, "LPM_DATA"))


# ---- people


def test_an_institution_has_its_share_of_agents_and_their_weight_makes_the_city(world: World) -> None:
    city, people = world.city, [1418207, 2559903, 1628706, 2253858, 476143]
    assert city.institutions == world.scenario.institutions
    np.testing.assert_allclose([district.people for district in city.districts], people)
    np.testing.assert_allclose(np.bincount(city.home, city.people), people, rtol=1e-5)
    assert np.bincount(world.owners).tolist() == apportion(world.scenario.agents, city.people).tolist()
    population = world.model.population
    assert population.weight * population.agents == pytest.approx(world.scenario.people, rel=1e-5)


def test_an_institutions_people_depend_on_it_and_the_seed_alone(world: World) -> None:
    name = world.scenario.institutions[-1]
    one, again, other = (world.city.residents(name, world.scenario.agents, seed) for seed in (7, 7, 8))
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(again, field.name))
    assert not np.array_equal(one.age, other.age)


def test_shards_are_pieces_of_the_city(world: World) -> None:
    city, institutions = world.model, world.scenario.institutions
    whole = {int(a): k for k, a in enumerate(city.population.addresses)}
    for names in ((institutions[3],), (institutions[-1], institutions[0]), (institutions[2], *institutions[:2])):
        shard = world.scenario.build(names, seed=1)
        at = np.array([whole[int(a)] for a in shard.population.addresses])
        assert np.array_equal(city.population.attributes["age"][at], shard.population.attributes["age"])
        for network in ("work", "community"):
            assert np.array_equal(city.network(network).cell_of[at], shard.network(network).cell_of)
        for network in ("household", "school", "team"):
            # Groups are numbered within a shard: the same people are together, and nobody of another institution.
            here, there = shard.network(network).cell_of, city.network(network).cell_of[at]
            assert np.unique(np.stack([here, there]), axis=1).shape[1] == np.unique(here).size == np.unique(there).size


def test_homes_classes_and_teams_are_within_one_institution(world: World) -> None:
    for network in ("household", "school", "team"):
        groups = world.model.network(network)
        inside = groups.cell_of >= int(groups.outsiders)
        pairs = np.unique(np.stack([groups.cell_of[inside], world.owners[inside]]), axis=1)
        assert pairs.shape[1] == np.unique(groups.cell_of[inside]).size


def test_pupils_are_in_classes_and_workers_in_teams(world: World) -> None:
    city = world.city
    number = int(city.people.argmax())
    people = city.residents(city.institutions[number], world.scenario.agents, 1)
    pupil = people.school >= 0
    assert np.array_equal(pupil, (people.age >= 5) & (people.age < 18))
    assert 14 <= np.bincount(people.school[pupil]).min() <= np.bincount(people.school[pupil]).max() <= 28
    worker = people.work < city.work_groups
    assert np.array_equal(worker, people.team >= 0)
    home = city.districts[city.home[number]]
    assert worker.mean() == pytest.approx(home.workers.sum() / home.people, abs=0.002)
    assert people.age[worker].min() >= 15
    assert np.bincount(people.team[worker]).max() <= 18
    for team in np.unique(people.team[worker])[:50]:  # a team works in one stratum
        assert np.unique(people.work[people.team == team]).size <= 2  # two where small strata were merged


# ---- shared groups


def test_the_declared_numbers_of_groups_fit_a_round(world: World) -> None:
    scenario, groups = world.scenario, 0
    for network in world.model.networks:
        assert network.shared == (network.name in scenario.networks)
        if network.shared:
            assert scenario.networks[network.name].groups == network.cells
            groups += network.cells
    assert scenario.calibration.draws * (1 + 2 * len(scenario.dynamics)) * groups <= 10_000


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_groups_may_be_opened_however_the_institutions_are_joined(world: World, seed: int) -> None:
    scenario = world.scenario
    model = world.model if seed == 1 else scenario.build(seed=seed)
    count = len(scenario.institutions)
    for network in model.networks:
        if not network.shared:
            continue
        table = np.zeros((count, network.cells), dtype=np.int64)
        np.add.at(table, (world.owners, network.cell_of), 1)
        assert table.sum(axis=0).min() >= scenario.minimum_people
        for parties in range(3, count + 1):
            groups = group_institutions(scenario.institutions, parties)
            number = {name: k for k, names in enumerate(groups.values()) for name in names}
            joined = np.zeros((parties, network.cells), dtype=np.int64)
            np.add.at(joined, [number[name] for name in scenario.institutions], table)
            assert (joined > 0).sum(axis=0).min() >= scenario.minimum_institutions, (network.name, parties)


def test_a_person_of_any_age_and_place_has_the_communitys_contacts(world: World) -> None:
    mixing = world.city.mixing
    assert mixing.sum(axis=1) == pytest.approx(np.full(len(mixing), 2.79), rel=0.01)
    assert np.all(mixing > 0)


# ---- what is refused


def test_an_institutions_own_file_is_read_and_its_faults_are_named(world: World, tmp_path: Path) -> None:
    scenario = world.scenario
    name, other = scenario.institutions[-2:]
    lines = (scenario.folder / "figures" / f"observed_{name}.csv").read_text().splitlines()
    own = tmp_path / f"{name}.csv"
    own.write_text("\n".join(lines))
    assert np.nansum(scenario.observation(name, tmp_path).series[0].values) > 5
    bad = lines.index(next(line for line in lines if line[:10] >= str(scenario.start + dt.timedelta(days=40))))
    day = lines[bad][:10]
    for broken in (lines[:bad] + lines[bad + 1 :], [*lines[:bad], f"{day},7431,-1", *lines[bad + 1 :]]):
        own.write_text("\n".join(broken))
        with pytest.raises(InputError, match=rf"{name}\.csv") as refused:
            scenario.observation(name, tmp_path)
        assert "7431" not in str(refused.value)
    with pytest.raises(InputError, match=rf"{other}\.csv"):
        scenario.observation(other, tmp_path)


def test_an_unknown_institution_too_few_agents_and_a_start_without_mobility_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="hoboken"):
        world.city.residents("hoboken", 1000, 1)
    with pytest.raises(InputError, match="Raise --agents"):
        world.city.residents(world.city.institutions[int(world.city.people.argmin())], 3, 1)
    early = dataclasses.replace(world.scenario, start=dt.date(2019, 1, 1))
    with pytest.raises(InputError, match="mobility runs from"):
        early.build([world.scenario.institutions[0]], seed=1)

"""A city's institutions from public tables: whose people each holds, their homes, schools, workplaces and cells.

An institution's people are a share of those of one district (a borough, say). They depend on the seed and the
institution alone, so a party builds its own and nobody else's, and institutions can be put together in any way. What
they share are cells, in which people of several institutions meet: the groups of ⊕ (eq. 1).
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError
from lpm.networks import Groups
from lpm.population.cells import cell_mixing, class_of, rows
from lpm.population.people import Population
from lpm.population.synthesis import Margins, Stream, apportion, divide, place, synthesise

__all__ = ["City", "District", "Residents", "Table", "tables"]

Table = list[dict[str, str]]
"""The rows of a table of figures: column → text."""

TEAM = 12
"""People in a small workplace team."""

CLASS = 20
"""Pupils in a school class."""

SCHOOL_AGES = (5, 18)
"""Ages at school, from and below, years."""

ABROAD = 0.2
"""Share of community contacts met anywhere in the city and not in one's own zone. An assumption."""


def tables(folder: Path) -> dict[str, Table]:
    """The public tables of a folder by name; never an institution's series (`observed_*`), which are its own."""
    return {path.stem: rows(path) for path in sorted(folder.glob("*.csv")) if not path.stem.startswith("observed")}


@dataclass(frozen=True, eq=False)
class District:
    """A part of the city that the public tables describe.

    Attributes:
        name: as in the tables.
        margins: what is known of its people and households.
        by_class: its people by age class [ages].
        workers: its people who work, by place of work [places].
    """

    name: str
    margins: Margins
    by_class: NDArray[np.float64]
    workers: NDArray[np.float64]

    @property
    def people(self) -> float:
        """All its people."""
        return float(self.by_class.sum())


@dataclass(frozen=True, eq=False)
class Residents:
    """One institution's people and the groups they are in, each array [agents]; -1: no school, no team."""

    age: NDArray[np.int8]
    household: NDArray[np.int64]
    school: NDArray[np.int64]
    team: NDArray[np.int64]
    work: NDArray[np.int64]
    community: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class City:
    """Districts, institutions, and where their people meet and when.

    Attributes:
        districts: in the order of the tables.
        institutions: in theirs.
        home: number of each institution's district.
        people: of each institution [institutions].
        ages: lower ends of the age classes.
        visits: share of an institution's people who spend their time in each zone [institution, zone].
        cells: community group of a zone and age class [zone, age class].
        mixing: community contacts per day between groups [cells, cells].
        employment: share with a job by single year of age; the last is open.
        work_group: shared group of each place of work [places].
        contacts: setting → contacts per day.
        prognosis: column → by age class.
        days: transition → (mean, sd) in days.
        mobility: date → change of visits in the community and at work, as fractions.
        dates: event → date.
    """

    districts: tuple[District, ...]
    institutions: tuple[str, ...]
    home: tuple[int, ...]
    people: NDArray[np.float64]
    ages: tuple[int, ...]
    visits: NDArray[np.float64]
    cells: NDArray[np.int64]
    mixing: NDArray[np.float64]
    employment: NDArray[np.float64]
    work_group: NDArray[np.int64]
    contacts: Mapping[str, float]
    prognosis: Mapping[str, NDArray[np.float64]]
    days: Mapping[str, tuple[float, float]]
    mobility: Mapping[dt.date, tuple[float, float]]
    dates: Mapping[str, dt.date]

    @classmethod
    def from_tables(
        cls,
        table: Mapping[str, Table],
        visits: NDArray[np.float64],
        *,
        institutions: Sequence[str] | None = None,
        home: Sequence[str] | None = None,
        share: NDArray[np.float64] | None = None,
    ) -> City:
        """Read a city.

        Args:
            table: the tables `people`, `households`, `household_sizes` (people by district, age and sex), `commute`,
                `jobs`, `employment`, `work_strata` (work), `community_cells`, `community_mixing`, `contacts` (meeting),
                `prognosis`, `durations` (the disease), `mobility` and `dates`.
            visits: share of an institution's people who spend their time in each zone [institution, zone].
            institutions: their names; the districts themselves if None.
            home: district of each institution.
            share: of the district's people that each institution holds [institutions].
        """
        ages = tuple(int(r["age"]) for r in table["prognosis"])
        districts = _districts(table, ages)
        names = [each.name for each in districts]
        if institutions is None or home is None or share is None:
            institutions, home, share = names, names, np.ones(len(names))
        at = [names.index(name) for name in home]
        cells = np.array([int(r["cell"]) for r in table["community_cells"]]).reshape(-1, len(ages))
        own = share[:, None] * np.array([districts[k].by_class for k in at])
        return cls(
            districts,
            tuple(institutions),
            tuple(at),
            share * np.array([each.people for each in districts])[at],
            ages,
            visits,
            cells,
            cell_mixing(table["community_mixing"], ages, cells, visits.T @ own, ABROAD),
            np.array([float(r["share"]) for r in table["employment"]]),
            np.array([int(r["group"]) for r in table["work_strata"]]),
            {r["setting"]: float(r["contacts"]) for r in table["contacts"]},
            {column: np.array([float(r[column]) for r in table["prognosis"]]) for column in table["prognosis"][0]},
            {r["transition"]: (float(r["mean"]), float(r["sd"])) for r in table["durations"]},
            {
                dt.date.fromisoformat(r["date"]): (
                    (float(r["retail"]) + float(r["grocery"]) + float(r["transit"])) / 3.0,
                    float(r["workplaces"]),
                )
                for r in table["mobility"]
            },
            {r["event"]: dt.date.fromisoformat(r["date"]) for r in table["dates"]},
        )

    @property
    def work_groups(self) -> int:
        """Shared groups of work, without that of the people who have none."""
        return int(self.work_group.max()) + 1

    def from_day(self, start: dt.date) -> list[dt.date]:
        """The days from a start to the end of the mobility series.

        Raises:
            InputError: for a start that the series doesn't hold.
        """
        if start not in self.mobility:
            raise InputError(
                f"scenario.start is {start}: mobility runs from {min(self.mobility)} to {max(self.mobility)}."
            )
        return [day for day in self.mobility if day >= start]

    def residents(self, institution: str, agents: int, seed: int) -> Residents:
        """One institution's people.

        Args:
            institution: its name.
            agents: agents of the whole city; the institution's are its people's share of them.
            seed: of the people.

        Raises:
            InputError: for an unknown institution, or so few agents that it has none.
        """
        if institution not in self.institutions:
            raise InputError(f"There is no institution {institution!r}: there are {', '.join(self.institutions)}.")
        number = self.institutions.index(institution)
        district = self.districts[self.home[number]]
        own = int(apportion(agents, self.people)[number])
        if own < 1:
            raise InputError(f"{agents} agents leave none for {institution}.", "Raise --agents.")
        made = synthesise(district.margins, own, Stream(seed, institution, "people"))
        age_class = class_of(made.age, self.ages)
        zone = place(age_class, self.visits[number], Stream(seed, institution, "community"))
        pupils = np.where((made.age >= SCHOOL_AGES[0]) & (made.age < SCHOOL_AGES[1]), made.age.astype(np.int64), -1)

        count = district.workers
        employed = int(np.rint(own * count.sum() / district.people))
        profile = self.employment[np.minimum(made.age, self.employment.size - 1)]
        chooser = Stream(seed, institution, "employment")
        workers = chooser.choose(profile, min(employed, int(np.count_nonzero(profile))))
        seats = np.searchsorted(
            np.rint(np.cumsum(count) / count.sum() * workers.size), np.arange(workers.size), side="right"
        )
        stratum = np.full(own, -1, dtype=np.int64)
        stratum[workers[chooser.order(workers.size)]] = seats
        return Residents(
            made.age,
            made.household.astype(np.int64),
            divide(pupils, CLASS, Stream(seed, institution, "school")),
            divide(stratum, TEAM, Stream(seed, institution, "team")),
            np.where(stratum >= 0, self.work_group[stratum], self.work_groups),
            self.cells[zone, age_class],
        )

    def shard(self, institutions: Sequence[str], agents: int, seed: int) -> tuple[Population, list[Groups]]:
        """The people of some institutions and where they meet.

        Args:
            institutions: whose people the shard holds.
            agents: agents of the whole city.
            seed: of the people; the same people for any way whole institutions are put together.

        Returns:
            People, with the attributes `age` (years) and `record_class` (place of the institution among those given ×
            age classes + age class); and the networks household, school, team (of the shard), work and community
            (shared).
        """
        parts = [self.residents(name, agents, seed) for name in institutions]
        numbers = [self.institutions.index(name) for name in institutions]
        age = np.concatenate([each.age for each in parts])
        owner = np.repeat(np.arange(len(parts)), [each.age.size for each in parts])
        ids = np.concatenate(
            [
                (np.uint64(number + 1) << np.uint64(40)) + np.arange(each.age.size, dtype=np.uint64)
                for number, each in zip(numbers, parts, strict=True)
            ]
        )

        def joined(name: str) -> NDArray[np.int64]:
            own = [getattr(each, name) for each in parts]
            offsets = np.cumsum([0, *(int(part.max()) + 1 for part in own[:-1])])
            return np.concatenate([np.where(p < 0, -1, p + o) for p, o in zip(own, offsets, strict=True)])

        people = Population(
            agents=ids.size,
            ids=ids,
            attributes={"record_class": owner * len(self.ages) + class_of(age, self.ages), "age": age},
            weight=float(self.people.sum()) / agents,
        )
        at_work = np.append(np.ones(self.work_groups), 0.0)  # the last group has no work: nobody meets there
        return people, [
            *(Groups(name, of=joined(name)) for name in ("household", "school", "team")),
            Groups(
                "work",
                of=np.concatenate([each.work for each in parts]),
                groups=self.work_groups + 1,
                shared=True,
                mixing=np.diag(at_work),
            ),
            Groups(
                "community",
                of=np.concatenate([each.community for each in parts]),
                groups=int(self.cells.max()) + 1,
                shared=True,
                mixing=self.mixing,
            ),
        ]


def _districts(table: Mapping[str, Table], ages: tuple[int, ...]) -> tuple[District, ...]:
    """Every row of `households` is one."""
    bands = sorted({int(r["age"]) for r in table["people"]})
    workers: dict[str, list[float]] = defaultdict(list)
    for r in table["commute"]:
        jobs = [float(j["jobs"]) for j in table["jobs"] if j["work"] == r["work"]] or [1.0]
        workers[r["home"]] += [float(r["workers"]) * each / sum(jobs) for each in jobs]
    found = []
    for h in table["households"]:
        name, total = h["institution"], float(h["households"])
        people = np.zeros((len(bands), 2))
        for r in table["people"]:
            if r["institution"] == name:
                people[bands.index(int(r["age"])), int(r["sex"] == "male")] += float(r["people"])
        margins = Margins(
            bands,
            people,
            np.array([float(r["share"]) for r in table["household_sizes"] if r["institution"] == name]),
            with_children=float(h["with_children"]) / total,
            alone_old=float(h["alone_65"]) / float(h["alone"]),
            couples=(float(h["spouses"]) + float(h["unmarried_partners"])) / total,
        )
        by_class = np.bincount(class_of(np.array(bands), ages), people.sum(axis=1), len(ages)).astype(np.float64)
        found.append(District(name, margins, by_class, np.array(workers[name])))
    return tuple(found)

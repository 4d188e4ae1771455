"""Forty-two hospitals, one winter: catchments, where their people meet, the disease, and the beds each hospital counts.

Everything here is made from the public tables in `figures/`. A catchment's people depend on the seed and the hospital
alone, so a party builds its own and nobody else's, and hospitals can be put together in any way.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lpm
from lpm.errors import InputError
from lpm.institution_effect import InstitutionEffect
from lpm.observation import CountSeries, Observation
from lpm.population.cells import cell_mixing, class_of, rows
from lpm.population.synthesis import Margins, Stream, apportion, divide, place, synthesise
from lpm.scenario import Scenario

FIGURES = Path(__file__).resolve().parent / "figures"

TEAM = 12
"""People in a small workplace team."""

CLASS = 20
"""Pupils in a school class."""

SCHOOL_AGES = (5, 18)
"""Ages at school, from and below, years."""

TEAM_SHARE = 0.5
"""Share of contacts at work that are with the own team; the rest is with the wider stratum. An assumption."""

ABROAD = 0.2
"""Share of community contacts met anywhere in the city and not in one's own neighbourhood. An assumption."""

HOME = 0.3
"""Transmission per contact at home against elsewhere, as in the world of five boroughs."""

ASYMPTOMATIC, LATE = 0.6, 0.5
"""Infectivity without symptoms (an assumption), and of anybody after the early part of the infectious time (Covasim's
default, a ratio of 2)."""

EARLY_SHARE = 0.3
"""Share of the symptomatic time with the high viral load (Covasim's default, after Lescure et al. 2020)."""

OUT_EARLY, OUT_LATE = 0.6, 0.1
"""Infectivity out of home of the symptomatic, early and late: less load and fewer who still go out. Assumptions."""

AT_SCHOOL, ELEMENTARY = 0.3, 0.4
"""Share of school contacts that took place: pupils came on some days, many never; and the part of it that went on when
elementary schools alone were open. Assumptions."""

HOLIDAYS = (dt.date(2020, 12, 24), dt.date(2021, 1, 3))
"""First and last day without school."""

MIDWINTER = dt.date(2021, 1, 15)
"""When people are most indoors: an assumption. The season is a cosine of a year's length around it."""

IN_BED = 9.0
"""Days in bed that those in hospital at the start are reckoned with."""

BETWEEN, BETWEEN_SPECIAL = 0.8, 1.5
"""Standard deviation, among hospitals, of the logarithm of how many more or fewer patients they have than their
catchment explains; the second is of hospitals for one kind of patient. Assumptions. The factor itself is integrated out
at the hospital (`lpm.institution_effect`)."""

BURN_IN = 14
"""First days that no likelihood sees: their patients were infected before the start."""


@dataclass(frozen=True)
class Figures:
    """The public tables, read once.

    Attributes:
        institutions: the hospitals, in the order of the tables.
        borough: of each hospital, by number.
        special: whether it is a hospital for one kind of patient [hospitals].
        margins: by borough, what is known of its people.
        people: of each catchment [hospitals].
        ages: lower ends of the age classes.
        visits: share of a catchment's people in each neighbourhood [hospital, neighbourhood].
        cells: community group of a neighbourhood and age class [neighbourhood, age class].
        mixing: community contacts per day between groups [cells, cells].
        employment: share with a job by single year of age [85].
        workplaces: by borough: (people working there [places], group of each place [places]).
        borough_people: by borough.
        work_groups: shared groups of work.
        contacts: setting → contacts per day.
        prognosis: column → by age class.
        days: transition → (mean, sd) in days.
        mobility: date → change of visits in the community and at work, as fractions.
        dates: event → date.
        seeding: cases per head before the start against the city's, by borough.
    """

    institutions: tuple[str, ...]
    borough: tuple[int, ...]
    special: tuple[bool, ...]
    margins: tuple[Margins, ...]
    people: NDArray[np.float64]
    ages: tuple[int, ...]
    visits: NDArray[np.float64]
    cells: NDArray[np.int64]
    mixing: NDArray[np.float64]
    employment: NDArray[np.float64]
    workplaces: tuple[tuple[NDArray[np.float64], NDArray[np.int64]], ...]
    borough_people: NDArray[np.float64]
    work_groups: int
    contacts: Mapping[str, float]
    prognosis: Mapping[str, NDArray[np.float64]]
    days: Mapping[str, tuple[float, float]]
    mobility: Mapping[dt.date, tuple[float, float]]
    dates: Mapping[str, dt.date]
    seeding: NDArray[np.float64]


@cache
def figures() -> Figures:
    """The public tables."""
    table = {path.stem: rows(path) for path in sorted(FIGURES.glob("*.csv")) if not path.stem.startswith("observed")}
    boroughs = tuple(r["institution"] for r in table["households"])
    bands = sorted({int(r["age"]) for r in table["people"]})
    ages = tuple(int(r["age"]) for r in table["prognosis"])
    margins, by_class = [], np.zeros((len(boroughs), len(ages)))
    for b, h in enumerate(table["households"]):
        people = np.zeros((len(bands), 2))
        for r in table["people"]:
            if r["institution"] == h["institution"]:
                people[bands.index(int(r["age"])), int(r["sex"] == "male")] += float(r["people"])
        by_class[b] = np.bincount(class_of(np.array(bands), ages), people.sum(axis=1), len(ages))
        total = float(h["households"])
        margins.append(
            Margins(
                bands,
                people,
                np.array([float(r["share"]) for r in table["household_sizes"] if r["institution"] == h["institution"]]),
                with_children=float(h["with_children"]) / total,
                alone_old=float(h["alone_65"]) / float(h["alone"]),
                couples=(float(h["spouses"]) + float(h["unmarried_partners"])) / total,
            )
        )
    hospitals = table["hospitals"]
    borough = tuple(boroughs.index(r["borough"]) for r in hospitals)
    share = np.array([float(r["share"]) for r in hospitals])
    zones = tuple(r["zone"] for r in table["neighbourhoods"])
    visits = np.array([[float(r[zone]) for zone in zones] for r in table["visits"]])
    cells = np.array([int(r["cell"]) for r in table["community_cells"]]).reshape(len(zones), len(ages))
    present = visits.T @ (share[:, None] * by_class[list(borough)])
    groups = {(r["work"], r["stratum"]): int(r["group"]) for r in table["work_strata"]}
    group_of = np.array(list(groups.values()))
    workers: dict[str, list[float]] = defaultdict(list)
    jobs = {(r["work"], r["stratum"]): float(r["jobs"]) for r in table["jobs"]}
    for r in table["commute"]:
        here = {s: n for (place_, s), n in jobs.items() if place_ == r["work"]} or {"all": 1.0}
        workers[r["home"]] += [float(r["workers"]) * n / sum(here.values()) for n in here.values()]
    cases = np.array([float(r["cases"]) for r in table["cases"]])
    city = by_class.sum(axis=1)
    return Figures(
        tuple(r["institution"] for r in hospitals),
        borough,
        tuple(r["kind"] == "special" for r in hospitals),
        tuple(margins),
        share * city[list(borough)],
        ages,
        visits,
        cells,
        cell_mixing(table["community_mixing"], ages, cells, present, ABROAD),
        np.array([float(r["share"]) for r in table["employment"]]),
        tuple((np.array(workers[name]), group_of) for name in boroughs),
        city,
        int(group_of.max()) + 1,
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
        (cases / city) / (cases.sum() / city.sum()),
    )


@dataclass(frozen=True, eq=False)
class Catchment:
    """One hospital's people and the groups they are in, each array [agents]."""

    age: NDArray[np.int8]
    household: NDArray[np.int64]
    school: NDArray[np.int64]
    team: NDArray[np.int64]
    work: NDArray[np.int64]
    community: NDArray[np.int64]


def catchment(institution: str, agents: int, seed: int) -> Catchment:
    """The people of one hospital's catchment.

    Args:
        institution: its name.
        agents: agents of the whole city; the hospital's are its catchment's share of them.
        seed: of the people.

    Raises:
        InputError: for an unknown hospital, or so few agents that it has none.
    """
    f = figures()
    if institution not in f.institutions:
        raise InputError(f"There is no institution {institution!r}: there are {', '.join(f.institutions)}.")
    number = f.institutions.index(institution)
    borough = f.borough[number]
    own = int(apportion(agents, f.people)[number])
    if own < 1:
        raise InputError(f"{agents} agents leave none for {institution}.", "Raise --agents.")
    made = synthesise(f.margins[borough], own, Stream(seed, institution, "people"))
    age_class = class_of(made.age, f.ages)
    zone = place(age_class, f.visits[number], Stream(seed, institution, "community"))
    pupils = np.where((made.age >= SCHOOL_AGES[0]) & (made.age < SCHOOL_AGES[1]), made.age.astype(np.int64), -1)

    count, group_of = f.workplaces[borough]
    employed = int(np.rint(own * count.sum() / f.borough_people[borough]))
    profile = f.employment[np.minimum(made.age, f.employment.size - 1)]
    chooser = Stream(seed, institution, "employment")
    workers = chooser.choose(profile, min(employed, int(np.count_nonzero(profile))))
    seats = np.searchsorted(
        np.rint(np.cumsum(count) / count.sum() * workers.size), np.arange(workers.size), side="right"
    )
    stratum = np.full(own, -1, dtype=np.int64)
    stratum[workers[chooser.order(workers.size)]] = seats
    return Catchment(
        made.age,
        made.household.astype(np.int64),
        divide(pupils, CLASS, Stream(seed, institution, "school")),
        divide(stratum, TEAM, Stream(seed, institution, "team")),
        np.where(stratum >= 0, group_of[stratum], f.work_groups),
        f.cells[zone, age_class],
    )


def build(scenario: Scenario, institutions: Sequence[str], *, agents: int, seed: int) -> lpm.Model:
    """The model of the catchments of some hospitals.

    Args:
        scenario: parameters, dates.
        institutions: whose people the shard holds.
        agents: agents of the whole city.
        seed: of the people; the same people for any way whole catchments are put together.
    """
    f = figures()
    parts = [catchment(name, agents, seed) for name in institutions]
    numbers = [f.institutions.index(name) for name in institutions]
    age_class = np.concatenate([class_of(s.age, f.ages) for s in parts])
    owner = np.repeat(np.arange(len(parts)), [s.age.size for s in parts])
    ids = np.concatenate(
        [
            (np.uint64(number + 1) << np.uint64(40)) + np.arange(s.age.size, dtype=np.uint64)
            for number, s in zip(numbers, parts, strict=True)
        ]
    )

    def joined(name: str) -> NDArray[np.int64]:
        own = [getattr(s, name) for s in parts]
        offsets = np.cumsum([0, *(int(p.max()) + 1 for p in own[:-1])])
        return np.concatenate([np.where(p < 0, -1, p + o) for p, o in zip(own, offsets, strict=True)])

    people = lpm.Population(
        agents=ids.size,
        ids=ids,
        attributes={"record_class": owner * len(f.ages) + age_class, "age": np.concatenate([s.age for s in parts])},
        weight=float(f.people.sum()) / agents,
    )
    at_work = np.append(np.ones(f.work_groups), 0.0)  # the last group is of those without work: nobody meets there
    networks = [
        lpm.Groups("household", of=joined("household")),
        lpm.Groups("school", of=joined("school")),
        lpm.Groups("team", of=joined("team")),
        lpm.Groups(
            "work",
            of=np.concatenate([s.work for s in parts]),
            groups=f.work_groups + 1,
            shared=True,
            mixing=np.diag(at_work),
        ),
        lpm.Groups(
            "community",
            of=np.concatenate([s.community for s in parts]),
            groups=int(f.cells.max()) + 1,
            shared=True,
            mixing=f.mixing,
        ),
    ]
    p = {name: np.tile(values, len(parts)) for name, values in f.prognosis.items()}
    severe = p["p_severe"] / p["p_symptomatic"]
    hospital = np.repeat(np.arange(len(parts)), len(f.ages))
    return lpm.Model(
        people,
        networks=networks,
        protocols=[
            _series(scenario),
            _disease(scenario, p, np.repeat(f.seeding[[f.borough[number] for number in numbers]], len(f.ages))),
        ],
        outputs={
            "infections": lpm.flow("S -> E"),
            "admissions": lpm.flow("L -> T", thin=severe),
            "census": lpm.count("T H", thin=severe),
            "ill": lpm.count("I L"),
            "susceptible": lpm.count("S"),
        },
        private_outputs={
            f"census/{name}": lpm.count("T H", thin=severe * (hospital == k)) for k, name in enumerate(institutions)
        },
        start=scenario.start,
        class_counts={"record_class": len(parts) * len(f.ages)},
    )


def _series(scenario: Scenario) -> lpm.Series:
    """Drivers from public figures, a value a day from the start to the end of the mobility series."""
    f = figures()
    if scenario.start not in f.mobility:
        raise InputError(
            f"scenario.start is {scenario.start}: mobility runs from {min(f.mobility)} to {max(f.mobility)}."
        )
    days = [day for day in f.mobility if day >= scenario.start]

    def at_school(day: dt.date) -> float:
        closed, reopened = f.dates["schools_closed"], f.dates["reopened"]
        if closed <= day < reopened or HOLIDAYS[0] <= day <= HOLIDAYS[1]:
            return 0.0
        return AT_SCHOOL * (1.0 if day < closed else ELEMENTARY)

    def indoors(day: dt.date) -> float:
        return 0.5 + 0.5 * math.cos(2.0 * math.pi * (day - MIDWINTER).days / 365.0)

    first = indoors(scenario.start)
    return lpm.Series(
        {
            "community_visits": np.array([f.mobility[day][0] for day in days]),
            "work_visits": np.array([f.mobility[day][1] for day in days]),
            "school_open": np.array([at_school(day) for day in days]),
            # 0 at the start, 1 in midwinter: `season` is by how much a contact becomes more dangerous.
            "indoors": np.array([(indoors(day) - first) / (1.0 - first) for day in days]),
        }
    )


def _disease(scenario: Scenario, p: Mapping[str, NDArray[np.float64]], seeding: NDArray[np.float64]) -> lpm.Contagion:
    """The disease and what drives it.

    Stages: E latent, P presymptomatic, A and B early and late infection without symptoms, I early and L late symptoms;
    then T and H, the time in which those who need a hospital are in it. Everybody who had symptoms passes through them;
    who is in bed is counted with the probability of it at their age. Nobody infects from there. Q are those whose stage
    at the start is still to be drawn.
    """
    f = figures()
    transmissibility, distancing, season, initial, immune, stay = (
        scenario.parameter(name) for name in ("transmissibility", "distancing", "season", "initial", "immune", "stay")
    )
    days = {
        "E": f.days["exposed_to_infectious"][0],
        "P": f.days["infectious_to_symptomatic"][0],
        "I": EARLY_SHARE * f.days["mild_to_recovered"][0],
        "T": f.days["mild_to_recovered"][0] - f.days["symptomatic_to_severe"][0],
    }
    days["L"] = f.days["symptomatic_to_severe"][0] - days["I"]
    unnoticed = f.days["asymptomatic_to_recovered"][0]
    days["A"] = EARLY_SHARE * unnoticed + days["P"]
    days["B"] = unnoticed - days["A"]
    # Who is where at the start: each stage holds people for its days.
    symptomatic = p["p_symptomatic"]
    weight = {"E": days["E"] * np.ones_like(symptomatic)}
    weight |= {stage: days[stage] * symptomatic for stage in ("P", "I", "L")}
    weight |= {stage: days[stage] * (1.0 - symptomatic) for stage in ("A", "B")}
    infected = sum(weight.values())
    weight |= {"T": days["T"] * symptomatic, "H": (IN_BED - days["T"]) * symptomatic}
    there = {stage: seeding * value / infected for stage, value in weight.items()}
    most = float(max(sum(there.values())))
    contact = transmissibility * (1.0 + season * lpm.driver("indoors"))
    # A contact needs two people to be out: contacts go as the square of visits (Chang et al. 2021, Nature 589:82).
    out, at_job = (1.0 + distancing * lpm.driver(name) for name in ("community_visits", "work_visits"))
    at_work = contact * f.contacts["work"] * (at_job * at_job)
    return lpm.Contagion(
        stages="S Q E*2 P A B I L*2 T H*2 R",
        infection="S -> E",
        classes="record_class",
        susceptibility=p["susceptibility"],
        infectious={
            "P": 1.0,
            "A": ASYMPTOMATIC,
            "B": ASYMPTOMATIC * LATE,
            "I": {"household": 1.0, "default": OUT_EARLY},
            "L": {"household": LATE, "default": OUT_LATE},
        },
        over={
            "household": transmissibility * f.contacts["household"] * HOME,
            "school": contact * f.contacts["school"] * lpm.driver("school_open"),
            "team": at_work * TEAM_SHARE,
            "work": at_work * (1.0 - TEAM_SHARE),
            "community": contact * (out * out),
        },
        progression={
            "Q": lpm.leave(probability=1.0, to={**{stage: share / most for stage, share in there.items()}, "S": None}),
            "E": lpm.leave(mean_days=days["E"], to={"P": symptomatic, "A": None}),
            "P": lpm.leave(mean_days=days["P"], to={"I": None}),
            "A": lpm.leave(mean_days=days["A"], to={"B": None}),
            "B": lpm.leave(mean_days=days["B"], to={"R": None}),
            "I": lpm.leave(mean_days=days["I"], to={"L": None}),
            "L": lpm.leave(mean_days=days["L"], to={"T": None}),
            "T": lpm.leave(mean_days=days["T"], to={"H": None}),
            "H": lpm.leave(mean_days=stay - days["T"], to={"R": None}),
        },
        initial={"Q": initial * most, "R": immune},
    )


def observation(scenario: Scenario, institution: str, data: Path | None) -> InstitutionEffect:
    """What one hospital observes, against which it scores simulations.

    Args:
        scenario: dates, parameters.
        institution: its name.
        data: a folder with its own `<institution>.csv` (week, lower, upper: first day of the week, smallest and largest
            mean number of patients it may have been); the stand-in in `figures/` if None.

    Raises:
        InputError: for a gap, a week twice, or a cell that is no count: naming the file, the column and the line, never
            the cell.
    """
    f = figures()
    path = FIGURES / f"observed_{institution}.csv" if data is None else data / f"{institution}.csv"
    whole = CountSeries.from_weekly_csv(
        path,
        scenario.start,
        scenario.steps,
        name="census",
        output=f"census/{institution}",
        scale=scenario.parameter("admission_scale"),
        dispersion=scenario.parameter("dispersion"),
    )
    early = np.arange(scenario.steps) < BURN_IN
    assert whole.intervals is not None
    series = replace(
        whole,
        values=np.where(early, math.nan, whole.values),
        intervals=np.where(early[:, None], math.nan, whole.intervals),
    )
    special = f.special[f.institutions.index(institution)]
    return InstitutionEffect(
        Observation(institution, scenario.start, [series]),
        BETWEEN_SPECIAL if special else BETWEEN,
        scenario.steps - scenario.held_out,
    )

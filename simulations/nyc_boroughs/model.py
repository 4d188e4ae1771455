"""Five boroughs, one epidemic: people, where they meet, the disease, and what each institution observes.

Everything here is made from the public tables in `figures/`. A borough's people depend on the seed and the borough
alone, so a party builds its own and nobody else's, and boroughs can be put together in any way.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Share of community contacts met anywhere in the city and not in one's own zone. An assumption."""

HOME = 0.3
"""Transmission per contact at home against elsewhere. The contact rates come from influenza; with this, at a
reproduction number of 4, a case infects some 30 % of those in a home of three, as contact tracing of 2020 found."""

ASYMPTOMATIC = 0.6
"""Infectivity of a person without symptoms. An assumption: published values run from 0.35 to 1.0."""

EARLY_SHARE = 0.3
"""Share of the symptomatic time with the high viral load (Covasim's default, after Lescure et al. 2020)."""

LATE = 0.5
"""Infectivity after that (Covasim's default, a ratio of 2)."""

OUT_EARLY, OUT_LATE = 0.6, 0.1
"""Infectivity out of home of the symptomatic, early and late: less load and fewer who still go out. Assumptions."""

INITIAL = {"E": 0.65, "P": 0.10, "A": 0.15, "I": 0.10}
"""Stages of those infected at the start, as in a wave that grows by a quarter a day."""

OUTSIDE = (2.0, 2.0)
"""Days (mean, sd) from the turning point to a death outside hospital: an assumption."""

REGISTRATION = {
    "bronx": (0.70, 0.20, 0.10),
    "brooklyn": (0.75, 0.18, 0.07),
    "manhattan": (0.80, 0.15, 0.05),
    "queens": (0.70, 0.22, 0.08),
    "staten_island": (0.80, 0.14, 0.06),
}
"""Share of events dated 0, 1, 2 days late, by institution: ASSUMED, each institution's own affair."""

BETWEEN = 0.3
"""Standard deviation, among institutions, of the logarithm of how much more or less they see than the model explains:
an assumption. The factor itself is integrated out at the institution (`lpm.institution_effect`)."""

BURN_IN = 10
"""First days that no likelihood sees: their admissions come from infections before the start."""


@dataclass(frozen=True)
class Figures:
    """The public tables, read once.

    Attributes:
        institutions: in the order of the tables.
        margins: institution → what is known of its people.
        people: by institution.
        ages: lower ends of the age classes.
        visits: share of a borough's people in each zone [home, zone].
        cells: community group of a zone and age class [zone, age class].
        cell_people: people expected in each community group [cells].
        mixing: community contacts per day between groups [cells, cells].
        employment: share with a job by single year of age [85].
        workplaces: home → (people working there [places], group of each place [places]).
        work_groups: shared groups of work.
        contacts: setting → contacts per day.
        prognosis: column → by age class.
        days: transition → (mean, sd) in days.
        mobility: date → change of visits in the community and at work, as fractions.
        dates: event → date.
        untested: share of deaths without a test, mostly outside hospital.
    """

    institutions: tuple[str, ...]
    margins: Mapping[str, Margins]
    people: NDArray[np.float64]
    ages: tuple[int, ...]
    visits: NDArray[np.float64]
    cells: NDArray[np.int64]
    mixing: NDArray[np.float64]
    employment: NDArray[np.float64]
    workplaces: Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]]
    work_groups: int
    contacts: Mapping[str, float]
    prognosis: Mapping[str, NDArray[np.float64]]
    days: Mapping[str, tuple[float, float]]
    mobility: Mapping[dt.date, tuple[float, float]]
    dates: Mapping[str, dt.date]
    untested: float


@cache
def figures() -> Figures:
    """The public tables."""
    table = {path.stem: rows(path) for path in sorted(FIGURES.glob("*.csv")) if not path.stem.startswith("observed")}
    names = tuple(r["institution"] for r in table["households"])
    bands = sorted({int(r["age"]) for r in table["people"]})
    ages = tuple(int(r["age"]) for r in table["prognosis"])
    margins, by_class = {}, np.zeros((len(names), len(ages)))
    for h in table["households"]:
        name = h["institution"]
        people = np.zeros((len(bands), 2))
        for r in table["people"]:
            if r["institution"] == name:
                people[bands.index(int(r["age"])), int(r["sex"] == "male")] += float(r["people"])
        by_class[names.index(name)] = np.bincount(class_of(np.array(bands), ages), people.sum(axis=1), len(ages))
        total = float(h["households"])
        margins[name] = Margins(
            bands,
            people,
            np.array([float(r["share"]) for r in table["household_sizes"] if r["institution"] == name]),
            with_children=float(h["with_children"]) / total,
            alone_old=float(h["alone_65"]) / float(h["alone"]),
            couples=(float(h["spouses"]) + float(h["unmarried_partners"])) / total,
        )
    visits = np.array([float(r["share"]) for r in table["visits"]]).reshape(len(names), len(names))
    cells = np.array([int(r["cell"]) for r in table["community_cells"]]).reshape(len(names), len(ages))
    contacts = {r["setting"]: float(r["contacts"]) for r in table["contacts"]}
    groups = {(r["work"], r["stratum"]): int(r["group"]) for r in table["work_strata"]}
    workers: dict[str, list[float]] = defaultdict(list)
    jobs = {(r["work"], r["stratum"]): float(r["jobs"]) for r in table["jobs"]}
    for r in table["commute"]:
        here = {s: n for (place_, s), n in jobs.items() if place_ == r["work"]} or {"all": 1.0}
        workers[r["home"]] += [float(r["workers"]) * n / sum(here.values()) for n in here.values()]
    group_of = np.array(list(groups.values()))
    deaths = {r["kind"]: float(r["deaths"]) for r in table["deaths"]}
    mobility = {
        dt.date.fromisoformat(r["date"]): (
            (float(r["retail"]) + float(r["grocery"]) + float(r["transit"])) / 3.0,
            float(r["workplaces"]),
        )
        for r in table["mobility"]
    }
    return Figures(
        names,
        margins,
        by_class.sum(axis=1),
        ages,
        visits,
        cells,
        cell_mixing(table["community_mixing"], ages, cells, visits.T @ by_class, ABROAD),
        np.array([float(r["share"]) for r in table["employment"]]),
        {name: (np.array(count), group_of) for name, count in workers.items()},
        int(group_of.max()) + 1,
        contacts,
        {column: np.array([float(r[column]) for r in table["prognosis"]]) for column in table["prognosis"][0]},
        {r["transition"]: (float(r["mean"]), float(r["sd"])) for r in table["durations"]},
        mobility,
        {r["event"]: dt.date.fromisoformat(r["date"]) for r in table["dates"]},
        deaths["probable"] / (deaths["probable"] + deaths["confirmed"]),
    )


@dataclass(frozen=True, eq=False)
class Shard:
    """One institution's people and the groups they are in, each array [agents]."""

    age: NDArray[np.int8]
    household: NDArray[np.int64]
    school: NDArray[np.int64]
    team: NDArray[np.int64]
    work: NDArray[np.int64]
    community: NDArray[np.int64]


def shard(institution: str, agents: int, seed: int) -> Shard:
    """The people of one institution.

    Args:
        institution: its name.
        agents: agents of the whole city; the institution's are its share of the population.
        seed: of the people.

    Raises:
        InputError: for an unknown institution, or fewer agents than institutions.
    """
    f = figures()
    if institution not in f.institutions:
        raise InputError(f"There is no institution {institution!r}: there are {', '.join(f.institutions)}.")
    number = f.institutions.index(institution)
    own = int(apportion(agents, f.people)[number])
    if own < 1:
        raise InputError(f"{agents} agents leave none for {institution}.", "Raise --agents.")
    made = synthesise(f.margins[institution], own, Stream(seed, institution, "people"))
    age_class = class_of(made.age, f.ages)

    zone = place(age_class, f.visits[number], Stream(seed, institution, "community"))
    pupils = np.where((made.age >= SCHOOL_AGES[0]) & (made.age < SCHOOL_AGES[1]), made.age.astype(np.int64), -1)

    count, group_of = f.workplaces[institution]
    employed = int(np.rint(own * count.sum() / f.people[number]))
    profile = f.employment[np.minimum(made.age, f.employment.size - 1)]
    chooser = Stream(seed, institution, "employment")
    workers = chooser.choose(profile, min(employed, int(np.count_nonzero(profile))))
    seats = np.searchsorted(
        np.rint(np.cumsum(count) / count.sum() * workers.size), np.arange(workers.size), side="right"
    )
    stratum = np.full(own, -1, dtype=np.int64)
    stratum[workers[chooser.order(workers.size)]] = seats
    return Shard(
        made.age,
        made.household.astype(np.int64),
        divide(pupils, CLASS, Stream(seed, institution, "school")),
        divide(stratum, TEAM, Stream(seed, institution, "team")),
        np.where(stratum >= 0, group_of[stratum], f.work_groups),
        f.cells[zone, age_class],
    )


def build(scenario: Scenario, institutions: Sequence[str], *, agents: int, seed: int) -> lpm.Model:
    """The model of the shard of some institutions.

    Args:
        scenario: parameters, dates.
        institutions: whose people the shard holds.
        agents: agents of the whole city.
        seed: of the people; the same people for any way whole institutions are put together.
    """
    f = figures()
    shards = [shard(name, agents, seed) for name in institutions]
    numbers = [f.institutions.index(name) for name in institutions]
    age_class = np.concatenate([class_of(s.age, f.ages) for s in shards])
    owner = np.repeat(np.arange(len(shards)), [s.age.size for s in shards])
    ids = np.concatenate(
        [
            (np.uint64(number + 1) << np.uint64(40)) + np.arange(s.age.size, dtype=np.uint64)
            for number, s in zip(numbers, shards, strict=True)
        ]
    )

    def joined(name: str) -> NDArray[np.int64]:
        parts = [getattr(s, name) for s in shards]
        offsets = np.cumsum([0, *(int(p.max()) + 1 for p in parts[:-1])])
        return np.concatenate([np.where(p < 0, -1, p + o) for p, o in zip(parts, offsets, strict=True)])

    people = lpm.Population(
        agents=ids.size,
        ids=ids,
        attributes={"record_class": owner * len(f.ages) + age_class, "age": np.concatenate([s.age for s in shards])},
        weight=float(f.people.sum()) / agents,
    )
    at_work = np.append(np.ones(f.work_groups), 0.0)  # the last group is of those without work: nobody meets there
    networks = [
        lpm.Groups("household", of=joined("household")),
        lpm.Groups("school", of=joined("school")),
        lpm.Groups("team", of=joined("team")),
        lpm.Groups(
            "work",
            of=np.concatenate([s.work for s in shards]),
            groups=f.work_groups + 1,
            shared=True,
            mixing=np.diag(at_work),
        ),
        lpm.Groups(
            "community",
            of=np.concatenate([s.community for s in shards]),
            groups=int(f.cells.max()) + 1,
            shared=True,
            mixing=f.mixing,
        ),
    ]
    classes = len(shards) * len(f.ages)
    p = {name: np.tile(values, len(shards)) for name, values in f.prognosis.items()}
    severe, fatal = p["p_severe"] / p["p_symptomatic"], p["p_death"] / p["p_symptomatic"]
    private: dict[str, lpm.Output] = {}
    for number, name in enumerate(institutions):
        mine = (np.arange(classes) // len(f.ages) == number).astype(np.float64)
        private[f"admissions/{name}"] = lpm.flow("P -> I", thin=severe * mine)
        private[f"deaths/{name}"] = lpm.flow("P -> I", thin=fatal * mine)
    return lpm.Model(
        people,
        networks=networks,
        protocols=[_series(scenario), _disease(scenario, p)],
        outputs={
            "infections": lpm.flow("S -> E"),
            "admissions": lpm.flow("L -> T", thin=severe),
            "deaths": lpm.flow("C -> D"),
            "ill": lpm.count("I L T"),
            "hospitalised": lpm.count("H W C"),
            "susceptible": lpm.count("S"),
        },
        private_outputs=private,
        start=scenario.start,
        class_counts={"record_class": classes},
    )


def _series(scenario: Scenario) -> lpm.Series:
    """Drivers from public figures, a value a day from the start to the end of the mobility series."""
    f = figures()
    if scenario.start not in f.mobility:
        raise InputError(
            f"scenario.start is {scenario.start}: mobility runs from {min(f.mobility)} to {max(f.mobility)}."
        )
    days = [day for day in f.mobility if day >= scenario.start]
    return lpm.Series(
        {
            "community_visits": np.array([f.mobility[day][0] for day in days]),
            "work_visits": np.array([f.mobility[day][1] for day in days]),
            "school_open": np.array([float(day < f.dates["schools_closed"]) for day in days]),
            # Introduced over a week: an order is not followed by everybody on its day.
            "covered": np.array([min(max((day - f.dates["face_covering"]).days / 7.0, 0.0), 1.0) for day in days]),
        }
    )


def _disease(scenario: Scenario, p: Mapping[str, NDArray[np.float64]]) -> lpm.Contagion:
    """The disease and what drives it.

    Stages: E latent, P presymptomatic, A and B early and late infection without symptoms, I early and L late symptoms,
    T their turning point; then H in hospital, W on the ward, C critical, R recovered, D dead. Who is in hospital
    infects nobody.
    """
    f = figures()
    transmissibility, distancing, initial, covering = (
        scenario.parameter(name) for name in ("transmissibility", "distancing", "initial", "face_covering")
    )
    early = EARLY_SHARE * f.days["mild_to_recovered"][0]
    late = f.days["symptomatic_to_severe"][0] - early
    turn = f.days["mild_to_recovered"][0] - f.days["symptomatic_to_severe"][0]
    presymptomatic, unnoticed = f.days["infectious_to_symptomatic"][0], f.days["asymptomatic_to_recovered"][0]
    to_critical = f.days["severe_to_critical"][0]
    covered = 1.0 - covering * lpm.driver("covered")
    # A contact needs two people to be out: contacts go as the square of visits (Chang et al. 2021, Nature 589:82).
    out, at_job = (1.0 + distancing * lpm.driver(name) for name in ("community_visits", "work_visits"))
    at_work = transmissibility * f.contacts["work"] * (at_job * at_job) * covered
    fading = {"household": LATE, "default": OUT_LATE}
    return lpm.Contagion(
        stages="S E*2 P A B I L*2 T H W C R D",
        infection="S -> E",
        classes="record_class",
        susceptibility=p["susceptibility"],
        infectious={
            "P": 1.0,
            "A": ASYMPTOMATIC,
            "B": ASYMPTOMATIC * LATE,
            "I": {"household": 1.0, "default": OUT_EARLY},
            "L": fading,
            "T": fading,
        },
        over={
            "household": transmissibility * f.contacts["household"] * HOME,
            "school": transmissibility * f.contacts["school"] * lpm.driver("school_open"),
            "team": at_work * TEAM_SHARE,
            "work": at_work * (1.0 - TEAM_SHARE),
            "community": transmissibility * (out * out) * covered,
        },
        progression={
            "E": lpm.leave(mean_days=f.days["exposed_to_infectious"][0], to={"P": p["p_symptomatic"], "A": None}),
            "P": lpm.leave(mean_days=presymptomatic, to={"I": None}),
            "A": lpm.leave(mean_days=EARLY_SHARE * unnoticed + presymptomatic, to={"B": None}),
            "B": lpm.leave(mean_days=(1.0 - EARLY_SHARE) * unnoticed - presymptomatic, to={"R": None}),
            "I": lpm.leave(mean_days=early, to={"L": None}),
            "L": lpm.leave(mean_days=late, to={"T": None}),
            "T": lpm.leave(mean_days=turn, to={"H": p["p_severe"] / p["p_symptomatic"], "R": None}),
            "H": lpm.leave(mean_days=to_critical, to={"C": p["p_critical"] / p["p_severe"], "W": None}),
            "W": lpm.leave(mean_days=f.days["severe_to_recovered"][0] - to_critical, to={"R": None}),
            "C": lpm.leave(
                mean_days=f.days["critical_to_death"][0], to={"D": p["p_death"] / p["p_critical"], "R": None}
            ),
        },
        initial={stage: initial * share for stage, share in INITIAL.items()},
    )


def delay(*parts: tuple[float, float], late: Sequence[float] = (1.0,), days: int = 60) -> NDArray[np.float64]:
    """Share of events on day 0, 1, 2, … after their cause, for log-normal times one after the other.

    Args:
        parts: (mean, sd) of each time itself, days.
        late: share dated 0, 1, 2, … days late.
        days: where the distribution is cut (and scaled to sum to 1).

    Returns:
        Shares [days].
    """
    total = np.asarray(late, dtype=np.float64) / np.sum(late)
    for mean, sd in parts:
        spread = math.log1p((sd / mean) ** 2)
        centre = math.log(mean) - 0.5 * spread
        edges = np.array(
            [
                0.0,
                *(0.5 * (1.0 + math.erf((math.log(d + 0.5) - centre) / math.sqrt(2.0 * spread))) for d in range(days)),
            ]
        )
        total = np.convolve(total, np.diff(edges))[:days]
    return total / total.sum()


def observation(scenario: Scenario, institution: str, data: Path | None) -> InstitutionEffect:
    """What one institution observes, against which it scores simulations.

    Args:
        scenario: dates, parameters.
        institution: its name.
        data: a folder with its own `<institution>.csv` (date, admissions, deaths), or else with the city's public
            `nyc_covid/daily_by_borough.csv`; the stand-in in `figures/` if None.

    Raises:
        InputError: for a gap, a date twice, or a cell that is no count: naming the file, the column and the line, never
            the cell.
    """
    f = figures()
    path, columns, where = _series_of(institution, data)
    late = REGISTRATION[institution]
    turn = f.days["symptomatic_to_severe"]
    in_hospital = delay(turn, f.days["severe_to_critical"], f.days["critical_to_death"], late=late)
    delays = {
        "admissions": delay(turn, late=late),
        "deaths": (1.0 - f.untested) * in_hospital + f.untested * delay(turn, OUTSIDE, late=late),
    }
    series = []
    for name, scale in (("admissions", "admission_scale"), ("deaths", "fatality_scale")):
        whole = CountSeries.from_csv(
            path,
            columns[name],
            scenario.start,
            scenario.steps,
            name=name,
            where=where,
            output=f"{name}/{institution}",
            scale=scenario.parameter(scale),
            dispersion=scenario.parameter("dispersion"),
            delay=delays[name],
        )
        seen = np.where(np.arange(scenario.steps) < BURN_IN, math.nan, whole.values)
        series.append(dataclasses.replace(whole, values=seen))
    fitted = scenario.steps - scenario.held_out
    return InstitutionEffect(Observation(institution, scenario.start, series), BETWEEN, fitted)


def _series_of(institution: str, data: Path | None) -> tuple[Path, dict[str, str], dict[str, str]]:
    """File of an institution's series, series → column, and column → text of the rows that are its own."""
    own = FIGURES / f"observed_{institution}.csv" if data is None else data / f"{institution}.csv"
    city = None if data is None else data / "nyc_covid" / "daily_by_borough.csv"
    if city is not None and city.is_file() and not own.is_file():
        borough = institution.replace("_", " ").title()
        return city, {"admissions": "hospitalized", "deaths": "deaths"}, {"area": borough}
    return own, {"admissions": "admissions", "deaths": "deaths"}, {}

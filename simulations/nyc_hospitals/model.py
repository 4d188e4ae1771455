"""Forty-two hospitals, one winter: catchments, where their people meet, the disease, and the beds each hospital counts.

Everything here is made from the public tables in `figures/`. A catchment's people depend on the seed and the hospital
alone, so a party builds its own and nobody else's, and hospitals can be put together in any way.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lpm
from lpm.institution_effect import InstitutionEffect
from lpm.observation import CountSeries, Observation
from lpm.population.city import City, tables
from lpm.scenario import Scenario

FIGURES = Path(__file__).resolve().parent / "figures"

TEAM_SHARE = 0.5
"""Share of contacts at work that are with the own team; the rest is with the wider stratum. An assumption."""

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

IMMUNE = 0.24
"""Share immune at the start: 0.227 had been infected by the end of March 2020, 0.205 of those tested in September had
antibodies (`immunity.csv`), which fade; an assumption between what they say and what spring and autumn added."""

CHANGES = {
    "december": (dt.date(2020, 11, 20), dt.date(2020, 12, 18)),
    "january": (dt.date(2020, 12, 18), dt.date(2021, 1, 15)),
    "february": (dt.date(2021, 1, 15), dt.date(2021, 2, 12)),
}
"""Parameter → the four weeks over which transmission changes by its factor, evenly, for reasons that are not modelled:
season, behaviour, variants."""

IN_BED = 9.0
"""Days in bed that those in hospital at the start are reckoned with."""

APART = 21
"""Days between the two weeks of `cases.csv`."""

BETWEEN, BETWEEN_SPECIAL = 0.8, 1.5
"""Standard deviation, among hospitals, of the logarithm of how many more or fewer patients they have than their
catchment explains; the second is of hospitals for one kind of patient. Assumptions. The factor itself is integrated out
at the hospital (`lpm.institution_effect`)."""

BURN_IN = 7
"""First days that no likelihood sees: their patients were infected before the start."""


@dataclass(frozen=True, eq=False)
class Figures:
    """The public tables, read once.

    Attributes:
        city: boroughs, hospitals, their catchments, where people meet; the disease, mobility and dates.
        special: whether it is a hospital for one kind of patient [hospitals].
        seeding: cases per head before the start against the city's, by borough.
        growth: of cases in the three weeks before the start, 1/day.
    """

    city: City
    special: tuple[bool, ...]
    seeding: NDArray[np.float64]
    growth: float


@cache
def figures() -> Figures:
    """The public tables."""
    table = tables(FIGURES)
    hospitals, zones = table["hospitals"], [r["zone"] for r in table["neighbourhoods"]]
    city = City.from_tables(
        table,
        np.array([[float(r[zone]) for zone in zones] for r in table["visits"]]),
        institutions=[r["institution"] for r in hospitals],
        home=[r["borough"] for r in hospitals],
        share=np.array([float(r["share"]) for r in hospitals]),
    )
    earlier, cases = (np.array([float(r[week]) for r in table["cases"]]) for week in ("earlier", "latest"))
    people = np.array([borough.people for borough in city.districts])
    seeding = (cases / people) / (cases.sum() / people.sum())
    growth = math.log(cases.sum() / earlier.sum()) / APART
    return Figures(city, tuple(r["kind"] == "special" for r in hospitals), seeding, growth)


def build(scenario: Scenario, institutions: Sequence[str], *, agents: int, seed: int) -> lpm.Model:
    """The model of the catchments of some hospitals.

    Args:
        scenario: parameters, dates.
        institutions: whose people the shard holds.
        agents: agents of the whole city.
        seed: of the people; the same people for any way whole catchments are put together.
    """
    city = figures().city
    people, networks = city.shard(institutions, agents, seed)
    seeding = figures().seeding[[city.home[city.institutions.index(name)] for name in institutions]]
    p = {name: np.tile(values, len(institutions)) for name, values in city.prognosis.items()}
    severe = p["p_severe"] / p["p_symptomatic"]
    hospital = np.repeat(np.arange(len(institutions)), len(city.ages))
    return lpm.Model(
        people,
        networks=networks,
        protocols=[
            _series(scenario),
            _disease(scenario, p, np.repeat(seeding, len(city.ages))),
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
        class_counts={"record_class": hospital.size},
    )


def _series(scenario: Scenario) -> lpm.Series:
    """Drivers from public figures, a value a day from the start to the end of the mobility series."""
    f = figures().city
    days = f.from_day(scenario.start)

    def at_school(day: dt.date) -> float:
        closed, reopened = f.dates["schools_closed"], f.dates["reopened"]
        if closed <= day < reopened or HOLIDAYS[0] <= day <= HOLIDAYS[1]:
            return 0.0
        return AT_SCHOOL * (1.0 if day < closed else ELEMENTARY)

    def done(day: dt.date, first: dt.date, last: dt.date) -> float:
        return min(max((day - first) / (last - first), 0.0), 1.0)

    visits = 1.0 + np.array([f.mobility[day] for day in days])
    community, work = (visits / visits[0]).T - 1.0
    return lpm.Series(
        {
            "community_visits": community,
            "work_visits": work,
            "school_open": np.array([at_school(day) for day in days]),
        }
        | {name: np.array([done(day, *ends) for day in days]) for name, ends in CHANGES.items()}
    )


def _disease(scenario: Scenario, p: Mapping[str, NDArray[np.float64]], seeding: NDArray[np.float64]) -> lpm.Contagion:
    """The disease and what drives it.

    Stages: E latent, P presymptomatic, A and B early and late infection without symptoms, I early and L late symptoms;
    then T and H, the time in which those who need a hospital are in it. Everybody who had symptoms passes through them;
    who is in bed is counted with the probability of it at their age. Nobody infects from there. Q are those whose stage
    at the start is still to be drawn.
    """
    f = figures().city
    transmissibility, distancing, initial, stay = (
        scenario.parameter(name) for name in ("transmissibility", "distancing", "initial", "stay")
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
    symptomatic = p["p_symptomatic"]
    held = _held(days | {"H": IN_BED - days["T"]}, figures().growth)
    weight = {"E": held["E"] * np.ones_like(symptomatic)}
    weight |= {stage: held[stage] * symptomatic for stage in ("P", "I", "L")}
    weight |= {stage: held[stage] * (1.0 - symptomatic) for stage in ("A", "B")}
    infected = sum(weight.values())
    weight |= {stage: held[stage] * symptomatic for stage in ("T", "H")}
    there = {stage: seeding * value / infected for stage, value in weight.items()}
    most = float(max(sum(there.values())))
    contact = 1.0 * transmissibility
    for name in CHANGES:
        contact = contact * (1.0 + (scenario.parameter(name) - 1.0) * lpm.driver(name))
    # A contact needs two people to be out: contacts go as the square of visits (Chang et al. 2021, Nature 589:82).
    # Exactly so at the start, and with `distancing` of 1 ever after.
    first = f.mobility[scenario.start]
    out, at_job = (
        (1.0 + level) * (1.0 + distancing * lpm.driver(name))
        for name, level in zip(("community_visits", "work_visits"), first, strict=True)
    )
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
        initial={"Q": initial * most, "R": IMMUNE},
    )


def _held(days: Mapping[str, float], growth: float) -> dict[str, float]:
    """People in each stage for each infection a day at the start, when infections have grown at a steady rate.

    Who is late in the course was infected earlier, when there were fewer.

    Args:
        days: of each stage.
        growth: 1/day.
    """
    begins = {"E": 0.0, "P": days["E"], "A": days["E"]}
    begins |= {after: begins[stage] + days[stage] for stage, after in (("P", "I"), ("A", "B"))}
    for stage, after in (("I", "L"), ("L", "T"), ("T", "H")):
        begins[after] = begins[stage] + days[stage]
    return {stage: days[stage] * math.exp(-growth * (begins[stage] + 0.5 * days[stage])) for stage in days}


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
    special = f.special[f.city.institutions.index(institution)]
    return InstitutionEffect(
        Observation(institution, scenario.start, [series]),
        BETWEEN_SPECIAL if special else BETWEEN,
        scenario.steps - scenario.held_out,
    )

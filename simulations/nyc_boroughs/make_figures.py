"""Write the compact tables of figures that this world needs from the full public files.

    python simulations/nyc_boroughs/make_figures.py [FOLDER]

FOLDER (or the one named by `LPM_DATA`) holds the full files under the names in `SOURCES`. Every table begins with
header lines that say what it is, in which units, from where, under which terms, and what was changed. The tables are
committed, so a user of the world never needs to run this; it is how they can be checked.
"""

from __future__ import annotations

import csv
import gzip
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm.errors import DataMissing, InputError
from lpm.population.cells import merge

log = logging.getLogger(__name__)

INSTITUTIONS = {
    "bronx": ("Bronx", "36005"),
    "brooklyn": ("Brooklyn", "36047"),
    "manhattan": ("Manhattan", "36061"),
    "queens": ("Queens", "36081"),
    "staten_island": ("Staten Island", "36085"),
}
"""Institution → (borough as the sources spell it, county code)."""

AGE_CLASSES = (0, 10, 20, 30, 40, 50, 60, 70, 80)
"""Lower ends of the age classes, years; the last is open."""

AGES_90_OF_80 = 0.2
"""People of 90 and over among those of 80 and over, an assumption: the county table ends at 85+."""

HOME_SHARE = 0.8
"""Share of people whose time out of home, work and school is spent mostly in their own borough: an assumption."""

DAYS = ("2020-02-24", "2020-07-03")
"""First and last day of the mobility series."""

EVENTS = {
    "public schools closed to pupils": "schools_closed",
    "face covering required in public where distancing is impossible (EO 202.17)": "face_covering",
}
"""Measure, as the source says it → its name here."""

REFERENCE_AGENTS = 20_000
"""The population for which groups are merged until each has people of every borough."""

MINIMUM_PEOPLE = 10
"""Agents expected in a shared group, at least."""

MINIMUM_EACH = 1.0
"""Agents of every borough expected in a shared group, at least: then any grouping of whole boroughs is in it."""

STRATA = {
    "care_schooling": ("61", "62"),
    "shops_food_leisure": ("44", "71", "72", "81"),
    "goods_transport_building": ("11", "21", "22", "23", "31", "42", "48"),
    "offices_government": ("51", "52", "53", "54", "55", "56", "95", "99"),
}
"""Industry stratum → two-digit industries."""


@dataclass(frozen=True)
class Source:
    """Where a full file comes from: the publisher, its page and the terms."""

    publisher: str
    page: str
    terms: str


_CENSUS = "US government work, public domain"
_MISTRY = Source(
    "Mistry et al. 2021, Nature Communications 12:323 (MOBS Lab)",
    "https://github.com/mobs-lab/mixing-patterns",
    "Apache-2.0",
)
_COVASIM = Source(
    "Kerr et al. 2021, PLOS Computational Biology 17(7):e1009149 (Covasim defaults; primary sources named there)",
    "https://github.com/InstituteforDiseaseModeling/covasim",
    "MIT",
)
SOURCES: Mapping[str, Source] = {
    "population/nys_county_age_sex_2019.csv": Source(
        "US Census Bureau, county population by age and sex, cc-est2019-agesex-36",
        "https://www2.census.gov/programs-surveys/popest/datasets/2010-2019/counties/asrh/",
        _CENSUS,
    ),
    "population/households_by_county_acs2018.csv": Source(
        "US Census Bureau, American Community Survey 2014-2018, table DP02",
        "https://data.census.gov/table/ACSDP5Y2018.DP02",
        _CENSUS,
    ),
    "population/household_size_by_borough_SYNTHETIC.csv": Source(
        "fitted to US Census Bureau, American Community Survey 2014-2018, table DP02; NOT observed",
        "https://data.census.gov/table/ACSDP5Y2018.DP02",
        _CENSUS,
    ),
    "population/commute_flows_borough_acs2011_2015.csv": Source(
        "US Census Bureau, American Community Survey 2011-2015, county-to-county commuting flows",
        "https://www.census.gov/data/tables/2015/demo/metro-micro/commuting-flows-2015.html",
        _CENSUS,
    ),
    "population/employment_by_industry_borough_qcew_2017.csv": Source(
        "New York State Department of Labor, Quarterly Census of Employment and Wages 2017",
        "https://dol.ny.gov/quarterly-census-employment-and-wages",
        "New York State public data, credit the Department of Labor",
    ),
    "contacts/mistry_ny_community_85x85.csv.gz": _MISTRY,
    "contacts/mistry_ny_work_85x85.csv.gz": _MISTRY,
    "contacts/mistry_ny_age_distribution.csv": _MISTRY,
    "contacts/mistry_setting_weights.csv": _MISTRY,
    "covid_params/prognosis_by_age.csv": _COVASIM,
    "covid_params/durations.csv": _COVASIM,
    "covid_params/seroprevalence_april2020_published.csv": Source(
        "Rosenberg et al. 2020, Annals of Epidemiology 48:23-29",
        "https://doi.org/10.1016/j.annepidem.2020.06.004",
        "published figures, cited",
    ),
    "econ_tracker/google_mobility_nyc_daily.csv": Source(
        "Google COVID-19 Community Mobility Reports, as given by Chetty, Friedman, Stepner and the Opportunity "
        "Insights Team, The Economic Impacts of COVID-19",
        "https://github.com/OpportunityInsights/EconomicTracker",
        "free to use with the data provider named",
    ),
    "nyc_covid/daily_by_borough.csv": Source(
        "New York City Department of Health and Mental Hygiene, trends/data-by-day",
        "https://github.com/nychealth/coronavirus-data",
        "New York City government public data, credit DOHMH",
    ),
    "nyc_covid/deaths_confirmed_probable_daily_2020.csv": Source(
        "New York City Department of Health and Mental Hygiene, deaths by day, confirmed and probable",
        "https://github.com/nychealth/coronavirus-data",
        "New York City government public data, credit DOHMH",
    ),
    "policy/nyc_interventions.csv": Source(
        "dates compiled from the Opportunity Insights policy milestones and public timelines",
        "https://github.com/OpportunityInsights/EconomicTracker",
        "facts; free to use with the provider named",
    ),
}
"""Full file → where it can be downloaded."""

PEOPLE_AND_WORK = ("population/nys_county_age_sex_2019.csv", "population/commute_flows_borough_acs2011_2015.csv")
"""The files that say who lives where and works where."""


def read(folder: Path, name: str, known: Mapping[str, Source] = SOURCES) -> list[dict[str, str]]:
    """The rows of a full file, one of those known.

    Raises:
        DataMissing: naming the publisher's page and the name the file must have.
    """
    path = folder / name
    if not path.is_file():
        raise DataMissing(path, f"{known[name].page} ({known[name].publisher})", name)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write(
    folder: Path,
    name: str,
    *,
    what: str,
    sources: Sequence[str],
    changes: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    known: Mapping[str, Source] = SOURCES,
) -> None:
    """Write one table of figures under its header."""
    used = dict.fromkeys(known[source] for source in sources)
    lines = [f"# {what}"]
    lines += [f"# Source: {s.publisher}; {s.page}; {s.terms}." for s in used]
    lines += [f"# From: {', '.join(sources)}.", f"# Changes made: {changes}", ",".join(columns)]
    lines += [",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    log.info("%s", name)


def people(folder: Path, out: Path) -> NDArray[np.float64]:
    """Table `people.csv`: people by institution, five-year age and sex.

    Returns:
        People [institution, age class], from the five-year counts.
    """
    name = "population/nys_county_age_sex_2019.csv"
    county = {code: key for key, (_, code) in INSTITUTIONS.items()}
    rows = [
        (county[r["fips"]], int(r["age_group"].rstrip("+").split("-")[0]), r["sex"], int(r["population"]))
        for r in read(folder, name)
        if r["fips"] in county
    ]
    rows.sort()
    write(
        out,
        "people.csv",
        what="People by borough, age (lower end of five-year bands; 85 is open) and sex on 2019-07-01. Unit: people.",
        sources=[name],
        changes="five counties selected; ages given by the lower end of the band.",
        columns=("institution", "age", "sex", "people"),
        rows=rows,
    )
    table = np.zeros((len(INSTITUTIONS), len(AGE_CLASSES)))
    keys = list(INSTITUTIONS)
    for institution, age, _, count in rows:
        table[keys.index(institution), np.searchsorted(AGE_CLASSES, age, side="right") - 1] += count
    return table


def households(folder: Path, out: Path) -> None:
    """Tables `households.csv` (observed kinds) and `household_sizes.csv` (fitted sizes)."""
    name = "population/households_by_county_acs2018.csv"
    county = {code: key for key, (_, code) in INSTITUTIONS.items()}
    labels = {
        "HOUSEHOLDS BY TYPE!!Total households": "households",
        "HOUSEHOLDS BY TYPE!!Total households!!Average household size": "mean_size",
        "HOUSEHOLDS BY TYPE!!Total households!!Nonfamily households!!Householder living alone": "alone",
        "HOUSEHOLDS BY TYPE!!Total households!!Nonfamily households!!Householder living alone!!65 years and over": (
            "alone_65"
        ),
        "HOUSEHOLDS BY TYPE!!Total households!!Households with one or more people under 18 years": "with_children",
        "RELATIONSHIP!!Population in households!!Spouse": "spouses",
        "RELATIONSHIP!!Population in households!!Nonrelatives!!Unmarried partner": "unmarried_partners",
    }
    found: dict[str, dict[str, float]] = {key: {} for key in INSTITUTIONS}
    for r in read(folder, name):
        if r["fips"] in county and r["variable"] in labels:
            found[county[r["fips"]]][labels[r["variable"]]] = float(r["estimate"])
    columns = tuple(labels.values())
    write(
        out,
        "households.csv",
        what="Households by borough, 2014-2018. Units: households; mean_size in people; spouses and unmarried_partners "
        "in people (one for each couple).",
        sources=[name],
        changes="five counties and seven of the table's items selected, renamed, long to wide.",
        columns=("institution", *columns),
        rows=[(key, *(found[key][c] for c in columns)) for key in INSTITUTIONS],
    )
    fitted = "population/household_size_by_borough_SYNTHETIC.csv"
    boroughs = {borough: key for key, (borough, _) in INSTITUTIONS.items()}
    rows = [
        (boroughs[r["borough"]], int(r["household_size"].rstrip("+")), float(r["share_of_households"]))
        for r in read(folder, fitted)
    ]
    write(
        out,
        "household_sizes.csv",
        what="SYNTHETIC: share of households by number of people (7 is open) and borough. Size 1 is the observed share "
        "that lives alone; the others are a truncated geometric fitted to the mean size, NOT an observation.",
        sources=[fitted],
        changes="renamed.",
        columns=("institution", "size", "share"),
        rows=sorted(rows),
    )


def work(folder: Path, out: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tables `commute.csv`, `jobs.csv` and `employment.csv`.

    Returns:
        Workers [home, work (five boroughs, then outside)] and the share of jobs [borough, stratum].
    """
    flows, jobs_file = (
        "population/commute_flows_borough_acs2011_2015.csv",
        ("population/employment_by_industry_borough_qcew_2017.csv"),
    )
    keys = list(INSTITUTIONS)
    slug = {borough: key for key, (borough, _) in INSTITUTIONS.items()} | {"outside NYC": "outside"}
    workers = np.zeros((len(keys), len(keys) + 1))
    for r in read(folder, flows):
        workers[keys.index(slug[r["home"]]), [*keys, "outside"].index(slug[r["work"]])] = float(r["workers"])
    write(
        out,
        "commute.csv",
        what="Workers by borough of home and of work, 2011-2015. Unit: people.",
        sources=[flows],
        changes="renamed.",
        columns=("home", "work", "workers"),
        rows=[(h, w, int(workers[i, j])) for i, h in enumerate(keys) for j, w in enumerate([*keys, "outside"])],
    )
    jobs = np.zeros((len(keys), len(STRATA)))
    for r in read(folder, jobs_file):
        for s, codes in enumerate(STRATA.values()):
            if r["naics"] in codes:
                jobs[keys.index(slug[r["borough"]]), s] += float(r["avg_employment"] or 0)
    write(
        out,
        "jobs.csv",
        what="Jobs by borough of the workplace and industry stratum, 2017. Unit: jobs. Strata: "
        + "; ".join(f"{s} = industries {' '.join(codes)}" for s, codes in STRATA.items())
        + ".",
        sources=[jobs_file],
        changes="two-digit industries added up to four strata; withheld cells (mining, utilities) count as none.",
        columns=("work", "stratum", "jobs"),
        rows=[(k, s, int(jobs[i, j])) for i, k in enumerate(keys) for j, s in enumerate(STRATA)],
    )
    matrix = "contacts/mistry_ny_work_85x85.csv.gz"
    by_age = np.array([[float(v) for v in r.values()] for r in read(folder, matrix)]).sum(axis=1)
    write(
        out,
        "employment.csv",
        what="Share of people with a job by single year of age (84 is open), New York State. Unit: 1. Used as a "
        "profile: its level is set by the commuting table.",
        sources=[matrix],
        changes="row sums of the workplace matrix (a person with a job has a sum near 1).",
        columns=("age", "share"),
        rows=[(age, float(share)) for age, share in enumerate(by_age)],
    )
    return workers, jobs / jobs.sum(axis=1, keepdims=True)


def contacts(folder: Path, out: Path) -> None:
    """Tables `contacts.csv` (contacts per day by setting) and `community_mixing.csv` (by age class)."""
    weights = "contacts/mistry_setting_weights.csv"
    setting = {r["setting"]: float(r["weight_contacts"]) for r in read(folder, weights)}
    write(
        out,
        "contacts.csv",
        what="Effective contacts of a person who is in the setting, before the pandemic. Unit: contacts per day.",
        sources=[weights],
        changes="none.",
        columns=("setting", "contacts"),
        rows=list(setting.items()),
    )
    matrix, ages = "contacts/mistry_ny_community_85x85.csv.gz", "contacts/mistry_ny_age_distribution.csv"
    f = np.array([[float(v) for v in r.values()] for r in read(folder, matrix)])
    n = np.array([float(r["population_rescaled"]) for r in read(folder, ages)])
    of = np.searchsorted(AGE_CLASSES, np.arange(len(n)), side="right") - 1
    member = np.eye(len(AGE_CLASSES))[of]
    population = member.T @ n
    mixing = setting["community"] * (member.T @ (n[:, None] * f) @ member) / population[:, None]
    write(
        out,
        "community_mixing.csv",
        what="Community contacts of a person of one age class with people of another, New York State, before the "
        "pandemic, and the people of that other class. Ages are lower ends in years. Units: contacts per day; people.",
        sources=[matrix, ages, weights],
        changes="single years aggregated to ten-year classes with the state's population as weights; multiplied by the "
        "community setting's contacts per day.",
        columns=("age", "contact_age", "contacts", "contact_people"),
        rows=[
            (a, b, float(mixing[i, j]), float(population[j]))
            for i, a in enumerate(AGE_CLASSES)
            for j, b in enumerate(AGE_CLASSES)
        ],
    )


def disease(folder: Path, out: Path) -> None:
    """Tables `prognosis.csv`, `durations.csv` and `serology.csv`."""
    name = "covid_params/prognosis_by_age.csv"
    given = {int(r["age_lower"]): r for r in read(folder, name)}
    columns = ("susceptibility_odds_ratio", "p_symptomatic", "p_severe", "p_critical", "p_death")
    rows: list[tuple[object, ...]] = []
    for age in AGE_CLASSES:
        value = {c: float(given[age][c]) for c in columns}
        if age == 80:
            value = {c: (1 - AGES_90_OF_80) * value[c] + AGES_90_OF_80 * float(given[90][c]) for c in columns}
        rows.append((age, *value.values()))
    write(
        out,
        "prognosis.csv",
        what="Natural history by age class (lower end, years): relative susceptibility and probabilities per infection "
        "(wild type, unvaccinated, care of early 2020). Unit: 1.",
        sources=[name],
        changes=f"80-89 and 90+ averaged with weights {1 - AGES_90_OF_80:g} and {AGES_90_OF_80:g} (an assumption).",
        columns=("age", "susceptibility", "p_symptomatic", "p_severe", "p_critical", "p_death"),
        rows=rows,
    )
    name = "covid_params/durations.csv"
    write(
        out,
        "durations.csv",
        what="Time from one state to the next, log-normal. Unit: days; mean and sd are of the time itself.",
        sources=[name],
        changes="columns selected.",
        columns=("transition", "mean", "sd"),
        rows=[(r["transition"], float(r["mean_days"]), float(r["sd_days"])) for r in read(folder, name)],
    )
    name = "covid_params/seroprevalence_april2020_published.csv"
    write(
        out,
        "serology.csv",
        what="Cumulative share of adults infected, by a survey of grocery shoppers on 2020-04-19 to 28. Unit: 1. Not "
        "used in calibration: a check from outside.",
        sources=[name],
        changes="the row of New York City selected.",
        columns=("infections_through", "share", "lower95", "upper95"),
        rows=[
            (r["infections_through"], float(r["cumulative_incidence"]), float(r["lower95"]), float(r["upper95"]))
            for r in read(folder, name)
            if r["group"] == "New York City"
        ],
    )


def drivers(folder: Path, out: Path, days: tuple[str, str], events: Mapping[str, str], what: str) -> None:
    """Tables `mobility.csv` and `dates.csv`.

    Args:
        folder: of the full files.
        out: of the tables.
        days: first and last day of the source's series.
        events: measure, as the source says it → name in the table.
        what: the dates are, for their table.
    """
    name = "econ_tracker/google_mobility_nyc_daily.csv"
    rows = [r for r in read(folder, name) if days[0] <= r["date"] <= days[1]]
    kinds = ("retail_and_recreation", "grocery_and_pharmacy", "transit_stations", "workplaces")
    # The published value of a day is the mean of that day and the six before it: it tells of three days earlier.
    write(
        out,
        "mobility.csv",
        what="Visits in New York City against 2020-01-03 to 02-06: centred 7-day means. Unit: fraction change.",
        sources=[name],
        changes="four place categories; dates moved back by three days (the source gives trailing 7-day means).",
        columns=("date", *(kind.split("_")[0] for kind in kinds)),
        rows=[
            (earlier["date"], *(float(later["gps_" + kind]) for kind in kinds))
            for earlier, later in zip(rows[:-3], rows[3:], strict=True)
        ],
    )
    name = "policy/nyc_interventions.csv"
    write(
        out,
        "dates.csv",
        what=what,
        sources=[name],
        changes="two rows selected, renamed.",
        columns=("event", "date", "checked"),
        rows=[
            (events[r["event"]], r["date"], r["verified"].split()[0])
            for r in read(folder, name)
            if r["event"] in events
        ],
    )


def observed(folder: Path, out: Path) -> None:
    """Tables `observed_<institution>.csv`, the stand-in for each institution's private file, and `deaths.csv`."""
    name = "nyc_covid/daily_by_borough.csv"
    rows = read(folder, name)
    for key, (borough, _) in INSTITUTIONS.items():
        own = [r for r in rows if r["area"] == borough and r["date"] <= "2020-06-30"]
        late = [r["date"] for r in own if r["incomplete"] not in ("", "0")]
        if late:
            raise InputError(f"{name} marks {late[0]} of {borough} as incomplete: take a later publication.")
        write(
            out,
            f"observed_{key}.csv",
            what=f"COVID-19 hospital admissions and deaths of {borough} by day of the event. Unit: people per day.",
            sources=[name],
            changes="borough and columns selected, up to 2020-06-30; no day is marked incomplete by the source.",
            columns=("date", "admissions", "deaths"),
            rows=[(r["date"], r["hospitalized"], r["deaths"]) for r in own],
        )

    name = "nyc_covid/deaths_confirmed_probable_daily_2020.csv"
    rows = [r for r in read(folder, name) if r["date"] <= "2020-06-30"]
    write(
        out,
        "deaths.csv",
        what="Deaths in New York City up to 2020-06-30, with a positive test or without one (mostly outside hospital). "
        "Unit: people.",
        sources=[name],
        changes="added up over days.",
        columns=("kind", "deaths"),
        rows=[(kind, sum(int(r[f"deaths_{kind}"] or 0) for r in rows)) for kind in ("confirmed", "probable")],
    )


def elsewhere(population: NDArray[np.float64], workers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where people of a borough are who spend their time in another one [home, borough]: half by commuting, half by
    the other's population.
    """
    apart = 1 - np.eye(len(population))
    commuting, attraction = workers[:, :-1] * apart, population.sum(axis=1)[None, :] * apart
    away: NDArray[np.float64] = sum(0.5 * flow / flow.sum(axis=1, keepdims=True) for flow in (commuting, attraction))
    return away


def groups(out: Path, population: NDArray[np.float64], workers: NDArray[np.float64], jobs: NDArray[np.float64]) -> None:
    """Tables `visits.csv`, `community_cells.csv` and `work_strata.csv`: the shared groups and who is in them."""
    keys = list(INSTITUTIONS)
    visits = HOME_SHARE * np.eye(len(keys)) + (1 - HOME_SHARE) * elsewhere(population, workers)
    write(
        out,
        "visits.csv",
        what="Share of the people of a borough whose time out of home, work and school is spent mostly in a zone. "
        "Unit: 1. ASSUMED: no survey was found.",
        sources=PEOPLE_AND_WORK,
        changes=f"{HOME_SHARE:g} at home; the rest half by commuting, half by the population of the other borough.",
        columns=("home", "zone", "share"),
        rows=[(h, z, float(visits[i, j])) for i, h in enumerate(keys) for j, z in enumerate(keys)],
    )
    merged(out, dict(zip(keys, visits.T, strict=True)), REFERENCE_AGENTS, population, workers, jobs)


def merged(
    out: Path,
    present: Mapping[str, NDArray[np.float64]],
    agents: int,
    population: NDArray[np.float64],
    workers: NDArray[np.float64],
    jobs: NDArray[np.float64],
    *,
    used: Sequence[str] = PEOPLE_AND_WORK,
    known: Mapping[str, Source] = SOURCES,
) -> None:
    """Tables `community_cells.csv` and `work_strata.csv`: groups merged until people of every borough are in each.

    Args:
        out: of the tables.
        present: zone → share of each borough's people who spend their time there [borough].
        agents: population for which the rule holds.
        population: people [borough, age class].
        workers: [borough, borough of work (the last is outside)].
        jobs: share of jobs [borough, stratum].
        used: full files that `present` comes from.
        known: where they can be had.
    """
    agents_per_person = agents / population.sum()
    rule = (
        f"expected agents at {agents} in all; neighbouring classes of a zone merged until every group "
        f"expects {MINIMUM_PEOPLE} agents and {MINIMUM_EACH:g} of every borough."
    )
    rows: list[tuple[object, ...]] = []
    first = 0
    for zone, here in present.items():
        expected = agents_per_person * here[:, None] * population
        of = merge(expected, MINIMUM_PEOPLE, MINIMUM_EACH)
        for c, age in enumerate(AGE_CLASSES):
            rows.append((zone, age, first + of[c], float(expected[:, c].sum()), float(expected[:, c].min())))
        first += max(of) + 1
    write(
        out,
        "community_cells.csv",
        what="Shared community groups: the group (cell) of a zone and an age class (lower end, years), the agents "
        "expected in the class, in all and of the borough with fewest. Unit: agents.",
        sources=used,
        changes=rule,
        columns=("zone", "age", "cell", "expected", "fewest"),
        rows=rows,
        known=known,
    )
    rows, first = [], 0
    for j, place in enumerate(INSTITUTIONS):
        expected = agents_per_person * workers[:, j][:, None] * jobs[j][None, :]
        of = merge(expected, MINIMUM_PEOPLE, MINIMUM_EACH)
        for s, stratum in enumerate(STRATA):
            rows.append((place, stratum, first + of[s], float(expected[:, s].sum()), float(expected[:, s].min())))
        first += max(of) + 1
    expected = agents_per_person * workers[:, -1]
    rows.append(("outside", "all", first, float(expected.sum()), float(expected.min())))
    write(
        out,
        "work_strata.csv",
        what="Shared workplace groups: the group of a borough of work and an industry stratum, the agents expected in "
        "it, in all and of the borough with fewest. Unit: agents.",
        sources=[*PEOPLE_AND_WORK, "population/employment_by_industry_borough_qcew_2017.csv"],
        changes=rule,
        columns=("work", "stratum", "group", "expected", "fewest"),
        rows=rows,
    )


def make(folder: Path, out: Path) -> None:
    """Write every table.

    Args:
        folder: holds the full files under the names in `SOURCES`.
        out: the folder of tables.

    Raises:
        DataMissing: for the first full file that is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    population = people(folder, out)
    households(folder, out)
    workers, jobs = work(folder, out)
    contacts(folder, out)
    disease(folder, out)
    dates = "Dates of measures in New York City; `unverified` dates were written down from memory."
    drivers(folder, out, DAYS, EVENTS, dates)
    observed(folder, out)
    groups(out, population, workers, jobs)


def main(arguments: Sequence[str], make: Callable[[Path, Path], None], out: Path) -> int:
    """Run from the command line; returns the exit code."""
    given = arguments[0] if arguments else os.environ.get("LPM_DATA", "")
    try:
        if not given:
            raise InputError("No folder of full files is given.", "Name it in LPM_DATA or as the argument.")
        make(Path(given), out)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], make, Path(__file__).resolve().parent / "figures"))

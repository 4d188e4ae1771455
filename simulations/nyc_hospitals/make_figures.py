"""Write the compact tables of figures that this world needs from the full public files.

    python simulations/nyc_hospitals/make_figures.py [FOLDER]

FOLDER (or the one named by `LPM_DATA`) holds the full files under the names in `SOURCES`. Tables that the five boroughs
need too (people, households, work, contacts, the disease) are written by their functions; the rest is here: hospitals
and their catchments, neighbourhoods, weekly beds, and what came before the wave.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.nyc_boroughs import make_figures as boroughs
from simulations.nyc_boroughs.make_figures import Source, read, write

HOSPITALS = {
    "330009": "bronx_lebanon",
    "330059": "montefiore",
    "330080": "lincoln",
    "330127": "jacobi",
    "330385": "north_central_bronx",
    "330399": "st_barnabas",
    "332006": "calvary",
    "330019": "community_brooklyn",
    "330056": "brooklyn_hospital",
    "330194": "maimonides",
    "330196": "coney_island",
    "330201": "kingsbrook",
    "330202": "kings_county",
    "330221": "wyckoff",
    "330233": "brookdale",
    "330236": "brooklyn_methodist",
    "330350": "downstate",
    "330396": "woodhull",
    "330397": "interfaith",
    "330024": "mount_sinai",
    "330046": "mount_sinai_west",
    "330100": "eye_and_ear",
    "330101": "presbyterian",
    "330119": "lenox_hill",
    "330154": "memorial",
    "330169": "beth_israel",
    "330199": "metropolitan",
    "330204": "bellevue",
    "330214": "nyu_langone",
    "330240": "harlem",
    "330270": "special_surgery",
    "330410": "facility_330410",
    "332008": "carter",
    "330014": "jamaica",
    "330055": "presbyterian_queens",
    "330128": "elmhurst",
    "330193": "flushing",
    "330195": "long_island_jewish",
    "330231": "queens_hospital",
    "330395": "st_johns",
    "330028": "richmond",
    "330160": "staten_island_university",
}
"""Certification number → institution, by borough and then by number."""

SPECIAL = ("calvary", "eye_and_ear", "memorial", "special_surgery", "facility_330410", "carter")
"""Hospitals for one kind of patient (hospice, eyes, cancer, bones, long stays) or without a name in the source: how
many patients with COVID-19 they take has little to do with the people around them."""

STOPPED = {"richmond": "2020-12-04"}
"""From here on a hospital's published zeros are taken as missing: it went from nine patients to none in one week, while
the wave grew, and stayed there. Its patients are probably reported under another number."""

NEIGHBOURHOODS = {"bronx": 3, "brooklyn": 5, "manhattan": 4, "queens": 4, "staten_island": 1}
"""Parts of a borough, each of some 400,000 to 560,000 people."""

SMALLEST_CATCHMENT = 40.0
"""Beds that a hospital counts for at least, when a borough's people are divided: an assumption."""

OWN_SHARE, BOROUGH_SHARE = 0.5, 0.3
"""Share of a catchment's people whose time out of home, work and school is spent mostly in the hospital's own
neighbourhood, and anywhere in its borough; the rest is in other boroughs. Assumptions."""

REFERENCE_AGENTS = 42_000
"""The population for which groups are merged until each has people of every borough."""

FIRST_WEEK, LAST_WEEK = "2020-07-31", "2021-03-26"
"""Core weeks that are shipped; the week after is missing in the source."""

SUPPRESSED, BELOW = -999999.0, 4
"""A published mean below four is given as this mark; rounded to whole patients it is 0 to 4."""

DAYS = ("2020-10-01", "2021-03-04")
"""First and last day of the mobility series."""

EVENTS = {"public schools closed again (3% positivity)": "schools_closed", "elementary schools reopen": "reopened"}
"""Measure, as the source says it → its name here."""

BEFORE = ("2020-10-16", "2020-11-06")
"""First days of two weeks of cases, the second the week before the start: they say where the wave begins, and how fast
it grows.
"""

_FACILITIES = Source(
    "US Department of Health and Human Services, COVID-19 reported patient impact and hospital capacity by facility",
    "https://healthdata.gov/Hospital/COVID-19-Reported-Patient-Impact-and-Hospital-Capa/anag-cw7u",
    "US government work, public domain",
)
_DOHMH = ("https://github.com/nychealth/coronavirus-data", "New York City government public data, credit DOHMH")
SOURCES: Mapping[str, Source] = {
    **boroughs.SOURCES,
    "hospital/hospital_weekly_nyc.csv.gz": _FACILITIES,
    "hospital/facilities_nyc.csv": _FACILITIES,
    "population/tract_acs_2013_2017.csv": Source(
        "US Census Bureau, American Community Survey 2013-2017, as given by nycgeo",
        "https://github.com/mfherman/nycgeo",
        "MIT; US government work, public domain",
    ),
    "nyc_covid/antibody_weekly.csv": Source(
        "New York City Department of Health and Mental Hygiene, trends/antibody-by-week", *_DOHMH
    ),
}
"""Full file → where it can be downloaded."""


def hospitals(folder: Path, out: Path) -> tuple[list[str], NDArray[np.float64], list[int]]:
    """Tables `hospitals.csv` and `neighbourhoods.csv`.

    Returns:
        Borough of each hospital, its share of the borough's people [hospital], and its neighbourhood (counted through
        all boroughs).
    """
    tracts_file, beds_file = "population/tract_acs_2013_2017.csv", "hospital/facilities_nyc.csv"
    people: dict[str, list[float]] = {key: [] for key in boroughs.INSTITUTIONS}
    county = {code: key for key, (_, code) in boroughs.INSTITUTIONS.items()}
    for r in sorted(read(folder, tracts_file, SOURCES), key=lambda r: r["geoid"]):
        people[county[r["geoid"][:5]]].append(float(r["pop_total_est"] or 0))
    zones: list[tuple[object, ...]] = []
    first: dict[str, int] = {}
    for borough, count in NEIGHBOURHOODS.items():
        running = np.cumsum(people[borough])
        part = np.minimum((count * (running - 0.5) / running[-1]).astype(np.int64), count - 1)
        first[borough] = len(zones)
        for k in range(count):
            inside = np.array(people[borough])[part == k]
            zones.append((f"{borough}_{k + 1}", borough, int(np.count_nonzero(part == k)), int(inside.sum())))
    write(
        out,
        "neighbourhoods.csv",
        what="Neighbourhoods: census tracts of a borough in the order of their numbers, which run roughly from one end "
        "to the other, in parts of equal population. Units: tracts; people, 2013-2017.",
        sources=[tracts_file],
        changes="tracts added up.",
        columns=("zone", "borough", "tracts", "people"),
        rows=zones,
        known=SOURCES,
    )
    found = {r["hospital_pk"]: r for r in read(folder, beds_file, SOURCES)}
    slug = {name: key for key, (name, _) in boroughs.INSTITUTIONS.items()}
    home = [slug[found[pk]["borough"]] for pk in HOSPITALS]
    beds = np.array([float(found[pk]["median_staffed_adult_inpatient_beds"]) for pk in HOSPITALS])
    counted = np.maximum(beds, SMALLEST_CATCHMENT)
    share, zone, rows = np.zeros(len(home)), [0] * len(home), []
    for borough in boroughs.INSTITUTIONS:
        at = [k for k, name in enumerate(home) if name == borough]
        share[at] = counted[at] / counted[at].sum()
        middle = np.cumsum(share[at]) - 0.5 * share[at]
        for k, m in zip(at, middle, strict=True):
            zone[k] = first[borough] + int(m * NEIGHBOURHOODS[borough])
    for k, (pk, institution) in enumerate(HOSPITALS.items()):
        name = found[pk]["hospital_name"].replace(",", "") or "(no name in the source)"
        kind = "special" if institution in SPECIAL else "general"
        rows.append((institution, pk, name, home[k], kind, float(beds[k]), float(share[k]), zones[zone[k]][0]))
    write(
        out,
        "hospitals.csv",
        what="The 42 hospitals: median staffed adult beds 2020-2022, the share of the borough's people that is the "
        "catchment, and its neighbourhood. Units: beds; 1. ASSUMED: catchments by beds, and neighbourhoods by turns.",
        sources=[beds_file],
        changes=f"renamed; a catchment is the borough's people by beds, at least {SMALLEST_CATCHMENT:g} each; "
        "the source gives no address, so hospitals are laid along the neighbourhoods in the order of their numbers.",
        columns=("institution", "number", "name", "borough", "kind", "beds", "share", "neighbourhood"),
        rows=rows,
        known=SOURCES,
    )
    return home, share, zone


def observed(folder: Path, out: Path) -> None:
    """Tables `observed_<institution>.csv`: weekly patients in bed, the stand-in for each hospital's private file."""
    name = "hospital/hospital_weekly_nyc.csv.gz"
    column = "total_adult_confirmed_covid_7day_avg"
    found = {
        (r["hospital_pk"], r["collection_week"]): r[column]
        for r in read(folder, name, SOURCES)
        if r["core"] == "1" and FIRST_WEEK <= r["collection_week"] <= LAST_WEEK
    }
    first, last = dt.date.fromisoformat(FIRST_WEEK), dt.date.fromisoformat(LAST_WEEK)
    weeks = [str(first + dt.timedelta(days=day)) for day in range(0, (last - first).days + 1, 7)]
    for pk, institution in HOSPITALS.items():
        stopped = STOPPED.get(institution, "9999")
        rows: list[tuple[object, ...]] = []
        for week in weeks:
            cell = found.get((pk, week), "")
            if cell == "" or week >= stopped:
                rows.append((week, "", ""))
            elif float(cell) == SUPPRESSED:
                rows.append((week, 0, BELOW))
            else:
                rows.append((week, round(float(cell)), round(float(cell))))
        changes = (
            f"core weeks up to {LAST_WEEK}; means rounded to whole patients; a suppressed mean (below {BELOW}) is "
        )
        changes += f"the interval 0 to {BELOW}, a missing week is empty"
        if institution in STOPPED:
            changes += f"; zeros from {stopped} on are taken as missing (reporting stopped at the wave's height)"
        write(
            out,
            f"observed_{institution}.csv",
            what="Adults in hospital with confirmed COVID-19, mean of the week that begins on the day given: the "
            "smallest and the largest count it may be. Unit: people.",
            sources=[name],
            changes=changes + ".",
            columns=("week", "lower", "upper"),
            rows=rows,
            known=SOURCES,
        )


def before(folder: Path, out: Path) -> None:
    """Tables `cases.csv` and `immunity.csv`: where infections were at the start, and who had had one."""
    name = "nyc_covid/daily_by_borough.csv"
    slug = {borough: key for key, (borough, _) in boroughs.INSTITUTIONS.items()}
    cases = {key: [0, 0] for key in slug.values()}
    for r in read(folder, name, SOURCES):
        for week, first in enumerate(BEFORE):
            if r["area"] in slug and 0 <= (dt.date.fromisoformat(r["date"]) - dt.date.fromisoformat(first)).days < 7:
                cases[slug[r["area"]]][week] += int(r["cases_confirmed"] or 0) + int(r["cases_probable"] or 0)
    write(
        out,
        "cases.csv",
        what=f"Confirmed and probable cases of the weeks from {BEFORE[0]} and from {BEFORE[1]}. Unit: people. They "
        "place the first infections and say how fast they grow; how many there are is calibrated.",
        sources=[name],
        changes="added up over days.",
        columns=("institution", "earlier", "latest"),
        rows=[(borough, *weeks) for borough, weeks in cases.items()],
        known=SOURCES,
    )
    antibody, survey = "nyc_covid/antibody_weekly.csv", "covid_params/seroprevalence_april2020_published.csv"
    tests = [r for r in read(folder, antibody, SOURCES) if "2020-09-05" <= r["week_ending"] <= "2020-10-10"]
    positive, tested = (sum(int(r[c]) for r in tests) for c in ("num_peop_pos", "num_peop_test"))
    spring = next(r for r in read(folder, survey, SOURCES) if r["group"] == "New York City")
    write(
        out,
        "immunity.csv",
        what="Share of people with antibodies, from two sources: a survey of grocery shoppers in April 2020, and those "
        "who asked for a test in September. Unit: 1. The share immune at the start is taken from them.",
        sources=[survey, antibody],
        changes="the row of New York City; weeks ending 2020-09-05 to 2020-10-10 added up.",
        columns=("what", "through", "share"),
        rows=[
            ("survey", spring["infections_through"], float(spring["cumulative_incidence"])),
            ("tests", "2020-10-10", positive / tested),
        ],
        known=SOURCES,
    )


def groups(
    out: Path,
    population: NDArray[np.float64],
    workers: NDArray[np.float64],
    jobs: NDArray[np.float64],
    home: Sequence[str],
    share: NDArray[np.float64],
    zone: Sequence[int],
) -> None:
    """Tables `visits.csv`, `community_cells.csv` and `work_strata.csv`: the shared groups and who is in them."""
    keys = list(boroughs.INSTITUTIONS)
    owner = [keys.index(name) for name in home]
    borough_of = [keys.index(borough) for borough, count in NEIGHBOURHOODS.items() for _ in range(count)]
    names = [f"{borough}_{k + 1}" for borough, count in NEIGHBOURHOODS.items() for k in range(count)]
    size = np.array([1.0 / NEIGHBOURHOODS[keys[b]] for b in borough_of])  # neighbourhoods of a borough are equal
    away = boroughs.elsewhere(population, workers)
    visits = np.zeros((len(home), len(names)))
    for h, b in enumerate(owner):
        visits[h] = (1 - OWN_SHARE - BOROUGH_SHARE) * away[b][borough_of] * size
        visits[h] += BOROUGH_SHARE * size * (np.array(borough_of) == b)
        visits[h, zone[h]] += OWN_SHARE
    used = [*boroughs.PEOPLE_AND_WORK, "hospital/facilities_nyc.csv"]
    institutions = list(HOSPITALS.values())
    write(
        out,
        "visits.csv",
        what="Share of the people of a catchment whose time out of home, work and school is spent mostly in a "
        "neighbourhood. Unit: 1. ASSUMED: no survey was found.",
        sources=used,
        changes=f"{OWN_SHARE:g} in the hospital's neighbourhood, {BOROUGH_SHARE:g} anywhere in the borough; the rest "
        "half by commuting, half by the population of the other borough.",
        columns=("institution", *names),
        rows=[(name, *(f"{v:.4g}" for v in visits[h])) for h, name in enumerate(institutions)],
        known=SOURCES,
    )
    by_borough = np.eye(len(keys))[owner].T @ (share[:, None] * visits)  # [home borough, zone]
    present = dict(zip(names, by_borough.T, strict=True))
    boroughs.merged(out, present, REFERENCE_AGENTS, population, workers, jobs, used=used, known=SOURCES)


def make(folder: Path, out: Path) -> None:
    """Write every table.

    Args:
        folder: holds the full files under the names in `SOURCES`.
        out: the folder of tables.

    Raises:
        DataMissing: for the first full file that is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    population = boroughs.people(folder, out)
    boroughs.households(folder, out)
    workers, jobs = boroughs.work(folder, out)
    boroughs.contacts(folder, out)
    boroughs.disease(folder, out)
    (out / "serology.csv").unlink()  # of the first wave; `immunity.csv` has it
    before(folder, out)
    boroughs.drivers(folder, out, DAYS, EVENTS, "Dates of measures in New York City.")
    observed(folder, out)
    groups(out, population, workers, jobs, *hospitals(folder, out))


if __name__ == "__main__":
    sys.exit(boroughs.main(sys.argv[1:], make, Path(__file__).resolve().parent / "figures"))

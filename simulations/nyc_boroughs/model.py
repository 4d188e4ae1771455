"""Five boroughs, one epidemic: people, where they meet, the disease, and what each institution observes.

Everything here is made from the public tables in `figures/`. A borough's people depend on the seed and the borough
alone, so a party builds its own and nobody else's, and boroughs can be put together in any way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

COVERING = 0.2
"""Reduction of transmission out of home by face coverings and care, from the week after the order of 17 April on. An
assumption: the order came when the wave was nearly over, and no series of these weeks tells (a calibrated share came
out as its prior)."""

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


@dataclass(frozen=True, eq=False)
class Figures:
    """The public tables, read once.

    Attributes:
        city: boroughs, people, where they meet; the disease, mobility and dates.
        untested: share of deaths without a test, mostly outside hospital.
    """

    city: City
    untested: float


@cache
def figures() -> Figures:
    """The public tables."""
    table = tables(FIGURES)
    boroughs = len(table["households"])
    visits = np.array([float(r["share"]) for r in table["visits"]]).reshape(boroughs, boroughs)
    deaths = {r["kind"]: float(r["deaths"]) for r in table["deaths"]}
    return Figures(City.from_tables(table, visits), deaths["probable"] / (deaths["probable"] + deaths["confirmed"]))


def build(scenario: Scenario, institutions: Sequence[str], *, agents: int, seed: int) -> lpm.Model:
    """The model of the shard of some institutions.

    Args:
        scenario: parameters, dates.
        institutions: whose people the shard holds.
        agents: agents of the whole city.
        seed: of the people; the same people for any way whole institutions are put together.
    """
    city = figures().city
    people, networks = city.shard(institutions, agents, seed)
    classes = len(institutions) * len(city.ages)
    p = {name: np.tile(values, len(institutions)) for name, values in city.prognosis.items()}
    severe, fatal = p["p_severe"] / p["p_symptomatic"], p["p_death"] / p["p_symptomatic"]
    private: dict[str, lpm.Output] = {}
    for number, name in enumerate(institutions):
        mine = (np.arange(classes) // len(city.ages) == number).astype(np.float64)
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
    f = figures().city
    days = f.from_day(scenario.start)
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
    f = figures().city
    transmissibility, distancing, initial = (
        scenario.parameter(name) for name in ("transmissibility", "distancing", "initial")
    )
    early = EARLY_SHARE * f.days["mild_to_recovered"][0]
    late = f.days["symptomatic_to_severe"][0] - early
    turn = f.days["mild_to_recovered"][0] - f.days["symptomatic_to_severe"][0]
    presymptomatic, unnoticed = f.days["infectious_to_symptomatic"][0], f.days["asymptomatic_to_recovered"][0]
    to_critical = f.days["severe_to_critical"][0]
    covered = 1.0 - COVERING * lpm.driver("covered")
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
    days = f.city.days
    turn = days["symptomatic_to_severe"]
    in_hospital = delay(turn, days["severe_to_critical"], days["critical_to_death"], late=late)
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

"""A susceptible-infectious-recovered epidemic in homes and in the four cells of a town, seen by three clinics.

Households and where their people go are addressed by the household's number alone, so any assignment of whole
households to parties makes the same town: `assemble` takes the numbers of the households that a party holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lpm
from lpm.errors import InputError
from lpm.observation import CountSeries, Observation
from lpm.population.synthesis import Stream
from lpm.scenario import Scenario

FIGURES = Path(__file__).resolve().parent / "figures"

CELLS = 4
"""Shared cells of the town."""

AWAY = 0.6
"""Share of people who spend the day in a cell drawn at random and not in their household's."""

SIZES = (1, 2, 3, 4, 5, 3, 4, 2, 6, 2)
"""People in household 0, 1, 2, …, over and over: 3.2 on average."""

MIXING = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]])
"""How much a person of one cell meets each other cell."""

AT_HOME = 1.5
"""Hazard at home against town, for the same share of infectious people."""

STAY_HOME = 0.5
"""Infectivity in town of the infectious, of whom half stay at home."""


def households(agents: int) -> NDArray[np.int64]:
    """The sizes of the town's households, whose people sum to `agents`; the last may be smaller [households]."""
    whole = np.tile(SIZES, agents // sum(SIZES) + 1)
    last = int(np.searchsorted(np.cumsum(whole), agents))
    sizes = whole[: last + 1].astype(np.int64)
    sizes[-1] -= sizes.sum() - agents
    return sizes


def clinic_of(number: NDArray[np.int64], clinics: int) -> NDArray[np.int64]:
    """The clinic that each household goes to."""
    return number % clinics


def cells_of(number: int, size: int, seed: int) -> NDArray[np.int64]:
    """The cell each person of a household spends the day in [size]."""
    stream = Stream(seed, "household", str(number))
    home = int(stream.uniform(1)[0] * CELLS)
    drawn = np.floor(stream.uniform(size) * CELLS).astype(np.int64)
    return np.where(stream.uniform(size) < AWAY, drawn, home)


def assemble(scenario: Scenario, numbers: Sequence[int], *, agents: int, seed: int) -> lpm.Model:
    """The model of the shard that holds some households.

    Args:
        scenario: parameters, dates, names of the clinics.
        numbers: of the households, in any order.
        agents: people of the whole town.
        seed: of the people; the same people for any way whole households are put together.

    Raises:
        InputError: for a household that is not there, or twice.
    """
    sizes = households(agents)
    chosen = np.asarray(numbers, dtype=np.int64)
    if np.unique(chosen).size != chosen.size or (chosen.size and (chosen.min() < 0 or chosen.max() >= sizes.size)):
        raise InputError(f"Households are different whole numbers from 0 to {sizes.size - 1}.")
    size = sizes[chosen]
    household = np.repeat(chosen, size)
    rank = np.concatenate([np.arange(k) for k in size]) if chosen.size else np.zeros(0, dtype=np.int64)
    cells = [cells_of(int(h), int(k), seed) for h, k in zip(chosen, size, strict=True)]
    people = lpm.Population(
        agents=household.size,
        ids=(household.astype(np.uint64) << np.uint64(8)) + rank.astype(np.uint64),
        attributes={"clinic": clinic_of(household, len(scenario.institutions))},
    )
    transmissibility, initial = (scenario.parameter(name) for name in ("transmissibility", "initial"))
    clinics = np.eye(len(scenario.institutions))
    present = np.unique(clinic_of(chosen, len(scenario.institutions)))
    return lpm.Model(
        people,
        networks=[
            lpm.Groups("household", of=household),
            lpm.Groups(
                "town",
                of=np.concatenate(cells) if cells else np.zeros(0, dtype=np.int64),
                groups=CELLS,
                shared=True,
                mixing=MIXING,
            ),
        ],
        protocols=[
            lpm.Contagion(
                stages="S I*2 R",
                infection="S -> I",
                classes="clinic",
                infectious={"I": {"household": 1.0, "town": STAY_HOME}},
                over={"household": transmissibility * AT_HOME, "town": transmissibility},
                progression={"I": lpm.leave(mean_days=4.0, to={"R": None})},
                initial={"I": initial},
            )
        ],
        outputs={"cases": lpm.flow("S -> I"), "infectious": lpm.count("I")},
        private_outputs={
            f"cases/{scenario.institutions[k]}": lpm.flow("S -> I", thin=clinics[k]) for k in present.tolist()
        },
        start=scenario.start,
        class_counts={"clinic": len(scenario.institutions)},
    )


def build(scenario: Scenario, institutions: Sequence[str], *, agents: int, seed: int) -> lpm.Model:
    """The model of the shard of some clinics: the households that go to them.

    Args:
        scenario: parameters, dates, names of the clinics.
        institutions: whose people the shard holds.
        agents: people of the whole town.
        seed: of the people.
    """
    for name in institutions:
        if name not in scenario.institutions:
            raise InputError(f"There is no clinic {name!r}: there are {', '.join(scenario.institutions)}.")
    numbers = np.arange(households(agents).size)
    own = [scenario.institutions.index(name) for name in institutions]
    chosen = np.isin(clinic_of(numbers, len(scenario.institutions)), own)
    return assemble(scenario, numbers[chosen].tolist(), agents=agents, seed=seed)


def observation(scenario: Scenario, institution: str, data: Path | None) -> Observation:
    """What one clinic observes: the cases reported to it each day.

    Args:
        scenario: dates, parameters.
        institution: its name.
        data: a folder with its own `<institution>.csv` (date, cases); the synthetic series in `figures/` if None.

    Raises:
        InputError: for a gap, a date twice, or a cell that is no count.
    """
    path = FIGURES / f"observed_{institution}.csv" if data is None else data / f"{institution}.csv"
    series = CountSeries.from_csv(
        path,
        "cases",
        scenario.start,
        scenario.steps,
        output=f"cases/{institution}",
        scale=scenario.parameter("reporting"),
        likelihood="poisson",
    )
    return Observation(institution, scenario.start, [series])

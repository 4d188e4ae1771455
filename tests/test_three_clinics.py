"""The small town is the same town however its households are put together, and its series come from its known truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lpm
from lpm import scenario as scenarios
from lpm.errors import InputError
from simulations.three_clinics import make_figures, model

FOLDER = Path(__file__).resolve().parent.parent / "simulations" / "three_clinics"
WORLD = scenarios.load(FOLDER)


def people(town: lpm.Model) -> dict[int, tuple[int, int, int]]:
    """Agent id → household (first 56 bits), clinic, cell."""
    cells, clinics = town.network("town").cell_of, town.population.attributes["clinic"]
    return {
        int(a): (int(a) >> 8, int(k), int(c)) for a, k, c in zip(town.population.addresses, clinics, cells, strict=True)
    }


def test_households_add_up_to_the_town() -> None:
    for agents in (1, 7, 480, 600):
        sizes = model.households(agents)
        assert sizes.sum() == agents
        assert sizes.min() >= 1


def test_any_assignment_of_whole_households_makes_the_same_town() -> None:
    whole = people(model.build(WORLD, WORLD.institutions, agents=480, seed=5))
    order = np.random.default_rng(1).permutation(model.households(480).size)
    found: dict[int, tuple[int, int, int]] = {}
    for part in np.split(order, [3, 40]):
        found |= people(model.assemble(WORLD, part.tolist(), agents=480, seed=5))
    assert found == whole
    by_clinic = [people(model.build(WORLD, [name], agents=480, seed=5)) for name in WORLD.institutions]
    assert {k: v for part in by_clinic for k, v in part.items()} == whole


def test_the_order_of_households_changes_no_bit_of_the_epidemic() -> None:
    numbers = list(range(model.households(480).size))
    values = {name: WORLD.defaults[name] for name in WORLD.dynamics}
    runs = [
        lpm.simulate(model.assemble(WORLD, order, agents=480, seed=5), values, steps=WORLD.steps, seed=5)
        for order in (numbers, numbers[::-1])
    ]
    assert runs[0].outputs.equals(runs[1].outputs)


def test_every_cell_has_people_of_every_clinic() -> None:
    for seed in range(5):
        town = model.build(WORLD, WORLD.institutions, agents=480, seed=seed)
        table = np.zeros((3, 4), dtype=np.int64)
        np.add.at(table, (town.population.attributes["clinic"], town.network("town").cell_of), 1)
        assert table.min() >= 10
    assert WORLD.networks["town"].groups == 4


def test_the_series_come_from_the_known_truth(tmp_path: Path) -> None:
    make_figures.make(FOLDER, tmp_path)
    for name in WORLD.institutions:
        file = f"observed_{name}.csv"
        assert (tmp_path / file).read_text() == (FOLDER / "figures" / file).read_text()
        assert WORLD.observation(name).series[0].values.size == WORLD.steps


def test_an_unknown_clinic_and_a_household_twice_are_refused() -> None:
    with pytest.raises(InputError, match="east"):
        model.build(WORLD, ["east"], agents=480, seed=1)
    for wrong in ([1, 1], [-1], [10_000]):
        with pytest.raises(InputError, match="Households are different"):
            model.assemble(WORLD, wrong, agents=480, seed=1)

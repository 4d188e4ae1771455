"""Cells of a shared network: ages in their classes, small classes merged by a public rule, contacts kept in number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpm.errors import DataMissing
from lpm.population.cells import cell_mixing, class_of, merge, rows


def test_merging_stops_when_every_group_has_people_of_every_home() -> None:
    expected = np.array([[40.0, 40.0, 9.0, 0.4], [40.0, 30.0, 1.2, 0.9]])
    assert merge(expected, 10, 1.0) == [0, 1, 2, 2]
    assert merge(np.full((2, 3), 0.1), 10, 1.0) == [0, 0, 0]
    assert merge(np.full((2, 3), 50.0), 10, 1.0) == [0, 1, 2]


def test_ages_are_in_the_class_whose_lower_end_they_reach() -> None:
    assert class_of(np.array([0, 9, 10, 79, 80, 99]), (0, 10, 80)).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_person_keeps_their_contacts_and_meets_cells_by_who_is_there() -> None:
    table = [{"contacts": c, "contact_people": n} for c, n in (("2", "100"), ("1", "300"), ("1", "100"), ("3", "300"))]
    cells, present = np.array([[0, 1], [2, 3]]), np.array([[100.0, 300.0], [50.0, 150.0]])
    mixing = cell_mixing(table, (0, 40), cells, present, 0.25)
    # Zones with the state's ages: each class has the state's number of contacts, three quarters of them at home.
    np.testing.assert_allclose(mixing.sum(axis=1), [3, 4, 3, 4])
    np.testing.assert_allclose(mixing[0, :2], np.array([2.0, 1.0]) * (0.75 + 0.25 * 2 / 3))
    # People who are merged into one cell meet as their average does.
    merged = cell_mixing(table, (0, 40), np.array([[0, 0], [1, 1]]), present, 0.25)
    np.testing.assert_allclose(merged.sum(axis=1), [(100 * 3 + 300 * 4) / 400] * 2)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"jobs\.csv"):
        rows(tmp_path / "jobs.csv")
    (tmp_path / "jobs.csv").write_text("# a header\na,b\n1,2\n")
    assert rows(tmp_path / "jobs.csv") == [{"a": "1", "b": "2"}]

"""Cells in which people of several institutions meet: age classes, contacts between cells, and merging small ones.

These are the groups of a shared network, the only sums that institutions exchange (the ⊕ of eq. 1). All of it follows
from public tables, so every world gets the same cells.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm.errors import DataMissing

__all__ = ["cell_mixing", "class_of", "merge", "rows"]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of figures, without its header lines.

    Args:
        path: a csv file that may begin with lines of comment (`#`).

    Returns:
        A mapping from column to text for each row.

    Raises:
        DataMissing: if the table is not there.
    """
    if not path.is_file():
        raise DataMissing(path, "the project's page", f"{path.parent.name}/{path.name}")
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def class_of(age: NDArray[np.integer], ages: Sequence[int]) -> NDArray[np.int64]:
    """The class of each age.

    Args:
        age: years [people].
        ages: lower ends of the classes, ascending from 0.

    Returns:
        Class of each person, from 0 [people].
    """
    return np.searchsorted(ages, age, side="right") - 1


def cell_mixing(
    table: list[dict[str, str]],
    ages: Sequence[int],
    cells: NDArray[np.int64],
    present: NDArray[np.float64],
    abroad: float,
) -> NDArray[np.float64]:
    """Contacts per day of a person of one cell with another cell.

    The state's contact rates are carried over by age: a person meets an age class in proportion to the people of that
    class around them, with the state's preference for it.

    Args:
        table: contacts per day and people of the other class (columns `contacts`, `contact_people`) for each pair of
            age classes.
        ages: lower ends of the age classes.
        cells: cell of a zone and age class [zone, age class].
        present: people [zone, age class].
        abroad: share of contacts met anywhere and not in one's own zone.

    Returns:
        Contacts per day [cells, cells].
    """
    k = len(ages)
    contacts = np.array([float(r["contacts"]) for r in table]).reshape(k, k)
    state = np.array([float(r["contact_people"]) for r in table[:k]])
    preference = contacts / (state / state.sum())[None, :]
    near = present / present.sum(axis=1, keepdims=True)
    everywhere = present / present.sum()
    count = int(cells.max()) + 1
    member, people = np.zeros((cells.size, count)), present.ravel()
    member[np.arange(cells.size), cells.ravel()] = 1.0
    fine = np.zeros((*present.shape, *present.shape))
    for zone in range(present.shape[0]):
        fine[zone, :, zone, :] = (1.0 - abroad) * preference * near[zone][None, :]
        fine[zone] += abroad * preference[:, None, :] * everywhere[None, :, :]
    flat = fine.reshape(cells.size, cells.size)
    mixing: NDArray[np.float64] = member.T @ (people[:, None] * flat) @ member / (member.T @ people)[:, None]
    return mixing


def merge(expected: NDArray[np.float64], fewest: float, fewest_each: float) -> list[int]:
    """Merge neighbouring classes of one zone until every group has people enough of every kind of home.

    The first class that falls short joins its smaller neighbour (the lower one where they are equal), and the rule
    begins again; it looks at public expectations only, so it is the same in every world.

    Args:
        expected: agents expected [home, class].
        fewest: agents expected in a group, at least.
        fewest_each: agents of every home expected in a group, at least.

    Returns:
        For each class the number of its group, counted from 0 in order.
    """
    groups = [[c] for c in range(expected.shape[1])]
    while len(groups) > 1:
        count = [expected[:, g].sum(axis=1) for g in groups]
        short = [i for i, c in enumerate(count) if c.sum() < fewest or c.min() < fewest_each]
        if not short:
            break
        i = short[0]
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(groups)]
        j = min(beside, key=lambda j: count[j].sum())
        groups[min(i, j)] += groups.pop(max(i, j))
    return [next(i for i, g in enumerate(groups) if c in g) for c in range(expected.shape[1])]

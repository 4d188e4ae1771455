"""Synthetic people follow their margins exactly, live in plausible households, and depend on nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpm.errors import InputError
from lpm.population.synthesis import ADULT, Margins, Stream, Synthesis, apportion, divide, place, synthesise

AGES = (0, 5, 10, 15, 20, 30, 45, 65, 85)
PEOPLE = np.array(
    [[30, 31], [29, 30], [28, 29], [28, 28], [70, 68], [110, 105], [120, 112], [70, 55], [12, 6]], dtype=np.float64
)
SIZES = np.array([0.30, 0.27, 0.17, 0.11, 0.06, 0.04, 0.05])


def margins(**changes: float) -> Margins:
    """A town of two thousand's margins, with what a test changes."""
    return Margins(AGES, PEOPLE, SIZES, **{"with_children": 0.31, "alone_old": 0.35, "couples": 0.44} | changes)


@pytest.fixture(scope="module")
def town() -> Synthesis:
    """Five thousand synthetic people."""
    return synthesise(margins(), 5000, Stream(7, "town"))


def test_apportion_adds_up_and_gives_the_largest_remainders_first() -> None:
    assert apportion(10, [1, 1, 1]).tolist() == [4, 3, 3]
    assert apportion(7, [0.5, 0.3, 0.2]).tolist() == [4, 2, 1]
    assert apportion(0, [2.0, 1.0]).tolist() == [0, 0]


@given(st.integers(0, 10**6), st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda s: sum(s) > 1e-3))
def test_apportion_is_within_one_of_the_exact_share(total: int, shares: list[float]) -> None:
    count = apportion(total, shares)
    assert count.sum() == total
    assert np.all(np.abs(count - total * np.array(shares) / sum(shares)) < 1 + 1e-6 * total)


def test_ages_and_sexes_follow_the_margins_exactly(town: Synthesis) -> None:
    band = np.searchsorted(AGES, town.age, side="right") - 1
    count = np.zeros(PEOPLE.shape, dtype=np.int64)
    np.add.at(count, (band, town.sex), 1)
    assert np.array_equal(count, apportion(5000, PEOPLE))


def test_household_sizes_follow_the_margins(town: Synthesis) -> None:
    size = np.bincount(town.household)
    assert size.sum() == 5000
    shares = margins().size_shares()
    expected = apportion(size.size, shares)
    assert np.abs(np.bincount(size, minlength=11)[1:] - expected).sum() <= 4  # the rest's one household, and rounding
    assert shares.size == 10
    assert shares[6:].sum() == pytest.approx(SIZES[-1] / SIZES.sum())


def test_every_household_has_an_adult_and_children_have_likely_parents(town: Synthesis) -> None:
    child = town.age < ADULT
    adults, children = np.bincount(town.household, ~child), np.bincount(town.household, child)
    assert adults.min() >= 1
    assert np.mean(children > 0) == pytest.approx(0.31, abs=0.002)
    first = np.searchsorted(town.household, np.arange(adults.size))
    gap = town.age[first][town.household[child]].astype(int) - town.age[child]
    assert np.mean(gap < 15) < 0.01
    assert np.mean(gap > 50) < 0.03
    assert 25 < gap.mean() < 36


def test_who_lives_alone_is_as_old_as_the_margins_say(town: Synthesis) -> None:
    alone = np.bincount(town.household)[town.household] == 1
    assert np.mean(town.age[alone] >= 65) == pytest.approx(0.35, abs=0.005)
    assert town.age[alone].min() >= ADULT


def test_couples_are_of_similar_age(town: Synthesis) -> None:
    size = np.bincount(town.household)
    first = np.searchsorted(town.household, np.arange(size.size))
    two = first[(size == 2)]
    both = two[(town.age[two] >= ADULT) & (town.age[two + 1] >= ADULT)]
    gap = np.abs(town.age[both].astype(int) - town.age[both + 1])
    assert np.mean(gap <= 6) > 0.5  # of unrelated adults it would be a fifth


def test_the_same_address_gives_the_same_people_and_another_gives_others() -> None:
    a, b = (synthesise(margins(), 800, Stream(3, "north")) for _ in range(2))
    other = synthesise(margins(), 800, Stream(3, "south"))
    assert np.array_equal(a.age, b.age)
    assert np.array_equal(a.household, b.household)
    assert not np.array_equal(a.age, other.age)
    assert np.array_equal(np.sort(a.age), np.sort(other.age))


def test_a_stream_is_pinned_to_its_bits() -> None:
    """Streams are the same for every numpy: these digits were computed once and must not move."""
    first = Stream(1, "bronx", "people").uniform(3)
    assert np.all((first > 0) & (first < 1))
    assert first.tolist() == PINNED


PINNED = [0.22747779751160302, 0.1421546557536385, 0.6015671580454066]


def test_a_stream_is_uniform_and_its_bell_has_the_asked_spread() -> None:
    stream = Stream(5, "statistics")
    u = stream.uniform(100_000)
    assert abs(u.mean() - 0.5) < 0.004  # 4 standard errors
    assert abs(stream.bell(100_000, 4.0).std() - 4.0) < 0.04


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_any_number_of_people_and_any_shares_are_seated(
    agents: int, seed: int, with_children: float, alone_old: float, couples: float
) -> None:
    town = synthesise(
        margins(with_children=with_children, alone_old=alone_old, couples=couples), agents, Stream(seed, "small")
    )
    assert town.age.size == town.household.size == agents
    band = np.searchsorted(AGES, town.age, side="right") - 1
    count = np.zeros(PEOPLE.shape, dtype=np.int64)
    np.add.at(count, (band, town.sex), 1)
    assert np.array_equal(count, apportion(agents, PEOPLE))
    assert np.all(np.diff(town.household) >= 0)


def test_a_town_of_children_still_gets_seats() -> None:
    people = np.zeros_like(PEOPLE)
    people[0] = 10
    town = synthesise(Margins(AGES, people, SIZES), 50, Stream(1, "nursery"))
    assert town.age.max() < 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"couples": 1.5}, "couples"),
        ({"with_children": -0.1}, "with_children"),
        ({"alone_old": float("nan")}, "alone_old"),
    ],
)
def test_impossible_margins_are_refused_by_name(change: dict[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        margins(**change)


def test_margins_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(InputError, match="people"):
        Margins(AGES, PEOPLE[:-1], SIZES)
    with pytest.raises(InputError, match="ascend"):
        Margins((0, 10, 5), PEOPLE[:3], SIZES)
    with pytest.raises(InputError, match="people"):
        Margins(AGES, -PEOPLE, SIZES)
    with pytest.raises(InputError, match="agents"):
        synthesise(margins(), 0, Stream(1, "none"))


@pytest.mark.parametrize("labels", [1, 9, 40_000])
def test_an_order_within_labels_is_that_of_a_lexicographic_sort(labels: int) -> None:
    label = np.random.default_rng(labels).integers(-1, labels, 50_000)
    expected = np.lexsort((Stream(3, "order").uniform(label.size), label))
    assert np.array_equal(Stream(3, "order").order_within(label), expected)
    assert Stream(3, "order").order_within(label[:0]).size == 0


def test_place_sends_at_least_the_whole_part_of_what_is_expected() -> None:
    classes = np.repeat(np.arange(9), 127)
    shares = np.array([0.0193, 0.0658, 0.0791, 0.0358, 0.8])
    zone = place(classes, shares, Stream(2, "zones"))
    table = np.zeros((9, 5), dtype=np.int64)
    np.add.at(table, (classes, zone), 1)
    assert np.array_equal(table.sum(axis=1), np.full(9, 127))
    for first in range(9):
        for last in range(first + 1, 10):
            expected = 127 * (last - first) * shares[:4]
            assert np.all(table[first:last, :4].sum(axis=0) >= np.floor(expected))
            assert np.all(table[first:last, :4].sum(axis=0) <= np.ceil(expected))


def test_place_copes_with_a_handful_of_people() -> None:
    zone = place(np.array([0, 2, 2]), np.array([0.24, 0.24, 0.24, 0.28]), Stream(2, "few"))
    assert zone.shape == (3,)
    assert np.all((zone >= 0) & (zone < 4))


def test_divide_makes_groups_of_nearly_equal_size_within_each_label() -> None:
    label = np.repeat([0, 3, -1, 4], [61, 25, 10, 3])[np.argsort(Stream(1, "mix").uniform(99))]
    group = divide(label, 12, Stream(1, "teams"))
    for kind, sizes in ((0, [12, 12, 12, 12, 13]), (3, [12, 13]), (4, [3])):
        assert sorted(np.unique(group[label == kind], return_counts=True)[1].tolist()) == sizes
    assert np.all(group[label == -1] == -1)
    assert np.array_equal(np.unique(group[label >= 0]), np.arange(group.max() + 1))


def test_divide_mixes_people_at_random() -> None:
    group = divide(np.zeros(1000, dtype=np.int64), 10, Stream(1, "teams"))
    together = np.mean(group[:-1] == group[1:])
    assert together < 0.05  # neighbours in the list share a group by chance only: 1 in 100

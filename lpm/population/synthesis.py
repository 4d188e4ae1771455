"""Synthetic people from public margins: ages, sexes and households of one institution, then small groups among them.

Counts follow the margins exactly (largest remainders), never by chance: at 20,000 agents a drawn margin would move an
epidemic by more than the data can bear. What is drawn (who lives with whom) comes from a stream addressed by seed and
institution, so an institution's people are the same whoever else is in the shard.

The order of a household's making follows the usual sample-free synthesis (Gargiulo et al. 2010, PLoS ONE 5:e8828;
Barthelemy and Toint 2013, Transportation Science 47:266): sizes, who has children, couples, ages matched by rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpm.errors import InputError

__all__ = ["Margins", "Stream", "Synthesis", "apportion", "divide", "place", "synthesise"]

ADULT = 18
"""Age from which a person counts as an adult, years."""

OLDEST = 99
"""Ages above are given as this one, years."""

_CHILD_ODDS = np.array([0.0, 0.0, 0.12, 0.5, 0.8, 1.0])
"""Relative chance that a household of 0, 1, 2, … 5 and more people has a child: an assumption, its level is given."""

_PARENT_AGES = (18, 22, 25, 30, 50, 55, 60)
_PARENT_WEIGHTS = np.array([0.05, 0.2, 0.6, 1.0, 0.5, 0.2, 0.02])
"""Relative chance that an adult of these ages (lower ends) brings up a child at home: an assumption."""

_PARTNER_SHARE = 0.85
"""Share of second adults in households with children who are the householder's partner: an assumption."""

_PARENT_GAP = 30.0
"""Years between parent and child, on average; ages are matched by rank around it."""


class Stream:
    """Uniform numbers addressed by a seed and words, the same on every machine and for every numpy.

    Args:
        seed: public or the institution's own.
        address: words, such as the institution's name and what is drawn.
    """

    def __init__(self, seed: int, *address: str) -> None:
        text = "\x1f".join((str(seed), *address)).encode()
        key = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<u8")
        self._bits = np.random.Philox(key=key)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1) [count]."""
        return ((self._bits.random_raw(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def bell(self, count: int, sd: float) -> NDArray[np.float64]:
        """Numbers around 0 of this standard deviation, by the sum of three uniform ones [count]."""
        return (self.uniform(count) + self.uniform(count) + self.uniform(count) - 1.5) * (2.0 * sd)

    def order(self, count: int) -> NDArray[np.int64]:
        """A random order of 0 … count - 1."""
        return np.argsort(self.uniform(count), kind="stable")

    def order_within(self, label: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions by label, those of one label in a random order.

        What `lexsort` by label and a random key gives; faster than it for up to some thousands of labels.

        Args:
            label: from -1, few different ones [n].
        """
        key = self.uniform(label.size)
        count = np.bincount(label + 1)
        narrow = label.astype(np.int16) if count.size < 2**15 else label  # numpy sorts 16 bits by their digits
        order = np.argsort(narrow, kind="stable")
        key = key[order]
        end = np.cumsum(count)
        for first, last in zip(end - count, end, strict=True):
            order[first:last] = order[first:last][np.argsort(key[first:last], kind="stable")]
        return order

    def choose(self, weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """Positions drawn one after the other without replacement, with these weights (Efraimidis and Spirakis 2006).

        Args:
            weights: from 0 [n]; those of weight 0 come last.
            count: how many, at most n.

        Returns:
            Positions [count], ascending.
        """
        if count >= weights.size:
            return np.arange(weights.size)
        with np.errstate(divide="ignore"):
            keys = -np.log(self.uniform(weights.size)) / weights
        return np.sort(np.argpartition(keys, count)[:count]) if count else np.empty(0, dtype=np.int64)


def apportion(total: int, shares: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers that add up to a total and follow shares, by largest remainders (ties to the first).

    Args:
        total: from 0.
        shares: from 0, not all 0; any scale and shape.

    Returns:
        Whole numbers of the shape of `shares`.
    """
    weight = np.asarray(shares, dtype=np.float64)
    exact = (total * weight / weight.sum()).ravel()
    count = np.floor(exact).astype(np.int64)
    short = total - int(count.sum())
    count[np.argsort(count - exact, kind="stable")[:short]] += 1
    return np.asarray(count.reshape(weight.shape), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Margins:
    """What is known of an institution's people.

    Args:
        ages: lower ends of age bands, years, ascending from 0; the last is open [bands].
        people: by band and sex [bands, 2].
        sizes: share of households with 1, 2, … people; the last is open [sizes].
        largest: the most people in a household: the open size goes on geometrically up to it.
        with_children: share of households with someone under 18.
        alone_old: share of those who live alone who are 65 or older.
        couples: couples per household.

    Raises:
        InputError: naming what is not a share or not a count.
    """

    ages: Sequence[int]
    people: NDArray[np.float64]
    sizes: NDArray[np.float64]
    largest: int = 10
    with_children: float = 0.3
    alone_old: float = 0.35
    couples: float = 0.45

    def __post_init__(self) -> None:
        if list(self.ages) != sorted(set(self.ages)) or self.ages[0] != 0:
            raise InputError("The age bands of the margins ascend from 0.")
        if self.people.shape != (len(self.ages), 2) or not np.all(self.people >= 0) or not self.people.sum() > 0:
            raise InputError(f"The people of the margins are counts by band and sex, {len(self.ages)} by 2.")
        if self.sizes.ndim != 1 or not np.all(self.sizes >= 0) or not self.sizes.sum() > 0:
            raise InputError("The household sizes of the margins are shares from 0.")
        for name in ("with_children", "alone_old", "couples"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} of the margins is {getattr(self, name)}: a share from 0 to 1.")

    def size_shares(self) -> NDArray[np.float64]:
        """Share of households of 1 … `largest` people [largest]."""
        shares, last = self.sizes / self.sizes.sum(), self.sizes.size
        if last >= self.largest or last < 3 or shares[-2] == 0:
            return np.asarray(shares, dtype=np.float64)
        ratio = min(shares[-2] / shares[-3], 0.9) if shares[-3] > 0 else 0.5
        tail = ratio ** np.arange(self.largest - last + 1)
        return np.concatenate([shares[:-1], shares[-1] * tail / tail.sum()])


@dataclass(frozen=True, eq=False)
class Synthesis:
    """Synthetic people, sorted by household.

    Attributes:
        age: years [agents].
        sex: 0 or 1, the columns of the margins [agents].
        household: number of the household, ascending from 0 [agents].
    """

    age: NDArray[np.int8]
    sex: NDArray[np.int8]
    household: NDArray[np.int32]


def synthesise(margins: Margins, agents: int, stream: Stream) -> Synthesis:
    """Make people and households.

    Args:
        margins: what is known.
        agents: how many people to make; households are scaled down with them.
        stream: where what is drawn comes from.

    Returns:
        People whose age by sex counts are the margins' to the nearest whole number, and whose household sizes follow
        theirs up to one household that takes the rest.

    Raises:
        InputError: for fewer than one agent.
    """
    if agents < 1:
        raise InputError(f"The number of agents is {agents}: a whole number from 1.")
    age, sex = _people(margins, agents, stream)
    size = _sizes(margins, agents, stream)
    first = np.concatenate([[0], np.cumsum(size)[:-1]])
    household = np.repeat(np.arange(size.size, dtype=np.int32), size)
    rank = np.arange(agents, dtype=np.int64) - first[household]

    child = _child_slots(margins, size, household, rank, int(np.count_nonzero(age < ADULT)), stream)
    children = np.bincount(household[child], minlength=size.size)
    slot_of = _adults(margins, age, size, first, child, children > 0, stream)
    _children(age, household, first, child, slot_of, stream)
    return Synthesis(age[slot_of], sex[slot_of], household)


def _people(margins: Margins, agents: int, stream: Stream) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Ages and sexes in random order, exact in every band."""
    count = apportion(agents, margins.people)
    ends = [*margins.ages[1:], OLDEST + 1]
    age, sex = np.empty(agents, dtype=np.int8), np.empty(agents, dtype=np.int8)
    at = 0
    for b, (low, end) in enumerate(zip(margins.ages, ends, strict=True)):
        for s in (0, 1):
            k = int(count[b, s])
            # Evenly over the band's years; the open one thins out by a sixth a year, about what life tables say.
            u = (np.arange(k) + 0.5) / max(k, 1)
            if b < len(margins.ages) - 1:
                years = low + np.floor(u * (end - low))
            else:
                years = np.minimum(low + np.floor(-np.log1p(-u) / 0.18), OLDEST)
            age[at : at + k], sex[at : at + k] = years, s
            at += k
    order = stream.order(agents)
    return age[order], sex[order]


def _sizes(margins: Margins, agents: int, stream: Stream) -> NDArray[np.int64]:
    """People of each household, in random order; they add up to `agents`."""
    shares = margins.size_shares()
    persons = np.arange(1, shares.size + 1)
    households = int(agents // (shares @ persons))
    while households > 0 and int(apportion(households, shares) @ persons) > agents:
        households -= 1
    count = apportion(households, shares)
    size = np.repeat(persons, count)
    rest = agents - int(size.sum())
    extra = np.diff(np.append(np.arange(0, rest, shares.size), rest))
    size = np.concatenate([size, extra]) if rest else size
    return size[stream.order(size.size)]


def _child_slots(
    margins: Margins,
    size: NDArray[np.int64],
    household: NDArray[np.int32],
    rank: NDArray[np.int64],
    total: int,
    stream: Stream,
) -> NDArray[np.bool_]:
    """Which places in households are children's: one in each that has any, the others by chance."""
    child = np.zeros(household.size, dtype=bool)
    eligible = np.flatnonzero(size > 1)
    wanted = min(round(margins.with_children * size.size), eligible.size, total)
    chosen = eligible[stream.choose(_CHILD_ODDS[np.minimum(size[eligible], 5)], wanted)]
    has = np.zeros(size.size, dtype=bool)
    has[chosen] = True
    child[has[household] & (rank == 1)] = True
    # A child takes the place of a possible partner only where there is no other left for it.
    keys = stream.uniform(household.size)
    keys += (rank == 2) & (stream.uniform(household.size) < _PARTNER_SHARE)
    keys[~has[household]] += 4.0
    keys[(rank == 0) | child] = np.inf
    more = min(total - int(child.sum()), int(np.count_nonzero(np.isfinite(keys))))
    if more > 0:
        child[np.argpartition(keys, more - 1)[:more]] = True
    return child


def _adults(
    margins: Margins,
    age: NDArray[np.int8],
    size: NDArray[np.int64],
    first: NDArray[np.int64],
    child: NDArray[np.bool_],
    has_child: NDArray[np.bool_],
    stream: Stream,
) -> NDArray[np.int64]:
    """Who (position in `age`) takes each adult place; children's places are left for later."""
    slot_of = np.full(age.size, -1, dtype=np.int64)
    free = age >= ADULT
    # In a crowd of children some may have to head a household; in real margins this never happens.
    head_short = max(int(np.count_nonzero(~child)) - int(np.count_nonzero(free)), 0)
    if head_short:
        free[np.flatnonzero(~free)[np.argsort(-age[~free], kind="stable")[:head_short]]] = True

    def take(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        pool = np.flatnonzero(free)
        picked = pool[stream.choose(weights[pool], count)]
        free[picked] = False
        return picked

    def seat(places: NDArray[np.int64], who: NDArray[np.int64]) -> None:
        slot_of[places] = who[stream.order(who.size)]

    old = age >= 65
    alone = first[size == 1]
    wanted_old = min(round(margins.alone_old * alone.size), int(np.count_nonzero(free & old)))
    seat(alone[:wanted_old], take(old.astype(np.float64), wanted_old))
    seat(alone[wanted_old:], take((~old).astype(np.float64), alone.size - wanted_old))

    # The second adult of a household, if it has one, sits at the first place after the householder that is no child's.
    second = _second_adult(size, first, child)
    parents, childless = first[has_child], first[(size > 1) & ~has_child]
    partner_of = np.full(age.size, -1, dtype=np.int64)
    partner_of[first] = second
    with_second = parents[partner_of[parents] >= 0]
    couples = with_second[stream.uniform(with_second.size) < _PARTNER_SHARE]
    more = round(margins.couples * size.size) - couples.size
    pairs = childless[stream.choose(np.ones(childless.size), min(max(more, 0), childless.size))]

    band = np.searchsorted(_PARENT_AGES, age, side="right") - 1
    parental = np.where(free, _PARENT_WEIGHTS[np.maximum(band, 0)], 0.0)
    everyone = np.where(age < 22, 0.2, 1.0)
    single_parents = np.setdiff1d(parents, couples, assume_unique=True)
    for places, weights in ((couples, parental), (pairs, everyone)):
        who = take(weights, 2 * places.size)
        who = who[np.argsort(age[who] + stream.bell(who.size, 3.0), kind="stable")]
        swap = stream.uniform(places.size) < 0.5
        one, other = np.where(swap, who[1::2], who[::2]), np.where(swap, who[::2], who[1::2])
        order = stream.order(places.size)
        slot_of[places], slot_of[partner_of[places]] = one[order], other[order]
    seat(single_parents, take(parental, single_parents.size))
    others = np.setdiff1d(childless, pairs, assume_unique=True)
    seat(others, take(everyone, others.size))
    left = np.flatnonzero(~child & (slot_of < 0))
    seat(left, take(np.ones(age.size), left.size))
    return slot_of


def _second_adult(size: NDArray[np.int64], first: NDArray[np.int64], child: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place of the first adult after the householder, -1 where there is none [households]."""
    second = np.full(size.size, -1, dtype=np.int64)
    for k in range(int(size.max(initial=1)) - 1, 0, -1):
        has = np.flatnonzero(size > k)
        has = has[~child[first[has] + k]]
        second[has] = first[has] + k
    return second


def _children(
    age: NDArray[np.int8],
    household: NDArray[np.int32],
    first: NDArray[np.int64],
    child: NDArray[np.bool_],
    slot_of: NDArray[np.int64],
    stream: Stream,
) -> None:
    """Seat the children: the ranks of their ages follow those of their householders'."""
    places = np.flatnonzero(child)
    seated = np.zeros(age.size, dtype=bool)
    seated[slot_of[slot_of >= 0]] = True
    who = np.flatnonzero(~seated)
    who = who[np.argsort(age[who], kind="stable")]
    parent = age[slot_of[first[household[places]]]].astype(np.float64)
    target = np.clip(parent - _PARENT_GAP + stream.bell(places.size, 4.0), 0.0, parent - 16.0)
    slot_of[places[np.argsort(target, kind="stable")]] = who


def place(classes: NDArray[np.int64], shares: NDArray[np.float64], stream: Stream) -> NDArray[np.int64]:
    """Send people to zones in fixed numbers.

    Args:
        classes: of each person, from 0; rounding runs on from one class to the next [people].
        shares: of each zone; the largest takes what rounding leaves [zones].
        stream: decides who goes where, not how many.

    Returns:
        Zone of each person [people]. Any run of neighbouring classes sends at least ⌊expected⌋ people to each zone
        but the largest.
    """
    shares = np.asarray(shares, dtype=np.float64) / np.sum(shares)
    home = int(np.argmax(shares))
    counts = np.bincount(classes, minlength=1)
    sent = np.diff(np.rint(np.cumsum(np.append(0, counts))[:, None] * shares[None, :]), axis=0).astype(np.int64)
    sent[:, home] = 0
    for row, count in zip(sent, counts, strict=True):  # a class of a handful of people may be called for too often
        while row.sum() > count:
            row[np.argmax(row)] -= 1
    sent[:, home] = counts - sent.sum(axis=1)
    order = stream.order_within(classes)
    zone = np.empty(classes.size, dtype=np.int64)
    zone[order] = np.repeat(np.tile(np.arange(shares.size), counts.size), sent.ravel())
    return zone


def divide(label: NDArray[np.int64], size: int, stream: Stream) -> NDArray[np.int64]:
    """Divide the people of each label into small groups of nearly equal size, at random.

    Args:
        label: kind of each person (a stratum, a year of school); -1 for those in no group [people].
        size: people in a group, about.
        stream: decides who is with whom.

    Returns:
        Group of each person, from 0; -1 for those in none [people].
    """
    order = stream.order_within(label)
    sorted_label = label[order]
    group = np.full(label.size, -1, dtype=np.int64)
    outside = int(np.searchsorted(sorted_label, 0))
    present, begin, count = np.unique(sorted_label[outside:], return_index=True, return_counts=True)
    parts = np.maximum(np.rint(count / size).astype(np.int64), 1)
    kind = np.repeat(np.arange(present.size), count)
    rank = np.arange(label.size - outside) - begin[kind]
    group[order[outside:]] = (np.cumsum(parts) - parts)[kind] + rank * parts[kind] // count[kind]
    return group

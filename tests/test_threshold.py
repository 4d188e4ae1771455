"""Threshold openings: exact against plain arithmetic, and a cell that is withheld is told to nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpm.errors import InputError, LpmError, RoundRefused, SessionRefused
from lpm.privacy import composition, crypten_engine
from lpm.privacy.dealer import MOST_WORDS, Deal, deal, read_dealt, request
from lpm.privacy.memory_channel import MemoryHub, in_memory_sums
from lpm.privacy.secure_sum import Flags, Opening, Round, SecureSum

AGREED = Flags(digest=b"environment")
CELLS = Round(0, 0, "cells", 0, bytes(32))
FALSE_ALARM = 1e-7


def gate(
    words: NDArray[np.int64], people: NDArray[np.int64], flags: Sequence[Flags] | None = None
) -> tuple[list, MemoryHub]:
    """Each party's result, or what it raised: contributions [parties, cells, words], people [parties, cells]."""
    hub, sums = in_memory_sums(len(words), thresholds=("cells",))
    said = flags or [AGREED] * len(words)

    def one(place: int) -> Any:
        try:
            return sums[place].open_if_enough(
                CELLS, words[place], people[place], said[place], fewest_people=10, fewest_institutions=3
            )
        except LpmError as problem:
            return problem

    with ThreadPoolExecutor(len(words)) as pool:
        return list(pool.map(one, range(len(words)))), hub


@pytest.mark.parametrize("parties", [3, 5])
def test_cells_are_opened_exactly_if_enough_stand_behind_them(parties: int) -> None:
    generator = np.random.default_rng(parties)
    words = generator.integers(-(2**63), 2**63 - 1, (parties, 24, 2), dtype=np.int64, endpoint=True)
    people = generator.integers(0, 9, (parties, 24))
    # At the edge: 9, 10 and 11 people of three parties; thousands, but of two parties; nobody.
    people[:, :5] = 0
    people[:3, 0], people[:3, 1], people[:3, 2], people[:2, 3] = [3, 3, 3], [3, 3, 4], [1, 9, 1], [5000, 5000]
    enough = (people.sum(axis=0) >= 10) & ((people > 0).sum(axis=0) >= 3)
    assert enough[:5].tolist() == [False, True, True, False, False] and 5 < enough.sum() < 24
    total = words.view(np.uint64).sum(axis=0, dtype=np.uint64).view(np.int64)
    for opened, which in gate(words, people)[0]:
        assert which.dtype == bool and (which == enough).all()
        assert opened.dtype == np.int64 and (opened == np.where(enough[:, None], total, 0)).all()


class Ear:
    """Hears every word that is opened to a party on the way, and what the dealer dealt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[NDArray[np.uint64]] = []
        self.dealt: list[tuple[Deal, int, list[bytes]]] = []
        whole = crypten_engine._Scope.all_reduce

        def all_reduce(scope: Any, share: Any, op: Any = None, batched: bool = False) -> Any:
            total = whole(scope, share, op, batched)
            if not batched and scope.keys.me == 0:
                self.opened.append(total.numpy().view(np.uint64).ravel().copy())
            return total

        def made(data: bytes, parties: int) -> list[bytes]:
            shares = deal(data, parties)
            what, count = Deal(data[0]), int.from_bytes(data[1:5], "little")
            self.dealt.append((what, count, shares))
            return shares

        monkeypatch.setattr(crypten_engine._Scope, "all_reduce", all_reduce)
        monkeypatch.setattr(composition, "deal", made)


def small(secret: int, cells: int = 1500) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells with one person each, whose word is the secret."""
    words = np.zeros((3, cells, 1), dtype=np.int64)
    words[1] = secret
    people = np.zeros((3, cells), dtype=np.int64)
    people[1] = 1
    return words, people


@pytest.mark.parametrize("secret", [0, 7, 2**40 + 1])
def test_what_a_party_sees_of_a_withheld_cell_does_not_depend_on_it(
    monkeypatch: pytest.MonkeyPatch, secret: int
) -> None:
    ear = Ear(monkeypatch)
    results, _ = gate(*small(secret))
    assert all(not which.any() and not opened.any() for opened, which in results)
    first, *on_the_way, last = ear.opened
    assert first.size == 0  # flags alone
    assert not last.any()  # the gate and the gated sums: zeros
    assert len(on_the_way) > 10
    for opened in on_the_way:
        # Equal secrets in 1,500 cells: were one not masked, its word would come again and again.
        bits = (opened[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        width = 64 if (opened > 1).any() else 1  # the last step hides a single bit
        ones = bits[:, :width].sum(axis=0)
        spread = ((ones - 0.5 * len(opened)) ** 2 / (0.25 * len(opened))).sum()
        assert spread < stats.chi2.isf(FALSE_ALARM, width)
        if width == 64:
            assert np.unique(opened).size == opened.size
            low = np.bincount((opened & np.uint64(15)).astype(np.int64), minlength=16)
            assert stats.chisquare(low).pvalue > FALSE_ALARM


def test_what_the_coordinator_sees_does_not_depend_on_a_withheld_cell() -> None:
    seen = []
    for secret in (7, 2**40 + 1):
        _, hub = gate(*small(secret, 3))
        assert not hub.totals
        seen.append(
            sorted(
                (party, header.round.tensor, header.opening, header.rescale, tuple(map(len, bodies)))
                for (party, header), (_, bodies) in zip(hub.headers, hub.bodies, strict=True)
            )
        )
        asked = {
            bytes(bodies[0])
            for (_, header), (_, bodies) in zip(hub.headers, hub.bodies, strict=True)
            if header.opening == Opening.DEALT
        }
        assert all(len(each) == 5 for each in asked)  # kind and number: nothing of a party's
    assert seen[0] == seen[1]


def test_the_label_is_true_the_coordinator_with_one_party_could_read_a_withheld_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ear = Ear(monkeypatch)
    gate(*small(31337, 4))
    products = [(count, shares) for what, count, shares in ear.dealt if what == Deal.PRODUCT]
    (count, shares), opened = products[-1], ear.opened[-2]  # gate − a and sum − b
    factor = sum(read_dealt(Deal.PRODUCT, count, share)[1].view(np.uint64) for share in shares)
    assert (opened[count:] + factor == 31337).all()


def test_any_shares_but_all_are_random() -> None:
    for what in Deal:
        shares = deal(request(what, 4000), 4)
        parts = [read_dealt(what, 4000, share) for share in shares]
        for k in range(len(parts[0])):
            words = [part[k].view(np.uint64) for part in parts]
            for left_out in range(4):
                some = [word for place, word in enumerate(words) if place != left_out]
                by_bits = what == Deal.CONJUNCTION or (what == Deal.BIT and k == 1)
                mixed = some[0] ^ some[1] ^ some[2] if by_bits else some[0] + some[1] + some[2]
                low = np.bincount((mixed & np.uint64(15)).astype(np.int64), minlength=16)
                assert stats.chisquare(low).pvalue > FALSE_ALARM
        whole = [np.bitwise_xor.reduce([p[k] for p in parts]) for k in range(len(parts[0]))]
        added = [np.sum([p[k].view(np.uint64) for p in parts], axis=0, dtype=np.uint64) for k in range(len(parts[0]))]
        if what == Deal.PRODUCT:
            assert (added[0] * added[1] == added[2]).all()
        elif what == Deal.CONJUNCTION:
            assert (whole[0] & whole[1] == whole[2]).all()
        else:
            assert (added[0] == whole[1].view(np.uint64)).all() and set(added[0].tolist()) == {0, 1}


def test_one_party_calls_it_off_for_all_before_anything_is_shared() -> None:
    for flags, wanted in ((replace(AGREED, rescale=True), "scale"), (Flags(b"another"), "environments")):
        results, hub = gate(*small(5, 3), flags=[AGREED, flags, AGREED])
        assert all(isinstance(each, RoundRefused) and wanted in str(each) for each in results), results
        assert {header.round.tensor for _, header in hub.headers} == {"cells"}


def test_cells_that_the_manifest_does_not_list_and_other_engines_are_refused() -> None:
    ask: Callable[[SecureSum], object] = lambda engine: engine.open_if_enough(  # noqa: E731
        CELLS,
        np.zeros((2, 1), dtype=np.int64),
        np.zeros(2, dtype=np.int64),
        AGREED,
        fewest_people=10,
        fewest_institutions=3,
    )
    with pytest.raises(InputError, match="manifest does not list"):
        ask(in_memory_sums(3)[1][0])
    with pytest.raises(InputError, match="--sharing crypten"):
        ask(in_memory_sums(3, "masked")[1][0])
    with pytest.raises(InputError, match="cells × words"):
        in_memory_sums(3, thresholds=("cells",))[1][0].open_if_enough(
            CELLS,
            np.zeros(2, dtype=np.int64),
            np.zeros(2, dtype=np.int64),
            AGREED,
            fewest_people=1,
            fewest_institutions=1,
        )


@pytest.mark.parametrize("data", [b"", b"\x07\x01\x00\x00\x00", b"\x01\x00", request(Deal.PRODUCT, MOST_WORDS + 1)])
def test_a_request_that_can_not_be_is_refused(data: bytes) -> None:
    with pytest.raises(SessionRefused, match="dealer"):
        deal(data, 3)
    with pytest.raises(SessionRefused, match="The dealer sent"):
        read_dealt(Deal.BIT, 2, b"short")

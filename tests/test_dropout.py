"""Rounds that lose parties at every message: the right survivors' sum or a clean abort, never a wrong one or a hang."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lpm.errors import LpmError, PeerLost, RoundRefused
from lpm.privacy import make_engine
from lpm.privacy.dropout import dropouts_tolerated, threshold
from lpm.privacy.memory_channel import MemoryHub, in_memory_sums, session_keys, witnesses
from lpm.privacy.recovery import Step
from lpm.privacy.secure_sum import Flags, Header, Round, SecureSum, Stage
from tests.dropout_harness import MESSAGES, Droppable, total


def _words(parties: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(parties).integers(0, 2**64, (parties, count), dtype=np.uint64)


def test_thresholds() -> None:
    assert [(threshold(n), dropouts_tolerated(n)) for n in (3, 4, 5, 7, 42, 50, 100)] == [
        (3, 0), (3, 1), (4, 1), (5, 2), (29, 13), (34, 16), (67, 33),
    ]  # fmt: skip


def _expected(parties: int, lost: dict[int, int]) -> tuple[int, ...] | None:
    """Whose sum is opened, from who sent what; None where nothing may be."""
    needed = threshold(parties)

    def sent(stage: Stage) -> set[int]:
        return {p for p in range(parties) if lost.get(p, len(MESSAGES)) > MESSAGES.index((stage, "up"))}

    survivors, revealed = sent(Stage.CONTRIBUTION), sent(Stage.REVEAL)
    if len(survivors) < needed or len(revealed) < needed:
        return None
    # A second loss during recovery: a mask between two that are both gone is known to nobody.
    if len(survivors) < parties and survivors != revealed:
        return None
    return tuple(sorted(survivors))


def _lose_everywhere(parties: int, how_many: Sequence[int], *, at_once: bool) -> Counter[str]:
    keys, words = session_keys(parties), _words(parties)
    outcomes: Counter[str] = Counter()
    for size in how_many:
        for places in itertools.combinations(range(parties), size):
            for points in itertools.product(range(len(MESSAGES)), repeat=size):
                lost = dict(zip(places, points, strict=True))
                end = Droppable(keys, words, lost, at_once).run()
                expected = _expected(parties, lost)
                if expected is None:
                    assert end.composed is None and end.lost, lost
                    assert set(end.lost) <= set(places)
                    outcomes["aborted"] += 1
                else:
                    assert end.composed is not None and end.composed.refusal is None, lost
                    assert end.composed.survivors == expected
                    assert end.composed.total is not None
                    assert (end.composed.total == total(words, expected)).all(), lost
                    outcomes["all" if len(expected) == parties else "survivors"] += 1
    return outcomes


@pytest.mark.parametrize("at_once", [True, False], ids=["noticed", "by deadline"])
def test_any_n_minus_t_of_five_lost_at_every_message(at_once: bool) -> None:
    assert _lose_everywhere(5, [0, 1], at_once=at_once) == {"all": 1 + 5 * 5, "survivors": 5 * 3}


@pytest.mark.parametrize("at_once", [True, False], ids=["noticed", "by deadline"])
def test_any_n_minus_t_of_seven_lost_at_every_message(at_once: bool) -> None:
    """Every pair of parties, each lost at each of the eight messages: 1,344 pairs of losses, and all single ones."""
    found = _lose_everywhere(7, [1, 2], at_once=at_once)
    # Two lost before they contribute: 3 × 3 ways; one of them before, one after and before its shares: 2 × 3 × 4 abort.
    assert found == {"all": 7 * 5 + 21 * 25, "survivors": 7 * 3 + 21 * (9 + 2 * 3 * 1), "aborted": 21 * 2 * 3 * 4}


@pytest.mark.parametrize("point", [1, 2], ids=["before it got shares", "before it contributed"])
def test_who_is_lost_while_another_is_waited_for_is_left_out_too(point: int) -> None:
    """All ordered pairs of seven: the second has contributed, and is gone before anybody is told who survives."""
    keys, words = session_keys(7), _words(7)
    for first, second in itertools.permutations(range(7), 2):
        run = Droppable(keys, words, {first: point}, at_once=False)
        expire = run.hub.expire

        def also_gone(
            round: Round, stage: Stage, run: Droppable = run, expire: Any = expire, second: int = second
        ) -> list[Step]:
            assert (second, stage) in run.sent
            return [*run.hub.lose(second), *expire(round, stage)]

        run.hub.expire = also_gone  # type: ignore[method-assign]
        end = run.run()
        survivors = tuple(sorted({*range(7)} - {first, second}))
        assert end.composed is not None and end.composed.survivors == survivors
        assert end.composed.total is not None and (end.composed.total == total(words, survivors)).all()


def test_more_losses_than_tolerated_end_in_a_clean_abort() -> None:
    # Of two: one left out, and the other gone after all its messages; or all in, and one of them gone after all.
    found = _lose_everywhere(5, [2], at_once=True)
    assert found == {"survivors": 10 * 2 * 3, "all": 10 * 9, "aborted": 10 * (64 - 6 - 9)}
    assert _lose_everywhere(3, [1, 2], at_once=False)["survivors"] == 0


def test_three_parties_tolerate_no_loss_before_they_have_answered() -> None:
    for point, message in enumerate(MESSAGES):
        end = Droppable(session_keys(3), _words(3), {1: point}).run()
        opened = end.composed is not None
        assert opened == (message == (Stage.REVEAL, "down"))


def _threads(sums: Sequence[SecureSum], act: Any) -> list[Any]:
    def safely(place: int) -> Any:
        try:
            return act(place, sums[place])
        except LpmError as problem:
            return problem

    with ThreadPoolExecutor(len(sums)) as pool:
        return list(pool.map(safely, range(len(sums))))


class _LosesAnswers(MemoryHub):
    """The answer to some parties gets lost, and with it they."""

    def __init__(self, parties: int, lost: Sequence[int]) -> None:
        super().__init__(parties)
        self._without = lost

    def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Any:
        composed = super().answer(party, header, bodies)
        if party in self._without:
            raise PeerLost("coordinator", "its answer never came")
        return composed


@pytest.mark.parametrize("parties", [5, 7])
@pytest.mark.parametrize("opening", ["open_to_parties", "open_to_coordinator"])
def test_rounds_that_need_everybody_pause_and_resume_to_the_right_bits(parties: int, opening: str) -> None:
    words = _words(parties).view(np.int64)
    everybody = total(words.view(np.uint64), range(parties))
    round = Round(0, 4, "city", 0, bytes(32))
    flags = Flags(b"environment")

    def session(lost: Sequence[int], message: str) -> tuple[MemoryHub, list[Any]]:
        hub = _LosesAnswers(parties, lost if message == "down" else ())
        sums = [make_engine("masked", k, c) for k, c in zip(session_keys(parties), hub.channels(), strict=True)]

        def act(place: int, own: SecureSum) -> Any:
            if message == "up" and place in lost:
                hub.fail(PeerLost(f"party {place}", "its connection broke"))
                raise PeerLost(f"party {place}", "killed")
            return getattr(own, opening)(round, words[place], flags)

        return hub, _threads(sums, act)

    for lost in itertools.combinations(range(parties), dropouts_tolerated(parties)):
        for message in ("up", "down"):
            hub, results = session(lost, message)
            for place, result in enumerate(results):
                if message == "up" or place in lost:
                    assert isinstance(result, PeerLost)
                elif opening == "open_to_parties":
                    assert (result == everybody).all()  # opened by who is left: the same sum as later
            assert not hub.totals or (hub.totals[round] == everybody).all()
            assert message == "down" or not hub.totals
            # Resumed: a new session, new keys, the same step and inputs.
            hub, results = session((), "")
            if opening == "open_to_parties":
                assert all((result == everybody).all() for result in results)
            else:
                assert results == [None] * parties and (hub.totals[round] == everybody).all()


def test_a_real_session_loses_a_party_and_opens_two_sums_without_it() -> None:
    """The engines in threads, real signatures: gone after its first message, and for good."""
    words = _words(5).view(np.int64)
    hub, sums = in_memory_sums(5, "masked", ["loss", "gradient"])
    rounds = [Round(0, 0, name, 0, bytes(32)) for name in ("loss", "gradient")]
    channel = hub.channels()[3]
    converse = hub.converse

    def gone(party: int, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        if party == 3 and stage == Stage.CONTRIBUTION:
            hub.lose(3)
            raise PeerLost("party 3", "killed")
        return converse(party, header, stage, parts)

    hub.converse = gone  # type: ignore[method-assign]

    def act(place: int, own: SecureSum) -> None:
        for round in rounds:
            own.open_to_coordinator(round, words[place], Flags(b"environment"))

    results = _threads(sums, act)
    assert [isinstance(each, PeerLost) for each in results] == [False, False, False, True, False], results
    for round in rounds:
        assert hub.survivors[round] == (0, 1, 2, 4)
        assert (hub.totals[round] == total(words.view(np.uint64), (0, 1, 2, 4))).all()
    assert channel.parties == 5


def test_flags_travel_with_every_message_and_nobody_opens() -> None:
    keys, words = session_keys(5), _words(5)
    for stage in Stage:
        run = Droppable(keys, words, witnesses=witnesses(5))
        honest = run.headers[2]

        def raise_a_flag(
            place: int, now: Stage, parts: list[bytes], run: Any = run, raised: Stage = stage, honest: Any = honest
        ) -> list[bytes]:
            if place != 2 or now != raised:
                return parts
            run.headers[2] = replace(honest, abort="a driver is missing")
            return []

        run.change_up = raise_a_flag
        end = run.run()
        assert end.composed is not None and end.composed.total is None
        assert isinstance(end.composed.refusal, RoundRefused) and end.composed.refusal.abort == "a driver is missing"
        assert set(end.answers) == {0, 1, 2, 3, 4}  # everybody is told

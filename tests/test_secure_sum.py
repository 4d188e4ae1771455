"""The contract of a secure sum, held to both engines: exact sums, or nothing is opened and everybody knows why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpm.errors import InputError, LpmError, PeerLost, RoundRefused, SessionRefused
from lpm.privacy import ENGINES, make_engine, require_engine
from lpm.privacy.composition import Composed, RoundComposer
from lpm.privacy.memory_channel import MemoryHub, in_memory_sums, session_keys
from lpm.privacy.secure_sum import Flags, Header, Parcel, Round, SecureSum

_AGREED = Flags(digest=b"environment")
_DROPPABLE: dict[str, tuple[str, ...]] = {"crypten": (), "masked": ("loss",)}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _round(step: int = 0, tensor: str = "city", attempt: int = 0, trajectory: int = 0) -> Round:
    return Round(trajectory, step, tensor, attempt, bytes(32))


def _all(sums: Sequence[SecureSum], act: Callable[[int, SecureSum], Any]) -> list[Any]:
    """Each party's result, or what it raised."""

    def safely(place: int) -> Any:
        try:
            return act(place, sums[place])
        except LpmError as problem:
            return problem

    with ThreadPoolExecutor(len(sums)) as pool:
        return list(pool.map(safely, range(len(sums))))


@pytest.mark.parametrize("parties", [3, 5])
def test_sums_are_exact_to_the_bit(engine: str, parties: int) -> None:
    hub, sums = in_memory_sums(parties, engine, _DROPPABLE[engine])
    generator = np.random.default_rng(1)
    words = generator.integers(-(2**63), 2**63 - 1, (parties, 4, 25), dtype=np.int64, endpoint=True)
    words[:, 0, :7] = 0
    words[0, 0, :7] = [2**62, -(2**62), -1, 2**40 + 1, -(2**40) - 1, -(2**63), 2**63 - 1]
    expected = words.view(np.uint64).sum(axis=0, dtype=np.uint64).view(np.int64)
    before = words.copy()
    for opened in _all(sums, lambda i, s: s.open_to_parties(_round(0), words[i], _AGREED)):
        assert opened.dtype == np.int64 and (opened == expected).all()
    assert _all(sums, lambda i, s: s.open_to_coordinator(_round(1), words[i], _AGREED)) == [None] * parties
    assert (hub.totals[_round(1)] == expected.reshape(-1)).all()
    loss = _round(2, "loss")
    assert _all(sums, lambda i, s: s.open_to_coordinator(loss, words[i], _AGREED)) == [None] * parties
    assert (hub.totals[loss] == expected.reshape(-1)).all()
    assert (words == before).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (3, 2)])
def test_any_shape(engine: str, shape: tuple[int, ...]) -> None:
    _, sums = in_memory_sums(3, engine)
    for opened in _all(sums, lambda i, s: s.open_to_parties(_round(), np.full(shape, -i - 1), _AGREED)):
        assert opened.shape == shape and (opened == -6).all()


def test_openings_pipeline_in_any_order(engine: str) -> None:
    _, sums = in_memory_sums(3, engine)

    def several(place: int, own: SecureSum) -> list[int]:
        steps = list(range(8)) if place else list(range(7, -1, -1))
        with ThreadPoolExecutor(8) as pool:
            opened = dict(
                zip(
                    steps,
                    pool.map(lambda t: own.open_to_parties(_round(t), np.array([t * 10**place]), _AGREED), steps),
                    strict=True,
                )
            )
        return [int(opened[step][0]) for step in range(8)]

    assert _all(sums, several) == [[111 * step for step in range(8)]] * 3


@pytest.mark.parametrize(
    ("opening", "tensor"),
    [("open_to_parties", "city"), ("open_to_coordinator", "outputs"), ("open_to_coordinator", "loss")],
)
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (Flags(b"environment", rescale=True), (True, False, "")),
        (Flags(b"environment", abort="a driver is missing"), (False, False, "a driver is missing")),
        (Flags(b"another environment"), (False, True, "")),
    ],
)
def test_one_party_calls_a_round_off_for_all(
    engine: str, opening: str, tensor: str, flags: Flags, wanted: tuple[bool, bool, str]
) -> None:
    hub, sums = in_memory_sums(3, engine, _DROPPABLE[engine])
    said = [_AGREED, flags, _AGREED]
    refusals = _all(sums, lambda i, s: getattr(s, opening)(_round(0, tensor), np.array([i]), said[i]))
    assert all(isinstance(each, RoundRefused) for each in refusals)
    assert [(each.rescale, each.diverged, each.abort) for each in refusals] == [wanted] * 3
    assert not hub.totals
    if flags.raised:  # nothing that could be opened ever left that party
        assert [bodies for party, bodies in hub.bodies if party == 1] == [()]
    again = _all(sums, lambda i, s: s.open_to_parties(_round(0, tensor, attempt=1), np.array([i]), _AGREED))
    assert [int(each[0]) for each in again] == [3, 3, 3]


def test_different_lengths_open_nothing(engine: str) -> None:
    _, sums = in_memory_sums(3, engine)
    refusals = _all(sums, lambda i, s: s.open_to_parties(_round(), np.zeros(2 + (i == 2), dtype=np.int64), _AGREED))
    assert all(isinstance(each, RoundRefused) and "length" in each.abort for each in refusals)


def test_a_context_is_never_used_twice(engine: str) -> None:
    _, sums = in_memory_sums(3, engine)
    _all(sums, lambda i, s: s.open_to_parties(_round(), np.array([i]), _AGREED))
    for opening in ("open_to_parties", "open_to_coordinator"):
        for refused in _all(sums, lambda i, s: getattr(s, opening)(_round(), np.array([i + 1]), _AGREED)):  # noqa: B023
            assert isinstance(refused, SessionRefused) and "never used twice" in str(refused)


def test_other_parameters_open_nothing(engine: str) -> None:
    hub, sums = in_memory_sums(3, engine)
    rounds = [replace(_round(), parameters=bytes(31) + bytes((i == 2,))) for i in range(3)]
    hub._deadline = 0.2
    lost = _all(sums, lambda i, s: s.open_to_parties(rounds[i], np.array([i]), _AGREED))
    assert all(isinstance(each, PeerLost) for each in lost)


def test_a_lost_party_frees_all_who_wait(engine: str) -> None:
    hub, sums = in_memory_sums(3, engine)

    def act(place: int, own: SecureSum) -> NDArray[np.int64] | None:
        if place == 2:
            hub.fail(PeerLost("queens", "its connection broke"))
            return None
        return own.open_to_parties(_round(), np.array([place]), _AGREED)

    assert [getattr(each, "party", None) for each in _all(sums, act)] == ["queens", "queens", None]


def test_fewer_than_three_parties_are_refused(engine: str) -> None:
    with pytest.raises(InputError, match="at least 3"):
        in_memory_sums(2, engine)


def test_only_words_are_added(engine: str) -> None:
    _, sums = in_memory_sums(3, engine)
    with pytest.raises(InputError, match="int64"):
        sums[0].open_to_parties(_round(), np.array([0.5]), _AGREED)  # type: ignore[arg-type]


def test_unknown_engine_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"'ring'.*crypten, masked"):
        require_engine("ring")
    with pytest.raises(InputError, match="crypten"):
        make_engine("ring", session_keys(3)[0], MemoryHub(3).channels()[0])


class _Meddler(MemoryHub):
    """A relay that changes what it passes on to party 0."""

    def __init__(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        super().__init__(3)
        self._change = change

    def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
        composed = super().answer(party, header, bodies)
        if party or composed.refusal is not None:
            return composed
        if composed.masked:
            return replace(composed, masked=b"".join(self._change([composed.masked])))
        mine = composed.parcels[0]
        changed = self._change([bytes(parcel.body) for parcel in mine])
        parcels = [Parcel(parcel.sequence, body) for parcel, body in zip(mine, changed, strict=False)]
        return replace(composed, parcels=[parcels, *composed.parcels[1:]])


def _flip(body: bytes, place: int, bit: int = 1) -> bytes:
    changed = bytearray(body)
    changed[place] ^= bit
    return bytes(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda bodies: [_flip(bodies[0], 0), *bodies[1:]],
        lambda bodies: [_flip(bodies[0], -1, 128), *bodies[1:]],
        lambda bodies: [_flip(bodies[0], 7), *bodies[1:]],
        lambda bodies: [bodies[0][:-8], *bodies[1:]],
        lambda bodies: [bodies[0][8:16] + bodies[0][:8] + bodies[0][16:], *bodies[1:]],
        lambda bodies: [bytes(len(bodies[0])), *bodies[1:]],
        lambda bodies: [b"", *bodies[1:]],
        lambda bodies: [],
    ],
    ids=["altered", "last bit", "top byte", "truncated", "swapped", "zeros", "empty", "nothing"],
)
def test_a_relay_that_changes_a_sum_is_noticed(engine: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
    hub = _Meddler(change)
    sums = [make_engine(engine, k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    results = _all(sums, lambda i, s: s.open_to_parties(_round(), np.array([i, 5]), _AGREED))
    assert isinstance(results[0], SessionRefused)
    assert results[1].tolist() == results[2].tolist() == [3, 15]


def test_a_sum_of_an_earlier_round_is_noticed(engine: str) -> None:
    earlier: list[list[bytes]] = []

    def replay(bodies: list[bytes]) -> list[bytes]:
        earlier.append(bodies)
        return earlier[0]

    hub = _Meddler(replay)
    sums = [make_engine(engine, k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    first = _all(sums, lambda i, s: s.open_to_parties(_round(0), np.array([i]), _AGREED))
    assert [int(each[0]) for each in first] == [3, 3, 3]
    assert isinstance(_all(sums, lambda i, s: s.open_to_parties(_round(1), np.array([i]), _AGREED))[0], SessionRefused)


def test_answers_to_two_rounds_can_not_be_exchanged(engine: str) -> None:
    """The relay answers step 0 with step 1's sum and the other way round, to everybody."""

    class Exchange(MemoryHub):
        def __init__(self) -> None:
            super().__init__(3)
            self.kept: dict[int, list[Composed]] = {}

        def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
            return self.kept.setdefault(party, [super().answer(party, header, bodies)])[0]

    hub = Exchange()
    sums = [make_engine(engine, k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    _all(sums, lambda i, s: s.open_to_parties(_round(0), np.array([i]), _AGREED))
    second = _all(sums, lambda i, s: s.open_to_parties(_round(1), np.array([i]), _AGREED))
    assert all(isinstance(each, SessionRefused) for each in second)


@pytest.mark.parametrize("what", ["environment", "parameters"])
def test_a_relay_that_hides_that_parties_differ_is_noticed(engine: str, what: str) -> None:
    """It gave one party another θ, or hides that an environment diverged, and adds up all the same."""

    class Blind(RoundComposer):
        def add(self, party: int, header: Header, bodies: Sequence[bytes | memoryview]) -> Composed | None:
            round = replace(header.round, parameters=bytes(32))
            composed = super().add(party, replace(header, digest=bytes(32), round=round), bodies)
            return composed

    class Liar(MemoryHub):
        def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
            return super().answer(party, replace(header, round=replace(header.round, parameters=bytes(32))), bodies)

    hub = Liar(3)
    hub._composer = Blind(3)
    sums = [make_engine(engine, k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    differs = what == "parameters"
    rounds = [replace(_round(), parameters=bytes(31) + bytes((differs and i == 2,))) for i in range(3)]
    flags = [Flags(b"another" if not differs and i == 2 else b"environment") for i in range(3)]
    results = _all(sums, lambda i, s: s.open_to_parties(rounds[i], np.array([i, 7]), flags[i]))
    assert isinstance(results[2], SessionRefused)
    if engine == "masked":  # what does not cancel opens to nobody; a sealed copy opens where nothing differs
        assert all(isinstance(each, SessionRefused) for each in results)


def test_a_repeated_step_has_the_same_inputs() -> None:
    """The relay withholds the answer from one party, which would repeat the step with other words.

    (Across sessions, and for both engines, the party's log of rounds holds it: test_round_log.py.)
    """

    class Withholds(MemoryHub):
        def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
            composed = super().answer(party, header, bodies)
            if party == 0 and header.round.attempt == 0:
                raise PeerLost("party 2", "so the relay says")
            return composed

    hub = Withholds(3)
    sums = [make_engine("masked", k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    first = _all(sums, lambda i, s: s.open_to_parties(_round(), np.array([i]), _AGREED))
    assert isinstance(first[0], PeerLost) and int(first[1][0]) == 3
    again = _round(attempt=1)
    with pytest.raises(SessionRefused, match="other words"):
        sums[0].open_to_parties(again, np.array([8]), _AGREED)
    same = _all(sums, lambda i, s: s.open_to_parties(again, np.array([i]), _AGREED))
    assert [int(each[0]) for each in same] == [3, 3, 3]


def test_what_the_coordinator_adds_up_is_uniform(engine: str) -> None:
    """Chi-square over the bytes it sees and, where it adds up, of the sum; false alarms in 1 of 10,000 runs of all."""
    hub, sums = in_memory_sums(3, engine)
    seen: list[bytes] = []
    answer = hub.answer

    def listen(party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
        composed = answer(party, header, bodies)
        if party == 0 and composed.masked:
            seen.append(composed.masked)
        return composed

    hub.answer = listen  # type: ignore[method-assign]
    _all(sums, lambda i, s: s.open_to_parties(_round(), np.full(20_000, 3, dtype=np.int64), _AGREED))
    seen += [bytes(body) for _, bodies in hub.bodies for body in bodies]
    assert len(seen) == (4 if engine == "masked" else 6)
    for each in seen:
        counts = np.bincount(np.frombuffer(each, dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4 / 10

"""The crypten engine against plain addition, and against parties and observers that cheat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpm.errors import LpmError, SessionRefused
from lpm.privacy import make_engine
from lpm.privacy.composition import RoundComposer
from lpm.privacy.crypten_engine import CrypTenSum, _load, load_crypten
from lpm.privacy.masks import pair_mask
from lpm.privacy.memory_channel import MemoryHub, in_memory_sums, session_keys
from lpm.privacy.sealing import Kind, SealedRounds, SequenceWindow, SessionKeys
from lpm.privacy.secure_sum import Flags, Header, Opening, Parcel, Round, SecureSum

_AGREED = Flags(digest=b"environment")


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


def test_missing_crypten_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crypten.communicator", None)
    with pytest.raises(LpmError, match=r"lpm\[mpc\]"):
        _load.__wrapped__()


def test_crypten_shares_nothing_outside_a_round() -> None:
    tensor = load_crypten()
    with pytest.raises(LpmError, match="outside a round"):
        tensor.PRZS((3,))
    with pytest.raises(LpmError, match="outside a round"):
        tensor(np.array([1]).tolist())


def test_nothing_secret_has_a_repr() -> None:
    keys = session_keys(3)[0]
    texts = repr(keys) + repr(CrypTenSum(keys, MemoryHub(3).channels()[0])) + repr(Parcel(0, b"sealed-bytes"))
    assert "sealed-bytes" not in texts
    for secret in [*keys.pair_secrets.values(), keys._group, keys._own]:
        assert repr(secret)[2:10] not in texts and secret.hex() not in texts
    with pytest.raises(TypeError):
        import copy

        copy.copy(keys)


# What the relay does to messages it should only pass on.


class _Meddler(MemoryHub):
    """A relay that changes what it passes on to party 0."""

    def __init__(self, parties: int, change: Callable[[list[Parcel]], list[Parcel]]) -> None:
        super().__init__(parties)
        self._change = change

    def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Any:
        composed = super().answer(party, header, bodies)
        if party == 0 and composed.parcels:
            parcels = [list(each) for each in composed.parcels]
            parcels[0] = self._change(parcels[0])
            return replace(composed, parcels=parcels)
        return composed


def _flip(parcel: Parcel, place: int) -> Parcel:
    body = bytearray(parcel.body)
    body[place] ^= 1
    return Parcel(parcel.sequence, bytes(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda parcels: [_flip(parcels[0], 0), parcels[1]],
        lambda parcels: [_flip(parcels[0], -1), parcels[1]],
        lambda parcels: [parcels[1], parcels[0]],
        lambda parcels: [parcels[0], parcels[0]],
        lambda parcels: [Parcel(parcels[0].sequence + 1, parcels[0].body), parcels[1]],
        lambda parcels: [Parcel(parcels[0].sequence, bytes(parcels[0].body)[:-8]), parcels[1]],
        lambda parcels: parcels[:1],
        lambda parcels: [*parcels, parcels[0]],
    ],
    ids=["altered", "tag", "swapped", "doubled", "renumbered", "truncated", "dropped", "added"],
)
def test_a_meddling_relay_is_noticed(change: Callable[[list[Parcel]], list[Parcel]]) -> None:
    hub = _Meddler(3, change)
    sums = [make_engine("crypten", k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    results = _all(sums, lambda i, s: s.open_to_parties(_round(), np.array([i]), _AGREED))
    assert isinstance(results[0], SessionRefused)
    assert int(results[1][0]) == int(results[2][0]) == 3


def test_a_replayed_message_is_noticed() -> None:
    earlier: list[Parcel] = []

    def replay(parcels: list[Parcel]) -> list[Parcel]:
        earlier.extend(parcels)
        return earlier[:2]

    hub = _Meddler(3, replay)
    sums = [make_engine("crypten", k, c) for k, c in zip(session_keys(3), hub.channels(), strict=True)]
    first = _all(sums, lambda i, s: s.open_to_parties(_round(0), np.array([i]), _AGREED))
    assert [int(each[0]) for each in first] == [3, 3, 3]
    second = _all(sums, lambda i, s: s.open_to_parties(_round(1), np.array([i]), _AGREED))
    assert isinstance(second[0], SessionRefused)


def test_a_relay_that_hides_a_diverged_environment_is_noticed() -> None:
    class Blind(RoundComposer):
        def add(self, party: int, header: Header, bodies: Sequence[bytes | memoryview]) -> Any:
            return super().add(party, replace(header, digest=bytes(32)), bodies)

    hub, sums = in_memory_sums(3)
    hub._composer = Blind(3)
    digests = [b"environment", b"environment", b"another"]
    results = _all(sums, lambda i, s: s.open_to_parties(_round(), np.array([i]), Flags(digests[i])))
    assert all(isinstance(each, SessionRefused) for each in results)


def test_messages_of_another_session_do_not_open() -> None:
    one, other = session_keys(3, bytes(32)), session_keys(3, bytes(31) + b"\x01")
    sealed = one[0].seal(1, Kind.SHARE, 0, b"round", b"share")
    assert one[1].open(0, Kind.SHARE, 0, b"round", sealed) == b"share"
    moved = [(other[1], Kind.SHARE, b"round"), (one[1], Kind.GROUP_KEY, b"round"), (one[1], Kind.SHARE, b"r")]
    for reader, kind, about in moved:
        with pytest.raises(SessionRefused):
            reader.open(0, kind, 0, about, sealed)


def test_sequence_window() -> None:
    window = SequenceWindow()
    assert [window.admit(n) for n in (0, 0, 5, 3, 3, 5, 1000, 5, 999, 744, 745, 745)] == [
        True, False, True, True, False, False, True, False, True, False, True, False,
    ]  # fmt: skip


# What the coordinator and colluding parties can learn.


def _view(keys: list[SessionKeys], contributions: NDArray[np.int64], round: Round) -> NDArray[np.uint64]:
    """[parties, words] masked shares, as they reach the coordinator."""
    hub = MemoryHub(len(keys))
    sums = [make_engine("crypten", k, c) for k, c in zip(keys, hub.channels(), strict=True)]
    _all(sums, lambda i, s: s.open_to_coordinator(round, contributions[i], _AGREED))
    shares = {party: np.frombuffer(bodies[0], dtype="<u8") for party, bodies in hub.bodies}
    return np.stack([shares[i] for i in range(len(keys))])


def _residuals(keys: list[SessionKeys], view: NDArray[np.uint64], context: bytes) -> NDArray[np.uint64]:
    """[2, words] what parties 2.. and the coordinator are left with of parties 0 and 1 when they remove their masks."""
    left = view[:2].copy()
    for honest in (0, 1):
        for colluder in range(2, len(keys)):
            # A later party's mask is added by the earlier one.
            left[honest] -= pair_mask(keys[colluder].pair_secrets[honest], context, view.shape[1])
    return left


def _context(keys: SessionKeys, round: Round) -> bytes:
    return SealedRounds(keys, MemoryHub(keys.parties).channels()[0]).context(round) + b"\x00add" + bytes(4)


def test_colluders_are_left_with_one_mask_and_no_more() -> None:
    keys = session_keys(5)
    contributions = np.random.default_rng(2).integers(-(2**40), 2**40, (5, 50))
    left = _residuals(keys, _view(keys, contributions, _round()), _context(keys[0], _round()))
    mask = pair_mask(keys[0].pair_secrets[1], _context(keys[0], _round()), 50)
    assert (left[0] == contributions[0].view(np.uint64) + mask).all()
    assert (left[1] == contributions[1].view(np.uint64) - mask).all()
    assert (left.sum(axis=0, dtype=np.uint64).view(np.int64) == contributions[:2].sum(axis=0)).all()
    # Any other split of the same sum is explained equally well by one other mask.
    for shift in (1, -(2**33), 2**62):
        other = (mask.view(np.int64) - shift).view(np.uint64)
        assert (left[0] == (contributions[0] + shift).view(np.uint64) + other).all()
        assert (left[1] == (contributions[1] - shift).view(np.uint64) - other).all()


def test_what_colluders_are_left_with_is_uniform() -> None:
    """Chi-square on bytes and lowest bits of two very uneven splits; false alarms in 1 of 10,000 runs of all four."""
    level = 1e-4 / 4
    for split in ([0, 7], [2**50, 7 - 2**50]):
        keys = session_keys(3)
        contributions = np.repeat(np.array([*split, 1], dtype=np.int64)[:, None], 40_000, axis=1)
        left = _residuals(keys, _view(keys, contributions, _round()), _context(keys[0], _round()))[0]
        counts = np.bincount(left.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > level
        bits = np.array([((left >> np.uint64(b)) & np.uint64(1)).sum() for b in range(64)])
        assert stats.chi2.sf((4 * (bits - 20_000.0) ** 2 / 40_000).sum(), 64) > level


def test_two_splits_can_not_be_told_apart() -> None:
    """A distinguisher sees one split of the same sum or the other; its guesses are at chance (level 1e-4)."""
    generator = np.random.default_rng(3)
    right, games = 0, 200
    for game in range(games):
        secret = int(generator.integers(2))
        low, high = 5, 2**45
        mine = [low, high] if secret else [high, low]
        keys = session_keys(3)
        view = _view(keys, np.array([[mine[0]], [mine[1]], [9]]), _round(game))
        left = _residuals(keys, view, _context(keys[0], _round(game))).view(np.int64)
        right += int(left[0, 0] < left[1, 0]) == secret
    assert stats.binomtest(right, games).pvalue > 1e-4


def test_the_coordinator_can_not_check_a_guess_of_the_environment() -> None:
    hub, sums = in_memory_sums(3)
    for step in range(2):
        _all(sums, lambda i, s: s.open_to_parties(_round(step), np.array([i]), _AGREED))  # noqa: B023
    digests = {header.round.step: header.digest for _, header in hub.headers}
    assert len({(header.round.step, header.digest) for _, header in hub.headers}) == 2
    assert digests[0] != digests[1]
    # The same guess under every key the coordinator could make up is something else.
    strangers = session_keys(3)
    assert strangers[0].keyed_digest(_round(0), b"environment") != digests[0]


def test_openings_to_parties_pass_the_coordinator_sealed() -> None:
    hub, sums = in_memory_sums(3)
    words = np.arange(1, 60, dtype=np.int64) * 0x0101_0101_0101
    _all(sums, lambda i, s: s.open_to_parties(_round(), words * (i + 1), _AGREED))
    bodies = [body for _, bundle in hub.bodies for body in bundle]
    assert len(bodies) == 6 and len(set(bodies)) == 6
    # Adding up what it saw, in the only way that could cancel masks, gives no total.
    sums_seen = [
        sum(np.frombuffer(bundle[c][:472], dtype="<u8") for (_, bundle), c in zip(hub.bodies, choice, strict=True))
        for choice in np.ndindex(2, 2, 2)
    ]
    assert all((seen != (words * 6).view(np.uint64)).all() for seen in sums_seen)


def test_header_openings_must_agree() -> None:
    composer = RoundComposer(3)
    composer.add(0, Header(_round(), Opening.PARTIES, 0, bytes(32)), [b"a", b"b"])
    with pytest.raises(SessionRefused, match="somebody else"):
        composer.add(1, Header(_round(), Opening.COORDINATOR, 0, bytes(32)), [b"a"])
    with pytest.raises(SessionRefused, match="twice"):
        composer.add(0, Header(_round(), Opening.PARTIES, 1, bytes(32)), [b"a", b"b"])
    with pytest.raises(SessionRefused, match="parts"):
        composer.add(2, Header(_round(), Opening.PARTIES, 0, bytes(32)), [b"a"])
    with pytest.raises(SessionRefused, match="under way"):
        for step in range(1, 100):
            composer.add(0, Header(_round(step), Opening.PARTIES, step, bytes(32)), [b"a", b"b"])

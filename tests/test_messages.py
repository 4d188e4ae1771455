"""Messages: every kind there and back, and nothing else is one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lpm.errors import InputError, RoundRefused, SessionRefused
from lpm.privacy.secure_sum import Header, Opening, Parcel, Round
from lpm.protocol.manifest import Entry, Manifest, Terms
from lpm.protocol.messages import (
    Bundle,
    Done,
    Hello,
    Leave,
    Lost,
    Message,
    Offer,
    Parts,
    Ready,
    Refused,
    Release,
    Reply,
    Share,
    Signature,
    Signatures,
    Task,
    TaskMessage,
    Welcome,
    decode,
)

_ROUND = Round(3, -4, "city", 2, bytes(range(32)))
_TASK = Task("evaluate", 7, np.array([[0.5, -1e300], [np.pi, 0.0]]), "fd", 11, {"steps": 3, "name": "ä"})
_MESSAGES: list[Message] = [
    Welcome(bytes(16)),
    Hello("bronx", b"certificate", bytes(32), "ab" * 32, bytes(64)),
    Offer(b"manifest", b"certificate", bytes(64)),
    Signature(bytes(64)),
    Signatures((bytes(64), b"\x01" * 64)),
    Bundle((b"one", b"", b"three")),
    Parts((b"one", b"two")),
    Ready(),
    TaskMessage(5, _TASK),
    TaskMessage(6, Task("simulate", 2**64 - 1, np.zeros((0, 0)))),
    Done(5),
    Done(5, Release("bands", {"median": np.arange(6.0).reshape(2, 3), "level": np.array(0.5)}, {"unit": "1"})),
    Share(Header(_ROUND, Opening.PARTIES, 9, bytes(32)), [b"abc", b"def"]),
    Share(Header(_ROUND, Opening.COORDINATOR, 9, bytes(32), True, "a driver is missing"), []),
    Reply(_ROUND, [Parcel(1, b"sealed"), Parcel(2**63, b"")]),
    Reply(_ROUND, (), RoundRefused(rescale=True, diverged=True, abort="why")),
    Lost("queens", "its connection broke"),
    Refused("no"),
    Leave("it stopped"),
]
_IDS = [f"{type(each).__name__}-{place}" for place, each in enumerate(_MESSAGES)]


@pytest.mark.parametrize("message", _MESSAGES, ids=_IDS)
def test_there_and_back(message: Message) -> None:
    frame = message.encode()
    again = decode(frame)
    assert type(again) is type(message)
    assert again.encode() == frame


def test_a_task_comes_back_whole() -> None:
    again = decode(TaskMessage(5, _TASK).encode())
    assert isinstance(again, TaskMessage)
    task = again.task
    assert (task.kind, task.trajectory, task.gradient, task.seed) == ("evaluate", 7, "fd", 11)
    assert (task.theta == _TASK.theta).all() and task.options == _TASK.options
    assert task.digest == _TASK.digest
    others = [
        Task("simulate", 7, _TASK.theta, "fd", 11, _TASK.options),
        Task("evaluate", 8, _TASK.theta, "fd", 11, _TASK.options),
        Task("evaluate", 7, np.nextafter(_TASK.theta, 1), "fd", 11, _TASK.options),
        Task("evaluate", 7, _TASK.theta.reshape(1, 4), "fd", 11, _TASK.options),
        Task("evaluate", 7, _TASK.theta, "tangent", 11, _TASK.options),
        Task("evaluate", 7, _TASK.theta, "fd", None, _TASK.options),
        Task("evaluate", 7, _TASK.theta, "fd", 11, {}),
    ]
    assert len({task.digest for task in [*others, _TASK]}) == 8


def test_a_release_comes_back_whole() -> None:
    again = decode(_MESSAGES[11].encode())
    assert isinstance(again, Done) and again.release is not None
    assert (again.release.tables["median"] == np.arange(6.0).reshape(2, 3)).all()
    assert again.release.tables["level"].shape == () and again.release.about == {"unit": "1"}


@pytest.mark.parametrize("message", _MESSAGES, ids=_IDS)
def test_too_short_too_long_and_altered_frames(message: Message) -> None:
    frame = message.encode()
    for cut in range(len(frame)):
        with pytest.raises(SessionRefused):
            decode(frame[:cut])
    with pytest.raises(SessionRefused):
        decode(frame + b"\x00")
    for place in range(min(len(frame), 200)):
        for change in (1, 0x80, 0xFF):
            altered = bytearray(frame)
            altered[place] ^= change
            try:
                decode(bytes(altered))
            except SessionRefused:
                continue


def test_noise_is_refused_and_never_crashes() -> None:
    generator = random.Random(4)
    for _ in range(20_000):
        kind, length = generator.randrange(17), generator.randrange(200)
        frame = generator.randbytes(length)
        if generator.random() < 0.9:
            frame = bytes((1, kind)) + frame
        try:
            decode(frame)
        except SessionRefused:
            continue


def test_other_versions_and_kinds_are_named() -> None:
    with pytest.raises(SessionRefused, match="version 2"):
        decode(b"\x02\x08")
    with pytest.raises(SessionRefused, match="kind 99"):
        decode(b"\x01\x63")


def test_impossible_tasks_are_refused() -> None:
    for bad in (
        {"kind": "delete"},
        {"theta": np.array([1.0])},
        {"theta": np.array([[np.nan]])},
        {"trajectory": -1},
        {"seed": 2**64},
        {"options": {"x": object()}},
        {"options": {"x": float("nan")}},
    ):
        with pytest.raises(InputError):
            Task(**({"kind": "simulate", "trajectory": 0, "theta": np.zeros((1, 1))} | bad))  # type: ignore[arg-type]
    frame = TaskMessage(0, Task("simulate", 0, np.array([[1.5]]))).encode()
    finite, infinite = np.array([1.5]).tobytes(), np.array([np.inf]).tobytes()
    assert finite in frame
    with pytest.raises(SessionRefused, match="finite"):
        decode(frame.replace(finite, infinite))


def test_impossible_rounds_are_refused() -> None:
    for bad in (("", 0, bytes(32)), ("x" * 65, 0, bytes(32)), ("city", -1, bytes(32)), ("city", 0, bytes(31))):
        with pytest.raises(InputError):
            Round(0, 0, bad[0], bad[1], bad[2])


def test_a_round_s_context_is_its_own() -> None:
    rounds = [Round(t, s, x, a, p) for t in (0, 1) for s in (0, -1) for x in ("a", "ab") for a in (0, 1)
              for p in (bytes(32), b"\x01" * 32)]  # fmt: skip
    assert len({each.context() for each in rounds}) == len(rounds)


def test_long_texts_are_cut_between_characters() -> None:
    again = decode(Refused("ä" * 2000).encode())
    assert isinstance(again, Refused) and again.reason == "ä" * 500


_MANIFEST = Manifest(
    bytes(16),
    (Entry("bronx", b"certificate", bytes(32), bytes(64)), Entry("queens", b"other", b"\x01" * 32, bytes(64))),
    Terms("nyc", "ab" * 32, bounds={"city": 1.0, "w": 2}, exponents={"loss": 20}, outputs=("deaths",), weaker=("ä",)),
)


def test_a_manifest_comes_back_whole() -> None:
    again = Manifest.decode(_MANIFEST.encode())
    assert again == _MANIFEST and again.digest == _MANIFEST.digest
    assert again.parties == ("bronx", "queens")


def test_every_field_of_a_manifest_changes_its_digest() -> None:
    data = _MANIFEST.encode()
    digests = set()
    for old, new in (
        (b'"deaths"', b'"births"'), (b'"city":1.0', b'"city":1.5'), (b'"loss":20', b'"loss":21'),
        (b'"crypten"', b'"plain__"'), (b'"bronx"', b'"broNx"'), (b'"session":"00', b'"session":"01'),
        (b'"fraction_bits":32', b'"fraction_bits":31'),
    ):  # fmt: skip
        assert old in data
        digests.add(Manifest.decode(data.replace(old, new, 1)).digest)
    assert len(digests | {_MANIFEST.digest}) == 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version":1', b'"version":2'),
        (b'"version":1', b'"version": 1'),
        (b'"fraction_bits":32', b'"fraction_bits":"32"'),
        (b'"fraction_bits":32', b'"fraction_bits":true'),
        (b'"city":1.0', b'"city":NaN'),
        (b'"loss":20', b'"loss":20.5'),
        (b'"outputs":["deaths"]', b'"outputs":"deaths"'),
        (b'"steps":0', b'"steps":0,"policy":1'),
        (b'"steps":0,', b""),
        (b'"scenario":"nyc"', b'"scenario":"nyc","scenario":"nyc"'),
        (b'"party":"bronx"', b'"party":1'),
        (b"{", b"["),
        (b"{", b"[" * 100_000 + b"{"),
    ],
)
def test_manifests_are_read_strictly(old: bytes, new: bytes) -> None:
    data = _MANIFEST.encode()
    assert old in data
    with pytest.raises(SessionRefused, match="manifest"):
        Manifest.decode(data.replace(old, new, 1))


def _release(shape: tuple[int, ...], about: bytes = b"{}") -> bytes:
    lengths = b"".join(size.to_bytes(4, "little") for size in shape)
    table = b"\x01\x00\x00\x00n" + bytes((len(shape),)) + lengths
    about = len(about).to_bytes(4, "little") + about
    return bytes((1, 10)) + bytes(8) + b"\x01" + bytes(4) + about + b"\x01\x00\x00\x00" + table


@pytest.mark.parametrize("shape", [(2**32 - 1, 2**32 - 1, 2**32 - 1, 0), (0, 2**32 - 1), (2**31, 0)])
def test_an_empty_table_can_not_claim_rows_without_end(shape: tuple[int, ...]) -> None:
    with pytest.raises(SessionRefused, match="too large"):
        decode(_release(shape))
    assert decode(_release((0, 3))).release.tables["n"].shape == (0, 3)  # type: ignore[attr-defined]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(SessionRefused, match="not JSON"):
        decode(_release((0,), b'{"a":"\\ud800"}'))


@pytest.mark.parametrize(("draws", "parameters"), [(2**32 - 1, 0), (1, 0), (0, 7)])
def test_a_task_has_parameters_for_its_draws(draws: int, parameters: int) -> None:
    head = bytes((1, 9)) + bytes(8) + bytes((0,)) + bytes(8)
    frame = head + draws.to_bytes(4, "little") + parameters.to_bytes(4, "little") + bytes(5) + b"\x02\x00\x00\x00{}"
    with pytest.raises(SessionRefused, match="parameters"):
        decode(frame)

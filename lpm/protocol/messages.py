"""Messages and their bytes: a version, a kind, and fields of bounded size, read strictly and never evaluated.

Whatever a stranger sends either is exactly one of these messages or is refused with `SessionRefused`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, RoundRefused, SessionRefused
from lpm.privacy.secure_sum import Header, Opening, Parcel, Round, Stage
from lpm.protocol.manifest import MANIFEST_LIMIT

__all__ = [
    "FRAME_LIMIT",
    "KINDS",
    "Bundle",
    "Done",
    "Hello",
    "Leave",
    "Lost",
    "Message",
    "Offer",
    "Parts",
    "Ready",
    "Refused",
    "Release",
    "Reply",
    "Share",
    "Signature",
    "Signatures",
    "StageMessage",
    "StageReply",
    "Task",
    "TaskMessage",
    "Welcome",
    "decode",
]

FRAME_LIMIT = 256 << 20
"""Most bytes of a message."""

KINDS = ("simulate", "evaluate", "predict", "finish")
"""What a coordinator may ask for."""

_VERSION = 1
_TEXT_LIMIT = 1000
_CERTIFICATE_LIMIT = 16 << 10
_OPTIONS_LIMIT = 64 << 10
_PARTY_LIMIT = 1000
_RELEASE_LIMIT = 64 << 20
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ROUND = struct.Struct("<QqI32s")
_DIMENSIONS = 4


class _Reader:
    """Takes fields off a frame, and refuses one that ends early, runs on, or breaks a bound."""

    def __init__(self, frame: bytes | memoryview) -> None:
        self._left = memoryview(frame)

    def take(self, count: int) -> memoryview:
        if count > len(self._left):
            raise SessionRefused("A message ends before its fields do.")
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def number(self, size: int, limit: int | None = None) -> int:
        value = int.from_bytes(self.take(size), "little")
        if limit is not None and value > limit:
            raise SessionRefused(f"A message holds the number {value} where at most {limit} is allowed.")
        return value

    def fixed(self, count: int) -> bytes:
        return bytes(self.take(count))

    def blob(self, limit: int) -> memoryview:
        return self.take(self.number(4, limit))

    def text(self, limit: int = _TEXT_LIMIT) -> str:
        try:
            text = str(self.blob(limit), "utf-8")
        except UnicodeDecodeError:
            raise SessionRefused("A message holds a text that is not UTF-8.") from None
        if _CONTROL.search(text):  # it may be shown on a terminal, or stand in a log line by line
            raise SessionRefused("A message holds a text with control characters.")
        return text

    def blobs(self, limit: int = FRAME_LIMIT) -> tuple[memoryview, ...]:
        return tuple(self.blob(limit) for _ in range(self.number(4, _PARTY_LIMIT)))

    def end(self) -> None:
        if len(self._left):
            raise SessionRefused(f"A message has {len(self._left)} bytes too many.")


def _blob(data: bytes | memoryview) -> bytes:
    return len(data).to_bytes(4, "little") + data


def _text(text: str, limit: int = _TEXT_LIMIT) -> bytes:
    data = _CONTROL.sub(" ", text).encode(errors="replace")
    return _blob(data if len(data) <= limit else data[:limit].decode(errors="ignore").encode())


def _pieces(blobs: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = [len(blobs).to_bytes(4, "little")]
    for blob in blobs:
        pieces += [len(blob).to_bytes(4, "little"), blob]
    return pieces


def _flag(reader: _Reader) -> bool:
    return bool(reader.number(1, 1))


@dataclass(frozen=True)
class Message:
    """Any message; its class says what it is."""

    kind: ClassVar[int]

    def encode(self) -> bytes:
        """The frame."""
        return b"".join([bytes((_VERSION, self.kind)), *self._fields()])

    def _fields(self) -> Sequence[bytes | memoryview]:
        return ()

    @classmethod
    def _read(cls, reader: _Reader) -> Message:
        return cls()


@dataclass(frozen=True)
class Welcome(Message):
    """Coordinator to a party that connected: the session's 16 random bytes."""

    kind = 1
    session: bytes

    def _fields(self) -> Sequence[bytes]:
        return [self.session]

    @classmethod
    def _read(cls, reader: _Reader) -> Welcome:
        return cls(reader.fixed(16))


@dataclass(frozen=True)
class Hello(Message):
    """A party's name, identity, key of this session, scenario, and its signature over them."""

    kind = 2
    party: str
    certificate: bytes
    ephemeral: bytes
    scenario_hash: str
    signature: bytes

    def _fields(self) -> Sequence[bytes]:
        texts = [_text(self.party), _text(self.scenario_hash)]
        return [*texts, _blob(self.certificate), self.ephemeral, self.signature]

    @classmethod
    def _read(cls, reader: _Reader) -> Hello:
        party, scenario_hash = reader.text(), reader.text()
        certificate = bytes(reader.blob(_CERTIFICATE_LIMIT))
        return cls(party, certificate, reader.fixed(32), scenario_hash, reader.fixed(64))


@dataclass(frozen=True)
class Offer(Message):
    """The manifest, with the coordinator's identity and signature."""

    kind = 3
    manifest: bytes
    certificate: bytes
    signature: bytes

    def _fields(self) -> Sequence[bytes]:
        return [_blob(self.manifest), _blob(self.certificate), self.signature]

    @classmethod
    def _read(cls, reader: _Reader) -> Offer:
        manifest, certificate = bytes(reader.blob(MANIFEST_LIMIT)), bytes(reader.blob(_CERTIFICATE_LIMIT))
        return cls(manifest, certificate, reader.fixed(64))


@dataclass(frozen=True)
class Signature(Message):
    """A party's signature on the manifest."""

    kind = 4
    signature: bytes

    def _fields(self) -> Sequence[bytes]:
        return [self.signature]

    @classmethod
    def _read(cls, reader: _Reader) -> Signature:
        return cls(reader.fixed(64))


@dataclass(frozen=True)
class Signatures(Message):
    """Everybody's signatures on the manifest, in roster order."""

    kind = 5
    signatures: tuple[bytes, ...]

    def _fields(self) -> Sequence[bytes]:
        return [len(self.signatures).to_bytes(4, "little"), *self.signatures]

    @classmethod
    def _read(cls, reader: _Reader) -> Signatures:
        return cls(tuple(reader.fixed(64) for _ in range(reader.number(4, _PARTY_LIMIT))))


@dataclass(frozen=True, repr=False)
class Bundle(Message):
    """Sealed parts of the group's key from one party to all others, in roster order."""

    kind = 6
    parts: tuple[bytes, ...]

    def _fields(self) -> Sequence[bytes | memoryview]:
        return _pieces(self.parts)

    @classmethod
    def _read(cls, reader: _Reader) -> Bundle:
        return cls(tuple(map(bytes, reader.blobs(_TEXT_LIMIT))))


@dataclass(frozen=True, repr=False)
class Parts(Bundle):
    """The sealed parts of all others for one party, in roster order."""

    kind = 7


@dataclass(frozen=True)
class Ready(Message):
    """A party has verified everything and waits for tasks."""

    kind = 8


@dataclass(frozen=True, eq=False)
class Task:
    """What the coordinator asks all parties to do, each with its own people.

    Args:
        kind: one of `KINDS`.
        trajectory: its number in the session.
        theta: [K, P] parameters, one row a draw.
        gradient: the estimator ("none": no gradient).
        seed: the public seed of a test of bit-identity; None: each party's own secret seed.
        options: further settings, plain JSON values.

    Raises:
        InputError: for a value that does not fit.
    """

    kind: str
    trajectory: int
    theta: NDArray[np.float64]
    gradient: str = "none"
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", np.array(self.theta, dtype=np.float64, order="C"))
        if self.kind not in KINDS:
            raise InputError(f"The task kind is {self.kind!r}: one of {', '.join(KINDS)}.")
        if self.theta.ndim != 2 or not np.isfinite(self.theta).all():
            raise InputError(f"A task's parameters have the shape {self.theta.shape}: draws × parameters, all finite.")
        if not 0 <= self.trajectory < 2**64 or (self.seed is not None and not 0 <= self.seed < 2**64):
            raise InputError("A task's trajectory and seed are whole numbers from 0 and below 2^64.")
        try:
            self._options()
        except (TypeError, ValueError):
            raise InputError("A task's options are plain values that JSON can hold.") from None

    def _options(self) -> bytes:
        return json.dumps(self.options, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def encode(self) -> bytes:
        """Canonical bytes."""
        draws, parameters = self.theta.shape
        head = struct.pack("<BQII", KINDS.index(self.kind), self.trajectory, draws, parameters)
        seed = b"\x00" if self.seed is None else b"\x01" + self.seed.to_bytes(8, "little")
        return b"".join([head, self.theta.astype("<f8").tobytes(), _text(self.gradient), seed, _blob(self._options())])

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for the task in the address of each of its rounds (`Round.parameters`)."""
        return hashlib.sha256(b"lpm/task/v1" + self.encode()).digest()

    @classmethod
    def read(cls, reader: _Reader) -> Task:
        """Take a task off a frame.

        Raises:
            SessionRefused: if it is malformed.
        """
        kind = KINDS[reader.number(1, len(KINDS) - 1)]
        trajectory, draws, parameters = reader.number(8), reader.number(4), reader.number(4)
        if (draws == 0) != (parameters == 0):
            raise SessionRefused("The coordinator sent a task with draws of no parameters, or parameters of no draws.")
        theta = np.frombuffer(reader.take(8 * draws * parameters), dtype="<f8").reshape(draws, parameters)
        gradient = reader.text()
        seed = reader.number(8) if _flag(reader) else None
        options = _plain(reader.blob(_OPTIONS_LIMIT))
        try:
            return cls(kind, trajectory, theta, gradient, seed, options)
        except InputError as problem:
            raise SessionRefused(f"The coordinator sent a task that can't be: {problem.message}") from None


def _plain(data: memoryview) -> dict[str, Any]:
    try:
        plain = json.loads(bytes(data))
        json.dumps(plain, ensure_ascii=False).encode()  # refuses halves of surrogate pairs, which no file can hold
    except (ValueError, RecursionError):
        raise SessionRefused("A message's options are not JSON.") from None
    if not isinstance(plain, dict):
        raise SessionRefused("A message's options are not a table.")
    return plain


@dataclass(frozen=True, eq=False)
class Release:
    """What a party shows of its own, by its own consent: it reaches the coordinator in the clear, inside TLS.

    Args:
        label: what it is, for the report.
        tables: name → array of at most four dimensions.
        about: further plain values, such as dates and units.
    """

    label: str
    tables: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Its bytes."""
        pieces = [_text(self.label), _blob(json.dumps(self.about, sort_keys=True, allow_nan=False).encode())]
        pieces.append(len(self.tables).to_bytes(4, "little"))
        for name, table in self.tables.items():
            array = np.asarray(table, dtype=np.float64)
            if array.ndim > _DIMENSIONS:
                raise InputError(f"The released table {name!r} has {array.ndim} dimensions: at most {_DIMENSIONS}.")
            shape = b"".join(size.to_bytes(4, "little") for size in array.shape)
            pieces += [_text(name), bytes((array.ndim,)), shape, array.astype("<f8").tobytes()]
        return b"".join(pieces)

    @classmethod
    def read(cls, reader: _Reader) -> Release:
        """Take a release off a frame.

        Raises:
            SessionRefused: if it is malformed.
        """
        label, about = reader.text(), _plain(reader.blob(_OPTIONS_LIMIT))
        tables: dict[str, NDArray[np.float64]] = {}
        for _ in range(reader.number(4, _PARTY_LIMIT)):
            name = reader.text()
            shape = [reader.number(4) for _ in range(reader.number(1, _DIMENSIONS))]
            size = 8 * math.prod(shape)
            # An empty table could still claim more rows than an array can have.
            if 8 * math.prod(max(length, 1) for length in shape) > _RELEASE_LIMIT or name in tables:
                raise SessionRefused("A release holds a table that is too large, or one twice.")
            tables[name] = np.frombuffer(reader.take(size), dtype="<f8").reshape(shape).astype(np.float64)
        return cls(label, tables, about)


@dataclass(frozen=True)
class TaskMessage(Message):
    """A task and its number in the session, from 0."""

    kind = 9
    number: int
    task: Task

    def _fields(self) -> Sequence[bytes]:
        return [self.number.to_bytes(8, "little"), self.task.encode()]

    @classmethod
    def _read(cls, reader: _Reader) -> TaskMessage:
        return cls(reader.number(8), Task.read(reader))


@dataclass(frozen=True)
class Done(Message):
    """A party has done a task; with what it releases of its own results, if it consents."""

    kind = 10
    number: int
    release: Release | None = None

    def _fields(self) -> Sequence[bytes]:
        release = b"\x00" if self.release is None else b"\x01" + self.release.encode()
        return [self.number.to_bytes(8, "little"), release]

    @classmethod
    def _read(cls, reader: _Reader) -> Done:
        return cls(reader.number(8), Release.read(reader) if _flag(reader) else None)


def _round_bytes(round: Round) -> bytes:
    return _ROUND.pack(round.trajectory, round.step, round.attempt, round.parameters) + _text(round.tensor)


def _read_round(reader: _Reader) -> Round:
    trajectory, step, attempt, parameters = _ROUND.unpack(reader.take(_ROUND.size))
    tensor = reader.text()
    try:
        return Round(trajectory, step, tensor, attempt, parameters)
    except InputError as problem:
        raise SessionRefused(problem.message) from None


@dataclass(frozen=True, repr=False)
class Share(Message):
    """A party's part of a round: a plain header, and sealed copies for the others or one masked share."""

    kind = 11
    header: Header
    bodies: Sequence[bytes | memoryview]

    def _fields(self) -> Sequence[bytes | memoryview]:
        return [*_header_fields(self.header), *_pieces(self.bodies)]

    @classmethod
    def _read(cls, reader: _Reader) -> Share:
        return cls(_read_header(reader), reader.blobs())


def _header_fields(header: Header) -> list[bytes]:
    plain = struct.pack("<QBB32s", header.sequence, header.opening, header.rescale, header.digest)
    return [_round_bytes(header.round), plain, _text(header.abort)]


def _read_header(reader: _Reader) -> Header:
    round, sequence = _read_round(reader), reader.number(8)
    if (opening := reader.number(1, len(Opening))) == 0:
        raise SessionRefused("A message opens a round to nobody.")
    rescale, digest, abort = _flag(reader), reader.fixed(32), reader.text()
    return Header(round, Opening(opening), sequence, digest, rescale, abort)


def _read_stage(reader: _Reader) -> Stage:
    if (stage := reader.number(1, len(Stage))) == 0:
        raise SessionRefused("A message is of no stage of its round.")
    return Stage(stage)


@dataclass(frozen=True, repr=False)
class StageMessage(Message):
    """A party's message of one stage of a round that can lose parties."""

    kind = 20
    header: Header
    stage: Stage
    parts: Sequence[bytes | memoryview]

    def _fields(self) -> Sequence[bytes | memoryview]:
        return [*_header_fields(self.header), bytes((self.stage,)), *_pieces(self.parts)]

    @classmethod
    def _read(cls, reader: _Reader) -> StageMessage:
        return cls(_read_header(reader), _read_stage(reader), reader.blobs())


@dataclass(frozen=True, repr=False)
class StageReply(Message):
    """The coordinator's answer to a stage: its parts, or a refusal."""

    kind = 21
    round: Round
    stage: Stage
    parts: Sequence[bytes | memoryview] = ()
    refusal: RoundRefused | None = None

    def _fields(self) -> Sequence[bytes | memoryview]:
        head = [_round_bytes(self.round), bytes((self.stage,))]
        if self.refusal is not None:
            return [*head, b"\x01", *_refusal_fields(self.refusal)]
        return [*head, b"\x00", *_pieces(self.parts)]

    @classmethod
    def _read(cls, reader: _Reader) -> StageReply:
        round, stage = _read_round(reader), _read_stage(reader)
        if _flag(reader):
            return cls(round, stage, (), _read_refusal(reader))
        return cls(round, stage, reader.blobs())


def _refusal_fields(refusal: RoundRefused) -> list[bytes]:
    return [bytes((refusal.rescale, refusal.diverged)), _text(refusal.abort)]


def _read_refusal(reader: _Reader) -> RoundRefused:
    rescale, diverged = _flag(reader), _flag(reader)
    return RoundRefused(rescale=rescale, diverged=diverged, abort=reader.text())


@dataclass(frozen=True, repr=False)
class Reply(Message):
    """The relay's answer to a round: the others' sealed copies or their masked sum, nothing, or a refusal."""

    kind = 12
    round: Round
    parcels: Sequence[Parcel] = ()
    refusal: RoundRefused | None = None

    def _fields(self) -> Sequence[bytes | memoryview]:
        if self.refusal is not None:
            return [_round_bytes(self.round), b"\x01", *_refusal_fields(self.refusal)]
        pieces: list[bytes | memoryview] = [_round_bytes(self.round), b"\x00", len(self.parcels).to_bytes(4, "little")]
        for parcel in self.parcels:
            pieces += [struct.pack("<QI", parcel.sequence, len(parcel.body)), parcel.body]
        return pieces

    @classmethod
    def _read(cls, reader: _Reader) -> Reply:
        round = _read_round(reader)
        if _flag(reader):
            return cls(round, (), _read_refusal(reader))
        count = reader.number(4, _PARTY_LIMIT)
        return cls(round, tuple(Parcel(reader.number(8), reader.blob(FRAME_LIMIT)) for _ in range(count)))


@dataclass(frozen=True)
class Lost(Message):
    """Coordinator to the survivors: who is lost, and why."""

    kind = 13
    party: str
    reason: str

    def _fields(self) -> Sequence[bytes]:
        return [_text(self.party), _text(self.reason)]

    @classmethod
    def _read(cls, reader: _Reader) -> Lost:
        return cls(reader.text(), reader.text())


@dataclass(frozen=True)
class Refused(Message):
    """Either side ends the session, saying why."""

    kind = 14
    reason: str

    def _fields(self) -> Sequence[bytes]:
        return [_text(self.reason)]

    @classmethod
    def _read(cls, reader: _Reader) -> Refused:
        return cls(reader.text())


@dataclass(frozen=True)
class Leave(Refused):
    """A party stops of its own accord; the run can be resumed."""

    kind = 15


_CLASSES: Mapping[int, type[Message]] = {
    each.kind: each
    for each in (
        Welcome,
        Hello,
        Offer,
        Signature,
        Signatures,
        Bundle,
        Parts,
        Ready,
        TaskMessage,
        Done,
        Share,
        Reply,
        StageMessage,
        StageReply,
        Lost,
        Refused,
        Leave,
    )
}


def decode(frame: bytes | memoryview) -> Message:
    """Read a frame.

    Args:
        frame: the bytes that came.

    Returns:
        The message.

    Raises:
        SessionRefused: if it is not exactly one message of this version.
    """
    if len(frame) > FRAME_LIMIT:
        raise SessionRefused(f"A message has {len(frame)} bytes: at most {FRAME_LIMIT}.")
    reader = _Reader(frame)
    if (version := reader.number(1)) != _VERSION:
        raise SessionRefused(f"A message is of version {version}: this is version {_VERSION}.", "Install the same lpm.")
    kind = reader.number(1)
    if kind not in _CLASSES:
        raise SessionRefused(f"A message is of the unknown kind {kind}.")
    message = _CLASSES[kind]._read(reader)
    reader.end()
    return message

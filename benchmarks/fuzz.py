"""Malformed frames against every protocol state machine, and against a live endpoint over mutual TLS.

    python benchmarks/fuzz.py [--frames 1000000] [--machine NAME] [--live 100000] [--seed 1] [--json FILE]

Frames of an honest session are altered: bits flipped, bytes cut, doubled and moved, lengths and counts replaced by
large ones, kinds and versions changed, two frames joined; others are put together field by field with odd contents;
and, since most of that ends at a signature, messages with altered contents that a dishonest party or coordinator has
*signed*. A machine may take a frame or refuse it by an `LpmError`;
anything else is a crash and is printed with the frame. Told errors are searched for everything secret in the session.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import logging
import math
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lpm.control_stream import Frame, _take_frames
from lpm.errors import LpmError
from lpm.privacy.composition import RoundComposer
from lpm.privacy.dropout import DroppableParty
from lpm.privacy.masked_engine import MaskedSum
from lpm.privacy.memory_channel import witnesses
from lpm.privacy.recovery import DroppableRounds
from lpm.privacy.sealing import SealedRounds, SessionKeys
from lpm.privacy.secure_sum import Channel, Flags, Header, Opening, Parcel, Round, Stage
from lpm.protocol.identity import COORDINATOR, Identity, load_identity, make_local_authority
from lpm.protocol.manifest import Manifest, Terms, hello_message
from lpm.protocol.messages import (
    Done,
    Hello,
    Leave,
    Lost,
    Offer,
    Refused,
    Release,
    Reply,
    Share,
    StageMessage,
    StageReply,
    Task,
    TaskMessage,
    Welcome,
    decode,
)
from lpm.protocol.session import CoordinatorMachine, PartyMachine, Phase

PARTIES = ("bronx", "queens", "kings")
_HASH = "ab" * 32
_TERMS = Terms("a scenario", _HASH, outputs=("deaths",), bounds={"city": 1.0}, exponents={"city": 40})
_MARK = 6_180_339_887_498_948_482
"""A private contribution: no error may tell it."""

_NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 1000, 1001, 65535, 2**31 - 1, 2**31, 2**32 - 1)


# ---- altering


class Mutator:
    """Alters frames; repeated by its seed.

    Args:
        frames: honest ones.
        seed: of all choices.
    """

    def __init__(self, frames: Sequence[bytes], seed: int) -> None:
        self.random = random.Random(seed)
        self._frames = list(frames)

    def pick(self) -> bytes:
        """An honest frame."""
        return self.random.choice(self._frames)

    def of_kind(self, kinds: Sequence[int]) -> bytes | None:
        """Half of the time an honest frame of one of these kinds."""
        found = [frame for frame in self._frames if frame[1] in kinds] if self.random.random() < 0.5 else []
        return self.random.choice(found) if found else None

    def frame(self, base: bytes | None = None) -> bytes:
        """An altered frame: one to three changes of an honest one, noise, or a whole one with odd contents."""
        chance = self.random
        if base is None and chance.random() < 0.15:
            return self.odd()
        data = bytearray(self.pick() if base is None else base)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            self._change(data)
        return bytes(data)

    def _change(self, data: bytearray) -> None:
        chance = self.random
        how = chance.randrange(12)
        size = len(data)
        if how == 0 or size == 0:
            data[:] = chance.randbytes(chance.randrange(80))
        elif how <= 2:
            for _ in range(chance.choice((1, 1, 2, 8))):
                data[chance.randrange(size)] ^= 1 << chance.randrange(8)
        elif how == 3:
            del data[chance.randrange(size) :]
        elif how == 4:
            data += chance.randbytes(chance.randrange(1, 40))
        elif how == 5:
            at = chance.randrange(size)
            data[at : at + 4] = chance.choice(_NUMBERS).to_bytes(4, "little")
        elif how == 6:
            at = chance.randrange(size)
            data[at : at + 8] = (chance.choice(_NUMBERS) * chance.choice((1, 2**31))).to_bytes(8, "little")
        elif how == 7:
            at = chance.randrange(size)
            del data[at : at + chance.randrange(1, 16)]
        elif how == 8:
            at, length = chance.randrange(size), chance.randrange(1, 64)
            data[at:at] = data[at : at + length]
        elif how == 9:
            other = self.pick()
            data[chance.randrange(size) :] = other[chance.randrange(len(other)) :]
        elif how == 10:
            data[min(1, size - 1)] = chance.randrange(256)
        else:
            at = chance.randrange(size)
            data[at] = (data[at] + chance.choice((1, 255))) % 256

    def odd(self) -> bytes:
        """A frame put together field by field, with numbers, shapes and texts that nobody honest would send."""
        chance = self.random

        def number(size: int) -> bytes:
            value = chance.choice(_NUMBERS) if chance.random() < 0.7 else chance.getrandbits(8 * size)
            return (value % 256**size).to_bytes(size, "little")

        def text(*choices: str) -> bytes:
            data = chance.choice((*choices, "", "é", "\x1b[2J", "a\nb", "A" * 1001, "city", "\u2028")).encode()
            return number(4) if chance.random() < 0.05 else len(data).to_bytes(4, "little") + data

        def plain() -> bytes:
            data = json.dumps(self.plain({"steps": 4, "label": "posterior", "deep": {"a": [1, 2]}})).encode()
            data = chance.choice((data, data, b"[" * 9000, b"9" * 5000, b'{"a":1,"a":NaN}', b"\xff", b"null"))
            return len(data).to_bytes(4, "little") + data

        def address() -> bytes:
            return number(8) + number(8) + number(4) + bytes(32) + text("outputs")

        def table() -> bytes:
            shape = [chance.choice(_NUMBERS) for _ in range(chance.randrange(6))]
            size = 8 * math.prod(shape)
            cells = bytes(size) if size < 5000 else bytes(8)
            return text("bands") + bytes((len(shape),)) + b"".join(n.to_bytes(4, "little") for n in shape) + cells

        def task() -> bytes:
            draws, parameters = chance.choice(_NUMBERS), chance.choice(_NUMBERS)
            size = 8 * draws * parameters
            theta = struct.pack("<d", chance.choice((0.5, math.nan, math.inf, 1e308))) * (min(size, 4096) // 8)
            seed = chance.choice((b"\0", b"\1" + number(8), b"\2"))
            head = bytes((chance.randrange(5),)) + number(8)
            return head + struct.pack("<II", draws, parameters) + theta + text("fd") + seed + plain()

        kind = chance.choice((4, 5, 6, 7, 8, 9, 9, 10, 10, 10, 11, 12, 13, 14, 15))
        few = chance.randrange(4)
        bodies = [chance.randbytes(chance.choice((0, 8, 16, 24))) for _ in range(few)]
        pieces = b"".join(len(each).to_bytes(4, "little") + each for each in bodies)
        count = few.to_bytes(4, "little") if chance.random() < 0.8 else number(4)
        body = {
            4: lambda: chance.randbytes(64),
            5: lambda: count + chance.randbytes(64 * few),
            6: lambda: count + pieces,
            7: lambda: count + pieces,
            8: lambda: b"",
            9: lambda: number(8) + task(),
            10: lambda: number(8) + b"\1" + text("fit") + plain() + (1).to_bytes(4, "little") + table(),
            11: lambda: (
                address()
                + number(8)
                + bytes((chance.randrange(4), chance.randrange(3)))
                + bytes(32)
                + text()
                + count
                + pieces
            ),
            12: lambda: (
                address()
                + chance.choice((b"\0" + count + b"".join(number(8) + p for p in [pieces]), b"\1\1\0" + text("no")))
            ),
            13: lambda: text("queens") + text("gone"),
            14: lambda: text("no"),
            15: lambda: text("bye"),
        }[kind]()
        return bytes((1, kind)) + body

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A JSON value with one thing in it changed in kind or size."""
        chance = self.random
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(sorted(value))
            changed = dict(value)
            if chance.random() < 0.1:
                changed[chance.choice(("", "version", "sharing", "\ud800"))] = changed.pop(key)
            else:
                changed[key] = self.plain(value[key], depth + 1)
            return changed
        if isinstance(value, list) and value and chance.random() < 0.8:
            at = chance.randrange(len(value))
            return [*value[:at], self.plain(value[at], depth + 1), *value[at + chance.choice((0, 1, 1, 1)) :]]
        if isinstance(value, str) and value and chance.random() < 0.6:
            at = chance.randrange(len(value))
            return value[:at] + chance.choice(("", "0", "\x00", "é", "\ud800", "A" * 70)) + value[at + 1 :]
        return chance.choice(
            (None, True, -1, 0, 2**64, 10**400, 1e308, -0.0, "", "x", [], {}, [[]], {"": 0}, "A" * 2000, value)
        )


# ---- an honest session, to begin from


class _Pipe(Channel):
    """A party's channel whose answers the fuzzer makes up."""

    def __init__(self, me: int, parties: int) -> None:
        self.me, self.parties = me, parties
        self.answer: Callable[[Header, Sequence[bytes]], Sequence[Parcel]] = lambda header, bodies: ()

    def exchange(self, header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        return self.answer(header, bodies)

    def combine(self, header: Header, body: bytes) -> bytes | memoryview:
        return self.answer(header, [body])[0].body

    def converse(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        raise LpmError("No round that can lose parties goes over this channel.")

    def deliver(self, header: Header, body: bytes) -> None:
        self.answer(header, [body])


@dataclass
class Honest:
    """A formed session: its machines as they were in each phase, all frames, and what must never be told."""

    identities: Mapping[str, Identity]
    parties: dict[Phase, PartyMachine] = field(default_factory=dict)
    states: dict[Phase, dict[str, Any]] = field(default_factory=dict)
    coordinators: dict[Phase, Callable[[], CoordinatorMachine]] = field(default_factory=dict)
    keys: list[SessionKeys] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)
    up: list[bytes] = field(default_factory=list)
    manifest: bytes = b""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def form(cls, folder: Path) -> Honest:
        """Make keys and run a session to the end of its forming; `folder` is new."""
        make_local_authority(folder, PARTIES)
        identities = {name: load_identity(folder / "parties" / name) for name in PARTIES}
        session = cls(identities | {COORDINATOR: load_identity(folder / COORDINATOR)})
        coordinator = CoordinatorMachine(session.identities[COORDINATOR], PARTIES, _TERMS)
        machines = {name: PartyMachine(identities[name], _HASH) for name in PARTIES}
        watched = machines[PARTIES[0]]
        session._remember(watched, coordinator)
        queue = deque(("down", name, coordinator.welcome(name)) for name in PARTIES)
        while queue:
            way, name, frame = queue.popleft()
            if way == "down":
                session.down.append(frame)
                queue.extend(("up", name, answer) for answer in machines[name].receive(frame)[0])
            else:
                session.up.append(frame)
                queue.extend(("down", to, answer) for to, answer in coordinator.receive(name, frame)[0])
            session._remember(watched, coordinator)
        assert coordinator.manifest is not None
        session.manifest = coordinator.manifest.encode()
        session.keys = [machine.keys for machine in machines.values() if machine.keys is not None]
        session._add_rounds()
        private = [(folder / "parties" / name / "storage.key").read_bytes() for name in PARTIES]
        private += [secret for keys in session.keys for secret in keys.pair_secrets.values()]
        private += [line for name in PARTIES for line in _key_lines(folder / "parties" / name)]
        told = [form for each in private for form in (each.hex(), base64.b64encode(each).decode(), repr(each)[2:-1])]
        session.secrets = (*told, str(_MARK), _MARK.to_bytes(8, "little").hex(), f"{_MARK:x}")
        return session

    def _remember(self, party: PartyMachine, coordinator: CoordinatorMachine) -> None:
        if party.phase not in self.states:
            self.parties[party.phase] = party
            self.states[party.phase] = dict(vars(party))
        if coordinator.phase not in self.coordinators:
            state = {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(coordinator).items()}

            def again() -> CoordinatorMachine:
                made = CoordinatorMachine.__new__(CoordinatorMachine)
                vars(made).update({k: v.copy() if isinstance(v, dict | set) else v for k, v in state.items()})
                made._rounds = RoundComposer(len(PARTIES))
                return made

            self.coordinators[coordinator.phase] = again

    def party(self, phase: Phase) -> PartyMachine:
        """The watched party as it was in a phase."""
        machine = self.parties[phase]
        vars(machine).update(self.states[phase])
        return machine

    def _add_rounds(self) -> None:
        task = Task("evaluate", 3, np.full((2, 3), 0.25), "fd", None, {"steps": 4})
        release = Release("fit", {"bands": np.arange(6.0).reshape(2, 3)}, {"unit": "people"})
        address, digest = Round(3, 5, "city/1", 0, task.digest), bytes(32)
        words = np.full(5, _MARK).tobytes()
        shares = [
            Share(Header(address, Opening.PARTIES, 4, digest), (words, words)),
            Share(Header(address, Opening.COORDINATOR, 5, digest), (words,)),
            Share(Header(address, Opening.PARTIES, 6, digest, True, ""), ()),
            Share(Header(address, Opening.PARTIES, 6, digest, False, "no"), ()),
        ]
        self.up += [share.encode() for share in shares]
        staged = Header(Round(3, -2, "loss", 0, task.digest), Opening.COORDINATOR, 7, digest)
        self.up += [StageMessage(staged, stage, (words, words)).encode() for stage in Stage]
        self.down += [StageReply(staged.round, stage, (words, words)).encode() for stage in Stage]
        self.up += [Done(0).encode(), Done(0, release).encode(), Leave("bye").encode(), Refused("no").encode()]
        self.down += [TaskMessage(0, task).encode(), Reply(address, (Parcel(4, words), Parcel(4, words))).encode()]
        self.down += [Lost("queens", "gone").encode(), Refused("no").encode(), Reply(address).encode()]


def _key_lines(folder: Path) -> Iterator[bytes]:
    for name in ("identity.key", "tls.key"):
        for line in (folder / name).read_bytes().splitlines():
            if not line.startswith(b"-"):
                yield line


# ---- machines

_EXPECTED = {
    ("down", Phase.GREETING): (1,),
    ("down", Phase.OFFERING): (3,),
    ("down", Phase.SIGNING): (5,),
    ("down", Phase.KEYING): (7,),
    ("down", Phase.READY): (9, 12),
    ("up", Phase.GREETING): (2,),
    ("up", Phase.SIGNING): (4,),
    ("up", Phase.KEYING): (6, 8),
    ("up", Phase.READY): (10, 11),
}
"""Kinds of messages that a machine waits for."""


def _decode(session: Honest, mutator: Mutator) -> Callable[[], None]:
    return lambda: decode(mutator.frame()) and None


def _manifest(session: Honest, mutator: Mutator) -> Callable[[], None]:
    plain = json.loads(session.manifest)

    def once() -> None:
        if mutator.random.random() < 0.5:
            Manifest.decode(mutator.frame(session.manifest))
        else:
            Manifest.decode(_json(mutator.plain(plain)))

    return once


def _json(plain: Any) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _party(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What a coordinator may send a party; a tenth of it signed by the coordinator."""
    phases = list(session.states)
    plain = json.loads(session.manifest)
    signer = session.identities[COORDINATOR]

    def once() -> None:
        if mutator.random.random() < 0.02:
            data = _json(mutator.plain(plain))
            digest = _manifest_digest(data)
            frame = Offer(data, signer.certificate, signer.sign(b"offer", digest)).encode()
            session.party(Phase.OFFERING).receive(frame)
            return
        phase = mutator.random.choice(phases)
        machine = session.party(phase)
        for _ in range(mutator.random.choice((1, 1, 2))):
            machine.receive(mutator.frame(mutator.of_kind(_EXPECTED["down", phase])))

    return once


def _manifest_digest(data: bytes) -> bytes:
    try:
        return Manifest.decode(data).digest
    except LpmError:
        return bytes(32)


def _coordinator(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What parties may send the coordinator; some of it signed by a party."""
    phases = [phase for phase in session.coordinators if phase != Phase.ENDED]

    def once() -> None:
        if mutator.random.random() < 0.02:
            machine = session.coordinators[Phase.GREETING]()
            machine.receive(PARTIES[0], _signed_hello(session, mutator, machine.session))
            return
        phase = mutator.random.choice(phases)
        machine = session.coordinators[phase]()
        for _ in range(mutator.random.choice((1, 1, 3))):
            machine.receive(mutator.random.choice(PARTIES), mutator.frame(mutator.of_kind(_EXPECTED["up", phase])))

    return once


def _signed_hello(session: Honest, mutator: Mutator, number: bytes) -> bytes:
    who = session.identities[mutator.random.choice(PARTIES)]
    name = mutator.random.choice((who.name, "", "x" * 900, "bronx"))
    ephemeral = mutator.random.choice((bytes(32), b"\xff" * 32, mutator.random.randbytes(32)))
    scenario = mutator.random.choice((_HASH, "", "ab" * 300))
    certificate = mutator.frame(who.certificate) if mutator.random.random() < 0.5 else who.certificate
    signature = who.sign(b"hello", hello_message(number, name, ephemeral, scenario))
    return Hello(name, certificate, ephemeral, scenario, signature).encode()


def _round(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What a relay may answer a party in a round: parcels altered, moved, replayed, too many, too few."""
    pipe = _Pipe(0, len(PARTIES))
    me, others = session.keys[0], session.keys[1:]
    about = Flags(b"environment")
    words = np.full(3, _MARK).tobytes()
    state = {"number": 0, "rounds": SealedRounds(me, pipe)}
    old: list[Parcel] = []

    def answer(header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        context = header.round.context() + header.digest
        parcels = [Parcel(header.sequence, keys.seal(0, 2, header.sequence, context, words)) for keys in others]
        how = mutator.random.randrange(8)
        if how == 0:
            parcels[0] = replace(parcels[0], body=mutator.frame(bytes(parcels[0].body)))
        elif how == 1:
            parcels = parcels[::-1]
        elif how == 2:
            parcels = parcels[: mutator.random.randrange(2)]
        elif how == 3:
            parcels += parcels
        elif how == 4 and old:
            parcels[1] = old[0]
        elif how == 5:
            parcels[0] = replace(parcels[0], sequence=mutator.random.choice(_NUMBERS) * 2**31)
        elif how == 6:
            parcels[1] = Parcel(header.sequence, others[1].seal(0, 2, header.sequence, context, words[:-8]))
        old[:] = parcels[-1:]
        return parcels

    pipe.answer = answer

    def once() -> None:
        state["number"] += 1
        if state["number"] % 1000 == 0:
            state["rounds"] = SealedRounds(me, pipe)
        rounds = state["rounds"]
        header = rounds.begin(Round(0, state["number"], "city", 0, bytes(32)), Opening.PARTIES, about)
        rounds.to_parties(header, words)

    return once


def _masked(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What a coordinator may answer a party of the masked engine: sums that are altered, too long, too short."""
    pipe = _Pipe(0, len(PARTIES))
    words = np.full(3, _MARK, dtype=np.int64)
    state = {"number": 0, "sum": MaskedSum(session.keys[0], pipe)}
    pipe.answer = lambda header, bodies: [Parcel(0, mutator.frame(bytes(bodies[0])))]

    def once() -> None:
        state["number"] += 1
        if state["number"] % 1000 == 0:
            state["sum"] = MaskedSum(session.keys[0], pipe)
        state["sum"].open_to_parties(Round(0, state["number"], "city", 0, bytes(32)), words, Flags(b"environment"))

    return once


def _droppable(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """Rounds that can lose parties: what parties may send the coordinator in each stage, and it may answer them."""
    identities = witnesses(len(PARTIES))
    rounds = DroppableRounds(PARTIES, session.keys[0].binding, identities[0].require)
    header = Header(Round(0, 0, "loss", 0, bytes(32)), Opening.COORDINATOR, 0, bytes(32))
    words = np.full(3, _MARK).view(np.uint64)
    parties = [
        DroppableParty(keys, identity, header, words, lambda survivors: None)
        for keys, identity in zip(session.keys, identities, strict=True)
    ]
    sent = {place: (party.stage, party.begin()) for place, party in enumerate(parties)}
    up: list[tuple[DroppableRounds, int, Stage, list[bytes]]] = []
    down: list[tuple[dict[str, Any], list[bytes]]] = []
    while sent:
        answers: dict[int, list[bytes]] = {}
        for place, (stage, parts) in sent.items():
            up.append((copy.deepcopy(rounds), place, stage, list(map(bytes, parts))))
            step = rounds.receive(place, header, stage, parts)
            answers |= {} if step is None else step.answers
        sent = {}
        for place, parts in answers.items():
            if place == 0:
                down.append((_state(parties[0]), list(map(bytes, parts))))
            if (following := parties[place].receive(parts)) is not None:
                sent[place] = following

    def altered(parts: list[bytes]) -> list[bytes]:
        how, at = mutator.random.randrange(6), mutator.random.randrange(max(len(parts), 1))
        if how == 0:
            return parts[:at]
        if how == 1:
            return [*parts, mutator.random.randbytes(32)]
        if how == 2:
            return parts[::-1]
        return [mutator.frame(part) if k == at else part for k, part in enumerate(parts)]

    def once() -> None:
        if mutator.random.random() < 0.5:
            before, place, stage, parts = mutator.random.choice(up)
            if mutator.random.random() < 0.2:
                stage = mutator.random.choice(list(Stage))
            copy.deepcopy(before).receive(place, header, stage, altered(parts))
        else:
            state, parts = mutator.random.choice(down)
            party = DroppableParty.__new__(DroppableParty)
            vars(party).update({k: dict(v) if isinstance(v, dict) else v for k, v in state.items()})
            party.receive(altered(parts))

    return once


def _state(party: DroppableParty) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(party).items()}


def _relay(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """Frames as the coordinator's streams hand them to its session."""
    from server.relay import CoordinatorSession

    class Nowhere:
        """In place of the stream server: takes everything, sends nothing."""

        class loop:
            @staticmethod
            def call_later(*_: object) -> Any:
                return Nowhere

        @staticmethod
        def cancel() -> None: ...

        @staticmethod
        def send(party: str, frame: bytes) -> None: ...

        @staticmethod
        def end(party: str) -> None: ...

    state: dict[str, Any] = {"relay": None}

    def once() -> None:
        relay = state["relay"]
        if relay is None or relay._failure is not None:
            phase = mutator.random.choice((Phase.GREETING, Phase.READY))
            relay = state["relay"] = CoordinatorSession(session.coordinators[phase](), 30.0)
            relay._server = Nowhere
        relay.frame(mutator.random.choice(PARTIES), mutator.frame())
        if relay._failure is not None:
            raise relay._failure

    return once


def _control(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """Bytes of the control plane's streams."""
    head = struct.Struct(">IB")
    honest = [head.pack(len(data), kind) + data for kind in Frame for data in (b"", b"a message", bytes(300))]
    altered = Mutator(honest, mutator.random.randrange(2**30))

    def once() -> None:
        buffer = bytearray(altered.frame() + altered.frame())
        try:
            deque(_take_frames(buffer), maxlen=0)
        except ConnectionAbortedError:
            raise LpmError("refused") from None

    return once


MACHINES: Mapping[str, tuple[Callable[[Honest, Mutator], Callable[[], None]], str]] = {
    "messages": (_decode, "both"),
    "manifest": (_manifest, "both"),
    "party": (_party, "down"),
    "coordinator": (_coordinator, "up"),
    "round": (_round, "both"),
    "masked": (_masked, "both"),
    "droppable": (_droppable, "both"),
    "relay": (_relay, "up"),
    "control": (_control, "both"),
}
"""State machine → how it is fed, and whose frames."""


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        frames: how many were given.
        accepted: taken without complaint.
        refused: by the name of the error.
        crashes: what was raised instead, with the seed and the number of the frame.
        leaks: errors that told something secret.
        growth_mib: of the resident memory, from the first tenth of the frames to the end.
        slowest_ms: of one frame.
        seconds: in all.
    """

    frames: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    growth_mib: float = 0.0
    slowest_ms: float = 0.0
    seconds: float = 0.0

    def tell(self) -> dict[str, Any]:
        """For a file."""
        return {**vars(self), "refused": dict(self.refused), "crashes": self.crashes[:20], "leaks": self.leaks[:20]}


def fuzz(session: Honest, machine: str, frames: int, seed: int) -> Outcome:
    """Give a state machine malformed frames.

    Args:
        session: an honest one.
        machine: one of `MACHINES`.
        frames: how many.
        seed: of the alterations.
    """
    feed, whose = MACHINES[machine]
    honest = {"both": session.up + session.down, "down": session.down, "up": session.up}[whose]
    once = feed(session, Mutator(honest, seed))
    outcome = Outcome()
    process, began, settled = psutil.Process(), time.perf_counter(), 0
    for number in range(frames):
        start = time.perf_counter()
        try:
            once()
            outcome.accepted += 1
        except LpmError as problem:
            outcome.refused[type(problem).__name__] += 1
            said = f"{problem} {problem.args} {problem.__cause__}"
            if any(secret in said for secret in session.secrets):
                outcome.leaks.append(f"{machine}, seed {seed}, frame {number}: {type(problem).__name__}")
        except Exception as problem:
            outcome.crashes.append(f"{machine}, seed {seed}, frame {number}: {type(problem).__name__}: {problem}"[:400])
            if len(outcome.crashes) >= 1000:
                break
        outcome.slowest_ms = max(outcome.slowest_ms, 1e3 * (time.perf_counter() - start))
        if number == frames // 10:
            settled = process.memory_info().rss
        outcome.frames += 1
    outcome.growth_mib = (process.memory_info().rss - settled) / 2**20
    outcome.seconds = time.perf_counter() - began
    return outcome


def fuzz_live(session: Honest, folder: Path, frames: int, seed: int, strangers: int = 200) -> Outcome:
    """Malformed frames over mutual TLS to a coordinator's endpoint, and strangers who speak no TLS at all.

    A coordinator ends a session at the first malformed frame, so behind the endpoint each session that has ended is
    followed by a new one; the streams, the relay and its machines are those of `lpm coordinator`.

    Args:
        session: an honest one.
        folder: its keys.
        frames: how many, in turn by all parties.
        seed: of the alterations.
        strangers: connections that send noise, or a broken handshake, to the same port.
    """
    import grpc

    from lpm.protocol.wire import METHOD, OPTIONS, require_tls_1_3
    from server.relay import CoordinatorSession
    from server.streams import Listener, StreamServer

    require_tls_1_3()
    outcome = Outcome()
    mutator = Mutator(session.up, seed)
    phases = (Phase.GREETING, Phase.READY)

    class Renewed(Listener):
        """Hands frames to a relay; a new one when it has failed."""

        def __init__(self) -> None:
            self.relay: CoordinatorSession | None = None
            self.seen = 0

        def connected(self, party: str) -> bytes:
            return Welcome(bytes(16)).encode()

        def disconnected(self, party: str) -> None: ...

        def frame(self, party: str, frame: bytes) -> None:
            if self.relay is None or self.relay._failure is not None:
                self.relay = CoordinatorSession(session.coordinators[phases[self.seen % 2]](), 30.0)
                self.relay._server = _Beside(server)  # type: ignore[assignment]
            self.seen += 1
            try:
                self.relay.frame(party, frame)
            except Exception as problem:
                outcome.crashes.append(f"live, frame {self.seen}: {type(problem).__name__}: {problem}"[:400])
                self.relay = None
                return
            failure = self.relay._failure
            if failure is None:
                outcome.accepted += 1
                return
            outcome.refused[type(failure).__name__] += 1
            if any(secret in str(failure) for secret in session.secrets):
                outcome.leaks.append(f"live, frame {self.seen}: {type(failure).__name__}")

    class _Beside:
        """The real server, but a failed session does not end its streams."""

        def __init__(self, real: StreamServer) -> None:
            self.loop = real.loop
            self.send = real.send

        def end(self, party: str) -> None: ...

    listener = Renewed()
    server = StreamServer("127.0.0.1:0", session.identities[COORDINATOR], listener)
    server.start()
    process, began = psutil.Process(), time.perf_counter()
    settled = [0]

    def attack(name: str, count: int) -> None:
        mine = session.identities[name]
        credentials = grpc.ssl_channel_credentials(mine.authority, mine.tls_key, mine.tls_certificate)
        options = (*OPTIONS, ("grpc.ssl_target_name_override", COORDINATOR), ("grpc.use_local_subchannel_pool", 1))
        with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, options=options) as channel:
            window = threading.Semaphore(64)

            def stream() -> Iterator[bytes]:
                for _ in range(count):
                    window.acquire()
                    with lock:
                        yield mutator.frame()
                    window.release()

            for _ in channel.stream_stream(METHOD)(stream()):
                pass  # whatever the coordinator answers

    lock = threading.Lock()
    each = -(-frames // len(PARTIES))
    threads = [threading.Thread(target=attack, args=(name, each)) for name in PARTIES]
    for thread in threads:
        thread.start()
    noise = random.Random(seed)
    for _ in range(strangers):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as stranger:
            hello = b"\x16\x03\x01" + noise.randbytes(2) if noise.random() < 0.5 else b""
            stranger.sendall(hello + noise.randbytes(noise.randrange(1, 600)))
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.05)
        if not settled[0] and listener.seen > frames // 10:
            settled[0] = process.memory_info().rss
    for thread in threads:
        thread.join()
    # It still serves: an honest party is greeted.
    before = listener.seen
    attack(PARTIES[0], 1)
    server.stop()
    if listener.seen != before + 1:
        outcome.crashes.append("live: the endpoint no longer takes frames")
    outcome.frames = listener.seen
    outcome.growth_mib = (process.memory_info().rss - settled[0]) / 2**20
    outcome.seconds = time.perf_counter() - began
    return outcome


def main() -> int:
    """Run from the command line; returns 1 if anything crashed or leaked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--frames", type=int, default=1_000_000, help="against each state machine")
    parser.add_argument("--live", type=int, default=100_000, help="against a live endpoint")
    parser.add_argument("--machine", choices=[*MACHINES, "live"], help="one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to put the figures; those of other machines there are kept")
    given = parser.parse_args()
    failed = False
    logging.getLogger("server").setLevel(logging.CRITICAL)  # it would say so of every frame
    with tempfile.TemporaryDirectory() as folder:
        session = Honest.form(Path(folder) / "keys")
        figures = json.loads(given.json.read_text()) if given.json and given.json.is_file() else {}
        for name in [given.machine] if given.machine else [*MACHINES, "live"]:
            if name == "live":
                outcome = fuzz_live(session, Path(folder) / "keys", given.live, given.seed)
            else:
                outcome = fuzz(session, name, given.frames, given.seed)
            failed |= bool(outcome.crashes or outcome.leaks)
            sys.stdout.write(
                f"{name:12} {outcome.frames:>9,} frames: {outcome.accepted:,} taken, {sum(outcome.refused.values()):,} "
                f"refused, {len(outcome.crashes)} crashes, {len(outcome.leaks)} leaks, memory {outcome.growth_mib:+.1f}"
                f" MiB, slowest {outcome.slowest_ms:.0f} ms, {outcome.seconds:.0f} s\n"
            )
            for crash in outcome.crashes[:10]:
                sys.stdout.write(f"    {crash}\n")
            figures[name] = outcome.tell() | {"seed": given.seed}
            if given.json:
                given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

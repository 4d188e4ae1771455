"""Fuzzed: messages, manifest, the machines of a session at a party and at the coordinator, relay, control plane.

Most of what is altered ends at a signature, so some is signed by a dishonest party or coordinator.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from fuzzing.honest import HASH, PARTIES, Honest
from fuzzing.mutator import Mutator
from lpm.control_stream import Frame, _take_frames
from lpm.errors import LpmError
from lpm.protocol.identity import COORDINATOR
from lpm.protocol.manifest import Manifest, hello_message
from lpm.protocol.messages import Hello, Offer, decode
from lpm.protocol.session import Phase

__all__ = ["control", "coordinator", "manifest", "messages", "party", "relay"]

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


def messages(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """Any frame, as every machine reads it first."""
    return lambda: decode(mutator.frame()) and None


def manifest(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """A manifest: its bytes altered, or its fields."""
    plain = json.loads(session.manifest)

    def once() -> None:
        if mutator.random.random() < 0.5:
            Manifest.decode(mutator.frame(session.manifest))
        else:
            Manifest.decode(_json(mutator.plain(plain)))

    return once


def _json(plain: Any) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def party(session: Honest, mutator: Mutator) -> Callable[[], None]:
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


def coordinator(session: Honest, mutator: Mutator) -> Callable[[], None]:
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
    scenario = mutator.random.choice((HASH, "", "ab" * 300))
    certificate = mutator.frame(who.certificate) if mutator.random.random() < 0.5 else who.certificate
    signature = who.sign(b"hello", hello_message(number, name, ephemeral, scenario))
    return Hello(name, certificate, ephemeral, scenario, signature).encode()


def relay(session: Honest, mutator: Mutator) -> Callable[[], None]:
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


def control(session: Honest, mutator: Mutator) -> Callable[[], None]:
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

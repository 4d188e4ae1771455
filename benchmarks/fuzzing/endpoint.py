"""Fuzzed: a live endpoint, over mutual TLS, while strangers knock."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from fuzzing.honest import PARTIES, Honest
from fuzzing.mutator import Mutator
from fuzzing.outcome import Outcome
from lpm.protocol.identity import COORDINATOR
from lpm.protocol.messages import Welcome
from lpm.protocol.session import Phase

__all__ = ["fuzz_live"]


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

"""The coordinator's streams: one bidirectional gRPC stream per party over mutual TLS 1.3, raw bytes in and out.

It knows nothing of sessions: who may connect and what a frame means is its listener's business.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod

import grpc
import grpc.aio

from lpm.errors import InputError, LpmError, SessionRefused
from lpm.protocol.identity import Identity
from lpm.protocol.messages import Refused
from lpm.protocol.wire import METHOD, OPTIONS, SERVICE, Tap

__all__ = ["Listener", "StreamServer"]

_log = logging.getLogger(__name__)


class Listener(ABC):
    """Who is told what happens on the streams; called in the streams' own thread, so it must not wait."""

    @abstractmethod
    def connected(self, party: str) -> bytes:
        """A party came.

        Args:
            party: its name, as its TLS certificate says.

        Returns:
            The first frame to it.

        Raises:
            LpmError: to send it away, with the reason.
        """

    @abstractmethod
    def frame(self, party: str, frame: bytes) -> None:
        """A frame came from a party."""

    @abstractmethod
    def disconnected(self, party: str) -> None:
        """A party's stream ended, by its own will or not."""


class StreamServer:
    """A gRPC server in its own thread.

    Args:
        address: HOST:PORT to listen at; port 0 takes a free one.
        identity: the coordinator's own, with its TLS key.
        listener: is told what happens.
        tap: for tests; hears every frame.
    """

    def __init__(self, address: str, identity: Identity, listener: Listener, tap: Tap | None = None) -> None:
        self.port = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self._address = address
        self._identity = identity
        self._listener = listener
        self._tap = tap
        self._outgoing: dict[str, asyncio.Queue[bytes | None]] = {}
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None  # kept: grpc.aio stops a server that nobody refers to
        self._thread = threading.Thread(target=self._run, name="lpm-streams", daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The streams' event loop, for timers."""
        return self._loop

    def start(self) -> None:
        """Listen.

        Raises:
            InputError: if the address can't be listened at.
        """
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        try:
            started.result()
        except BaseException:
            self.stop()
            raise

    def stop(self, grace: float = 0.0) -> None:
        """End all streams and the thread; safe to call twice.

        Args:
            grace: seconds in which streams may still end by themselves.
        """
        if self._loop.is_closed():
            return
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.stop(grace), self._loop).result(grace + 10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def send(self, party: str, frame: bytes) -> None:
        """Queue a frame for a party; only in the streams' thread. To one that has gone, nothing is sent."""
        queue = self._outgoing.get(party)
        if queue is not None:
            queue.put_nowait(frame)

    def end(self, party: str) -> None:
        """End a party's stream once what is queued is sent; only in the streams' thread."""
        queue = self._outgoing.get(party)
        if queue is not None:
            queue.put_nowait(None)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _start(self) -> None:
        server = grpc.aio.server(options=(*OPTIONS, ("grpc.so_reuseport", 0)))
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        name = METHOD.rsplit("/", 1)[1]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {name: handler}),))
        credentials = grpc.ssl_server_credentials(
            [(self._identity.tls_key, self._identity.tls_certificate)],
            root_certificates=self._identity.authority,
            require_client_auth=True,
        )
        try:
            self.port = server.add_secure_port(self._address, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise InputError(f"The coordinator can't listen at {self._address}.", "Choose a free port of this machine.")
        await server.start()
        self._server = server

    async def _serve(self, _: object, context: grpc.aio.ServicerContext) -> None:
        # Sent apart and at once: with the first frame it would be sent again by the status of a stream whose party ends
        # it while that frame is under way, which gRPC refuses, and the party would wait for a status for ever.
        await context.send_initial_metadata(())
        names = context.auth_context().get("x509_common_name", [])
        party = names[0].decode(errors="replace") if len(names) == 1 else ""
        try:
            if party in self._outgoing:
                raise SessionRefused(f"{party} is connected already: a party joins a session once.")
            first = self._listener.connected(party)
        except LpmError as refusal:
            _log.warning("a connection was refused: %s", refusal)
            await context.write(Refused(str(refusal)).encode())
            return
        queue = self._outgoing[party] = asyncio.Queue()
        queue.put_nowait(first)
        directions = {
            asyncio.ensure_future(self._read(party, context)),
            asyncio.ensure_future(self._write(party, queue, context)),
        }
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            # Before anything is awaited: when a peer is gone, gRPC cancels this handler too, wherever it then waits.
            del self._outgoing[party]
            self._listener.disconnected(party)
            await asyncio.gather(*directions, return_exceptions=True)

    async def _read(self, party: str, context: grpc.aio.ServicerContext) -> None:
        while (frame := await context.read()) is not grpc.aio.EOF:
            self.bytes_received += len(frame)
            if self._tap is not None:
                self._tap("up", party, frame)
            self._listener.frame(party, frame)

    async def _write(self, party: str, queue: asyncio.Queue[bytes | None], context: grpc.aio.ServicerContext) -> None:
        while (frame := await queue.get()) is not None:
            self.bytes_sent += len(frame)
            if self._tap is not None:
                self._tap("down", party, frame)
            await context.write(frame)

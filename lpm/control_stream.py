"""Frames over one mutual-TLS connection of a party with the coordinator: the control plane without Flower's servers.

A few hundred bytes pass here in a session. Plain sockets carry them, because the data plane is asyncio gRPC in the same
process, and beside a threaded gRPC server it no longer heard that a killed party's stream had ended.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

__all__ = ["ControlStream", "Frame", "tls_context"]

_HEAD = struct.Struct(">IB")
_LARGEST = 1 << 20
_PING_SECONDS = 3.0
_SILENCE_SECONDS = 15.0


class Frame(IntEnum):
    """What a frame is."""

    PING = 0
    WELCOME = 1
    REFUSED = 2
    MESSAGE = 3
    END = 4


def tls_context(keys: Path, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 in which each side shows a certificate of the one authority.

    Args:
        keys: the key folder (tls.pem, tls.key, authority.pem).
        server: whether this side listens.

    Returns:
        The context.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(keys / "authority.pem")
    context.load_cert_chain(keys / "tls.pem", keys / "tls.key")
    if server:
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0
    return context


class ControlStream:
    """One connection: any thread may send, one thread reads (and does the sending).

    Args:
        secure: the connection, after its handshake; it belongs to the stream from here on.
    """

    def __init__(self, secure: ssl.SSLSocket) -> None:
        """Take the connection over."""
        secure.setblocking(False)
        self._socket = secure
        self._outbox: deque[tuple[Frame, bytes]] = deque()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    def send(self, kind: Frame, payload: bytes = b"") -> None:
        """Queue a frame; after `Frame.END` the stream closes.

        Args:
            kind: what it is.
            payload: at most 1 MiB.
        """
        self._outbox.append((kind, payload))
        with contextlib.suppress(OSError):  # full: a waking is under way; closed: nobody is left to tell
            self._waker.send(b"\0")

    def frames(self) -> Iterator[tuple[Frame, bytes]]:
        """What the other side sends, until either side ends the stream.

        Yields:
            Kind and payload, without pings and the end.

        Raises:
            ConnectionError: if the other side has gone, is silent for too long, or breaks the framing.
            OSError: if the connection fails in another way.
        """
        buffer = bytearray()
        heard = spoken = time.monotonic()
        with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
            for part in (self._socket, self._woken, self._waker):
                closing.callback(part.close)
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                if time.monotonic() - spoken >= _PING_SECONDS:
                    self._outbox.append((Frame.PING, b""))
                while self._outbox:
                    kind, payload = self._outbox.popleft()
                    self._write(_HEAD.pack(len(payload), kind) + payload)
                    spoken = time.monotonic()
                    if kind is Frame.END:
                        return
                if not self._socket.pending():
                    ready = {key.fileobj for key, _ in selector.select(_PING_SECONDS)}
                    if self._woken in ready:
                        self._woken.recv(4096)
                try:
                    chunk = self._socket.recv(65536)
                except ssl.SSLWantReadError:
                    if time.monotonic() - heard > _SILENCE_SECONDS:
                        raise ConnectionResetError("the other side is silent") from None
                    continue
                if not chunk:
                    raise ConnectionResetError("the other side has gone")
                heard = time.monotonic()
                buffer += chunk
                for kind, payload in _take_frames(buffer):
                    if kind is Frame.END:
                        return
                    if kind is not Frame.PING:
                        yield kind, payload

    def _write(self, data: bytes) -> None:
        end = time.monotonic() + _SILENCE_SECONDS
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if time.monotonic() > end:
                    raise ConnectionResetError("the other side takes nothing") from None
                with selectors.DefaultSelector() as selector:
                    selector.register(self._socket, selectors.EVENT_WRITE)
                    selector.select(0.5)


def _take_frames(buffer: bytearray) -> Iterator[tuple[Frame, bytes]]:
    while len(buffer) >= _HEAD.size:
        size, kind = _HEAD.unpack_from(buffer)
        if size > _LARGEST or kind not in Frame.__members__.values():
            raise ConnectionAbortedError("the other side speaks another language")
        if len(buffer) < _HEAD.size + size:
            return
        payload = bytes(buffer[_HEAD.size : _HEAD.size + size])
        del buffer[: _HEAD.size + size]
        yield Frame(kind), payload

"""A party's end of the control streams: runs the ClientApp on each message that arrives, without a SuperNode."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from lpm.control_stream import ControlStream, Frame, tls_context
from lpm.errors import PeerLost, SessionRefused
from lpm.processes import parse_address
from lpm.protocol.identity import COORDINATOR

__all__ = ["connect", "run_node"]

_FAREWELL_SECONDS = 8.0
_ANSWER_SECONDS = 10.0


def connect(address: str, keys: Path, *, name: str = "", patience: float) -> ssl.SSLSocket:
    """Wait until the coordinator listens, and connect to it.

    Args:
        address: HOST:PORT of the control plane.
        keys: the party's own key folder.
        name: the name the coordinator's certificate must bear; "": the host of the address.
        patience: seconds to wait for it to listen.

    Returns:
        The connection. With TLS 1.3 the coordinator judges the party's certificate only after this.

    Raises:
        PeerLost: nobody listens there.
        SessionRefused: the coordinator's certificate is not to be trusted, and why.
    """
    host, port = parse_address("control-address", address)
    tls = tls_context(keys, server=False)
    end, pause = time.monotonic() + patience, threading.Event()
    while True:
        try:
            plain = socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
            break
        except OSError as problem:
            if time.monotonic() > end:
                why = problem.strerror or "no answer"
                raise PeerLost(COORDINATOR, f"nobody answers at {address} ({why})") from None
            pause.wait(0.1)
    try:
        return tls.wrap_socket(plain, server_hostname=name or host)
    except ssl.SSLCertVerificationError as problem:
        raise SessionRefused(
            f"The certificate of the coordinator at {address} is refused: {problem.verify_message.rstrip('.')}.",
            "Compare the authority.pem of both sides, the address and the clocks (`lpm doctor`).",
        ) from None
    except OSError as problem:
        raise SessionRefused(
            f"{address} does not speak the control plane's language ({type(problem).__name__}).",
            "Give the same `--control` on both sides, and check `--control-address`.",
        ) from None


def run_node(app: Callable[[Message, Context], Message], keys: Path, address: str, *, patience: float = 120.0) -> int:
    """Hold a control stream and run the ClientApp on what arrives, until the coordinator ends it.

    Args:
        app: the ClientApp; each message runs in the calling thread.
        keys: the party's own key folder.
        address: HOST:PORT of the coordinator's control plane.
        patience: seconds to wait for the coordinator to listen.

    Returns:
        The exit code of the last message's status; 0 if none came.

    Raises:
        PeerLost: the coordinator went away before the session began.
        SessionRefused: one side does not trust the other, or the coordinator does not let this party in.
    """
    import clients.party  # noqa: F401 - torch and the simulator load while the coordinator does the same

    stream = ControlStream(connect(address, keys, name=COORDINATOR, patience=patience))
    arrived: queue.SimpleQueue[tuple[Frame, bytes] | Exception | None] = queue.SimpleQueue()
    # Reading goes on while the app runs, so that the coordinator sees that this party is alive.
    threading.Thread(target=_read, args=(stream, arrived), name="control-stream", daemon=True).start()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    exit_code: int | None = None
    welcome = False
    while True:
        try:
            news = arrived.get(timeout=None if exit_code is None else _FAREWELL_SECONDS)
        except queue.Empty:
            news = None
        if isinstance(news, Exception) and exit_code is None:
            raise _explain(news, address, welcome)
        if news is None or isinstance(news, Exception):
            stream.send(Frame.END)
            return exit_code or 0
        kind, payload = news
        if kind is Frame.REFUSED:
            raise SessionRefused(f"The coordinator at {address} does not let this party in: {payload.decode()}.")
        welcome = welcome or kind is Frame.WELCOME
        if kind is Frame.MESSAGE:
            reply = app(message_from_proto(MessageProto.FromString(payload)), context)
            stream.send(Frame.MESSAGE, message_to_proto(reply).SerializeToString())
            exit_code = int(str(reply.content.config_records["status"]["exit"]))


def _read(stream: ControlStream, arrived: queue.SimpleQueue[tuple[Frame, bytes] | Exception | None]) -> None:
    try:
        for frame in stream.frames():
            arrived.put(frame)
        arrived.put(None)
    except Exception as problem:  # handed to the thread that waits
        arrived.put(problem)


def _explain(problem: Exception, address: str, welcome: bool) -> PeerLost | SessionRefused:
    if isinstance(problem, ssl.SSLError) and not welcome:
        why = (problem.reason or "").lower().replace("_", " ")
        return SessionRefused(
            f"The coordinator at {address} refuses this party's certificate ({why}).",
            "It must come from the coordinator's own authority and be valid today (`lpm doctor --keys`).",
        )
    return PeerLost(COORDINATOR, "its control stream ended")

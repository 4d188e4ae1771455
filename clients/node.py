"""A party's end of the control streams: runs the ClientApp on each message that arrives, without a SuperNode."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from lpm.errors import PeerLost, SessionRefused
from lpm.processes import parse_address
from lpm.protocol.identity import COORDINATOR, Identity

__all__ = ["require_coordinator", "run_node"]

_log = logging.getLogger(__name__)

_METHOD = "/lpm.Control/Node"
_OPTIONS = (
    ("grpc.ssl_target_name_override", COORDINATOR),  # the certificate names the role, wherever it runs
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
)
_FAREWELL_SECONDS = 8.0


def require_coordinator(address: str, keys: Path, *, name: str = "", mutual: bool = True, patience: float) -> None:
    """Wait until the coordinator listens, and make sure each side accepts the other's certificate.

    gRPC tells "not there yet" and "refused" apart only in prose; a plain TLS handshake says which, and why.

    Args:
        address: HOST:PORT of the control plane.
        keys: the party's own key folder.
        name: the name the coordinator's certificate must bear; "": the host of the address.
        mutual: whether the coordinator asks for the party's certificate.
        patience: seconds to wait for it to listen.

    Raises:
        PeerLost: nobody listens there.
        SessionRefused: naming whose certificate is refused and why.
    """
    host, port = parse_address("control-address", address)
    tls = ssl.create_default_context(cafile=str(keys / "authority.pem"))
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.set_alpn_protocols(["h2", "http/1.1"])
    tls.load_cert_chain(keys / "tls.pem", keys / "tls.key")
    end = time.monotonic() + patience
    pause = threading.Event()
    while True:
        try:
            plain = socket.create_connection((host, port), timeout=5.0)
            break
        except OSError as problem:
            if time.monotonic() > end:
                raise PeerLost(
                    COORDINATOR, f"nobody answers at {address} ({problem.strerror or 'no answer'})"
                ) from None
            pause.wait(0.1)
    try:
        with plain, tls.wrap_socket(plain, server_hostname=name or host) as secure:
            if mutual:
                # In TLS 1.3 the server judges our certificate after our handshake is done: its first byte, or its
                # refusal, comes now.
                secure.settimeout(3.0)
                if not secure.recv(1):
                    raise ConnectionResetError
    except TimeoutError:
        return
    except ssl.SSLCertVerificationError as problem:
        raise SessionRefused(
            f"The certificate of the coordinator at {address} is refused: {problem.verify_message.rstrip('.')}.",
            "Compare the authority.pem of both sides, the address and the clocks (`lpm doctor`).",
        ) from None
    except (ssl.SSLError, ConnectionError) as problem:
        why = (getattr(problem, "reason", None) or type(problem).__name__).lower().replace("_", " ")
        raise SessionRefused(
            f"The coordinator at {address} refuses this party's certificate ({why}).",
            "It must come from the coordinator's own authority and be valid today (`lpm doctor --keys`).",
        ) from None


def run_node(app: ClientApp, identity: Identity, keys: Path, address: str, *, patience: float = 120.0) -> int:
    """Hold a control stream and run the ClientApp on what arrives, until the coordinator ends it.

    Args:
        app: the ClientApp; each message runs in the calling thread.
        identity: the party's keys.
        keys: the folder they lie in.
        address: HOST:PORT of the coordinator's control plane.
        patience: seconds to wait for the coordinator to listen.

    Returns:
        The exit code of the last message's status; 0 if none came.

    Raises:
        PeerLost: the coordinator went away before the session began.
        SessionRefused: the coordinator does not let this party in.
    """
    import clients.party  # noqa: F401 - torch and the simulator load while the coordinator does the same

    require_coordinator(address, keys, name=COORDINATOR, patience=patience)
    credentials = grpc.ssl_channel_credentials(identity.authority, identity.tls_key, identity.tls_certificate)
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def frames() -> Iterator[bytes]:
        while (frame := outbox.get()) is not None:
            yield frame

    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    exit_code: int | None = None
    with grpc.secure_channel(address, credentials, options=_OPTIONS) as channel:
        stream = channel.stream_stream(_METHOD)(frames(), wait_for_ready=True)
        farewell = threading.Timer(_FAREWELL_SECONDS, stream.cancel)
        farewell.daemon = True
        try:
            for frame in stream:
                message = message_from_proto(MessageProto.FromString(frame))
                reply = app(message, context)
                outbox.put(message_to_proto(reply).SerializeToString())
                if exit_code is None:
                    farewell.start()
                exit_code = int(str(reply.content.config_records["status"]["exit"]))
        except grpc.RpcError as problem:
            if exit_code is None:
                raise _explain(problem, address) from None
        finally:
            farewell.cancel()
            outbox.put(None)
    return exit_code or 0


def _explain(problem: grpc.RpcError, address: str) -> PeerLost | SessionRefused:
    code, details = problem.code(), problem.details() or ""
    if code in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ALREADY_EXISTS}:
        return SessionRefused(f"The coordinator at {address} does not let this party in: {details}.")
    return PeerLost(COORDINATOR, f"its control stream ended ({code.name.lower().replace('_', ' ')})")

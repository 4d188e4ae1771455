"""What both ends of a stream must agree on: the method's name and the connection's settings.

Plain values only: the transport itself is the business of `clients` and `server`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from lpm.protocol.messages import FRAME_LIMIT

__all__ = ["METHOD", "OPTIONS", "SERVICE", "Tap", "require_tls_1_3"]

SERVICE = "lpm.Federation"
METHOD = f"/{SERVICE}/Join"
"""The one bidirectional stream a party opens."""

Tap = Callable[[str, str, bytes], None]
"""A test's ear inside TLS: called with "up" or "down", the party, and each frame."""

_PING_MS = 3000

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", FRAME_LIMIT),
    ("grpc.max_send_message_length", FRAME_LIMIT),
    # A frozen peer is lost after 3 s without a sign and 3 s without an answer: within 10 s in all.
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PING_MS),
    ("grpc.http2.ping_timeout_ms", _PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 3),
    ("grpc.http2.max_ping_strikes", 0),
    # A round's bundle is a few hundred kilobytes: it should not wait for window updates.
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
)


def require_tls_1_3() -> None:
    """Allow no TLS below 1.3; to be called before the transport's library is first used.

    gRPC has no setting for the lowest version. But the suites named here ask for RSA certificates, and ours are
    P-256: so no TLS 1.2 handshake can succeed, while the suites of TLS 1.3 are not affected.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    # Its own lines on standard error tell a user nothing that our errors do not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

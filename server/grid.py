"""A Flower Grid of our own: the ServerApp's messages over mutual-TLS streams, without a SuperLink.

The same ServerApp and ClientApp run over it as over Flower's own processes; only who carries the messages differs. Each
party holds one stream open; its name is the one in its certificate.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Self

import grpc
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lpm.errors import InputError
from lpm.protocol.identity import Identity

__all__ = ["CONTROL_METHOD", "StreamsGrid", "node_id_of", "run_app"]

_log = logging.getLogger(__name__)

CONTROL_METHOD = "/lpm.Control/Node"
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)
_POLL_SECONDS = 0.1
_RUN_ID = 1


def node_id_of(party: str) -> int:
    """The number by which Flower's messages know a party.

    Args:
        party: its name.

    Returns:
        A positive 63-bit number.
    """
    return int.from_bytes(sha256(b"lpm/node/" + party.encode()).digest()[:8], "big") >> 1 | 1


@dataclass
class _Node:
    party: str
    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)


class StreamsGrid(Grid):
    """Carries the control messages of one session over streams that the parties open.

    Args:
        address: HOST:PORT to listen on.
        identity: the coordinator's keys.
        parties: the roster; nobody else is let in, and nobody twice.

    Raises:
        InputError: if the address can't be listened on.
    """

    def __init__(self, address: str, identity: Identity, parties: Sequence[str]) -> None:
        """Begin to listen."""
        self._roster = frozenset(parties)
        self._nodes: dict[int, _Node] = {}
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._changed = threading.Condition()
        self._run = Run.create_empty(_RUN_ID)
        self._server = grpc.server(ThreadPoolExecutor(len(parties) + 2, "control"), options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, _, method = CONTROL_METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        credentials = grpc.ssl_server_credentials(
            [(identity.tls_key, identity.tls_certificate)], identity.authority, require_client_auth=True
        )
        try:
            self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise InputError(
                f"`--control-address` is {address}: it can't be listened on.",
                "Another process may hold it; name a free port of this machine.",
            ) from None
        self._server.start()

    def __enter__(self) -> Self:
        """The grid listens from its making on."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every party's stream and stop listening."""
        self.close()

    def close(self) -> None:
        """End every party's stream and stop listening."""
        with self._changed:
            for node in self._nodes.values():
                node.outbox.put(None)
        self._server.stop(1.0).wait()

    @property
    def run(self) -> Run:
        """The one run this grid has."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Name the run.

        Args:
            run: as Flower describes it.
        """
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as Flower's interface wants it; `Message(…)` does the same.

        Args:
            content: its records.
            message_type: which handler it is for.
            dst_node_id: to whom.
            group_id: a label.
            ttl: seconds until it and its reply are void.

        Returns:
            The message.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The parties connected now."""
        with self._changed:
            return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The parties connected now, with their certified names."""
        with self._changed:
            return [NodeInfo(node_id=number, name=node.party) for number, node in self._nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages.

        Args:
            messages: each to a connected party; to one that has gone, the reply is an error at once.

        Returns:
            One id per message.
        """
        identifiers = []
        for message in messages:
            values = message.metadata.__dict__
            values["_run_id"], values["_src_node_id"] = self._run.run_id, SUPERLINK_NODE_ID
            identifier = values["_message_id"] = uuid.uuid4().hex
            identifiers.append(identifier)
            with self._changed:
                self._sent[identifier] = message
                node = self._nodes.get(message.metadata.dst_node_id)
                if node is None:
                    self._answer_for_lost(message)
                else:
                    node.outbox.put(message_to_proto(message).SerializeToString())
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that have arrived.

        Args:
            message_ids: what `push_messages` returned.

        Returns:
            Their replies, each once.
        """
        with self._changed:
            return [self._replies.pop(each) for each in list(message_ids) if each in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies.

        Args:
            messages: each to a connected party.
            timeout: seconds; None: as long as it takes.

        Returns:
            The replies that came in time.
        """
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        end = None if timeout is None else time.monotonic() + timeout
        while waiting and (end is None or time.monotonic() < end):
            with self._changed:
                self._changed.wait(_POLL_SECONDS)
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        party = _certified_name(context)
        if party not in self._roster:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{party} is not in the roster of this session")
        number, node = node_id_of(party), _Node(party)
        with self._changed:
            taken = number in self._nodes
            if not taken:
                self._nodes[number] = node
                self._changed.notify_all()
        if taken:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{party} is connected already")
        _log.info("%s is connected.", party)
        if not context.add_callback(lambda: self._lose(number)):
            self._lose(number)
        threading.Thread(target=self._listen, args=(number, frames), name=f"control-{party}", daemon=True).start()
        while (frame := node.outbox.get()) is not None:
            yield frame

    def _listen(self, number: int, frames: Iterator[bytes]) -> None:
        try:
            for frame in frames:
                reply = message_from_proto(MessageProto.FromString(frame))
                with self._changed:
                    asked = self._sent.get(reply.metadata.reply_to_message_id)
                    if asked is not None and asked.metadata.dst_node_id == number:  # nobody answers for another
                        del self._sent[asked.metadata.message_id]
                        self._replies[asked.metadata.message_id] = reply
                        self._changed.notify_all()
        except grpc.RpcError:
            pass  # the stream's end is told by its callback
        except Exception as problem:  # a frame that is no message: as good as gone
            _log.warning("A party's control stream can't be read (%s).", type(problem).__name__)
            self._lose(number)

    def _lose(self, number: int) -> None:
        with self._changed:
            node = self._nodes.pop(number, None)
            if node is None:
                return
            node.outbox.put(None)
            for message in list(self._sent.values()):
                if message.metadata.dst_node_id == number:
                    self._answer_for_lost(message)
            self._changed.notify_all()

    def _answer_for_lost(self, message: Message) -> None:
        self._sent.pop(message.metadata.message_id, None)
        error = Error(ErrorCode.NODE_UNAVAILABLE, "the control stream ended")
        self._replies[message.metadata.message_id] = Message(error, reply_to=message)


def _certified_name(context: grpc.ServicerContext) -> str:
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode("utf-8", "replace") if len(names) == 1 else ""


def run_app(grid: StreamsGrid) -> dict[str, object]:
    """Run the ServerApp over this grid, in the calling thread.

    Args:
        grid: where the parties report.

    Returns:
        The app's record "status".
    """
    from server.app import app

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, SUPERLINK_NODE_ID, _RUN_ID
    context = Context(run_id=_RUN_ID, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config={})
    app(grid, context)
    return dict(context.state.config_records["status"])

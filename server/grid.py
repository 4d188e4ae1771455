"""A Flower Grid of our own: the ServerApp's messages over mutual-TLS streams, without a SuperLink.

The same ServerApp and ClientApp run over it as over Flower's own processes; only who carries the messages differs. Each
party holds one stream open; its name is the one in its certificate.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.x509.oid import NameOID
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lpm.control_stream import ControlStream, Frame, tls_context
from lpm.errors import InputError
from lpm.processes import parse_address

__all__ = ["StreamsGrid", "node_id_of", "run_app"]

_log = logging.getLogger(__name__)

_HANDSHAKE_SECONDS = 10.0
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
    stream: ControlStream


class StreamsGrid(Grid):
    """Carries the control messages of one session over streams that the parties open.

    Args:
        address: HOST:PORT to listen on.
        keys: the coordinator's own key folder.
        parties: the roster; nobody else is let in, and nobody twice.

    Raises:
        InputError: if the address can't be listened on.
    """

    def __init__(self, address: str, keys: Path, parties: Sequence[str]) -> None:
        """Begin to listen."""
        self._roster = frozenset(parties)
        self._nodes: dict[int, _Node] = {}
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._changed = threading.Condition()
        self._run = Run.create_empty(_RUN_ID)
        self._tls = tls_context(keys, server=True)
        self._threads: list[threading.Thread] = []
        try:
            self._listener = socket.create_server(parse_address("control-address", address), backlog=64)
        except OSError as problem:
            raise InputError(
                f"`--control-address` is {address}: it can't be listened on ({problem.strerror}).",
                "Another process may hold it; name a free port of this machine.",
            ) from None
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def __enter__(self) -> Self:
        """The grid listens from its making on."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every party's stream and stop listening."""
        self.close()

    def close(self) -> None:
        """End every party's stream and stop listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._changed:
            for node in self._nodes.values():
                node.stream.send(Frame.END)
            threads = list(self._threads)
        for thread in threads:
            thread.join(1.0)

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
                    node.stream.send(Frame.MESSAGE, message_to_proto(message).SerializeToString())
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

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._serve, args=(plain,), name="control-stream", daemon=True)
            with self._changed:
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        plain.settimeout(_HANDSHAKE_SECONDS)
        try:
            stream = ControlStream(secure := self._tls.wrap_socket(plain, server_side=True))
        except (OSError, ValueError) as problem:  # the other side is told by TLS itself
            why = getattr(problem, "verify_message", "") or getattr(problem, "reason", "") or type(problem).__name__
            _log.warning("A connection was refused: %s.", str(why).lower().replace("_", " "))
            plain.close()
            return
        party = _certified_name(secure)
        number = node_id_of(party)
        with self._changed:
            refusal = ""
            if party not in self._roster:
                refusal = f"{party} is not in the roster of this session"
            elif number in self._nodes:
                refusal = f"{party} is connected already"
            else:
                self._nodes[number] = _Node(party, stream)
        if refusal:
            _log.warning("A connection was refused: %s.", refusal)
            stream.send(Frame.REFUSED, refusal.encode())
            stream.send(Frame.END)
        else:
            _log.info("%s is connected.", party)
            stream.send(Frame.WELCOME)
        try:
            for kind, payload in stream.frames():
                if kind is Frame.MESSAGE and not refusal:
                    self._take(number, message_from_proto(MessageProto.FromString(payload)))
        except OSError:
            pass  # gone, which is told below
        except Exception as problem:  # a frame that is no message: as good as gone
            _log.warning("The control stream of %s can't be read (%s).", party, type(problem).__name__)
        finally:
            if not refusal:
                self._lose(number)

    def _take(self, number: int, reply: Message) -> None:
        with self._changed:
            asked = self._sent.get(reply.metadata.reply_to_message_id)
            if asked is not None and asked.metadata.dst_node_id == number:  # nobody answers for another
                del self._sent[asked.metadata.message_id]
                self._replies[asked.metadata.message_id] = reply
                self._changed.notify_all()

    def _lose(self, number: int) -> None:
        with self._changed:
            node = self._nodes.pop(number, None)
            if node is None:
                return
            for message in list(self._sent.values()):
                if message.metadata.dst_node_id == number:
                    self._answer_for_lost(message)
            self._changed.notify_all()

    def _answer_for_lost(self, message: Message) -> None:
        self._sent.pop(message.metadata.message_id, None)
        error = Error(ErrorCode.NODE_UNAVAILABLE, "the control stream ended")
        self._replies[message.metadata.message_id] = Message(error, reply_to=message)


def _certified_name(secure: ssl.SSLSocket) -> str:
    shown = secure.getpeercert(binary_form=True)
    if shown is None:
        return ""
    names = x509.load_der_x509_certificate(shown).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


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

"""A party's session: its stream to the coordinator over mutual TLS 1.3, and what runs over it.

gRPC lives in a thread of its own; the simulation stays in the caller's, and waits for rounds there.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from clients.config import ClientConfig, own_folder
from lpm.errors import InputError, LpmError, PeerLost, PolicyRefused, SessionRefused
from lpm.privacy import load_engine, make_engine
from lpm.privacy.dealer import LABEL
from lpm.privacy.dropout import dropout_note
from lpm.privacy.secure_sum import Channel, Header, Parcel, SecureSum, Stage
from lpm.protocol.identity import COORDINATOR, Identity, load_identity
from lpm.protocol.manifest import Manifest
from lpm.protocol.messages import (
    Done,
    Leave,
    Lost,
    Message,
    Refused,
    Release,
    Reply,
    Share,
    StageMessage,
    StageReply,
    Task,
    TaskMessage,
)
from lpm.protocol.session import PartyMachine, Phase
from lpm.protocol.wire import METHOD, OPTIONS, Tap

__all__ = ["PartySession", "join"]

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0
_FAREWELL_SECONDS = 5.0
_TLS_PROBLEMS = ("certificate", "handshake", "ssl_error", "peer name")


class _StreamChannel(Channel):
    """Rounds over the session's stream, matched by their address."""

    def __init__(self, session: PartySession, me: int, parties: int, seconds: float) -> None:
        self._session = session
        self.me = me
        self.parties = parties
        self._seconds = seconds

    def exchange(self, header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        return self._session._round(header, bodies, self._seconds).parcels

    def combine(self, header: Header, body: bytes) -> bytes | memoryview:
        parcels = self._session._round(header, [] if header.raised else [body], self._seconds).parcels
        return parcels[0].body if len(parcels) == 1 else b""

    def converse(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        return self._session._stage(header, stage, parts, self._seconds)

    def deliver(self, header: Header, body: bytes) -> None:
        self._session._round(header, [] if header.raised else [body], self._seconds)


class PartySession:
    """A formed session, seen from a party; made by `join`."""

    def __init__(self, identity: Identity, machine: PartyMachine, address: str, tap: Tap | None) -> None:
        self.rounds = 0
        self._identity = identity
        self._machine = machine
        self._address = address
        self._tap = tap
        self._sum: SecureSum | None = None
        self._formed: Future[None] = Future()
        self._tasks: queue.SimpleQueue[TaskMessage | LpmError] = queue.SimpleQueue()
        self._numbers: dict[bytes, int] = {}
        self._replies: dict[tuple[bytes, int], Future[Reply | StageReply]] = {}
        self._lock = threading.Lock()
        self._failure: LpmError | None = None
        self._finished = False
        self._last_problem = ""
        self._loop = asyncio.new_event_loop()
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._thread = threading.Thread(target=self._run, name="lpm-stream", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(problem, PolicyRefused):
            self._post(Refused(str(problem)).encode())  # the line of the policy, and what was asked for
        # The type's name alone: a message of some other exception could hold a private value.
        self.close("" if problem is None else f"it stopped ({type(problem).__name__})")

    @property
    def manifest(self) -> Manifest:
        """What all parties signed."""
        assert self._machine.manifest is not None
        return self._machine.manifest

    @property
    def secure_sum(self) -> SecureSum:
        """The party's engine of the secure sum."""
        assert self._sum is not None
        return self._sum

    def tasks(self, parting: Callable[[], Release | None] = lambda: None) -> Iterator[Task]:
        """The coordinator's tasks, as they come; ends when the coordinator says that all is done.

        Args:
            parting: what this party gives the coordinator on leaving.

        Raises:
            PeerLost: if a party or the coordinator is lost.
            SessionRefused: if somebody broke the rules.
        """
        while True:
            item = self._tasks.get()
            if isinstance(item, LpmError):
                self._tasks.put(item)
                raise item
            self._numbers[item.task.digest] = item.number
            if item.task.kind == "finish":
                self._finished = True
                self.done(item.task, parting())
                return
            yield item.task

    def done(self, task: Task, release: Release | None = None) -> None:
        """Tell the coordinator that a task is done.

        Args:
            task: which came from `tasks`.
            release: what this party consents to show of its own results.

        Raises:
            InputError: if the task is none of this session's, or was done before.
        """
        number = self._numbers.pop(task.digest, None)
        if number is None:
            raise InputError(f"The task {task.kind} of trajectory {task.trajectory} is not under way.")
        self._post(Done(number, release).encode())

    def close(self, reason: str = "") -> None:
        """Leave the session; safe to call twice.

        Args:
            reason: why, if its work is not done (never a private value).
        """
        if not self._thread.is_alive():
            return
        if not self._finished and self._failure is None:
            self._post(Leave(reason or "it left the session").encode())
        self._finished = True
        self._post(None)
        self._thread.join(_FAREWELL_SECONDS)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(_FAREWELL_SECONDS)

    # In the caller's thread.

    def _round(self, header: Header, bodies: Sequence[bytes], seconds: float) -> Reply:
        answer = self._ask(Share(header, bodies), header, 0, seconds)
        assert isinstance(answer, Reply)
        self.rounds += 1
        return answer

    def _stage(self, header: Header, stage: Stage, parts: Sequence[bytes], seconds: float) -> Sequence[bytes]:
        answer = self._ask(StageMessage(header, stage, parts), header, stage, seconds)
        assert isinstance(answer, StageReply)
        self.rounds += stage == Stage.REVEAL
        return [bytes(part) for part in answer.parts]

    def _ask(self, message: Message, header: Header, stage: int, seconds: float) -> Reply | StageReply:
        reply: Future[Reply | StageReply] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._replies[header.round.context(), stage] = reply
        self._post(message.encode())
        try:
            answer = reply.result(seconds)
        except TimeoutError:
            raise PeerLost(COORDINATOR, f"no answer within {seconds:g} s") from None
        if answer.refusal is not None:
            raise answer.refusal
        return answer

    def _post(self, frame: bytes | None) -> None:
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._outgoing.put_nowait, frame)
            except RuntimeError:  # the loop was closed in between: the stream has ended, and whoever waits was told
                _log.debug("a frame was dropped: the stream has ended")

    # In the stream's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._stream())
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            self._fail(PeerLost(COORDINATOR, "the session was closed"))
        except Exception as problem:
            _log.exception("the stream failed")
            self._fail(PeerLost(COORDINATOR, f"the stream failed ({type(problem).__name__})"))
        finally:
            self._loop.close()

    def _cancel(self) -> None:
        self._main.cancel()

    async def _stream(self) -> None:
        pause = 0.1
        while not self._finished:
            credentials = grpc.ssl_channel_credentials(
                self._identity.authority, self._identity.tls_key, self._identity.tls_certificate
            )
            options = (
                *OPTIONS,
                # The authority certifies the role, not the machine: only its holder is "coordinator".
                ("grpc.ssl_target_name_override", COORDINATOR),
                ("grpc.use_local_subchannel_pool", 1),
            )
            async with grpc.aio.secure_channel(self._address, credentials, options=options) as channel:
                call = channel.stream_stream(METHOD)()
                try:
                    await self._converse(call)
                    return
                except grpc.aio.AioRpcError as problem:
                    if not self._may_retry(problem):
                        return
                finally:
                    call.cancel()
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _may_retry(self, problem: grpc.aio.AioRpcError) -> bool:
        details = problem.details() or ""
        if self._machine.phase != Phase.GREETING:
            self._fail(PeerLost(COORDINATOR, "its connection broke or it stopped answering"))
            return False
        if any(word in details.lower() for word in _TLS_PROBLEMS):
            self._fail(
                SessionRefused(
                    f"The coordinator at {self._address} and {self._identity.name} do not accept each other's TLS"
                    " certificates.",
                    "Both must be certified by the same authority, not expired, and speak TLS 1.3.",
                )
            )
            return False
        self._last_problem = details.rsplit("last error: ", 1)[-1][:200]
        return self._failure is None and not self._finished

    async def _converse(self, call: grpc.aio.StreamStreamCall) -> None:
        writer = asyncio.ensure_future(self._write(call))
        try:
            while (frame := await call.read()) is not grpc.aio.EOF:
                if self._tap is not None:
                    self._tap("down", self._identity.name, frame)
                self._take(frame)
            code = await call.code()
            if code != grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details())
            if not self._finished:
                self._fail(PeerLost(COORDINATOR, "it ended the stream"))
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        while (frame := await self._outgoing.get()) is not None:
            if self._tap is not None:
                self._tap("up", self._identity.name, frame)
            await call.write(frame)
        await call.done_writing()

    def _take(self, frame: bytes) -> None:
        if self._failure is not None:
            return
        try:
            frames, news = self._machine.receive(frame)
        except LpmError as problem:
            # Tell the coordinator why, unless it was the coordinator who refused.
            self._outgoing.put_nowait(Refused(str(problem)).encode())
            self._outgoing.put_nowait(None)
            self._fail(problem)
            return
        for answer in frames:
            self._outgoing.put_nowait(answer)
        self._hand_on(news)
        if self._machine.phase == Phase.READY and not self._formed.done():
            self._formed.set_result(None)

    def _hand_on(self, news: Message | None) -> None:
        if isinstance(news, TaskMessage):
            self._tasks.put(news)
        elif isinstance(news, Reply | StageReply):
            stage = news.stage if isinstance(news, StageReply) else 0
            with self._lock:
                waiting = self._replies.pop((news.round.context(), stage), None)
            if waiting is None:
                self._fail(SessionRefused("The coordinator answered a round that this party did not begin."))
            elif not waiting.cancelled():
                waiting.set_result(news)
        elif isinstance(news, Lost):
            self._fail(PeerLost(news.party, news.reason))

    def _fail(self, failure: LpmError) -> None:
        with self._lock:
            if self._failure is not None or (self._finished and isinstance(failure, PeerLost)):
                return
            self._failure = failure
            waiting, self._replies = list(self._replies.values()), {}
        for reply in waiting:
            reply.set_exception(failure)
        self._tasks.put(failure)
        if not self._formed.done():
            self._formed.set_exception(failure)

    def _join(self, sharing: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._thread.start()
        try:
            load_engine(sharing)  # costs a second: meanwhile the others join
            try:
                self._formed.result(max(0.0, until - time.monotonic()))
            except TimeoutError:
                last = f" (last problem: {self._last_problem})" if self._last_problem else ""
                raise SessionRefused(
                    f"No session was formed with the coordinator at {self._address} within {seconds:g} s{last}.",
                    "Start the coordinator and all parties, and check the address and the firewall.",
                ) from None
            keys, terms = self._machine.keys, self.manifest.terms
            assert keys is not None
            channel = _StreamChannel(self, keys.me, keys.parties, terms.deadline_seconds + _GRACE_SECONDS)
            self._sum = make_engine(
                terms.sharing, keys, channel, terms.droppable, self._machine.witness(), terms.thresholds
            )
            if terms.thresholds:
                _log.warning("Weaker: %s.", LABEL)
            if terms.sharing == "masked":
                _log.info("%s", dropout_note(keys.parties, terms.droppable))
        except BaseException:
            self.close("it stopped")
            raise


def join(
    config: ClientConfig,
    scenario_hash: str,
    *,
    join_seconds: float = 120.0,
    check: Callable[[Manifest], None] | None = None,
    tap: Tap | None = None,
    now: datetime | None = None,
) -> PartySession:
    """Connect to the coordinator, which may start later, and form a session with it and all other parties.

    Args:
        config: who this party is, where its keys are, and where the coordinator is.
        scenario_hash: hex digest of the scenario's public part in this party's own installation.
        join_seconds: how long to wait for the coordinator and the others.
        check: a further judgement of the manifest, such as a site's policy; it refuses by raising `LpmError`.
        tap: for tests; hears every frame inside TLS.
        now: the time to judge certificates by; by default this machine's clock.

    Returns:
        The session, ready for tasks; close it, or use it in a `with` statement.

    Raises:
        InputError: if the configuration can't be used, or the engine does not exist.
        SessionRefused: if somebody's keys, scenario or signature are not in order, or nobody came in time.
        PeerLost: if a party or the coordinator went away meanwhile.
    """
    identity = load_identity(own_folder(config.keys, config.party), config.party, now)
    machine = PartyMachine(
        identity, scenario_hash, session_name=config.session, sharing=config.sharing, check=check, now=now
    )
    session = PartySession(identity, machine, config.coordinator, tap)
    session._join(config.sharing, join_seconds)
    return session

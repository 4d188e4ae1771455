"""The coordinator's session: it gathers the parties, passes their sealed messages on, and adds up masked shares.

It holds no model and no key of any party: what it passes on it can't read, and of what it adds up only the total
means anything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, LpmError, PeerLost, RoundRefused, SessionRefused
from lpm.privacy import require_engine
from lpm.privacy.composition import Composed
from lpm.privacy.dropout import dropout_note
from lpm.privacy.recovery import Step
from lpm.privacy.secure_sum import Round, Stage
from lpm.protocol.identity import COORDINATOR, load_identity
from lpm.protocol.manifest import Manifest, Terms
from lpm.protocol.messages import Done, Leave, Lost, Message, Refused, Release, Share, Task, TaskMessage
from lpm.protocol.session import CoordinatorMachine, Phase
from lpm.protocol.wire import Tap
from server.config import CoordinatorConfig, own_folder
from server.streams import Listener, StreamServer

__all__ = ["CoordinatorSession", "PartialSum", "gather"]

_log = logging.getLogger(__name__)
_FAREWELL_SECONDS = 5.0
_TASK_DEADLINES = 10
"""A task ends with work of each party's own, so it may take several rounds' time after the first party is done."""
_FINISH = Task("finish", 2**64 - 1, np.zeros((0, 0)))


class _Cancellable(Protocol):
    def cancel(self) -> None: ...


_Awaited = Round | tuple[Round, Stage] | int
"""What a deadline is of: a round, a stage of one that can lose parties, or a task by its number."""


@dataclass(frozen=True, eq=False)
class PartialSum:
    """A total, and whose it is.

    Args:
        words: [words] the sum mod 2^64.
        parties: whose contributions are in it.
    """

    words: NDArray[np.int64]
    parties: tuple[str, ...]


class CoordinatorSession(Listener):
    """A formed session, seen from the coordinator; made by `gather`.

    All public methods may be called from any thread.
    """

    def __init__(self, machine: CoordinatorMachine, deadline_seconds: float) -> None:
        self.rounds = 0
        self._machine = machine
        self._deadline = deadline_seconds
        self._server: StreamServer | None = None
        self._changed = threading.Condition()
        self._failure: LpmError | None = None
        self._ending = False
        self._refusal: RoundRefused | None = None
        self._tasks: dict[bytes, int] = {}
        self._totals: dict[tuple[bytes, str], deque[PartialSum]] = defaultdict(deque)
        self._done: dict[int, dict[str, Release | None]] = defaultdict(dict)
        self._connected: set[str] = set()
        self._timers: dict[_Awaited, _Cancellable] = {}
        self._traffic = (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("" if kind is None else f"it stopped ({kind.__name__})")

    @property
    def manifest(self) -> Manifest:
        """What all parties signed."""
        assert self._machine.manifest is not None
        return self._machine.manifest

    @property
    def parties(self) -> tuple[str, ...]:
        """The roster, in the order of the session."""
        return self._machine.parties

    @property
    def port(self) -> int:
        """Where the streams listen."""
        return 0 if self._server is None else self._server.port

    @property
    def bytes_received(self) -> int:
        """Bytes that came from parties, without the transport's own."""
        return self._traffic[0] if self._server is None else self._server.bytes_received

    @property
    def bytes_sent(self) -> int:
        """Bytes that went to parties, without the transport's own."""
        return self._traffic[1] if self._server is None else self._server.bytes_sent

    def broadcast(self, task: Task) -> None:
        """Send all parties a task.

        Args:
            task: never sent before in this session; a repetition needs a new trajectory number.

        Raises:
            InputError: if it was sent before.
            PeerLost: if a party is lost.
            SessionRefused: if the session has ended.
        """
        with self._changed:
            self._raise_failure()
            if task.digest in self._tasks:
                raise InputError(
                    f"The task {task.kind} of trajectory {task.trajectory} was sent before: its masks can't be used"
                    " again.",
                    "Give the repetition a new trajectory number.",
                )
            if self._machine.lost:
                loss = self._machine.peer_lost()
                self._in_loop(lambda: self._fail(loss))
                raise loss
            message = self._machine.begin_task(lambda number: TaskMessage(number, task))
            self._tasks[task.digest] = message.number
        frame = message.encode()
        self._in_loop(lambda: self._send_all(frame))

    def receive_from(self, tensor: str, task: Task) -> PartialSum:
        """Wait for a total that the parties open to the coordinator in a task, and hear whose it is.

        Args:
            tensor: its name.
            task: which was broadcast.

        Returns:
            The sum, of all parties but where the manifest lets a round lose some; the next one, if the task opens the
            name several times.

        Raises:
            PeerLost: if a party is lost.
            SessionRefused: if a party broke the rules or refused to go on.
        """
        number, totals = self._number(task), self._totals[task.digest, tensor]
        self._wait(lambda: bool(totals) or self._all_done(number))
        if not totals:
            raise SessionRefused(f"The parties did the task {task.kind} without opening {tensor!r}.")
        return totals.popleft()

    def receive(self, tensor: str, task: Task) -> NDArray[np.int64]:
        """Wait for a total of *all* parties that they open to the coordinator in a task.

        Args:
            tensor: its name.
            task: which was broadcast.

        Returns:
            [words] the sum mod 2^64; the next one, if the task opens the name several times.

        Raises:
            PeerLost: if a party is lost, also if the others opened their sum without it.
            SessionRefused: if a party broke the rules or refused to go on.
        """
        opened = self.receive_from(tensor, task)
        missing = [party for party in self.parties if party not in opened.parties]
        if missing:
            raise PeerLost(", ".join(missing), f"{tensor!r} was opened without it")
        return opened.words

    def releases(self, task: Task) -> dict[str, Release]:
        """Wait until all parties have done a task.

        Args:
            task: which was broadcast.

        Returns:
            Party → what it releases, for those that consented.

        Raises:
            PeerLost: if a party is lost.
            SessionRefused: if a party broke the rules or refused to go on.
        """
        number = self._number(task)
        self._wait(lambda: self._all_done(number))
        done = self._done[number]
        return {party: release for party in self.parties if (release := done.get(party)) is not None}

    @property
    def partings(self) -> dict[str, Release]:
        """What the parties gave on leaving; none before the session is closed."""
        done = self._done.get(self._tasks.get(_FINISH.digest, -1), {})
        return {party: release for party, release in done.items() if release is not None}

    def close(self, reason: str = "") -> None:
        """End the session; safe to call twice.

        Args:
            reason: why it ends early; "" if its work is done.
        """
        server = self._server
        if server is None:
            return
        with self._changed:
            running = self._failure is None and self._machine.phase == Phase.READY
        if running and not reason:
            try:
                if _FINISH.digest not in self._tasks:
                    self.broadcast(_FINISH)
                self._wait(lambda: len(self._done[self._number(_FINISH)]) == len(self.parties), _FAREWELL_SECONDS)
            except LpmError as problem:
                _log.warning("a party did not say goodbye: %s", problem)
        elif self._failure is None:
            self._in_loop(lambda: self._fail(PeerLost(COORDINATOR, reason or "it stopped")))
        self._in_loop(self._end_all)
        with self._changed:
            self._changed.wait_for(lambda: not self._connected, _FAREWELL_SECONDS)
        self._traffic = (server.bytes_received, server.bytes_sent)
        self._server = None
        server.stop()

    # What the streams tell, in their thread.

    def connected(self, party: str) -> bytes:
        """See `Listener.connected`."""
        with self._changed:
            if self._ending or self._failure is not None:
                raise SessionRefused(f"The session has ended{'' if self._failure is None else f': {self._failure}'}")
            welcome = self._machine.welcome(party)
            self._connected.add(party)
            return welcome

    def disconnected(self, party: str) -> None:
        """See `Listener.disconnected`."""
        with self._changed:
            self._connected.discard(party)
            self._changed.notify_all()
            said_goodbye = party in self._done.get(self._tasks.get(_FINISH.digest, -1), {})
            if said_goodbye or self._ending or self._failure is not None or self._machine.forget(party):
                return
            failure = self._lose(party, PeerLost(party, "its connection broke or it stopped answering"))
        if failure is not None:
            self._fail(failure)

    def _lose(self, party: str, loss: PeerLost) -> LpmError | None:
        """Go on without a party where the rounds under way allow it; what ends the session if they do not."""
        led = self._machine.lose(party)
        if led is None:
            return loss
        _log.warning("%s Rounds that need nobody in particular go on.", loss.message)
        return self._follow(*led)

    def _follow(self, frames: Sequence[tuple[str, bytes]], steps: Sequence[Step]) -> LpmError | None:
        self._send_frames(frames)
        failures = [failure for step in steps if (failure := self._step(step)) is not None]
        for number, done in self._done.items():
            if done and self._all_done(number):
                self._unwatch(number)
        self._changed.notify_all()
        return failures[0] if failures else None

    def _all_done(self, number: int) -> bool:
        """Whether everybody who is still here has done a task."""
        return set(self.parties) - set(self._machine.lost) <= set(self._done[number])

    def frame(self, party: str, frame: bytes) -> None:
        """See `Listener.frame`."""
        with self._changed:
            if self._failure is not None:
                return
            try:
                frames, news = self._machine.receive(party, frame)
            except (SessionRefused, PeerLost) as problem:
                failure: LpmError | None = problem
            else:
                failure = self._take(party, news)
                self._send_frames(frames)
        if failure is not None:
            self._fail(failure)

    def _send_frames(self, frames: Sequence[tuple[str, bytes]]) -> None:
        for to, reply in frames:
            self._send(to, reply)

    def _step(self, step: Step) -> LpmError | None:
        """What a round that can lose parties has come to."""
        if step.lost:
            return PeerLost(", ".join(self.parties[place] for place in step.lost), "too few are left to open a sum")
        if step.composed is not None:
            self._composed(step.composed)
        else:
            self._watch((step.round, step.stage), self._deadline)
        return None

    def _composed(self, composed: Composed) -> None:
        self.rounds += 1
        self._unwatch(composed.round)
        for stage in Stage:
            self._unwatch((composed.round, stage))
        final = composed.refusal is not None and (composed.refusal.diverged or composed.refusal.abort)
        self._refusal = composed.refusal if final else None
        if composed.total is not None:
            everybody = tuple(range(len(self.parties)))
            who = everybody if composed.survivors is None else composed.survivors
            self._totals[composed.round.parameters, composed.round.tensor].append(
                PartialSum(composed.total, tuple(self.parties[place] for place in who))
            )
            self._changed.notify_all()

    def _take(self, party: str, news: Message | Composed | Step | None) -> LpmError | None:
        if isinstance(news, Step):
            return self._step(news)
        if isinstance(news, Share):
            self._watch(news.header.round, self._deadline)
            return None  # nobody waits for a share alone
        if isinstance(news, Composed):
            self._composed(news)
            return None
        if isinstance(news, Done):
            self._done[news.number][party] = news.release
            self._watch(news.number, _TASK_DEADLINES * self._deadline)
            if self._all_done(news.number):
                self._unwatch(news.number)
        elif isinstance(news, Leave):
            if self._machine.forget(party):
                return None  # who gives up before the session is formed is missing, not lost; it may come again
            # If the last round was called off for good, that is why the party leaves, and what a user wants to know.
            return self._refusal or self._lose(party, PeerLost(party, news.reason or "it left the session"))
        elif isinstance(news, Refused):
            return SessionRefused(f"{party} refused the session: {news.reason}")
        self._changed.notify_all()
        return None

    def _watch(self, what: _Awaited, seconds: float) -> None:
        """From the first party's answer in a round, or to a task, the others have so long."""
        if what not in self._timers:
            assert self._server is not None
            self._timers[what] = self._server.loop.call_later(seconds, self._overdue, what, seconds)

    def _unwatch(self, what: _Awaited) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()

    def _overdue(self, what: _Awaited, seconds: float) -> None:
        failure: LpmError | None = None
        with self._changed:
            if isinstance(what, tuple):
                failure = self._follow(*self._machine.expire(*what))
                late = []
            elif isinstance(what, Round):
                late = self._machine.waiting_for(what)
            else:
                late = [party for party in self.parties if party not in self._done[what]]
        if late:
            failure = PeerLost(", ".join(late), f"no answer within {seconds:g} s")
        if failure is not None:
            self._fail(failure)

    def _fail(self, failure: LpmError) -> None:
        with self._changed:
            if self._failure is not None:
                return
            self._failure = failure
            self._machine.phase = Phase.ENDED
            self._changed.notify_all()
        _log.warning("%s", failure)
        message = Lost(failure.party, failure.reason) if isinstance(failure, PeerLost) else Refused(str(failure))
        self._send_all(message.encode())  # also to the lost one: it may only have been slow
        self._end_all()

    def _end_all(self) -> None:
        self._ending = True
        for timer in self._timers.values():
            timer.cancel()
        if self._server is not None:
            for party in self.parties:
                self._server.end(party)

    def _send(self, party: str, frame: bytes) -> None:
        if self._server is not None:
            self._server.send(party, frame)

    def _send_all(self, frame: bytes) -> None:
        for party in self.parties:
            self._send(party, frame)

    # What callers wait for, in theirs.

    def _number(self, task: Task) -> int:
        try:
            return self._tasks[task.digest]
        except KeyError:
            raise InputError(f"The task {task.kind} of trajectory {task.trajectory} was not broadcast.") from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._server is None:
            raise SessionRefused("The session is closed.")

    def _wait(self, ready: Callable[[], bool], seconds: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ready() or self._failure is not None or self._server is None, seconds)
            if not ready():
                self._raise_failure()
                raise PeerLost("a party", f"no answer within {seconds or 0:g} s")

    def _in_loop(self, action: Callable[[], object]) -> None:
        server = self._server
        if server is not None and not server.loop.is_closed():
            server.loop.call_soon_threadsafe(action)

    def _gather(self, server: StreamServer, seconds: float) -> None:
        self._server = server
        until = time.monotonic() + seconds
        try:
            server.start()
            with self._changed:
                ready = self._changed.wait_for(
                    lambda: self._failure is not None or self._machine.phase == Phase.READY,
                    max(0.0, until - time.monotonic()),
                )
                missing = self._machine.missing
                self._raise_failure()
            if not ready:
                raise SessionRefused(
                    f"Not all parties joined within {seconds:g} s: {', '.join(missing) or 'one did not sign'} missing.",
                    "Start them (they wait for the coordinator), or give them more time.",
                )
        except BaseException as problem:
            failure = problem if isinstance(problem, SessionRefused) else PeerLost(COORDINATOR, "it stopped")
            self._in_loop(lambda: self._fail(failure))
            self.close("it stopped")
            raise


def gather(config: CoordinatorConfig, terms: Terms, *, tap: Tap | None = None) -> CoordinatorSession:
    """Listen, wait for all parties of the roster, and form a session with them.

    Args:
        config: who, where, and how long to wait.
        terms: what the parties are to sign.
        tap: for tests; hears every frame inside TLS.

    Returns:
        The session, ready for tasks; close it, or use it in a `with` statement.

    Raises:
        InputError: if the configuration can't be used.
        SessionRefused: if a party is missing, or somebody's keys, scenario or signature are not in order.
        PeerLost: if a party went away meanwhile.
    """
    require_engine(config.sharing)
    identity = load_identity(own_folder(config.keys), COORDINATOR)
    machine = CoordinatorMachine(identity, config.parties, terms)
    session = CoordinatorSession(machine, terms.deadline_seconds)
    session._gather(StreamServer(config.data_address, identity, session, tap), config.join_seconds)
    if terms.sharing == "masked":
        _log.info("%s", dropout_note(len(config.parties), terms.droppable))
    return session

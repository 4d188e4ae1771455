"""Droppable rounds without threads or clocks: each message, loss and deadline is an event in a queue."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm.errors import SessionRefused
from lpm.privacy.dropout import DroppableParty, Witness
from lpm.privacy.recovery import DroppableRounds, Step
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Header, Opening, Round, Stage

MESSAGES = [(stage, way) for stage in Stage for way in ("up", "down")]
"""The messages of a round in order: what a party sends, and what it is sent."""


class CheapWitness(Witness):
    """Signatures that cost nothing, where thousands of rounds are run; the real ones are tested elsewhere."""

    def __init__(self, place: int) -> None:
        self._place = place

    def sign(self, message: bytes) -> bytes:
        return hashlib.sha512(bytes((self._place,)) + message).digest()

    def name(self, place: int) -> str:
        return f"party {place}"

    def require(self, place: int, message: bytes, signature: bytes) -> None:
        if CheapWitness(place).sign(message) != signature:
            raise SessionRefused(f"party {place} did not sign what it is said to have signed.")


@dataclass
class Droppable:
    """One droppable round of n parties.

    Args:
        keys: of the session.
        words: [n, count] contributions.
        lost: place → which of `MESSAGES` does not arrive any more, by its number.
        at_once: losses are noticed when they happen; else by deadlines.
        witnesses: identities; cheap ones if none are given.
        change_up: may alter what a party sends: (place, stage, parts) → parts.
        change_down: may alter what a party is sent.
    """

    keys: Sequence[SessionKeys]
    words: NDArray[np.uint64]
    lost: dict[int, int] = field(default_factory=dict)
    at_once: bool = True
    witnesses: Sequence[Witness] = ()
    change_up: Callable[[int, Stage, list[bytes]], list[bytes]] = lambda place, stage, parts: parts
    change_down: Callable[[int, Stage, list[bytes]], list[bytes]] = lambda place, stage, parts: parts
    round: Round = field(default_factory=lambda: Round(0, 0, "loss", 0, bytes(32)))
    consent: Callable[[tuple[int, ...]], None] = lambda survivors: None

    def __post_init__(self) -> None:
        n = len(self.keys)
        self.witnesses = self.witnesses or [CheapWitness(place) for place in range(n)]
        self.hub = DroppableRounds([f"party {p}" for p in range(n)], self.keys[0].binding, self.witnesses[0].require)
        self.headers = [Header(self.round, Opening.COORDINATOR, k.me, b"d" * 32) for k in self.keys]
        self.parties = [
            DroppableParty(self.keys[i], self.witnesses[i], self.headers[i], self.words[i], self.consent)
            for i in range(n)
        ]
        self.sent: dict[tuple[int, Stage], list[bytes]] = {}
        self.refused: dict[int, SessionRefused] = {}
        self.last: Step | None = None
        self._queue: deque[tuple[int, Stage, list[bytes]]] = deque()

    def run(self) -> Step:
        """Until the round ends or can't be opened; fails if it would hang past its deadlines."""
        for place, party in enumerate(self.parties):
            self._up(place, Stage.SEEDS, party.begin())
        for _ in range(1000):
            if self.last is not None and (self.last.composed is not None or self.last.lost):
                return self.last
            if self._queue:
                place, stage, parts = self._queue.popleft()
                step = self.hub.receive(place, self.headers[place], stage, parts)
                self._take([] if step is None else [step])
            else:
                stage_now = self.hub.stage(self.round)
                assert stage_now is not None
                steps = self.hub.expire(self.round, stage_now)
                assert steps, "a deadline that leads to nothing is a hang"
                self._take(steps)
        raise AssertionError("the round does not end")

    def _up(self, place: int, stage: Stage, parts: list[bytes]) -> None:
        if self.lost.get(place) == MESSAGES.index((stage, "up")):
            self._gone(place)
            return
        self.sent[place, stage] = parts
        self._queue.append((place, stage, self.change_up(place, stage, parts)))

    def _gone(self, place: int) -> None:
        if self.at_once:
            self._take(self.hub.lose(place))

    def _take(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.last = step
            if step.composed is not None or step.lost:
                return
            for place, parts in step.answers.items():
                if self.lost.get(place) == MESSAGES.index((step.answered, "down")):
                    self._gone(place)
                    continue
                if place in self.refused:
                    continue
                try:
                    answer = self.parties[place].receive(self.change_down(place, step.answered, parts))
                except SessionRefused as problem:
                    self.refused[place] = problem
                    continue
                if answer is not None:
                    self._up(place, *answer)


def total(words: NDArray[np.uint64], places: Sequence[int]) -> NDArray[np.int64]:
    """The sum of some parties' words."""
    summed: Any = words[list(places)].sum(axis=0, dtype=np.uint64)
    return np.asarray(summed, dtype=np.uint64).view(np.int64)

"""The fake beside the seam: n parties in n threads of one process, with real keys and no sockets.

For tests and for harnesses that hold all shards anyway; it isolates nobody from anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from lpm.errors import PeerLost, RoundRefused, SessionRefused
from lpm.privacy import make_engine
from lpm.privacy.composition import Composed, RoundComposer
from lpm.privacy.dropout import Witness
from lpm.privacy.masks import agree
from lpm.privacy.recovery import DroppableRounds, Step
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Channel, Header, Opening, Parcel, Round, SecureSum, Stage, require_enough

__all__ = ["MemoryHub", "MemoryWitness", "in_memory_sums", "session_keys", "witnesses"]


class MemoryWitness(Witness):
    """A party's identity in memory.

    Args:
        own: its key.
        everybody: all parties' public keys, in roster order.
    """

    def __init__(self, own: Ed25519PrivateKey, everybody: Sequence[Ed25519PublicKey]) -> None:
        self._own, self._everybody = own, everybody

    def sign(self, message: bytes) -> bytes:
        return self._own.sign(message)

    def name(self, place: int) -> str:
        return f"party {place}"

    def require(self, place: int, message: bytes, signature: bytes) -> None:
        try:
            self._everybody[place].verify(signature, message)
        except InvalidSignature:
            raise SessionRefused(f"{self.name(place)} did not sign what it is said to have signed.") from None


def witnesses(parties: int) -> list[MemoryWitness]:
    """Fresh identities of a whole session, all in one place: for tests and harnesses only."""
    own = [Ed25519PrivateKey.generate() for _ in range(parties)]
    everybody = [key.public_key() for key in own]
    return [MemoryWitness(key, everybody) for key in own]


class MemoryHub:
    """The coordinator's part in memory: composes rounds and keeps the totals opened to it.

    Args:
        parties: how many channels it serves.
        deadline_seconds: how long a round waits for its last party.
        witness: checks signatures of droppable rounds.
        binding: 32 bytes that stand for the manifest's digest.
    """

    def __init__(
        self,
        parties: int,
        deadline_seconds: float = 60.0,
        witness: Witness | None = None,
        binding: bytes = bytes(32),
    ) -> None:
        self.parties = parties
        self.totals: dict[Round, NDArray[np.int64]] = {}
        self.survivors: dict[Round, tuple[int, ...]] = {}
        self.headers: list[tuple[int, Header]] = []
        self.bodies: list[tuple[int, tuple[bytes, ...]]] = []
        self.rounds = 0
        self._deadline = deadline_seconds
        self._composer = RoundComposer(parties)
        self._done: dict[Round, tuple[Composed, set[int]]] = {}
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._droppable: DroppableRounds | None = None
        if witness is not None:
            names = [witness.name(place) for place in range(parties)]
            self._droppable = DroppableRounds(names, binding, witness.require)
        self._answers: dict[tuple[Round, Stage, int], tuple[list[bytes], RoundRefused | None]] = {}

    def channels(self) -> list[Channel]:
        """One channel per party, in roster order."""
        return [_MemoryChannel(self, place) for place in range(self.parties)]

    def fail(self, failure: Exception) -> None:
        """Make every round under way, and all later ones, raise this at every party."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def lose(self, party: int) -> None:
        """A party has gone: droppable rounds go on without it, all others fail."""
        with self._changed:
            assert self._droppable is not None
            self._take(self._droppable.lose(party))

    def converse(self, party: int, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        """Take one party's message of a droppable round and wait for the answer.

        Args:
            party: its place.
            header: the plain part.
            stage: which message.
            parts: of the message.

        Returns:
            The parts of the answer.

        Raises:
            RoundRefused: if anybody raised a flag or the digests differ.
            PeerLost: if too few parties are left, or this one was too late.
            SessionRefused: naming a party that broke the rules.
        """
        key = (header.round, stage, party)
        with self._changed:
            assert self._droppable is not None
            self.headers.append((party, header))
            self.bodies.append((party, tuple(parts)))
            try:
                step = self._droppable.receive(party, header, stage, parts)
            except SessionRefused as problem:
                self._failure = problem
                self._changed.notify_all()
                raise
            self._take([] if step is None else [step])
            if not self._changed.wait_for(lambda: key in self._answers or self._failure, self._deadline):
                self._take(self._droppable.expire(header.round, stage))
            if key not in self._answers:
                raise self._failure or PeerLost(f"party {party}", "it answered too late")
            answer, refusal = self._answers.pop(key)
        if refusal is not None:
            raise RoundRefused(rescale=refusal.rescale, diverged=refusal.diverged, abort=refusal.abort)
        return answer

    def _take(self, steps: Sequence[Step]) -> None:
        for step in steps:
            composed = step.composed
            refusal = None if composed is None else composed.refusal
            for place, parts in step.answers.items():
                self._answers[step.round, step.answered, place] = (parts, refusal)
            if composed is not None and composed.total is not None:
                self.rounds += 1
                self.totals[step.round] = composed.total
                self.survivors[step.round] = composed.survivors or ()
            if step.lost:
                names = ", ".join(f"party {place}" for place in step.lost)
                self._failure = PeerLost(names, "too few are left to open the round")
        self._changed.notify_all()

    def answer(self, party: int, header: Header, bodies: Sequence[bytes]) -> Composed:
        """Take one party's message and wait for the round.

        Args:
            party: its place.
            header: the plain part.
            bodies: sealed messages or a masked share.

        Returns:
            The composed round.

        Raises:
            RoundRefused: if anybody raised a flag or the digests differ.
            PeerLost: if a party did not answer in time.
        """
        with self._changed:
            self.headers.append((party, header))
            self.bodies.append((party, tuple(bodies)))
            composed = self._composer.add(party, header, bodies)
            if composed is not None:
                self.rounds += 1
                if composed.total is not None:
                    self.totals[header.round] = composed.total
                self._done[header.round] = (composed, set(range(self.parties)))
                self._changed.notify_all()
            ready = self._changed.wait_for(lambda: header.round in self._done or self._failure, self._deadline)
            if self._failure is not None:
                raise self._failure
            if not ready:
                missing = self._composer.waiting_for(header.round)
                raise PeerLost(f"party {missing[0]}" if missing else "a party", "no answer within the deadline")
            composed, readers = self._done[header.round]
            readers.discard(party)
            if not readers:
                del self._done[header.round]
        if composed.refusal is not None:
            refusal = composed.refusal
            raise RoundRefused(rescale=refusal.rescale, diverged=refusal.diverged, abort=refusal.abort)
        return composed


class _MemoryChannel(Channel):
    def __init__(self, hub: MemoryHub, me: int) -> None:
        self._hub = hub
        self.parties = hub.parties
        self.me = me

    def exchange(self, header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        assert header.opening == Opening.PARTIES
        return self._hub.answer(self.me, header, bodies).parcels[self.me]

    def combine(self, header: Header, body: bytes) -> bytes:
        composed = self._hub.answer(self.me, header, [body] if not header.raised else [])
        if header.opening == Opening.DEALT:
            return bytes(composed.parcels[self.me][0].body)
        assert header.opening == Opening.PARTIES_BY_SUM
        return composed.masked

    def converse(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        return self._hub.converse(self.me, header, stage, parts)

    def deliver(self, header: Header, body: bytes) -> None:
        assert header.opening == Opening.COORDINATOR
        self._hub.answer(self.me, header, [body] if not header.raised else [])


def session_keys(parties: int, binding: bytes = bytes(32)) -> list[SessionKeys]:
    """Fresh keys of a whole session, all in one place: for tests and harnesses only.

    Args:
        parties: how many.
        binding: 32 bytes that stand for the manifest's digest.

    Returns:
        Each party's keys, the group's key agreed.
    """
    private = [X25519PrivateKey.generate() for _ in range(parties)]
    public = [key.public_key().public_bytes_raw() for key in private]
    keys = [
        SessionKeys(me, parties, binding, {j: agree(private[me], public[j]) for j in range(parties) if j != me})
        for me in range(parties)
    ]
    bundles = [each.group_contributions() for each in keys]
    for me, each in enumerate(keys):
        each.set_group_key([bundles[j][me - (me > j)] for j in range(parties) if j != me])
    return keys


def in_memory_sums(
    parties: int, engine: str = "crypten", droppable: Collection[str] = (), thresholds: Collection[str] = ()
) -> tuple[MemoryHub, list[SecureSum]]:
    """Engines of n parties that meet in memory, one for each of n threads.

    Args:
        parties: how many, at least 3.
        engine: one of `lpm.privacy.ENGINES`.
        droppable: tensors whose rounds can lose parties.
        thresholds: tensors whose cells are opened above a threshold only.

    Returns:
        The hub, which keeps what is opened to the coordinator, and each party's secure sum.

    Raises:
        InputError: for fewer than three parties.
    """
    require_enough(parties)
    identities = witnesses(parties)
    hub = MemoryHub(parties, witness=identities[0])
    return hub, [
        make_engine(engine, keys, channel, droppable, witness, thresholds)
        for keys, channel, witness in zip(session_keys(parties), hub.channels(), identities, strict=True)
    ]

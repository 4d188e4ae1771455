"""The fake beside the seam: n parties in n threads of one process, with real keys and no sockets.

For tests and for harnesses that hold all shards anyway; it isolates nobody from anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from lpm.errors import PeerLost, RoundRefused
from lpm.privacy import make_engine
from lpm.privacy.composition import Composed, RoundComposer
from lpm.privacy.masks import agree
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Channel, Header, Opening, Parcel, Round, SecureSum, require_enough

__all__ = ["MemoryHub", "in_memory_sums", "session_keys"]


class MemoryHub:
    """The coordinator's part in memory: composes rounds and keeps the totals opened to it.

    Args:
        parties: how many channels it serves.
        deadline_seconds: how long a round waits for its last party.
    """

    def __init__(self, parties: int, deadline_seconds: float = 60.0) -> None:
        self.parties = parties
        self.totals: dict[Round, NDArray[np.int64]] = {}
        self.headers: list[tuple[int, Header]] = []
        self.bodies: list[tuple[int, tuple[bytes, ...]]] = []
        self.rounds = 0
        self._deadline = deadline_seconds
        self._composer = RoundComposer(parties)
        self._done: dict[Round, tuple[Composed, set[int]]] = {}
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def channels(self) -> list[Channel]:
        """One channel per party, in roster order."""
        return [_MemoryChannel(self, place) for place in range(self.parties)]

    def fail(self, failure: Exception) -> None:
        """Make every round under way, and all later ones, raise this at every party."""
        with self._changed:
            self._failure = failure
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


def in_memory_sums(parties: int, engine: str = "crypten") -> tuple[MemoryHub, list[SecureSum]]:
    """Engines of n parties that meet in memory, one for each of n threads.

    Args:
        parties: how many, at least 3.
        engine: one of `lpm.privacy.ENGINES`.

    Returns:
        The hub, which keeps what is opened to the coordinator, and each party's secure sum.

    Raises:
        InputError: for fewer than three parties.
    """
    require_enough(parties)
    hub = MemoryHub(parties)
    return hub, [
        make_engine(engine, keys, channel)
        for keys, channel in zip(session_keys(parties), hub.channels(), strict=True)
    ]

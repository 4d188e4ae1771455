"""What the relay does with a round: wait for everybody, act on the plain headers, pass sealed copies on or add up.

A pure state machine shared by the coordinator's relay and the in-memory channel. It reads headers only: bodies are
sealed, or masked words of which only the sum of all means anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lpm.errors import RoundRefused, SessionRefused
from lpm.privacy.dealer import deal
from lpm.privacy.secure_sum import Header, Opening, Parcel, Round

__all__ = ["Composed", "RoundComposer"]


@dataclass(frozen=True, repr=False)
class Composed:
    """A round that everybody has answered.

    Args:
        round: which.
        opening: to whom it is opened.
        refusal: why nobody opens it; None if it is opened.
        parcels: [n][n − 1] messages for each party, in roster order of senders (opened to the parties).
        total: [words] sum mod 2^64 (opened to the coordinator).
        survivors: places whose sum the total is, if not everybody's.
        masked: [words] sum under the parties' own mask, for all of them (opened to the parties by a sum).
    """

    round: Round
    opening: Opening
    refusal: RoundRefused | None = None
    parcels: Sequence[Sequence[Parcel]] = ()
    total: NDArray[np.int64] | None = None
    survivors: tuple[int, ...] | None = None
    masked: bytes = b""


@dataclass
class _Pending:
    headers: dict[int, Header] = field(default_factory=dict)
    bodies: dict[int, Sequence[bytes | memoryview]] = field(default_factory=dict)


class RoundComposer:
    """Gathers the parties' messages of each round.

    Args:
        parties: how many there are.
        at_once: how many rounds may be under way; more are a broken or hostile party.
    """

    def __init__(self, parties: int, at_once: int = 64) -> None:
        self._parties = parties
        self._at_once = at_once
        self._pending: dict[bytes, _Pending] = {}

    @property
    def under_way(self) -> bool:
        """Whether any round waits for a party."""
        return bool(self._pending)

    def waiting_for(self, round: Round) -> list[int]:
        """Places of the parties that have not answered a round that is under way; none if it is not."""
        pending = self._pending.get(round.context())
        return [] if pending is None else [i for i in range(self._parties) if i not in pending.headers]

    def add(self, party: int, header: Header, bodies: Sequence[bytes | memoryview]) -> Composed | None:
        """Take a party's message.

        Args:
            party: its place in the roster.
            header: the plain part.
            bodies: n − 1 sealed messages, or one masked share, or none if the header raises a flag.

        Returns:
            What to do, once everybody has answered; None before.

        Raises:
            SessionRefused: if a party answers twice, opens to somebody else, or sends too much.
        """
        key = header.round.context()
        pending = self._pending.get(key)
        if pending is None:
            if len(self._pending) >= self._at_once:
                raise SessionRefused(f"Party {party} has more than {self._at_once} rounds under way.")
            pending = self._pending[key] = _Pending()
        if party in pending.headers:
            raise SessionRefused(f"Party {party} answered the round {header.round.tensor!r} twice.")
        if any(other.opening != header.opening for other in pending.headers.values()):
            raise SessionRefused(f"Party {party} opens {header.round.tensor!r} to somebody else than the others do.")
        wanted = 0 if header.raised else self._parties - 1 if header.opening == Opening.PARTIES else 1
        if len(bodies) != wanted or len({len(body) for body in bodies}) > 1:
            raise SessionRefused(
                f"Party {party} sent {len(bodies)} parts in {header.round.tensor!r}: {wanted}, equally long."
            )
        pending.headers[party], pending.bodies[party] = header, bodies
        if len(pending.headers) < self._parties:
            return None
        del self._pending[key]
        return self._compose(pending)

    def _compose(self, pending: _Pending) -> Composed:
        headers = [pending.headers[i] for i in range(self._parties)]
        first = headers[0]
        lengths = {len(body) for bodies in pending.bodies.values() for body in bodies}
        rescale = any(header.rescale for header in headers)
        abort = next((header.abort for header in headers if header.abort), "")
        diverged = any(header.digest != first.digest for header in headers)
        if len(lengths) > 1:
            abort = abort or f"the parties' tensors {first.round.tensor!r} have different lengths"
        if rescale or abort or diverged:
            refusal = RoundRefused(rescale=rescale, diverged=diverged, abort=abort)
            return Composed(first.round, first.opening, refusal)
        if first.opening == Opening.DEALT:
            return self._deal(first, [pending.bodies[i][0] for i in range(self._parties)])
        if first.opening != Opening.PARTIES:
            return self._add_up(first, [pending.bodies[i][0] for i in range(self._parties)])
        parcels = [
            # A party's bundle leaves itself out, so a later receiver's copy stands one place earlier.
            [
                Parcel(headers[sender].sequence, pending.bodies[sender][to - (to > sender)])
                for sender in range(self._parties)
                if sender != to
            ]
            for to in range(self._parties)
        ]
        return Composed(first.round, first.opening, parcels=parcels)

    def _deal(self, header: Header, requests: Sequence[bytes | memoryview]) -> Composed:
        if any(bytes(each) != bytes(requests[0]) for each in requests):
            refusal = RoundRefused(abort=f"the parties ask the dealer for different things in {header.round.tensor!r}")
            return Composed(header.round, header.opening, refusal)
        shares = deal(requests[0], self._parties)
        return Composed(header.round, header.opening, parcels=[[Parcel(0, share)] for share in shares])

    def _add_up(self, header: Header, shares: Sequence[bytes | memoryview]) -> Composed:
        if len(shares[0]) % 8:
            refusal = RoundRefused(abort=f"the shares of {header.round.tensor!r} are not made of 64-bit words")
            return Composed(header.round, header.opening, refusal)
        total = np.zeros(len(shares[0]) // 8, dtype=np.uint64)
        for share in shares:
            total += np.frombuffer(share, dtype="<u8")
        if header.opening == Opening.PARTIES_BY_SUM:
            return Composed(header.round, header.opening, masked=total.tobytes())
        return Composed(header.round, header.opening, total=total.view(np.int64))

"""The contract of a secure sum: how parties that do not trust each other add up, and only the total is opened.

It is the federated form of ⊕ in the update s' = f(s, ⊕ m, ℓ, e) (eq. 1) and of the sums of eq. 9–10. An engine
implements `SecureSum` over a `Channel` it is handed, and holds no socket.
"""

from __future__ import annotations

import enum
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError

__all__ = [
    "MINIMUM_PARTIES",
    "Channel",
    "Consent",
    "Flags",
    "Header",
    "Opening",
    "Parcel",
    "Round",
    "SecureSum",
    "Stage",
    "require_enough",
]

Consent = Callable[[tuple[int, ...]], None]
"""Called with the places whose sum is about to be opened, before anything is revealed; refuses by raising."""

_ROUND = struct.Struct("<QqI32sB")
_TENSOR_BYTES = 64
_ABORT_CHARACTERS = 200


MINIMUM_PARTIES = 3
"""A sum over two parties tells each the other's part."""


def require_enough(parties: int) -> None:
    """Refuse a sum over too few parties.

    Args:
        parties: how many there are.

    Raises:
        InputError: for fewer than three.
    """
    if parties < MINIMUM_PARTIES:
        raise InputError(
            f"A secure sum of {parties} parties hides nothing: at least {MINIMUM_PARTIES}.",
            "The sum of two parties tells each the other's part.",
        )


@dataclass(frozen=True)
class Round:
    """The address of one opening: no two openings of a session share one.

    Args:
        trajectory: number of the simulation within the session.
        step: its time step; reverse passes may count from any number.
        tensor: name of what is summed, at most 64 bytes.
        attempt: grows each time the same sum was refused and is tried again.
        parameters: 32-byte hash of the task and its parameters, so that parties with other parameters cannot agree.

    Raises:
        InputError: for a number or a name that does not fit.
    """

    trajectory: int
    step: int
    tensor: str
    attempt: int
    parameters: bytes

    def __post_init__(self) -> None:
        name = self.tensor.encode()
        if not 0 < len(name) <= _TENSOR_BYTES:
            raise InputError(f"The tensor name {self.tensor!r} has {len(name)} bytes: from 1 to {_TENSOR_BYTES}.")
        if not (0 <= self.trajectory < 2**64 and -(2**63) <= self.step < 2**63 and 0 <= self.attempt < 2**32):
            raise InputError(f"The round {self.trajectory}/{self.step}/{self.attempt} is numbered out of range.")
        if len(self.parameters) != 32:
            raise InputError(f"A round's parameter hash has {len(self.parameters)} bytes: 32.")

    def context(self) -> bytes:
        """Canonical bytes: equal if and only if the rounds are equal."""
        name = self.tensor.encode()
        return _ROUND.pack(self.trajectory, self.step, self.attempt, self.parameters, len(name)) + name


@dataclass(frozen=True)
class Flags:
    """What a party says along with its contribution.

    Args:
        digest: of its replica of the environment; all must agree. It leaves the party only under the group's key.
        rescale: its contribution exceeds the tensor's scale; nobody opens, all choose a larger one.
        abort: why it can't go on (never a private value); "" to go on.
    """

    digest: bytes = b""
    rescale: bool = False
    abort: str = ""

    @property
    def raised(self) -> bool:
        """Whether the party asks that nobody opens."""
        return self.rescale or bool(self.abort)


class Opening(enum.IntEnum):
    """To whom a total is opened, and by whom it is added up."""

    PARTIES = 1
    """To the parties: each sends every other a sealed copy, and adds up."""
    COORDINATOR = 2
    """To the coordinator, which adds up masked words."""
    PARTIES_BY_SUM = 3
    """To the parties: the coordinator adds up masked words and hands all the sum, under a mask it can't take off."""
    DEALT = 4
    """To nobody: the coordinator deals each party its share of something random (`lpm.privacy.dealer`)."""


class Stage(enum.IntEnum):
    """Which message of a droppable round: what goes up, and what comes down once enough have sent theirs."""

    SEEDS = 1
    CONTRIBUTION = 2
    SIGNATURE = 3
    REVEAL = 4


@dataclass(frozen=True)
class Header:
    """The plain part of a message up, on which the relay acts.

    Args:
        round: which opening.
        opening: to whom.
        sequence: number of this message among all of its sender in this session.
        digest: 32 bytes, the environment's digest under the group's key.
        rescale: as in `Flags`.
        abort: as in `Flags`, cut to 200 characters.
    """

    round: Round
    opening: Opening
    sequence: int
    digest: bytes
    rescale: bool = False
    abort: str = ""

    def __post_init__(self) -> None:
        if len(self.digest) != 32 or not 0 <= self.sequence < 2**64:
            raise InputError("A round's header has a digest of 32 bytes and a sequence number of 64 bits.")
        object.__setattr__(self, "abort", self.abort[:_ABORT_CHARACTERS])

    @property
    def raised(self) -> bool:
        """Whether the sender asks that nobody opens."""
        return self.rescale or bool(self.abort)


@dataclass(frozen=True, repr=False)
class Parcel:
    """A sealed message from one party to another, as the relay passes it on."""

    sequence: int
    body: bytes | memoryview


class Channel(ABC):
    """The way from one party to the others and to the coordinator, which sees only sealed or masked bytes.

    Messages are matched by the round in their header, so several rounds may be under way at once, each from its own
    thread.
    """

    parties: int
    me: int

    @abstractmethod
    def exchange(self, header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        """Give every other party its own message and wait for theirs.

        Args:
            header: of this message.
            bodies: [n − 1] sealed messages to the others, in roster order; empty if the header raises a flag.

        Returns:
            [n − 1] messages from the others, in roster order.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            PeerLost: naming who went away.
        """

    @abstractmethod
    def combine(self, header: Header, body: bytes) -> bytes | memoryview:
        """Give the coordinator masked words and get the sum of everybody's, which it can't read either.

        Args:
            header: of this message.
            body: the masked words; empty if the header raises a flag.

        Returns:
            The sum of all bodies, word by word mod 2^64.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            PeerLost: naming who went away.
        """

    @abstractmethod
    def converse(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        """Send one message of a droppable round and wait for the answer to it.

        Args:
            header: of this round's messages.
            stage: which of them.
            parts: as the stage has them; none if the header raises a flag.

        Returns:
            The parts of the answer.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            PeerLost: naming who went away, if too few are left.
        """

    @abstractmethod
    def deliver(self, header: Header, body: bytes) -> None:
        """Give the coordinator a masked share and wait until it has everybody's.

        Args:
            header: of this message.
            body: the masked words; empty if the header raises a flag.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            PeerLost: naming who went away.
        """


class SecureSum(ABC):
    """Adds up one contribution per party in Z_2^64; nobody sees any but its own, and the total.

    Guarantee: the total is exact (mod 2^64), or an exception is raised at every party and nothing is opened. With
    n − 2 parties and the coordinator colluding, the two honest contributions stay unknown beyond their sum; in a round
    that can lose parties, with t − 1 of them and a curious coordinator, or 2t − n − 1 and a lying one.
    """

    parties: int
    me: int

    @abstractmethod
    def open_to_parties(self, round: Round, words: NDArray[np.int64], flags: Flags) -> NDArray[np.int64]:
        """Add up, and open the total to the parties but not to the coordinator.

        Args:
            round: address of this opening; never used before in this session.
            words: this party's contribution, of any shape, the same at all parties.
            flags: the digest of its environment, and whether it asks that nobody opens.

        Returns:
            The total mod 2^64, in the shape of `words`.

        Raises:
            RoundRefused: at every party if any asked for another scale or to abort, or the digests differ.
            PeerLost: naming who went away.
        """

    @abstractmethod
    def open_to_coordinator(
        self, round: Round, words: NDArray[np.int64], flags: Flags, consent: Consent | None = None
    ) -> None:
        """Add up, and open the total to the coordinator but not to the parties.

        In a round that the manifest marks as droppable, the total may be that of the survivors alone.

        Args:
            round: address of this opening; never used before in this session.
            words: this party's contribution, of any shape, the same at all parties.
            flags: the digest of its environment, and whether it asks that nobody opens.
            consent: judges whose sum is to be opened, before this party reveals anything.

        Raises:
            RoundRefused: at every party if any asked for another scale or to abort, or the digests differ.
            PeerLost: naming who went away.
        """

    def open_if_enough(
        self,
        round: Round,
        words: NDArray[np.int64],
        people: NDArray[np.int64],
        flags: Flags,
        *,
        fewest_people: int,
        fewest_institutions: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Add up cells, and open to the parties those that enough people and institutions stand behind.

        Args:
            round: address of this opening; never used before in this session. The manifest lists its tensor.
            words: this party's contribution to each cell [cells, words].
            people: how many of this party's people are in each cell [cells].
            flags: as in `open_to_parties`.
            fewest_people: people that all parties together must have in a cell.
            fewest_institutions: parties that must have somebody in it.

        Returns:
            The totals mod 2^64 [cells, words], 0 where a cell is withheld; and which cells are opened [cells].

        Raises:
            InputError: if the engine only adds, or the shapes do not fit.
            RoundRefused: as in `open_to_parties`.
            PeerLost: naming who went away.

        Guarantee: of a withheld cell nobody learns more than that it is one. The trust is weaker than that of a sum:
        see `lpm.privacy.dealer`.
        """
        raise InputError(f"{type(self).__name__} only adds: it can't compare what is shared.", "Use --sharing crypten.")

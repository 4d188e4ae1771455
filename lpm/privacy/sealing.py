"""Session keys and seals: what a party sends to another is readable by that one alone, and only once.

Payloads are sealed end to end with ChaCha20-Poly1305 inside the TLS streams, so the coordinator who passes them on
reads nothing. The associated data name session, roster, round, sender, receiver, kind, sequence number and the keyed
digest of the environment: a message moved anywhere else, or from a party whose environment differs, does not open.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import itertools
import secrets
import struct
import threading
from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from lpm.errors import SessionRefused
from lpm.privacy.masks import derive
from lpm.privacy.secure_sum import Channel, Flags, Header, Opening, Parcel, Round, Stage

__all__ = ["Kind", "SealedRounds", "SequenceWindow", "SessionKeys"]

_NONCE = struct.Struct("<IQ")
_PLACE = struct.Struct("<HHIQ")


class Kind(enum.IntEnum):
    """What a sealed message holds."""

    GROUP_KEY = 1
    SHARE = 2
    SEED = 3


class SessionKeys:
    """The secrets of one party in one session; gone with it.

    Args:
        me: this party's place in the roster.
        parties: how many there are.
        binding: 32 bytes, the digest of the signed manifest (and so of session, roster, keys and terms).
        shared: place of each other party → the X25519 secret of the pair.
    """

    __slots__ = ("_group", "_opening", "_own", "_sealing", "_shared", "binding", "me", "parties")

    def __init__(self, me: int, parties: int, binding: bytes, shared: Mapping[int, bytes]) -> None:
        self.me = me
        self.parties = parties
        self.binding = binding
        self._shared = dict(shared)
        self._own = secrets.token_bytes(32)
        self._group = b""
        # One key per direction, so that two parties with equal sequence numbers never share a nonce.
        self._sealing = {to: ChaCha20Poly1305(self._direction(me, to)) for to in self._shared}
        self._opening = {sender: ChaCha20Poly1305(self._direction(sender, me)) for sender in self._shared}

    def __repr__(self) -> str:
        return f"SessionKeys(party {self.me} of {self.parties})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("Session keys are neither copied nor stored.")

    def _direction(self, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.me else sender
        return derive(self._shared[other], b"lpm/seal/v1" + self.binding + struct.pack("<HH", sender, receiver))

    @property
    def others(self) -> tuple[int, ...]:
        """Places of the other parties, in roster order."""
        return tuple(sorted(self._shared))

    @property
    def pair_secrets(self) -> Mapping[int, bytes]:
        """Place of each other party → the secret of the pair, for masks."""
        return self._shared

    def seal(self, to: int, kind: Kind, sequence: int, about: bytes, payload: bytes) -> bytes:
        """Seal a message for one party.

        Args:
            to: the receiver's place.
            kind: what it holds.
            sequence: this party's message number; never used twice towards the same receiver and kind.
            about: further associated data, such as the round and the keyed digest.
            payload: the message.

        Returns:
            The sealed bytes, 16 longer.
        """
        place = _PLACE.pack(self.me, to, kind, sequence)
        return self._sealing[to].encrypt(_NONCE.pack(kind, sequence), payload, self.binding + place + about)

    def open(self, sender: int, kind: Kind, sequence: int, about: bytes, sealed: bytes | memoryview) -> bytes:
        """Open a message of another party.

        Args:
            sender: its place.
            kind: what it must hold.
            sequence: the number it came with.
            about: the associated data it must have been sealed with.
            sealed: the bytes.

        Returns:
            The payload.

        Raises:
            SessionRefused: if it was not sealed by that party for exactly this.
        """
        place = _PLACE.pack(sender, self.me, kind, sequence)
        try:
            return self._opening[sender].decrypt(_NONCE.pack(kind, sequence), sealed, self.binding + place + about)
        except InvalidTag:
            raise SessionRefused(
                f"What came in the name of party {sender} was not sealed by it for this round: it was altered, moved,"
                " or its environment differs."
            ) from None

    def group_contributions(self) -> list[bytes]:
        """[n − 1] sealed copies of this party's 32 random bytes for the group's key, in roster order."""
        return [self.seal(to, Kind.GROUP_KEY, 0, b"", self._own) for to in self.others]

    def set_group_key(self, sealed: Sequence[bytes]) -> None:
        """Derive the key that all parties know and the coordinator does not.

        Args:
            sealed: [n − 1] contributions of the others, in roster order.

        Raises:
            SessionRefused: if one was not sealed by its party for this session.
        """
        parts = {self.me: self._own}
        for sender, body in zip(self.others, sealed, strict=True):
            parts[sender] = self.open(sender, Kind.GROUP_KEY, 0, b"", body)
            if len(parts[sender]) != 32:
                raise SessionRefused(f"Party {sender}'s part of the group key has {len(parts[sender])} bytes: 32.")
        self._group = derive(b"".join(parts[place] for place in sorted(parts)), b"lpm/group/v1" + self.binding)

    def group_key(self, purpose: bytes, context: bytes) -> bytes:
        """A key that all parties derive and the coordinator can't; one colluding party gives it away.

        Args:
            purpose: what the key is for.
            context: of the round; never the same twice for one purpose.

        Returns:
            32 bytes.

        Raises:
            SessionRefused: if the group's key is not agreed yet.
        """
        if not self._group:
            raise SessionRefused("The group's key is not agreed yet.")
        return derive(self._group, b"lpm/group/" + purpose + context)

    def keyed_digest(self, round: Round, digest: bytes) -> bytes:
        """The environment's digest as the coordinator may see it: equal when equal, and no help in guessing sums.

        Args:
            round: its address, so that digests of two rounds can't be compared.
            digest: of the environment, any length.

        Returns:
            32 bytes.
        """
        if not self._group:
            raise SessionRefused("The group's key is not agreed yet.")
        context = round.context()
        message = b"lpm/digest/v1" + struct.pack("<I", len(context)) + context + digest
        return hmac.new(self._group, message, hashlib.sha256).digest()


class SequenceWindow:
    """Tells whether a message number came before, remembering the last 256."""

    def __init__(self) -> None:
        self._highest = -1
        self._seen = 0

    def admit(self, sequence: int) -> bool:
        """Whether the number is new; it is not new a second time.

        Args:
            sequence: number of a message that has been authenticated.

        Returns:
            False for a replay, or a number too old to tell.
        """
        ahead = sequence - self._highest
        if ahead > 0:
            self._seen = ((self._seen << min(ahead, 256)) | 1) & (2**256 - 1)
            self._highest = sequence
            return True
        if -ahead >= 256 or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True


class SealedRounds:
    """What every engine does around its arithmetic: number, seal, refuse a second use of a context, verify.

    Args:
        keys: the party's keys of this session.
        channel: its way to the others.
    """

    def __init__(self, keys: SessionKeys, channel: Channel) -> None:
        self._keys = keys
        self._channel = channel
        self._sequence = itertools.count()
        self._used: set[bytes] = set()
        self._windows = {other: SequenceWindow() for other in keys.others}
        self._lock = threading.Lock()

    def begin(self, round: Round, opening: Opening, flags: Flags) -> Header:
        """Take a round's context, once and for all.

        Args:
            round: the round.
            opening: to whom its total is opened.
            flags: what the party says along with it.

        Returns:
            The header of the message up.

        Raises:
            SessionRefused: if this round was begun before: its masks would be used twice.
        """
        mark = hashlib.sha256(round.context()).digest()[:16]
        with self._lock:
            if mark in self._used:
                raise SessionRefused(
                    f"The round {round.tensor!r} of step {round.step}, attempt {round.attempt}, was answered before:"
                    " a mask is never used twice."
                )
            self._used.add(mark)
            sequence = next(self._sequence)
        digest = self._keys.keyed_digest(round, flags.digest)
        return Header(round, opening, sequence, digest, flags.rescale, flags.abort)

    def context(self, round: Round) -> bytes:
        """What the round's masks are keyed with: session, roster and terms (through the manifest), and the round."""
        return self._keys.binding + round.context()

    def to_parties(self, header: Header, payload: bytes) -> list[bytes]:
        """Send every other party a sealed copy of the payload and open theirs.

        Args:
            header: from `begin`; if it raises a flag nothing is sealed or sent.
            payload: this party's masked share.

        Returns:
            [n − 1] payloads of the others, in roster order.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            SessionRefused: if a message was altered, moved, replayed, or has another length.
            PeerLost: naming who went away.
        """
        others = self._keys.others
        about = header.round.context() + header.digest
        bodies = (
            [] if header.raised else [self._keys.seal(to, Kind.SHARE, header.sequence, about, payload) for to in others]
        )
        parcels: Sequence[Parcel] = self._channel.exchange(header, bodies)
        if header.raised or len(parcels) != len(others):
            raise SessionRefused("The relay answered a round that this party had called off, or for another roster.")
        opened = []
        for sender, parcel in zip(others, parcels, strict=True):
            # Sealed under the sender's own digest: opening it under mine also proves that the two are equal.
            message = self._keys.open(sender, Kind.SHARE, parcel.sequence, about, parcel.body)
            with self._lock:
                new = self._windows[sender].admit(parcel.sequence)
            if not new or len(message) != len(payload):
                raise SessionRefused(f"The share of party {sender} was sent before, or has another length than mine.")
            opened.append(message)
        return opened

    def to_sum(self, header: Header, payload: bytes) -> bytes | memoryview:
        """Give the coordinator this party's masked words and take the sum of everybody's.

        Args:
            header: from `begin`; if it raises a flag nothing is sent.
            payload: the masked words.

        Returns:
            The sum, still under the group's mask, as long as the payload.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            SessionRefused: if the answer is none to this round.
            PeerLost: naming who went away.
        """
        total = self._channel.combine(header, b"" if header.raised else payload)
        if header.raised or len(total) != len(payload):
            raise SessionRefused("The coordinator answered a round that this party had called off, or cut it short.")
        return total

    def ask(self, header: Header, body: bytes) -> bytes | memoryview:
        """Ask the coordinator, with everybody, for this party's share of something random.

        Args:
            header: from `begin`.
            body: the request, the same at all parties.

        Returns:
            What was dealt to this party.

        Raises:
            RoundRefused: at every party if any raised a flag or asked for something else, or the digests differ.
            PeerLost: naming who went away.
        """
        return self._channel.combine(header, body)

    def stage(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        """Send one message of a droppable round and take the answer.

        Args:
            header: from `begin`; if it raises a flag nothing is sent.
            stage: which message.
            parts: of the message.

        Returns:
            The parts of the answer.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            SessionRefused: if the answer is none to this round.
            PeerLost: naming who went away.
        """
        answer = self._channel.converse(header, stage, [] if header.raised else parts)
        if header.raised:
            raise SessionRefused("The coordinator answered a round that this party had called off.")
        return answer

    def to_coordinator(self, header: Header, payload: bytes) -> None:
        """Give the coordinator this party's masked share.

        Args:
            header: from `begin`; if it raises a flag nothing is sent.
            payload: the masked share: only the sum of all means anything.

        Raises:
            RoundRefused: at every party if any raised a flag or the digests differ.
            PeerLost: naming who went away.
        """
        self._channel.deliver(header, b"" if header.raised else payload)

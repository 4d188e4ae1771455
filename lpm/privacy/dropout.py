"""A party's side of a droppable round: a sum that is opened though parties are lost on the way.

Its contribution carries, beside the pair masks, a self mask whose seed it shares among all (Shamir, t = ⌊2n/3⌋ + 1).
Once at least t parties have signed who survives, each survivor gives its shares of the survivors' seeds, and for each
lost party the key of *this round's* pair mask: never both for one party, never a session key, and only once. After
Bonawitz et al. 2017, with all openings held against commitments made before anybody knew who would be lost.

A pure state machine: what the coordinator answers goes in, what is sent next comes out. The stages, up and down:
seeds and the others' shares; contribution and the survivors; signature and everybody's signatures; the revealed
shares and keys, and the end.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpm.errors import SessionRefused
from lpm.privacy.commitments import DIGEST_BYTES, commit
from lpm.privacy.masks import key_stream, mask_key
from lpm.privacy.sealing import Kind, SessionKeys
from lpm.privacy.secure_sum import Consent, Header, Stage
from lpm.privacy.shamir import split

__all__ = [
    "PAIR_KEY_BYTES",
    "SHARE_BYTES",
    "DroppableParty",
    "Witness",
    "dropout_note",
    "dropouts_tolerated",
    "pair_commitment",
    "round_context",
    "seed_commitment",
    "share_commitment",
    "survivors_message",
    "threshold",
]

SHARE_BYTES = 66
"""A number below 2^521 − 1."""
PAIR_KEY_BYTES = 32
SEALED_SHARE_BYTES = SHARE_BYTES + 16
SIGNATURE_BYTES = 64

_PLACE = struct.Struct("<H")
_DELIVERED = struct.Struct("<HQ")
_PAIR = struct.Struct("<HH")


class Witness(ABC):
    """A party's long-term identity, as far as a round needs it."""

    @abstractmethod
    def sign(self, message: bytes) -> bytes:
        """Sign as this party; 64 bytes."""

    @abstractmethod
    def name(self, place: int) -> str:
        """What a party is called, for messages."""

    @abstractmethod
    def require(self, place: int, message: bytes, signature: bytes) -> None:
        """Refuse what a party did not sign.

        Raises:
            SessionRefused: naming the party.
        """


def threshold(parties: int) -> int:
    """How many parties open a droppable round: t = ⌊2n/3⌋ + 1."""
    return 2 * parties // 3 + 1


def dropouts_tolerated(parties: int) -> int:
    """How many parties a droppable round can lose; none of three."""
    return parties - threshold(parties)


def dropout_note(parties: int, droppable: Collection[str]) -> str:
    """One sentence for log and report: how many parties which rounds can lose."""
    most = dropouts_tolerated(parties)
    if not droppable:
        return "Every round needs every party."
    if not most:
        return f"{parties} parties tolerate no dropout: every round needs every party."
    return (
        f"Rounds of {', '.join(sorted(droppable))} can lose {most} of {parties} parties "
        f"({threshold(parties)} open them); all others need everybody."
    )


def round_context(binding: bytes, header: Header) -> bytes:
    """What all keys and commitments of a masked round are bound to: manifest, round, and the environment's digest.

    Parties whose environments or parameters differ derive other masks, which do not cancel: nothing opens.
    """
    return binding + header.round.context() + header.digest


def seed_commitment(context: bytes, party: int, seed: bytes) -> bytes:
    """A party's commitment to its self mask."""
    return commit(b"seed", context + _PLACE.pack(party), seed)


def share_commitment(context: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """The dealer's commitment to the share it gives a holder."""
    return commit(b"share", context + _PAIR.pack(dealer, holder), share)


def pair_commitment(context: bytes, one: int, other: int, key: bytes) -> bytes:
    """The commitment that both of a pair make to their mask's key, and that must be the same."""
    return commit(b"pair", context + _PAIR.pack(min(one, other), max(one, other)), key)


def survivors_message(context: bytes, survivors: Sequence[int]) -> bytes:
    """What survivors sign: who they are, in this round and no other."""
    return hashlib.sha256(b"lpm/survivors/v1" + context + pack_places(survivors)).digest()


def pack_places(places: Sequence[int]) -> bytes:
    """Places as bytes."""
    return b"".join(_PLACE.pack(place) for place in places)


def unpack_places(data: bytes, parties: int) -> tuple[int, ...]:
    """Places from bytes, refused unless they rise and are in the roster."""
    if len(data) % _PLACE.size:
        raise SessionRefused("A list of parties is cut short.")
    places = tuple(place for (place,) in _PLACE.iter_unpack(data))
    if list(places) != sorted(set(places)) or (places and places[-1] >= parties):
        raise SessionRefused("A list of parties names one twice, out of order, or outside the roster.")
    return places


def pack_delivered(dealer: int, sequence: int, sealed: bytes, commitment: bytes) -> bytes:
    """A share on its way down: who dealt it, under which number it is sealed, and its commitment."""
    return _DELIVERED.pack(dealer, sequence) + sealed + commitment


def pack_signature(place: int, signature: bytes) -> bytes:
    """A signature on its way down."""
    return _PLACE.pack(place) + signature


@dataclass(frozen=True)
class _Delivered:
    dealer: int
    sequence: int
    sealed: bytes
    commitment: bytes

    @classmethod
    def read(cls, data: bytes) -> _Delivered:
        if len(data) != _DELIVERED.size + SEALED_SHARE_BYTES + DIGEST_BYTES:
            raise SessionRefused("A delivered share has another length than it must.")
        dealer, sequence = _DELIVERED.unpack(data[: _DELIVERED.size])
        return cls(dealer, sequence, data[_DELIVERED.size : -DIGEST_BYTES], data[-DIGEST_BYTES:])


class DroppableParty:
    """One party in one droppable round; it can neither be printed nor used twice.

    Args:
        keys: the party's keys of this session.
        witness: its identity and everybody's.
        header: of its messages in this round.
        words: [count] its contribution.
        consent: called with the survivors before anything is revealed.
    """

    def __init__(
        self,
        keys: SessionKeys,
        witness: Witness,
        header: Header,
        words: NDArray[np.uint64],
        consent: Consent,
    ) -> None:
        self.stage = Stage.SEEDS
        self.survivors: tuple[int, ...] = ()
        self._keys = keys
        self._witness = witness
        self._header = header
        self._words = words
        self._consent = consent
        self._context = round_context(keys.binding, header)
        self._threshold = threshold(keys.parties)
        self._seed = secrets.token_bytes(32)
        self._pair_keys: dict[int, bytes] = {
            other: mask_key(secret, self._context) for other, secret in keys.pair_secrets.items()
        }
        self._held: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"DroppableParty({self._keys.me}, {self.stage.name})"

    def begin(self) -> list[bytes]:
        """The parts of the first message: commitments, and each other party's sealed share with its commitment."""
        me, context = self._keys.me, self._context
        points = range(1, self._keys.parties + 1)
        shares = {
            share.x - 1: share.y.to_bytes(SHARE_BYTES, "little")
            for share in split(int.from_bytes(self._seed, "little"), self._threshold, points)
        }
        self._held[me] = shares[me]
        public = [seed_commitment(context, me, self._seed)]
        public += [pair_commitment(context, me, other, self._pair_keys[other]) for other in self._keys.others]
        parts = [b"".join(public)]
        for other in self._keys.others:
            sealed = self._keys.seal(other, Kind.SEED, self._header.sequence, context, shares[other])
            parts.append(sealed + share_commitment(context, me, other, shares[other]))
        return parts

    def receive(self, parts: Sequence[bytes]) -> tuple[Stage, list[bytes]] | None:
        """Take the coordinator's answer to the last message.

        Args:
            parts: as the stage has them.

        Returns:
            The next stage and its parts; None at the end.

        Raises:
            SessionRefused: if the answer breaks the rules; nothing more is sent in this round.
        """
        if self.stage == Stage.SEEDS:
            self._take_shares(parts)
            return self._advance(Stage.CONTRIBUTION), [self._contribution()]
        if self.stage == Stage.CONTRIBUTION:
            self._take_survivors(parts)
            return self._advance(Stage.SIGNATURE), [self._witness.sign(self._message())]
        if self.stage == Stage.SIGNATURE:
            self._take_signatures(parts)
            self._consent(self.survivors)
            return self._advance(Stage.REVEAL), self._reveal()
        if parts:
            raise SessionRefused("The coordinator asks for more after a round was opened.")
        return None

    def _advance(self, stage: Stage) -> Stage:
        self.stage = stage
        return stage

    def _take_shares(self, parts: Sequence[bytes]) -> None:
        me, context = self._keys.me, self._context
        for part in parts:
            each = _Delivered.read(part)
            if each.dealer in self._held or each.dealer not in self._pair_keys:
                raise SessionRefused("The coordinator delivered a share twice, or of nobody in the roster.")
            share = self._keys.open(each.dealer, Kind.SEED, each.sequence, context, each.sealed)
            if len(share) != SHARE_BYTES or share_commitment(context, each.dealer, me, share) != each.commitment:
                name = self._witness.name(each.dealer)
                raise SessionRefused(f"{name} dealt a share that is not the one it committed to.")
            self._held[each.dealer] = share
        if len(self._held) < self._threshold:
            raise SessionRefused(
                f"A droppable round has {len(self._held)} parties: at least {self._threshold} of {self._keys.parties}."
            )

    def _contribution(self) -> bytes:
        vector = self._words + key_stream(self._seed, self._words.size)
        for other, key in self._pair_keys.items():
            if other > self._keys.me:
                vector += key_stream(key, vector.size)
            else:
                vector -= key_stream(key, vector.size)
        return vector.astype("<u8", copy=False).tobytes()

    def _take_survivors(self, parts: Sequence[bytes]) -> None:
        if len(parts) != 1:
            raise SessionRefused("The coordinator named several sets of survivors.")
        survivors = unpack_places(parts[0], self._keys.parties)
        if self._keys.me not in survivors:
            raise SessionRefused("The coordinator counts this party as lost though it is here.")
        if len(survivors) < self._threshold or not set(survivors) <= set(self._held):
            raise SessionRefused(
                f"The coordinator named {len(survivors)} survivors that can't be opened: at least {self._threshold}, "
                "all of whom have dealt shares."
            )
        self.survivors = survivors

    def _message(self) -> bytes:
        return survivors_message(self._context, self.survivors)

    def _take_signatures(self, parts: Sequence[bytes]) -> None:
        signers = set()
        for part in parts:
            if len(part) != _PLACE.size + SIGNATURE_BYTES:
                raise SessionRefused("A signature of the survivors has another length than it must.")
            (place,) = _PLACE.unpack(part[: _PLACE.size])
            if place not in self.survivors or place in signers:
                raise SessionRefused("A signature of the survivors is of a party that is none, or is there twice.")
            self._witness.require(place, self._message(), part[_PLACE.size :])
            signers.add(place)
        if len(signers) < self._threshold:
            raise SessionRefused(
                f"{len(signers)} parties signed who survives: at least {self._threshold}. Nothing is revealed."
            )

    def _reveal(self) -> list[bytes]:
        shares = b"".join(self._held[place] for place in self.survivors)
        lost = [place for place in range(self._keys.parties) if place not in self.survivors]
        keys = b"".join(self._pair_keys[place] for place in lost)
        # Nothing of this round may be asked for again.
        self._held.clear()
        self._pair_keys.clear()
        self._seed = b""
        return [shares, keys]


def others_of(parties: int, place: int) -> list[int]:
    """Places of all others, in roster order."""
    return [other for other in range(parties) if other != place]


def read_pairs(parties: int, place: int, data: bytes) -> Mapping[int, bytes]:
    """A party's pair commitments by the other's place."""
    return {other: data[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES] for k, other in enumerate(others_of(parties, place))}

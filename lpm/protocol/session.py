"""How a session is formed and kept: one state machine for a party, one for the coordinator.

hello → manifest → everybody verifies everything and signs → all signatures → the group's key → ready → tasks and
rounds → finish. Messages in, messages out; a wrong one raises `SessionRefused`, which names who and what, and ends
the session: a session is never repaired. Ephemeral keys are new in each, so a resumed run has none of the old ones.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lpm.errors import InputError, LpmError, PeerLost, SessionRefused
from lpm.privacy import require_engine
from lpm.privacy.composition import Composed, RoundComposer
from lpm.privacy.dealer import LABEL
from lpm.privacy.dropout import Witness
from lpm.privacy.masks import agree
from lpm.privacy.recovery import DroppableRounds, Step
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import MINIMUM_PARTIES, Opening, Parcel, Round, Stage
from lpm.protocol.identity import COORDINATOR, Identity, require_party_name, verify_certificate, verify_signature
from lpm.protocol.manifest import Entry, Manifest, Terms, hello_message
from lpm.protocol.messages import (
    Bundle,
    Done,
    Hello,
    Lost,
    Message,
    Offer,
    Parts,
    Ready,
    Refused,
    Reply,
    Share,
    Signature,
    Signatures,
    StageMessage,
    StageReply,
    TaskMessage,
    Welcome,
    decode,
)

__all__ = ["CoordinatorMachine", "PartyMachine", "Phase", "require_roster"]


class Phase(enum.Enum):
    """Where a session stands."""

    GREETING = "greeting"
    OFFERING = "offering"
    SIGNING = "signing"
    KEYING = "keying"
    READY = "ready"
    ENDED = "ended"


def require_roster(parties: Sequence[str]) -> None:
    """Refuse a roster that can't form a session.

    Args:
        parties: names in the order of the session.

    Raises:
        InputError: for fewer than three parties, a name twice, or one that can't be used.
    """
    for name in parties:
        require_party_name(name)
        if sum(name.lower() == other.lower() for other in parties) > 1:
            raise InputError(f"The party {name} is in the roster twice: each party once.")
    if len(parties) < MINIMUM_PARTIES:
        raise InputError(
            f"The roster has {len(parties)} parties: at least {MINIMUM_PARTIES}.",
            "A sum over two parties tells each the other's part.",
        )


def _verify_entry(entry: Entry, session: bytes, scenario_hash: str, own: Identity, now: datetime) -> Ed25519PublicKey:
    key = verify_certificate(entry.certificate, entry.party, own.authority, now, own.revoked)
    message = hello_message(session, entry.party, entry.ephemeral, scenario_hash)
    verify_signature(key, entry.party, b"hello", message, entry.signature)
    return key


class PartyMachine:
    """One party's side of a session.

    Args:
        identity: its own.
        scenario_hash: hex digest of the scenario in its own installation.
        session_name: what the control plane called the session; "" to take any.
        sharing: the engine it is willing to use.
        check: a further judgement of the manifest, such as a site's policy; it refuses by raising `LpmError`.
        now: the time to judge certificates by; by default this machine's clock.
    """

    def __init__(
        self,
        identity: Identity,
        scenario_hash: str,
        *,
        session_name: str = "",
        sharing: str = "crypten",
        check: Callable[[Manifest], None] | None = None,
        now: datetime | None = None,
    ) -> None:
        require_engine(sharing)
        self.phase = Phase.GREETING
        self.manifest: Manifest | None = None
        self.keys: SessionKeys | None = None
        self._identity = identity
        self._scenario_hash = scenario_hash
        self._session_name = session_name
        self._sharing = sharing
        self._check = check
        self._now = now
        self._ephemeral: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._own: Entry | None = None
        self._session = b""
        self._signers: list[Ed25519PublicKey] = []
        self._tasks = 0

    def receive(self, frame: bytes | memoryview) -> tuple[list[bytes], Message | None]:
        """Take a message from the coordinator.

        Args:
            frame: its bytes.

        Returns:
            Frames to send, and the message itself if it is for whoever runs the session (a task, a round's reply, the
            news that a party is lost).

        Raises:
            SessionRefused: if the session can't be formed or the message is not one for this moment.
        """
        try:
            message = decode(frame)
            if isinstance(message, Refused):
                raise SessionRefused(f"The coordinator ended the session: {message.reason}")
            if isinstance(message, Lost):
                self.phase = Phase.ENDED
                return [], message
            return self._act(message)
        except LpmError:
            self.phase = Phase.ENDED
            raise

    def _act(self, message: Message) -> tuple[list[bytes], Message | None]:
        if self.phase == Phase.GREETING and isinstance(message, Welcome):
            return [self._greet(message.session)], None
        if self.phase == Phase.OFFERING and isinstance(message, Offer):
            return [self._sign(message)], None
        if self.phase == Phase.SIGNING and isinstance(message, Signatures):
            return [self._key(message.signatures)], None
        if self.phase == Phase.KEYING and isinstance(message, Parts):
            return [self._finish(message.parts)], None
        if self.phase == Phase.READY and isinstance(message, TaskMessage):
            if message.number != self._tasks:
                raise SessionRefused(f"The coordinator sent task {message.number} where {self._tasks} was next.")
            self._tasks += 1
            return [], message
        if self.phase == Phase.READY and isinstance(message, Reply | StageReply):
            return [], message
        raise SessionRefused(f"The coordinator sent a {type(message).__name__} while {self.phase.value}.")

    def _greet(self, session: bytes) -> bytes:
        assert self._ephemeral is not None
        name, public = self._identity.name, self._ephemeral.public_key().public_bytes_raw()
        signature = self._identity.sign(b"hello", hello_message(session, name, public, self._scenario_hash))
        self._session = session
        self._own = Entry(name, self._identity.certificate, public, signature)
        self.phase = Phase.OFFERING
        return Hello(name, self._identity.certificate, public, self._scenario_hash, signature).encode()

    def _sign(self, offer: Offer) -> bytes:
        manifest = Manifest.decode(offer.manifest)
        now = self._now or datetime.now(UTC)
        own = self._identity
        key = verify_certificate(offer.certificate, COORDINATOR, own.authority, now, own.revoked)
        verify_signature(key, COORDINATOR, b"offer", manifest.digest, offer.signature)
        if manifest.session != self._session:
            raise SessionRefused("The manifest is of another session than the coordinator's welcome.")
        if self._session_name and manifest.terms.session != self._session_name:
            raise SessionRefused(
                f"The manifest is of the session {manifest.terms.session!r}, not {self._session_name!r}."
            )
        try:
            require_roster(manifest.parties)
            require_engine(manifest.terms.sharing)
        except InputError as problem:
            raise SessionRefused(f"The manifest can't be signed: {problem.message}", problem.remedy) from None
        if self._own not in manifest.roster:
            raise SessionRefused(f"The manifest does not hold the entry that {self._identity.name} sent.")
        if manifest.terms.scenario_hash != self._scenario_hash:
            raise SessionRefused(
                f"The manifest's scenario {manifest.terms.scenario!r} is not the one that {self._identity.name} has"
                " installed: their hashes differ.",
                "Install the same version on both sides, and give the same --agents and --set.",
            )
        if manifest.terms.sharing != self._sharing:
            raise SessionRefused(f"The manifest shares by {manifest.terms.sharing!r}, this party by {self._sharing!r}.")
        if manifest.terms.droppable and manifest.terms.sharing != "masked":
            raise SessionRefused(f"The manifest marks rounds as droppable that {manifest.terms.sharing!r} can't lose.")
        if manifest.terms.thresholds and (manifest.terms.sharing != "crypten" or LABEL not in manifest.terms.weaker):
            raise SessionRefused(
                "The manifest lists cells to be opened above a threshold, without the engine crypten or without the "
                "label that the coordinator is their dealer."
            )
        self._signers = [
            _verify_entry(entry, self._session, self._scenario_hash, own, now) for entry in manifest.roster
        ]
        for what in ({key.public_bytes_raw() for key in self._signers}, {each.ephemeral for each in manifest.roster}):
            if len(what) < len(manifest.roster):
                raise SessionRefused("Two parties of the roster have the same key: a party is in it twice.")
        if self._check is not None:
            self._check(manifest)
        self.manifest = manifest
        self.phase = Phase.SIGNING
        return Signature(self._identity.sign(b"manifest", manifest.digest)).encode()

    def _key(self, signatures: Sequence[bytes]) -> bytes:
        assert self.manifest is not None and self._ephemeral is not None
        if len(signatures) != len(self._signers):
            raise SessionRefused(f"The manifest has {len(signatures)} signatures for {len(self._signers)} parties.")
        digest = self.manifest.digest
        for entry, key, signature in zip(self.manifest.roster, self._signers, signatures, strict=True):
            verify_signature(key, entry.party, b"manifest", digest, signature)
        me = self.manifest.parties.index(self._identity.name)
        shared = {
            place: agree(self._ephemeral, entry.ephemeral)
            for place, entry in enumerate(self.manifest.roster)
            if place != me
        }
        self._ephemeral = None  # agreed with everybody: nothing later needs it
        self.keys = SessionKeys(me, len(self.manifest.roster), digest, shared)
        self.phase = Phase.KEYING
        return Bundle(tuple(self.keys.group_contributions())).encode()

    def _finish(self, parts: Sequence[bytes]) -> bytes:
        assert self.keys is not None
        if len(parts) != len(self.keys.others):
            raise SessionRefused(f"The group's key has {len(parts)} parts: {len(self.keys.others)}.")
        self.keys.set_group_key(parts)
        self.phase = Phase.READY
        return Ready().encode()

    def witness(self) -> Witness:
        """The party's identity and everybody's, for rounds that can lose parties; once the manifest is signed."""
        assert self.manifest is not None
        return _RosterWitness(self._identity, self.manifest.parties, self._signers)


_SURVIVORS = b"survivors"


class _RosterWitness(Witness):
    def __init__(self, identity: Identity, names: Sequence[str], signers: Sequence[Ed25519PublicKey]) -> None:
        self._identity, self._names, self._signers = identity, names, signers

    def sign(self, message: bytes) -> bytes:
        return self._identity.sign(_SURVIVORS, message)

    def name(self, place: int) -> str:
        return self._names[place]

    def require(self, place: int, message: bytes, signature: bytes) -> None:
        verify_signature(self._signers[place], self._names[place], _SURVIVORS, message, signature)


class CoordinatorMachine:
    """The coordinator's side of a session; it holds no key of any party.

    Args:
        identity: the coordinator's own.
        parties: the roster, in the order of the session.
        terms: what the parties are to sign.
        now: the time to judge certificates by; by default this machine's clock.

    Raises:
        InputError: if the roster can't form a session.
    """

    def __init__(self, identity: Identity, parties: Sequence[str], terms: Terms, now: datetime | None = None) -> None:
        require_roster(parties)
        require_engine(terms.sharing)
        if identity.name != COORDINATOR:
            raise InputError(f"The coordinator was given the keys of {identity.name}.", "Name its own folder.")
        self.phase = Phase.GREETING
        self.parties = tuple(parties)
        self.session = secrets.token_bytes(16)
        self.manifest: Manifest | None = None
        self._identity = identity
        self._terms = terms
        self._now = now
        self._entries: dict[str, Entry] = {}
        self._signers: dict[str, Ed25519PublicKey] = {}
        self._signatures: dict[str, bytes] = {}
        self._bundles: dict[str, tuple[bytes, ...]] = {}
        self._ready: set[str] = set()
        self._rounds = RoundComposer(len(self.parties))
        self._droppable: DroppableRounds | None = None
        self._tasks = 0
        self._task = b"none"

    @property
    def lost(self) -> list[str]:
        """Parties that have gone while rounds went on without them; the session ends with the next that needs all."""
        return [] if self._droppable is None else [self.parties[place] for place in sorted(self._droppable.lost)]

    @property
    def missing(self) -> list[str]:
        """Parties that have not said hello."""
        return [name for name in self.parties if name not in self._entries]

    def welcome(self, party: str) -> bytes:
        """The first frame to a party that connected.

        Args:
            party: its name, as its TLS certificate says.

        Returns:
            The frame.

        Raises:
            SessionRefused: if it is not in the roster, or the session is formed.
        """
        if party not in self.parties:
            raise SessionRefused(f"{party} is not in the roster of this session.")
        if self.phase != Phase.GREETING:
            raise SessionRefused(f"{party} comes too late: the session is formed.", "Start or resume a session anew.")
        return Welcome(self.session).encode()

    def forget(self, party: str) -> bool:
        """Let a party go that disconnected; it may come again.

        Args:
            party: its name.

        Returns:
            False if the session is formed and can't do without it.
        """
        if self.phase == Phase.GREETING:
            self._entries.pop(party, None)
            return True
        return False

    def begin_task(self, task_message_of: Callable[[int], TaskMessage]) -> TaskMessage:
        """Number a task.

        Args:
            task_message_of: makes the message from its number.

        Returns:
            The message for all parties.

        Raises:
            SessionRefused: if the session is not ready.
        """
        if self.phase != Phase.READY:
            raise SessionRefused(f"A task can't be sent while the session is {self.phase.value}.")
        if self.lost:
            raise self.peer_lost()
        message = task_message_of(self._tasks)
        self._tasks += 1
        self._task = message.task.digest
        return message

    def peer_lost(self) -> PeerLost:
        """What to tell everybody once a round needs those who are lost."""
        return PeerLost(", ".join(self.lost), "a round needs every party")

    def lose(self, party: str) -> tuple[list[tuple[str, bytes]], list[Step]] | None:
        """Go on without a party, if that can be done: if the task has come to rounds that can lose parties.

        Args:
            party: its name.

        Returns:
            Frames to send and to whom, and what it led to; None if the session can't go on.
        """
        if self.phase != Phase.READY or self._droppable is None or self._rounds.under_way:
            return None
        if not (self._droppable.under_way or self._droppable.lost) and self._droppable.latest != self._task:
            return None
        return self._answer(self._droppable.lose(self.parties.index(party)))

    def expire(self, round: Round, stage: Stage) -> tuple[list[tuple[str, bytes]], list[Step]]:
        """A stage of a droppable round has lasted too long: go on without those who have not answered.

        Args:
            round: its address.
            stage: which stage's deadline is over.

        Returns:
            Frames to send and to whom, and what it led to.
        """
        return ([], []) if self._droppable is None else self._answer(self._droppable.expire(round, stage))

    def _answer(self, steps: Sequence[Step]) -> tuple[list[tuple[str, bytes]], list[Step]]:
        frames = []
        for step in steps:
            refusal = None if step.composed is None else step.composed.refusal
            for place, parts in step.answers.items():
                frames.append((self.parties[place], StageReply(step.round, step.answered, parts, refusal).encode()))
        return frames, list(steps)

    def waiting_for(self, round: Round) -> list[str]:
        """Parties that have not answered a round that is under way."""
        return [self.parties[place] for place in self._rounds.waiting_for(round)]

    def receive(
        self, party: str, frame: bytes | memoryview
    ) -> tuple[list[tuple[str, bytes]], Message | Composed | Step | None]:
        """Take a message from a party.

        Args:
            party: its name, as its TLS certificate says.
            frame: its bytes.

        Returns:
            Frames to send and to whom, and what whoever runs the session should know: a composed round, a step of one
            that can lose parties, a task done, a share that opens a round, or that the party leaves.

        Raises:
            SessionRefused: naming the party, if it broke the rules.
            PeerLost: if it begins a round that needs a party which is lost.
        """
        try:
            message = decode(frame)
            if isinstance(message, Refused):  # also Leave
                return [], message
            return self._act(party, message)
        except SessionRefused as problem:
            self.phase = Phase.ENDED
            if any(name in problem.message for name in self.parties):
                raise
            raise SessionRefused(f"{party}: {problem.message}", problem.remedy) from None

    def _act(self, party: str, message: Message) -> tuple[list[tuple[str, bytes]], Message | Composed | Step | None]:
        if self.phase == Phase.READY and isinstance(message, Share):
            if self.lost:
                raise self.peer_lost()
            tensor = message.header.round.tensor
            if message.header.opening == Opening.DEALT and tensor.partition("~")[0] not in self._terms.thresholds:
                raise SessionRefused(f"{party} asks for triples for {tensor!r}, which the manifest does not list.")
            composed = self._rounds.add(self.parties.index(party), message.header, message.bodies)
            # A reply without the bodies: who runs the session only needs to know that a round began.
            return ([], replace(message, bodies=())) if composed is None else (self._replies(composed), composed)
        if self.phase == Phase.READY and isinstance(message, StageMessage) and self._droppable is not None:
            if message.header.round.tensor not in self._terms.droppable:
                raise SessionRefused(f"{party} would open {message.header.round.tensor!r} without everybody.")
            place = self.parties.index(party)
            step = self._droppable.receive(place, message.header, message.stage, message.parts)
            frames, _ = self._answer([] if step is None else [step])
            return frames, step
        if self.phase == Phase.READY and isinstance(message, Done) and message.number < self._tasks:
            return [], message
        if self.phase == Phase.GREETING and isinstance(message, Hello):
            return self._greeted(party, message), None
        if self.phase == Phase.SIGNING and isinstance(message, Signature):
            return self._signed(party, message.signature), None
        if self.phase == Phase.KEYING and isinstance(message, Bundle) and not isinstance(message, Parts):
            return self._keyed(party, message.parts), None
        if self.phase == Phase.KEYING and isinstance(message, Ready):
            self._ready.add(party)
            if len(self._ready) == len(self.parties):
                self.phase = Phase.READY
                if self._terms.droppable:
                    assert self.manifest is not None
                    self._droppable = DroppableRounds(self.parties, self.manifest.digest, self._require_signature)
            return [], None
        raise SessionRefused(f"{party} sent a {type(message).__name__} while {self.phase.value}.")

    def _greeted(self, party: str, hello: Hello) -> list[tuple[str, bytes]]:
        if hello.party != party:
            raise SessionRefused(f"{party}, as its TLS certificate says, said hello as {hello.party!r}.")
        if party in self._entries:
            raise SessionRefused(f"{party} said hello twice.")
        if hello.scenario_hash != self._terms.scenario_hash:
            raise SessionRefused(
                f"{party} has another version of the scenario {self._terms.scenario!r}: the hashes differ.",
                "Install the same version on both sides, and give the same --agents and --set.",
            )
        entry = Entry(party, hello.certificate, hello.ephemeral, hello.signature)
        now = self._now or datetime.now(UTC)
        self._signers[party] = _verify_entry(entry, self.session, self._terms.scenario_hash, self._identity, now)
        self._entries[party] = entry
        if self.missing:
            return []
        self.manifest = Manifest(self.session, tuple(self._entries[name] for name in self.parties), self._terms)
        signature = self._identity.sign(b"offer", self.manifest.digest)
        self.phase = Phase.SIGNING
        return self._to_all(Offer(self.manifest.encode(), self._identity.certificate, signature))

    def _signed(self, party: str, signature: bytes) -> list[tuple[str, bytes]]:
        assert self.manifest is not None
        verify_signature(self._signers[party], party, b"manifest", self.manifest.digest, signature)
        self._signatures[party] = signature
        if len(self._signatures) < len(self.parties):
            return []
        self.phase = Phase.KEYING
        return self._to_all(Signatures(tuple(self._signatures[name] for name in self.parties)))

    def _keyed(self, party: str, parts: tuple[bytes, ...]) -> list[tuple[str, bytes]]:
        if len(parts) != len(self.parties) - 1 or party in self._bundles:
            raise SessionRefused(f"{party} sent {len(parts)} parts of the group's key: {len(self.parties) - 1}, once.")
        self._bundles[party] = parts
        if len(self._bundles) < len(self.parties):
            return []
        frames = []
        for to, name in enumerate(self.parties):
            # A party's bundle leaves itself out, so a later receiver's part stands one place earlier.
            mine = [self._bundles[s][to - (to > i)] for i, s in enumerate(self.parties) if i != to]
            frames.append((name, Parts(tuple(mine)).encode()))
        return frames

    def _require_signature(self, place: int, message: bytes, signature: bytes) -> None:
        name = self.parties[place]
        verify_signature(self._signers[name], name, _SURVIVORS, message, signature)

    def _replies(self, composed: Composed) -> list[tuple[str, bytes]]:
        if composed.refusal is None and composed.opening == Opening.PARTIES_BY_SUM:
            return self._to_all(Reply(composed.round, (Parcel(0, composed.masked),)))
        if composed.refusal is not None or composed.total is not None:
            return self._to_all(Reply(composed.round, (), composed.refusal))
        return [
            (name, Reply(composed.round, parcels).encode())
            for name, parcels in zip(self.parties, composed.parcels, strict=True)
        ]

    def _to_all(self, message: Message) -> list[tuple[str, bytes]]:
        frame = message.encode()
        return [(name, frame) for name in self.parties]

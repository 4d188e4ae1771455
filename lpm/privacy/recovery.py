"""The coordinator's side of droppable rounds: it waits, tells who survives, rebuilds self masks, and opens once.

A pure state machine beside `composition`: messages, losses and deadlines are events that go in; answers come out. Who
is lost before its contribution has come is left out of the sum; who is lost later is in it, and the others' shares of
its seed stand for it. If somebody is left out, whoever is lost before the survivors are named is left out as well; a
loss among the named ends the round, since the pair mask of the two could be rebuilt by nobody. Each share and key that
is revealed is held against what was committed to in the first message, so a wrong one is traced to who sent it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lpm.errors import RoundRefused, SessionRefused
from lpm.privacy.commitments import DIGEST_BYTES
from lpm.privacy.composition import Composed
from lpm.privacy.dropout import (
    PAIR_KEY_BYTES,
    SEALED_SHARE_BYTES,
    SHARE_BYTES,
    SIGNATURE_BYTES,
    pack_delivered,
    pack_places,
    pack_signature,
    pair_commitment,
    read_pairs,
    round_context,
    seed_commitment,
    share_commitment,
    survivors_message,
    threshold,
)
from lpm.privacy.masks import key_stream, remove_pair_mask
from lpm.privacy.secure_sum import Header, Opening, Round, Stage
from lpm.privacy.shamir import PRIME, weights_at_zero

__all__ = ["DroppableRounds", "Step", "Verify"]

Verify = Callable[[int, bytes, bytes], None]
"""Refuses, by raising `SessionRefused` with the party's name, what a place did not sign."""


@dataclass(frozen=True, repr=False)
class Step:
    """What an event led to.

    Args:
        round: which round.
        stage: what is waited for now.
        moved: whether the stage has just begun, so that its deadline counts from here.
        answers: place → the parts of the answer to its last message.
        answered: the stage that the answers answer.
        composed: the end of the round, if this is it.
        lost: places without which the round can't be opened; the session has to end.
    """

    round: Round
    stage: Stage
    moved: bool = False
    answers: dict[int, list[bytes]] = field(default_factory=dict)
    answered: Stage = Stage.SEEDS
    composed: Composed | None = None
    lost: tuple[int, ...] = ()


class DroppableRounds:
    """All droppable rounds of a session, and who is lost in it.

    Args:
        names: of the parties, in roster order.
        binding: digest of the signed manifest.
        verify: holds signatures against the roster.
        at_once: how many rounds may be under way; more are a broken or hostile party.

    Attributes:
        lost: places that are gone.
        latest: parameter hash of the latest round that somebody took part in.
    """

    def __init__(self, names: Sequence[str], binding: bytes, verify: Verify, at_once: int = 64) -> None:
        self.lost: set[int] = set()
        self._names = tuple(names)
        self._binding = binding
        self._verify = verify
        self._at_once = at_once
        self._rounds: dict[bytes, _DroppableRound] = {}
        self._ended: set[bytes] = set()
        self._opened: set[bytes] = set()
        self.latest = b""

    @property
    def under_way(self) -> bool:
        """Whether any round waits for parties."""
        return bool(self._rounds)

    def stage(self, round: Round) -> Stage | None:
        """What a round waits for; None if it is not under way."""
        pending = self._rounds.get(round.context())
        return None if pending is None else pending.stage

    def receive(self, place: int, header: Header, stage: Stage, parts: Sequence[bytes | memoryview]) -> Step | None:
        """Take a party's message.

        Args:
            place: the party's.
            header: the plain part.
            stage: which message.
            parts: as the stage has them; none if the header raises a flag.

        Returns:
            What it led to; None for a message that comes after the round has ended or gone on without its sender.

        Raises:
            SessionRefused: naming the party that broke the rules.
        """
        key = header.round.context()
        if place in self.lost or _mark(key) in self._ended:
            return None
        pending = self._rounds.get(key)
        if pending is None:
            if stage != Stage.SEEDS:
                raise SessionRefused(f"{self._names[place]} goes on with a round that nobody has begun.")
            if _address(header.round) in self._opened:
                name = self._names[place]
                raise SessionRefused(f"{name} would open {header.round.tensor!r} again: a sum is opened once.")
            if len(self._rounds) >= self._at_once:
                raise SessionRefused(f"{self._names[place]} has more than {self._at_once} rounds under way.")
            pending = self._rounds[key] = _DroppableRound(header.round, self._names, self._binding, self._verify)
        self.latest = header.round.parameters
        pending.take(place, header, stage, parts)
        return self._step(pending)

    def lose(self, place: int) -> list[Step]:
        """A party is gone for the rest of the session.

        Args:
            place: the party's.

        Returns:
            What that led to in each round under way.
        """
        self.lost.add(place)
        return [self._step(pending) for pending in list(self._rounds.values())]

    def expire(self, round: Round, stage: Stage) -> list[Step]:
        """A stage's deadline is over: whoever has not answered is lost.

        Args:
            round: which round.
            stage: which stage's deadline; nothing happens if the round has gone on.

        Returns:
            What that led to in each round under way.
        """
        pending = self._rounds.get(round.context())
        if pending is None or pending.stage != stage:
            return []
        self.lost |= pending.waiting(self.lost)
        return [self._step(each) for each in list(self._rounds.values())]

    def _step(self, pending: _DroppableRound) -> Step:
        if pending.waiting(self.lost):
            return Step(pending.round, pending.stage)
        step = pending.advance(self.lost)
        if step.composed is not None or step.lost:
            key = pending.round.context()
            del self._rounds[key]
            self._ended.add(_mark(key))
            if step.composed is not None and step.composed.refusal is None:
                self._opened.add(_address(pending.round))
        return step


def _mark(context: bytes) -> bytes:
    return hashlib.sha256(context).digest()[:16]


def _address(round: Round) -> bytes:
    """What is summed, whichever attempt it is."""
    return _mark(replace(round, attempt=0).context())


class _DroppableRound:
    """One round; see `DroppableRounds`."""

    def __init__(self, round: Round, names: Sequence[str], binding: bytes, verify: Verify) -> None:
        self.round = round
        self.stage = Stage.SEEDS
        self._names = names
        self._parties = len(names)
        self._binding = binding
        self._verify = verify
        self._threshold = threshold(len(names))
        self._headers: dict[int, Header] = {}
        self._answered: dict[int, Sequence[bytes]] = {}
        self._candidates = set(range(len(names)))
        self._raised: list[Header] = []
        self._seeds: dict[int, Sequence[bytes]] = {}
        self._contributions: dict[int, bytes] = {}

    def waiting(self, lost: set[int]) -> set[int]:
        """Who has yet to answer in this stage."""
        return self._candidates - set(self._answered) - lost

    def take(self, place: int, header: Header, stage: Stage, parts: Sequence[bytes | memoryview]) -> None:
        name = self._names[place]
        if header.opening != Opening.COORDINATOR:
            raise SessionRefused(f"{name} opens {self.round.tensor!r} to somebody else than the others do.")
        if stage != self.stage or place not in self._candidates or place in self._answered:
            raise SessionRefused(f"{name} sent {stage.name} of {self.round.tensor!r} twice or out of turn.")
        first = self._headers.setdefault(place, header)
        if (first.digest, first.sequence) != (header.digest, header.sequence):
            raise SessionRefused(f"{name} changed its mind in the round {self.round.tensor!r}.")
        if header.raised:
            self._raised.append(header)
        else:
            self._require_lengths(place, parts)
            if stage == Stage.SIGNATURE:
                self._verify(place, survivors_message(self._context(place), self._survivors()), bytes(parts[0]))
        self._answered[place] = [] if header.raised else [bytes(part) for part in parts]

    def _require_lengths(self, place: int, parts: Sequence[bytes | memoryview]) -> None:
        n, s = self._parties, len(self._contributions)
        found = [len(part) for part in parts]
        if self.stage == Stage.CONTRIBUTION:
            wanted = len(found) == 1 and found[0] % 8 == 0
        else:
            wanted = (
                found
                == {
                    Stage.SEEDS: [n * DIGEST_BYTES] + (n - 1) * [SEALED_SHARE_BYTES + DIGEST_BYTES],
                    Stage.SIGNATURE: [SIGNATURE_BYTES],
                    Stage.REVEAL: [s * SHARE_BYTES, (n - s) * PAIR_KEY_BYTES],
                }[self.stage]
            )
        if not wanted:
            name = self._names[place]
            raise SessionRefused(f"{name}'s {self.stage.name} of {self.round.tensor!r} has the wrong length.")

    def advance(self, lost: set[int]) -> Step:
        """End a stage that nobody is waited for in."""
        if (refusal := self._refusal()) is not None:
            composed = Composed(self.round, Opening.COORDINATOR, refusal)
            return Step(self.round, self.stage, answers=self._to_all([]), answered=self.stage, composed=composed)
        stage = {
            Stage.SEEDS: self._end_seeds,
            Stage.CONTRIBUTION: self._end_contributions,
            Stage.SIGNATURE: self._end_signatures,
            Stage.REVEAL: self._end_reveal,
        }[self.stage]
        return stage(lost)

    def _refusal(self) -> RoundRefused | None:
        rescale = any(header.rescale for header in self._raised)
        abort = next((header.abort for header in self._raised if header.abort), "")
        # One that is lost before it contributes has no say.
        digests = {self._headers[place].digest for place in self._answered}
        sent = self._answered.values() if self.stage == Stage.CONTRIBUTION else ()
        lengths = {len(part) for parts in sent for part in parts}
        if len(lengths) > 1:
            abort = abort or f"the parties' tensors {self.round.tensor!r} have different lengths"
        if rescale or abort or len(digests) > 1:
            return RoundRefused(rescale=rescale, diverged=len(digests) > 1, abort=abort)
        return None

    def _to_all(self, parts: list[bytes]) -> dict[int, list[bytes]]:
        return {place: parts for place in self._answered}

    def _too_few(self, lost: set[int]) -> Step:
        return Step(self.round, self.stage, lost=tuple(sorted(lost)))

    def _begin(self, stage: Stage, candidates: set[int], answers: dict[int, list[bytes]]) -> Step:
        answered, self.stage, self._candidates, self._answered = self.stage, stage, candidates, {}
        return Step(self.round, stage, moved=True, answers=answers, answered=answered)

    def _end_seeds(self, lost: set[int]) -> Step:
        if len(self._answered) < self._threshold:
            return self._too_few(lost)
        self._seeds = dict(self._answered)
        self._require_pairs()
        answers = {
            to: [
                pack_delivered(
                    dealer,
                    self._headers[dealer].sequence,
                    (part := parts[1 + to - (to > dealer)])[:SEALED_SHARE_BYTES],
                    part[SEALED_SHARE_BYTES:],
                )
                for dealer, parts in sorted(self._seeds.items())
                if dealer != to
            ]
            for to in self._seeds
        }
        return self._begin(Stage.CONTRIBUTION, set(self._seeds), answers)

    def _pairs(self, place: int) -> dict[int, bytes]:
        return dict(read_pairs(self._parties, place, self._seeds[place][0][DIGEST_BYTES:]))

    def _require_pairs(self) -> None:
        pairs = {place: self._pairs(place) for place in self._seeds}
        for one in pairs:
            for other in pairs:
                if one < other and pairs[one][other] != pairs[other][one]:
                    raise SessionRefused(
                        f"{self._names[one]} and {self._names[other]} committed to different masks in "
                        f"{self.round.tensor!r}: one of them uses another key than the session's."
                    )

    def _end_contributions(self, lost: set[int]) -> Step:
        if len(self._answered) < self._parties:
            # A pair mask between one that is left out and one that is lost since is known to nobody who is still here:
            # the latter is left out too, while nobody has been told who survives. Its own mask stays on what it sent.
            self._answered = {place: parts for place, parts in self._answered.items() if place not in lost}
        if len(self._answered) < self._threshold:
            return self._too_few(lost)
        self._contributions = {place: parts[0] for place, parts in self._answered.items()}
        survivors = self._survivors()
        return self._begin(Stage.SIGNATURE, set(survivors), self._to_all([pack_places(survivors)]))

    def _survivors(self) -> tuple[int, ...]:
        return tuple(sorted(self._contributions))

    def _second_loss(self, lost: set[int]) -> bool:
        return len(self._contributions) < self._parties and bool(lost & set(self._contributions))

    def _end_signatures(self, lost: set[int]) -> Step:
        if len(self._answered) < self._threshold or self._second_loss(lost):
            return self._too_few(lost)
        signatures = [pack_signature(place, parts[0]) for place, parts in sorted(self._answered.items())]
        return self._begin(Stage.REVEAL, set(self._answered), self._to_all(signatures))

    def _end_reveal(self, lost: set[int]) -> Step:
        if len(self._answered) < self._threshold or self._second_loss(lost):
            return self._too_few(lost)
        total = self._open()
        composed = Composed(self.round, Opening.COORDINATOR, total=total.view(np.int64), survivors=self._survivors())
        return Step(self.round, self.stage, answers=self._to_all([]), answered=self.stage, composed=composed)

    def _context(self, place: int) -> bytes:
        return round_context(self._binding, self._headers[place])

    def _open(self) -> NDArray[np.uint64]:
        survivors, holders = self._survivors(), sorted(self._answered)
        context = self._context(survivors[0])
        total = np.zeros(len(self._contributions[survivors[0]]) // 8, dtype=np.uint64)
        for contribution in self._contributions.values():
            total += np.frombuffer(contribution, dtype="<u8")
        enough = holders[: self._threshold]
        weights = weights_at_zero([holder + 1 for holder in enough])
        for k, dealer in enumerate(survivors):
            secret = 0
            for holder, weight in zip(enough, weights, strict=True):
                share = self._answered[holder][0][k * SHARE_BYTES : (k + 1) * SHARE_BYTES]
                self._require_share(context, dealer, holder, share)
                secret = (secret + weight * int.from_bytes(share, "little")) % PRIME
            if secret >= 2**256 or seed_commitment(context, dealer, secret.to_bytes(32, "little")) != bytes(
                self._seeds[dealer][0][:DIGEST_BYTES]
            ):
                raise SessionRefused(f"{self._names[dealer]} dealt shares of another seed than it committed to.")
            total -= key_stream(secret.to_bytes(32, "little"), total.size)
        lost = [place for place in range(self._parties) if place not in self._contributions]
        for holder in survivors if lost else ():
            committed = self._pairs(holder)
            for k, gone in enumerate(lost):
                key = self._answered[holder][1][k * PAIR_KEY_BYTES : (k + 1) * PAIR_KEY_BYTES]
                if pair_commitment(context, holder, gone, key) != committed[gone]:
                    raise SessionRefused(f"{self._names[holder]} revealed another key than it committed to.")
                remove_pair_mask(total, holder, gone, key)
        return total

    def _require_share(self, context: bytes, dealer: int, holder: int, share: bytes) -> None:
        if holder == dealer:
            return  # its own share passed nobody; the seed's commitment stands for it
        committed = self._seeds[dealer][1 + holder - (holder > dealer)][SEALED_SHARE_BYTES:]
        if share_commitment(context, dealer, holder, share) != committed:
            raise SessionRefused(f"{self._names[holder]} revealed another share than {self._names[dealer]} gave it.")

"""The `masked` engine: a star for 3 to 100 institutions, in which the coordinator adds up what it can't read.

Rounds of a simulation or an adjoint need everybody: a simulation without a party's people is wrong, and a step repeated
with fewer is a subtraction. A contribution carries pair masks (`masks`) that cancel in the full sum and in no other;
one message goes up and one comes down. The first in the roster adds one more mask, which all parties know and the
coordinator does not, so that it can't read the sum it adds up. Sixteen words of checksum under the group's key travel
along, so that a sum that was altered, replayed, cut, or added up from other rounds than everybody's does not open.

Rounds that the manifest marks as droppable (losses, gradients) are opened to the coordinator though parties are lost
(`dropout`, `recovery`). After Bonawitz et al. 2017 and Bell et al. 2020; eq. 9–10 of the paper for the sums.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lpm.errors import InputError, LpmError, RoundRefused, SessionRefused
from lpm.privacy.dropout import DroppableParty, Witness, round_context
from lpm.privacy.masks import key_stream, zero_share
from lpm.privacy.sealing import SealedRounds, SessionKeys
from lpm.privacy.secure_sum import Channel, Consent, Flags, Opening, Round, SecureSum, require_enough

__all__ = ["CHECK_WORDS", "MaskedSum", "checksum"]

CHECK_WORDS = 16
"""Words of checksum. An alteration passes with probability 2^−16 at most: that is, if it touches nothing but highest
bits; one of a lowest bit passes with 2^−1024."""


def checksum(words: NDArray[np.uint64], key: bytes) -> NDArray[np.uint64]:
    """A keyed checksum that adds up as the words do.

    Args:
        words: [count].
        key: 32 bytes that whoever may alter the words does not know.

    Returns:
        [16] words. The checksum of a sum is the sum of the checksums, mod 2^64.

    Source: the Toeplitz construction of UMAC (RFC 4418), over Z_2^64 and linear.
    """
    factors = key_stream(key, words.size + CHECK_WORDS - 1)
    windows = np.lib.stride_tricks.sliding_window_view(factors, words.size) if words.size else np.zeros((16, 0), "<u8")
    return np.asarray(windows @ words, dtype=np.uint64)


class MaskedSum(SecureSum):
    """One party's secure sum by masks; see `SecureSum` for the contract and its guarantee.

    Args:
        keys: the party's keys of this session.
        channel: its way to the coordinator.
        droppable: tensors whose rounds can lose parties, as the manifest marks them.
        witness: the identities behind the roster, for those rounds.

    Raises:
        InputError: for fewer than three parties, or droppable rounds without identities.
    """

    def __init__(
        self,
        keys: SessionKeys,
        channel: Channel,
        droppable: Collection[str] = (),
        witness: Witness | None = None,
    ) -> None:
        require_enough(keys.parties)
        if droppable and witness is None:
            raise InputError("Rounds that can lose parties need signatures: the session has no identities.")
        self.parties = keys.parties
        self.me = keys.me
        self._keys = keys
        self._rounds = SealedRounds(keys, channel)
        self._droppable = frozenset(droppable)
        self._witness = witness
        self._failed: dict[Round, bytes] = {}
        self._revealed: dict[Round, bytes] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MaskedSum(party {self.me} of {self.parties})"

    def open_to_parties(self, round: Round, words: NDArray[np.int64], flags: Flags) -> NDArray[np.int64]:
        """See `SecureSum.open_to_parties`."""
        flat = self._flat(round, words)
        header = self._rounds.begin(round, Opening.PARTIES_BY_SUM, flags)
        context = round_context(self._keys.binding, header)
        check_key = self._keys.group_key(b"check", context)
        vector = np.concatenate((flat, checksum(flat, check_key)))
        count = vector.size
        with self._remembered(round, flat):
            if not flags.raised:
                vector += zero_share(self.me, self._keys.pair_secrets, context, count)
                if self.me == 0:
                    vector += key_stream(self._keys.group_key(b"mask", context), count)
            total = np.frombuffer(self._rounds.to_sum(header, vector.astype("<u8", copy=False).tobytes()), dtype="<u8")
        total = total - key_stream(self._keys.group_key(b"mask", context), count)
        if (checksum(total[: flat.size], check_key) != total[flat.size :]).any():
            raise SessionRefused(
                f"The sum {round.tensor!r} of step {round.step} is not that of the parties' contributions: it was "
                "altered, moved or replayed, or a party works with other parameters or another environment."
            )
        return total[: flat.size].view(np.int64).reshape(words.shape)

    def open_to_coordinator(
        self, round: Round, words: NDArray[np.int64], flags: Flags, consent: Consent | None = None
    ) -> None:
        """See `SecureSum.open_to_coordinator`."""
        flat = self._flat(round, words)
        if round.tensor in self._droppable:
            self._droppable_round(round, flat, flags, consent)
            return
        header = self._rounds.begin(round, Opening.COORDINATOR, flags)
        if flags.raised:
            self._rounds.to_coordinator(header, b"")
            return
        if consent is not None:
            consent(tuple(range(self.parties)))
        with self._remembered(round, flat):
            context = round_context(self._keys.binding, header)
            vector = flat + zero_share(self.me, self._keys.pair_secrets, context, flat.size)
            self._rounds.to_coordinator(header, vector.astype("<u8", copy=False).tobytes())

    def _droppable_round(self, round: Round, flat: NDArray[np.uint64], flags: Flags, consent: Consent | None) -> None:
        assert self._witness is not None
        address = replace(round, attempt=0)

        def judge(survivors: tuple[int, ...]) -> None:
            # Two sums of different parties, or of different inputs, could be subtracted.
            mark = hashlib.sha256(repr(survivors).encode() + flat.tobytes()).digest()
            with self._lock:
                if self._revealed.setdefault(address, mark) != mark:
                    raise SessionRefused(
                        f"The sum {round.tensor!r} was revealed for other parties or inputs before: "
                        "the difference would be somebody's own."
                    )
            if consent is not None:
                consent(survivors)

        header = self._rounds.begin(round, Opening.COORDINATOR, flags)
        party = DroppableParty(self._keys, self._witness, header, flat, judge)
        with self._remembered(round, flat):
            stage, parts = party.stage, [] if flags.raised else party.begin()
            while (answer := party.receive(self._rounds.stage(header, stage, parts))) is not None:
                stage, parts = answer

    def _flat(self, round: Round, words: NDArray[np.int64]) -> NDArray[np.uint64]:
        if words.dtype != np.int64:
            raise InputError(f"A contribution has the type {words.dtype}: words are int64 (see lpm.ring).")
        flat = np.ascontiguousarray(words).reshape(-1).view(np.uint64)
        with self._lock:
            before = self._failed.get(replace(round, attempt=0))
        if before is not None and before != hashlib.sha256(flat.tobytes()).digest():
            raise SessionRefused(
                f"The sum {round.tensor!r} of step {round.step} is repeated with other words than when it was aborted:"
                " the difference of the two sums would tell what changed."
            )
        return flat

    @contextmanager
    def _remembered(self, round: Round, flat: NDArray[np.uint64]) -> Iterator[None]:
        """Keep the mark of what was sent in a round that failed, since somebody may have opened it."""
        try:
            yield
        except LpmError as problem:
            self._note(round, flat, problem)
            raise
        self._note(round, flat, None)

    def _note(self, round: Round, flat: NDArray[np.uint64], problem: LpmError | None) -> None:
        address = replace(round, attempt=0)
        with self._lock:
            # Another scale makes other words of the same numbers, and nobody has opened the old ones: parties agreed.
            if problem is None or (isinstance(problem, RoundRefused) and problem.rescale):
                self._failed.pop(address, None)
            else:
                self._failed[address] = hashlib.sha256(flat.tobytes()).digest()

"""A party's log of the sums it took part in, so that a step which is repeated is seen to be the same step.

A session that was cut short is resumed from a checkpoint, and the steps after it are done again. Their sums must be the
same to the byte: another total would mean that somebody's people or series have changed in between, and the difference
of the two totals would tell what. The log keeps keyed digests, no sums.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm.checkpoint import DiskFull
from lpm.errors import SessionRefused
from lpm.privacy.secure_sum import Round

__all__ = ["RoundLog"]

_ADDRESS, _DIGEST = 16, 32


class RoundLog:
    """The rounds of one task, in one file that outlives the session.

    Args:
        path: of the file; it and its folder are made with the first round.
        key: the party's storage key; without it the digests tell nothing.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._key = hashlib.sha256(b"lpm round log 1" + key).digest()
        # What a crash has cut off is no record.
        known = path.read_bytes() if path.is_file() else b""
        size = _ADDRESS + _DIGEST
        self._whole = len(known) // size * size
        self._known = {known[k : k + _ADDRESS]: known[k + _ADDRESS : k + size] for k in range(0, self._whole, size)}

    def compare(self, round: Round, words: NDArray[np.int64], total: NDArray[np.int64]) -> None:
        """Log a round, or hold it against the log if it was opened before.

        Args:
            round: its address.
            words: this party's contribution.
            total: the opened sum.

        Raises:
            SessionRefused: this party's words or the sum are not those of the first time.
            DiskFull: there is no room for the record.
        """
        if not self._is_first_or_same(round, words.tobytes() + total.tobytes()):
            raise SessionRefused(
                f"The sum {round.tensor} of step {round.step} is not the one that was opened before the session was "
                "resumed: the people, the series or the installation of a party have changed.",
                "Start a new run.",
            )

    def require_same_parties(self, round: Round, places: Sequence[int]) -> None:
        """Log whose sum is about to be opened, or refuse it if it was another set of parties before.

        Args:
            round: stands for what is opened, whichever attempt and task it is.
            places: whose contributions are in the sum.

        Raises:
            SessionRefused: the same sum was opened for other parties; the difference would be somebody's own.
            DiskFull: there is no room for the record.
        """
        if not self._is_first_or_same(round, repr(tuple(places)).encode()):
            raise SessionRefused(
                f"The sum {round.tensor} of this task was opened before for other parties than the {len(places)} of "
                "now: the difference of the two would be somebody's own.",
                "Start a new run.",
            )

    def _is_first_or_same(self, round: Round, content: bytes) -> bool:
        address = hashlib.blake2b(round.context(), digest_size=_ADDRESS, key=self._key).digest()
        digest = hashlib.blake2b(content, digest_size=_DIGEST, key=self._key).digest()
        before = self._known.get(address)
        if before is None:
            self._append(address + digest)
            self._known[address] = digest
        return before in (None, digest)

    def _append(self, record: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if os.pwrite(handle, record, self._whole) < len(record):
                    raise DiskFull(self.path)
            finally:
                os.close(handle)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull(self.path) from None
            raise
        self._whole += len(record)

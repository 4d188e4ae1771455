"""What a party keeps of its rounds, so that it can replay its shard before an auditor, long after the session.

A party has committed to each contribution before it was added up (`federated.py`), and the roots are in its ledger. To
open them it simulates its shard again from its seed, and for that it needs what it can't compute alone: the sums it was
told. They are kept here, task by task, sealed under its storage key, up to a size that the steward's policy states.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from lpm.checkpoint import DiskFull, pack, unpack
from lpm.errors import CheckpointError
from lpm.privacy.secure_sum import Round

__all__ = ["Segment", "Transcript", "Witness", "read_transcript"]

_LENGTH, _NONCE = struct.Struct("<I"), 12
_SUFFIX = ".rounds"


class Witness(Protocol):
    """Hears of every round of a party."""

    def committed(self, round: Round, leaf: bytes) -> None:
        """A commitment was made, as a leaf of the task's tree."""

    def opened(self, round: Round, total: NDArray[np.int64]) -> None:
        """A sum was opened to the parties."""

    def refused(self, round: Round) -> None:
        """A round was called off because a party asked for another scale."""


class Transcript:
    """The rounds of a party's tasks, one file for each task, over all sessions of a run.

    Args:
        folder: made with the first task.
        key: the party's storage key.
        limit: bytes of all files together beyond which sums are no longer kept; commitments always are.

    Attributes:
        complete: whether all sums of the task under way were kept so far.

    Guarantee: a record that a crash cut off is no record; the others are whole.
    """

    def __init__(self, folder: Path, key: bytes, limit: int) -> None:
        self._folder, self._seal, self._limit = folder, ChaCha20Poly1305(_derive(key)), limit
        self._path: Path | None = None
        self._size = 0
        self._used = sum(each.stat().st_size for each in folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else 0
        self.complete = True

    def begin(self, task: bytes, content: bytes) -> None:
        """From here on, rounds belong to a task.

        Args:
            task: its digest.
            content: the task itself, as it was sent.
        """
        self._path = self._folder / f"{task.hex()[:24]}{_SUFFIX}"
        self._size = _whole(self._path)
        self.complete = True
        self._append({"kind": "task", "content": content})

    def committed(self, round: Round, leaf: bytes) -> None:
        """See `Witness`."""
        self._append({"kind": "commitment", **vars(round), "leaf": leaf})

    def opened(self, round: Round, total: NDArray[np.int64]) -> None:
        """See `Witness`; a sum for which there is no room any more is left out."""
        if self._used > self._limit:
            self.complete = False
            return
        words = zlib.compress(np.ascontiguousarray(total, dtype="<i8").tobytes(), 1)
        self._append({"kind": "sum", **vars(round), "words": words})

    def refused(self, round: Round) -> None:
        """See `Witness`."""
        self._append({"kind": "refused", **vars(round)})

    def _append(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        nonce = os.urandom(_NONCE)
        sealed = nonce + self._seal.encrypt(nonce, b"".join(pack(record)), self._path.name.encode())
        data = _LENGTH.pack(len(sealed)) + sealed
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                written = os.pwrite(handle, data, self._size)
            finally:
                os.close(handle)
        except OSError:
            raise DiskFull(self._path) from None
        if written < len(data):
            raise DiskFull(self._path)
        self._size += len(data)
        self._used += len(data)


@dataclass
class Segment:
    """What was kept of one task in one session.

    Attributes:
        content: the task, as it was sent.
        commitments: (round, leaf), in order.
        sums: context of a round → its total; None if it was called off for another scale.
    """

    content: bytes
    commitments: list[tuple[Round, bytes]] = field(default_factory=list)
    sums: dict[bytes, NDArray[np.int64] | None] = field(default_factory=dict)


def read_transcript(folder: Path, key: bytes, task: str) -> Sequence[Segment]:
    """Read what was kept of a task: one segment for each time it was begun.

    Args:
        folder: of the transcript.
        key: the party's storage key.
        task: hex digest of the task.

    Returns:
        the segments in order; none if nothing was kept.

    Raises:
        CheckpointError: if a file was altered, or sealed under another key.
    """
    path = folder / f"{task[:24]}{_SUFFIX}"
    data = path.read_bytes() if path.is_file() else b""
    seal, found = ChaCha20Poly1305(_derive(key)), list[Segment]()
    at, end = 0, _whole(path)
    while at < end:
        (length,) = _LENGTH.unpack_from(data, at)
        sealed = data[at + _LENGTH.size : at + _LENGTH.size + length]
        at += _LENGTH.size + length
        try:
            record = unpack(seal.decrypt(sealed[:_NONCE], sealed[_NONCE:], path.name.encode()))
        except InvalidTag:
            raise CheckpointError(f"{path} was altered, or sealed under another key.", "Give its own key.") from None
        if record["kind"] == "task":
            found.append(Segment(record["content"]))
            continue
        round = Round(**{each.name: record[each.name] for each in fields(Round)})
        if record["kind"] == "commitment":
            found[-1].commitments.append((round, record["leaf"]))
        elif record["kind"] == "refused":
            found[-1].sums[round.context()] = None
        else:
            words = np.frombuffer(zlib.decompress(record["words"]), dtype="<i8")
            found[-1].sums[round.context()] = words.astype(np.int64)
    return found


def _whole(path: Path) -> int:
    """Bytes of a file up to the end of its last whole record."""
    if not path.is_file():
        return 0
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + _LENGTH.size <= size:
            file.seek(at)
            after = at + _LENGTH.size + _LENGTH.unpack(file.read(_LENGTH.size))[0]
            if after > size:
                break
            at = after
    return at


def _derive(key: bytes) -> bytes:
    # One storage key serves several kinds of file: each has a key of its own.
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lpm transcript 1").derive(key)

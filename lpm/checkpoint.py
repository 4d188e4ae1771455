"""Files that are whole or not there: atomic writing, and the checkpoints a run goes on from.

A file is written beside its target, flushed to the disk and renamed over it, so that a crash at any moment leaves
either the old content or the new. A checkpoint carries a digest of itself: one that was torn by the disk is told from
a whole one, and the one before it is used. Its content may be sealed under its holder's storage key.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpm.errors import CheckpointError, InputError, Interrupted

__all__ = ["Checkpoint", "CheckpointStore", "DiskFull", "atomic_file", "atomic_write", "pack", "unpack"]

logger = logging.getLogger(__name__)

_MAGIC = b"lpm-ckpt"
_VERSION = 1
_HEADER = struct.Struct("<8sBB6xQ32sQ")  # magic, version, sealed, step, digest of the context, payload length
_DIGEST = hashlib.sha256().digest_size
_NONCE = 12
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"step-(\d{12})\.lpm")
_TAG = "__lpm__"


class DiskFull(Interrupted):
    """There is no room for a file; what was there before is untouched, and the run can be resumed."""

    def __init__(self, path: Path, kept: str = "") -> None:
        super().__init__(
            f"The disk is full: {path} was not written.{f' {kept}' if kept else ''}",
            "Free some room and continue with `lpm resume RUN`.",
        )


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Hand out a path beside the target; on leaving, flush it to the disk and rename it over the target.

    Args:
        path: the file that shall be whole or unchanged.
        mode: permissions of the file (storage of a party: 0o600).

    Yields:
        The temporary path to write to; it is removed if the block fails.

    Raises:
        DiskFull: if there is no room; the target is unchanged.
        InputError: if the folder can't be written to; the target is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # Made with its final permissions, so that no other user can open it while it is being written.
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode))
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        # HDF5 reports a full disk in words only.
        if error.errno in _FULL or "No space left on device" in str(error):
            raise DiskFull(path) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            raise InputError(
                f"{path} can't be written: {os.strerror(error.errno)}.", "Name a folder you may write to with --out."
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | Iterable[bytes], mode: int = 0o644) -> None:
    """Write a file so that it is whole or unchanged.

    Args:
        path: the target; its folder exists.
        content: the bytes, at once or in pieces.
        mode: permissions of the file.

    Raises:
        DiskFull: if there is no room; the target is unchanged.
        InputError: if the folder can't be written to; the target is unchanged.
    """
    with atomic_file(path, mode) as temporary, open(temporary, "wb") as stream:
        for piece in (content,) if isinstance(content, bytes) else content:
            stream.write(piece)


def pack(content: Any) -> list[bytes]:
    """Write a tree of plain values and arrays as bytes, without pickle.

    Args:
        content: dicts (keys: text or whole numbers), lists, tuples, text, bytes, numbers, booleans, None, numpy arrays
            of numbers or booleans, and torch tensors.

    Returns:
        Pieces whose concatenation `unpack` reads back, bit for bit and type for type.

    Raises:
        TypeError: for anything else, naming where in the tree it is.
    """
    blobs: list[bytes] = []
    text = json.dumps(_encode(content, "content", blobs), separators=(",", ":")).encode()
    return [struct.pack("<Q", len(text)), text, *blobs]


def unpack(payload: bytes) -> Any:
    """Read back what `pack` wrote."""
    (length,) = struct.unpack_from("<Q", payload)
    return _decode(json.loads(payload[8 : 8 + length]), memoryview(payload)[8 + length :])


@dataclass(frozen=True)
class Checkpoint:
    """A state to go on from.

    Args:
        step: the step (or iteration) it was taken after.
        content: the tree of values that was saved.
    """

    step: int
    content: dict[str, Any]


class CheckpointStore:
    """The last checkpoints of one holder, in one folder.

    Args:
        folder: made when the first checkpoint is saved.
        key: 32 bytes; the content is sealed under it with ChaCha20-Poly1305. None: readable by whoever may read the
            file (its permissions are the owner's alone in both cases).
        context: what the checkpoints belong to (a run's or a session's name); one of another context is refused.
        keep: how many are kept.

    Guarantee: after a crash at any moment, `latest` gives the last or the last but one checkpoint, whole.
    """

    def __init__(self, folder: Path, key: bytes | None = None, context: str = "", keep: int = 2) -> None:
        if key is not None and len(key) != 32:
            raise CheckpointError("A storage key has 32 bytes.", "Make keys with `lpm keys local DIR`.")
        self.folder = folder
        self._key = _derive(key) if key is not None else None
        self._context = hashlib.sha256(context.encode()).digest()
        self._keep = max(1, keep)

    def __repr__(self) -> str:
        """The folder and nothing of the key."""
        return f"CheckpointStore({str(self.folder)!r}, sealed={self._key is not None})"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there (whole or not), ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match.group(1)) for entry in os.listdir(self.folder) if (match := _NAME.fullmatch(entry)))

    def save(self, content: Mapping[str, Any], step: int) -> Path:
        """Save a checkpoint and drop those that are no longer needed.

        Checkpoints of later steps are dropped too: they belong to a past that was resumed from before them.

        Args:
            content: what `pack` accepts.
            step: the step it was taken after, from 0.

        Returns:
            The file.

        Raises:
            DiskFull: if there is no room; the checkpoints that were there are untouched.
        """
        before = self.steps()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFull(self.folder) from None
            raise
        path = self._path(step)
        payload = b"".join(pack(dict(content)))
        sealed = self._key is not None
        if self._key is not None:
            payload = self._seal(self._key, payload, step)
        header = _HEADER.pack(_MAGIC, _VERSION, sealed, step, self._context, len(payload))
        digest = hashlib.sha256(header)
        digest.update(payload)
        try:
            atomic_write(path, [header, digest.digest(), payload], 0o600)
        except DiskFull:
            raise DiskFull(path, f"The checkpoint of step {before[-1]} is intact." if before else "") from None
        self._prune(step)
        return path

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of one step.

        Raises:
            CheckpointError: if it is not there, is torn, belongs to something else, or is sealed under another key.
        """
        path = self._path(step)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step} (it has: {have}).") from None
        payload = _verify(path, raw, step)
        _, _, sealed, _, context, _ = _HEADER.unpack_from(raw)
        if context != self._context:
            raise CheckpointError(f"{path} belongs to another run.", "Resume it in the folder it was written in.")
        if bool(sealed) != (self._key is not None):
            raise CheckpointError(
                f"{path} is {'sealed and no storage key was given' if sealed else 'not sealed, but a key was given'}.",
                "Resume with the key folder the run was started with.",
            )
        if self._key is not None:
            payload = self._open(self._key, path, payload, step)
        return Checkpoint(step, unpack(payload))

    def latest(self) -> Checkpoint | None:
        """The last whole checkpoint, or None if none was ever saved.

        Raises:
            CheckpointError: if there are some and none is whole, or they belong to something else.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except _Torn as error:
                before = " The one before it is used." if step > steps[0] else ""
                logger.warning("%s%s", error.message, before)
        if steps:
            raise CheckpointError(f"No checkpoint in {self.folder} is whole.", "Start the run again.")
        return None

    def _path(self, step: int) -> Path:
        if step < 0:
            raise CheckpointError(f"The step of a checkpoint is {step}: a whole number from 0.")
        return self.folder / f"step-{step:012d}.lpm"

    def _prune(self, step: int) -> None:
        past = [known for known in self.steps() if known <= step]
        for known in self.steps():
            if known > step or known in past[: -self._keep]:
                self._path(known).unlink(missing_ok=True)
        for leftover in self.folder.glob(".step-*.tmp"):
            leftover.unlink(missing_ok=True)

    def _associated(self, step: int) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, True, step, self._context, 0)

    def _seal(self, key: bytes, payload: bytes, step: int) -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        nonce = os.urandom(_NONCE)
        return nonce + ChaCha20Poly1305(key).encrypt(nonce, payload, self._associated(step))

    def _open(self, key: bytes, path: Path, payload: bytes, step: int) -> bytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        try:
            return ChaCha20Poly1305(key).decrypt(payload[:_NONCE], payload[_NONCE:], self._associated(step))
        except InvalidTag:
            raise CheckpointError(
                f"{path} was sealed under another key, or was altered.",
                "Resume with the key folder the run was started with.",
            ) from None


class _Torn(CheckpointError):
    """The file is not what was written."""


def _verify(path: Path, raw: bytes, step: int) -> bytes:
    torn = _Torn(f"The checkpoint {path} is torn.")
    start = _HEADER.size + _DIGEST
    if len(raw) < start:
        raise torn
    magic, version, _, written_step, _, length = _HEADER.unpack_from(raw)
    digest = hashlib.sha256(raw[: _HEADER.size])
    payload = raw[start:]
    digest.update(payload)
    if magic != _MAGIC or length != len(payload) or digest.digest() != raw[_HEADER.size : start]:
        raise torn
    if version != _VERSION:
        raise CheckpointError(f"{path} has the format {version}: {_VERSION}.", "Resume with the lpm that wrote it.")
    if written_step != step:
        raise CheckpointError(f"{path} holds step {written_step}, not {step}: it was renamed.")
    return payload


def _derive(key: bytes) -> bytes:
    # One storage key serves several kinds of file: each has a key of its own.
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lpm checkpoint 1").derive(key)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _encode(value: Any, where: str, blobs: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, list):
        return [_encode(item, f"{where}[{i}]", blobs) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [_encode(item, f"{where}[{i}]", blobs) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(type(key) is str and key != _TAG for key in value):
            return {key: _encode(item, f"{where}.{key}", blobs) for key, item in value.items()}
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has a key of the type {type(key).__name__}: text or a whole number")
        return {_TAG: "map", "items": [[key, _encode(item, f"{where}.{key}", blobs)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        blobs.append(bytes(value))
        return {_TAG: "bytes", "size": len(value), "at": _offset(blobs)}
    kind = "array"
    if isinstance(value, np.generic):
        kind, value = "scalar", np.asarray(value)
    elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        kind, value = "tensor", value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufcmM":
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{where} is {found}: a checkpoint holds numbers, text, bytes, lists, dicts and arrays")
    blobs.append(value.tobytes())
    return {_TAG: kind, "dtype": value.dtype.str, "shape": list(value.shape), "at": _offset(blobs)}


def _offset(blobs: list[bytes]) -> int:
    return sum(map(len, blobs[:-1]))


def _decode(value: Any, blobs: memoryview) -> Any:
    if isinstance(value, list):
        return [_decode(item, blobs) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item, blobs) for key, item in value.items()}
    if kind == "tuple":
        return tuple(_decode(item, blobs) for item in value["items"])
    if kind == "map":
        return {key: _decode(item, blobs) for key, item in value["items"]}
    if kind == "bytes":
        return bytes(blobs[value["at"] : value["at"] + value["size"]])
    dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    array = np.frombuffer(bytes(blobs[value["at"] : value["at"] + size]), dtype).reshape(shape).copy()
    if kind == "scalar":
        return array[()]
    if kind == "tensor":
        import torch

        return torch.from_numpy(array)
    return array

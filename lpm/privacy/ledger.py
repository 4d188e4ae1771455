"""A party's ledger: what it was asked, what it opened to whom, what it refused; nobody can rewrite it later.

Each line is a JSON object that names the digest of the line before it and is signed by the party. A head, signed too
and kept in a file beside it, names the last line, so that a cut-off end is found; who keeps an old head elsewhere (the
coordinator is given one at the end of a session) finds a ledger that was set back together with its head. A ledger
holds names, numbers of rounds and digests, never a private value. It is the signed record behind the leakage report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lpm.checkpoint import DiskFull, atomic_write
from lpm.errors import InputError, LpmError

__all__ = ["LEDGER_FILE", "Ledger", "LedgerBroken", "Line", "Trust", "Verdict", "head_file", "verify"]

Trust = Callable[[bytes, str, datetime], None]
"""Judges a certificate (DER, the party's name, at which time) by raising `LpmError`, as whoever knows the authority."""

LEDGER_FILE = "ledger.jsonl"
"""Its name in a party's folder."""

_FIELDS = {"seq", "time", "previous", "kind", "body", "signature"}
_DOMAIN = b"lpm/ledger/v1\0"
_START = "0" * 64
_HEX = re.compile(r"[0-9a-f]+")
_LINE_LIMIT = 1 << 20


class LedgerBroken(LpmError):
    """A ledger is not what its party wrote."""


@dataclass(frozen=True)
class Line:
    """One entry.

    Attributes:
        seq: its number, from 0.
        time: UTC, ISO 8601.
        kind: "open", "key", "recovered", "session", "task", "done", "broken", "refused" or "close".
        body: what is recorded.
    """

    seq: int
    time: str
    kind: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a check of a ledger found.

    Attributes:
        party: as the first line names it.
        certificates: DER of every certificate under which lines are signed, in order.
        lines: how many there are.
        head: hex digest of the last line.
        problems: what is wrong, line by line; empty if nothing is.
        notes: what is worth knowing and no fault.
        entries: the lines, as far as they can be read.
    """

    party: str
    certificates: tuple[bytes, ...]
    lines: int
    head: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    entries: tuple[Line, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class _End:
    """Where a ledger ends: how many lines, the digest of the last one, how many bytes."""

    lines: int = 0
    digest: str = _START
    size: int = 0


def head_file(path: Path) -> Path:
    """The file of a ledger's head."""
    return path.with_suffix(".head")


class Ledger:
    """A party's own ledger, open for writing.

    Args:
        path: of the file; made with the first line.
        party: its name.
        certificate: DER of its identity certificate.
        sign: makes an Ed25519 signature with the certified key.
        trust: judges certificates.
        succession: what proves that a new key follows the old one, as `lpm keys rotate` keeps it; {} without.

    Raises:
        LedgerBroken: if the file there is not whole: nothing is ever added to a ledger that was tampered with.

    Guarantee: after a crash at any moment, the next opening finds all lines but perhaps the one being written; a torn
        line is cut off, and the ledger says so.
    """

    def __init__(
        self,
        path: Path,
        party: str,
        certificate: bytes,
        sign: Callable[[bytes], bytes],
        trust: Trust,
        succession: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._sign = sign
        self._writing = threading.Lock()
        self._end = _End()
        self._headed = 0
        torn = _torn(path)
        if torn:
            _cut(path, torn)
        if path.is_file() and path.stat().st_size:
            found = verify(path, trust)
            if found.problems:
                raise LedgerBroken(
                    f"The ledger {path} can't be continued: {found.problems[0]}",
                    f"Keep it as evidence and look at it with `lpm verify-log {path}`; then move it away.",
                )
            self._end = _End(found.lines, found.head, path.stat().st_size)
            if torn:
                self.append("recovered", {"bytes": torn})
            if found.party != party:
                raise LedgerBroken(f"The ledger {path} is {found.party}'s, not {party}'s.", "Use another --out.")
            if found.certificates[-1] != certificate:
                self.append("key", {"certificate": _text(certificate), **(succession or {})})
        else:
            self.append("open", {"version": 1, "party": party, "certificate": _text(certificate)})

    @property
    def head(self) -> str:
        """Hex digest of the last line."""
        return self._end.digest

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return self._end.lines

    def append(self, kind: str, body: Mapping[str, Any]) -> None:
        """Add a line, on the disk before this returns.

        Args:
            kind: see `Line`.
            body: plain JSON values; nothing private.

        Raises:
            DiskFull: if there is no room; what was there stays whole.

        Guarantee: a signal that ends this half-way (the party is told to stop) leaves a ledger that the next line
            continues: what was not yet acknowledged is taken back.
        """
        with self._writing:
            self._settle()
            end = self._end
            content = {
                "seq": end.lines,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "previous": end.digest,
                "kind": kind,
                "body": body,
            }
            signature = self._sign(_DOMAIN + _canonical(content)).hex()
            line = _canonical(content | {"signature": signature})
            try:
                _append(self.path, line + b"\n")
            except OSError:
                _cut_to(self.path, end.size)
                raise DiskFull(self.path) from None
            # One assignment: an interruption finds either the old end or the new one.
            self._end = _End(end.lines + 1, hashlib.sha256(line).hexdigest(), end.size + len(line) + 1)
            self._write_head()

    def _settle(self) -> None:
        """Undo, or finish, what an interrupted `append` began."""
        _cut_to(self.path, self._end.size)
        if self._headed < self._end.lines:
            self._write_head()

    def _write_head(self) -> None:
        head = {"lines": self._end.lines, "digest": self._end.digest}
        signature = self._sign(_DOMAIN + _canonical(head)).hex()
        atomic_write(head_file(self.path), _canonical(head | {"signature": signature}) + b"\n", 0o600)
        self._headed = self._end.lines


def verify(path: Path, trust: Trust | None = None, kept_head: str = "") -> Verdict:
    """Check a ledger: each line signed by the party, in its place, none missing, none added, and the end there.

    Args:
        path: of the ledger; its head lies beside it.
        trust: judges certificates; without it the first line's is believed, and each further one if the key before
            vouches for it.
        kept_head: hex digest of a line that was noted elsewhere and must be in the ledger; "" without.

    Returns:
        what was found.

    Raises:
        InputError: if the file can't be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise InputError(f"The ledger {path} can't be read: {problem.strerror}.") from None
    problems: list[str] = []
    notes: list[str] = []
    entries: list[Line] = []
    certificates: list[bytes] = []
    digests: list[str] = []
    party, key, previous = "", None, _START
    torn = len(raw) - (raw.rfind(b"\n") + 1)
    if torn:
        problems.append(f"The end is torn: {torn} bytes after the last whole line.")
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            content = _read_line(line)
        except ValueError as problem:
            problems.append(f"Line {number} is no line of a ledger: {problem}.")
            previous = hashlib.sha256(line).hexdigest()
            continue
        entry = Line(content["seq"], content["time"], content["kind"], content["body"])
        signature = bytes.fromhex(content.pop("signature"))
        if number == 1 or entry.kind == "key":
            following = _certified_key(entry)
            if following is None:
                problems.append(f"Line {number} names no certificate that can be read.")
            else:
                key_before, key = key, following[0]
                certificates.append(following[1])
                if number == 1:
                    party = str(entry.body.get("party", ""))
                if key_before is not None and not _follows(entry, key_before, key):
                    # Certified anew by the authority, say after a loss: without it, anybody could take over.
                    (problems if trust is None else notes).append(
                        f"Line {number} gives another key without the old key's word."
                    )
                if trust is not None:
                    try:
                        trust(following[1], party, datetime.fromisoformat(entry.time))
                    except (LpmError, ValueError) as problem:
                        problems.append(f"Line {number}: {problem}")
        if number == 1:
            if entry.kind != "open":
                problems.append("The beginning is missing: line 1 does not open a ledger.")
        if entry.seq != number - 1:
            problems.append(f"Line {number} has the number {entry.seq} where {number - 1} stands.")
        if content["previous"] != previous:
            problems.append(f"Line {number} does not follow the line before it: one was removed, moved or changed.")
        try:
            if key is None:
                raise InvalidSignature
            key.verify(signature, _DOMAIN + _canonical(content))
        except InvalidSignature:
            problems.append(f"Line {number} is not signed by {party or 'the party'}: it was changed or is foreign.")
        previous = hashlib.sha256(line).hexdigest()
        digests.append(previous)
        entries.append(entry)
    if not entries and not problems:
        problems.append("It is empty.")
    _check_head(path, digests, key, problems, notes)
    if kept_head and kept_head not in digests:
        problems.append(f"The line {kept_head[:16]}… that was noted elsewhere is not in it: it was set back.")
    return Verdict(party, tuple(certificates), len(digests), previous, tuple(problems), tuple(notes), tuple(entries))


def _check_head(
    path: Path, digests: list[str], key: Ed25519PublicKey | None, problems: list[str], notes: list[str]
) -> None:
    try:
        head = json.loads(head_file(path).read_bytes())
        signature = bytes.fromhex(head.pop("signature"))
        count, digest = head["lines"], head["digest"]
        if key is None or type(count) is not int or type(digest) is not str or set(head) != {"lines", "digest"}:
            raise ValueError
        key.verify(signature, _DOMAIN + _canonical(head))
    except FileNotFoundError:
        problems.append(f"Its head {head_file(path).name} is missing: a cut-off end can't be excluded.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidSignature):
        problems.append(f"Its head {head_file(path).name} is not one that the party signed.")
    else:
        if len(digests) < count:
            problems.append(f"The end is cut off: {len(digests)} lines, and the head counts {count}.")
        elif count < 1 or digests[count - 1] != digest:
            problems.append("The head names another line than stands there.")
        elif len(digests) == count + 1:
            # The line is written before the head: a crash in between leaves it one behind.
            notes.append("The head is one line behind, as after a crash.")
        elif len(digests) > count:
            problems.append(f"The head is {len(digests) - count} lines behind: an old one was put in its place.")


def _read_line(line: bytes) -> dict[str, Any]:
    if len(line) > _LINE_LIMIT:
        raise ValueError("it is too long")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    kinds = {"seq": int, "time": str, "previous": str, "kind": str, "body": dict, "signature": str}
    if not isinstance(content, dict) or set(content) != _FIELDS:
        raise ValueError("its fields are others")
    for name, kind in kinds.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} is of another kind")
    if not _HEX.fullmatch(content["signature"]) or len(content["signature"]) != 128:
        raise ValueError("its signature has another length")
    if _canonical(content) != line:
        raise ValueError("it is not in its canonical form")
    return content


def _certified_key(entry: Line) -> tuple[Ed25519PublicKey, bytes] | None:
    try:
        der = base64.b64decode(str(entry.body["certificate"]), validate=True)
        key = x509.load_der_x509_certificate(der).public_key()
    except (KeyError, ValueError):
        return None
    return (key, der) if isinstance(key, Ed25519PublicKey) else None


def _follows(entry: Line, old: Ed25519PublicKey, new: Ed25519PublicKey) -> bool:
    """Whether the old key vouches for the new one."""
    if old.public_bytes_raw() == new.public_bytes_raw():
        return True
    statement, signature = entry.body.get("statement"), entry.body.get("old_signature")
    if not isinstance(statement, str) or not isinstance(signature, str):
        return False
    try:
        old.verify(bytes.fromhex(signature), bytes.fromhex(statement))
    except (InvalidSignature, ValueError):
        return False
    return bytes.fromhex(statement).endswith(new.public_bytes_raw())


def _canonical(plain: object) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if os.write(handle, data) < len(data):
            raise OSError
        os.fsync(handle)
    finally:
        os.close(handle)


def _torn(path: Path) -> int:
    """Bytes after the last whole line."""
    raw = path.read_bytes() if path.is_file() else b""
    return len(raw) - (raw.rfind(b"\n") + 1)


def _cut(path: Path, count: int) -> None:
    _cut_to(path, path.stat().st_size - count)


def _cut_to(path: Path, size: int) -> None:
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)

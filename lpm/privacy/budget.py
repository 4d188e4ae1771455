"""What a party has answered in all sessions together, on disk: charged before anything is opened, never twice for one
answer.

Hundreds of calibration steps open hundreds of sums of one private series, and enough of them describe it; so they are
counted, over sessions and restarts. A question that was charged before costs nothing again, because its answer is the
same to the bit (it is kept, see `clients/shard.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lpm.checkpoint import DiskFull
from lpm.errors import InputError
from lpm.privacy.policy import Charge

__all__ = ["Budget"]


class Budget:
    """The account of one party.

    Args:
        path: one JSON line for each charge; made with the first.

    Guarantee: a charge is on the disk before `charge` returns; one that a crash cut off is void, and nothing was opened
        for it. Two sessions of one party at the same time share the account.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def spent(self) -> Charge:
        """The sum of all charges.

        Raises:
            InputError: if the file is damaged: nothing is answered on a guess.
        """
        return sum(self._read().values(), Charge())

    def charged(self, question: str) -> bool:
        """Whether an answer was charged before."""
        return question in self._read()

    def charge(self, question: str, cost: Charge) -> bool:
        """Charge an answer, unless it was.

        Args:
            question: what stands for it, the same after a restart.
            cost: what it takes.

        Returns:
            False if it was charged before.

        Raises:
            DiskFull: if there is no room; nothing is charged then, and nothing may be opened.
        """
        with self._locked() as handle:
            if question in self._read():
                return False
            size = self._whole_size()
            record = json.dumps({"question": question, **asdict(cost)}, sort_keys=True).encode() + b"\n"
            try:
                os.ftruncate(handle, size)  # what a crash cut off
                if os.pwrite(handle, record, size) < len(record):
                    raise OSError
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise DiskFull(self.path) from None
        return True

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _whole_size(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1

    def _read(self) -> Mapping[str, Charge]:
        raw = self.path.read_bytes() if self.path.is_file() else b""
        found: dict[str, Charge] = {}
        for number, line in enumerate(raw.split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                question = str(record.pop("question"))
                found[question] = Charge(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(
                    f"The budget {self.path} is damaged in line {number}.",
                    "Restore it from a backup: without it nobody knows what was opened.",
                ) from None
        return found

"""The errors a user meets: each names the thing, what is wrong with it, and the remedy."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "RESUME",
    "CheckpointError",
    "DataMissing",
    "InputError",
    "Interrupted",
    "LpmError",
    "PeerLost",
    "PolicyRefused",
    "RoundRefused",
    "SessionRefused",
]

RESUME = "The run is kept; continue it with `lpm resume RUN` (begun by hand: the same commands with --resume)."
"""What to do after a loss; a process does not know who started the others."""


class LpmError(Exception):
    """An expected failure, told in one line.

    Args:
        message: what is wrong, naming the thing and (never a private) value.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class InputError(LpmError):
    """Something the user gave can't be used; nothing was begun."""

    exit_code = 2


class DataMissing(InputError):
    """A file of figures is not there."""

    def __init__(self, path: Path | str, download_from: str, name: str) -> None:
        super().__init__(
            f"{path} is missing.",
            f"Download it from {download_from}, save it as {name}, and name its folder in LPM_DATA.",
        )


class CheckpointError(LpmError):
    """A checkpoint can't be read, or belongs to another run."""


class Interrupted(LpmError):
    """The run was stopped from outside and can be resumed."""

    exit_code = 3


class PeerLost(LpmError):
    """A party (or the coordinator, or a rank) went away or stopped answering.

    It derives from no RuntimeError: CrypTen's converters swallow those and start again.
    """

    exit_code = 3

    def __init__(self, party: str, reason: str, remedy: str = RESUME) -> None:
        super().__init__(f"{party} is lost: {reason}.", remedy)
        self.party = party
        self.reason = reason


class SessionRefused(LpmError):
    """A session could not be formed, or a peer broke its rules; nothing was opened."""


class PolicyRefused(SessionRefused):
    """An institution's own policy forbids what was asked; the coordinator is told the line of the policy."""


class RoundRefused(LpmError):
    """A round was called off before anything was opened: a party asked for it, or the environments differ."""

    def __init__(self, *, rescale: bool = False, diverged: bool = False, abort: str = "") -> None:
        why = abort or ("the environments of the parties differ" if diverged else "a party asked for another scale")
        super().__init__(f"The round was refused: {why}.")
        self.rescale = rescale
        self.diverged = diverged
        self.abort = abort

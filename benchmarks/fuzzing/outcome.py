"""What came of the frames that a machine was given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        frames: how many were given.
        accepted: taken without complaint.
        refused: by the name of the error.
        crashes: what was raised instead, with the seed and the number of the frame.
        leaks: errors that told something secret.
        growth_mib: of the resident memory, from the first tenth of the frames to the end.
        slowest_ms: of one frame.
        seconds: in all.
    """

    frames: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    growth_mib: float = 0.0
    slowest_ms: float = 0.0
    seconds: float = 0.0

    def tell(self) -> dict[str, Any]:
        """For a file."""
        return {**vars(self), "refused": dict(self.refused), "crashes": self.crashes[:20], "leaks": self.leaks[:20]}

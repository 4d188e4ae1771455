"""The pass without derivatives, on which the others build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpm import ring
from lpm.kernels.spec import Summed
from lpm.passes.steps import Arrays, Rounds, Steps

__all__ = ["Plain"]


class Plain:
    """No derivatives."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        self.loop, self.rounds = loop, rounds
        self.carry: Arrays = {}

    def start(self) -> None:
        """The first state."""
        self.carry = self.loop.start(self.loop.theta)
        self.rounds.see(self.loop.env(self.carry))

    def step(self, t: int) -> Arrays:
        """One step; returns its records."""
        summed = self.loop.emit(t, self.loop.theta, self.carry)
        sums = self.open(t, summed, {})[0]
        self.carry, records = self.loop.advance(t, self.loop.theta, self.carry, sums)
        self.rounds.see(self.loop.env(self.carry))
        return records

    def open(
        self, t: int, summed: Mapping[str, Summed], floats: Mapping[str, NDArray[np.float64]]
    ) -> tuple[Arrays, dict[str, NDArray[np.float64]]]:
        """⊕: exact sums as float64, and opened floats."""
        if not summed:
            return {}, {}
        words, opened = self.rounds.add("emit", t, self._words(summed), floats)
        return self._read(t, words), opened

    def open_along(self, t: int, summed: Mapping[str, Summed], pushed: Arrays) -> tuple[Arrays, Arrays]:
        """⊕: exact sums as float64, and their derivatives by direction [directions, cells, lanes]."""
        if not summed:
            return {}, {}
        words, opened = self.rounds.add_each("emit", t, self._words(summed), pushed, "~")
        return self._read(t, words), {key: torch.from_numpy(value) for key, value in opened.items()}

    @staticmethod
    def _words(summed: Mapping[str, Summed]) -> dict[str, NDArray[np.int64]]:
        return {key: value.words.numpy() for key, value in summed.items()}

    def _read(self, t: int, words: Mapping[str, NDArray[np.int64]]) -> Arrays:
        for key, value in words.items():
            self.loop.require_range(key, t, value)
        return {key: torch.from_numpy(ring.decode(value)) for key, value in words.items()}

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs."""
        return {f"carry:{key}": value.cpu().numpy() for key, value in self.carry.items()}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.carry = {
            key[6:]: torch.from_numpy(value.copy()) for key, value in found.items() if key.startswith("carry:")
        }

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        """Derivatives, as fields of `Trajectory`."""
        return {}

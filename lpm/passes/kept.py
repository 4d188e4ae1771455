"""What a way back needs of each step: the carry with which it began and the sums it was given.

A stage is one-hot in torch, eight bytes for each that there is; it is kept in one byte an agent and lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.passes.steps import Arrays

__all__ = ["Kept"]

_STAGES = "stages"


@dataclass(frozen=True)
class _Stages:
    """An array that is one-hot along its last axis: where the one stands, uint8, and the length of that axis."""

    place: Tensor
    length: int

    def whole(self) -> Tensor:
        return torch.nn.functional.one_hot(self.place.to(torch.int64), self.length).to(torch.float64)


def _packed(value: Tensor) -> Tensor | _Stages:
    """An array of [agents, lanes, stages] packed, if it is one-hot; any other as it is."""
    if value.dim() != 3 or value.dtype != torch.float64 or not 1 < value.shape[2] < 256:
        return value
    found = _Stages(value.argmax(2).to(torch.uint8), value.shape[2])
    return found if torch.equal(found.whole(), value) else value


class Kept:
    """The carry and the opened sums of each step so far."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Tensor | _Stages], Arrays]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, carry: Arrays, sums: Arrays) -> None:
        """Keep those of the next step."""
        self._steps.append(({key: _packed(value) for key, value in carry.items()}, sums))

    def __getitem__(self, t: int) -> tuple[Arrays, Arrays]:
        carry, sums = self._steps[t]
        return {k: value.whole() if isinstance(value, _Stages) else value for k, value in carry.items()}, sums

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """All of it, for a checkpoint; see `lpm.passes.steps.spread` for the names."""
        found: dict[str, NDArray[Any]] = {}
        for t, (carry, sums) in enumerate(self._steps):
            for key, value in carry.items():
                if isinstance(value, _Stages):
                    found[f"kept:{t}:{_STAGES}{value.length}:{key}"] = value.place.numpy()
                else:
                    found[f"kept:{t}:carry:{key}"] = value.numpy()
            found |= {f"kept:{t}:sums:{key}": value.numpy() for key, value in sums.items()}
        return found

    @classmethod
    def restored(cls, found: Mapping[str, Any]) -> Kept:
        """The inverse of `snapshot`, from a checkpoint's arrays."""
        kept = cls()
        kept._steps = [({}, {}) for _ in range(int(found["step"]))]
        for name, array in found.items():
            if not name.startswith("kept:"):
                continue
            _, t, part, key = name.split(":", 3)
            carry, sums = kept._steps[int(t)]
            value = torch.from_numpy(np.array(array))
            if part == "sums":
                sums[key] = value
            else:
                carry[key] = value if part == "carry" else _Stages(value, int(part.removeprefix(_STAGES)))
        return kept

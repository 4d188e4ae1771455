"""What a calibration makes of a sum that was opened without somebody: used once, scaled up, and told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpm import ring
from lpm.privacy import DROPPABLE
from lpm.protocol.messages import Task
from server.calibrator import FederatedBackend
from server.relay import PartialSum


class _Session:
    """Three parties have done every task; what each sum is, and whose, is given."""

    parties = ("bronx", "kings", "queens")

    def __init__(self, sums: dict[str, tuple[list[float], tuple[str, ...]]]) -> None:
        self.sums = sums

    def broadcast(self, task: Task) -> None: ...

    def releases(self, task: Task) -> dict[str, Any]:
        return {}

    def receive_from(self, tensor: str, task: Task) -> PartialSum:
        values, parties = self.sums[tensor]
        return PartialSum(ring.encode(values, 32), parties)


def _none(what: str) -> dict[str, int]:
    """No noise on anything."""
    return {}


def _backend(sums: dict[str, tuple[list[float], tuple[str, ...]]], told: list[Any]) -> FederatedBackend:
    scenario: Any = SimpleNamespace(
        federation=SimpleNamespace(fraction_bits=32), mechanism=SimpleNamespace(releases=_none, covers=_none)
    )
    session: Any = _Session(sums)
    return FederatedBackend(session, scenario, told.append)


def test_a_sum_of_survivors_stands_for_all_and_is_told() -> None:
    told: list[Any] = []
    sums = {"loss": ([30.0], _Session.parties), "gradient": ([4.0, -2.0], ("bronx", "queens"))}
    loss, gradient = _backend(sums, told).evaluate(np.zeros((1, 2)), 5, "fd")
    assert loss.tolist() == [30.0] and gradient.tolist() == [[6.0, -3.0]]
    assert told == [{"tensor": "gradient", "trajectory": 5, "without": "kings"}]


def test_a_whole_sum_is_left_as_it_is() -> None:
    told: list[Any] = []
    sums = {"loss": ([30.0], _Session.parties), "gradient": ([4.0, -2.0], _Session.parties)}
    loss, gradient = _backend(sums, told).evaluate(np.zeros((1, 2)), 5, "fd")
    assert (loss[0], gradient[0, 1]) == (pytest.approx(30.0), pytest.approx(-2.0)) and not told


def test_nothing_that_a_simulation_goes_on_from_may_lose_parties() -> None:
    assert set(DROPPABLE) == {"loss", "gradient"}

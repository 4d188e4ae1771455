"""Malformed frames: no protocol state machine may do anything but take them or refuse them (`benchmarks/fuzz.py`)."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from clients.shard import Shard
from lpm import scenario as scenarios
from lpm.errors import SessionRefused
from lpm.privacy.memory_channel import in_memory_sums
from lpm.protocol.messages import Lost, Task, decode
from lpm.worlds.federated import FederatedWorld

FRAMES = 20_000
"""Against each machine here; the benchmark's committed figures are of a million."""


def _load() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("lpm_fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lpm_fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fuzzing = _load()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An honest session to begin from."""
    logging.getLogger("server").setLevel(logging.CRITICAL)
    yield fuzzing.Honest.form(tmp_path_factory.mktemp("fuzz") / "keys")
    logging.getLogger("server").setLevel(logging.NOTSET)


@pytest.mark.parametrize("machine", list(fuzzing.MACHINES))
def test_malformed_frames_are_refused_and_nothing_else(session: Any, machine: str) -> None:
    outcome = fuzzing.fuzz(session, machine, FRAMES, seed=7)
    assert outcome.crashes == []
    assert outcome.leaks == []
    assert outcome.frames == FRAMES
    # The harness reaches the machine: most frames are refused, by a typed error, and some are taken.
    assert sum(outcome.refused.values()) > FRAMES / 2
    assert outcome.accepted > 0 or machine == "masked"  # whose checksum no altered sum passes
    assert outcome.growth_mib < 16


def test_a_live_endpoint_takes_malformed_frames_and_still_serves(session: Any, tmp_path: Path) -> None:
    outcome = fuzzing.fuzz_live(session, tmp_path, 1500, seed=7, strangers=20)
    assert outcome.crashes == []
    assert outcome.leaks == []
    assert outcome.frames >= 1500
    assert sum(outcome.refused.values()) > 1000


def test_the_harness_sees_a_crash_and_a_leak(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = session.secrets[0]
    told = iter(
        [ValueError("an array is too big"), SessionRefused(f"The key {secret} is wrong."), SessionRefused("no")]
    )

    def machine(session: Any, mutator: Any) -> Any:
        def once() -> None:
            raise next(told)

        return once

    monkeypatch.setitem(fuzzing.MACHINES, "broken", (machine, "both"))
    outcome = fuzzing.fuzz(session, "broken", 3, seed=1)
    assert len(outcome.crashes) == 1 and "ValueError" in outcome.crashes[0]
    assert len(outcome.leaks) == 1 and secret not in outcome.leaks[0]


def test_texts_of_a_stranger_can_not_write_on_a_terminal() -> None:
    frame = Lost("queens", "gone").encode()
    with pytest.raises(SessionRefused, match="control characters"):
        decode(frame.replace(b"gone", b"\x1b[2J"))
    assert decode(Lost("queens", "gone\r\nand more").encode()) == Lost("queens", "gone  and more")


def test_a_task_of_other_parameters_than_the_scenarios_is_refused(tmp_path: Path) -> None:
    world = scenarios.load(Path(__file__).resolve().parent.parent / "simulations" / "three_clinics")
    shard = Shard(world, ["north"], seed=1, folder=tmp_path, key=bytes(32), data=None, every=0, calibrates=False)
    party = FederatedWorld(in_memory_sums(3)[1][0], None)
    for shape in ((1, len(world.parameters) - 1), (1, len(world.parameters) + 1), (0, 0)):
        with pytest.raises(SessionRefused, match="the scenario has"):
            shard.perform(Task("evaluate", 0, np.zeros(shape)), party, consents=False)

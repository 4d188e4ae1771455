"""Two of the kills of real processes that `benchmarks/kills.py` makes at every message, so that it stays true."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.timeout(120),
    # gRPC's poller wakes a loop that has ended, when several parties live in one process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("lpm_kills", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lpm_kills"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills") / "keys"


@pytest.mark.parametrize(
    ("point", "outcome", "resumed"),
    [
        (("CONTRIBUTION", "up"), "survivors' sum", ""),
        (("simulation", "up"), "paused", "to the right sums"),
    ],
)
def test_a_killed_process(kills: ModuleType, keys: Path, point: tuple[str, str], outcome: str, resumed: str) -> None:
    found = kills.kill(keys, "queens", point)
    assert (found["outcome"], found["resumed"]) == (outcome, resumed)


def test_the_committed_outcomes_are_of_all_messages(kills: ModuleType) -> None:
    known = json.loads((Path(kills.__file__).parent / "figures" / "kills.json").read_text())
    assert len(known) == 20 and len({(each["victim"], each["message"]) for each in known}) == 20
    assert {each["message"] for each in known} == {" ".join(point) for point in kills.POINTS}

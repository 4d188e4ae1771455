"""Runs in one process are stopped and go on to the same bits; one process and a federation simulate the same."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.e2e.processes import CITY, CLINICS, ended, lpm, until

SIMULATE = ["simulate", CLINICS, "--seed", "5", "--steps", "12", "--gradient", "tangent", "--checkpoint-every", "2"]
SIMULATE += ["--json"]
CALIBRATE = ["calibrate", CLINICS, "--seed", "5", "--gradient", "fd", "--iterations", "40", "--json"]


@pytest.mark.parametrize(
    ("asked", "results"),
    [(SIMULATE, ["words.npy", "outputs.nc"]), (CALIBRATE, ["posterior.parquet", "outputs.nc"])],
    ids=["simulate", "calibrate"],
)
def test_a_run_that_was_killed_and_then_stopped_goes_on_to_the_same_bits(
    asked: list[str | Path], results: list[str], tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "broken"
    command = ended([*asked, "--out", whole], whole, tmp_path / "0")
    assert command.wait() == 0, command.said
    seen: set[str] = set()

    def more() -> bool:
        """Whether there is a checkpoint that was not there when we asked last."""
        now = {path.name for path in (run / "checkpoint").glob("step-*.lpm")}
        return bool(now - seen)

    with lpm([*asked, "--out", run], run, tmp_path / "1") as command:
        until(more, "a checkpoint")
        command.child.kill()
        assert command.wait() == -signal.SIGKILL
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    seen.update(path.name for path in (run / "checkpoint").glob("step-*.lpm"))
    with lpm(["resume", run, "--json"], run, tmp_path / "2") as command:
        until(more, "another checkpoint")
        command.child.send_signal(signal.SIGINT)
        assert command.wait() == 3, command.said
    answer = command.answer()
    assert answer["exit_code"] == 3 and answer["run"] == str(run) and str(run) in answer["remedy"]
    assert json.loads((run / "run.json").read_text())["status"] == "paused"
    command = ended(["resume", run, "--json"], run, tmp_path / "3")
    assert command.wait() == 0, command.said
    assert command.answer()["world"] == "local"
    for name in results:
        if name.endswith(".nc"):
            broken, untouched = (xr.load_dataset(each / name, engine="h5netcdf") for each in (run, whole))
            xr.testing.assert_identical(broken, untouched)
            assert len(untouched.data_vars) > 0
        else:
            assert (run / name).read_bytes() == (whole / name).read_bytes()
    again = ended(["resume", run, "--json"], run, tmp_path / "4")
    assert again.wait() == 2 and "is done" in again.answer()["error"]


@pytest.mark.parametrize(
    ("scenario", "more", "planes"),
    [
        (CLINICS, [], ["--control", "flower", "--sharing", "masked"]),
        (CITY, ["--agents", "20000", "--steps", "20", "--parties", "3"], ["--control", "streams"]),
    ],
    ids=["three_clinics, masked, over Flower", "nyc_boroughs"],
)
def test_one_process_and_a_federation_simulate_the_same_bits(
    scenario: Path, more: list[str], planes: list[str], tmp_path: Path
) -> None:
    asked: list[str | Path] = [scenario, "--seed", "5", "--json"]
    one, many = tmp_path / "one", tmp_path / "many"
    local = ended(["simulate", *asked, *more[:4], "--out", one], one, tmp_path / "0")
    assert local.wait() == 0, local.said
    federated = ended(["federate", *asked, *more, "--simulate-only", *planes, "--out", many], many, tmp_path / "1")
    assert federated.wait() == 0, federated.said
    roles = Counter(each["role"] for each in json.loads((many / "processes.json").read_text()))
    flower = {"superlink": 1, "supernode": 3} if "flower" in planes else {}
    assert roles == {"coordinator": 1, "client": 3, **flower}
    if flower:
        log = (many / "control" / "superlink.log").read_text()
        assert "https://" in log and log.count("Activated node_id") == 3
        sharing = [json.loads(each.read_text())["sharing"] for each in many.glob("parties/*/client.json")]
        assert sharing == ["masked"] * 3
    words = np.load(one / "words.npy")
    assert words.any()
    np.testing.assert_array_equal(words, np.load(many / "words.npy"))
    assert local.answer()["outputs"] == federated.answer()["outputs"]


def test_the_doctor_prints_one_object(tmp_path: Path) -> None:
    command = ended(["doctor", "--json"], tmp_path, tmp_path / "0")
    assert command.wait() in {0, 1}
    assert command.answer()["checks"]

"""A calibration is interrupted in every way that happens, again and again, and ends at the bits of one left alone.

Each test takes up the run where the one before left it: they belong together and in this order.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import xarray as xr

from clients.audit import audit
from lpm.privacy.budget import Budget
from lpm.privacy.ledger import verify
from lpm.runs import Run
from tests.e2e.processes import CLINICS, Command, ended, lpm, until

PARTIES = ("north", "south", "west")
ASKED = ["federate", CLINICS, "--control", "streams", "--seed", "5", "--gradient", "fd", "--iterations", "9"]
ASKED += ["--checkpoint-every", "4", "--set", "calibration.replicates=4", "--set", "calibration.predictive_draws=16"]
NAMING_SECONDS = 10.0
"""Within which a killed party has been named."""


class Broken:
    """The run that is interrupted.

    Attributes:
        run: its folder.
        sessions: how often it was begun or resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.sessions, self._folder = folder / "broken", 0, folder

    def go_on(self) -> AbstractContextManager[Command]:
        """Begin, or resume."""
        self.sessions += 1
        arguments = [*ASKED, "--out", self.run, "--json"] if self.sessions == 1 else ["resume", self.run, "--json"]
        return lpm(arguments, self.run, self._folder / f"session-{self.sessions}")

    def log(self, party: str) -> str:
        """A party's own log, of all sessions."""
        return (self.run / "parties" / party / "party.log").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both runs are."""
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def broken(folder: Path) -> Iterator[Broken]:
    """The run that all tests here share."""
    return Broken(folder)


def stopped(command: Command, *names: str) -> None:
    """It has ended as a run that can be resumed, named who is to blame in plain words, and left nobody behind."""
    assert command.wait() == 3, command.said
    command.nobody_is_left()
    assert "Traceback" not in command.said, command.said
    for name in names:
        assert name in command.said
    answer = command.answer()
    assert answer["exit_code"] == 3 and answer["run"] == str(command.run) and answer["error"]
    assert f"lpm resume {command.run}" in command.said
    assert json.loads((command.run / "run.json").read_text())["status"] == "paused"


def in_mid_iteration(command: Command, number: int) -> None:
    """Wait until all parties have a checkpoint of the trajectory after an iteration."""
    command.reaches(f"Iteration {number} of")
    folder = command.run / "parties"
    until(lambda: all(any(folder.glob(f"{name}/checkpoint/*/step-*.lpm")) for name in PARTIES), "checkpoints of all")


def test_a_party_killed_while_the_others_gather(broken: Broken) -> None:
    with broken.go_on() as command:
        command.process("north").kill()
        until(lambda: "north" in command.said, "naming north", NAMING_SECONDS)
        stopped(command, "north was killed")


def test_a_party_killed_in_the_middle_of_an_iteration(broken: Broken) -> None:
    with broken.go_on() as command:
        victim = command.process("south")
        in_mid_iteration(command, 1)
        victim.kill()
        until(lambda: "south is lost" in command.said or "south was killed" in command.said, "it", NAMING_SECONDS)
        stopped(command)
    assert not any("goes on from step" in broken.log(name) for name in PARTIES)


def test_all_parties_go_on_from_the_step_that_all_hold_and_the_coordinator_killed_is_named(broken: Broken) -> None:
    with broken.go_on() as command:
        victim = command.process("coordinator")
        command.reaches("Iteration 2 of")
        victim.kill()
        until(lambda: "coordinator was killed" in command.said, "naming the coordinator", NAMING_SECONDS)
        stopped(command)
    went_on = {name: re.findall(r"Trajectory 1 goes on from step (\d+)", broken.log(name)) for name in PARTIES}
    assert len({tuple(steps) for steps in went_on.values()}) == 1, went_on
    assert [int(step) % 4 for step in went_on["north"]] == [0]


def test_ctrl_c(broken: Broken) -> None:
    with broken.go_on() as command:
        command.process("north")
        command.reaches("Iteration 3 of")
        command.child.send_signal(signal.SIGINT)
        stopped(command)
        assert "is lost" not in command.said and "was killed" not in command.said, command.said


def test_the_launcher_killed_takes_everybody_with_it(broken: Broken) -> None:
    with broken.go_on() as command:
        command.process("north")
        command.reaches("Iteration 4 of")
        command.child.kill()
        assert command.wait() == -signal.SIGKILL
        command.nobody_is_left()
    assert "Traceback" not in command.said


def test_a_frozen_party(broken: Broken) -> None:
    with broken.go_on() as command:
        victim = command.process("west")
        command.reaches("Iteration 5 of")
        victim.suspend()
        until(lambda: "west is lost" in command.said, "naming west", NAMING_SECONDS)
        stopped(command)


def full(process: psutil.Process) -> None:
    """No file of this process can grow any more: what a full disk does to it."""
    process.rlimit(psutil.RLIMIT_FSIZE, (1, 1))


def test_a_full_disk(broken: Broken) -> None:
    with broken.go_on() as command:
        process = command.process("coordinator")
        command.reaches("Iteration 6 of")
        full(process)
        stopped(command, "disk is full")


def test_a_party_killed_during_the_forecast(broken: Broken) -> None:
    with broken.go_on() as command:
        victim = command.process("west")
        command.reaches("Iteration 9 of 9")
        victim.kill()
        until(lambda: "west is lost" in command.said or "west was killed" in command.said, "it", NAMING_SECONDS)
        stopped(command)


def test_the_end_is_that_of_a_run_which_nothing_happened_to(broken: Broken, folder: Path) -> None:
    with broken.go_on() as command:
        assert command.wait() == 0, command.said
        command.nobody_is_left()
    again = command.answer()
    whole = ended([*ASKED, "--out", folder / "whole", "--json"], folder / "whole", folder / "whole-output")
    assert whole.wait() == 0, whole.said
    answer = whole.answer()
    for name in ("headline", "parameters", "scores", "outputs"):
        assert again[name] == answer[name]
    noted = json.loads((broken.run / "run.json").read_text())["ledgers"]
    for name in PARTIES:
        # Whatever was killed, no answer was charged twice, and each ledger holds all that happened.
        first, second = (
            Budget(run / "parties" / name / "steward" / f"budget-{name}.jsonl").spent
            for run in (broken.run, folder / "whole")
        )
        assert first == second and first.gradients > 0
        found = verify(broken.run / "parties" / name / "ledger.jsonl", kept_head=noted[name]["head"])
        assert not found.problems
        assert sum(entry.kind == "session" for entry in found.entries) == broken.sessions - 1
        assert any(entry.body.get("answered_before") for entry in found.entries if entry.kind == "task")
    # Before an auditor each party answers for all of it, whatever it was killed in and went on from.
    found, undisturbed = (
        audit(run / "parties" / "south", peers=[run / "parties" / "north" / "ledger.jsonl"])
        for run in (broken.run, folder / "whole")
    )
    assert not found.problems and not undisturbed.problems and found.tasks > 9
    assert (found.tasks, found.commitments) == (undisturbed.tasks, undisturbed.commitments)
    for name in ("posterior.parquet", "fits.parquet"):
        assert (broken.run / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert set(Run.open(broken.run).read_fits().institution) == set(PARTIES)
    opened = [xr.load_dataset(run / "outputs.nc", engine="h5netcdf") for run in (broken.run, folder / "whole")]
    assert len(opened[0].data_vars) == 2
    xr.testing.assert_identical(*opened)
    for run in (broken.run, folder / "whole"):
        assert json.loads((run / "run.json").read_text())["status"] == "done"
        assert (run / "report.html").is_file() and any((run / "figures").glob("*.png"))


def test_every_session_was_another_and_had_its_own_keys(broken: Broken) -> None:
    manifests = re.findall(r"manifest ([0-9a-f]{16})", (broken.run / "coordinator.log").read_text())
    # The first session ended before it was formed.
    assert len(manifests) == broken.sessions - 1 == len(set(manifests))

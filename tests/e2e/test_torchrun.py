"""`torchrun … -m lpm`: real processes; one that is killed is named, and any number of ranks goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from lpm.processes import free_port
from lpm.scenario import load
from lpm.simulation import run
from lpm.worlds.local import LocalWorld
from tests.e2e.processes import CLINICS, ROOT, ended, until

STEPS = 600
ASKED = ["simulate", CLINICS, "--seed", "5", "--steps", str(STEPS), "--checkpoint-every", "5", "--json"]


@dataclass
class Job:
    """A running `torchrun`.

    Attributes:
        child: its process.
        scratch: where its output goes.
    """

    child: subprocess.Popen[bytes]
    scratch: Path

    @property
    def said(self) -> str:
        """Standard error of all ranks and of torchrun."""
        return (self.scratch / "err").read_text()

    @property
    def printed(self) -> str:
        """Standard output of all ranks."""
        return (self.scratch / "out").read_text()

    def rank(self, number: int) -> psutil.Process:
        """One of its ranks."""
        return next(
            each for each in psutil.Process(self.child.pid).children() if each.environ().get("RANK") == str(number)
        )


@contextlib.contextmanager
def torchrun(ranks: int, arguments: Sequence[str | Path], scratch: Path, machines: int = 1) -> Iterator[Job]:
    """Start `lpm` on ranks; at the end, nothing of it is left.

    Args:
        ranks: how many, on each machine.
        arguments: after the command's name.
        scratch: a folder for its output, made new.
        machines: how many `torchrun` stand for a machine each.
    """
    scratch.mkdir()
    # A port that is free, on this machine alone.
    port = 0 if machines == 1 else free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    command += [f"127.0.0.1:{port}", "--nnodes", str(machines), "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    with (scratch / "out").open("wb") as out, (scratch / "err").open("wb") as err:
        for machine in range(machines):
            of_machine = [*command, "--node-rank", str(machine), "-m", "lpm", *map(str, arguments)]
            started.append(
                subprocess.Popen(of_machine, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True)
            )
    try:
        yield Job(started[0], scratch)
    finally:
        for child in started:
            if child.poll() is None:
                below = psutil.Process(child.pid).children(recursive=True)
                child.kill()
                child.wait()
                for each in below:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """The exact outputs of one process that nothing happened to."""
    scenario = load(CLINICS).with_options(steps=STEPS)
    model = scenario.build()
    theta = np.array([[scenario.defaults[parameter.name] for parameter in model.parameters]])
    return run(model, theta, steps=STEPS, seed=5, world=LocalWorld()).words[:, : len(scenario.outputs), 0]


def test_a_killed_rank_is_named_and_any_number_of_ranks_goes_on_to_the_bits_of_one(
    words: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def kept() -> int:
        return max((int(path.stem[5:]) for path in (folder / "checkpoint").glob("step-*.lpm")), default=0)

    with torchrun(2, [*ASKED, "--out", folder], tmp_path / "1") as job:
        until(kept, "a checkpoint")
        job.rank(1).send_signal(signal.SIGKILL)
        assert job.child.wait(60) != 0
    assert "Rank 1 of 2 is lost: it was killed" in job.said and f"lpm resume {folder}" in job.said
    answer = json.loads(job.printed)
    assert answer["exit_code"] == 3 and "Rank 1" in answer["error"]
    assert json.loads((folder / "run.json").read_text())["status"] == "paused"

    before = kept()
    with torchrun(3, ["resume", folder, "--json"], tmp_path / "2") as job:
        until(lambda: kept() > before, "another checkpoint")
        job.rank(0).send_signal(signal.SIGKILL)
        assert job.child.wait(60) != 0
    assert job.said.count("Rank 0 of 3 is lost: it was killed") == 1
    assert "Rank 0" in json.loads(job.printed)["error"]  # one of the others speaks for it
    # What a torn disk does to the last file: the one before it is used.
    last = max((folder / "checkpoint").glob("step-*.lpm"))
    last.write_bytes(last.read_bytes()[:-7])

    command = ended(["resume", folder, "--json"], folder, tmp_path / "3")
    assert command.wait() == 0, command.said
    assert "is torn" in command.said and command.answer()["world"] == "local"
    assert np.array_equal(np.load(folder / "words.npy"), words)


def test_a_state_by_rank_is_refused_to_another_number_and_goes_on_with_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = [*ASKED, "--steps", "200", "--gradient", "alternates", "--out", folder]
    with torchrun(2, asked, tmp_path / "1") as job:
        until(lambda: list((folder / "checkpoint").glob("step-*.lpm")), "a checkpoint")
        job.rank(1).send_signal(signal.SIGKILL)
        assert job.child.wait(60) != 0
    assert "--resume" not in job.said

    command = ended(["resume", folder, "--json"], folder, tmp_path / "2")
    assert command.wait() == 2 and f"--nproc-per-node 2 -m lpm resume {folder}" in command.said
    assert json.loads((folder / "run.json").read_text())["status"] == "paused"
    with torchrun(2, ["resume", folder, "--json"], tmp_path / "3") as job:
        assert job.child.wait(200) == 0, job.said
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done" and "error" not in record


def test_ranks_on_two_machines_calibrate_as_one_process_and_rank_0_alone_speaks(tmp_path: Path) -> None:
    asked = ["calibrate", CLINICS, "--seed", "5", "--gradient", "fd", "--iterations", "1", "--json"]
    asked += ["--set", "calibration.predictive_draws=4"]
    with torchrun(1, [*asked, "--out", tmp_path / "two"], tmp_path / "1", machines=2) as job:
        assert job.child.wait(200) == 0, job.said
    answer = json.loads(job.printed)
    assert answer["world"] == "distributed" and job.said.count("Calibrating: 1 of 1") == 1
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["ranks"] == 2 and set(record["peak_memory_mb"]) == {"rank 0", "rank 1"}
    command = ended([*asked, "--out", tmp_path / "one"], tmp_path / "one", tmp_path / "2")
    assert command.wait() == 0, command.said
    for name in ("parameters", "scores", "outputs"):
        assert command.answer()[name] == answer[name]

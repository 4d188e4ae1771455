"""A run's directory: nothing is overwritten, what is written comes back, several processes may note things at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from lpm.errors import InputError
from lpm.options import Options
from lpm.runs import Run, active_run, fresh_path, jsonable

COMMAND = Options(scenario=Path("simulations/nyc_boroughs"), seed=3).to_command()


def dataset() -> xr.Dataset:
    """Two outputs over three days, one of them by age."""
    day = pd.date_range("2020-03-01", periods=3)
    return xr.Dataset(
        {
            "admissions": ("time", [0.1, 1.0, np.nan], {"units": "people/day"}),
            "ill": (("time", "age"), np.arange(6.0).reshape(3, 2), {"units": "people"}),
        },
        coords={"time": day, "age": ["0-64", "65+"]},
    )


def test_a_run_records_what_was_asked_and_with_which_versions(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a" / "run", COMMAND, "nyc_boroughs")
    record = Run.open(tmp_path / "a" / "run").record()
    assert Options.from_command(record["command"]) == Options(
        scenario=Path("simulations/nyc_boroughs").resolve(), seed=3
    )
    assert record["status"] == run.status == "running"
    assert record["scenario"] == {"name": "nyc_boroughs"}
    assert {"lpm", "python", "torch", "flwr", "numba"} <= set(record["versions"])
    assert active_run() == run.path


def test_update_merges_mappings_replaces_the_rest_and_is_strict_json(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.update(timings={"build": np.float32(1.5)}, parties=("bronx", "queens"), rounds=np.int64(7))
    run.update(timings={"simulate": float("nan")}, parties=["bronx"], scenario={"hash": "ab"}, status="done")
    record = json.loads((run.path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["timings"] == {"build": 1.5, "simulate": None}
    assert record["parties"] == ["bronx"] and record["rounds"] == 7
    assert record["scenario"] == {"name": "run", "hash": "ab"}
    assert record["ended"] >= record["started"]
    with pytest.raises(InputError, match="'finished': one of running, paused, done, failed"):
        run.update(status="finished")
    with pytest.raises(TypeError, match="object"):
        run.update(model=object())
    assert json.loads((run.path / "run.json").read_text()) == record


def _note(path: Path, name: str) -> None:
    run = Run.open(path)
    for i in range(20):
        run.update(peak_memory={f"{name}-{i}": i})


def test_processes_that_note_things_at_once_lose_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_note, args=(run.path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(run.record()["peak_memory"]) == 60


@pytest.mark.parametrize(
    ("status", "remedy"), [("done", "another folder"), ("paused", "lpm resume"), ("running", "lpm resume")]
)
def test_a_directory_that_holds_a_run_is_left_alone(tmp_path: Path, status: str, remedy: str) -> None:
    run = Run.create(tmp_path / "run", {"seed": 1})
    run.update(status=status)
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(InputError, match=rf"holds a run already \({status}\).*{remedy}"):
        Run.create(tmp_path / "run", {"seed": 2})
    assert (run.path / "run.json").read_bytes() == before


def test_a_directory_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        Run.create(tmp_path, {})
    with pytest.raises(InputError, match="is a file"):
        Run.create(tmp_path / "thesis.tex", {})
    with pytest.raises(InputError, match="can't be made"):
        Run.create(tmp_path / "thesis.tex" / "run", {})
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    assert Run.create(tmp_path, {}).path == tmp_path


def test_fresh_directories_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Run.create(None, {}, "nyc").path == tmp_path / "runs" / "nyc-1"
    (tmp_path / "runs" / "nyc-9").mkdir()
    (tmp_path / "runs" / "nyc-x").mkdir()
    assert Run.create(None, {}, "nyc").name == "nyc-10"
    assert fresh_path("../a b", tmp_path).name == "a-b-1"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a run"), ("{", "can't be read"), ("[]", "another lpm"), ('{"format": 99}', "another lpm")],
)
def test_what_is_not_a_run_is_not_opened(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Run.open(tmp_path)
    with pytest.raises(InputError, match="There is no run"):
        Run.open(tmp_path / "absent")


def test_outputs_and_posterior_come_back(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(InputError, match=r"no outputs\.nc"):
        run.read_outputs()
    run.write_outputs(dataset())
    xr.testing.assert_identical(run.read_outputs(), dataset())
    draws = pd.DataFrame({"beta": [0.1, 0.2], "log_q": [-1.0, -2.0]})
    run.write_posterior(draws)
    pd.testing.assert_frame_equal(run.read_posterior(), draws)
    with pytest.raises(ValueError, match="no units: ill"):
        run.write_outputs(dataset().assign(ill=("time", np.zeros(3))))
    assert [entry for entry in os.listdir(run.path) if entry.endswith(".tmp")] == []


def test_a_run_is_reopened_until_it_is_done(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.update(status="failed", error="bronx is lost")
    run.reopen()
    assert run.status == "running" and run.record()["resumed"] == 1
    assert not {"error", "ended"} & set(run.record())
    run.update(status="done")
    with pytest.raises(InputError, match="is done"):
        run.reopen()


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.claim()
    program = "import sys; from pathlib import Path; from lpm.runs import Run; Run.open(Path(sys.argv[1])).reopen()"
    command = [sys.executable, "-c", program, str(run.path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "Another process is working on" in refused.stderr
    assert run.owned and "resumed" not in run.record()
    run.update(status="paused")
    assert not run.owned
    assert subprocess.run(command, check=False).returncode == 0
    assert run.record()["resumed"] == 1


def test_a_party_has_a_folder_of_its_own_inside_the_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    folder = run.party("staten_island")
    assert folder == run.path / "parties" / "staten_island" and folder.stat().st_mode & 0o077 == 0
    for name in ("../bronx", "", ".", "a/b"):
        with pytest.raises(InputError, match="letters, digits"):
            run.party(name)


def test_processes_are_read_in_either_form(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    assert run.processes() == []
    for text in ('[{"role": "client"}]', '{"processes": [{"role": "client"}]}'):
        (run.path / "processes.json").write_text(text)
        assert run.processes() == [{"role": "client"}]


def test_jsonable_turns_what_numpy_and_dates_say_into_plain_values() -> None:
    assert jsonable({1: np.array([1.0, np.inf]), "day": np.datetime64("2020-03-01"), "path": Path("a")}) == {
        "1": [1.0, None],
        "day": "2020-03-01",
        "path": "a",
    }

"""Parties that share processes: the same bits, a session of their own each, and a label that says so."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from tests.e2e.processes import CLINICS, ended

SIMULATE: list[str | Path] = [CLINICS, "--seed", "5", "--steps", "6"]


def test_parties_that_share_processes_give_the_same_bits_and_say_so(tmp_path: Path) -> None:
    alone = ended(["simulate", *SIMULATE, "--out", tmp_path / "alone"], tmp_path / "alone", tmp_path / "0")
    assert alone.wait() == 0, alone.said
    run = tmp_path / "run"
    together = ["federate", *SIMULATE, "--simulate-only", "--processes", "2", "--out", run]
    command = ended(together, run, tmp_path / "1")
    assert command.wait() == 0, command.said
    one, other = (xr.load_dataset(each / "outputs.nc", engine="h5netcdf") for each in (tmp_path / "alone", run))
    xr.testing.assert_equal(one, other)

    said = "3 parties share 2 processes of one machine"
    assert said in command.said.replace("\n", " ") and "nothing isolates" in command.said.replace("\n", " ")
    record = json.loads((run / "run.json").read_text())
    assert record["processes"] == [["north", "south"], ["west"]] and said in record["weaker"]
    assert record["executor"] == "cpu"
    assert said in (run / "report.html").read_text()
    started = [each for each in json.loads((run / "processes.json").read_text()) if each["role"] == "client"]
    pids = {each["party"]: each["pid"] for each in started}
    assert pids["north"] == pids["south"] != pids["west"]
    for party in ("north", "south", "west"):
        assert json.loads((run / "parties" / party / "summary.json").read_text())["rounds"] > 0
        assert (run / "parties" / party / "party.log").read_text()


def test_several_parties_in_one_process_need_plain_streams(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    made = ended(["keys", "local", keys, "--parties", "north,south,west"], keys, tmp_path / "0")
    assert made.wait() == 0, made.said
    flags = ["--keys", keys, "--out", tmp_path / "run", "--control-address", "127.0.0.1:1"]
    command = ended(["client", CLINICS, "--party", "north,south", *flags], tmp_path / "run", tmp_path / "1")
    assert command.wait() == 2
    assert "--control streams" in command.said
    command = ended(
        ["client", CLINICS, "--party", "north,south", "--institutions", "north", *flags],
        tmp_path / "run",
        tmp_path / "2",
    )
    assert command.wait() == 2
    assert "2 parties" in command.said

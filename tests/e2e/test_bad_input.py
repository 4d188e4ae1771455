"""What users get wrong is answered with one line that names it, at once, and costs them nothing."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lpm.processes import free_port
from lpm.protocol.identity import make_local_authority
from tests.e2e.processes import CLINICS, Command, ended, lpm, until

PARTIES = ("north", "south", "west")
PRIVATE = "27182818284590"
"""Stands in a private series, and must be in no message and no log: longer than chance spells in hexadecimal."""

FEDERATE = ["--control", "streams", "--iterations", "1", "--gradient", "fd", "--seed", "1", "--json"]


def refused(command: Command, *words: str, code: int = 2) -> None:
    """It ended with one clear line and one JSON object; nobody is left."""
    assert command.wait() == code, command.said
    command.nobody_is_left()
    lines = command.said.strip().splitlines()
    errors = [line for line in lines if not line.endswith("is connected.")]
    assert len(errors) == 1, command.said
    answer = command.answer()
    assert answer["exit_code"] == code and answer["error"]
    for word in words:
        assert word in errors[0], errors[0]
        assert word in answer["error"] + answer["remedy"], answer
    assert "Traceback" not in command.said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", CLINICS, "--set", "transmisibility=0.3"], ["transmisibility", "transmissibility"]),
        (["simulate", CLINICS, "--sead", "3"], ["--sead", "--seed"]),
        (["simulate", CLINICS, "--agents", "-5"], ["--agents", "-5", "from 1"]),
        (["calibrate", CLINICS, "--set", "transmissibility=99"], ["transmissibility", "99", "to 5"]),
        (["simulate", CLINICS.with_name("nowhere")], ["no scenario", "nowhere"]),
        (["federate", CLINICS, "--parties", "2"], ["--parties", "2", "from 3"]),
        (["federate", CLINICS, "--parties", "4", "--control", "streams"], ["--parties", "4", "from 3 to 3"]),
        (
            ["federate", CLINICS, "--steps", "29", "--gradient", "fd"],
            ["scenario.steps is 29", "28 days from 2020-01-06"],
        ),
        (["resume", CLINICS], ["is not a run"]),
    ],
    ids=["key", "flag", "negative", "bounds", "scenario", "two", "four", "days", "resume"],
)
def test_a_bad_flag(arguments: list[str | Path], words: list[str], tmp_path: Path) -> None:
    out = [] if arguments[0] == "resume" else ["--out", tmp_path / "run"]
    refused(ended([*arguments, *out, "--json"], tmp_path / "run", tmp_path / "output"), *words)


@pytest.mark.parametrize("roster", ["north,south", "north,south,north"])
def test_a_coordinator_takes_neither_two_parties_nor_one_twice(roster: str, tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", PARTIES)
    arguments = ["coordinator", CLINICS, "--parties", roster, "--keys", tmp_path / "keys", "--out", tmp_path / "run"]
    arguments += ["--data-address", f"127.0.0.1:{free_port()}", "--control", "streams"]
    command = ended(arguments, tmp_path / "run", tmp_path / "output")
    assert command.wait() == 2
    assert len(command.said.strip().splitlines()) == 1 and "--parties" in command.said
    assert ("at least 3" if roster.count(",") == 1 else "twice") in command.said


def test_a_run_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"format": 1, "status": "done"}')
    command = ended(["federate", CLINICS, "--out", tmp_path / "run", "--json"], tmp_path / "run", tmp_path / "output")
    refused(command, "holds a run already (done)")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert (tmp_path / "run" / "run.json").read_text() == '{"format": 1, "status": "done"}'


def spoilt(folder: Path, line: int, cell: str) -> Path:
    """A copy of the clinics in which a line of the south's series has another count."""
    copy = folder / "three_clinics"
    shutil.copytree(CLINICS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "figures" / "observed_south.csv"
    lines = path.read_text().splitlines()
    for number, text in ((line - 1, PRIVATE), (line, cell)):
        lines[number - 1] = f"{lines[number - 1].split(',')[0]},{text}"
    path.write_text("\n".join(lines) + "\n")
    return copy


def nothing_private(command: Command) -> None:
    """The private number is in nothing that was said, printed or logged."""
    files = [path for path in command.run.rglob("*") if path.is_file()] if command.run.is_dir() else []
    for text in [command.said, command.printed, *(path.read_bytes().decode(errors="replace") for path in files)]:
        assert PRIVATE not in text


def test_a_partys_bad_series_ends_the_federation_at_once_and_names_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["federate", spoilt(tmp_path, 9, "NaN"), *FEDERATE, "--out", run]
    with lpm(arguments, run, tmp_path / "output") as command:
        command.process("south")
        until(lambda: command.child.poll() is not None, "the end of all")
        assert command.wait() == 2
        command.nobody_is_left()
    assert "Traceback" not in command.said
    answer = command.answer()
    for word in ("south", "observed_south.csv", "line 9", "no number"):
        assert word in command.said and word in answer["error"]
    nothing_private(command)


@pytest.mark.parametrize("fault", ["expired", "foreign"])
def test_a_certificate_that_is_not_valid_ends_the_federation_at_once_and_names_it(fault: str, tmp_path: Path) -> None:
    keys, run = tmp_path / "keys", tmp_path / "run"
    make_local_authority(keys, PARTIES)
    past = {"days": 1.0, "now": datetime.now(UTC) - timedelta(days=9)} if fault == "expired" else {}
    make_local_authority(tmp_path / "other", PARTIES, **past)
    if fault == "foreign":  # as somebody would do it who trusts the right authority and was certified by another
        shutil.copy(keys / "authority" / "authority.pem", tmp_path / "other" / "parties" / "west" / "authority.pem")
    shutil.rmtree(keys / "parties" / "west")
    shutil.copytree(tmp_path / "other" / "parties" / "west", keys / "parties" / "west")
    arguments = ["federate", CLINICS, *FEDERATE, "--keys", keys, "--out", run]
    command = ended(arguments, run, tmp_path / "output")
    assert command.wait() in {1, 2}
    assert "Traceback" not in command.said
    for word in ("west", "expired" if fault == "expired" else "authority"):
        assert word in command.said and word in command.answer()["error"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_a_party_that_is_there_twice_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_local_authority(keys, PARTIES)
    data, control = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    common = ["--keys", keys, "--control", "streams", "--control-address", control]
    run, mine, other = (tmp_path / name for name in ("run", "mine", "other"))
    roster = ["coordinator", CLINICS, "--parties", ",".join(PARTIES), "--data-address", data, *common, "--out", run]
    north = ["client", CLINICS, "--party", "north", "--coordinator", data, *common]
    with (
        lpm(roster, run, tmp_path / "coordinator") as coordinator,
        lpm([*north, "--out", mine], mine, tmp_path / "first") as first,
    ):
        until(lambda: "north is connected" in coordinator.said, "the first")
        second = ended([*north, "--out", other], other, tmp_path / "second")
        assert second.wait() == 1
        assert second.said.strip().splitlines()[-1].endswith("north is connected already.")
        assert len(second.said.strip().splitlines()) == 1
        assert first.child.poll() is None and coordinator.child.poll() is None

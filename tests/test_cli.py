"""The command `lpm`: flags reach the commands, errors are one line with the right exit code, `--json` is clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lpm import cli, console
from lpm.checkpoint import DiskFull
from lpm.errors import InputError, PeerLost
from lpm.options import Options, parse_settings, require_known
from lpm.runs import Run

SUMMARY = {
    "run": "runs/nyc-1",
    "scenario": "nyc",
    "world": "local",
    "headline": ["The calibration passed its checks.", "90 % of the held-out days are in the band."],
    "parameters": [
        {
            "name": "transmissibility",
            "unit": "1/day",
            "prior": {"median": 0.1, "low": 0.05, "high": 0.2},
            "posterior": {"median": 0.12, "low": 0.11, "high": 0.13},
        }
    ],
    "scores": [{"institution": "bronx", "posterior": -10.5, "prior": -20.0, "persistence": float("nan")}],
    "outputs": {"admissions": {"peak": 1858.0, "peak_date": "2020-03-30", "total": 52000.0, "unit": "people/day"}},
    "timings": {"simulate": 1.25},
    "report": "runs/nyc-1/report.html",
}
Called = list[tuple[str, Any]]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    """A folder that looks like a scenario from outside."""
    folder = tmp_path / "nyc"
    folder.mkdir()
    (folder / "scenario.toml").write_text("[scenario]\n")
    return folder


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """What the command line hands to the commands, in order."""
    found: Called = []

    def command(name: str) -> Callable[..., dict[str, Any]]:
        def run(*arguments: Any) -> dict[str, Any]:
            found.append((name, arguments if len(arguments) > 1 else arguments[0]))
            return SUMMARY

        return run

    names = ("simulate", "calibrate", "federate", "resume")
    module = types.ModuleType("lpm.commands")
    for name in names:
        setattr(module, f"{name}_command", command(name))
    monkeypatch.setitem(sys.modules, "lpm.commands", module)
    return found


def replace_command(monkeypatch: pytest.MonkeyPatch, work: Callable[[Options], dict[str, Any]]) -> None:
    """Let `lpm simulate` do some other work."""
    module = types.ModuleType("lpm.commands")
    module.simulate_command = work  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpm.commands", module)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from lpm.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'xarray', 'matplotlib', 'pandas', 'numba', 'grpc', 'flwr'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("simulate", "calibrate", "federate", "resume", "coordinator", "client", "keys", "doctor"):
        assert name in done.stdout


def test_flags_reach_the_commands(scenario: Path, called: Called, tmp_path: Path) -> None:
    shared = ["--steps", "30", "--seed", "0", "--set", "beta=0.1", "--set", "calibration.draws=8", "--agents", "500"]
    assert cli.main(["simulate", str(scenario), *shared, "--gradient", "none", "--checkpoint-every", "7"]) == 0
    assert cli.main(["calibrate", str(scenario), *shared, "--iterations", "5", "--out", str(tmp_path / "o")]) == 0
    federate = ["--parties", "3", "--control", "streams", "--simulate-only", "--keys", str(tmp_path)]
    assert cli.main(["federate", str(scenario), *federate]) == 0
    settings = {"beta": "0.1", "calibration.draws": "8"}
    assert called == [
        (
            "simulate",
            Options(
                command="simulate",
                scenario=scenario,
                steps=30,
                seed=0,
                settings=settings,
                agents=500,
                gradient="none",
                checkpoint_every=7,
            ),
        ),
        (
            "calibrate",
            Options(
                command="calibrate",
                scenario=scenario,
                steps=30,
                seed=0,
                settings=settings,
                agents=500,
                iterations=5,
                out=tmp_path / "o",
            ),
        ),
        (
            "federate",
            Options(
                command="federate",
                scenario=scenario,
                parties=3,
                control="streams",
                simulate_only=True,
                keys=tmp_path,
            ),
        ),
    ]


def test_resume_hands_on_what_the_run_was_started_with(scenario: Path, called: Called, tmp_path: Path) -> None:
    started = Options(command="calibrate", scenario=scenario, seed=4, settings={"beta": "0.1"}, json=True)
    run = Run.create(tmp_path / "run", started.to_command())
    run.update(status="paused")
    assert cli.main(["resume", str(run.path)]) == 0
    assert called == [("resume", (run.path, started.with_(out=run.path, json=False)))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "SCENARIO", "--steps", "-5"], "`--steps` is -5: a whole number from 1."),
        (["simulate", "SCENARIO", "--agents", "many"], "`--agents` is many: a whole number from 1."),
        (["simulate", "SCENARIO", "--seed", "1.5"], "`--seed` is 1.5: a whole number from 0."),
        (["simulate", "SCENARIO", "--seed", str(2**63)], "a whole number from 0 to 9223372036854775807."),
        (["simulate", "SCENARIO", "--checkpoint-every", "0"], "`--checkpoint-every` is 0"),
        (["simulate", "SCENARIO", "--gradient", "magic"], "`--gradient` is magic: one of none, auto, fd, alternates"),
        (["calibrate", "SCENARIO", "--gradient", "none"], "`--gradient` is none: one of auto, fd, alternates"),
        (["sensitivity", "SCENARIO", "--gradient", "none"], "for a sensitivity needs derivatives"),
        (["sensitivity", "SCENARIO", "--mode", "sideways"], "`--mode` is sideways: one of forward, reverse."),
        (["audit", "SCENARIO", "--seeds", "1"], "`--seeds` is 1: a whole number from 2."),
        (["calibrate", "SCENARIO", "--time-limit", "nan"], "`--time-limit` is nan: a number"),
        (["simulate", "SCENARIO", "--set", "beta"], "`--set beta` can't be read: key=value"),
        (["simulate", "SCENARIO", "--set", "a=1", "--set", "a=2"], "`--set a=…` is given twice"),
        (["federate", "SCENARIO", "--parties", "2"], "`--parties` is 2: a whole number from 3."),
        (["federate", "SCENARIO", "--sharing", "plain"], "`--sharing` is plain: one of crypten, masked."),
        (["federate", "SCENARIO", "--control", "smoke"], "`--control` is smoke: one of flower, streams."),
        (["federate", "SCENARIO", "--keys", "absent"], "`--keys` is absent: a folder made by"),
        (["simulate", "absent"], "There is no scenario absent"),
        (["simulate", "."], "is not a scenario: it has no scenario.toml"),
        (["simulate"], "Missing argument 'SCENARIO'. See `lpm simulate --help`."),
        (["simulate", "SCENARIO", "--stepz", "3"], "No such option '--stepz'. Did you mean"),
        (["simulte"], "No such command 'simulte'. Did you mean `simulate`? See `lpm --help`."),
        (["resume", "absent"], "There is no run absent"),
        (["keys", "local", "keys", "--parties", "a,,b"], "`--parties` is a,,b: at least 3 names"),
    ],
)
@pytest.mark.usefixtures("called")
def test_bad_input_is_one_line_and_exit_code_2(
    scenario: Path,
    tmp_path: Path,
    arguments: Sequence[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(scenario) if word == "SCENARIO" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and not (tmp_path / "runs").exists()


def test_the_summary_is_shown(scenario: Path, called: Called, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", str(scenario)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("The calibration passed its checks.\n")
    for text in ("transmissibility", "0.12 (0.11–0.13)", "1/day", "1,858", "2020-03-30", "-10.5", "report.html"):
        assert text in shown
    assert len(called) == 1


def test_the_summary_shows_the_strongest_parameters_of_a_few_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """Signs and standard errors are there; what the scenario does not publish only if nothing else was asked for."""
    targets = [f"{name}:{kind}" for name in ("cases", "deaths", "ill", "at_home/north") for kind in ("total", "peak")]
    rows: list[dict[str, object]] = [
        {"target": target, "output": target.split(":")[0], "parameter": f"p_{k}", "elasticity": (-1) ** k * 0.01 * k}
        for target in targets
        for k in range(20)
    ]
    rows[19]["elasticity_se"], rows[18]["elasticity"] = 0.021, None
    console.summary({"sensitivities": rows, "outputs": {"cases": {}, "deaths": {}, "ill": {}}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["cases", "deaths", "ill"] and lines[2].split()[-3:] == ["total"] * 3
    assert lines[3].split() == ["p", "19", "-0.19", "±", "0.02", "-0.19", "-0.19"]
    assert lines[4].split() == ["p", "18", "n/a", "0.18", "0.18"]
    assert lines[14].split()[:2] == ["p", "8"] and not lines[15].strip()
    console.summary({"sensitivities": rows[-20:], "outputs": {"cases": {}}})
    assert "at home/north" in capsys.readouterr().out


def test_the_summary_shows_an_audit(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"bias": 0.034, "bias_se": 0.012, "sd": 1.5, "cost": 12.0, "wrong_signs": 1, "clear_signs": 40}
    unmeasured = dict.fromkeys(measured)
    rows = [
        {"label": "alternates", "ruling": "taken", **measured},
        {"label": "tangent", "ruling": "not supported", **unmeasured},
    ]
    console.summary({"estimators": rows})
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["alternates", "0.03", "±", "0.01", "1.50", "12.00", "1", "of", "40", "taken"] in said
    assert ["tangent", "n/a", "n/a", "n/a", "not", "supported"] in said


@pytest.mark.parametrize("wanted", ["0", "abc"])
def test_a_number_of_threads_that_is_none_is_one_line_before_numba_meets_it(scenario: Path, wanted: str) -> None:
    command = [sys.executable, "-m", "lpm", "simulate", str(scenario)]
    environment = {**os.environ, "NUMBA_NUM_THREADS": wanted}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert f"The variable NUMBA_NUM_THREADS is '{wanted}': a whole number from 1." in done.stderr


def test_json_is_one_object_whatever_libraries_print(scenario: Path) -> None:
    program = """
import os, subprocess, sys, types
import lpm.cli
def work(options):
    print("a library speaks"); os.write(1, b"so does its C code\\n"); subprocess.run(["echo", "and a child"])
    return {"run": options.scenario, "loss": float("nan")}
sys.modules["lpm.commands"] = types.SimpleNamespace(simulate_command=work)
sys.exit(lpm.cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "simulate", str(scenario), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"run": str(scenario), "loss": None}
    for text in ("a library speaks", "so does its C code", "and a child"):
        assert text in done.stderr


def test_json_holds_an_error_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(tmp_path / "absent"), "--json"]) == 2
    shown = capsys.readouterr()
    failure = json.loads(shown.out)
    assert failure["exit_code"] == 2 and failure["error"] in shown.err


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (PeerLost("bronx", "its stream broke"), 3, "paused"),
        (DiskFull(Path("x")), 3, "paused"),
        (InputError("The series has a gap."), 2, "failed"),
        (KeyboardInterrupt(), 3, "paused"),
        (ValueError("deaths = 60917"), 1, "failed"),
        (EOFError("deaths = 60917"), 1, "failed"),
        (MemoryError("deaths = 60917"), 1, "failed"),
    ],
)
def test_errors_have_their_exit_code_and_leave_their_mark_on_the_run(
    scenario: Path,
    tmp_path: Path,
    error: BaseException,
    code: int,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(options: Options) -> dict[str, Any]:
        Run.create(tmp_path / "run", options.to_command())
        secret = 60917
        assert secret
        raise error

    replace_command(monkeypatch, work)
    assert cli.main(["simulate", str(scenario)]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and "60917" not in shown.err and shown.err.strip().count("\n") == 0
    run = Run.open(tmp_path / "run")
    assert run.status == status and not run.owned
    if code == 3:
        assert f"lpm resume {run.path}" in shown.err
    assert ("The memory is spent" in shown.err) == isinstance(error, MemoryError)
    logs = list(run.path.glob("error-*.log"))
    assert len(logs) == (1 if code == 1 else 0)
    for log in logs:
        text = log.read_text()
        assert str(log) in shown.err and "raise error" in text
        assert "secret = 60917" not in text.replace("deaths = 60917", "")
        assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("code", "status"), [(3, "paused"), (1, "failed"), (0, "running")])
def test_a_command_may_end_with_the_code_of_its_processes(
    scenario: Path,
    tmp_path: Path,
    code: int,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(options: Options) -> dict[str, Any]:
        Run.create(tmp_path / "run", options.to_command())
        raise SystemExit(code)

    replace_command(monkeypatch, work)
    assert cli.main(["simulate", str(scenario), "--json"]) == code
    shown = capsys.readouterr()
    run = Run.open(tmp_path / "run")
    assert run.status == status
    assert (f"lpm resume {run.path}" in shown.err) == (code == 3)
    assert shown.out == "" if code == 0 else json.loads(shown.out)["exit_code"] == code


def test_a_run_of_another_process_is_not_marked(scenario: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", Options(command="simulate", scenario=scenario).to_command())
    program = """
import sys, types
import lpm.cli
from lpm.runs import Run
sys.modules["lpm.commands"] = types.SimpleNamespace(resume_command=lambda path, options: Run.open(path).reopen())
sys.exit(lpm.cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "resume", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Another process is working on" in done.stderr
    assert run.status == "running" and "error" not in run.record()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_interrupt_leaves_a_resumable_run(scenario: Path, tmp_path: Path, number: signal.Signals) -> None:
    program = """
import sys, threading, types
from pathlib import Path
import lpm.cli
from lpm.runs import Run
def work(options):
    Run.create(options.out, options.to_command())
    sys.stderr.write("begun\\n"); sys.stderr.flush()
    threading.Event().wait(60)
sys.modules["lpm.commands"] = types.SimpleNamespace(simulate_command=work)
sys.exit(lpm.cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "simulate", str(scenario), "--out", str(tmp_path / "run"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "begun\n"
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert err == f"Stopped; the run is kept. Continue it with `lpm resume {tmp_path / 'run'}`.\n"
    assert json.loads(out)["exit_code"] == 3
    assert Run.open(tmp_path / "run").status == "paused"


def test_commands_of_other_packages_are_loaded_when_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("some_plugin")
    found: list[int] = []

    def visit(times: int = 1) -> None:
        """Come by."""
        found.append(times)

    module.visit = visit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_plugin", module)
    points = [
        cli.metadata.EntryPoint("visit", "some_plugin:visit", "lpm.commands"),
        cli.metadata.EntryPoint("absent", "no_such_package:run", "lpm.commands"),
    ]
    monkeypatch.setattr(cli, "_entry_points", lambda: points)
    assert cli.main(["visit", "--times", "3"]) == 0 and found == [3]
    assert cli.main(["visit", "--help"]) == 0
    assert "Come by." in capsys.readouterr().out
    assert cli.main(["visit", "--tims", "3"]) == 2
    assert cli.main(["absent"]) == 2
    assert "`lpm absent` needs the package no_such_package" in capsys.readouterr().err


def test_keys_are_made(tmp_path: Path) -> None:
    assert cli.main(["keys", "local", str(tmp_path / "keys"), "--parties", "bronx, queens,brooklyn"]) == 0
    assert (tmp_path / "keys" / "parties" / "queens" / "identity.key").is_file()


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_doctor_says_what_is_wrong_and_the_remedy(
    tmp_path: Path,
    verdict: Any,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lpm import doctor

    asked: list[Any] = []

    def examine(keys: Path | None = None, *, folder: Path | None = None) -> list[doctor.Check]:
        asked.append((keys, folder))
        return [doctor.Check("Python", "ok", "3.11"), doctor.Check("clock", verdict, "is [bold]late", "Set it.")]

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.main(["doctor", "--keys", str(tmp_path)]) == code
    shown = capsys.readouterr().out
    assert "is [bold]late" in shown and "Set it." in shown and ("Not ready" in shown) == (code == 1)
    assert cli.main(["doctor", "--json", "--out", str(tmp_path)]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == verdict and answer["checks"][1]["remedy"] == "Set it."
    assert asked == [(tmp_path, None), (None, tmp_path)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lpm {cli.metadata.version('lpm')}\n"


def test_settings_are_read_and_checked_against_what_is_known() -> None:
    assert parse_settings(["a.b = 1", "c=x=y", "d="]) == {"a.b": "1", "c": "x=y", "d": ""}
    with pytest.raises(InputError, match="`--set =1` can't be read: key=value"):
        parse_settings(["=1"])
    require_known(["beta"], ["gamma", "beta"])
    with pytest.raises(InputError, match=r"nyc has no such key. Did you mean beta\? Known: beta, gamma"):
        require_known(["bta"], ["gamma", "beta"], "nyc")

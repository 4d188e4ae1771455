"""The launcher's parts: how institutions are spread, what children are started with, and that none outlives its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import lpm
from lpm import commands, launch
from lpm.analysis import audit
from lpm.errors import InputError, Interrupted, PeerLost
from lpm.launch import MOST_PROCESSES, Plan, group_institutions, plan, share_processes
from lpm.node_keys import collect_node_keys, registered_keys
from lpm.options import Options
from lpm.processes import announce, free_port, parse_address, start, stop, to_exit_code
from lpm.protocol.identity import make_local_authority
from lpm.runs import Run
from server.config import CoordinatorConfig
from server.coordinator import _terms

CLINICS = Path(__file__).resolve().parent.parent / "simulations" / "three_clinics"
BOROUGHS = ("bronx", "brooklyn", "manhattan", "queens", "staten_island")


def test_each_institution_is_a_party_of_its_own_unless_fewer_are_asked_for() -> None:
    assert group_institutions(BOROUGHS, None) == {name: (name,) for name in BOROUGHS}
    assert group_institutions(BOROUGHS, 3) == {
        "bronx-brooklyn": ("bronx", "brooklyn"),
        "manhattan-queens": ("manhattan", "queens"),
        "staten_island": ("staten_island",),
    }
    long = [f"{number}{'x' * 40}" for number in range(4)]
    assert list(group_institutions(long, 3)) == ["party-1", long[2], long[3]]


def test_parties_share_processes_where_the_machine_can_not_hold_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert share_processes(BOROUGHS, None) == [(name,) for name in BOROUGHS]
    many = [f"party-{number}" for number in range(42)]
    shared = share_processes(many, None)
    assert len(shared) == MOST_PROCESSES and {len(each) for each in shared} == {7}
    assert [name for each in shared for name in each] == many
    assert share_processes(many, 42) == [(name,) for name in many]
    assert [len(each) for each in share_processes(BOROUGHS, 2)] == [3, 2]
    assert share_processes(BOROUGHS, 9) == [(name,) for name in BOROUGHS]
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert share_processes(many, None) == [(name,) for name in many]


@pytest.mark.parametrize("count", [2, 6])
def test_too_few_or_too_many_parties_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"`--parties` is {count}: a whole number from 3 to 5"):
        group_institutions(BOROUGHS, count)


def test_a_key_folder_without_a_party_is_refused_before_anything_starts(tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", ["bronx", "queens", "manhattan"])
    options = Options(scenario=tmp_path, control="streams", keys=tmp_path / "keys")
    with pytest.raises(InputError, match="holds no keys of brooklyn, staten_island"):
        plan(options, tmp_path / "run", BOROUGHS)
    assert not (tmp_path / "run").exists()


def test_the_coordinator_knows_each_partys_node_key_and_no_two_alike(tmp_path: Path) -> None:
    parties = ["east", "north", "west"]
    make_local_authority(tmp_path / "keys", parties)
    folder = tmp_path / "keys" / "coordinator"
    with pytest.raises(InputError, match=r"east\.pub is missing"):
        registered_keys(folder, parties)
    collect_node_keys(tmp_path / "keys", parties)
    assert list(registered_keys(folder, parties)) == parties
    private = tmp_path / "keys" / "parties" / "east" / "node.key"
    before = private.read_bytes()
    collect_node_keys(tmp_path / "keys", parties)
    assert private.read_bytes() == before and private.stat().st_mode & 0o077 == 0
    (folder / "nodes" / "west.pub").write_bytes((folder / "nodes" / "east.pub").read_bytes())
    with pytest.raises(InputError, match="west and east have the same node key"):
        registered_keys(folder, parties)


STUBBORN = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
threading.Event().wait()
"""
CHILD = "from lpm.processes import end_with_parent; import threading; end_with_parent(); print('ready', flush=True);"
CHILD += "threading.Event().wait()"


def ready(child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Wait until a child has said so."""
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.stdout.close()
    return child


def test_a_child_that_will_not_end_is_killed_after_its_grace() -> None:
    stubborn = ready(start([sys.executable, "-c", STUBBORN], output=subprocess.PIPE))
    gentle = ready(start([sys.executable, "-c", CHILD], output=subprocess.PIPE))
    stop([stubborn, gentle], grace=0.5)
    assert stubborn.returncode == -signal.SIGKILL
    assert gentle.returncode is not None and gentle.returncode != -signal.SIGKILL


def test_a_child_ends_when_its_starter_has_gone() -> None:
    child = ready(start([sys.executable, "-c", CHILD], output=subprocess.PIPE))
    assert child.stdin is not None
    child.stdin.close()  # what the system does to the pipe of a starter that was killed
    assert child.wait(20) == -signal.SIGTERM


def test_an_announcement_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    announce(None, [])
    announce(tmp_path / "x.json", [{"role": "client", "party": "east", "pid": 1, "address": "127.0.0.1:2"}])
    assert json.loads((tmp_path / "x.json").read_text())[0]["party"] == "east"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", "9091", "host", "host:", "host:0", "host:70000", "host:port", ":9091"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        parse_address("control-address", text)


def test_an_address_is_split() -> None:
    assert parse_address("x", "127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address("x", "[::1]:80") == ("::1", 80)
    assert free_port() > 1023


def test_what_goes_wrong_becomes_an_exit_code_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    def fails(problem: BaseException) -> int:
        raise problem

    assert to_exit_code(lambda: 0) == 0
    assert to_exit_code(lambda: fails(InputError("x"))) == 2
    assert to_exit_code(lambda: fails(PeerLost("east", "gone"))) == 3
    assert to_exit_code(lambda: fails(KeyboardInterrupt())) == 3
    caplog.clear()
    assert to_exit_code(lambda: fails(ValueError("secret-4711"))) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "Failed (ValueError); the log file says where." and "secret-4711" not in " ".join(said)


def test_the_thread_that_watches_the_starter_is_only_there_for_children() -> None:
    from lpm.processes import end_with_parent

    end_with_parent()
    assert "parent-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_federation_begins_with_an_audit_on_synthetic_people_and_a_resumed_one_keeps_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, audited = [], []

    def federate(options: Options, out: Path, plan: Plan, *, resume: bool) -> int:
        started.append((options.gradient, resume))
        return Interrupted.exit_code

    def audit_gradients(model: lpm.Model, *_: object, steps: int, **__: object) -> audit.Audit:
        audited.append((model.population.agents, steps))
        return audit.Audit("tangent", "the bias of tangent is 0.01 ± 0.01", (), 4)

    monkeypatch.setattr(launch, "federate", federate)
    monkeypatch.setattr(audit, "audit_gradients", audit_gradients)
    out = tmp_path / "run"
    options = Options(command="federate", scenario=CLINICS, gradient="auto", agents=9000, steps=14, seed=1, out=out)
    with pytest.raises(SystemExit):
        commands.federate_command(options)
    with pytest.raises(SystemExit):
        commands.resume_command(out, options)
    assert started == [("tangent", False), ("tangent", True)]
    assert audited == [(4000, 14)]
    assert Run.open(out).record()["gradient"]["reason"] == "the bias of tangent is 0.01 ± 0.01"


def test_the_verdict_of_the_audit_is_in_the_manifest(tmp_path: Path) -> None:
    config = CoordinatorConfig(
        scenario=CLINICS, keys=tmp_path, out=tmp_path, parties=("north", "south", "west"), data_address="127.0.0.1:1"
    )
    terms = _terms(config, commands.load(CLINICS).with_options(gradient="fd"), "the bias of tangent is 0.5 ± 0.1")
    assert (terms.gradient, terms.audit) == ("fd", "the bias of tangent is 0.5 ± 0.1")

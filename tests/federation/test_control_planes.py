"""Both control planes start and end a session in separate processes; who fails is named, and nobody is left behind.

The session itself is a stand-in, put in place of `clients.party` and `server.coordinator` in the child processes by a
`sitecustomize` on their path: it waits for a file, or fails as a test asks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from flwr.clientapp import ClientApp

from lpm.control_stream import ControlStream, Frame
from lpm.launch import federate, plan
from lpm.options import Options
from lpm.processes import free_port
from lpm.protocol.identity import make_local_authority

PARTIES = ("east", "north", "west")
STAND_INS = """
import os, sys, threading, types
from pathlib import Path

def _wait(folder):
    while not (folder / "finish").exists():
        threading.Event().wait(0.05)

def _serve(config):
    from lpm.errors import InputError
    (config.folder / "session").write_text(config.session)
    if os.environ.get("STAND_IN_REFUSES") == config.party:
        raise InputError("secret-4711 can't be used.")
    if os.environ.get("STAND_IN_BREAKS") == config.party:
        raise ValueError("secret-4711")
    _wait(config.out)

def _run(config):
    (config.out / "session").write_text(config.session)
    _wait(config.out)

for name, values in {"clients.party": {"serve": _serve}, "server.coordinator": {"run": _run}}.items():
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario's folder; the launcher only passes its path on. Children get the stand-ins."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STAND_INS)
    monkeypatch.setenv("PYTHONPATH", str(hook))
    folder = tmp_path / "scenario"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, after which no process of the run may be alive."""
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    left = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])]
    for process in left:
        process.kill()
    assert not left


def begin(options: Options, out: Path) -> int:
    """Run the session to its end."""
    return federate(options, out, plan(options, out, PARTIES))


def when_up(out: Path, act: Callable[[list[dict[str, object]]], None]) -> threading.Thread:
    """Do something once `processes.json` is there and every party is in the session."""

    def watch() -> None:
        listed = out / "processes.json"
        pause = threading.Event()
        for _ in range(1200):
            if listed.exists() and all((out / "parties" / party / "session").exists() for party in PARTIES):
                act(json.loads(listed.read_text()))
                return
            pause.wait(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def finish(out: Path) -> Callable[[list[dict[str, object]]], None]:
    """Let the stand-in session end."""
    return lambda _: (out / "finish").touch()


def test_a_session_starts_at_every_party_and_ends(scenario: Path, out: Path) -> None:
    seen: list[dict[str, object]] = []
    thread = when_up(out, lambda processes: (seen.extend(processes), finish(out)(processes)))
    assert begin(Options(scenario=scenario, control="streams", seed=7, agents=300), out) == 0
    thread.join()
    assert sorted(str(each["role"]) for each in seen) == ["client", "client", "client", "coordinator"]
    assert {each["party"] for each in seen if each["role"] == "client"} == set(PARTIES)
    assert not any(psutil.pid_exists(int(str(each["pid"]))) for each in seen)
    sessions = {(out / "parties" / party / "session").read_text() for party in PARTIES}
    assert sessions == {(out / "session").read_text()}
    config = json.loads((out / "parties" / "north" / "client.json").read_text())
    assert (config["party"], config["seed"], config["agents"]) == ("north", 7, 300)
    assert config["keys"].endswith("parties/north")


@pytest.mark.parametrize("control", ["streams", pytest.param("flower", marks=pytest.mark.timeout(90))])
def test_a_killed_client_is_named(scenario: Path, out: Path, control: str, capfd: pytest.CaptureFixture[str]) -> None:
    def kill(processes: list[dict[str, object]]) -> None:
        pid = next(each["pid"] for each in processes if each["role"] == "client" and each["party"] == "north")
        os.kill(int(str(pid)), signal.SIGKILL)

    thread = when_up(out, kill)
    assert begin(Options(scenario=scenario, control=control), out) == 3
    thread.join()
    said = capfd.readouterr().err
    assert "north was killed (SIGKILL)" in said and "The run is kept" in said
    assert "east was" not in said and "west was" not in said


def test_an_interrupt_ends_all_and_leaves_a_resumable_run(scenario: Path, out: Path) -> None:
    thread = when_up(out, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert begin(Options(scenario=scenario, control="streams"), out) == 3
    thread.join()


def test_nobody_outlives_a_killed_launcher(scenario: Path, out: Path) -> None:
    work = "import sys; from pathlib import Path\n"
    work += "from lpm.launch import federate, plan; from lpm.options import Options\n"
    work += "options, out = Options(scenario=Path(sys.argv[1]), control='streams'), Path(sys.argv[2])\n"
    work += "federate(options, out, plan(options, out, sys.argv[3:]))"
    launcher = subprocess.Popen([sys.executable, "-c", work, str(scenario), str(out), *PARTIES])
    seen: list[psutil.Process] = []

    def kill(processes: list[dict[str, object]]) -> None:
        seen.extend(psutil.Process(int(str(each["pid"]))) for each in processes)
        launcher.kill()

    when_up(out, kill).join()
    launcher.wait()
    assert len(seen) == 4
    _, alive = psutil.wait_procs(seen, timeout=20)
    assert not alive


@pytest.mark.parametrize(("trouble", "error"), [("STAND_IN_REFUSES", "InputError"), ("STAND_IN_BREAKS", "ValueError")])
def test_a_party_that_cannot_begin_is_named_by_the_type_of_its_error_alone(
    scenario: Path,
    out: Path,
    trouble: str,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(trouble, "west")
    assert begin(Options(scenario=scenario, control="streams"), out) in {1, 2}
    heard = (out / "coordinator.log").read_text()
    assert re.search(rf"west could not take part \({error}\)", heard)
    assert "secret-4711" not in heard


def test_a_party_of_another_authority_is_refused(
    scenario: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_local_authority(tmp_path / "keys", PARTIES)
    make_local_authority(tmp_path / "others", PARTIES)
    (tmp_path / "keys" / "parties" / "north").rename(tmp_path / "north")
    (tmp_path / "others" / "parties" / "north").rename(tmp_path / "keys" / "parties" / "north")
    options = Options(scenario=scenario, control="streams", keys=tmp_path / "keys")
    assert begin(options, out) == 1
    assert "north: The certificate of the coordinator" in capfd.readouterr().err


def test_an_expired_certificate_is_refused(
    scenario: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_local_authority(tmp_path / "keys", PARTIES)
    past = datetime.now(UTC) - timedelta(days=30)
    make_local_authority(tmp_path / "old", PARTIES, days=1, now=past)
    (tmp_path / "keys" / "parties" / "north").rename(tmp_path / "north")
    (tmp_path / "old" / "parties" / "north").rename(tmp_path / "keys" / "parties" / "north")
    options = Options(scenario=scenario, control="streams", keys=tmp_path / "keys")
    assert begin(options, out) == 1
    assert re.search(r"north: The (.* of north|authority's certificate) expired", capfd.readouterr().err)


class TestTheGrid:
    """The coordinator's end of the streams, in this process; the party's end is `clients.node`."""

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Path:
        make_local_authority(tmp_path / "keys", [*PARTIES, "stranger"])
        return tmp_path / "keys"

    def test_strangers_and_second_comers_are_turned_away(self, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "clients.party", types.ModuleType("clients.party"))
        from clients.node import run_node
        from lpm.errors import SessionRefused
        from server.grid import StreamsGrid

        address = f"127.0.0.1:{free_port()}"
        with StreamsGrid(address, keys / "coordinator", PARTIES) as grid:
            first = self.join(address, keys / "parties" / "east")
            assert next(first) == (Frame.WELCOME, b"")
            for party, reason in (("stranger", "not in the roster"), ("east", "connected already")):
                with pytest.raises(SessionRefused, match=reason):
                    run_node(ClientApp(), keys / "parties" / party, address, patience=1)
            assert [node.name for node in grid.get_nodes()] == ["east"]
            make_local_authority(keys / "others", PARTIES)
            mixed = keys / "others" / "parties" / "east"
            (mixed / "authority.pem").write_bytes((keys / "parties" / "east" / "authority.pem").read_bytes())
            with pytest.raises(SessionRefused, match=r"refuses this party's certificate \(.*unknown ca"):
                run_node(ClientApp(), mixed, address, patience=1)
        assert list(first) == []  # ended by the grid, not broken

    def test_a_message_is_answered_by_its_addressee_or_by_an_error_once_that_has_gone(self, keys: Path) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.common.serde import message_from_proto, message_to_proto
        from flwr.proto.message_pb2 import Message as MessageProto
        from flwr.supercore.task_identity import TaskIdentity

        from server.grid import StreamsGrid, node_id_of

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        address = f"127.0.0.1:{free_port()}"
        with StreamsGrid(address, keys / "coordinator", PARTIES) as grid:
            streams = {party: self.stream(address, keys / "parties" / party) for party in ("east", "west")}
            frames = {party: stream.frames() for party, stream in streams.items()}
            for each in frames.values():
                assert next(each)[0] is Frame.WELCOME
            content = RecordDict({"order": ConfigRecord({"task": "start"})})
            sent = [Message(content, node_id_of(party), "query.start") for party in frames]
            east, west = grid.push_messages(sent)
            got = message_from_proto(MessageProto.FromString(next(frames["east"])[1]))
            answer = message_to_proto(Message(RecordDict({"status": ConfigRecord({"exit": 0})}), reply_to=got))
            streams["west"].send(Frame.MESSAGE, answer.SerializeToString())  # west answers for east: not heard
            assert next(frames["west"])[0] is Frame.MESSAGE
            streams["west"].send(Frame.END)
            assert list(frames["west"]) == []
            streams["east"].send(Frame.MESSAGE, answer.SerializeToString())
            pump = threading.Thread(target=list, args=(frames["east"],))
            pump.start()
            replies: dict[str, Message] = {}
            while len(replies) < 2:
                for reply in grid.pull_messages([east, west]):
                    replies[reply.metadata.reply_to_message_id] = reply
                threading.Event().wait(0.02)
            assert replies[west].has_error() and not replies[east].has_error()
            assert grid.pull_messages([east, west]) == []
        pump.join()

    def test_a_taken_port_is_one_clear_error(self, keys: Path) -> None:
        from lpm.errors import InputError
        from server.grid import StreamsGrid

        address = f"127.0.0.1:{free_port()}"
        with StreamsGrid(address, keys / "coordinator", PARTIES), pytest.raises(InputError, match="listened on"):
            StreamsGrid(address, keys / "coordinator", PARTIES)

    @staticmethod
    def stream(address: str, keys: Path) -> ControlStream:
        from clients.node import connect

        return ControlStream(connect(address, keys, name="coordinator", patience=1))

    def join(self, address: str, keys: Path) -> Iterator[tuple[Frame, bytes]]:
        return self.stream(address, keys).frames()


@pytest.mark.parametrize(
    ("client", "server", "near"),
    [
        (("127.0.0.1", 1), ("127.0.0.1", 2), True),
        (("10.0.0.7", 1), ("10.0.0.7", 2), True),
        (("10.0.0.8", 1), ("10.0.0.7", 2), False),
        (None, ("10.0.0.7", 2), False),
    ],
)
def test_from_afar_only_the_nodes_interface_is_reached(
    client: tuple[str, int] | None, server: tuple[str, int], near: bool
) -> None:
    import asyncio

    from server.superlink import _OnlyNodesFromAfar

    reached: list[str] = []

    async def inner(scope: dict[str, object], _receive: object, _send: object) -> None:
        reached.append(str(scope["path"]))

    async def ask(path: str) -> list[int]:
        codes: list[int] = []

        async def send(message: dict[str, object]) -> None:
            codes.extend([int(str(message["status"]))] if "status" in message else [])

        scope = {"type": "http", "path": path, "client": client, "server": server}
        await _OnlyNodesFromAfar(inner)(scope, None, send)  # type: ignore[arg-type]
        return codes

    assert asyncio.run(ask("/v1/fleet/pull-messages")) == []
    assert asyncio.run(ask("/v1/control/start-run")) == ([] if near else [403])
    assert asyncio.run(ask("/v1/runtime/acquire-task")) == ([] if near else [403])
    assert len(reached) == (3 if near else 1)

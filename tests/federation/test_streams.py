"""Sessions over real sockets: rounds, tasks, releases, and everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from loopback import SCENARIO_HASH, Federation, in_thread

from clients import streams
from clients.streams import PartySession
from lpm.errors import InputError, LpmError, PeerLost, RoundRefused, SessionRefused
from lpm.privacy.secure_sum import Flags, Round
from lpm.protocol import identity
from lpm.protocol.identity import COORDINATOR, make_local_authority
from lpm.protocol.messages import Release, Task
from lpm.protocol.wire import METHOD, OPTIONS
from server.streams import Listener, StreamServer

pytestmark = pytest.mark.timeout(120)

_PARTIES = ("bronx", "queens", "kings")
_AGREED = Flags(b"environment")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "local"
    make_local_authority(folder, _PARTIES)
    return folder


def _task(trajectory: int = 0, kind: str = "simulate") -> Task:
    return Task(kind, trajectory, np.full((2, 3), 0.5), options={"steps": 4})


def _simulate(session: PartySession, name: str) -> list[list[int]]:
    """A party that adds the place of its name to every sum; what was opened to it, task by task."""
    place, opened = session.manifest.parties.index(name), []
    for task in session.tasks():
        words = np.full(6, 10**place, dtype=np.int64)
        for step in range(task.options["steps"]):
            address = Round(task.trajectory, step, "city", 0, task.digest)
            opened.append(session.secure_sum.open_to_parties(address, words * step, _AGREED).tolist())
        session.secure_sum.open_to_coordinator(Round(task.trajectory, 0, "outputs", 0, task.digest), -words, _AGREED)
        session.done(task, Release("fit", {"bands": np.arange(3.0)}) if name == "queens" else None)
    return opened


def test_tasks_rounds_and_releases(keys: Path) -> None:
    federation = Federation(keys)
    parties = federation.start(_simulate)
    with federation.gather(outputs=("deaths",), bounds={"city": 1.0}) as session:
        assert session.parties == _PARTIES
        for trajectory in range(3):
            task = _task(trajectory)
            session.broadcast(task)
            assert session.receive("outputs", task).tolist() == [-111] * 6
            releases = session.releases(task)
            assert list(releases) == ["queens"] and releases["queens"].tables["bands"].tolist() == [0, 1, 2]
        assert session.rounds == 3 * 5
    for party in parties.values():
        assert party.result(30) == [[111 * step] * 6 for step in range(4)] * 3
    assert session.bytes_received > 0 and session.bytes_sent > 0
    session.close()
    with pytest.raises(SessionRefused, match="closed"):
        session.broadcast(_task(9))


def test_a_task_is_never_sent_twice_and_an_unopened_tensor_is_named(keys: Path) -> None:
    federation = Federation(keys)
    federation.start(_simulate)
    with federation.gather() as session:
        session.broadcast(_task())
        with pytest.raises(InputError, match="new trajectory number"):
            session.broadcast(_task())
        with pytest.raises(InputError, match="was not broadcast"):
            session.receive("outputs", _task(5))
        with pytest.raises(SessionRefused, match="without opening 'loss'"):
            session.receive("loss", _task())
        assert session.receive("outputs", _task()).size == 6


@pytest.mark.parametrize("opening", ["open_to_parties", "open_to_coordinator"])
def test_a_refused_round_is_repeated(keys: Path, opening: str) -> None:
    def act(session: PartySession, name: str) -> RoundRefused | None:
        refused = None
        for task in session.tasks():
            for attempt in range(2):
                flags = Flags(b"environment", rescale=name == "kings" and attempt == 0)
                try:
                    address = Round(task.trajectory, 0, "loss", attempt, task.digest)
                    getattr(session.secure_sum, opening)(address, np.array([1]), flags)
                except RoundRefused as problem:
                    refused = problem
            session.done(task)
        return refused

    federation = Federation(keys)
    parties = federation.start(act)
    with federation.gather() as session:
        session.broadcast(_task())
        if opening == "open_to_coordinator":
            assert session.receive("loss", _task()).tolist() == [3]
        session.releases(_task())
    for party in parties.values():
        refusal = party.result(30)
        assert refusal is not None and refusal.rescale and not refusal.diverged and not refusal.abort


def test_diverged_environments_stop_the_run_and_say_so(keys: Path) -> None:
    def act(session: PartySession, name: str) -> None:
        for task in session.tasks():
            address = Round(task.trajectory, 0, "city", 0, task.digest)
            session.secure_sum.open_to_parties(address, np.array([1]), Flags(name.encode()[:1]))

    federation = Federation(keys)
    parties = federation.start(act)
    with pytest.raises(RoundRefused, match="environments of the parties differ"), federation.gather() as session:
        session.broadcast(_task())
        session.receive("outputs", _task())
    assert all(isinstance(party.exception(30), RoundRefused) for party in parties.values())


def test_rounds_pipeline(keys: Path) -> None:
    def act(session: PartySession, name: str) -> list[int]:
        opened: dict[int, Any] = {}
        for task in session.tasks():

            def one(step: int, task: Task = task) -> int:
                address = Round(task.trajectory, step, "city", 0, task.digest)
                return int(session.secure_sum.open_to_parties(address, np.array([step]), _AGREED)[0])

            for step in range(8) if name == "bronx" else range(7, -1, -1):
                opened[step] = in_thread(lambda step=step: one(step))
            opened = {step: result.result(30) for step, result in opened.items()}
            session.done(task)
        return [opened[step] for step in range(8)]

    federation = Federation(keys)
    parties = federation.start(act)
    with federation.gather() as session:
        session.broadcast(_task())
        session.releases(_task())
    assert all(party.result(30) == [3 * step for step in range(8)] for party in parties.values())


# Who may not come.


def _refusals(federation: Federation, seconds: float = 60, **bad: Any) -> tuple[LpmError, dict[str, BaseException]]:
    """The coordinator's error and each party's, when kings joins with other settings."""
    parties = {
        name: in_thread(lambda name=name: federation.join(name, **(bad if name == "kings" else {})).close())
        for name in federation.parties
    }
    with pytest.raises(LpmError) as refused:
        Federation(federation.keys, port=federation.port, join_seconds=seconds).gather()
    raised = {name: party.exception(60) for name, party in parties.items()}
    assert all(isinstance(problem, LpmError) for problem in raised.values())
    return refused.value, {name: problem for name, problem in raised.items() if problem is not None}


def test_another_scenario_is_refused_at_all_ends(keys: Path) -> None:
    refused, raised = _refusals(Federation(keys, join_seconds=10), scenario_hash="cd" * 32)
    assert isinstance(refused, SessionRefused) and "kings has another version of the scenario" in str(refused)
    assert "kings has another version" in str(raised["kings"])
    # Who connects only after that finds no coordinator any more.
    assert all("kings has another" in str(raised[name]) or "No session" in str(raised[name]) for name in raised)


def test_another_authority_is_refused_on_both_sides(keys: Path, tmp_path: Path) -> None:
    make_local_authority(tmp_path / "foreign", _PARTIES)
    refused, raised = _refusals(Federation(keys), seconds=3, keys=tmp_path / "foreign")
    assert "kings missing" in str(refused)
    assert "certificates" in str(raised["kings"]) and "same authority" in str(raised["kings"])
    assert "kings missing" in str(raised["bronx"])


def test_a_certificate_of_another_party_is_refused(keys: Path, tmp_path: Path) -> None:
    """kings holds queens' TLS keys: it can only be a second queens."""
    shutil.copytree(keys / "parties" / "kings", tmp_path / "kings")
    for file in ("tls.pem", "tls.key"):
        shutil.copy(keys / "parties" / "queens" / file, tmp_path / "kings" / file)
    with pytest.raises(SessionRefused, match="TLS certificate shown for kings belongs to queens"):
        Federation(keys).join("kings", keys=tmp_path / "kings")


def test_expired_keys_are_refused_before_connecting(tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", _PARTIES, days=1, now=datetime.now(UTC) - timedelta(days=2))
    federation = Federation(tmp_path / "keys")
    with pytest.raises(SessionRefused, match="certificate of kings expired on"):
        federation.join("kings")
    with pytest.raises(SessionRefused, match="certificate of coordinator expired on"):
        federation.gather()


def test_a_party_whose_tls_certificate_expired_is_sent_away(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not look at its own clock is refused by the coordinator's TLS."""
    make_local_authority(tmp_path / "old", _PARTIES, days=1, now=datetime.now(UTC) - timedelta(days=2))
    past = datetime.now(UTC) - timedelta(days=1, hours=12)
    monkeypatch.setattr(streams, "load_identity", lambda folder, name, now: identity.load_identity(folder, name, past))
    federation = Federation(tmp_path / "old", join_seconds=3)
    server = Federation(keys, port=federation.port, join_seconds=3)
    gathering = in_thread(server.gather)
    with pytest.raises(SessionRefused, match="certificates"):
        federation.join("kings")
    assert isinstance(gathering.exception(30), SessionRefused)


def test_a_party_twice_is_refused_and_the_others_go_on(keys: Path) -> None:
    federation = Federation(keys)
    gathering = in_thread(federation.gather)
    first = {name: in_thread(lambda name=name: federation.join(name)) for name in ("bronx", "queens")}
    met = threading.Event()
    # Whichever of the two comes second is sent away; the other waits for kings.
    twin = in_thread(lambda: federation.join("bronx"))
    twin.add_done_callback(lambda _: met.set())
    first["bronx"].add_done_callback(lambda _: met.set())
    assert met.wait(60)
    third = in_thread(lambda: federation.join("kings"))
    with gathering.result(60) as session:
        assert session.parties == _PARTIES
        outcomes = [future.exception(60) for future in (twin, first["bronx"])]
        refused = [problem for problem in outcomes if problem is not None]
        assert len(refused) == 1 and "bronx is connected already" in str(refused[0])
        for future in (twin, first["bronx"], first["queens"], third):
            if future.exception(60) is None:
                in_thread(lambda future=future: list(future.result().tasks()))


def test_a_missing_party_is_named(keys: Path) -> None:
    federation = Federation(keys)
    parties = [in_thread(lambda name=name: federation.join(name)) for name in ("bronx", "kings")]
    with pytest.raises(SessionRefused, match="within 6 s: queens missing"):
        Federation(keys, port=federation.port, join_seconds=6).gather()
    assert all(isinstance(party.exception(30), LpmError) for party in parties)


def test_nobody_listens(keys: Path) -> None:
    with pytest.raises(SessionRefused, match="within 1 s"):
        Federation(keys, join_seconds=1).join("bronx")


def test_a_taken_port_is_named(keys: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"can't listen at 127\.0\.0\.1"):
            Federation(keys, port=taken.getsockname()[1]).gather()


def test_other_engines_are_refused(keys: Path) -> None:
    with pytest.raises(InputError, match="one of crypten"):
        Federation(keys).join("bronx", sharing="plain")


@pytest.mark.parametrize("certified", [True, False])
def test_only_tls_1_3_with_a_certificate_of_the_authority(keys: Path, certified: bool) -> None:
    """TLS 1.2 is refused even with the right keys; so is TLS 1.3 without a certificate."""
    federation = Federation(keys, join_seconds=20)
    gathering = in_thread(federation.gather)
    joined = in_thread(lambda: federation.join("bronx"))  # proof that the port is open, by the time it is connected
    folder = keys / "parties" / "queens"
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    context.set_alpn_protocols(["h2"])
    if certified:
        context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    while True:
        try:
            plain = socket.create_connection(("127.0.0.1", federation.port), 20)
            break
        except ConnectionRefusedError:
            assert not gathering.done()
    with plain, pytest.raises(OSError):  # ssl.SSLError is one
        with context.wrap_socket(plain, server_hostname=COORDINATOR) as stream:
            assert stream.version() == "TLSv1.3"
            stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            if not stream.recv(1):
                raise ConnectionError
            while stream.recv(1000):  # a refused client certificate is reported after the handshake
                pass
            raise ConnectionError
    for name in ("queens", "kings"):
        in_thread(lambda name=name: list(federation.join(name).tasks()))
    in_thread(lambda: list(joined.result(30).tasks()))
    gathering.result(30).close()


# Who goes away.


@pytest.mark.parametrize("how", ["leaves", "raises"])
def test_a_party_that_stops_is_named_to_all(keys: Path, how: str) -> None:
    def act(session: PartySession, name: str) -> None:
        for task in session.tasks():
            if name == "queens":
                if how == "leaves":
                    session.close("its steward stopped it")
                    return
                raise ValueError("a private value: 42")
            session.secure_sum.open_to_parties(Round(0, 0, "city", 0, task.digest), np.array([1]), _AGREED)

    federation = Federation(keys)
    parties = federation.start(act)
    with pytest.raises(PeerLost) as lost, federation.gather() as session:
        session.broadcast(_task())
        session.receive("outputs", _task())
    problems = [lost.value, *(parties[name].exception(30) for name in ("bronx", "kings"))]
    for problem in problems:
        assert isinstance(problem, PeerLost) and problem.party == "queens"
        assert ("steward" if how == "leaves" else "ValueError") in problem.reason and "42" not in str(problem)


def test_a_slow_party_is_named_when_the_deadline_passes(keys: Path) -> None:
    over = threading.Event()

    def act(session: PartySession, name: str) -> None:
        for task in session.tasks():
            if name == "queens":
                over.wait(60)
            session.secure_sum.open_to_parties(Round(0, 0, "city", 0, task.digest), np.array([1]), _AGREED)

    federation = Federation(keys, deadline_seconds=2)
    parties = federation.start(act)
    with pytest.raises(PeerLost, match=r"queens is lost: no answer within 2 s"), federation.gather() as session:
        session.broadcast(_task())
        session.receive("outputs", _task())
    over.set()
    for party in parties.values():
        problem = party.exception(30)
        assert isinstance(problem, PeerLost) and problem.party == "queens"


def test_a_lost_party_is_told_of_even_if_its_handler_is_cancelled_while_it_ends(keys: Path) -> None:
    """When a peer dies, gRPC ends its stream and cancels the handler, in either order and at any moment."""
    told: list[str] = []

    class Ear(Listener):
        def connected(self, party: str) -> bytes:
            return b"welcome"

        def frame(self, party: str, frame: bytes) -> None:
            raise AssertionError

        def disconnected(self, party: str) -> None:
            told.append(party)

    class Gone:
        """A stream that has ended, and on which a write is slow to give up."""

        def __init__(self) -> None:
            self.giving_up = asyncio.Event()

        def auth_context(self) -> dict[str, list[bytes]]:
            return {"x509_common_name": [b"queens"]}

        async def send_initial_metadata(self, metadata: object) -> None: ...

        async def read(self) -> object:
            await asyncio.sleep(0)  # the write begins meanwhile
            return grpc.aio.EOF

        async def write(self, frame: bytes) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.giving_up.set()
                await asyncio.Event().wait()

    async def lose() -> None:
        own = identity.load_identity(keys / COORDINATOR, COORDINATOR)
        server, stream = StreamServer("127.0.0.1:0", own, Ear()), Gone()
        handler = asyncio.ensure_future(server._serve(None, stream))
        await stream.giving_up.wait()
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        server.loop.close()

    asyncio.run(lose())
    assert told == ["queens"]


def test_a_stream_that_its_party_ends_at_once_ends(keys: Path) -> None:
    """Whatever the coordinator was about to write: nobody waits for a status that never comes."""

    class Greets(Listener):
        def connected(self, party: str) -> bytes:
            return b"welcome"

        def frame(self, party: str, frame: bytes) -> None: ...

        def disconnected(self, party: str) -> None: ...

    server = StreamServer("127.0.0.1:0", identity.load_identity(keys / COORDINATOR, COORDINATOR), Greets())
    server.start()
    own = identity.load_identity(keys / "parties" / "queens", "queens")
    credentials = grpc.ssl_channel_credentials(own.authority, own.tls_key, own.tls_certificate)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", COORDINATOR))
    try:
        with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, options=options) as channel:
            for _ in range(500):  # one in fifty overtook the write
                answers = channel.stream_stream(METHOD)(iter(()), timeout=20)
                assert set(answers) <= {b"welcome"}
                assert answers.code() is grpc.StatusCode.OK
    finally:
        server.stop()


def test_a_coordinator_that_stops_is_named(keys: Path) -> None:
    federation = Federation(keys)
    parties = federation.start(lambda session, name: list(session.tasks()))
    with pytest.raises(KeyboardInterrupt), federation.gather():
        raise KeyboardInterrupt
    for party in parties.values():
        problem = party.exception(30)
        assert isinstance(problem, PeerLost) and problem.party == COORDINATOR


_PARTY_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from clients.config import ClientConfig
from clients.streams import join
from lpm.privacy.secure_sum import Flags, Round
keys, name, address, scenario_hash = sys.argv[1:]
config = ClientConfig(scenario=Path(keys), party=name, keys=Path(keys), out=Path(keys), coordinator=address)
with join(config, scenario_hash) as session:
    for task in session.tasks():
        for step in range(10**9):
            if step == 3:
                print("under way", flush=True)
            words = np.zeros(8, dtype=np.int64)
            session.secure_sum.open_to_parties(Round(0, step, "city", 0, task.digest), words, Flags())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("who", ["party", "coordinator"])
def test_a_killed_or_frozen_process_is_named_within_ten_seconds(keys: Path, how: signal.Signals, who: str) -> None:
    if who == "coordinator":
        _lose_the_coordinator(keys, how)
        return
    federation = Federation(keys)
    program = [sys.executable, "-c", _PARTY_PROCESS, str(keys), "queens", federation.address, SCENARIO_HASH]

    def act(session: PartySession, name: str) -> None:
        for task in session.tasks():
            for step in range(10**9):
                address = Round(0, step, "city", 0, task.digest)
                session.secure_sum.open_to_parties(address, np.zeros(8, dtype=np.int64), Flags())

    def party(name: str) -> None:
        with federation.join(name) as session:
            act(session, name)

    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        others = [in_thread(lambda name=name: party(name)) for name in ("bronx", "kings")]
        session = federation.gather()
        session.broadcast(_task())
        assert process.stdout is not None and process.stdout.readline() == "under way\n"
        os.kill(process.pid, how)
        waiting = in_thread(lambda: session.receive("outputs", _task()))
        for future in (waiting, *others):
            problem = future.exception(10)  # raises TimeoutError if nobody noticed
            assert isinstance(problem, PeerLost) and problem.party == "queens"
        session.close("it stopped")
    finally:
        process.kill()
        process.communicate()


_COORDINATOR_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from lpm.protocol.manifest import Terms
from lpm.protocol.messages import Task
from server.config import CoordinatorConfig
from server.relay import gather
keys, address, scenario_hash = sys.argv[1:]
config = CoordinatorConfig(
    scenario=Path(keys), keys=Path(keys), out=Path(keys), parties=("bronx", "queens", "kings"), data_address=address
)
session = gather(config, Terms("a scenario", scenario_hash))
task = Task("simulate", 0, np.zeros((1, 1)))
session.broadcast(task)
session.receive("outputs", task)
"""


def _lose_the_coordinator(keys: Path, how: signal.Signals) -> None:
    federation = Federation(keys)
    program = [sys.executable, "-c", _COORDINATOR_PROCESS, str(keys), federation.address, SCENARIO_HASH]
    under_way = threading.Barrier(4)

    def act(session: PartySession, name: str) -> None:
        for task in session.tasks():
            for step in range(10**9):
                address = Round(0, step, "city", 0, task.digest)
                session.secure_sum.open_to_parties(address, np.zeros(8, dtype=np.int64), Flags())
                if step == 3:
                    under_way.wait(30)

    process = subprocess.Popen(program)
    try:
        parties = federation.start(act)
        under_way.wait(60)
        os.kill(process.pid, how)
        for party in parties.values():
            problem = party.exception(10)
            assert isinstance(problem, PeerLost) and problem.party == COORDINATOR
    finally:
        process.kill()
        process.wait()

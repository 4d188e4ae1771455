"""What a tap inside TLS hears, at both ends of every stream: nothing of what any party contributed."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from loopback import Federation
from numpy.typing import NDArray
from scipy import stats

from clients.streams import PartySession
from lpm.privacy.secure_sum import Flags, Opening, Round
from lpm.protocol.messages import Message, Release, Reply, Share, Task, decode
from lpm.ring import decode as decode_words
from lpm.ring import encode

pytestmark = pytest.mark.timeout(120)

_PARTIES = ("bronx", "queens", "kings", "richmond")
_STEPS = 6
_WORDS = 64
_ENVIRONMENT = b"the environment of every party, whose digest the coordinator must not recognise"


def _plaintexts(values: NDArray[np.float64]) -> Iterator[bytes]:
    """Every way in which somebody might write these numbers: whole words, and neighbouring halves in pairs."""
    for order in "<>":
        for word in encode(values).astype(f"{order}i8"):
            yield word.tobytes()
        for number in values.astype(f"{order}f8"):
            yield number.tobytes()
        # Four bytes alone turn up by chance in megabytes of noise; two neighbours do not.
        floats = values.astype(f"{order}f4")
        for place in range(len(floats) - 1):
            yield floats[place : place + 2].tobytes()
    for value in values:
        yield repr(float(value)).encode()
        yield f"{value:.6f}".encode()
        yield f"{value:.8g}".encode()
        yield str(int(encode([value])[0])).encode()


def _private(name: str, step: int) -> NDArray[np.float64]:
    """What a party contributes in a step: counts and fractions with many digits, of both signs."""
    generator = np.random.default_rng([_PARTIES.index(name), step])
    return generator.uniform(1000, 100_000, _WORDS) * generator.choice([-1.0, 1.0], _WORDS)


def _act(session: PartySession, name: str) -> list[NDArray[np.int64]]:
    opened = []
    for task in session.tasks():
        for step in range(_STEPS):
            address = Round(task.trajectory, step, "city", 0, task.digest)
            words = encode(_private(name, step))
            opened.append(session.secure_sum.open_to_parties(address, words, Flags(_ENVIRONMENT)))
        address = Round(task.trajectory, _STEPS, "loss", 0, task.digest)
        session.secure_sum.open_to_coordinator(address, encode(_private(name, _STEPS)), Flags(_ENVIRONMENT))
        session.done(task, Release("nothing private", {"bands": np.array([0.25])}) if name == "kings" else None)
    return opened


class _Run:
    """One tapped run: frames by end, and what was opened to whom."""

    def __init__(self, keys: Path) -> None:
        self.frames: dict[tuple[str, str, str], list[bytes]] = defaultdict(list)
        federation = Federation(keys, parties=_PARTIES)
        for end in ("coordinator", *_PARTIES):
            federation.taps[end] = lambda way, party, frame, end=end: self.frames[end, way, party].append(frame)
        self.task = Task("evaluate", 3, np.array([[0.123456789]]))
        parties = federation.start(_act)
        with federation.gather() as session:
            session.broadcast(self.task)
            self.loss = session.receive("loss", self.task)
            self.releases = session.releases(self.task)
        self.opened = {name: party.result(30) for name, party in parties.items()}
        self.wire = b"\x00".join(itertools.chain.from_iterable(self.frames.values()))

    def received(self) -> Mapping[str, list[Message]]:
        """What the coordinator received, by party."""
        return {name: [decode(frame) for frame in self.frames["coordinator", "up", name]] for name in _PARTIES}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    records: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    listener, root = Listen(), logging.getLogger()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        run = _Run(tmp_path_factory.mktemp("wire") / "keys")
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    run.wire += b"\x00" + "\n".join(records).encode()
    return run


def test_the_sums_are_right(run: _Run) -> None:
    for opened in run.opened.values():
        for step in range(_STEPS):
            expected = np.sum([encode(_private(name, step)) for name in _PARTIES], axis=0)
            assert (opened[step] == expected).all()
    assert (run.loss == np.sum([encode(_private(name, _STEPS)) for name in _PARTIES], axis=0)).all()


def test_both_ends_hear_the_same(run: _Run) -> None:
    for way in ("up", "down"):
        for name in _PARTIES:
            assert run.frames["coordinator", way, name] == run.frames[name, way, name]
            assert len(run.frames[name, way, name]) > _STEPS


def test_no_contribution_is_on_the_wire_or_in_a_log(run: _Run) -> None:
    for name in _PARTIES:
        for step in range(_STEPS + 1):
            found = [each for each in _plaintexts(_private(name, step)) if each in run.wire]
            assert not found, f"{name}'s contribution of step {step} can be read off the wire"


def test_no_total_is_on_the_wire(run: _Run) -> None:
    """Totals arise at the ends: those opened to the parties pass the coordinator in no form."""
    for step in range(_STEPS + 1):
        total = decode_words(np.sum([encode(_private(name, step)) for name in _PARTIES], axis=0))
        assert not [each for each in _plaintexts(total) if each in run.wire]


def test_the_environment_can_not_be_recognised(run: _Run) -> None:
    assert _ENVIRONMENT not in run.wire and _ENVIRONMENT.hex().encode() not in run.wire
    digests = {m.header.digest for ms in run.received().values() for m in ms if isinstance(m, Share)}
    assert len(digests) == _STEPS + 1  # equal among the parties, another one each round


def test_the_search_would_find_what_is_there(run: _Run) -> None:
    """A search that finds nothing proves nothing unless it finds what is known to be there."""
    assert any(each in run.wire for each in _plaintexts(run.task.theta[0]))
    assert np.array([0.25]).tobytes() in run.wire and list(run.releases) == ["kings"]
    values = _private("bronx", 0)
    for each in _plaintexts(values[:3]):
        assert each in b"".join(_plaintexts(values[:3]))


def test_the_coordinator_can_not_put_a_group_sum_together(run: _Run) -> None:
    """Any sum of one sealed copy per party, the only thing that could cancel masks, is noise to it."""
    received = run.received()
    for step in range(_STEPS):
        total = np.sum([encode(_private(name, step)) for name in _PARTIES], axis=0).view(np.uint64)
        bundles = [
            [np.frombuffer(bytes(body)[: 8 * _WORDS], dtype="<u8") for body in message.bodies]
            for messages in received.values()
            for message in messages
            if isinstance(message, Share) and message.header.round.step == step
        ]
        assert [len(bundle) for bundle in bundles] == [len(_PARTIES) - 1] * len(_PARTIES)
        for choice in itertools.product(*bundles):
            assert not (np.sum(choice, axis=0, dtype=np.uint64) == total).any()
    # What is opened to it, it can put together: the masks of one round do cancel.
    shares = [
        np.frombuffer(message.bodies[0], dtype="<u8")
        for messages in received.values()
        for message in messages
        if isinstance(message, Share) and message.header.opening == Opening.COORDINATOR
    ]
    assert (np.sum(shares, axis=0, dtype=np.uint64).view(np.int64) == run.loss).all()
    # ... and no part of them.
    for size in range(1, len(_PARTIES)):
        for some in itertools.combinations(range(len(_PARTIES)), size):
            partial = np.sum([shares[place] for place in some], axis=0, dtype=np.uint64).view(np.int64)
            plain = np.sum([encode(_private(_PARTIES[place], _STEPS)) for place in some], axis=0)
            assert not (partial == plain).any()


def test_what_the_coordinator_receives_is_uniform(run: _Run) -> None:
    """Chi-square over bytes of all masked shares and all sealed copies; false alarms in 1 of 10,000 runs."""
    bodies = {Opening.PARTIES: b"", Opening.COORDINATOR: b""}
    for messages in run.received().values():
        for message in messages:
            if isinstance(message, Share):
                bodies[message.header.opening] += b"".join(map(bytes, message.bodies))
    for body in bodies.values():
        counts = np.bincount(np.frombuffer(body, dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 0.5e-4


def test_replies_carry_only_what_parties_sealed(run: _Run) -> None:
    for name in _PARTIES:
        sent = {
            bytes(body)
            for other in _PARTIES
            if other != name
            for frame in run.frames[other, "up", other]
            if isinstance(message := decode(frame), Share)
            for body in message.bodies
        }
        replies = [m for frame in run.frames[name, "down", name] if isinstance(m := decode(frame), Reply)]
        assert len(replies) == _STEPS + 1
        assert all(bytes(parcel.body) in sent for reply in replies for parcel in reply.parcels)

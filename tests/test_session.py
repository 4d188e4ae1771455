"""The session's state machines: honest parties come together, and every liar is named."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lpm.errors import InputError, LpmError, SessionRefused
from lpm.privacy.composition import Composed
from lpm.privacy.secure_sum import Header, Opening, Round
from lpm.protocol.identity import COORDINATOR, Identity, load_identity, make_local_authority
from lpm.protocol.manifest import Manifest, Terms
from lpm.protocol.messages import (
    Bundle,
    Done,
    Hello,
    Leave,
    Lost,
    Message,
    Offer,
    Parts,
    Ready,
    Refused,
    Reply,
    Share,
    Signature,
    Signatures,
    Task,
    TaskMessage,
    Welcome,
    decode,
)
from lpm.protocol.session import CoordinatorMachine, PartyMachine, Phase

_PARTIES = ("bronx", "queens", "kings")
_HASH = "ab" * 32
_TERMS = Terms("nyc", _HASH, outputs=("deaths",))


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Identity]:
    folder = tmp_path_factory.mktemp("keys") / "local"
    make_local_authority(folder, _PARTIES)
    parties = {name: load_identity(folder / "parties" / name) for name in _PARTIES}
    return parties | {COORDINATOR: load_identity(folder / COORDINATOR)}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Identity]:
    folder = tmp_path_factory.mktemp("keys") / "foreign"
    make_local_authority(folder, _PARTIES)
    parties = {name: load_identity(folder / "parties" / name) for name in _PARTIES}
    return parties | {COORDINATOR: load_identity(folder / COORDINATOR)}


class _Federation:
    """All machines in one place; a test may change any frame on its way ("up" or "down", party, message)."""

    def __init__(
        self,
        identities: Mapping[str, Identity],
        change: Callable[[str, str, Message], Message | None] = lambda way, party, message: message,
        hashes: Mapping[str, str] | None = None,
        terms: Terms = _TERMS,
    ) -> None:
        self.coordinator = CoordinatorMachine(identities[COORDINATOR], _PARTIES, terms)
        hashes = hashes or {}
        self.parties = {n: PartyMachine(identities[n], hashes.get(n, terms.scenario_hash)) for n in _PARTIES}
        self.change = change
        self.queue: deque[tuple[str, str, bytes]] = deque()
        self.news: list[tuple[str, Message | Composed]] = []

    def form(self) -> _Federation:
        for name in _PARTIES:
            self.queue.append(("down", name, self.coordinator.welcome(name)))
        return self.pump()

    def pump(self) -> _Federation:
        while self.queue:
            way, name, frame = self.queue.popleft()
            message = self.change(way, name, decode(frame))
            if message is None:
                continue
            news: Message | Composed | None
            if way == "down":
                frames, news = self.parties[name].receive(message.encode())
                self.queue.extend(("up", name, answer) for answer in frames)
            else:
                answers, news = self.coordinator.receive(name, message.encode())
                self.queue.extend(("down", to, answer) for to, answer in answers)
            if news is not None:
                self.news.append((name, news))
        return self


def _on(kind: type[Message], party: str | None, change: Callable[[Message], Message | None]) -> Callable:
    def meddle(way: str, name: str, message: Message) -> Message | None:
        return change(message) if type(message) is kind and party in (None, name) else message

    return meddle


def test_honest_parties_come_together(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities).form()
    assert federation.coordinator.phase == Phase.READY
    assert all(party.phase == Phase.READY for party in federation.parties.values())
    assert federation.coordinator.manifest is not None
    assert all(party.manifest == federation.coordinator.manifest for party in federation.parties.values())
    keys = [party.keys for party in federation.parties.values()]
    assert all(each is not None for each in keys)
    assert len({each.binding for each in keys if each}) == 1
    address = Round(0, 0, "city", 0, bytes(32))
    assert len({each.keyed_digest(address, b"environment") for each in keys if each}) == 1
    for i, mine in enumerate(keys):
        for j, theirs in enumerate(keys):
            if mine and theirs and i != j:
                assert mine.pair_secrets[j] == theirs.pair_secrets[i]


def test_every_session_has_new_keys(identities: Mapping[str, Identity]) -> None:
    one, two = (_Federation(identities).form() for _ in range(2))
    assert one.coordinator.session != two.coordinator.session
    for name in _PARTIES:
        first, second = one.parties[name].keys, two.parties[name].keys
        assert first and second
        assert not set(first.pair_secrets.values()) & set(second.pair_secrets.values())
        assert first.binding != second.binding


def test_the_coordinator_holds_no_key(identities: Mapping[str, Identity]) -> None:
    seen: list[bytes] = []

    def listen(way: str, name: str, message: Message) -> Message:
        seen.append(message.encode())
        return message

    federation = _Federation(identities, listen).form()
    wire = b"".join(seen)
    for party in federation.parties.values():
        assert party.keys
        for secret in [*party.keys.pair_secrets.values(), party.keys._group, party.keys._own]:
            assert secret not in wire


def test_tasks_rounds_and_done(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities).form()
    task = Task("simulate", 0, np.zeros((1, 1)))
    message = federation.coordinator.begin_task(lambda number: TaskMessage(number, task))
    federation.queue.extend(("down", name, message.encode()) for name in _PARTIES)
    federation.pump()
    assert [type(news) for _, news in federation.news] == [TaskMessage] * 3
    address = Round(0, 0, "outputs", 0, task.digest)
    federation.news.clear()
    for place, name in enumerate(_PARTIES):
        share = Share(Header(address, Opening.COORDINATOR, 0, bytes(32)), [np.array([place + 1]).tobytes()])
        federation.queue.append(("up", name, share.encode()))
        federation.pump()
        assert federation.coordinator.waiting_for(address) == list(_PARTIES[place + 1 :])[: 2 if place < 2 else 0]
    totals = [news.total for _, news in federation.news if isinstance(news, Composed)]
    assert len(totals) == 1 and totals[0] is not None and totals[0].tolist() == [6]
    assert sum(isinstance(news, Reply) for _, news in federation.news) == 3
    federation.queue.extend(("up", name, Done(0).encode()) for name in _PARTIES)
    federation.pump()
    assert sum(isinstance(news, Done) for _, news in federation.news) == 3


@pytest.mark.parametrize(
    ("parties", "said"),
    [
        (("bronx", "queens"), "at least 3"),
        ((), "at least 3"),
        (("bronx", "queens", "bronx"), "bronx is in the roster twice"),
        (("bronx", "queens", "coordinator"), "'coordinator' can't be used"),
    ],
)
def test_rosters_that_can_not_be(identities: Mapping[str, Identity], parties: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CoordinatorMachine(identities[COORDINATOR], parties, _TERMS)


def test_strangers_and_latecomers(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities)
    with pytest.raises(SessionRefused, match="stranger is not in the roster"):
        federation.coordinator.welcome("stranger")
    assert federation.coordinator.missing == list(_PARTIES)
    federation.form()
    with pytest.raises(SessionRefused, match="bronx comes too late"):
        federation.coordinator.welcome("bronx")


def test_a_party_may_come_again_before_the_session_is_formed(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities)
    federation.queue.append(("down", "bronx", federation.coordinator.welcome("bronx")))
    federation.pump()
    assert federation.coordinator.missing == ["queens", "kings"]
    assert federation.coordinator.forget("bronx")
    federation.parties["bronx"] = PartyMachine(identities["bronx"], _HASH)
    federation.form()
    assert federation.coordinator.phase == Phase.READY and not federation.coordinator.forget("bronx")


# Parties that lie to the coordinator.


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


def test_lying_parties_are_named(identities: Mapping[str, Identity], foreign: Mapping[str, Identity]) -> None:
    other = identities["kings"]
    early = Share(Header(Round(0, 0, "x", 0, bytes(32)), Opening.PARTIES, 0, bytes(32)), [])
    lies: list[tuple[type[Message], Callable, str]] = [
        (Hello, lambda m: replace(m, party="kings"), "queens, as its TLS certificate says, said hello as 'kings'"),
        (Hello, lambda m: replace(m, certificate=other.certificate), "shown for queens belongs to kings"),
        (Hello, lambda m: replace(m, certificate=foreign["queens"].certificate), "queens was not issued by"),
        (Hello, lambda m: replace(m, certificate=b"garbage"), "queens can't be read"),
        (Hello, lambda m: replace(m, ephemeral=bytes(32)), "signature of queens on the hello"),
        (Hello, lambda m: replace(m, signature=_flipped(m.signature)), "signature of queens on the hello"),
        (Hello, lambda m: replace(m, scenario_hash="cd" * 32), "queens has another version of the scenario 'nyc'"),
        (Signature, lambda m: Signature(_flipped(m.signature)), "signature of queens on the manifest"),
        (Signature, lambda m: Ready(), "queens sent a Ready while signing"),
        (Bundle, lambda m: Bundle(m.parts[:1]), "queens sent 1 parts"),
        (Ready, lambda m: Welcome(bytes(16)), "queens sent a Welcome while keying"),
        (Ready, lambda m: early, "queens sent a Share while keying"),
    ]
    for kind, lie, said in lies:
        federation = _Federation(identities, _on(kind, "queens", lie))
        with pytest.raises(SessionRefused, match=said):
            federation.form()
        assert federation.coordinator.phase == Phase.ENDED


def test_an_expired_identity_is_named(tmp_path: Path) -> None:
    make_local_authority(tmp_path / "keys", _PARTIES, days=1)
    later = datetime.now(UTC) + timedelta(days=2)
    coordinator = load_identity(tmp_path / "keys" / COORDINATOR)
    bronx = PartyMachine(load_identity(tmp_path / "keys" / "parties" / "bronx"), _HASH)
    machine = CoordinatorMachine(coordinator, _PARTIES, _TERMS, now=later)
    [hello], _ = bronx.receive(machine.welcome("bronx"))
    with pytest.raises(SessionRefused, match="identity certificate of bronx expired on"):
        machine.receive("bronx", hello)


def test_a_second_hello_is_refused(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities)
    [hello], _ = federation.parties["bronx"].receive(federation.coordinator.welcome("bronx"))
    federation.coordinator.receive("bronx", hello)
    with pytest.raises(SessionRefused, match="bronx said hello twice"):
        federation.coordinator.receive("bronx", hello)


# A coordinator that lies to the parties.


def _forge(identities: Mapping[str, Identity], change: Callable[[Manifest], Manifest]) -> Callable[[Message], Message]:
    """A coordinator that offers one party a changed manifest, with its own signature in order."""

    def lie(message: Message) -> Message:
        assert isinstance(message, Offer)
        manifest = change(Manifest.decode(message.manifest))
        signature = identities[COORDINATOR].sign(b"offer", manifest.digest)
        return Offer(manifest.encode(), identities[COORDINATOR].certificate, signature)

    return lie


def test_lying_coordinators_are_refused(identities: Mapping[str, Identity], foreign: Mapping[str, Identity]) -> None:
    def roster(change: Callable) -> Callable[[Manifest], Manifest]:
        return lambda manifest: replace(manifest, roster=tuple(change(list(manifest.roster))))

    def terms(**changes: object) -> Callable[[Manifest], Manifest]:
        return lambda manifest: replace(manifest, terms=replace(manifest.terms, **changes))  # type: ignore[arg-type]

    stranger = foreign["kings"]
    lies: list[tuple[Callable[[Manifest], Manifest], str]] = [
        (roster(lambda r: r[:2]), "at least 3"),
        (roster(lambda r: [r[0], r[1], r[1]]), "queens is in the roster twice"),
        (roster(lambda r: [r[0], r[1], replace(r[1], party="kings2")]), "kings2 belongs to queens"),
        (roster(lambda r: [r[0], replace(r[2], party="x"), r[2]]), "does not hold the entry that queens sent"),
        (roster(lambda r: [r[0], replace(r[1], ephemeral=bytes(32)), r[2]]), "hold the entry that queens sent"),
        (roster(lambda r: [r[0], r[1], replace(r[2], ephemeral=r[0].ephemeral)]), "signature of kings on the hello"),
        (roster(lambda r: [r[0], r[1], replace(r[2], certificate=stranger.certificate)]), "kings was not issued by"),
        (terms(scenario_hash="cd" * 32), "not the one that queens has installed"),
        (terms(sharing="plain"), "one of crypten"),
        (lambda manifest: replace(manifest, session=bytes(16)), "of another session"),
    ]
    for change, said in lies:
        federation = _Federation(identities, _on(Offer, "queens", _forge(identities, change)))
        with pytest.raises(SessionRefused, match=said):
            federation.form()
        assert federation.parties["queens"].keys is None
        assert federation.parties["queens"].phase == Phase.ENDED


def test_an_offer_must_be_the_coordinator_s(
    identities: Mapping[str, Identity], foreign: Mapping[str, Identity]
) -> None:
    def signed_by(who: Identity) -> Callable[[Message], Message]:
        return lambda m: Offer(m.manifest, who.certificate, who.sign(b"offer", b""))  # type: ignore[attr-defined]

    for lie, said in (
        (signed_by(identities["bronx"]), "shown for coordinator belongs to bronx"),
        (signed_by(foreign[COORDINATOR]), "coordinator was not issued by"),
        (signed_by(identities[COORDINATOR]), "signature of coordinator on the offer"),
        (lambda m: replace(m, manifest=m.manifest[:-1]), "manifest can't be read"),
        (lambda m: Signatures(()), "Signatures while offering"),
    ):
        with pytest.raises(SessionRefused, match=said):
            _Federation(identities, _on(Offer, "queens", lie)).form()


def test_parties_that_were_shown_different_terms_never_get_keys(identities: Mapping[str, Identity]) -> None:
    """The coordinator shows queens other bounds; her signature then fits nobody else's manifest."""

    def weaker(manifest: Manifest) -> Manifest:
        return replace(manifest, terms=replace(manifest.terms, bounds={"city": 9.0}))

    signatures: dict[str, bytes] = {}

    def meddle(way: str, name: str, message: Message) -> Message | None:
        if isinstance(message, Offer) and name == "queens":
            return _forge(identities, weaker)(message)
        if isinstance(message, Signature):
            signatures[name] = message.signature
            return None  # a coordinator that checks nothing itself
        return message

    federation = _Federation(identities, meddle).form()
    shown = Signatures(tuple(signatures[name] for name in _PARTIES)).encode()
    with pytest.raises(SessionRefused, match="signature of bronx on the manifest"):
        federation.parties["queens"].receive(shown)
    with pytest.raises(SessionRefused, match="signature of queens on the manifest"):
        federation.parties["bronx"].receive(shown)


@pytest.mark.parametrize(
    ("kind", "lie", "said"),
    [
        (Signatures, lambda m: Signatures(m.signatures[:2]), "2 signatures for 3"),
        (Signatures, lambda m: Signatures(m.signatures[::-1]), "signature of bronx"),
        (Parts, lambda m: Parts(m.parts[::-1]), "not sealed by it"),
        (Parts, lambda m: Parts(m.parts[:1]), "1 parts"),
        (Parts, lambda m: Parts((_flipped(m.parts[0]), m.parts[1])), "not sealed by it"),
        (Parts, lambda m: Refused("no"), "ended the session: no"),
        (Parts, lambda m: TaskMessage(0, Task("finish", 0, np.zeros((0, 0)))), "TaskMessage while keying"),
        (Welcome, lambda m: Ready(), "Ready while greeting"),
    ],
)
def test_meddling_after_the_offer(
    identities: Mapping[str, Identity], kind: type[Message], lie: Callable, said: str
) -> None:
    federation = _Federation(identities, _on(kind, "queens", lie))
    with pytest.raises(SessionRefused, match=said):
        federation.form()
    assert federation.parties["queens"].phase == Phase.ENDED


def test_tasks_are_numbered_and_none_is_repeated(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities).form()
    task = TaskMessage(0, Task("simulate", 0, np.zeros((1, 1)))).encode()
    federation.parties["bronx"].receive(task)
    with pytest.raises(SessionRefused, match="task 0 where 1 was next"):
        federation.parties["bronx"].receive(task)


def test_a_site_may_refuse_a_manifest(identities: Mapping[str, Identity]) -> None:
    def policy(manifest: Manifest) -> None:
        raise SessionRefused(f"The site's policy does not allow the output {manifest.terms.outputs[0]}.")

    federation = _Federation(identities)
    federation.parties["queens"] = PartyMachine(identities["queens"], _HASH, check=policy)
    with pytest.raises(SessionRefused, match="does not allow the output deaths"):
        federation.form()


def test_the_control_plane_s_session_must_match(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities, terms=replace(_TERMS, session="run-7"))
    federation.parties["queens"] = PartyMachine(identities["queens"], _HASH, session_name="run-8")
    with pytest.raises(SessionRefused, match="'run-7', not 'run-8'"):
        federation.form()


def test_news_of_a_lost_party_ends_the_session(identities: Mapping[str, Identity]) -> None:
    federation = _Federation(identities).form()
    _, news = federation.parties["bronx"].receive(Lost("queens", "its connection broke").encode())
    assert isinstance(news, Lost) and news.party == "queens"
    _, left = federation.coordinator.receive("queens", Leave("it stopped").encode())
    assert isinstance(left, Leave)
    with pytest.raises(SessionRefused):
        federation.parties["bronx"].receive(TaskMessage(0, Task("finish", 0, np.zeros((0, 0)))).encode())


def test_an_unknown_engine_is_refused_with_those_there_are(identities: Mapping[str, Identity]) -> None:
    with pytest.raises(InputError, match="one of crypten"):
        PartyMachine(identities["bronx"], _HASH, sharing="plain")
    with pytest.raises(InputError, match="one of crypten"):
        CoordinatorMachine(identities[COORDINATOR], _PARTIES, replace(_TERMS, sharing="plain"))


def test_altered_frames_never_crash_a_machine(identities: Mapping[str, Identity]) -> None:
    """Every honest frame of a session, altered at a random byte: formed all the same, or refused; nothing else."""
    generator = random.Random(6)
    for _ in range(300):
        target = generator.randrange(18)
        count = 0
        federation = _Federation(identities)
        for name in _PARTIES:
            federation.queue.append(("down", name, federation.coordinator.welcome(name)))
        try:
            while federation.queue:
                way, name, frame = federation.queue.popleft()
                if count == target:
                    place = generator.randrange(len(frame))
                    frame = frame[:place] + bytes((frame[place] ^ (1 << generator.randrange(8)),)) + frame[place + 1 :]
                count += 1
                if way == "down":
                    frames, _news = federation.parties[name].receive(frame)
                    federation.queue.extend(("up", name, answer) for answer in frames)
                else:
                    answers, _more = federation.coordinator.receive(name, frame)
                    federation.queue.extend(("down", to, answer) for to, answer in answers)
        except LpmError:
            continue
        # What was altered must have been noticed by somebody, unless nobody became ready with other keys.
        digests = {p.keys.binding for p in federation.parties.values() if p.phase == Phase.READY and p.keys}
        assert len(digests) <= 1

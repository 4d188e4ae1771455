"""An honest session, to begin from: its machines in each phase, its frames, and what no error may tell."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lpm.errors import LpmError
from lpm.privacy.composition import RoundComposer
from lpm.privacy.sealing import SessionKeys
from lpm.privacy.secure_sum import Channel, Header, Opening, Parcel, Round, Stage
from lpm.protocol.identity import COORDINATOR, Identity, load_identity, make_local_authority
from lpm.protocol.manifest import Terms
from lpm.protocol.messages import (
    Done,
    Leave,
    Lost,
    Refused,
    Release,
    Reply,
    Share,
    StageMessage,
    StageReply,
    Task,
    TaskMessage,
)
from lpm.protocol.session import CoordinatorMachine, PartyMachine, Phase

__all__ = ["HASH", "MARK", "PARTIES", "Honest", "Pipe"]

PARTIES = ("bronx", "queens", "kings")
HASH = "ab" * 32
_TERMS = Terms("a scenario", HASH, outputs=("deaths",), bounds={"city": 1.0}, exponents={"city": 40})
MARK = 6_180_339_887_498_948_482
"""A private contribution: no error may tell it."""


class Pipe(Channel):
    """A party's channel whose answers the fuzzer makes up."""

    def __init__(self, me: int, parties: int) -> None:
        self.me, self.parties = me, parties
        self.answer: Callable[[Header, Sequence[bytes]], Sequence[Parcel]] = lambda header, bodies: ()

    def exchange(self, header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        return self.answer(header, bodies)

    def combine(self, header: Header, body: bytes) -> bytes | memoryview:
        return self.answer(header, [body])[0].body

    def converse(self, header: Header, stage: Stage, parts: Sequence[bytes]) -> Sequence[bytes]:
        raise LpmError("No round that can lose parties goes over this channel.")

    def deliver(self, header: Header, body: bytes) -> None:
        self.answer(header, [body])


@dataclass
class Honest:
    """A formed session: its machines as they were in each phase, all frames, and what must never be told."""

    identities: Mapping[str, Identity]
    parties: dict[Phase, PartyMachine] = field(default_factory=dict)
    states: dict[Phase, dict[str, Any]] = field(default_factory=dict)
    coordinators: dict[Phase, Callable[[], CoordinatorMachine]] = field(default_factory=dict)
    keys: list[SessionKeys] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)
    up: list[bytes] = field(default_factory=list)
    manifest: bytes = b""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def form(cls, folder: Path) -> Honest:
        """Make keys and run a session to the end of its forming; `folder` is new."""
        make_local_authority(folder, PARTIES)
        identities = {name: load_identity(folder / "parties" / name) for name in PARTIES}
        session = cls(identities | {COORDINATOR: load_identity(folder / COORDINATOR)})
        coordinator = CoordinatorMachine(session.identities[COORDINATOR], PARTIES, _TERMS)
        machines = {name: PartyMachine(identities[name], HASH) for name in PARTIES}
        watched = machines[PARTIES[0]]
        session._remember(watched, coordinator)
        queue = deque(("down", name, coordinator.welcome(name)) for name in PARTIES)
        while queue:
            way, name, frame = queue.popleft()
            if way == "down":
                session.down.append(frame)
                queue.extend(("up", name, answer) for answer in machines[name].receive(frame)[0])
            else:
                session.up.append(frame)
                queue.extend(("down", to, answer) for to, answer in coordinator.receive(name, frame)[0])
            session._remember(watched, coordinator)
        assert coordinator.manifest is not None
        session.manifest = coordinator.manifest.encode()
        session.keys = [machine.keys for machine in machines.values() if machine.keys is not None]
        session._add_rounds()
        private = [(folder / "parties" / name / "storage.key").read_bytes() for name in PARTIES]
        private += [secret for keys in session.keys for secret in keys.pair_secrets.values()]
        private += [line for name in PARTIES for line in _key_lines(folder / "parties" / name)]
        told = [form for each in private for form in (each.hex(), base64.b64encode(each).decode(), repr(each)[2:-1])]
        session.secrets = (*told, str(MARK), MARK.to_bytes(8, "little").hex(), f"{MARK:x}")
        return session

    def _remember(self, party: PartyMachine, coordinator: CoordinatorMachine) -> None:
        if party.phase not in self.states:
            self.parties[party.phase] = party
            self.states[party.phase] = dict(vars(party))
        if coordinator.phase not in self.coordinators:
            state = {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(coordinator).items()}

            def again() -> CoordinatorMachine:
                made = CoordinatorMachine.__new__(CoordinatorMachine)
                vars(made).update({k: v.copy() if isinstance(v, dict | set) else v for k, v in state.items()})
                made._rounds = RoundComposer(len(PARTIES))
                return made

            self.coordinators[coordinator.phase] = again

    def party(self, phase: Phase) -> PartyMachine:
        """The watched party as it was in a phase."""
        machine = self.parties[phase]
        vars(machine).update(self.states[phase])
        return machine

    def _add_rounds(self) -> None:
        task = Task("evaluate", 3, np.full((2, 3), 0.25), "fd", None, {"steps": 4})
        release = Release("fit", {"bands": np.arange(6.0).reshape(2, 3)}, {"unit": "people"})
        address, digest = Round(3, 5, "city/1", 0, task.digest), bytes(32)
        words = np.full(5, MARK).tobytes()
        shares = [
            Share(Header(address, Opening.PARTIES, 4, digest), (words, words)),
            Share(Header(address, Opening.COORDINATOR, 5, digest), (words,)),
            Share(Header(address, Opening.PARTIES, 6, digest, True, ""), ()),
            Share(Header(address, Opening.PARTIES, 6, digest, False, "no"), ()),
        ]
        self.up += [share.encode() for share in shares]
        staged = Header(Round(3, -2, "loss", 0, task.digest), Opening.COORDINATOR, 7, digest)
        self.up += [StageMessage(staged, stage, (words, words)).encode() for stage in Stage]
        self.down += [StageReply(staged.round, stage, (words, words)).encode() for stage in Stage]
        self.up += [Done(0).encode(), Done(0, release).encode(), Leave("bye").encode(), Refused("no").encode()]
        self.down += [TaskMessage(0, task).encode(), Reply(address, (Parcel(4, words), Parcel(4, words))).encode()]
        self.down += [Lost("queens", "gone").encode(), Refused("no").encode(), Reply(address).encode()]


def _key_lines(folder: Path) -> Iterator[bytes]:
    for name in ("identity.key", "tls.key"):
        for line in (folder / name).read_bytes().splitlines():
            if not line.startswith(b"-"):
                yield line

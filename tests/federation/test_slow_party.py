"""A party that is there but does not answer: a round that can lose it goes on at its deadline, over real streams."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from loopback import Federation

from clients.streams import PartySession
from lpm.errors import LpmError, PeerLost
from lpm.privacy.secure_sum import Flags, Round, Stage
from lpm.protocol.messages import StageMessage, Task, decode

pytestmark = pytest.mark.timeout(60)

_PARTIES = ("bronx", "kings", "queens", "richmond")


def test_a_slow_party_is_left_out_at_the_deadline_and_then_told(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "keys", parties=_PARTIES, deadline_seconds=1.5)
    opened = threading.Event()

    def hold_back(way: str, party: str, frame: bytes) -> None:
        if way == "up":
            message = decode(frame)
            if isinstance(message, StageMessage) and message.stage == Stage.CONTRIBUTION:
                opened.wait(30)

    federation.taps["queens"] = hold_back

    def contribute(session: PartySession, name: str) -> None:
        for task in session.tasks():
            words = np.full(5, 10 ** _PARTIES.index(name), dtype=np.int64)
            session.secure_sum.open_to_coordinator(Round(0, -2, "loss", 0, task.digest), words, Flags())
            session.done(task)

    problems: dict[str, LpmError] = {}

    def party(name: str) -> None:
        try:
            with federation.join(name, sharing="masked") as session:
                contribute(session, name)
        except LpmError as problem:
            problems[name] = problem

    threads = [threading.Thread(target=party, args=(name,), daemon=True) for name in _PARTIES]
    for thread in threads:
        thread.start()
    with federation.gather(sharing="masked", droppable=("loss",)) as session:
        task = Task("evaluate", 0, np.zeros((1, 1)))
        session.broadcast(task)
        total = session.receive_from("loss", task)
        assert total.parties == ("bronx", "kings", "richmond") and total.words.tolist() == [1011] * 5
        session.releases(task)
        with pytest.raises(PeerLost, match="queens"):
            session.broadcast(Task("evaluate", 1, np.zeros((1, 1))))
        opened.set()
    for thread in threads:
        thread.join(20)
    assert set(problems) == set(_PARTIES) and all("queens" in str(problem) for problem in problems.values())

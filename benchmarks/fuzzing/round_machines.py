"""Fuzzed: rounds of secure sums, with what a relay, a coordinator or other parties may answer in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fuzzing.honest import MARK, PARTIES, Honest, Pipe
from fuzzing.mutator import NUMBERS, Mutator
from lpm.privacy.dropout import DroppableParty
from lpm.privacy.masked_engine import MaskedSum
from lpm.privacy.memory_channel import witnesses
from lpm.privacy.recovery import DroppableRounds
from lpm.privacy.sealing import SealedRounds
from lpm.privacy.secure_sum import Flags, Header, Opening, Parcel, Round, Stage

__all__ = ["droppable", "masked", "sealed"]


def sealed(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What a relay may answer a party in a round: parcels altered, moved, replayed, too many, too few."""
    pipe = Pipe(0, len(PARTIES))
    me, others = session.keys[0], session.keys[1:]
    about = Flags(b"environment")
    words = np.full(3, MARK).tobytes()
    state = {"number": 0, "rounds": SealedRounds(me, pipe)}
    old: list[Parcel] = []

    def answer(header: Header, bodies: Sequence[bytes]) -> Sequence[Parcel]:
        context = header.round.context() + header.digest
        parcels = [Parcel(header.sequence, keys.seal(0, 2, header.sequence, context, words)) for keys in others]
        how = mutator.random.randrange(8)
        if how == 0:
            parcels[0] = replace(parcels[0], body=mutator.frame(bytes(parcels[0].body)))
        elif how == 1:
            parcels = parcels[::-1]
        elif how == 2:
            parcels = parcels[: mutator.random.randrange(2)]
        elif how == 3:
            parcels += parcels
        elif how == 4 and old:
            parcels[1] = old[0]
        elif how == 5:
            parcels[0] = replace(parcels[0], sequence=mutator.random.choice(NUMBERS) * 2**31)
        elif how == 6:
            parcels[1] = Parcel(header.sequence, others[1].seal(0, 2, header.sequence, context, words[:-8]))
        old[:] = parcels[-1:]
        return parcels

    pipe.answer = answer

    def once() -> None:
        state["number"] += 1
        if state["number"] % 1000 == 0:
            state["rounds"] = SealedRounds(me, pipe)
        rounds = state["rounds"]
        header = rounds.begin(Round(0, state["number"], "city", 0, bytes(32)), Opening.PARTIES, about)
        rounds.to_parties(header, words)

    return once


def masked(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """What a coordinator may answer a party of the masked engine: sums that are altered, too long, too short."""
    pipe = Pipe(0, len(PARTIES))
    words = np.full(3, MARK, dtype=np.int64)
    state = {"number": 0, "sum": MaskedSum(session.keys[0], pipe)}
    pipe.answer = lambda header, bodies: [Parcel(0, mutator.frame(bytes(bodies[0])))]

    def once() -> None:
        state["number"] += 1
        if state["number"] % 1000 == 0:
            state["sum"] = MaskedSum(session.keys[0], pipe)
        state["sum"].open_to_parties(Round(0, state["number"], "city", 0, bytes(32)), words, Flags(b"environment"))

    return once


def droppable(session: Honest, mutator: Mutator) -> Callable[[], None]:
    """Rounds that can lose parties: what parties may send the coordinator in each stage, and it may answer them."""
    identities = witnesses(len(PARTIES))
    rounds = DroppableRounds(PARTIES, session.keys[0].binding, identities[0].require)
    header = Header(Round(0, 0, "loss", 0, bytes(32)), Opening.COORDINATOR, 0, bytes(32))
    words = np.full(3, MARK).view(np.uint64)
    parties = [
        DroppableParty(keys, identity, header, words, lambda survivors: None)
        for keys, identity in zip(session.keys, identities, strict=True)
    ]
    sent = {place: (party.stage, party.begin()) for place, party in enumerate(parties)}
    up: list[tuple[DroppableRounds, int, Stage, list[bytes]]] = []
    down: list[tuple[dict[str, Any], list[bytes]]] = []
    while sent:
        answers: dict[int, list[bytes]] = {}
        for place, (stage, parts) in sent.items():
            up.append((copy.deepcopy(rounds), place, stage, list(map(bytes, parts))))
            step = rounds.receive(place, header, stage, parts)
            answers |= {} if step is None else step.answers
        sent = {}
        for place, parts in answers.items():
            if place == 0:
                down.append((_state(parties[0]), list(map(bytes, parts))))
            if (following := parties[place].receive(parts)) is not None:
                sent[place] = following

    def altered(parts: list[bytes]) -> list[bytes]:
        how, at = mutator.random.randrange(6), mutator.random.randrange(max(len(parts), 1))
        if how == 0:
            return parts[:at]
        if how == 1:
            return [*parts, mutator.random.randbytes(32)]
        if how == 2:
            return parts[::-1]
        return [mutator.frame(part) if k == at else part for k, part in enumerate(parts)]

    def once() -> None:
        if mutator.random.random() < 0.5:
            before, place, stage, parts = mutator.random.choice(up)
            if mutator.random.random() < 0.2:
                stage = mutator.random.choice(list(Stage))
            copy.deepcopy(before).receive(place, header, stage, altered(parts))
        else:
            state, parts = mutator.random.choice(down)
            party = DroppableParty.__new__(DroppableParty)
            vars(party).update({k: dict(v) if isinstance(v, dict) else v for k, v in state.items()})
            party.receive(altered(parts))

    return once


def _state(party: DroppableParty) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(party).items()}

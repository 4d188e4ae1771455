"""The Federated world: institutions that don't trust each other; only sums are ever opened.

⊕ is a secure sum, handed in as an engine. This module turns the contract of `World` into rounds with an address that is
never used twice: trajectory, step, tensor, attempt and parameter hash.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm.errors import RoundRefused
from lpm.privacy.commitments import leaf_hash
from lpm.privacy.secure_sum import Flags, Round, SecureSum
from lpm.worlds.round_log import RoundLog
from lpm.worlds.transcript import Witness
from lpm.worlds.world import Disclosure, Number, Spread

__all__ = ["FederatedWorld", "Opened"]


@dataclass
class Opened:
    """The openings of one tensor in one task, for the ledger.

    Attributes:
        first: lowest step.
        last: highest step.
        rounds: how many sums were opened.
        words: how many numbers they held together.
    """

    first: int
    last: int
    rounds: int = 0
    words: int = 0


class FederatedWorld:
    """One institution's view of the federation.

    Args:
        engine: the secure sum of the running session.
        disclosure: rule for group sums, or None in tests that say so.
        guard: called before every contribution; it stops the party by raising `LpmError`.

    Attributes:
        log: of the sums of the task under way, against which a repeated step is held.
        openings: of whose sums were opened to the coordinator, over all sessions of a run.
        question: 32 bytes that stand for what the task asks, by which `openings` knows it again.
        witness: hears of every commitment and of every sum that is opened to the parties.
        committed: leaves of the task's tree of commitments, one for each contribution.
    """

    name = "federated"
    one_owner = False

    def __init__(
        self, engine: SecureSum, disclosure: Disclosure | None, guard: Callable[[], None] = lambda: None
    ) -> None:
        self.engine = engine
        self.parties = engine.parties
        self.disclosure = disclosure
        self.rescaled: list[tuple[int, str, int]] = []
        self.log: RoundLog | None = None
        self.openings: RoundLog | None = None
        self.witness: Witness | None = None
        self.question = b"\0" * 32
        self.opened: dict[tuple[str, str], Opened] = {}
        self.committed: list[bytes] = []
        self.salt = secrets.token_bytes(32)
        self._guard = guard
        self._trajectory = 0
        self._task = b"\0" * 32
        self._run = 0
        self._attempts: dict[tuple[int, str, int], int] = {}
        self._sums = hashlib.blake2b(digest_size=32)

    def take(self, trajectory: int, task: bytes) -> None:
        """From here on, rounds belong to a task of the session: its number and its hash, parameters included."""
        self._trajectory, self._task, self._run = trajectory, task, 0
        self.opened, self.committed = {}, []
        self._sums = hashlib.blake2b(digest_size=32)

    @property
    def sums(self) -> str:
        """Hex digest of the sums that were opened to the parties in this task: the same at each of them."""
        return self._sums.hexdigest()

    def _commit(self, round: Round, words: NDArray[np.int64]) -> None:
        """Bind this party to what it contributes, before it does: opened only in an audit, with the salt."""
        address = round.context()
        bound = hashlib.blake2b(address + words.tobytes(), key=self.salt, digest_size=32).digest()
        self.committed.append(leaf_hash(bound))
        if self.witness is not None:
            self.witness.committed(round, self.committed[-1])

    def begin(self, trajectory: int, parameters: bytes) -> None:
        """See `World.begin`; the task's hash, which the coordinator knows too, stands for the parameters.

        A task may run several trajectories; their rounds differ in the tensor's name.
        """
        self._run += 1

    def _round(self, tensor: str, step: int) -> Round:
        address = (self._trajectory, tensor, step)
        attempt = self._attempts.get(address, 0)
        self._attempts[address] = attempt + 1
        return Round(trajectory=self._trajectory, step=step, tensor=tensor, attempt=attempt, parameters=self._task)

    def _note(self, tensor: str, to: str, step: int, words: int) -> None:
        seen = self.opened.setdefault((tensor, to), Opened(step, step))
        seen.first, seen.last = min(seen.first, step), max(seen.last, step)
        seen.rounds, seen.words = seen.rounds + 1, seen.words + words

    def add(
        self, tensor: str, step: int, words: NDArray[np.int64], *, digest: bytes, rescale: bool
    ) -> NDArray[np.int64]:
        """See `World.add`."""
        self._guard()
        if rescale:
            self.rescaled.append((self._trajectory, tensor, step))
        round = self._round(f"{tensor}/{self._run}", step)
        if step > -3:  # below, parties agree on how to go on: nobody's people are in it
            self._commit(round, words)
        try:
            total = self.engine.open_to_parties(round, words, Flags(digest=digest, rescale=rescale, abort=""))
        except RoundRefused as refusal:
            if refusal.rescale and self.witness is not None:
                self.witness.refused(round)
            raise
        self._sums.update(round.context() + total.tobytes())
        if self.witness is not None:
            self.witness.opened(round, total)
        self._note(tensor, "parties", step, words.size)
        if self.log is not None:
            self.log.compare(round, words, total)
        return total

    def whole(self, values: NDArray[Number]) -> NDArray[Number]:
        """See `World.whole`."""
        return values

    def gathered(self, state: Mapping[str, Any], spread: Spread) -> Mapping[str, Any]:
        """See `World.gathered`."""
        return state

    def parted(self, found: Mapping[str, Any] | None, spread: Spread) -> Mapping[str, Any] | None:
        """See `World.parted`."""
        return found

    def open_if_enough(
        self, tensor: str, words: NDArray[np.int64], people: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Open cells to the parties, those alone that enough people and institutions stand behind.

        Args:
            tensor: as the manifest lists it.
            words: this party's contribution [cells].
            people: how many of its agents are in each cell [cells].

        Returns:
            The totals, 0 where a cell is withheld, and which cells are opened, each [cells].
        """
        self._guard()
        rule = Disclosure(0, 0) if self.disclosure is None else self.disclosure
        round = self._round(tensor, -2)
        contribution = np.concatenate((words, people))
        self._commit(round, contribution)
        flags = Flags(digest=b"", rescale=False, abort="")
        totals, told = self.engine.open_if_enough(
            round, words[:, None], people, flags, fewest_people=rule.people, fewest_institutions=rule.institutions
        )
        opened = np.concatenate((totals[:, 0], told.astype(np.int64)))
        self._sums.update(round.context() + opened.tobytes())
        if self.witness is not None:
            self.witness.opened(round, opened)
        self._note(tensor, "parties", -2, int(told.sum()))
        if self.log is not None:
            self.log.compare(round, contribution, opened)
        return totals[:, 0], told

    def tell_coordinator(self, tensor: str, words: NDArray[np.int64]) -> None:
        """Contribute to a sum that the coordinator alone opens (losses, gradients, listed outputs)."""
        self._guard()
        round = self._round(tensor, -2)
        self._commit(round, words)

        def consent(places: tuple[int, ...]) -> None:
            if self.openings is not None:
                # One question has one answer, however the task that asks it is numbered.
                self.openings.require_same_parties(Round(0, -2, tensor, 0, self.question), places)

        self.engine.open_to_coordinator(round, words, Flags(digest=b"", rescale=False, abort=""), consent)
        self._note(tensor, "coordinator", -2, words.size)

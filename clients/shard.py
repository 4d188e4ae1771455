"""One institution's people and series, and what it does with each task of a session.

A task runs the party's own model on its own shard; only sums pass through the federated world. Mid-trajectory
checkpoints are sealed under the party's storage key, and a repeated trajectory goes on from the last step that *all*
parties hold. Sums that are opened a second time on the way are held against the log of the first. An answer is kept
under its question (θ to 2^-20, the trajectory, the people and series), so that the same question has one answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.checkpoint import CheckpointStore
from lpm.errors import CheckpointError, PolicyRefused, SessionRefused
from lpm.evidence import Evidence
from lpm.observation import Observation
from lpm.privacy.dp import SecretStream
from lpm.privacy.withheld import WITHHELD, tensor_of
from lpm.protocol.messages import Release, Task
from lpm.scenario import Scenario
from lpm.simulation import Keeper
from lpm.source import folder_hash
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.round_log import RoundLog

__all__ = ["ANSWERED_STEP", "Shard"]

ANSWERED_STEP = -4
"""Step of the round in which the parties say whether they keep an answer."""

_log = logging.getLogger(__name__)


class Shard:
    """What a party holds.

    Args:
        scenario: the public part, from the institution's own installation.
        institutions: whose people and series these are.
        seed: 64 bits; the party's own secret, or a public one in tests.
        folder: the party's own part of the run.
        key: seals its checkpoints.
        data: folder of the party's series; None: as the scenario ships.
        every: steps between two checkpoints of a trajectory; 0 for none.
        left_out: ids of people who want no part in it; they are removed before anything else.
    """

    def __init__(
        self,
        scenario: Scenario,
        institutions: Sequence[str],
        *,
        seed: int,
        folder: Path,
        key: bytes,
        data: Path | None,
        every: int,
        calibrates: bool,
        left_out: Sequence[int] = (),
    ) -> None:
        self.scenario, self.seed, self.folder, self.every = scenario, seed, folder, every
        self._key = key
        self._openings = RoundLog(folder / "openings.log", key)
        model = scenario.build(institutions, seed=0)
        if left_out:
            model = model.without(np.asarray(left_out, dtype=np.uint64))
        self.observations: list[Observation] = (
            [scenario.observation(name, data) for name in institutions] if calibrates else []
        )
        self.evidence = Evidence(
            model,
            self.observations,
            parameters=scenario.parameters,
            steps=scenario.steps,
            held_out=scenario.held_out,
            seed=seed,
            step=scenario.gradient.step,
            replicates=scenario.calibration.replicates,
        )

        self.mechanism = scenario.mechanism
        self._digest = self._bind(institutions, left_out)

    def _bind(self, institutions: Sequence[str], left_out: Sequence[int]) -> bytes:
        """What an answer depends on besides the question; keyed, so that it tells nothing."""
        digest = hashlib.blake2b(key=self._key, digest_size=32)
        scenario = self.scenario
        plain = [scenario.hash, folder_hash(scenario.folder), list(institutions), self.seed, sorted(left_out)]
        digest.update(json.dumps(plain).encode())
        for observation in self.observations:
            for series in observation.series:
                values = np.ascontiguousarray(series.values, dtype=np.float64)
                digest.update(f"{observation.institution}/{series.name}/{values.size}".encode() + values.tobytes())
        return digest.digest()

    def question(self, task: Task) -> str:
        """What stands for a task's answer: the same for the same question to the same people, in any session.

        Args:
            task: of the coordinator.

        Returns:
            40 hex digits, which tell nothing without the party's storage key.
        """
        options = {name: value for name, value in task.options.items() if name in ("replicates", "plain")}
        theta = np.rint(np.asarray(task.theta) * 2.0**20).astype(np.int64)
        head = [task.kind, task.trajectory, task.gradient, options, list(theta.shape)]
        content = json.dumps(head, sort_keys=True).encode() + theta.tobytes()
        return hashlib.blake2b(self._digest + content, key=self._key, digest_size=20).hexdigest()

    def perform(self, task: Task, world: FederatedWorld, *, consents: bool) -> Release | None:
        """Do a task; what it opens goes through the world.

        Args:
            task: of the coordinator.
            world: this session's ⊕.
            consents: whether the bands of this party's own fit may be released.

        Returns:
            the released bands, after a forecast by the posterior.
        """
        world.take(task.trajectory, task.digest)
        world.openings = self._openings
        # A loss is the same loss whichever way its gradient is asked for.
        world.question = hashlib.sha256(self.question(replace(task, gradient="none")).encode()).digest()
        # The same answer has the same commitments, so that a replay before an auditor meets the recorded root.
        salted = b"lpm commitments 1" + self.question(task).encode()
        world.salt = hashlib.blake2b(salted, key=self._key, digest_size=32).digest()
        theta = np.asarray(task.theta)
        if theta.shape[1] != len(self.scenario.parameters) or not theta.shape[0]:
            raise SessionRefused(
                f"The coordinator sent {theta.shape[0]} draws of {theta.shape[1]} parameters: the scenario has "
                f"{len(self.scenario.parameters)}."
            )
        for k, parameter in enumerate(self.scenario.parameters):
            for value in theta[:, k]:
                parameter.require(float(value))
        answers = self._answers(task)
        kept = answers.latest()
        shows = task.kind == "predict" and task.options.get("label") == "posterior"
        here = np.array([int(kept is not None)])
        everywhere = world.add("answered", ANSWERED_STEP, here, digest=b"\0" * 32, rescale=False)
        if kept is not None and not shows and int(everywhere[0]) == world.parties:
            self._tell(world, kept.content)
            return None
        keeper = Keeper()
        if task.kind == "evaluate" or (task.kind == "simulate" and task.options.get("plain")):
            keeper = self._keeper(task, world)
        # From here on, each opened sum is held against the one of an earlier session that was cut short.
        world.log = RoundLog(self._store(task).folder / "rounds.log", self._key)
        words, release = self._answer(task, world, theta, keeper, consents=consents)
        world.log = None
        if kept is None:
            answers.save(words, 0)  # before it is told: what was told once is known to be
        elif any(not np.array_equal(kept.content[name], part) for name, part in words.items()):
            raise PolicyRefused(
                "The same question (to 2^-20 in each parameter) has been answered before, and the answer would be"
                " another now: it is not given a second time."
            )
        self._tell(world, words)
        self._forget(task)
        return release

    def keeps(self, task: Task) -> bool:
        """Whether the answer to a task's question is kept, so that it may be given again without a simulation."""
        return self._answers(task).latest() is not None

    def _answers(self, task: Task) -> CheckpointStore:
        name = self.question(task)
        return CheckpointStore(self.folder / "answers" / name, self._key, name)

    @staticmethod
    def _tell(world: FederatedWorld, words: Mapping[str, NDArray[np.int64]]) -> None:
        for tensor, part in words.items():
            world.tell_coordinator(tensor, part)

    def _answer(
        self, task: Task, world: FederatedWorld, theta: NDArray[np.float64], keeper: Keeper, *, consents: bool
    ) -> tuple[dict[str, NDArray[np.int64]], Release | None]:
        """What is to be opened to the coordinator, this party's part of it in words, and what the party releases."""
        bits = self.scenario.federation.fraction_bits
        if task.kind == "simulate":
            if task.options.get("plain"):
                words = self.evidence.simulate(theta, task.trajectory, world=world, keeper=keeper)
            else:
                words = self.evidence.words(theta, task.trajectory, world=world)
            words = self._told(words, world)
            if self.mechanism.covers("outputs"):
                rows = ring.decode(words).reshape(-1, words.shape[-1]).T  # one for each draw
                return {"outputs": self._noisy(task, "outputs", rows, ring.FRACTION_BITS).T.reshape(-1)}, None
            return {"outputs": words.reshape(-1)}, None
        if task.kind == "evaluate":
            loss, gradient = self.evidence.evaluate(
                theta,
                task.trajectory,
                estimator=task.gradient,
                world=world,
                keeper=keeper,
                replicates=task.options.get("replicates"),
            )
            if self.mechanism.covers("loss"):
                scaled = gradient * self.scenario.units
                noisy = {
                    "loss": self._noisy(task, "loss", loss[:, None], bits).reshape(-1),
                    "gradient": self._noisy(task, "gradient", scaled, bits).reshape(-1),
                }
                return noisy, None
            return {"loss": _finite_words(loss, bits), "gradient": _finite_words(gradient, bits).reshape(-1)}, None
        forecast = self.evidence.forecast(theta, task.trajectory, world=world)
        shows = consents and task.options.get("label") == "posterior"
        if self.mechanism.covers("loss"):
            forecast.score[:] = 0.0  # a score is a loss that no noise was made for
        return {"score": _finite_words(forecast.score, bits)}, self._release(forecast.bands) if shows else None

    def _told(self, words: NDArray[np.int64], world: FederatedWorld) -> NDArray[np.int64]:
        """A part of the outputs at their resolution; what is told above a threshold only comes from the first party."""
        starts = np.arange(0, len(words), self.scenario.federation.resolution_days)
        told = np.add.reduceat(words, starts, axis=0)
        model = self.evidence.model
        for name in self.scenario.thresholds:
            place = list(self.scenario.outputs).index(name)
            # Somebody who is counted each day is one person: of several days, the day with most of them.
            people = model.agents_behind(np.maximum.reduceat(words[:, place], starts, axis=0))
            totals, enough = world.open_if_enough(tensor_of(name), told[:, place].reshape(-1), people.reshape(-1))
            opened = np.where(enough, totals, WITHHELD).reshape(people.shape)
            told[:, place] = opened if world.engine.me == 0 else 0
        return told

    def _noisy(self, task: Task, tensor: str, rows: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
        stream = SecretStream(self._key, f"{self.question(task)}/{tensor}".encode())
        return self.mechanism.protect(tensor, rows, stream, bits)

    def _release(self, bands: dict[tuple[str, str], NDArray[np.float64]]) -> Release:
        tables, about = {}, {}
        for observation in self.observations:
            for series in observation.series:
                name = f"{observation.institution}/{series.name}"
                tables[name] = np.vstack(
                    [
                        np.asarray(series.values, dtype=np.float64)[: self.scenario.steps],
                        bands[observation.institution, series.name],
                    ]
                )
                about[name] = {"institution": observation.institution, "series": series.name}
        return Release("fit", tables, about)

    # ---- checkpoints of one trajectory

    def _store(self, task: Task) -> CheckpointStore:
        name = task.digest.hex()[:24]
        return CheckpointStore(self.folder / "checkpoint" / name, self._key, name)

    def _keeper(self, task: Task, world: FederatedWorld) -> Keeper:
        if not self.every:
            return Keeper()
        store = self._store(task)
        held = np.zeros(self.scenario.steps + 1, dtype=np.int64)
        whole = {}
        for step in store.steps():
            try:
                whole[step] = store.load(step).content
            except CheckpointError as problem:
                _log.warning("%s It is not used.", problem.message)
        held[list(whole)] = 1
        everywhere = world.add("held", -3, held, digest=b"\0" * 32, rescale=False) == world.parties
        found = None
        if everywhere.any():
            step = int(np.flatnonzero(everywhere).max())
            found = whole[step]
            _log.info("Trajectory %d goes on from step %d.", task.trajectory, step)
        return Keeper(self.every, lambda state: store.save(state, state["step"]), found)

    def _forget(self, task: Task) -> None:
        folder = self._store(task).folder
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def _finite_words(values: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Words for the coordinator; a value that is not finite becomes the largest word's tenth, a mark.

    Its sum over parties can't be mistaken for a real loss, and the calibration drops the draw.
    """
    limit = 2.0 ** (58 - bits)
    return ring.encode(np.clip(np.nan_to_num(values, nan=limit, posinf=limit, neginf=-limit), -limit, limit), bits)

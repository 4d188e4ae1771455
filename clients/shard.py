"""One institution's people and series, and what it does with each task of a session.

A task runs the party's own model on its own shard; only sums pass through the federated world. Mid-trajectory
checkpoints are sealed under the party's storage key, and a repeated trajectory goes on from the last step that *all*
parties hold. Sums that are opened a second time on the way are held against the log of the first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.checkpoint import CheckpointStore
from lpm.errors import CheckpointError, SessionRefused
from lpm.evidence import Evidence
from lpm.observation import Observation
from lpm.protocol.messages import Release, Task
from lpm.scenario import Scenario
from lpm.simulation import Keeper
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.round_log import RoundLog

__all__ = ["Shard"]

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
    ) -> None:
        self.scenario, self.seed, self.folder, self.every = scenario, seed, folder, every
        self._key = key
        model = scenario.build(institutions, seed=0)
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
        theta = np.asarray(task.theta)
        if theta.shape[1] != len(self.scenario.parameters) or not theta.shape[0]:
            raise SessionRefused(
                f"The coordinator sent {theta.shape[0]} draws of {theta.shape[1]} parameters: the scenario has "
                f"{len(self.scenario.parameters)}."
            )
        for k, parameter in enumerate(self.scenario.parameters):
            for value in theta[:, k]:
                parameter.require(float(value))
        keeper = Keeper()
        if task.kind == "evaluate" or (task.kind == "simulate" and task.options.get("plain")):
            keeper = self._keeper(task, world)
        # From here on, each opened sum is held against the one of an earlier session that was cut short.
        world.log = RoundLog(self._store(task).folder / "rounds.log", self._key)
        release = self._answer(task, world, theta, keeper, consents=consents)
        world.log = None
        self._forget(task)
        return release

    def _answer(
        self, task: Task, world: FederatedWorld, theta: NDArray[np.float64], keeper: Keeper, *, consents: bool
    ) -> Release | None:
        if task.kind == "simulate":
            if task.options.get("plain"):
                words = self.evidence.simulate(theta, task.trajectory, world=world, keeper=keeper)
            else:
                words = self.evidence.words(theta, task.trajectory, world=world)
            world.tell_coordinator("outputs", words.reshape(-1))
        elif task.kind == "evaluate":
            loss, gradient = self.evidence.evaluate(
                theta,
                task.trajectory,
                estimator=task.gradient,
                world=world,
                keeper=keeper,
                replicates=task.options.get("replicates"),
            )
            bits = self.scenario.federation.fraction_bits
            world.tell_coordinator("loss", _finite_words(loss, bits))
            world.tell_coordinator("gradient", _finite_words(gradient, bits).reshape(-1))
        elif task.kind == "predict":
            forecast = self.evidence.forecast(theta, task.trajectory, world=world)
            world.tell_coordinator("score", _finite_words(forecast.score, self.scenario.federation.fraction_bits))
            if consents and task.options.get("label") == "posterior":
                return self._release(forecast.bands)
        return None

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

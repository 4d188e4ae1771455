"""The coordinator's side of a calibration: it draws θ, receives summed losses and gradients, and steps the posterior.

It is a backend of `lpm.calibration.study` whose every answer is a sum over the parties, opened to the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.privacy.withheld import WITHHELD, decode_told
from lpm.protocol.messages import Release, Task
from lpm.scenario import Scenario
from server.relay import CoordinatorSession

__all__ = ["FederatedBackend"]

_log = logging.getLogger(__name__)


class FederatedBackend:
    """Evaluates by asking the parties of a session.

    Args:
        session: formed.
        scenario: its public part.
        on_partial: told of each sum that was opened without somebody.
    """

    def __init__(
        self,
        session: CoordinatorSession,
        scenario: Scenario,
        on_partial: Callable[[dict[str, Any]], object] = lambda partial: None,
    ) -> None:
        self._on_partial = on_partial
        self.session, self.scenario = session, scenario
        self.releases: dict[str, Release] = {}
        self.noise: dict[str, int] = {}
        self._bits = scenario.federation.fraction_bits

    def _ask(
        self, kind: str, theta: NDArray[np.float64], trajectory: int, gradient: str = "none", **options: Any
    ) -> Task:
        task = Task(kind, trajectory, theta, gradient, None, options)
        for multiplier, count in self.scenario.mechanism.releases(kind).items():
            self.noise[multiplier] = self.noise.get(multiplier, 0) + count
        self.session.broadcast(task)
        return task

    def evaluate(
        self, theta: NDArray[np.float64], trajectory: int, estimator: str, *, replicates: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `study.Backend`."""
        task = self._ask("evaluate", theta, trajectory, estimator, estimator=estimator, replicates=replicates)
        loss = self._decode_partial("loss", task)
        gradient = self._decode_partial("gradient", task).reshape(theta.shape)
        self.session.releases(task)
        if self.scenario.mechanism.covers("gradient"):
            gradient = gradient / self.scenario.units
        return loss, gradient

    def _decode_partial(self, tensor: str, task: Task) -> NDArray[np.float64]:
        """A sum that may be the survivors' alone, which then stands for all.

        It is used rather than thrown away because it can't be asked for again: the difference of two sums of different
        parties would be somebody's own. The session ends before the next simulation, which needs everybody.
        """
        opened = self.session.receive_from(tensor, task)
        here, roster = len(opened.parties), len(self.session.parties)
        if here < roster:
            missing = ", ".join(party for party in self.session.parties if party not in opened.parties)
            _log.warning("The %s of trajectory %d is without %s: scaled up.", tensor, task.trajectory, missing)
            self._on_partial({"tensor": tensor, "trajectory": task.trajectory, "without": missing})
        return self._decode(opened.words) * (roster / here)

    def _decode(self, words: NDArray[np.int64]) -> NDArray[np.float64]:
        """Numbers of an opened sum; beyond 2^57 words some party marked its own as not finite."""
        values = ring.decode(words, self._bits)
        return np.where(np.abs(values) > 2.0 ** (57 - self._bits), np.nan, values)

    def forecast(self, theta: NDArray[np.float64], trajectory: int, label: str) -> NDArray[np.float64]:
        """See `study.Backend`; keeps what the parties release."""
        task = self._ask("predict", theta, trajectory, label=label)
        score = self._decode(self.session.receive("score", task))
        released = self.session.releases(task)
        if label == "posterior":
            self.releases = dict(released)
        return score

    def outputs(self, theta: NDArray[np.float64], trajectory: int) -> NDArray[np.float64]:
        """See `study.Backend`."""
        return decode_told(self.words(theta, trajectory))

    def words(self, theta: NDArray[np.float64], trajectory: int, *, plain: bool = False) -> NDArray[np.int64]:
        """Exact public outputs [T, O, K].

        Args:
            theta: [K, P].
            trajectory: number of the run.
            plain: with each party's seed as it is, as `lpm simulate` uses it; else one derived for the trajectory.

        Returns:
            The words; `WITHHELD` where too few people or institutions stand behind one.
        """
        task = self._ask("simulate", theta, trajectory, plain=plain)
        words = self.session.receive("outputs", task)
        self.session.releases(task)
        length, steps = self.scenario.federation.resolution_days, self.scenario.steps
        blocks = words.reshape(-1, len(self.scenario.outputs), theta.shape[0])
        if length == 1:
            return blocks
        # Of days that were opened as one sum nothing is known but the sum: each gets an equal part, the last the rest.
        days = np.minimum(length, steps - length * np.arange(len(blocks)))
        daily = np.repeat(blocks // days[:, None, None], days, axis=0)
        daily[np.cumsum(days) - 1] += blocks % days[:, None, None]
        return np.where(np.repeat(blocks == WITHHELD, days, axis=0), WITHHELD, daily)

"""The coordinator's side of a calibration: it draws θ, receives summed losses and gradients, and steps the posterior.

It is a backend of `lpm.calibration.study` whose every answer is a sum over the parties, opened to the coordinator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm import ring
from lpm.protocol.messages import Release, Task
from lpm.scenario import Scenario
from server.relay import CoordinatorSession

__all__ = ["FederatedBackend"]


class FederatedBackend:
    """Evaluates by asking the parties of a session.

    Args:
        session: formed.
        scenario: its public part.
    """

    def __init__(self, session: CoordinatorSession, scenario: Scenario) -> None:
        self.session, self.scenario = session, scenario
        self.releases: dict[str, Release] = {}
        self._bits = scenario.federation.fraction_bits

    def _ask(
        self, kind: str, theta: NDArray[np.float64], trajectory: int, gradient: str = "none", **options: Any
    ) -> Task:
        task = Task(kind, trajectory, theta, gradient, None, options)
        self.session.broadcast(task)
        return task

    def evaluate(
        self, theta: NDArray[np.float64], trajectory: int, estimator: str, *, replicates: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `study.Backend`."""
        task = self._ask("evaluate", theta, trajectory, estimator, estimator=estimator, replicates=replicates)
        loss = self._decode(self.session.receive("loss", task))
        gradient = self._decode(self.session.receive("gradient", task)).reshape(theta.shape)
        self.session.releases(task)
        return loss, gradient

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
        return ring.decode(self.words(theta, trajectory))

    def words(self, theta: NDArray[np.float64], trajectory: int, *, plain: bool = False) -> NDArray[np.int64]:
        """Exact public outputs [T, O, K].

        Args:
            theta: [K, P].
            trajectory: number of the run.
            plain: with each party's seed as it is, as `lpm simulate` uses it; else one derived for the trajectory.
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
        return daily

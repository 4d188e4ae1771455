"""What a shard's own series say about the parameters: its loss, its share of the gradient, its forecasts.

A shard is all there is in the Local world and one party in a federation; either way losses and gradients of shards add
up, and nothing else is needed to calibrate. With x the shard's outputs, its share is (∂ℓ/∂x)·ẋ + ∂ℓ/∂θ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm import ring, simulation
from lpm.errors import InputError
from lpm.estimators import Evaluation, evaluate
from lpm.flame.model import Model
from lpm.observation import Observation
from lpm.parameters import Parameter
from lpm.rng import derive
from lpm.simulation import Keeper
from lpm.worlds.world import World

__all__ = ["QUANTILES", "Evidence", "Forecast"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of released bands: the 50 % and the 90 % band, and the median."""

GROUPS = 8
"""Draws of a forecast share their random numbers within a group only."""

LANES = 64
"""Parameter vectors of a forecast, or of an iteration's replicates, that run at once: what bounds their memory."""


_MOST = 20.0
"""Nats that the jackknife may take off one institution's loss; its estimate of the bias is believed less and less as it
nears that. Where simulations are all noise, the whole estimate would make a gain of the noise."""


def debiased(whole: Tensor, without: Sequence[Tensor]) -> Tensor:
    """A loss of the mean of R noisy runs, less the bias that their noise gives it.

    The expected loss of the mean x̄ is off by some c/R. The jackknife estimates the bias b from what the loss is with
    each run left out; b / (1 + |b|/20) is taken off.

    Args:
        whole: loss of the mean of all runs [K].
        without: loss of the mean with each run left out, R of them; none if there is one run, which can't be corrected.

    Source: Quenouille (1956), Biometrika 43:353.
    """
    if not without:
        return whole
    bias = (len(without) - 1) * (torch.stack(list(without)).mean(dim=0) - whole)
    return whole - bias / (1.0 + bias.abs() / _MOST)


@dataclass(frozen=True, eq=False)
class Forecast:
    """A shard's forecasts against its own series; private, but for `score` (added up) and what it consents to release.

    Attributes:
        score: log score of the held-out days of the forecast, of persistence, and the number of observations [3].
        bands: (institution, series) → quantiles [5, T].
    """

    score: NDArray[np.float64]
    bands: dict[tuple[str, str], NDArray[np.float64]]


class Evidence:
    """One shard's model and series.

    Args:
        model: the shard's people.
        observations: of the shard's institutions.
        parameters: all that are calibrated, in the order of θ's columns: the model's, and those of the observations.
        steps: T.
        held_out: last steps that are scored but not fitted.
        seed: of the shard; each trajectory uses a seed derived from it.
        step: of finite differences, relative.
        replicates: simulations whose mean is compared with the series, for each draw.
        executor: see `simulation.choose_executor`.

    Attributes:
        ran: what ran the contagions, of gradients if there were any; empty before.

    Raises:
        InputError: if a series compares with an output that the model doesn't record.
    """

    def __init__(
        self,
        model: Model,
        observations: Sequence[Observation],
        *,
        parameters: Sequence[Parameter],
        steps: int,
        held_out: int,
        seed: int,
        step: float = 0.02,
        replicates: int = 1,
        executor: str = "auto",
    ) -> None:
        self.model, self.observations, self.seed = model, tuple(observations), seed
        self.steps, self.held_out, self.step, self.replicates = steps, held_out, step, replicates
        self.executor, self.ran = executor, ""
        self.names = tuple(parameter.name for parameter in parameters)
        self.columns = [self.names.index(parameter.name) for parameter in model.parameters]
        recorded = list(model.recorded)
        for observation in self.observations:
            for series in observation.series:
                if series.output not in recorded:
                    raise InputError(
                        f"The series {series.name} compares with {series.output}, which the model does not record."
                    )
        self.used = sorted({recorded.index(series.output) for each in self.observations for series in each.series})
        self.fitted = slice(0, steps - held_out)

    def _run(
        self,
        theta: NDArray[np.float64],
        trajectory: int,
        world: World | None,
        estimator: str,
        replicates: Sequence[int] = (0,),
        **more: Any,
    ) -> list[Evaluation]:
        """Some replicates of each draw, in one run."""
        seeds = [derive(self.seed, "trajectory", trajectory, replicate) for replicate in replicates]
        found = evaluate(
            self.model,
            np.tile(theta[:, self.columns], (len(seeds), 1)),
            estimator=estimator,
            steps=self.steps,
            seed=seeds[0] if len(seeds) == 1 else [seed for seed in seeds for _ in theta],
            world=world,
            step=self.step,
            trajectory=trajectory,
            executor=self.executor,
            **more,
        )
        self.ran = found.executor
        if len(seeds) == 1:
            return [found]
        # [T, O, R · K] → R times [T, O, K], and likewise the derivatives.
        words = np.split(found.words, len(seeds), axis=2)
        slopes = [None] * len(seeds) if found.derivative is None else np.split(found.derivative, len(seeds), axis=2)
        return [replace(found, words=part, derivative=slope) for part, slope in zip(words, slopes, strict=True)]

    def _replicated(
        self,
        theta: NDArray[np.float64],
        trajectory: int,
        world: World | None,
        estimator: str,
        count: int,
        keeper: Keeper | None,
    ) -> list[Evaluation]:
        """The run of each replicate; all in one, with one round a day, where lanes may have seeds of their own."""
        lanes = count * len(theta) * (1 + 2 * len(self.columns) if estimator == "fd" else 1)
        # The same at every party, whatever its shard.
        if estimator in ("fd", "none") and lanes <= LANES and simulation.lanes_apart(self.model, self.executor):
            return self._run(theta, trajectory, world, estimator, range(count), keeper=keeper)
        return [
            self._run(theta, trajectory, world, estimator, [k], keeper=keeper if k == 0 else None)[0]
            for k in range(count)
        ]

    def _series(self, outputs: Tensor, theta: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        recorded = list(self.model.recorded)
        # [T, O, K] → name → [K, T]
        by_name = {recorded[k]: outputs[:, position].T for position, k in enumerate(self.used)}
        return by_name, {name: theta[:, k] for k, name in enumerate(self.names)}

    def _loss(
        self, subsets: Sequence[NDArray[np.float64]], theta: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], NDArray[np.float64]]:
        """Loss [K], its derivatives by the used outputs of each subset [T, O, K] and, directly, by θ [K, P].

        Args:
            subsets: means of all replicates and, from two on, of all but one [T, O, K].
            theta: [K, P].
        """
        means = [torch.tensor(each[:, self.used], dtype=torch.float64, requires_grad=True) for each in subsets]
        t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        loss = torch.zeros(theta.shape[0], dtype=torch.float64)
        for observation in self.observations:
            # Institution by institution, so that the sum is the same whoever holds which.
            whole, *without = (-observation.log_likelihood(*self._series(x, t), self.fitted) for x in means)
            loss = loss + debiased(whole, without)
        *by_x, by_t = torch.autograd.grad(loss.sum(), (*means, t), allow_unused=True)
        return (
            loss.detach().numpy(),
            [np.zeros(x.shape) if each is None else each.numpy() for x, each in zip(means, by_x, strict=True)],
            np.zeros(t.shape) if by_t is None else by_t.numpy(),
        )

    def evaluate(
        self,
        theta: NDArray[np.float64],
        trajectory: int,
        *,
        estimator: str,
        mode: str = "forward",
        world: World | None = None,
        keeper: Keeper | None = None,
        replicates: int | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The shard's negative log-likelihood and its share of the gradient.

        The likelihood compares the series with the mean of `replicates` simulations of each draw: with one alone, the
        noise of the simulation would count as misfit, and parameters whose simulations are less noisy would win. From
        two on, the jackknife takes off most of what is left of that (`debiased`).

        Args:
            theta: [K, P], in the order of `parameters`.
            trajectory: number of the run.
            estimator: "fd", "tangent", "alternates" or "none" (gradient 0).
            mode: "forward", or "reverse" (of one replicate).
            world: who adds up.
            keeper: checkpoints of the first replicate's trajectory, or of all where they are one run.
            replicates: fewer than the shard's own number, if given.

        Returns:
            loss [K] and gradient [K, P]; the whole population's are the sums over shards.

        Raises:
            InputError: for more replicates than the shard's.
        """
        gradient = np.zeros(theta.shape)
        if mode == "reverse":
            seen: dict[str, Any] = {}

            def cotangent(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
                seen["loss"], by_x, seen["direct"] = self._loss([outputs], theta)
                full = np.zeros((1, *outputs.shape))
                full[0][:, self.used] = by_x[0]
                return full

            (run,) = self._run(theta, trajectory, world, estimator, mode="reverse", cotangent=cotangent, keeper=keeper)
            assert run.gradient is not None
            gradient[:, self.columns] = run.gradient[0]
            return seen["loss"], gradient + seen["direct"]
        count = self.replicates if replicates is None else replicates
        if type(count) is not int or not 1 <= count <= self.replicates:
            raise InputError(f"{count!r} replicates were asked for: a whole number from 1 to {self.replicates}.")
        runs = self._replicated(theta, trajectory, world, estimator, count, keeper)
        members = [tuple(range(count))]
        if count > 1:
            members += [tuple(k for k in range(count) if k != left) for left in range(count)]
        loss, by_x, direct = self._loss([np.mean([runs[k].outputs for k in each], axis=0) for each in members], theta)
        gradient += direct
        for k, run in enumerate(runs):
            if run.derivative is not None:
                weight = sum(by / len(each) for by, each in zip(by_x, members, strict=True) if k in each)
                # In one order in memory, whichever runs it came from: so terms are added in one order.
                slope = np.ascontiguousarray(run.derivative[:, self.used])
                gradient[:, self.columns] += np.einsum("tok,tokp->kp", weight, slope)
        return loss, gradient

    def forecast(self, theta: NDArray[np.float64], trajectory: int, *, world: World | None = None) -> Forecast:
        """Forecasts of the shard's own series by many draws.

        Args:
            theta: [M, P].
            trajectory: number of the run.
            world: who adds up.
        """
        outputs = ring.decode(self._independent(theta, trajectory, world))
        by_name, values = self._series(torch.from_numpy(outputs[:, self.used]), torch.from_numpy(theta))
        score = np.zeros(3)
        bands: dict[tuple[str, str], NDArray[np.float64]] = {}
        generator = torch.Generator().manual_seed(derive(self.seed, "forecast", trajectory) >> 1)
        held = range(self.steps - self.held_out, self.steps)
        for observation in self.observations:
            for day in held:
                if not any(series.observed[day] for series in observation.series):
                    continue
                each = observation.log_likelihood(by_name, values, slice(day, day + 1))
                score[0] += float(torch.logsumexp(each, dim=0)) - np.log(theta.shape[0])
            if self.held_out:
                score[1] += observation.persistence_log_score(slice(held.start, held.stop))
            score[2] += sum(int(s.observed[held.start : held.stop].sum()) for s in observation.series)
            for name, drawn in observation.predict(by_name, values, generator).items():
                bands[observation.institution, name] = np.quantile(np.asarray(drawn), QUANTILES, axis=0)
        return Forecast(score, bands)

    def _independent(self, theta: NDArray[np.float64], trajectory: int, world: World | None) -> NDArray[np.int64]:
        """Exact outputs of many draws [T, O, M], in `GROUPS` groups with random numbers of their own.

        Draws that all shared their random numbers would hide how much of a forecast's uncertainty is chance.
        """
        words = np.empty((self.steps, len(self.model.recorded), theta.shape[0]), dtype=np.int64)
        groups = [np.arange(group, theta.shape[0], GROUPS) for group in range(min(GROUPS, theta.shape[0]))]
        # As many of them in one run, and in one round a day, as fit: the same at every party, whatever its shard.
        together = max(1, LANES // groups[0].size) if simulation.lanes_apart(self.model, self.executor) else 1
        for first in range(0, len(groups), together):
            those = range(first, min(first + together, len(groups)))
            lanes = np.concatenate([groups[group] for group in those])
            seeds = [derive(self.seed, "trajectory", trajectory, int(lane) % GROUPS) for lane in lanes]
            run = simulation.run(
                self.model,
                np.ascontiguousarray(theta[lanes][:, self.columns]),
                steps=self.steps,
                seed=seeds if len(those) > 1 else seeds[0],
                world=world,
                trajectory=trajectory,
                executor=self.executor,
            )
            self.ran = self.ran or run.executor
            words[..., lanes] = run.words
        return words

    def words(self, theta: NDArray[np.float64], trajectory: int, *, world: World | None = None) -> NDArray[np.int64]:
        """The public outputs of this shard for many draws, exact [T, O, M]."""
        return self._independent(theta, trajectory, world)[:, : len(self.model.outputs)]

    def simulate(
        self, theta: NDArray[np.float64], trajectory: int, *, world: World | None = None, keeper: Keeper | None = None
    ) -> NDArray[np.int64]:
        """The public outputs of this shard with its seed as it is, exact [T, O, K]: what `lpm simulate` shows."""
        run = evaluate(
            self.model,
            np.ascontiguousarray(theta[:, self.columns]),
            estimator="none",
            steps=self.steps,
            seed=self.seed,
            world=world,
            trajectory=trajectory,
            keeper=keeper,
            executor=self.executor,
        )
        self.ran = run.executor
        return run.words[:, : len(self.model.outputs)]

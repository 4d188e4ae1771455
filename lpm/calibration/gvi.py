"""Generalised variational inference: minimise E_q[loss] + weight · KL(q ‖ prior) over flow posteriors (paper, 5.1).

The loss and its gradient come from a callable: a simulator here, or sums opened by a federation. Reverse mode runs
through the flow, and the simulator's derivative enters as a constant. The affine part of the flow takes steps along the
natural gradient (`natural_gradient`), which have no schedule and need no tuning; what is not affine is then trained by
Adam on the reparameterised gradient, with the quadratic model of the first part as control variate.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.calibration.natural_gradient import GradientModel, model_of_gradients, natural_step
from lpm.calibration.posterior import Posterior
from lpm.calibration.priors import Prior
from lpm.errors import CheckpointError, InputError, LpmError
from lpm.parameters import Parameter

__all__ = ["Evaluate", "Fit", "GviState", "IterationRecord", "fit"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[NDArray[np.float64], int], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""(θ [K, P], iteration) → loss [K] (negative log-likelihoods), d loss/dθ [K, P]."""

_KL_DRAWS = 128
_SETTLED = 0.3
"""Posterior standard deviations (and logarithms of them) that still count as no movement."""
_FEWEST = 16
"""Iterations before convergence is believed."""
_PATIENCE = 5
"""Iterations in a row that must pass before a fit may stop early."""


@dataclass(frozen=True)
class IterationRecord:
    """What one iteration did.

    Args:
        iteration: from 0.
        loss: mean over the draws that were finite.
        kl: KL(q ‖ prior) before the step, in nats.
        objective: loss + weight · kl.
        dropped: draws whose loss or gradient was not finite.
        mean: [P], posterior means in the prior's standard-normal space after the step.
        sd: [P], posterior standard deviations there.
        step: share of the full natural-gradient step that was taken, from 0 to 1.
        noise: standard error of the mean that is due to noisy gradients, in posterior standard deviations.
        drift: how far the mean went since two thirds of the run, in posterior standard deviations; and
        widening: the largest change of a log standard deviation since then. Both ∞ in the first iterations.
    """

    iteration: int
    loss: float
    kl: float
    objective: float
    dropped: int
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    step: float
    noise: float
    drift: float
    widening: float

    @property
    def settled(self) -> bool:
        """Whether the posterior moves no more, and its mean is known well against its width."""
        return (
            self.iteration + 1 >= _FEWEST
            and self.step == 1.0
            and max(self.drift, self.widening, self.noise) <= _SETTLED
        )


@dataclass(frozen=True)
class GviState:
    """An exact checkpoint: a fit continued from it gives the same bits as one that was never stopped.

    Args:
        settings: what the fit was asked for; a resumed one must be asked for the same.
        iteration: iterations done.
        generator: state of the random generator.
        flow: the flow's weights.
        optimiser: Adam's state; empty while all is affine.
        average: sum of the flow's weights over the last iterations, and how many.
        u, gradient, when: every finite draw [M, P], its gradient [M, P] and iteration [M].
        records: one per iteration.
    """

    settings: dict[str, Any]
    iteration: int
    generator: Tensor
    flow: dict[str, Tensor]
    optimiser: dict[str, Any]
    average: dict[str, Any]
    u: Tensor
    gradient: Tensor
    when: Tensor
    records: tuple[IterationRecord, ...]

    def pack(self) -> dict[str, Any]:
        """Tensors and plain types only: `torch.save` it, and `torch.load(weights_only=True)` reads it."""
        packed = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        packed["records"] = [dataclasses.asdict(record) for record in self.records]
        return packed

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> GviState:
        """The state that `pack` packed.

        Raises:
            CheckpointError: if it is something else.
        """
        try:
            records = tuple(
                IterationRecord(**{**record, "mean": tuple(record["mean"]), "sd": tuple(record["sd"])})
                for record in packed["records"]
            )
            return cls(**{**packed, "records": records})
        except (KeyError, TypeError) as error:
            raise CheckpointError("This is no checkpoint of a variational fit.", "Calibrate anew.") from error


@dataclass(frozen=True)
class Fit:
    """A calibrated posterior and whether to believe it.

    Args:
        posterior: over the parameters.
        records: one per iteration.
        converged: whether the last iterations moved it no more.
        advice: what did not hold and what to try, empty when converged.
        state: from which the fit can be continued.
    """

    posterior: Posterior
    records: tuple[IterationRecord, ...]
    converged: bool
    advice: str
    state: GviState

    def headline(self) -> str:
        """One line: converged or not, and why not."""
        count = len(self.records)
        if self.converged:
            last = self.records[-1]
            return f"Converged in {count} iterations (mean known to {last.noise:.2f} posterior standard deviations)."
        return f"NOT CONVERGED after {count} iterations: {self.advice}"


def fit(
    parameters: Sequence[Parameter] | Prior,
    evaluate: Evaluate,
    *,
    iterations: int = 120,
    draws: int = 4,
    weight: float = 1.0,
    learning_rate: float = 0.05,
    seed: int = 0,
    flow: str = "affine",
    start: Posterior | None = None,
    stop_when_converged: bool = False,
    on_iteration: Callable[[IterationRecord, GviState], bool | None] | None = None,
    state: GviState | None = None,
) -> Fit:
    """Fit a posterior to a loss whose gradient is given, be it noisy.

    Args:
        parameters: P of them, with priors; or the prior itself.
        evaluate: (θ [K, P], iteration) → losses [K] and gradients [K, P]. It should use fresh random numbers in each
            iteration (else their error never averages out) and may share them between the draws of one.
        iterations: at most that many calls of `evaluate`.
        draws: K, of which half are the mirror image of the other half.
        weight: of the KL term; below 1 the data count more than once, above 1 less.
        learning_rate: Adam's, for what is not affine; the affine part needs none.
        seed: of the draws.
        flow: `affine` (full-rank Gaussian in the prior's standard-normal space) or `spline`, which bends it in the
            second half of the iterations.
        start: a posterior to begin from instead of the prior, for example one trained on public simulations.
        stop_when_converged: end once the convergence check has passed five times in a row.
        on_iteration: receives each record and a checkpoint; the fit ends early if it returns True.
        state: a checkpoint to go on from, to the same bits.

    Returns:
        the fit; one that has not converged is a result that says so, not an error.

    Raises:
        InputError: for impossible settings or arrays of the wrong shape.
        CheckpointError: if `state` belongs to other settings.
        LpmError: if no draw of an iteration has a finite loss and gradient.

    Source: Knoblauch, Jewson & Damoulas (2022); Khan & Rue (2023).
    """
    for name, value, least in (("iterations", iterations, 1), ("draws", draws, 1)):
        if value < least:
            raise InputError(f"The calibration's {name} is {value}: a whole number from {least}.")
    for name, number in (("weight", weight), ("learning_rate", learning_rate)):
        if not (math.isfinite(number) and number > 0):
            raise InputError(f"The calibration's {name} is {number}: a number above 0.")
    prior = parameters if isinstance(parameters, Prior) else Prior.from_parameters(parameters)
    run = _Run(prior, draws, weight, learning_rate, seed, flow, iterations)
    if state is not None:
        run.restore(state)
    elif start is not None:
        run.begin_from(start)
    checkpoint = run.checkpoint() if state is None else state

    def may_stop() -> bool:
        # Asked of the records, so that a fit that was interrupted just before its end is not made longer.
        return stop_when_converged and run.may_stop and _settled_in_a_row(run.records) >= _PATIENCE

    while run.iteration < iterations and not may_stop():
        record = run.iterate(evaluate)
        checkpoint = run.checkpoint()
        if on_iteration is not None and on_iteration(record, checkpoint):
            break
    advice = _advice(run.records, draws)
    return Fit(run.result(), tuple(run.records), not advice, advice, checkpoint)


@dataclass(frozen=True)
class _Moments:
    """Mean [P] and sd [P] of the posterior in u, and its divergence from the prior in nats."""

    mean: Tensor
    sd: Tensor
    kl: float


class _Run:
    """The mutable middle of a fit."""

    def __init__(
        self, prior: Prior, draws: int, weight: float, learning_rate: float, seed: int, flow: str, iterations: int
    ) -> None:
        self.prior, self.draws, self.weight, self.learning_rate = prior, draws, weight, learning_rate
        self.iterations = iterations
        self.posterior = Posterior(prior, flow, seed)
        # The affine part alone depends on no schedule, so such a fit may be continued beyond its first end.
        bent = bool(self.posterior.shape_parameters())
        self.affine_iterations: float = iterations // 2 if bent else math.inf
        self.settings: dict[str, Any] = {
            "names": list(prior.names),
            "priors": [f"{p.prior} in {p.bounds}" for p in prior.parameters],
            "draws": draws,
            "weight": weight,
            "learning_rate": learning_rate,
            "seed": seed,
            "flow": flow,
            "iterations": iterations if bent else 0,
            "affine_iterations": float(self.affine_iterations),
        }
        self.generator = torch.Generator().manual_seed(seed)
        self.iteration = 0
        empty = torch.zeros(0, len(prior), dtype=torch.float64)
        self.u, self.gradient, self.when = empty, empty.clone(), torch.zeros(0, dtype=torch.int64)
        self.records: list[IterationRecord] = []
        self.adam: torch.optim.Adam | None = None
        self.average: dict[str, Any] = {"count": 0, "sum": {}}

    @property
    def bending(self) -> bool:
        """Whether the iterations of the flow's other part have begun."""
        return self.iteration >= self.affine_iterations

    @property
    def may_stop(self) -> bool:
        """A flow with a schedule is left to end it."""
        return self.affine_iterations == math.inf

    def begin_from(self, start: Posterior) -> None:
        if start.names != self.posterior.names:
            raise InputError(
                f"The posterior to start from is over {', '.join(start.names)}, not {', '.join(self.prior.names)}."
            )
        if start.kind == self.posterior.kind:
            self.posterior.load_state_dict(start.state_dict())
            if start.shape_parameters():
                # The affine steps know Gaussians only: a flow that is bent already goes on where it is.
                self.affine_iterations = 0
                self.settings["affine_iterations"] = 0.0
        else:
            self.posterior.set_affine(start.location, start.factor)

    def checkpoint(self) -> GviState:
        return GviState(
            dict(self.settings),
            self.iteration,
            self.generator.get_state(),
            self.posterior.state_dict(),
            {} if self.adam is None else _copied(self.adam.state_dict()),
            _copied(self.average),
            self.u,
            self.gradient,
            self.when,
            tuple(self.records),
        )

    def restore(self, state: GviState) -> None:
        # Where the bending began depends on the posterior it started from, which only the first run was given.
        self.settings["affine_iterations"] = self.affine_iterations = state.settings.get("affine_iterations", math.inf)
        other = [key for key in self.settings if state.settings.get(key) != self.settings[key]]
        if other:
            raise CheckpointError(
                f"The checkpoint was made with other settings: {', '.join(other)} differ.",
                "Resume with the settings of the first run, or begin anew.",
            )
        self.iteration = state.iteration
        self.generator.set_state(state.generator)
        self.posterior.load_state_dict(state.flow)
        self.u, self.gradient, self.when = state.u, state.gradient, state.when
        self.records = list(state.records)
        self.average = _copied(state.average)
        if state.optimiser:
            self.adam = self._new_adam()
            self.adam.load_state_dict(_copied(state.optimiser))

    def iterate(self, evaluate: Evaluate) -> IterationRecord:
        z = self._mirrored_noise()
        u, _ = self.posterior.push(z)
        loss, slope, finite = self._evaluate(evaluate, u.detach())
        moments = self._gaussian()
        if self.bending:
            many, log_q = self._many()
            kl = _kl_of(many, log_q)
            moments = _Moments(many.detach().mean(dim=0), many.detach().std(dim=0), float(kl.detach()))
            if len(self.u):
                self._bend(self._model(), u[finite], slope[finite], many, kl)
        self.u = torch.cat([self.u, u.detach()[finite]])
        self.gradient = torch.cat([self.gradient, slope[finite]])
        self.when = torch.cat([self.when, torch.full((int(finite.sum()),), self.iteration)])
        model = self._model()
        share = 1.0
        if not self.bending:
            step = natural_step(model, self.weight)
            self.posterior.set_affine(step.location, step.factor)
            share = step.share
            moments = dataclasses.replace(self._gaussian(), kl=moments.kl)
        record = self._record(float(loss[finite].mean()), moments, int((~finite).sum()), share, model)
        self.records.append(record)
        self.iteration += 1
        return record

    def result(self) -> Posterior:
        """The posterior, its bent part averaged over the last iterations."""
        result = Posterior(self.prior, self.posterior.kind, self.posterior.seed)
        state = self.posterior.state_dict()
        count = self.average["count"]
        state.update({name: total / count for name, total in self.average["sum"].items()})
        result.load_state_dict(state)
        return result

    def _mirrored_noise(self) -> Tensor:
        half = self.posterior.noise((self.draws + 1) // 2, self.generator)
        return torch.cat([half, -half])[: self.draws]

    def _model(self) -> GradientModel:
        # The last half of the run, and at least six iterations: early draws were made far from here.
        recent = self.when >= min(self.iteration // 2, self.iteration - 6)
        recent = recent if bool(recent.any()) else torch.ones_like(recent)
        return model_of_gradients(
            self.u[recent],
            self.gradient[recent],
            self.when[recent],
            self.posterior.location,
            self.posterior.factor,
            self.weight,
        )

    def _evaluate(self, evaluate: Evaluate, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = self.prior.to_parameter(u)
        loss_array, gradient_array = evaluate(theta.numpy().copy(), self.iteration)
        loss = torch.as_tensor(np.asarray(loss_array, dtype=np.float64))
        gradient = torch.as_tensor(np.asarray(gradient_array, dtype=np.float64))
        if loss.shape != u.shape[:1] or gradient.shape != u.shape:
            raise InputError(
                f"The losses and gradients have shapes {tuple(loss.shape)} and {tuple(gradient.shape)}: "
                f"({len(u)},) and {tuple(u.shape)} were asked for."
            )
        slope = gradient * self.prior.slope(u)
        finite = torch.isfinite(loss) & torch.isfinite(gradient).all(dim=1) & torch.isfinite(slope).all(dim=1)
        if not bool(finite.any()):
            ranges = ", ".join(
                f"{name} {float(low):.4g} to {float(high):.4g}"
                for name, low, high in zip(self.prior.names, theta.amin(dim=0), theta.amax(dim=0), strict=True)
            )
            raise LpmError(
                f"No draw of iteration {self.iteration + 1} has a finite loss and gradient, for {ranges}.",
                "Narrow the priors or bounds of these parameters, or check the observation model.",
            )
        if not bool(finite.all()):
            logger.warning(
                "iteration %d: %d of %d draws dropped, their loss or gradient is not finite",
                self.iteration + 1,
                int((~finite).sum()),
                len(finite),
            )
        return loss, slope, finite

    def _gaussian(self) -> _Moments:
        """What is known in closed form while the posterior is Gaussian."""
        mean, factor = self.posterior.location, self.posterior.factor
        log_volume = torch.diagonal(factor).abs().log().sum()
        kl = float(0.5 * (factor.square().sum() + mean.square().sum() - len(mean)) - log_volume)
        return _Moments(mean, factor.square().sum(dim=1).sqrt(), kl)

    def _many(self) -> tuple[Tensor, Tensor]:
        """Draws u and log q(u) for the terms of the objective that need no simulation."""
        half = self.posterior.noise(_KL_DRAWS // 2, self.generator)
        return self.posterior.push(torch.cat([half, -half]))

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.posterior.shape_parameters(), lr=self.learning_rate, betas=(0.9, 0.98))

    def _bend(self, model: GradientModel, u: Tensor, slope: Tensor, many: Tensor, kl: Tensor) -> None:
        """One Adam step on what is not affine, along the reparameterised gradient of the objective."""
        if self.adam is None:
            self.adam = self._new_adam()
        first = min(int(self.affine_iterations), self.iterations)
        done = (self.iteration - first) / max(self.iterations - first, 1)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))
        # What the quadratic model explains is integrated over many draws, only the rest over the few simulated ones.
        rest = slope - model.predict(u.detach())
        length = (rest @ model.factor).norm(dim=1)
        rest = rest * (3.0 * model.scatter / length.clamp_min(1e-300)).clamp(max=1.0)[:, None]
        objective = (model.quadratic(many).mean() + (rest * u).sum() / len(rest)) / self.weight + kl
        self.adam.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.posterior.shape_parameters(), 10.0)
        self.adam.step()
        if self.iteration >= first + 0.6 * (self.iterations - first):
            names = [name for name, _ in self.posterior.flow.named_parameters()]
            weights = self.posterior.state_dict()
            sums = self.average["sum"]
            self.average["sum"] = {name: sums[name] + weights[name] if sums else weights[name] for name in names}
            self.average["count"] += 1

    def _record(
        self, loss: float, moments: _Moments, dropped: int, share: float, model: GradientModel
    ) -> IterationRecord:
        mean, sd, kl = moments.mean, moments.sd, moments.kl
        drift = widening = math.inf
        if self.iteration >= 3:
            before = self.records[2 * self.iteration // 3]
            offset = torch.linalg.solve_triangular(
                self.posterior.factor, (mean - torch.tensor(before.mean, dtype=torch.float64))[:, None], upper=False
            )
            drift = float(offset.square().mean().sqrt())
            widening = float((sd.log() - torch.tensor(before.sd, dtype=torch.float64).log()).abs().max())
        return IterationRecord(
            iteration=self.iteration,
            loss=loss,
            kl=kl,
            objective=loss + self.weight * kl,
            dropped=dropped,
            mean=tuple(mean.tolist()),
            sd=tuple(sd.tolist()),
            step=share,
            noise=float(model.standard_error.square().mean().sqrt()) / self.weight,
            drift=drift,
            widening=widening,
        )


def _kl_of(u: Tensor, log_q: Tensor) -> Tensor:
    log_prior = -0.5 * (u.square() + math.log(2.0 * math.pi)).sum(dim=-1)
    return (log_q - log_prior).mean()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(part) for part in value]
    return value


def _settled_in_a_row(records: Sequence[IterationRecord]) -> int:
    count = 0
    for record in reversed(records):
        if not record.settled:
            break
        count += 1
    return count


def _advice(records: Sequence[IterationRecord], draws: int) -> str:
    """What kept a fit from being called converged; empty if nothing did."""
    if not records:
        return "no iteration was made."
    last = records[-1]
    reasons: list[str] = []
    if last.iteration + 1 < _FEWEST:
        reasons.append(f"fewer than {_FEWEST} iterations say little: give more iterations")
    else:
        if last.step < 1.0:
            reasons.append("the steps are still cut to the trusted length: give more iterations")
        if last.drift > _SETTLED:
            reasons.append(f"the mean moved by {last.drift:.2f} sd in the last third: give more iterations")
        if last.widening > _SETTLED:
            reasons.append(f"a width changed by {math.expm1(last.widening):.0%} lately: give more iterations")
        if last.noise > _SETTLED:
            reasons.append(f"noisy gradients leave the mean uncertain by {last.noise:.2f} sd: give more draws")
    recent = records[len(records) // 2 :]
    dropped = sum(record.dropped for record in recent)
    if dropped > 0.25 * draws * len(recent):
        reasons.append(f"{dropped} of {draws * len(recent)} recent draws had no finite loss: narrow the priors")
    return "; ".join(reasons) + ("." if reasons else "")

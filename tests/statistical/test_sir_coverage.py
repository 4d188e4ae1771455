"""Calibration is right where the truth is known: posteriors of a simulated epidemic hold the parameters that made it.

A two-parameter SIR epidemic of 2,000 people, fully mixed, 40 days. In 20 repetitions the truth is drawn from the prior,
an epidemic is simulated, and its five-day incidence is calibrated by variational inference on fresh, noisy simulations,
whose noise is the likelihood (a synthetic one). The false-alarm rate of the counts is stated where they are tested.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import lpm
from lpm.calibration.diagnostics import credible_interval
from lpm.calibration.gvi import Evaluate, Fit, fit
from lpm.calibration.objective import SyntheticLikelihood, estimate_synthetic
from lpm.calibration.priors import Prior
from lpm.estimators import differences, evaluate
from lpm.ring import decode

Array = NDArray[np.float64]

AGENTS, DAYS, REPETITIONS = 2_000, 40, 20
BLOCK = 5
"""Days that are added up: eight counts, whose covariance a few dozen simulations determine."""
PARAMETERS = (
    lpm.Parameter("beta", prior="lognormal(-1.05, 0.3)", unit="1/day"),
    lpm.Parameter("gamma", prior="lognormal(-1.9, 0.3)", unit="1/day"),
)
PILOT, ITERATIONS, DRAWS, RUNS = 14, 30, 4, 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def epidemic() -> lpm.Model:
    """SIR in one city where everybody meets everybody; 40 are ill on the first day."""
    beta, gamma = PARAMETERS
    sir = lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        over={"city": beta},
        progression={"I": lpm.leave(rate=gamma, to={"R": None})},
        initial={"I": np.arange(40) * (AGENTS // 40)},
    )
    city = lpm.Groups("city", np.zeros(AGENTS, dtype=np.int64), groups=1, shared=True)
    outputs = {"infections": lpm.flow("S -> I")}
    return lpm.Model(lpm.Population(AGENTS), networks=[city], protocols=[sir], outputs=outputs)


def incidence(model: lpm.Model, theta: Array, seed: int) -> Array:
    """Five-day counts [K, T/5] of draws [K, P]."""
    run = evaluate(model, theta, estimator="none", steps=DAYS, seed=seed)
    return decode(run.words)[:, 0].T.reshape(len(theta), -1, BLOCK).sum(axis=2)


def simulation_noise(model: lpm.Model, theta: Array, seed: int) -> SyntheticLikelihood:
    """How much five-day counts differ between simulations with the same parameters."""
    runs = [incidence(model, theta[None], seed + number)[0] for number in range(RUNS)]
    return estimate_synthetic(np.array(runs), "sqrt")


def loss_of(model: lpm.Model, y: Array, noise: SyntheticLikelihood, seed: int) -> Evaluate:
    """Loss and gradient from two independent simulations of each draw, and of those a step above and below it.

    The differences are taken on the likelihood's scale: small counts jump, and a root's slope at a noisy count times
    the jump is not the difference of roots.
    """
    observed = torch.from_numpy(y)
    precision = np.linalg.inv(noise.covariance)

    def on_scale(counts: Array) -> Array:
        return noise.transform(torch.from_numpy(counts)).numpy()

    def loss_and_gradient(theta: Array, iteration: int) -> tuple[Array, Array]:
        steps = differences(theta, PARAMETERS, 0.1)
        counts = [incidence(model, steps.lanes, seed + 2 * iteration + number) for number in (0, 1)]
        rest = [on_scale(y) - on_scale(lanes[: len(theta)]) for lanes in counts]
        slope = [steps.quotient(on_scale(lanes).T[:, None])[:, 0] for lanes in counts]
        gradient = -0.5 * sum(np.einsum("tkp,ts,ks->kp", slope[one], precision, rest[1 - one]) for one in (0, 1))
        first, second = (torch.from_numpy(lanes[: len(theta)].copy()) for lanes in counts)
        return -noise.paired(observed, first, second).numpy(), np.asarray(gradient)

    return loss_and_gradient


def calibrate(model: lpm.Model, prior: Prior, y: Array, rough: SyntheticLikelihood, seed: int) -> Fit:
    """A pilot with the noise at the prior's centre, then the fit with the noise at the pilot's."""
    loss = loss_of(model, y, rough, seed)
    pilot = fit(prior, loss, iterations=PILOT, draws=DRAWS, seed=seed).posterior
    noise = simulation_noise(model, prior.to_parameter(pilot.location).numpy(), seed + 1_000)
    loss = loss_of(model, y, noise, seed + 2_000)
    return fit(prior, loss, iterations=ITERATIONS, draws=DRAWS, seed=seed + 1, start=pilot)


@pytest.mark.timeout(600)
def test_ninety_per_cent_intervals_hold_the_truth() -> None:
    model, prior = epidemic(), Prior.from_parameters(PARAMETERS)
    truths = prior.sample(REPETITIONS, torch.Generator().manual_seed(2026)).numpy()
    rough = simulation_noise(model, prior.to_parameter(torch.zeros(2, dtype=torch.float64)).numpy(), seed=800_000)
    held, width, converged = np.zeros(2), [], 0
    prior_sd = prior.sample(20_000, torch.Generator().manual_seed(1)).std(dim=0).numpy()
    for number, truth in enumerate(truths):
        y = incidence(model, truth[None], 900_000 + number)[0]
        found = calibrate(model, prior, y, rough, seed=10_000 * (number + 1))
        draws = found.posterior.sample(2_000, torch.Generator().manual_seed(number))[0].numpy()
        low, high = credible_interval(draws, 0.9)
        held += (low <= truth) & (truth <= high)
        width.append(draws.std(axis=0) / prior_sd)
        converged += found.converged
    # For a true posterior, fewer than 15 happens by chance in 1.1 % of such tests, for each parameter.
    assert stats.binom.cdf(14, REPETITIONS, 0.9) < 0.012
    assert (held >= 15).all(), held
    assert (np.mean(width, axis=0) <= 0.5).all(), np.mean(width, axis=0)
    assert converged >= 12, converged

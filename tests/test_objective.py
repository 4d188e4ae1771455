"""Likelihoods against scipy.stats; missing days; the synthetic likelihood's covariance and shrinkage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lpm.calibration import objective
from lpm.errors import InputError

Y = np.array([0.0, 3.0, 17.0, 250.0, 1.0])
MEAN = np.array([[0.5, 2.0, 20.0, 200.0, 3.0], [1.0, 4.0, 10.0, 300.0, 0.1]])
DISPERSION = np.array([0.1, 2.0])
HOLES = np.array([0.0, np.nan, 17.0, np.nan, 1.0])


def tensor(values: np.ndarray) -> torch.Tensor:
    """Float64, with its own memory."""
    return torch.tensor(values, dtype=torch.float64)


def test_counts_against_scipy() -> None:
    got = objective.negative_binomial(tensor(Y), tensor(MEAN), tensor(DISPERSION))
    spread = DISPERSION[:, None]
    expected = stats.nbinom.logpmf(Y, 1 / spread, 1 / (1 + spread * MEAN)).sum(axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    variance = stats.nbinom.var(1 / spread, 1 / (1 + spread * MEAN))
    np.testing.assert_allclose(variance, MEAN + spread * MEAN**2)
    np.testing.assert_allclose(
        objective.poisson(tensor(Y), tensor(MEAN)), stats.poisson.logpmf(Y, MEAN).sum(axis=1), rtol=1e-12
    )
    # As the dispersion vanishes the negative binomial becomes the Poisson.
    np.testing.assert_allclose(
        objective.negative_binomial(tensor(Y), tensor(MEAN), 0.0), stats.poisson.logpmf(Y, MEAN).sum(axis=1), atol=0.01
    )
    constant = -0.5 * np.log(2 * np.pi * 4.0) * len(Y)
    np.testing.assert_allclose(
        objective.squared_error(tensor(Y), tensor(MEAN), 2.0) + constant, stats.norm.logpdf(Y, MEAN, 2.0).sum(axis=1)
    )


def test_likelihoods_are_differentiable() -> None:
    mean, spread = tensor(MEAN).requires_grad_(), tensor(DISPERSION).requires_grad_()
    noise = objective.SyntheticLikelihood("sqrt", np.eye(5) + 0.3)
    assert torch.autograd.gradcheck(lambda m, d: objective.negative_binomial(tensor(Y), m, d), (mean, spread))
    assert torch.autograd.gradcheck(lambda m: objective.poisson(tensor(Y), m), (mean,))
    assert torch.autograd.gradcheck(lambda m: objective.synthetic(tensor(HOLES), m, noise), (mean,))


@pytest.mark.parametrize("name", ["negative_binomial", "poisson", "squared_error", "synthetic"])
def test_missing_days_count_for_nothing(name: str) -> None:
    noise = objective.SyntheticLikelihood("log", np.diag([1.0, 2.0, 3.0, 4.0, 5.0]))
    loss = {
        "negative_binomial": lambda y, m, seen: objective.negative_binomial(y, m, 0.3),
        "poisson": lambda y, m, seen: objective.poisson(y, m),
        "squared_error": lambda y, m, seen: objective.squared_error(y, m),
        "synthetic": lambda y, m, seen: objective.SyntheticLikelihood("log", noise.covariance[np.ix_(seen, seen)])(
            y, m
        ),
    }[name]
    seen = ~np.isnan(HOLES)
    mean = tensor(MEAN).requires_grad_()
    whole = loss(tensor(HOLES), mean, np.ones(5, dtype=bool))
    torch.testing.assert_close(whole, loss(tensor(HOLES[seen]), tensor(MEAN[:, seen]), seen))
    gradient = torch.autograd.grad(whole.sum(), mean)[0]
    assert (gradient[:, ~seen] == 0).all() and torch.isfinite(gradient).all()


def test_a_simulated_zero_is_unlikely_but_not_impossible() -> None:
    mean = torch.zeros(2, dtype=torch.float64)
    assert torch.isfinite(objective.poisson(tensor(np.array([1.0, 0.0])), mean))
    assert torch.isfinite(objective.negative_binomial(tensor(np.array([1.0, 0.0])), mean, 0.1))


@pytest.mark.parametrize("scale", ["sqrt", "log"])
def test_synthetic_is_a_gaussian_on_its_scale(scale: str) -> None:
    covariance = np.array([[1.0, 0.5, 0.0], [0.5, 2.0, 0.3], [0.0, 0.3, 1.5]])
    noise = objective.SyntheticLikelihood(scale, covariance)
    y, mean = np.array([3.0, 17.0, 250.0]), np.array([2.0, 20.0, 200.0])
    change = (lambda x: np.sqrt(x + 0.375)) if scale == "sqrt" else np.log1p
    expected = stats.multivariate_normal(change(mean), covariance).logpdf(change(y))
    assert objective.synthetic(tensor(y), tensor(mean), noise).item() == pytest.approx(expected)
    assert noise(tensor(y[1:]), tensor(mean[1:]), slice(1, 3)).item() == pytest.approx(
        stats.multivariate_normal(change(mean[1:]), covariance[1:, 1:]).logpdf(change(y[1:]))
    )
    np.testing.assert_allclose(noise.untransform(noise.transform(tensor(y))), y)


def test_two_noisy_simulations_give_an_unbiased_loss_and_gradient_where_one_does_not() -> None:
    rng = np.random.default_rng(3)
    noise = objective.SyntheticLikelihood("sqrt", np.diag([0.04, 0.09]) + 0.02)
    y, centre = np.array([30.0, 50.0]), np.array([5.0, 8.0])
    steepness = np.array([3.0, 2.0])

    def simulated(theta: torch.Tensor) -> torch.Tensor:
        # The noise grows with the parameter, as it does in an epidemic.
        shock = torch.from_numpy(rng.multivariate_normal([0, 0], noise.covariance, size=40_000))
        return (torch.from_numpy(centre) + theta * torch.from_numpy(steepness) + (1.0 + theta) * shock).square() - 0.375

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    exact = objective.synthetic(
        tensor(y), (torch.from_numpy(centre) + theta * torch.from_numpy(steepness)) ** 2 - 0.375, noise
    )
    paired = noise.paired(tensor(y), simulated(theta), simulated(theta)).mean()
    single = noise(tensor(y), simulated(theta)).mean()
    slopes = [torch.autograd.grad(value, theta)[0].item() for value in (exact, paired, single)]
    assert paired.item() == pytest.approx(exact.item(), abs=0.1)
    assert slopes[1] == pytest.approx(slopes[0], abs=0.6)
    assert slopes[2] == pytest.approx(slopes[0] - 2.0, abs=0.6)


def test_the_covariance_of_simulations_is_shrunk_as_much_as_it_is_unsure() -> None:
    rng = np.random.default_rng(1)
    days = 30
    true = 0.09 * np.exp(-np.abs(np.subtract.outer(np.arange(days), np.arange(days))) / 10.0)
    mean = 10.0 + np.arange(days)

    def simulated(runs: int) -> np.ndarray:
        return (mean + rng.multivariate_normal(np.zeros(days), true, size=runs)) ** 2 - 0.375

    few, many = (objective.estimate_synthetic(simulated(runs)) for runs in (12, 4000))
    assert 0.02 < few.shrinkage < 0.9 and many.shrinkage < 0.02
    np.testing.assert_allclose(many.covariance, true, atol=0.012)
    raw = np.cov(np.sqrt(simulated(12) + 0.375).T)
    assert np.linalg.matrix_rank(raw) < days
    assert np.linalg.eigvalsh(few.covariance).min() > 0
    independent = objective.estimate_synthetic(rng.poisson(100.0, size=(50, days)))
    assert independent.shrinkage > 0.8
    np.testing.assert_allclose(np.diag(independent.covariance), 0.25, atol=0.15)
    averaged = objective.estimate_synthetic(simulated(400), runs_averaged=4)
    np.testing.assert_allclose(np.diag(averaged.covariance) / np.diag(true), 1.25, rtol=0.3)
    # Days without any variance (nobody is ill yet) leave the covariance invertible.
    still = objective.estimate_synthetic(np.concatenate([np.zeros((20, 5)), rng.poisson(50.0, size=(20, 5))], axis=1))
    assert np.linalg.eigvalsh(still.covariance).min() > 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="at least 4"):
        objective.estimate_synthetic(np.ones((3, 5)))
    with pytest.raises(InputError, match="sqrt or log"):
        objective.SyntheticLikelihood("cube", np.eye(2))
    with pytest.raises(InputError, match="equal lengths"):
        objective.poisson(tensor(Y), tensor(MEAN[:, :3]))
    with pytest.raises(InputError, match="equal lengths"):
        objective.SyntheticLikelihood("log", np.eye(2))(tensor(Y), tensor(MEAN))


LOWER, UPPER = np.array([0.0, np.nan, 15.0, 200.0, 0.0]), np.array([4.0, np.nan, 15.0, 240.0, 0.0])


def test_an_interval_has_the_probability_of_all_its_counts() -> None:
    spread = DISPERSION[:, None]
    law = stats.nbinom(1 / spread, 1 / (1 + spread * MEAN))
    expected = np.nansum(np.log(law.cdf(UPPER) - law.cdf(LOWER - 1)), axis=1)
    got = objective.interval_censored(tensor(LOWER), tensor(UPPER), tensor(MEAN), tensor(DISPERSION))
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    law = stats.poisson(MEAN)
    expected = np.nansum(np.log(law.cdf(UPPER) - law.cdf(LOWER - 1)), axis=1)
    got = objective.interval_censored(tensor(LOWER), tensor(UPPER), tensor(MEAN))
    np.testing.assert_allclose(got, expected, rtol=1e-7)
    # An interval of one count is that count; a suppressed cell is not a zero.
    one = objective.interval_censored(tensor(Y), tensor(Y), tensor(MEAN), 0.2)
    torch.testing.assert_close(one, objective.negative_binomial(tensor(Y), tensor(MEAN), 0.2))
    few = objective.interval_censored(tensor(np.zeros(1)), tensor(np.full(1, 4.0)), tensor(np.full(1, 3.0)), 0.1)
    assert few > objective.negative_binomial(tensor(np.zeros(1)), tensor(np.full(1, 3.0)), 0.1) + 1.0
    with pytest.raises(InputError, match="ends before it begins"):
        objective.interval_censored(tensor(UPPER), tensor(LOWER), tensor(MEAN))


def test_an_intervals_probability_is_differentiable_and_far_ones_stay_finite() -> None:
    mean, spread = tensor(MEAN).requires_grad_(), tensor(DISPERSION).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, d: objective.interval_censored(tensor(LOWER), tensor(UPPER), m, d), (mean, spread)
    )
    far = torch.full((1, 5), 1e7, dtype=torch.float64, requires_grad=True)
    total = objective.interval_censored(tensor(LOWER), tensor(UPPER), far, 0.05)
    total.sum().backward()
    assert torch.isfinite(total).all() and far.grad is not None and torch.isfinite(far.grad).all()

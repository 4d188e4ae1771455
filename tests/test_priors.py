"""Priors against scipy.stats, and the map to standard-normal space and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lpm.calibration.priors import Prior
from lpm.errors import InputError
from lpm.parameters import Parameter

FAMILIES = {
    "normal(1, 2)": stats.norm(1, 2),
    "lognormal(-2, 0.5)": stats.lognorm(s=0.5, scale=math.exp(-2)),
    "uniform(1, 3)": stats.uniform(1, 2),
    "beta(2, 5)": stats.beta(2, 5),
    "gamma(2, 3)": stats.gamma(2, scale=1 / 3),
    "halfnormal(2)": stats.halfnorm(scale=2),
    "exponential(4)": stats.expon(scale=0.25),
}
BOUNDED = [
    Parameter("a", "lognormal(-2, 0.5)", (0.05, 0.2)),
    Parameter("b", "normal(0, 1)", (4.0, 6.0)),
    Parameter("c", "normal(0, 1)", (-6.0, -4.0)),
    Parameter("d", "gamma(0.5, 1)"),
    Parameter("e", "beta(2, 2)", (0.9, 1.0)),
]


@pytest.mark.parametrize("text", FAMILIES)
def test_quantiles_and_densities_are_scipys(text: str) -> None:
    prior, reference = Prior.from_parameters([Parameter("x", text)]), FAMILIES[text]
    u = torch.linspace(-6, 6, 49, dtype=torch.float64)[:, None]
    theta = prior.to_parameter(u)
    below = stats.norm.cdf(u[:, 0].numpy())
    expected = np.where(below < 0.5, reference.ppf(below), reference.isf(stats.norm.sf(u[:, 0].numpy())))
    np.testing.assert_allclose(theta[:, 0], expected, rtol=1e-9)
    np.testing.assert_allclose(prior.log_prob(theta), reference.logpdf(theta[:, 0].numpy()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(prior.to_standard(theta), u, atol=1e-8)


def test_truncated_priors_keep_to_their_bounds_and_integrate_to_one() -> None:
    prior = Prior.from_parameters(BOUNDED)
    u = torch.linspace(-9, 9, 201, dtype=torch.float64)[:, None].expand(-1, len(prior))
    theta = prior.to_parameter(u)
    for column, parameter in enumerate(BOUNDED):
        low, high = parameter.bounds or (0.0, math.inf)
        assert low <= theta[:, column].min() and theta[:, column].max() <= high
        assert (theta[:, column].diff() >= 0).all()
        single = Prior.from_parameters([parameter])

        def density(value: float, single: Prior = single) -> float:
            return float(single.log_prob(torch.tensor([value], dtype=torch.float64)).exp())

        mass = integrate.quad(density, low, min(high, 60.0), limit=400)[0]
        assert mass == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(prior.to_standard(prior.to_parameter(u[50:-50])), u[50:-50], atol=1e-6)
    outside = torch.tensor([[0.3, 5.0, -5.0, 1.0, 0.95]], dtype=torch.float64)
    assert prior.log_prob(outside).item() == -math.inf


def test_the_derivative_is_that_of_finite_differences() -> None:
    prior = Prior.from_parameters(BOUNDED)
    u = torch.randn(6, len(prior), generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior.to_parameter, (u,))
    slope = torch.autograd.grad(prior.to_parameter(u).sum(), u)[0]
    torch.testing.assert_close(prior.slope(u), slope)
    # The density in θ is that in u divided by the slope.
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(u.detach()).sum(dim=1)
    torch.testing.assert_close(prior.log_prob(prior.to_parameter(u)), log_normal - slope.log().sum(dim=1))


def test_samples_follow_the_prior_and_repeat() -> None:
    prior = Prior.from_parameters([Parameter("x", "beta(2, 5)"), Parameter("y", "exponential(4)")])
    draws = prior.sample(4000, torch.Generator().manual_seed(1))
    assert torch.equal(draws, prior.sample(4000, torch.Generator().manual_seed(1)))
    assert stats.kstest(draws[:, 0], stats.beta(2, 5).cdf).pvalue > 1e-3
    assert stats.kstest(draws[:, 1], stats.expon(scale=0.25).cdf).pvalue > 1e-3


def test_impossible_priors_are_refused() -> None:
    with pytest.raises(InputError, match="no mass"):
        Prior.from_parameters([Parameter("x", "uniform(0, 1)", (2.0, 3.0))])
    with pytest.raises(InputError, match="twice"):
        Prior.from_parameters([Parameter("x"), Parameter("x")])
    with pytest.raises(InputError, match="no parameter"):
        Prior.from_parameters([])
    with pytest.raises(InputError, match="3 numbers for the 1 parameters x"):
        Prior.from_parameters([Parameter("x")]).to_parameter(torch.zeros(2, 3))

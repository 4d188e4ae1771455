"""The flow posterior: it begins at the prior, its densities are right, its weights are kept exactly."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from lpm.calibration.posterior import FLOWS, Posterior
from lpm.calibration.priors import Prior
from lpm.errors import CheckpointError, InputError
from lpm.parameters import Parameter

PARAMETERS = [Parameter("beta", "lognormal(-2, 0.5)", (0.01, 1.0)), Parameter("rho", "beta(2, 2)"), Parameter("z")]


def bent(flow: str, size: int = 3) -> Posterior:
    """A posterior with weights that are neither the prior's nor special."""
    posterior = Posterior(PARAMETERS[:size], flow)
    generator = torch.Generator().manual_seed(5)
    factor = 0.3 * torch.randn(size, size, generator=generator, dtype=torch.float64).tril() + torch.eye(size)
    posterior.set_affine(torch.randn(size, generator=generator, dtype=torch.float64), factor)
    with torch.no_grad():
        for weight in posterior.shape_parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return posterior


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("size", [1, 3])
def test_it_begins_at_the_prior(flow: str, size: int) -> None:
    posterior = Posterior(PARAMETERS[:size], flow)
    z = posterior.noise(200, torch.Generator().manual_seed(1))
    u, log_q = posterior.push(z)
    torch.testing.assert_close(u, z, rtol=0, atol=1e-13)
    theta, _, log_q = posterior.sample(200, torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_q, posterior.prior.log_prob(theta), rtol=0, atol=1e-10)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_density_of_draws_is_the_density(flow: str) -> None:
    posterior = bent(flow)
    theta, u, log_q = posterior.sample(500, torch.Generator().manual_seed(2))
    near = u.abs().amax(dim=1) < 6  # beyond, probabilities of the beta prior have lost their digits
    torch.testing.assert_close(posterior.log_prob(theta)[near], log_q[near], rtol=1e-6, atol=1e-6)
    # Importance weights against the prior average to 1 if, and only if, both densities are normalised.
    wide = Posterior(posterior.prior)
    wide.set_affine(torch.zeros(3), 2.0 * torch.eye(3))
    theta, _, log_wide = wide.sample(20_000, torch.Generator().manual_seed(3))
    inside = (posterior.log_prob(theta) - log_wide).exp()
    assert inside.mean() == pytest.approx(1.0, abs=5 * inside.std().item() / 20_000**0.5)
    outside = torch.tensor([[2.0, 0.5, 0.0]], dtype=torch.float64)
    assert posterior.log_prob(outside).item() == -np.inf


@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_reach_every_weight_and_weights_are_kept(flow: str) -> None:
    posterior = bent(flow)
    theta, _, log_q = posterior.rsample(64, torch.Generator().manual_seed(4))
    (theta.square().sum() + log_q.sum()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in posterior.flow.parameters())
    file = io.BytesIO()
    torch.save(posterior.state_dict(), file)
    file.seek(0)
    other = Posterior(PARAMETERS, flow, seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one, two in zip(
        posterior.sample(8, torch.Generator().manual_seed(5)),
        other.sample(8, torch.Generator().manual_seed(5)),
        strict=True,
    ):
        assert torch.equal(one, two)
    with pytest.raises(CheckpointError):
        Posterior(PARAMETERS[:2], flow).load_state_dict(posterior.state_dict())


def test_the_spline_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    Posterior(PARAMETERS, "spline", seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_the_table_of_draws() -> None:
    posterior = bent("affine")
    frame = posterior.to_frame(50, seed=1)
    assert list(frame.columns) == ["beta", "rho", "z", "log_q", "log_prior"]
    theta = torch.from_numpy(frame[["beta", "rho", "z"]].to_numpy(copy=True))
    np.testing.assert_allclose(frame["log_q"], posterior.log_prob(theta), atol=1e-6)
    np.testing.assert_array_equal(frame["log_prior"], Prior(PARAMETERS).log_prob(theta))
    assert frame.equals(posterior.to_frame(50, seed=1))


def test_another_flow_is_refused() -> None:
    with pytest.raises(InputError, match="affine, spline"):
        Posterior(PARAMETERS, "naf")

"""Natural-gradient steps of a Gaussian posterior from few, noisy gradients (Salimans & Knowles 2013; Khan & Rue 2023).

The optimum of E_q[loss] + w KL(q ‖ N(0, I)) over Gaussians q has precision I + E_q[∇²loss]/w and a mean at which
E_q[∇loss] + w·mean = 0. Both expectations are the coefficients of a linear regression of the gradients on the draws
(Stein's lemma), so every gradient of the last half of the run counts, not only the newest; that is what makes a few
hundred gradients of a stochastic simulator enough, where gradient descent needs thousands. All is done in the
coordinates of the present posterior (u = mean + L x), in which every number is of size one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientModel", "Step", "model_of_gradients", "natural_step"]

_ANCHOR = 4.0
"""The present posterior counts as that many draws in the regression, which damps the first steps."""

_REACH = 1.0
"""Longest step of the mean, in posterior standard deviations per parameter."""

_SHRINK = 4.0
"""Largest factor by which a variance changes in one step."""

_PASSES = 4
_OUTLIER = 3.0
"""A draw that the regression misses by so many times the median has half its weight."""

_SPREAD = 4.0
"""Squared standardised distance per parameter at which a draw's weight has fallen to a quarter."""


@dataclass(frozen=True)
class GradientModel:
    """E[∇loss | x] ≈ slope + curvature·x in the coordinates x of a Gaussian with this mean and factor.

    Args:
        location: [P], in u.
        factor: [P, P] lower triangle, in u.
        slope: [P], the expected gradient under the Gaussian.
        curvature: [P, P] symmetric, the expected Hessian.
        standard_error: [P], of `slope`, from the scatter between iterations.
        scatter: typical length of what the model leaves unexplained.
    """

    location: Tensor
    factor: Tensor
    slope: Tensor
    curvature: Tensor
    standard_error: Tensor
    scatter: float

    def predict(self, u: Tensor) -> Tensor:
        """The expected gradient [K, P] with respect to u, at u [K, P]."""
        within = self.slope + _standardised(u, self.location, self.factor) @ self.curvature
        gradient: Tensor = torch.linalg.solve_triangular(self.factor.T, within.T, upper=True).T
        return gradient

    def quadratic(self, u: Tensor) -> Tensor:
        """The loss [K] whose gradient `predict` is, up to a constant; differentiable in u."""
        x = _standardised(u, self.location, self.factor)
        return x @ self.slope + 0.5 * (x * (x @ self.curvature)).sum(dim=-1)


@dataclass(frozen=True)
class Step:
    """Where a natural-gradient step leads.

    Args:
        location: [P], the new mean in u.
        factor: [P, P], the new lower-triangular factor in u.
        share: of the full step, from 0 to 1; below 1 it was cut to the trusted length.
    """

    location: Tensor
    factor: Tensor
    share: float


def model_of_gradients(
    u: Tensor, gradient: Tensor, when: Tensor, location: Tensor, factor: Tensor, weight: float
) -> GradientModel:
    """Regress gradients on draws, with less weight on distant draws and on outliers.

    Args:
        u: [M, P] draws of this and earlier iterations.
        gradient: [M, P], of the loss with respect to u.
        when: [M], the iteration of each draw.
        location: [P], the present mean.
        factor: [P, P], the present factor.
        weight: of the KL term.
    """
    size = len(location)
    x = _standardised(u, location, factor)
    h = gradient @ factor
    near = (1.0 + x.square().sum(dim=1) / (size * _SPREAD)).pow(-2)
    # With this curvature and no slope the present posterior would be its own optimum.
    anchor = weight * (torch.eye(size, dtype=u.dtype) - factor.T @ factor)
    # Robust regression: begin with long gradients held short, then trust each draw by what is left unexplained. A rest
    # that is small against the posterior's own gradients, which are of the weight's size, is never held an outlier.
    length = h.norm(dim=1)
    weights = near * (2.0 * length.median() / length.clamp_min(1e-300)).clamp(max=1.0)
    slope, curvature, rest = _symmetric_regression(x, h, weights, anchor)
    for _ in range(_PASSES):
        length = rest.norm(dim=1)
        weights = near / (1.0 + (length / (_OUTLIER * length.median() + 0.1 * weight)).square())
        slope, curvature, rest = _symmetric_regression(x, h, weights, anchor)
    return GradientModel(
        location.clone(),
        factor.clone(),
        slope,
        curvature,
        _standard_error(rest, weights, when),
        float(rest.norm(dim=1).median()),
    )


def natural_step(model: GradientModel, weight: float) -> Step:
    """Step towards the Gaussian that is optimal for the modelled gradients, no further than the model is trusted."""
    size = len(model.location)
    values, vectors = torch.linalg.eigh(model.curvature)
    # A likelihood adds information: directions that seem to have negative curvature keep the prior's width.
    curvature = (vectors * values.clamp_min(0.0)) @ vectors.T
    precision = model.factor.T @ model.factor + curvature / weight
    pull = model.slope / weight + model.factor.T @ model.location
    shift = -torch.linalg.solve(precision, pull)
    share = min(1.0, _REACH * size**0.5 / max(float(shift.norm()), 1e-300))
    identity = torch.eye(size, dtype=precision.dtype)
    # The width follows only as far as the mean did: a posterior that narrows on its way never arrives.
    values, vectors = torch.linalg.eigh(identity + share * (precision - identity))
    root = model.factor @ (vectors / values.clamp(1.0 / _SHRINK, _SHRINK).sqrt())
    # R of the QR decomposition of the root's transpose is the Cholesky factor without squaring the condition number.
    upper = torch.linalg.qr(root.T)[1]
    factor = (upper * torch.sign(torch.diagonal(upper))[:, None]).T
    return Step(model.location + model.factor @ (share * shift), factor.contiguous(), share)


def _standardised(u: Tensor, location: Tensor, factor: Tensor) -> Tensor:
    """Draws [M, P] in the coordinates of the Gaussian."""
    x: Tensor = torch.linalg.solve_triangular(factor, (u - location).T, upper=False).T
    return x


def _symmetric_regression(x: Tensor, h: Tensor, weights: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares h ≈ slope + B x with B symmetric, drawn to `anchor`: the slope, B and the residuals."""
    total = weights.sum()
    x_mean, h_mean = (weights @ x) / total, (weights @ h) / total
    x_centred, h_centred = x - x_mean, h - h_mean
    weighted = x_centred * weights[:, None]
    moment = weighted.T @ x_centred + _ANCHOR * torch.eye(x.shape[1], dtype=x.dtype)
    cross = h_centred.T @ weighted + _ANCHOR * anchor
    # The symmetric minimum solves B·moment + moment·B = cross + crossᵀ, which is diagonal in moment's eigenvectors.
    values, vectors = torch.linalg.eigh(moment)
    inner = vectors.T @ (cross + cross.T) @ vectors
    curvature = vectors @ (inner / (values[:, None] + values[None, :])) @ vectors.T
    slope = h_mean - curvature @ x_mean
    return slope, curvature, h - slope - x @ curvature


def _standard_error(rest: Tensor, weights: Tensor, when: Tensor) -> Tensor:
    """Of the slope [P]; draws of one iteration may share their random numbers, so iterations are the units."""
    _, group = torch.unique(when, return_inverse=True)
    groups = int(group.max()) + 1
    sums = torch.zeros(groups, rest.shape[1], dtype=rest.dtype).index_add_(0, group, rest * weights[:, None])
    scale = (groups / max(groups - 1, 1)) ** 0.5 / float(weights.sum())
    error: Tensor = scale * sums.square().sum(dim=0).sqrt()
    return error

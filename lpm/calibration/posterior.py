"""The variational posterior θ = Sample(DNN_Q; φ): a zuko flow over the prior's standard-normal space (paper, 5.1).

Two flows stand behind `flow=`: `affine`, a full-rank Gaussian, which a few hundred noisy gradients determine; and
`spline`, the same Gaussian behind a neural spline flow, for posteriors that are bent or skewed. Both begin as the
identity, that is at the prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import zuko
from torch import Tensor, nn
from zuko.flows import NSF, Flow
from zuko.lazy import LazyTransform, UnconditionalDistribution, UnconditionalTransform
from zuko.transforms import AdditiveTransform, ComposedTransform, DependentTransform, LULinearTransform

from lpm.calibration.priors import Prior
from lpm.errors import CheckpointError, InputError
from lpm.parameters import Parameter

__all__ = ["FLOWS", "Posterior"]

FLOWS = ("affine", "spline")
"""What `flow=` accepts."""

_LOG_2PI = math.log(2.0 * math.pi)


def _affine(mean: Tensor, factor: Tensor) -> ComposedTransform:
    """Z → mean + L z, with L the lower triangle of `factor`."""
    return ComposedTransform(LULinearTransform(factor.tril()), DependentTransform(AdditiveTransform(mean), 1))


def _spline_at_identity(features: int, seed: int) -> LazyTransform:
    """A neural spline flow whose last layers are 0: equal bins and unit slopes, that is the identity."""
    # Layers draw their weights from torch's global generator; it is given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spline = NSF(features, transforms=2, hidden_features=(32, 32)).double().transform
    with torch.no_grad():
        for transform in spline.transforms:
            last = transform.hyper[-1] if hasattr(transform, "hyper") else transform
            for parameter in last.parameters():
                parameter.zero_()
    return spline


class Posterior:
    """A distribution over P parameters, as a normalising flow over u; it begins as the prior.

    Args:
        prior: the parameters' prior, which maps u to θ.
        flow: `affine` (full-rank Gaussian in u) or `spline`.
        seed: of the spline's hidden layers.

    Raises:
        InputError: for another `flow`.
    """

    def __init__(self, prior: Prior | Sequence[Parameter], flow: str = "affine", seed: int = 0) -> None:
        self.prior = prior if isinstance(prior, Prior) else Prior.from_parameters(prior)
        if flow not in FLOWS:
            raise InputError(f"The flow is {flow!r}: one of {', '.join(FLOWS)}.")
        size = len(self.prior)
        self.kind, self.seed = flow, seed
        self.affine = UnconditionalTransform(
            _affine, torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        )
        self.spline = _spline_at_identity(size, seed) if flow == "spline" else None
        zeros, ones = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        base = UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, ones, buffer=True)
        # zuko's flows map data to noise.
        layers = [self.affine.inv] if self.spline is None else [self.affine.inv, self.spline]
        self.flow = Flow(layers, base)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the order of all arrays."""
        return self.prior.names

    @property
    def location(self) -> Tensor:
        """The affine part's mean [P] in u."""
        return self._affine_part()[0].detach().clone()

    @property
    def factor(self) -> Tensor:
        """The affine part's lower-triangular factor [P, P] of the covariance in u."""
        return self._affine_part()[1].detach().tril()

    def set_affine(self, location: Tensor, factor: Tensor) -> None:
        """Put the affine part at a mean [P] and a lower-triangular factor [P, P]."""
        with torch.no_grad():
            mean, lower = self._affine_part()
            mean.copy_(location)
            lower.copy_(factor)

    def shape_parameters(self) -> list[nn.Parameter]:
        """The weights of what is not affine; empty for `affine`."""
        return [] if self.spline is None else list(self.spline.parameters())

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise through the flow, differentiable in the flow's weights.

        Args:
            z: [K, P] standard-normal numbers.

        Returns:
            u [K, P] and log q(u) [K].
        """
        u, stretched = self.flow().transform.inv.call_and_ladj(z)
        return u, _log_normal(z) - stretched

    def rsample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws through which gradients reach the flow: θ [K, P], u [K, P] and log q(u) [K], the density in u."""
        u, log_q = self.push(self.noise(draws, generator))
        return self.prior.to_parameter(u), u, log_q

    def sample(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws without gradients.

        Args:
            draws: K.
            generator: the only source of randomness.

        Returns:
            θ [K, P], u [K, P] and the log density log q(θ) [K].
        """
        with torch.no_grad():
            theta, u, log_q = self.rsample(draws, generator)
            return theta, u, log_q + self._log_slope(u)

    def log_prob(self, theta: Tensor) -> Tensor:
        """The log density [...] of parameters [..., P]; −∞ outside the bounds."""
        inside = torch.isfinite(self.prior.log_prob(theta))
        u = self.prior.to_standard(theta)
        with torch.no_grad():
            return torch.where(inside, self.log_prob_standard(u) + self._log_slope(u), -torch.inf)

    def log_prob_standard(self, u: Tensor) -> Tensor:
        """The log density [...] in u [..., P]."""
        log_q: Tensor = self.flow().log_prob(u)
        return log_q

    def noise(self, draws: int, generator: torch.Generator) -> Tensor:
        """Standard-normal numbers [K, P]."""
        return torch.randn(draws, len(self.prior), generator=generator, dtype=torch.float64)

    def to_frame(self, draws: int, seed: int) -> pd.DataFrame:
        """Draws as a table, as kept in `posterior.parquet`.

        Args:
            draws: number of rows.
            seed: of the draws.

        Returns:
            one column per parameter, then `log_q` and `log_prior`, both log densities of the parameters.
        """
        theta, _, log_q = self.sample(draws, torch.Generator().manual_seed(seed))
        frame = pd.DataFrame(theta.numpy(), columns=list(self.names))
        return frame.assign(log_q=log_q.numpy(), log_prior=self.prior.log_prob(theta).numpy())

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight of the flow, by name."""
        return {name: tensor.detach().clone() for name, tensor in self.flow.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of `state_dict`.

        Raises:
            CheckpointError: if they belong to another flow or other parameters.
        """
        try:
            self.flow.load_state_dict(dict(state))
        except RuntimeError as error:
            raise CheckpointError(
                f"These weights belong to another posterior than {self.kind} over {', '.join(self.names)}.",
                "Calibrate again, or give the scenario they were made with.",
            ) from error

    def _affine_part(self) -> tuple[Tensor, Tensor]:
        mean, factor = self.affine.parameters()
        return mean, factor

    def _log_slope(self, u: Tensor) -> Tensor:
        """−log |dθ/du|: from the density of u to that of θ."""
        return self.prior.log_prob(self.prior.to_parameter(u.detach())) - _log_normal(u.detach())


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + _LOG_2PI).sum(dim=-1)

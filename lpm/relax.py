"""Hard decisions with true derivatives: the one place where a random decision is taken.

The value of a decision is hard (0 or 1, from an integer threshold, the same bits everywhere); its derivative is that of
its conditional expectation: ż' = żᵀM + zᵀṀ. In torch that is `hard + (p − p.detach())`, whose value is exactly `hard`
and which works under jvp, vjp, jacfwd, jacrev and vmap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RECIPROCALS", "attach", "one_minus_exp", "sample", "thresholds"]

RECIPROCALS = tuple(1.0 / k for k in range(2, 13))
"""1/2 … 1/12, the Taylor coefficients of `one_minus_exp`; every executor uses these same binary64 numbers."""

_SCALE = 4294967296.0


def one_minus_exp(x: Tensor) -> Tensor:
    """1 − e^(−x) for x ≥ 0, with + − × alone and in a fixed order, so that all executors agree to the bit.

    Taylor's series at x/16, then four times q ← q(2 − q); relative error below 1e-13 on [0, 8], absolute below 1e-9
    everywhere. x is capped at 32.
    """
    y = torch.clamp(x, max=32.0) * 0.0625
    q = torch.ones_like(y)
    for reciprocal in reversed(RECIPROCALS):
        q = 1.0 - (y * reciprocal) * q
    q = y * q
    for _ in range(4):
        q = q * (2.0 - q)
    return q


def thresholds(probability: Tensor) -> Tensor:
    """Probabilities as integers ⌊p·2^32⌋: a 32-bit uniform word below it says yes."""
    return torch.floor(probability.detach() * _SCALE).to(torch.int64)


def attach(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` (exactly) with the derivative of `soft`."""
    return hard + (soft - soft.detach())


def sample(occupied: Tensor, cumulative: Sequence[Tensor], uniform: Tensor) -> list[Tensor]:
    """Which of several outcomes happens to each agent, or none.

    Args:
        occupied: 1 where the agent is in the state that decides, else 0 (differentiable) [agents, lanes].
        cumulative: increasing probabilities of the first, the first two, … outcomes [agents, lanes].
        uniform: 32-bit uniform words [agents, 1] int64.

    Returns:
        For each outcome 0 or 1 [agents, lanes], with the derivative of occupied × probability.
    """
    outcomes = []
    before = torch.zeros((), dtype=torch.float64)
    below = torch.zeros((), dtype=torch.bool)
    for total in cumulative:
        reached = uniform < thresholds(total)
        hard = occupied.detach() * (reached & ~below).to(torch.float64)
        outcomes.append(attach(hard, occupied * (total - before)))
        before, below = total, reached
    return outcomes

"""Hard decisions with true derivatives: the one place where a random decision is taken.

The value of a decision is hard (0 or 1, from an integer threshold, the same bits everywhere); its derivative is that of
its conditional expectation: ż' = żᵀM + zᵀṀ. In torch that is `hard + (p − p.detach())`, whose value is exactly `hard`
and which works under jvp, vjp, jacfwd, jacrev and vmap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = [
    "RECIPROCALS",
    "attach",
    "decide",
    "deciding_through",
    "one_minus_exp",
    "recording_likelihood",
    "sample",
    "straight_through",
    "thresholds",
]

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


def decide(cumulative: Sequence[Tensor], uniform: Tensor) -> list[Tensor]:
    """Which of several outcomes each word says, for agents who are in the state that decides.

    Args:
        cumulative: as of `sample`.
        uniform: as of `sample`.

    Returns:
        For each outcome whether it happens [agents, lanes].
    """
    outcomes = []
    below = torch.zeros((), dtype=torch.bool)
    for total in cumulative:
        reached = uniform < thresholds(total)
        outcomes.append(reached & ~below)
        below = reached
    return outcomes


def sample(occupied: Tensor, cumulative: Sequence[Tensor], uniform: Tensor) -> list[Tensor]:
    """Which of several outcomes happens to each agent, or none.

    Args:
        occupied: 1 where the agent is in the state that decides, else 0 (differentiable) [agents, lanes].
        cumulative: increasing probabilities of the first, the first two, … outcomes [agents, lanes].
        uniform: 32-bit uniform words [agents, 1] int64.

    Returns:
        For each outcome 0 or 1 [agents, lanes], with the derivative of occupied × probability; under
        `recording_likelihood` with none, under `straight_through` with that of the Gumbel-softmax; under
        `deciding_through` what that says.
    """
    instead = _INSTEAD.get()
    if instead is not None:
        return instead(occupied, cumulative, uniform)
    outcomes = []
    before = torch.zeros((), dtype=torch.float64)
    reached = torch.zeros((), dtype=torch.bool)
    recorded, gumbel = _LIKELIHOOD.get(), _TEMPERATURE.get()
    # Of not having had an earlier outcome: its derivative alone is used, and only under `straight_through`.
    passed: Tensor = torch.ones((), dtype=torch.float64)
    log_likelihood: Tensor = torch.zeros((), dtype=torch.float64)
    for total, chosen in zip(cumulative, decide(cumulative, uniform), strict=True):
        reached = reached | chosen
        decided = chosen.to(torch.float64)
        hard = occupied.detach() * decided
        if recorded is not None:
            log_likelihood = log_likelihood + _log_of_chosen(total - before, hard)
            outcomes.append(hard)
        elif gumbel is not None:
            soft = _relaxed(before, total, uniform, gumbel)
            outcomes.append(occupied * attach(decided, passed * soft))
            passed = attach((~reached).to(torch.float64), passed * (1.0 - soft))
        else:
            outcomes.append(attach(hard, occupied * (total - before)))
        before = total
    if recorded is not None and outcomes:
        none = occupied.detach() - torch.stack(outcomes).sum(0)
        recorded.append(log_likelihood + _log_of_chosen(1.0 - before, none))
    return outcomes


# ---- other derivatives of the same decisions, for the estimators `score`, `st-gumbel` and `alternates`

_LIKELIHOOD: ContextVar[list[Tensor] | None] = ContextVar("likelihood", default=None)
_TEMPERATURE: ContextVar[float | None] = ContextVar("temperature", default=None)
_INSTEAD: ContextVar[Callable[[Tensor, Sequence[Tensor], Tensor], list[Tensor]] | None] = ContextVar(
    "instead", default=None
)


@contextlib.contextmanager
def recording_likelihood() -> Iterator[list[Tensor]]:
    """Decisions have no derivative in here; the log-likelihood of what each agent decided is recorded instead.

    Yields:
        One differentiable tensor [agents, lanes] for each call of `sample`.

    Source: the likelihood ratio, or REINFORCE (Glynn 1990; Williams 1992).
    """
    recorded: list[Tensor] = []
    token = _LIKELIHOOD.set(recorded)
    try:
        yield recorded
    finally:
        _LIKELIHOOD.reset(token)


@contextlib.contextmanager
def deciding_through(instead: Callable[[Tensor, Sequence[Tensor], Tensor], list[Tensor]]) -> Iterator[None]:
    """Decisions are what a function says in here: how `alternates` lets one of them come out otherwise.

    Args:
        instead: as `sample`.
    """
    token = _INSTEAD.set(instead)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


@contextlib.contextmanager
def straight_through(temperature: float = 0.1) -> Iterator[None]:
    """Decisions have the derivative of a Gumbel-softmax in here, at the value of the hard one: biased, to compare with.

    A decision with several outcomes is a chain of binary ones, each a logistic with the noise that decided it.

    Args:
        temperature: of the softmax; 0.1 is what published epidemic models use.

    Source: Jang, Gu and Poole (2017), "Categorical reparameterization with Gumbel-softmax".
    """
    token = _TEMPERATURE.set(temperature)
    try:
        yield
    finally:
        _TEMPERATURE.reset(token)


def _log_of_chosen(probability: Tensor, chosen: Tensor) -> Tensor:
    """Log p where chosen, else 0; nobody chose what has probability 0."""
    safe = torch.where(chosen > 0, probability, torch.ones_like(probability))
    return chosen * torch.log(torch.clamp(safe, min=1.0 / _SCALE))


def _relaxed(before: Tensor, total: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The soft twin of "this outcome, given none before it"."""
    left = torch.clamp(1.0 - before, min=1.0 / _SCALE)
    chance = torch.clamp((total - before) / left, 1.0 / _SCALE, 1.0 - 1.0 / _SCALE)
    # The word, given that it lies above all earlier thresholds, is uniform again.
    point = (uniform.to(torch.float64) + 0.5) / _SCALE
    point = torch.clamp((point - before.detach()) / left.detach(), 1.0 / _SCALE, 1.0 - 1.0 / _SCALE)
    return torch.sigmoid((torch.logit(chance) - torch.logit(point)) / temperature)

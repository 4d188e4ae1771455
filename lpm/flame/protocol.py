"""The protocol, FLAME's unit of composition: emit → ⊕ → observe, policy, transition (paper, eq. 1–3).

A model is an ordered composition Φ: S → S of protocols. In each step every protocol emits messages into networks; the
world adds them up; then, in order, each protocol observes its state and what ⊕ returned, a policy turns the observation
into an action, and the transition applies it. Agents' state is read as it stood at the start of the step (synchronous);
the environment e is passed on from one protocol to the next, so a lockdown placed before a disease acts the same day.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpm import rng
from lpm.errors import InputError
from lpm.kernels.spec import Executor, Summed
from lpm.parameters import Expression

if TYPE_CHECKING:
    from lpm.flame.model import Model

__all__ = ["Change", "Protocol", "Step"]


@dataclass(frozen=True)
class Change:
    """What a protocol hands back: new arrays of its own, new entries of e, and records for outputs.

    Attributes:
        state: array name → value; own arrays only.
        env: name → value [lanes] or scalar; replicated, a function of opened sums and parameters alone.
        records: record name → [X, C, lanes]; sums over this shard by class, which outputs read.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    env: Mapping[str, Tensor] = field(default_factory=dict)
    records: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a protocol sees of one step.

    Attributes:
        t: the step, from 0; −1 at the start.
        model: population, networks and protocols of this shard.
        number: the protocol's place in the model.
        lanes: how many parameter vectors run at once.
        values: parameter name → [lanes].
        state: "protocol.array" → value at the start of the step.
        env: the environment e.
        sums: "protocol/network" → opened sums [cells, lanes].
        sizes: network → people per cell in all shards together [cells].
        seeds: of this shard; one for all lanes, or one for each.
        executor: what runs contagions.
        settled: what follows from parameters alone, by protocol, worked out once in a run; None where derivatives flow.
        drawing: receives the number of a protocol that asks for random words, where somebody wants to know.
    """

    t: int
    model: Model
    number: int
    lanes: int
    values: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    env: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    executor: Executor
    settled: dict[str, Any] | None = None
    drawing: set[int] | None = None

    def value(self, expression: Expression) -> Tensor:
        """An expression at this step [lanes] or scalar."""
        return expression.evaluate(self.values, self.driver)

    def driver(self, name: str) -> Tensor:
        """An entry of the environment.

        Raises:
            InputError: if no protocol before this one sets it.
        """
        if name not in self.env:
            raise InputError(
                f"The driver {name} is not in the environment.",
                f"Put a protocol that sets it before {self.model.protocols[self.number].name}; there are: "
                f"{', '.join(sorted(self.env)) or 'none'}.",
            )
        return self.env[name]

    @property
    def address(self) -> rng.Address:
        """Where the random words of this step and protocol stand."""
        if self.drawing is not None:
            self.drawing.add(self.number)
        apart = self.seeds if len(self.seeds) > 1 else ()
        return rng.Address(self.seeds[0], self.t, self.number, self.model.population.numbering, apart)

    def uniform(self, variate: int = 0, variates: int = 1) -> NDArray[np.uint64]:
        """Uniform 32-bit words for each agent, at this step's and protocol's address [variates, agents]."""
        return self.address.words(variate, variates)

    def arrays(self, protocol: str) -> dict[str, Tensor]:
        """The arrays of one protocol by their short names."""
        prefix = f"{protocol}."
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def total(self, network: str, messages: Tensor) -> Summed:
        """Add up one message per agent over a network: rounded to words first, then added [agents, lanes]."""
        return Summed(*self.model.network(network).total(messages, messages))


class Protocol:
    """An interface: `name`, and any of the methods below. A protocol belongs to one model."""

    name: str

    def expressions(self) -> Iterable[Expression]:
        """The expressions whose parameters the model exposes."""
        return ()

    def prepare(self, model: Model) -> None:
        """Check against the model and compile what need not be redone each step."""

    def require_steps(self, steps: int) -> None:
        """Refuse a run longer than what is known, e.g. of a measured series."""

    def networks(self) -> tuple[str, ...]:
        """The networks it emits into."""
        return ()

    def shard(self, positions: NDArray[np.int64]) -> Protocol:
        """The same protocol for some of the agents; one that keeps an array by agent cuts it here.

        Args:
            positions: which, ascending.
        """
        return copy.copy(self)

    def fused(self) -> bool:
        """Whether the fused executors can run it in plain mode."""
        return True

    def by_executor(self) -> bool:
        """Whether it touches agents through the executor's `start`, `emit` and `advance` alone, or not at all.

        Lanes may then have seeds of their own, and the executor may carry derivatives beside the values. Where a
        protocol does not, runs with different random numbers are made one after the other, and tangents by torch.
        """
        return False

    def least_memory(self, executor: Executor) -> int:
        """Bytes of each agent and lane that a run by this executor takes at least, the people themselves apart."""
        return 0

    def start(self, step: Step) -> Change:
        """The first state."""
        return Change()

    def emit(self, step: Step, network: str) -> Summed:
        """The shard's contribution to a network."""
        raise TypeError(f"{self.name} names the network {network} but emits nothing.")

    def most(self, network: str) -> float | None:
        """The most that one agent contributes to a network, from 0; None if contributions have no such range."""
        return None

    def observe(self, step: Step) -> Any:
        """o: S → O, own state plus what ⊕ returned."""
        return None

    def policy(self, step: Step, observation: Any) -> Any:
        """π: observation → action."""
        return observation

    def transition(self, step: Step, action: Any) -> Change:
        """t: S × A → S."""
        return Change()

"""The two doors through which protocols reach chance and one another, and what is said there to another population.

Every random decision goes through `lpm.relax.sample`, and everything that people hear of one another is a sum over a
network (paper, eq. 1). Whoever stands at both can run the same protocols for people as they are, for alternatives that
hear only their own group, and for both with derivatives: `alternates_general` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpm.errors import InputError
from lpm.kernels.spec import decode
from lpm.networks import Network, as_words
from lpm.passes.steps import Steps
from lpm.relax import attach, decide, thresholds

__all__ = ["REMEDY", "SCALE", "Actual", "Alternative", "Besides", "Decider", "Decision", "Heard", "Tangent", "offers"]

REMEDY = "Let it depend on one's own state, the environment and sums over networks, or use gradient=fd."
"""What to do about a protocol that looks at others past the networks."""

Besides = tuple[Network, bool, Tensor]
"""What alternatives send in a call beside the actual people: the network, whether the call adds up, and how much more
[agents, lanes].
"""

SCALE = 4294967296.0
"""Of a random word: 2^32."""


@dataclass(frozen=True)
class Decision:
    """One call of `sample`: who decided [agents, lanes], between which chances [outcomes, agents, lanes], by which
    words [agents, lanes].
    """

    occupied: Tensor
    cumulative: Tensor
    word: Tensor


class Decider:
    """What `sample` says while a step is taken: hard outcomes, without derivatives.

    Args:
        loop: of the run, which knows whose step it is.
        forced: for each call the outcome that an agent must have, or −1 [agents, lanes].
    """

    def __init__(self, loop: Steps, forced: Sequence[Tensor] = ()) -> None:
        self._loop, self._forced = loop, forced
        self.decided: set[int] = set()
        self.calls: list[Decision] = []

    def __call__(self, occupied: Tensor, cumulative: Sequence[Tensor], uniform: Tensor) -> list[Tensor]:
        self.decided.add(self._loop.viewing)
        if not cumulative:
            return []
        shape = (self._loop.model.population.agents, self._loop.lanes)
        occupied = occupied.detach()
        outcomes = [chosen.expand(shape) for chosen in decide(cumulative, uniform)]
        if self._forced:
            forced = self._forced[len(self.calls)]
            outcomes = [torch.where(forced < 0, chosen, forced == k) for k, chosen in enumerate(outcomes)]
        chances = torch.stack([chance.expand(shape) for chance in cumulative])
        self.calls.append(Decision(occupied.expand(shape), chances, uniform.expand(shape)))
        return [occupied * chosen.to(torch.float64) for chosen in outcomes]


@dataclass(frozen=True)
class Heard:
    """One call over a network: what the actual people send [agents, lanes], and their sums [cells, lanes] if it added
    up.
    """

    name: str
    sent: Tensor
    words: Tensor | None


class Actual:
    """Adds up what the actual people send, and remembers it.

    Args:
        loop: of the run, which knows whose step it is.
        layer: the network in which alternatives hear one another.
    """

    def __init__(self, loop: Steps, layer: str | None) -> None:
        self._loop, self._layer = loop, layer
        self.heard: list[Heard] = []

    def sum(self, network: Network, messages: Tensor) -> Tensor:
        return _own_sum(self._loop, network, messages, self._layer)

    def total(self, network: Network, hard: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        sent = as_words(hard)
        words = network.add(sent)
        self.heard.append(Heard(network.name, sent, words))
        return words, network.add(soft)

    def own(self, network: Network, hard: Tensor, soft: Tensor) -> Tensor:
        self.heard.append(Heard(network.name, as_words(hard), None))
        return hard


class Alternative:
    """Tells alternatives what they hear, and takes what they send beside the actual people as a derivative.

    Args:
        loop: see `Actual`.
        layer: see `Actual`.
        heard: what the actual people sent, call by call.
        weight: of each agent's alternative, by direction [agents, lanes, directions]; None if nobody asks.
        expected: what must be sent in each call, if that is known [agents, lanes].

    Attributes:
        sent: what alternatives send in each call [agents, lanes].
        moved: the derivative that this is of what the call gives, by direction.
        more: of what it is.
    """

    def __init__(
        self,
        loop: Steps,
        layer: str | None,
        heard: Sequence[Heard],
        weight: Tensor | None = None,
        expected: Sequence[Tensor] | None = None,
    ) -> None:
        self._loop, self._layer, self._heard = loop, layer, heard
        self._weight, self._expected = weight, expected
        self.sent: list[Tensor] = []
        self.moved: list[Tensor] = []
        self.more: list[Besides] = []

    def sum(self, network: Network, messages: Tensor) -> Tensor:
        return _own_sum(self._loop, network, messages, self._layer)

    def _next(self, network: Network, hard: Tensor, adds_up: bool) -> tuple[Heard, Tensor]:
        """What the actual people sent in this call, and by how much alternatives differ, times weight, by direction."""
        call, sent = len(self.sent), as_words(hard)
        heard = self._heard[call] if call < len(self._heard) else None
        if heard is None or heard.name != network.name or heard.sent.shape != sent.shape:
            raise InputError(
                f"Whether {_speaking(self._loop)} adds up over {network.name} depends on people's state: "
                "no alternative can follow it.",
                "Add up in every step, zeros where nobody sends, or use gradient=fd.",
            )
        if self._expected is not None and not torch.equal(sent, self._expected[call]):
            raise InputError(
                f"What {_speaking(self._loop)} sends over {network.name} depends on other people past the networks: "
                "no alternative can follow it.",
                REMEDY,
            )
        self.sent.append(sent)
        if self._weight is None:
            return heard, torch.zeros(0, dtype=torch.float64)
        # A layer's own differences act within the alternatives.
        more = decode(sent - heard.sent) if network.name != self._layer else torch.zeros_like(hard)
        self.more.append((network, adds_up, more))
        return heard, (self._weight * more[..., None]).movedim(-1, 0)

    def total(self, network: Network, hard: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        heard, moved = self._next(network, hard, adds_up=True)
        self.moved.append(torch.stack([network.add(each) for each in moved]) if moved.numel() else moved)
        words = network.add(self.sent[-1]) if network.name == self._layer else heard.words
        assert words is not None
        return words, decode(words)

    def own(self, network: Network, hard: Tensor, soft: Tensor) -> Tensor:
        heard, moved = self._next(network, hard, adds_up=False)
        self.moved.append(moved)
        # Whoever hears the actual sum takes off the actual own part: nobody meets themselves.
        return hard if network.name == self._layer else decode(heard.sent)


class Tangent:
    """Adds up what the actual people send, with derivatives, those of alternatives among them.

    Args:
        loop: see `Actual`.
        layer: see `Actual`.
        moved: for each call zeros that carry the derivative of what alternatives send besides.
    """

    def __init__(self, loop: Steps, layer: str | None, moved: Sequence[Tensor]) -> None:
        self._loop, self._layer, self._moved = loop, layer, iter(moved)

    def sum(self, network: Network, messages: Tensor) -> Tensor:
        return _own_sum(self._loop, network, messages, self._layer)

    def total(self, network: Network, hard: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        return network.add(as_words(hard)), network.add(soft) + next(self._moved)

    def own(self, network: Network, hard: Tensor, soft: Tensor) -> Tensor:
        return attach(hard, soft + next(self._moved))


def _speaking(loop: Steps) -> str:
    """The protocol that was last shown a step."""
    return loop.model.protocols[loop.viewing].name


def _own_sum(loop: Steps, network: Network, messages: Tensor, layer: str | None) -> Tensor:
    """A sum that a protocol makes itself: alternatives may hear their own household so, and nobody else."""
    if network.name != layer:
        raise InputError(
            f"{_speaking(loop)} adds up over {network.name} by Network.sum, where no derivative can be followed.",
            f"Use step.total({network.name!r}, messages), or gradient=fd.",
        )
    return network.add(messages)


def offers(call: Decision, slope: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What one decision offers: for each of its outcomes, in order, the other one and its weight.

    Args:
        call: the decision.
        slope: derivative of its cumulative chances [directions, outcomes, agents, lanes].

    Returns:
        The outcome in place of the actual one, numbered from 0, the number of outcomes for none [agents, lanes]; its
        weight by direction, 0 where nothing is offered [agents, lanes, directions].
    """
    occupied = call.occupied > 0
    point = (call.word.to(torch.float64) + 0.5) / SCALE
    before, moved = torch.zeros_like(point), torch.zeros_like(slope[:, 0])
    reached = occupied
    found = []
    for k, total in enumerate(call.cumulative):
        left = torch.where(before < 1.0, 1.0 - before, 1.0)
        chance = torch.clamp((total - before) / left, 0.0, 1.0)
        rate = (slope[:, k] - moved + chance * moved) / left
        rate[-1] += chance * (1.0 - chance)
        yes = reached & (call.word < thresholds(total))
        likely = chance > 0.5
        # Its word, given "no" in place of "yes", is uniform in what is left.
        again = total + (point - before) / torch.where(likely, total - before, 1.0) * (1.0 - total)
        outcome = torch.full_like(call.word, len(call.cumulative))
        for later in reversed(range(k + 1, len(call.cumulative))):
            outcome = torch.where(again < call.cumulative[later], later, outcome)
        weight = torch.where(
            likely, -rate / torch.where(likely, chance, 1.0), rate / torch.where(likely, 1.0, 1.0 - chance)
        )
        offered = torch.where(likely, yes, reached & ~yes)
        found.append((torch.where(likely, outcome, k), torch.where(offered, weight, 0.0).movedim(0, -1)))
        reached, before, moved = reached & ~yes, total, slope[:, k]
    return found

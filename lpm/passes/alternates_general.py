"""Cluster alternates for protocols of any kind, in torch: what would have been, had one decision come out otherwise.

The executor of `lpm.kernels.alternates` knows contagions alone. Here nothing is known of a protocol but the two doors
it uses (`doors`): by one it decides, by the other it hears of others. So the same protocols run on two populations in
every step: the actual one, and one made of each household's alternative, with the same random words. For that the two
doors say other things:
1. In the groups of one layer (households; `clusters_of`) an alternative hears its own people. Over every other network
   it hears the actual sum, and what it sends there, less what the actual people send, goes into the sum's derivative
   times the household's weight.
2. Where p ≤ ½, a decision that came out "no" offers "yes" with weight ṗ/(1 − p); where p > ½, one that came out "yes"
   offers "no" with −ṗ/p. Several outcomes are a chain of such decisions. ṗ holds what torch differentiates along the
   actual decisions: parameters, the environment, opened sums, and the continuous state of each agent, which so may feed
   back through any sum.
3. Of what is offered in a household, and its old alternative, one is kept, with a probability in proportion to its
   reference weight (the derivative that raises all odds alike), and its weight divided by that. The step is then taken
   a third time with that one decision reversed.
4. A fourth population, half of it actual and half alternative, shows whether somebody sees others past the networks.

So a model in which people hear of one another in the layer alone has unbiased derivatives, whatever the protocols do;
what crosses households is linear. What can't be right is refused: a protocol that looks at others past the networks, or
that draws random numbers and decides nothing through `sample`.

Source: the weighted alternatives are those of smoothed perturbation analysis (Gong and Ho 1987; Fu and Hu 1997).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.flame.model import Model
from lpm.kernels.alternates import layers_of
from lpm.networks import adding_through
from lpm.passes.doors import REMEDY, SCALE, Actual, Alternative, Besides, Decider, Decision, Tangent, offers
from lpm.passes.plain import Plain
from lpm.passes.steps import Arrays, Rounds, Steps, push, soft, split
from lpm.population.partition import clusters
from lpm.relax import deciding_through
from lpm.rng import Address

__all__ = ["AlternatesGeneral", "Change", "Choice", "clusters_of"]

_CHOICE = 65_535
"""The number of the protocol at whose address the choice between alternatives is drawn: no model has so many."""

_LEAST = 0.01
"""Part of the weight of a change of all parameters in the size of an alternative, for one that the reference says
nothing about."""


def clusters_of(model: Model) -> tuple[NDArray[np.int64], str | None]:
    """The layer that alternatives follow exactly: that of the smallest groups, if there is one.

    Args:
        model: whose local groups without mixing are layers, unless declared `layer=False`.

    Returns:
        The cluster of each agent, from 0; whoever is in no group is one alone [agents]. And the network's name.

    Raises:
        InputError: for a layer with a group too large to be one.
    """
    layers = layers_of(model.networks)[:1]
    label = clusters([model.networks[number] for number in layers], model.population.agents)
    return label, model.networks[layers[0]].name if layers else None


@dataclass(frozen=True)
class _Taken:
    """A step once taken: the carry after it, and what was decided and heard on the way."""

    carry: Arrays
    decider: Decider


@dataclass(frozen=True)
class Choice:
    """What is kept in each cluster.

    Attributes:
        forced: for each decision the outcome that is reversed to, or −1 [agents, lanes].
        flipped: clusters that keep a reversed decision [clusters, lanes].
        old: factor of the weight of the old alternative, 0 in clusters that don't keep it [clusters, lanes].
        offers: of all offers in their order, the factor of the weight of what is offered, 0 where it is not kept
            [agents, lanes].
        weight: of what is kept [clusters, lanes, directions].
    """

    forced: list[Tensor]
    flipped: Tensor
    old: Tensor
    offers: list[Tensor]
    weight: Tensor


@dataclass(frozen=True)
class Change:
    """What a step did, beside the values.

    Attributes:
        before: the carry with which it began.
        sums: opened in it.
        emitted: see `Alternative.more`, of the shared sums.
        sent: the same of local sums.
        old: by how much the outputs of each agent's old alternative differ [O, agents, lanes].
        new: the same of the one that is new.
        weight: of the old alternatives, by cluster [clusters, lanes, directions].
        choice: which alternative goes on.
        path: derivative of the outputs along the actual decisions [directions, O, lanes].
    """

    before: Arrays
    sums: Arrays
    emitted: list[Besides]
    sent: list[Besides]
    old: Tensor
    new: Tensor
    weight: Tensor
    choice: Choice
    path: Tensor


class AlternatesGeneral(Plain):
    """Values, and the weighted alternative of each household beside them, in the same rounds.

    Guarantee: the values are those of a run without derivatives, to the bit.
    """

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        lanes, agents = loop.lanes, loop.model.population.agents
        size = loop.theta.abs()
        self.directions, self.unit = self._directions(torch.where(size > 0, size, 1.0))
        label, self.layer = clusters_of(loop.model)
        self.label = torch.from_numpy(label)
        ids = loop.model.population.numbering.array()
        order = np.lexsort((ids, label))
        self.first = torch.from_numpy(order[np.unique(label[order], return_index=True)[1]])
        self.clusters = self.first.numel()
        self.weight = torch.zeros((self.clusters, lanes, len(self.directions)), dtype=torch.float64)
        self.differs = torch.zeros((self.clusters, lanes), dtype=torch.bool)
        self.alternate: Arrays = {}
        self.tangents: Arrays = {}
        self.recorded: list[Tensor] = []
        self.shape = (agents, lanes)

    def _directions(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Along what derivatives go [directions, lanes, P], and what of each but the last is in a change of all.

        Args:
            unit: of each parameter [lanes, P].
        """
        lanes, count = unit.shape
        # The last direction is the reference: it raises all odds by the same factor, and no parameter.
        each = torch.cat([torch.eye(count, dtype=torch.float64), torch.zeros((1, count), dtype=torch.float64)])
        return each[:, None, :].expand(count + 1, lanes, count).contiguous(), unit

    def _begin(self, theta: Tensor) -> tuple[Arrays, Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """As `_values`, of the start, which has no outputs."""
        decider = Decider(self.loop)
        with deciding_through(decider), adding_through(Actual(self.loop, self.layer)):
            carry = self.loop.start(theta)
        return split(carry)[0], torch.zeros(0), *_chances(decider)

    def _values(
        self, t: int, others: Arrays, theta: Tensor, floats: Arrays, sums: Arrays, moved: Sequence[Tensor]
    ) -> tuple[Arrays, Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """A step of the actual people, with derivatives.

        Args:
            t: the step.
            others: of the carry, what has no derivative.
            theta: [lanes, P].
            floats: of the carry.
            sums: opened.
            moved: zeros that carry the derivative of what alternatives send besides.

        Returns:
            The floating part of the carry after it, the outputs [O, lanes], and of each decision the cumulative
            chances, and who decided by which words.
        """
        decider = Decider(self.loop)
        with deciding_through(decider), adding_through(Tangent(self.loop, self.layer, moved)):
            carry, records = self.loop.advance(t, theta, floats | others, sums)
        return split(carry)[0], self.loop.model.values(records), *_chances(decider)

    def _soft_sums(self, t: int, others: Arrays, theta: Tensor, floats: Arrays, moved: Sequence[Tensor]) -> Arrays:
        """What the actual people send into shared networks, with derivatives; see `_values`."""
        with adding_through(Tangent(self.loop, self.layer, moved)):
            return {key: soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

    def start(self) -> None:
        theta = self.loop.theta
        actual = self._take(lambda: self.loop.start(theta), Actual(self.loop, self.layer))
        self._require_by_agent(actual.carry)
        self.tangents, _, slopes = push(lambda theta: self._begin(theta)[:3], (theta,), (self.directions,))
        nobody = torch.zeros_like(self.differs)
        choice = self._choose(-1, actual.decider.calls, slopes, nobody)
        flipped = self._take(lambda: self.loop.start(theta), Actual(self.loop, self.layer), choice.forced)
        self.carry = actual.carry
        self._keep(choice, actual.carry, flipped.carry)
        self._remember_start(choice)
        self.rounds.see(self.loop.env(self.carry))

    def step(self, t: int) -> Arrays:
        loop, theta, before, layer = self.loop, self.loop.theta, self.carry, self.layer
        other = before | self.alternate
        floats, others = split(before)
        sums, moved, emitted = self._open(t, other)
        differs, weight = self.differs[self.label], self.weight[self.label]

        adder = Actual(loop, layer)
        records: list[Arrays] = []

        def actually() -> Arrays:
            carry, found = loop.advance(t, theta, before, sums)
            records.append(found)
            return carry

        actual = self._take(actually, adder)
        apart = Alternative(loop, layer, adder.heard, weight)
        stepped = self._take(lambda: loop.advance(t, theta, other, sums)[0], apart)
        half = self._half(t)
        mixed = before | _mix(half, self.alternate, before)
        both = Alternative(loop, layer, adder.heard, expected=_sent(half, adder, apart))
        found = self._take(lambda: loop.advance(t, theta, mixed, sums)[0], both)
        self._require_autonomy(found.carry, actual.carry | _mix(half, stepped.carry, actual.carry), stepped.carry)

        nothing = [torch.zeros_like(each[0]) for each in apart.moved]
        self.tangents, path, slopes = push(
            lambda *along: self._values(t, others, *along)[:3],
            (theta, floats, sums, nothing),
            (self.directions, self.tangents, moved, apart.moved),
        )
        choice = self._choose(t, actual.decider.calls, slopes, self._compare(actual.carry, stepped.carry))
        again = Alternative(loop, layer, adder.heard)
        flipped = self._take(lambda: loop.advance(t, theta, before, sums)[0], again, choice.forced)

        own = loop.model.by_agent(before, actual.carry)
        self._require_outputs(own, records[0])
        old = (loop.model.by_agent(other, stepped.carry) - own) * differs
        new = (loop.model.by_agent(before, flipped.carry) - own) * choice.flipped[self.label]
        change = Change(before, sums, emitted, apart.more, old, new, self.weight, choice, path)
        self.carry = actual.carry
        self._keep(choice, stepped.carry, flipped.carry)
        self._remember(change)
        self.rounds.see(loop.env(self.carry))
        return records[0]

    def _remember_start(self, choice: Choice) -> None:
        """Keep what `finish` needs of the start."""

    def _remember(self, change: Change) -> None:
        """Keep what `finish` needs of a step: here the derivative of the outputs."""
        counted = torch.einsum("oal,alp->olp", change.old, change.weight[self.label]) + torch.einsum(
            "oal,alp->olp", change.new, change.choice.weight[self.label]
        )
        self.recorded.append((counted + change.path.permute(1, 2, 0))[..., :-1])

    def _take(self, step: Callable[[], Arrays], adder: Actual | Alternative, forced: Sequence[Tensor] = ()) -> _Taken:
        """A step of one of the populations."""
        decider = Decider(self.loop, forced)
        drawing = self.loop.drawing = set()
        try:
            with deciding_through(decider), adding_through(adder):
                carry = step()
        finally:
            self.loop.drawing = None
        for number in sorted(drawing - decider.decided):
            protocol = self.loop.model.protocols[number]
            if not protocol.by_executor():
                raise InputError(
                    f"{protocol.name} draws random numbers and decides nothing through lpm.relax.sample: "
                    "no alternative can follow it.",
                    "Decide by lpm.relax.sample, or use gradient=fd.",
                )
        return _Taken(carry, decider)

    def _open(self, t: int, other: Arrays) -> tuple[Arrays, Arrays, list[Besides]]:
        """⊕: the step's sums, exact, their derivatives by direction, and what alternatives send into them besides."""
        loop, theta = self.loop, self.loop.theta
        floats, others = split(self.carry)
        adder = Actual(self.loop, self.layer)
        with adding_through(adder):
            summed = loop.emit(t, theta, self.carry)
        if not summed:
            return {}, {}, []
        apart = Alternative(loop, self.layer, adder.heard, self.weight[self.label])
        with adding_through(apart):
            loop.emit(t, theta, other)
        half = self._half(t)
        with adding_through(Alternative(loop, self.layer, adder.heard, expected=_sent(half, adder, apart))):
            loop.emit(t, theta, self.carry | _mix(half, self.alternate, self.carry))

        nothing = [torch.zeros_like(each[0]) for each in apart.moved]
        pushed = push(
            lambda *along: self._soft_sums(t, others, *along),
            (theta, floats, nothing),
            (self.directions, self.tangents, apart.moved),
        )
        return *self.open_along(t, summed, pushed), apart.more

    # ---- which alternative is kept

    def _choose(self, t: int, calls: Sequence[Decision], slopes: Sequence[Tensor], old: Tensor) -> Choice:
        """Keep one of what is offered in each cluster.

        Args:
            t: the step.
            calls: the actual decisions.
            slopes: derivatives of their cumulative chances [directions, outcomes, agents, lanes].
            old: where the old alternative still differs [clusters, lanes].
        """
        offered = [
            (number, *offer)
            for number, (call, slope) in enumerate(zip(calls, slopes, strict=True))
            for offer in offers(call, slope)
        ]
        address = Address(self.loop.seeds[0], t, _CHOICE, self.loop.model.population.numbering)
        words = torch.from_numpy(address.words(0, 2 * len(offered) + 2).astype(np.float64))
        size = torch.where(old, self._size(self.weight), 0.0)
        best = key = _race(size, words[:2, self.first])
        total = size
        sizes = [self._size(weight) for _, _, weight in offered]
        keys = [_race(each, words[2 * k + 2 : 2 * k + 4]) for k, each in enumerate(sizes)]
        where = self.label[:, None].expand(self.shape)
        for each, mine in zip(sizes, keys, strict=True):
            total = total.index_add(0, self.label, each)
            best = best.scatter_reduce(0, where, mine, "amax")
        keeps = (key > 0) & (key == best)
        stays = torch.where(keeps, total / torch.where(size > 0, size, 1.0), 0.0)
        weight = stays[..., None] * self.weight
        factors = []
        forced = [torch.full(self.shape, -1, dtype=torch.int64) for _ in calls]
        flipped = torch.zeros_like(old)
        for (number, outcome, by_agent), each, mine in zip(offered, sizes, keys, strict=True):
            wins = (mine > 0) & (mine == best[self.label]) & ~keeps[self.label]
            forced[number] = torch.where(wins, outcome, forced[number])
            factor = torch.where(wins, total[self.label] / torch.where(each > 0, each, 1.0), 0.0)
            factors.append(factor)
            weight = weight.index_add(0, self.label, factor[..., None] * by_agent)
            flipped = flipped | torch.zeros_like(size).index_add(0, self.label, wins.to(torch.float64)).to(torch.bool)
        return Choice(forced, flipped, stays, factors, weight)

    def _size(self, weight: Tensor) -> Tensor:
        """How likely an alternative is to be kept [..., lanes, directions] → [..., lanes]."""
        return weight[..., -1].abs() + _LEAST * (weight[..., :-1] * self.unit).sum(-1).abs()

    def _keep(self, choice: Choice, old: Arrays, flipped: Arrays) -> None:
        """Take the kept alternatives into the next step."""
        keeps, reversed_ = choice.old[self.label] > 0, choice.flipped[self.label]
        self.alternate = {
            key: torch.where(_like(reversed_, value), flipped[key], torch.where(_like(keeps, value), old[key], value))
            for key, value in self.carry.items()
            if key.startswith("state:")
        }
        self.differs = self._compare(self.carry, self.alternate)
        self.weight = choice.weight * self.differs[..., None]

    def _compare(self, actual: Arrays, alternate: Arrays) -> Tensor:
        """Clusters whose alternative differs in anything [clusters, lanes]."""
        apart = torch.zeros((self.clusters, self.shape[1]), dtype=torch.float64)
        for key, value in actual.items():
            if key.startswith("state:"):
                unlike = (value != alternate[key]).reshape(*self.shape, -1).any(-1)
                apart = apart.index_add(0, self.label, unlike.to(torch.float64))
        return apart > 0

    # ---- what can't be followed

    def _require_by_agent(self, carry: Arrays) -> None:
        for key, value in carry.items():
            if key.startswith("state:") and tuple(value.shape[:2]) != self.shape:
                name = key.removeprefix("state:").partition(".")[0]
                raise InputError(
                    f"The state {key[6:]} has shape {tuple(value.shape)}, not [agents, lanes, …]: "
                    f"no alternative of {name} can be kept.",
                    "Keep state by agent and lane, or use gradient=fd.",
                )

    def _half(self, t: int) -> Tensor:
        """Every other cluster [agents, 1]."""
        return (self.label % 2 == t % 2)[:, None]

    def _require_autonomy(self, found: Arrays, expected: Arrays, stepped: Arrays) -> None:
        """Refuse a protocol that looks at others past the networks.

        Args:
            found: the carry after a step of a population in which every other cluster is its alternative.
            expected: half of the alternatives' carry after their own step, half of the actual people's.
            stepped: the alternatives' carry after their own step, whose environment must be the actual one.
        """
        for key, value in expected.items():
            if not torch.equal(value, found[key]) or (key.startswith("env:") and not torch.equal(value, stepped[key])):
                raise InputError(
                    f"{key.partition(':')[2]} depends on other people past the networks: no alternative can follow it.",
                    REMEDY,
                )

    def _require_outputs(self, own: Tensor, records: Arrays) -> None:
        """Refuse outputs that don't follow from who is in which stage before and after a step."""
        found, told = own.sum(1), self.loop.model.values(records)
        wrong = ((found - told).abs() > 1e-9 * (1.0 + told.abs())).any(-1)
        if bool(wrong.any()):
            name = list(self.loop.model.recorded)[int(torch.nonzero(wrong)[0])]
            raise InputError(
                f"The output {name} does not follow from people's stages before and after a step: "
                "no alternative can be compared in it.",
                "Use gradient=fd.",
            )

    # ---- checkpoints

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return self._followed() | {"recorded": torch.stack(self.recorded).numpy()}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._follow_on(found)
        self.recorded = list(torch.from_numpy(found["recorded"].copy()))

    def _followed(self) -> dict[str, NDArray[Any]]:
        """The actual people and their alternatives, for a checkpoint."""
        return (
            super().snapshot()
            | {f"tangent:{key}": value.numpy() for key, value in self.tangents.items()}
            | {f"alternate:{key}": value.numpy() for key, value in self.alternate.items()}
            | {"alternate:weight": self.weight[self.label].numpy()}
        )

    def _follow_on(self, found: Mapping[str, Any]) -> None:
        """Go on with those of a checkpoint."""
        super().restore(found)
        self.tangents = {key[8:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("tangent:")}
        kept = {key[10:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("alternate:")}
        self.weight = kept.pop("weight")[self.first]
        self.alternate = kept
        self.differs = self._compare(self.carry, self.alternate)

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        return {"tangents": torch.stack(self.recorded).numpy()}


def _chances(decider: Decider) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Of each decision the cumulative chances; and who decided by which words."""
    return [call.cumulative for call in decider.calls], [(call.occupied, call.word) for call in decider.calls]


def _race(size: Tensor, words: Tensor) -> Tensor:
    """Keys of candidates, of which the largest wins with probability ∝ size; 0 for a size of 0.

    Args:
        size: [X, lanes].
        words: two 32-bit words of each [2, X].
    """
    point = torch.clamp((words[0] + (words[1] + 0.5) / SCALE) / SCALE, max=1.0 - 2.0**-53)
    return size / -torch.log(point)[:, None]


def _mix(half: Tensor, first: Arrays, second: Arrays) -> Arrays:
    """The state of one population for some agents [agents, 1], and of another for the rest."""
    return {
        key: torch.where(_like(half, value), first[key], value)
        for key, value in second.items()
        if key.startswith("state:")
    }


def _sent(half: Tensor, actual: Actual, apart: Alternative) -> list[Tensor]:
    """What people must send, call by call, if some are their alternatives [agents, 1]."""
    return [torch.where(half, other, heard.sent) for heard, other in zip(actual.heard, apart.sent, strict=True)]


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """A mask of agents and lanes, for an array with more axes."""
    return mask.reshape(*mask.shape, *[1] * (value.dim() - 2))

"""A model: people, networks and an ordered composition of protocols, with the outputs to be recorded (paper, eq. 3)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpm import ring
from lpm.errors import InputError
from lpm.flame.contagion import Contagion
from lpm.flame.protocol import Protocol
from lpm.networks import Edges, Network
from lpm.parameters import Parameter
from lpm.population.people import Population

__all__ = ["Model", "Output", "count", "flow"]


@dataclass(frozen=True, eq=False)
class Output:
    """A number recorded each step, as a weighted sum of a contagion's records: use `flow` or `count`.

    Attributes:
        kind: "flow" or "count".
        what: `P -> I`, or stages `E I`.
        thin: weight of each class [C], or one number.
        protocol: the contagion's name; the only one by default.
        unit: for tables and axes.
    """

    kind: str
    what: str
    thin: ArrayLike = 1.0
    protocol: str | None = None
    unit: str = "people"


def flow(what: str, thin: ArrayLike = 1.0, protocol: str | None = None, unit: str = "people/day") -> Output:
    """People who make a transition such as `P -> I` in a step.

    Args:
        what: the transition, between whole stages.
        thin: weight of each class [C]: with probabilities it gives the expected number of those who go on to something
            else (an admission), without the noise of drawing it.
        protocol: which contagion, where there are several.
        unit: for tables and axes.
    """
    return Output("flow", what, thin, protocol, unit)


def count(what: str, thin: ArrayLike = 1.0, protocol: str | None = None, unit: str = "people") -> Output:
    """People in one of the stages (such as `E I`) after a step; see `flow`."""
    return Output("count", what, thin, protocol, unit)


@dataclass(frozen=True, eq=False)
class Model:
    """A composition of protocols over one shard of people.

    Args:
        population: the shard's people.
        networks: where they meet.
        protocols: in order of composition.
        outputs: name → `flow` or `count`; opened as sums over all shards.
        private_outputs: the same, but for this shard alone: never opened.
        start: date of step 0.
        class_counts: population attribute → number of classes, where a shard may not hold the last ones.

    Raises:
        InputError: naming the network, protocol or output that does not fit.
    """

    population: Population
    networks: Sequence[Network]
    protocols: Sequence[Protocol]
    outputs: Mapping[str, Output] = field(default_factory=dict)
    private_outputs: Mapping[str, Output] = field(default_factory=dict)
    start: dt.date | None = None
    class_counts: Mapping[str, int] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.start is not None:
            object.__setattr__(self, "start", _date(self.start))
        for kind, names in (
            ("network", [n.name for n in self.networks]),
            ("protocol", [p.name for p in self.protocols]),
            ("output", [*self.outputs, *self.private_outputs]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InputError(f"The {kind} {twice[0]} appears twice.")
        # Pairs name the last agent who has any; whoever comes after has none.
        everybody = [
            replace(n, agents_in_all=max(n.agents, self.population.agents))
            if isinstance(n, Edges) and n.agents_in_all is None
            else n
            for n in self.networks
        ]
        object.__setattr__(self, "networks", everybody)
        for network in self.networks:
            if network.agents != self.population.agents:
                raise InputError(
                    f"The network {network.name} was made for {network.agents} agents, not {self.population.agents}."
                )
        found: dict[str, Parameter] = {}
        for protocol in self.protocols:
            for expression in protocol.expressions():
                for leaf in expression.leaves():
                    if isinstance(leaf, Parameter) and found.setdefault(leaf.name, leaf) != leaf:
                        raise InputError(f"The parameter {leaf.name} is declared twice, differently.")
        object.__setattr__(self, "parameters", tuple(found.values()))
        for protocol in self.protocols:
            protocol.prepare(self)
        object.__setattr__(
            self, "_readers", {name: _Reader(self, name, output) for name, output in self.recorded.items()}
        )

    @property
    def recorded(self) -> dict[str, Output]:
        """All outputs, public ones first."""
        return {**self.outputs, **self.private_outputs}

    def without(self, ids: NDArray[np.uint64]) -> Model:
        """The model of those who stay when some people are left out, as if they had never been there.

        Args:
            ids: of the people to leave out; ids of nobody here are passed over.

        Guarantee: nobody else's random numbers change, since they are addressed by id.
        """
        stay = ~np.isin(self.population.addresses, ids)
        return self if stay.all() else self.shard(np.flatnonzero(stay))

    def shard(self, positions: NDArray[np.int64]) -> Model:
        """The same model of some of its agents.

        Args:
            positions: which, ascending.
        """
        counted = {
            name: self.class_count(name)
            for name, values in self.population.attributes.items()
            if np.issubdtype(np.asarray(values).dtype, np.integer) and np.asarray(values).min(initial=0) >= 0
        }
        return replace(
            self,
            population=self.population.shard(positions),
            networks=[network.shard(positions) for network in self.networks],
            protocols=[protocol.shard(positions) for protocol in self.protocols],
            class_counts={**counted, **self.class_counts},
        )

    def network(self, name: str) -> Network:
        """A network by name."""
        for network in self.networks:
            if network.name == name:
                return network
        raise InputError(
            f"There is no network {name!r}: there are {', '.join(n.name for n in self.networks) or 'none'}."
        )

    def protocol(self, name: str) -> Protocol:
        """A protocol by name."""
        for protocol in self.protocols:
            if protocol.name == name:
                return protocol
        raise InputError(
            f"There is no protocol {name!r}: there are {', '.join(p.name for p in self.protocols) or 'none'}."
        )

    def class_count(self, attribute: str) -> int:
        """How many classes an attribute has."""
        values = np.asarray(self.population.attributes[attribute])
        whole = values.dtype.kind in "iub" or (
            values.dtype.kind == "f" and bool(np.all(np.isfinite(values) & (values == np.rint(values))))
        )
        if not whole:
            raise InputError(f"A class of {attribute} is not a whole number: classes are whole numbers from 0.")
        seen = int(values.max(initial=-1)) + 1
        declared = self.class_counts.get(attribute, seen)
        if values.size and (values.min() < 0 or seen > declared):
            raise InputError(f"A class of {attribute} is out of range: from 0 to {declared - 1}.")
        return declared

    def read(self, records: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """Outputs of one step: exact words of this shard [outputs, lanes]."""
        readers: Mapping[str, _Reader] = self._readers  # type: ignore[attr-defined]
        return torch.stack([reader.read(records) for reader in readers.values()]).numpy()

    def require_whole_agents(self, output: str) -> None:
        """Refuse an output whose sum does not say how many agents it is of.

        Raises:
            InputError: if it weighs some class by anything but 0 or 1.
        """
        if not np.isin(np.asarray(self.recorded[output].thin, dtype=np.float64), (0.0, 1.0)).all():
            raise InputError(
                f"The output {output} weighs people by class, so that nobody knows how many stand behind a sum: it "
                "can't be told above a threshold only.",
                "Take it out of federation.thresholds, or record a flow or count without thin.",
            )

    def agents_behind(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many agents make up words of an output that counts whole agents [any shape]."""
        return words // ring.encode(self.population.weight)

    def by_agent(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        """Each agent's own part of the outputs of one step.

        Args:
            before: the carry at the start of the step, with stages one-hot as the reference executor keeps them.
            after: the same at its end.

        Returns:
            [outputs, agents, lanes]; their sum over agents is what `read` gives.
        """
        readers: Mapping[str, _Reader] = self._readers  # type: ignore[attr-defined]
        return torch.stack([reader.by_agent(before, after) for reader in readers.values()])

    def values(self, records: Mapping[str, Tensor]) -> Tensor:
        """The same outputs as differentiable numbers, for the derivative that records have [outputs, lanes]."""
        readers: Mapping[str, _Reader] = self._readers  # type: ignore[attr-defined]
        return torch.stack([reader.soft(records) for reader in readers.values()])


def _date(value: Any) -> dt.date:
    try:
        known = isinstance(value, str | dt.date | np.datetime64)
        date: object = np.array(value, dtype="datetime64[D]").item() if known else None
    except ValueError:
        date = None
    if not isinstance(date, dt.date):
        raise InputError(f"The start of the model is {value!r}: a date, as in 2020-03-22.")
    return date


class _Reader:
    """An output, compiled: which rows of which record, with which weights."""

    def __init__(self, model: Model, name: str, output: Output) -> None:
        contagions = [p for p in model.protocols if isinstance(p, Contagion)]
        chosen = [p for p in contagions if output.protocol in (None, p.name)]
        if len(chosen) != 1:
            raise InputError(
                f"The output {name} needs one contagion: give protocol= one of "
                f"{', '.join(p.name for p in contagions) or 'none'}."
            )
        contagion = chosen[0]
        spec = contagion.spec
        if output.kind == "flow":
            source, target = contagion.arrow(output.what)
            pairs = [(a, b) for a in contagion.stage(source) for b in contagion.stage(target)]
            self.rows = [k for k, edge in enumerate(spec.edges) if edge in pairs]
            if not self.rows:
                raise InputError(f"The output {name} asks for {output.what}, which {contagion.name} never does.")
        else:
            self.rows = [sub for stage in output.what.split() for sub in contagion.stage(stage)]
        thin = np.asarray(output.thin, dtype=np.float64)
        if thin.shape not in ((), (spec.class_count,)):
            raise InputError(f"thin of the output {name} has shape {thin.shape}: one number, or {spec.class_count}.")
        weights = np.broadcast_to(thin, (spec.class_count,)) * model.population.weight
        ring.require_headroom(f"the output {name}", model.population.agents, float(np.abs(weights).max(initial=0.0)))
        self.key = f"{contagion.name}.{output.kind}"
        self.state = f"state:{contagion.name}.stage"
        self.arrows = [spec.edges[row] for row in self.rows] if output.kind == "flow" else []
        self.spec, self.by_class = spec, weights
        # In a shard of many institutions, an output that is one's own looks at its few classes alone.
        counted = np.flatnonzero(weights)
        few = counted.size < weights.size
        self.at = (np.array(self.rows)[:, None], counted[None, :]) if few else self.rows
        weights = weights[counted] if few else weights
        self.words = torch.from_numpy(ring.encode(weights))[:, None]
        self.weights = torch.from_numpy(weights.copy())[:, None]

    @cached_property
    def of_agent(self) -> Tensor:
        """Weight of each agent, which only derivatives agent by agent need: 8 bytes each [agents, 1]."""
        return torch.from_numpy(self.by_class[self.spec.classes].copy())[:, None]

    def by_agent(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        old, new = before[self.state], after[self.state]
        if self.arrows:
            # One decision a step: who was in the one and is in the other has made the transition.
            return self.of_agent * torch.stack([old[..., a] * new[..., b] for a, b in self.arrows]).sum(0)
        return self.of_agent * new[..., self.rows].sum(-1)

    def soft(self, records: Mapping[str, Tensor]) -> Tensor:
        return (records[self.key][self.at].sum(0).to(torch.float64) * self.weights).sum(0)

    def read(self, records: Mapping[str, Tensor]) -> Tensor:
        people = records[self.key][self.at].sum(0)
        return (people.detach().to(torch.int64) * self.words).sum(0)

"""Contact transmission: a disease (or a rumour) that spreads over networks and runs its course in each agent.

Stage graph, infectivity, susceptibility and networks are declared; the executors of `lpm.kernels` run the declaration.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.flame.protocol import Change, Protocol, Step
from lpm.kernels.spec import Executor, Spec, Summed, Tables
from lpm.parameters import Constant, Driver, Expression, expression
from lpm.relax import one_minus_exp

if TYPE_CHECKING:
    from lpm.flame.model import Model

__all__ = ["Attribute", "Contagion", "Leave", "leave"]


@dataclass(frozen=True, eq=False)
class Leave:
    """How agents leave a stage: use `leave`."""

    kind: str
    value: Expression
    to: Mapping[str, NDArray[np.float64] | None] | None


def leave(
    *,
    rate: Expression | float | None = None,
    probability: Expression | float | None = None,
    mean_days: Expression | float | None = None,
    to: Mapping[str, ArrayLike | None] | None = None,
) -> Leave:
    """How agents leave a stage, of k Erlang sub-stages.

    Args:
        rate: 1/day; each sub-stage is left with probability 1 − e^(−k·rate) a day.
        probability: of leaving a sub-stage, a day.
        mean_days: mean stay in the whole stage; each sub-stage is left with probability k/mean_days a day.
        to: target → share of those leaving, one number or one per class [C]; None for the rest, which comes last.

    Raises:
        InputError: unless exactly one of the first three is given.
    """
    given = [
        (kind, value)
        for kind, value in (("rate", rate), ("probability", probability), ("mean_days", mean_days))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError("leave takes exactly one of rate, probability and mean_days.")
    kind, value = given[0]
    shares = None if to is None else {target: _share(target, share) for target, share in to.items()}
    if shares is not None and sum(share is None for share in shares.values()) > 1:
        raise InputError("Only one target of leave can take the rest (None).")
    return Leave(kind, expression(value), shares)


def _number(value: Any) -> float:
    """A single number, or NaN for anything else."""
    return float(value) if isinstance(value, SupportsFloat) and not getattr(value, "ndim", 0) else math.nan


def _share(target: str, share: ArrayLike | None) -> NDArray[np.float64] | None:
    try:
        return None if share is None else np.asarray(share, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"The share of those who leave to {target} is {share!r}: a number, one per class, or None."
        ) from None


@dataclass(frozen=True, eq=False)
class Attribute:
    """An array of another protocol, seen through a function.

    Args:
        key: "protocol.array", one number per agent and lane.
        through: element-wise, with + − × ÷ alone where bits matter.
    """

    key: str
    through: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(eq=False)
class Contagion(Protocol):
    """A contagion over networks.

    Args:
        stages: names in order; `E*2` makes two Erlang sub-stages. New agents start in the first.
        infection: `S -> E`, or {`S -> E`: 1.0, `V -> E`: 0.2} with relative susceptibilities.
        infectious: stage → infectivity, or {network: infectivity} where networks differ.
        over: network → hazard (1/day) for one unit of infectious pressure. Pressure is the group's infectivity sum,
            divided by its people where the network normalises by size.
        progression: stage → `leave(...)`, or `I -> R` → rate (1/day) or `leave(...)`.
        initial: stage → expected share of agents (drawn), or an integer array of the agents' positions.
        susceptibility: one number per class [C].
        classes: population attribute with the class of each agent, for tables and records; one class by default.
        infectivity: relative infectivity of each agent, from another protocol's array.
        name: in state, records and outputs.

    Raises:
        InputError: naming the stage, network or table that does not fit.

    Source: paper, eq. 1 and section 3.2; the tangent of the conditional expectation is that of `lpm.relax`.
    """

    stages: str
    infection: str | Mapping[str, float]
    infectious: Mapping[str, float | Mapping[str, float]]
    over: Mapping[str, Expression | float]
    progression: Mapping[str, Leave | Expression | float] = field(default_factory=dict)
    initial: Mapping[str, Expression | float | ArrayLike] = field(default_factory=dict)
    susceptibility: ArrayLike = 1.0
    classes: str | None = None
    infectivity: Attribute | None = None
    name: str = "contagion"
    spec: Spec = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._parts: dict[str, list[int]] = {}
        names: list[str] = []
        for token in self.stages.split():
            match = re.fullmatch(r"([A-Za-z_]\w*)(?:\*([1-9]\d*))?", token)
            if not match or match.group(1) in self._parts:
                raise InputError(
                    f"The stage {token!r} of {self.name} is a new name, or a name with sub-stages as in E*2."
                )
            parts = int(match.group(2) or 1)
            self._parts[match.group(1)] = list(range(len(names), len(names) + parts))
            names += [match.group(1) if parts == 1 else f"{match.group(1)}.{k + 1}" for k in range(parts)]
        self._sub = tuple(names)
        if not names or len(names) > 100:
            raise InputError(f"{self.name} has {len(names)} stages: from 1 to 100.")
        self._over = {network: expression(value) for network, value in self.over.items()}
        self._infections = {self.infection: 1.0} if isinstance(self.infection, str) else dict(self.infection)
        self._leaves = dict(self._read_progression())
        self._initial = {stage: self._read_initial(stage, value) for stage, value in self.initial.items()}
        positions = [value for value in self._initial.values() if isinstance(value, np.ndarray)]
        if positions and np.unique(np.concatenate(positions)).size < sum(value.size for value in positions):
            raise InputError(f"An initial agent of {self.name} is named twice: once, in one stage.")

    def stage(self, name: str) -> list[int]:
        """The sub-stages of a stage.

        Raises:
            InputError: naming the stages there are.
        """
        if name not in self._parts:
            raise InputError(f"{self.name} has no stage {name!r}: there are {', '.join(self._parts)}.")
        return self._parts[name]

    def arrow(self, text: str) -> tuple[str, str]:
        """Read `A -> B`, both being stages."""
        source, separator, target = (part.strip() for part in text.partition("->"))
        if not separator:
            raise InputError(f"{text!r} of {self.name} is a transition as in 'I -> R'.")
        self.stage(source)
        self.stage(target)
        return source, target

    def _read_initial(self, stage: str, value: Expression | float | ArrayLike) -> Expression | NDArray[np.int64]:
        if isinstance(value, np.ndarray | Sequence) and not isinstance(value, str):
            positions = np.asarray(value)
            if positions.ndim != 1 or (positions.size and not np.issubdtype(positions.dtype, np.integer)):
                raise InputError(f"The initial agents of {stage} of {self.name} are a list of whole numbers.")
            return positions.astype(np.int64)
        share = expression(value)  # type: ignore[arg-type]
        if isinstance(share, Constant) and not 0 <= share.value <= 1:
            raise InputError(f"The initial share of {stage} of {self.name} is {share.value}: a number from 0 to 1.")
        return share

    def _read_progression(self) -> Iterator[tuple[str, Leave]]:
        seen: set[str] = set()
        for key, value in self.progression.items():
            source, target = self.arrow(key) if "->" in key else (key.strip(), None)
            self.stage(source)
            how = value if isinstance(value, Leave) else leave(rate=value)
            if (how.to is None) == (target is None):
                raise InputError(
                    f"The progression {key!r} of {self.name} names its target once: in the arrow, or by `to`."
                )
            if source in seen:
                raise InputError(f"{self.name} leaves {source} twice: give one `leave` with all its targets.")
            seen.add(source)
            to = how.to if target is None else {target: None}
            assert to is not None
            for name in to:
                self.stage(name)
            if source in to:
                raise InputError(f"{self.name} leaves {source} for {source}: for another stage.")
            yield source, Leave(how.kind, how.value, to)

    def expressions(self) -> Iterable[Expression]:
        yield from self._over.values()
        yield from (how.value for how in self._leaves.values())
        yield from (value for value in self._initial.values() if isinstance(value, Expression))

    def networks(self) -> tuple[str, ...]:
        return tuple(self._over)

    def fused(self) -> bool:
        # Whoever can be infected while infectious feels the own group less the own part: the reference alone does that.
        catching = [self.stage(self.arrow(text)[0]) for text in self._infections]
        speaking = {sub for name in self.infectious for sub in self.stage(name)}
        return self.infectivity is None and not any(speaking & set(subs) for subs in catching)

    def by_executor(self) -> bool:
        # Unless a subclass does something of its own.
        return all(getattr(type(self), name) is getattr(Contagion, name) for name in ("start", "emit", "transition"))

    def least_memory(self, executor: Executor) -> int:
        return executor.least_memory(self.spec)

    def shard(self, positions: NDArray[np.int64]) -> Contagion:
        initial: dict[str, Expression | float | ArrayLike] = {}
        for stage, value in self._initial.items():
            if isinstance(value, Expression):
                initial[stage] = value
            else:
                initial[stage] = np.flatnonzero(np.isin(positions, value))
        return replace(self, initial=initial)

    # ---- compile

    def prepare(self, model: Model) -> None:
        networks = tuple(model.network(name) for name in self._over)
        people = model.population
        if self.classes is None:
            classes, count = np.empty(0, dtype=np.int16), 1
        else:
            if self.classes not in people.attributes:
                raise InputError(f"The population has no attribute {self.classes}, the classes of {self.name}.")
            count = model.class_count(self.classes)
            if count > 2**15:
                raise InputError(f"{self.name} has {count} classes: at most {2**15}.")
            classes = np.asarray(people.attributes[self.classes]).astype(np.int16)
        susceptibility = self._table(self.susceptibility, count, "susceptibility")

        edges: list[tuple[int, int]] = []

        def edge(source: int, target: int) -> int:
            if (source, target) not in edges:
                edges.append((source, target))
            return edges.index((source, target))

        infection: dict[int, tuple[int, float]] = {}
        for text, relative in self._infections.items():
            source, target = self.arrow(text)
            if source == target:
                raise InputError(f"The infection {text!r} of {self.name} leads back to {source}: to another stage.")
            if self.stage(source)[0] in infection:
                raise InputError(
                    f"{self.name} infects {source} twice: one arrow for each stage.",
                    "Let a stage of those infected, left at once, have the outcomes.",
                )
            if not 0 <= _number(relative) < math.inf:
                raise InputError(
                    f"The relative susceptibility of {text!r} of {self.name} is {relative}: a finite number from 0."
                )
            for sub in self.stage(source):
                infection[sub] = (edge(sub, self.stage(target)[0]), float(relative))
        exits: dict[int, tuple[int, ...]] = {}
        for source, how in self._leaves.items():
            parts = self.stage(source)
            for sub, following in itertools.pairwise(parts):
                exits[sub] = (edge(sub, following),)
            assert how.to is not None
            exits[parts[-1]] = tuple(edge(parts[-1], self.stage(target)[0]) for target in _rest_last(how.to))
        for sub in set(infection) & set(exits):
            raise InputError(f"{self._sub[sub]} of {self.name} can be infected and leaves by itself: split the stage.")

        infectivity = np.zeros((len(networks), len(self._sub)))
        for name, value in self.infectious.items():
            for k, network in enumerate(networks):
                weight = value.get(network.name, value.get("default", 0.0)) if isinstance(value, Mapping) else value
                if not 0 <= _number(weight) <= 2**20:
                    raise InputError(f"The infectivity of {name} is {weight}: a number from 0 to {2**20}.")
                infectivity[k, self.stage(name)] = weight
            if isinstance(value, Mapping):
                unknown = set(value) - set(self._over) - {"default"}
                if unknown:
                    raise InputError(
                        f"{self.name} does not spread over {', '.join(sorted(unknown))}, where {name} is infectious."
                    )
        self._splits = {source: self._read_split(source, how, count) for source, how in self._leaves.items()}
        leaves = itertools.chain.from_iterable(how.value.leaves() for how in self._leaves.values())
        self._steady = not any(isinstance(leaf, Driver) for leaf in leaves)
        self.spec = Spec(
            self._sub,
            people.agents,
            classes,
            count,
            tuple(edges),
            infection,
            exits,
            susceptibility,
            networks,
            infectivity,
        )

    def _table(self, values: ArrayLike, count: int, what: str) -> NDArray[np.float64]:
        try:
            table = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(f"The {what} of {self.name} is {values!r}: one number from 0, or one per class.") from None
        if table.shape not in ((), (count,)) or not np.all(np.isfinite(table)) or np.any(table < 0):
            raise InputError(
                f"The {what} of {self.name} has shape {table.shape}: one number from 0, or one per class ({count})."
            )
        return np.broadcast_to(table, (count,)).copy()

    def _read_split(self, source: str, how: Leave, count: int) -> list[NDArray[np.float64]]:
        """Cumulative shares by outcome, the rest last; they must reach one in every class."""
        assert how.to is not None
        running, shares = np.zeros(count), []
        for target in _rest_last(how.to):
            share = how.to[target]
            running = (
                np.ones(count) if share is None else running + self._table(share, count, f"share {source} -> {target}")
            )
            shares.append(running)
        if np.any(np.abs(running - 1.0) > 1e-9) or any(np.any(s > 1.0 + 1e-9) for s in shares):
            raise InputError(
                f"The shares of those who leave {source} of {self.name} don't sum to 1 in every class.",
                "Give None to one target to let it take the rest.",
            )
        shares[-1] = np.ones(count)
        return [np.minimum(s, 1.0) for s in shares]

    # ---- run

    def start(self, step: Step) -> Change:
        cumulative: dict[int, Tensor] = {}
        fixed: dict[int, NDArray[np.int64]] = {}
        total: Tensor = torch.zeros((), dtype=torch.float64)
        for stage, value in self._initial.items():
            if isinstance(value, Expression):
                total = total + torch.clamp(step.value(value), min=0.0)
                cumulative[self.stage(stage)[0]] = total
            else:
                if value.size and (value.min() < 0 or value.max() >= step.model.population.agents):
                    raise InputError(
                        f"An initial agent of {stage} is out of range: 0 to {step.model.population.agents - 1}."
                    )
                fixed[self.stage(stage)[0]] = value
        if bool((total.detach() > 1.0).any()):
            raise InputError(f"The initial shares of {self.name} sum to more than 1.")
        state = step.executor.start(self.spec, cumulative, fixed, step.address, step.lanes)
        return Change(state=state)

    def emit(self, step: Step, network: str) -> Summed:
        number = list(self._over).index(network)
        return step.executor.emit(self.spec, step.arrays(self.name), self._tables(step, full=False), number)

    def most(self, network: str) -> float:
        if self.infectivity is not None:
            return math.inf  # another protocol sets it
        return float(self.spec.infectivity[list(self._over).index(network)].max(initial=0.0))

    def transition(self, step: Step, action: Any) -> Change:
        shared = {
            network.name: step.sums[f"{self.name}/{network.name}"] for network in self.spec.networks if network.shared
        }
        state, flows, counts = step.executor.advance(
            self.spec, step.arrays(self.name), self._tables(step, full=True), shared
        )
        return Change(state=state, records={f"{self.name}.flow": flows, f"{self.name}.count": counts})

    def _tables(self, step: Step, *, full: bool) -> Tables:
        relative = None
        if self.infectivity is not None:
            relative = self.infectivity.through(step.state[self.infectivity.key])
        if not full:
            return Tables({}, {}, {}, step.address, relative)
        factors = {name: step.value(value) for name, value in self._over.items()}
        for name in factors:
            # Where torch differentiates, a product with a constant costs hundreds of microseconds.
            scale = step.env.get(f"scale/{name}")
            if scale is not None:
                factors[name] = factors[name] * scale
        sizes = {
            network.name: step.sizes[network.name] if network.normalise == "size" else None
            for network in self.spec.networks
        }
        return Tables(self._exits(step), factors, sizes, step.address, relative)

    def _exits(self, step: Step) -> Mapping[int, tuple[Tensor, ...]]:
        """Cumulative probabilities of the exits of each sub-stage; the same object each day if no driver moves them."""
        settled = step.settled if self._steady else None
        if settled is not None and self.name in settled:
            found: Mapping[int, tuple[Tensor, ...]] = settled[self.name]
            return found
        cumulative: dict[int, tuple[Tensor, ...]] = {}
        for source, how in self._leaves.items():
            parts = self.stage(source)
            value = step.value(how.value)
            chance = _chance(how.kind, value, len(parts))
            if bool(((chance.detach() < 0) | (chance.detach() > 1) | torch.isnan(chance.detach())).any()):
                raise InputError(
                    f"Agents leave {source} of {self.name} with a probability outside 0 to 1 a day.",
                    "Raise its mean stay, or use fewer sub-stages.",
                )
            chance = chance.expand(step.lanes)[None, :]
            for sub in parts[:-1]:
                cumulative[sub] = (chance,)
            cumulative[parts[-1]] = tuple(chance * torch.from_numpy(share)[:, None] for share in self._splits[source])
        if settled is not None:
            settled[self.name] = cumulative
        return cumulative

    def occupancy(self, step: Step, stages: str) -> Tensor:
        """1 where an agent is in one of the stages, else 0 [agents, lanes]."""
        subs = [sub for name in stages.split() for sub in self.stage(name)]
        return step.executor.occupancy(self.spec, step.arrays(self.name))[..., subs].sum(-1)


def _rest_last(to: Mapping[str, Any]) -> list[str]:
    return sorted(to, key=lambda target: to[target] is None)


def _chance(kind: str, value: Tensor, parts: int) -> Tensor:
    """Daily probability of leaving one of the sub-stages."""
    if kind == "rate":
        return one_minus_exp(value * parts)
    return value if kind == "probability" else parts / value

"""Derivatives that the executor of contagions carries beside the values, forwards through a run (paper, eq. 8).

For the hot state the executor carries what the estimator needs: tangents of each agent (`lpm.kernels.tangents`), or
cluster alternates (`lpm.kernels.alternates`). What is replicated at every party (expressions, drivers, events, learned
networks, the environment) has true tangents: a probe in place of the executor shows what a contagion is told in a step,
and torch differentiates that by the parameters. Sums of shared networks carry P tangents, and for alternates their
reference, in the same round as the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import Protocol as Contract

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpm.errors import InputError
from lpm.flame.contagion import Contagion
from lpm.flame.dynamics import Dynamics
from lpm.flame.model import Model
from lpm.kernels.spec import Executor, Slopes, Spec, Summed, Tables
from lpm.passes.plain import Plain
from lpm.passes.steps import Arrays, Rounds, Steps, push, split
from lpm.rng import Address, Ids

__all__ = ["CarriedForward", "Carrier", "Contagions", "Told", "environment", "unfollowed"]


class Carrier(Executor, Contract):
    """An executor of plain values that carries derivatives beside them.

    Attributes:
        floats: how many it needs of each sum.
    """

    floats: int

    def tell(self, spec: Spec, slopes: Slopes) -> None:
        """Derivatives of what the next `start` or `advance` of a contagion is given."""
        ...

    def sums(self, spec: Spec, network: int, stage: NDArray[np.int8]) -> NDArray[np.float64]:
        """What it carries of a shard's infectivity sums, tangents first [cells, lanes, floats]."""
        ...

    def records(self, spec: Spec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Derivatives of the last step's transitions [E, C, lanes, P] and people in stages [S, C, lanes, P]."""
        ...

    def snapshot(self, spec: Spec) -> dict[str, NDArray[Any]]:
        """What a checkpoint needs."""
        ...

    def restore(self, spec: Spec, ids: Ids, lanes: int, found: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a checkpoint."""
        ...


def unfollowed(model: Model) -> str | None:
    """Why no executor can carry derivatives through a model, or None if one can."""
    for protocol in model.protocols:
        if not protocol.fused():
            return f"the infectivity of {protocol.name} differs between agents of one stage"
        if isinstance(protocol, Dynamics):
            return f"the agents of {protocol.name} have a state of their own"
        if protocol.networks() and not isinstance(protocol, Contagion):
            return f"{protocol.name} emits messages and is not a contagion"
    return None


Told = tuple[Mapping[int, tuple[Tensor, ...]], Mapping[str, Tensor]]
"""What a contagion is told: tables of exits by stage and factors by network, as `lpm.kernels.spec.Tables` has them."""


class _Probe:
    """An executor that runs nobody and remembers what it was told, for torch to differentiate."""

    name = "probe"

    def __init__(self) -> None:
        self.told: list[Told] = []

    def least_memory(self, spec: Spec) -> int:
        return 0

    def start(
        self,
        spec: Spec,
        cumulative: Mapping[int, Tensor],
        fixed: Mapping[int, NDArray[np.int64]],
        uniform: Address,
        lanes: int,
    ) -> dict[str, Tensor]:
        self.told.append(({s: (value,) for s, value in cumulative.items()}, {}))
        return {}

    def emit(self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, network: int) -> Summed:
        raise TypeError("The probe emits nothing.")

    def advance(
        self, spec: Spec, state: Mapping[str, Tensor], tables: Tables, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        self.told.append((tables.cumulative, tables.factors))
        nothing = torch.zeros(0, dtype=torch.float64)
        return {}, nothing, nothing

    def occupancy(self, spec: Spec, state: Mapping[str, Tensor]) -> Tensor:
        raise InputError("No derivative is carried into a protocol that reads agents' stages.", "Use gradient=fd.")


class Contagions:
    """The contagions of a run, what is carried of them, and what the rest of the model tells them.

    Args:
        loop: of the run.
        executor: of it; carries their derivatives.

    Attributes:
        executor: carries their derivatives.
        all: the contagions, in the order in which they are told.
    """

    def __init__(self, loop: Steps, executor: Carrier) -> None:
        self.executor = executor
        self.all = [protocol for protocol in loop.model.protocols if isinstance(protocol, Contagion)]
        self._probe = _Probe()
        self._quiet = Steps(loop.model, loop.theta, loop.seeds, self._probe, loop.sizes)

    def _seen(self, carry: Arrays, theta: Tensor) -> tuple[list[Told], Arrays, Tensor]:
        # θ itself comes back too: torch differentiates nothing that returns nothing.
        return self._probe.told, environment(carry), theta

    def told_first(self, theta: Tensor) -> tuple[list[Told], Arrays, Tensor]:
        """What the contagions are told at the start, and the first environment: functions of θ for torch."""
        self._probe.told = []
        return self._seen(self._quiet.start(theta), theta)

    def told(self, t: int, theta: Tensor, env: Arrays, sums: Arrays) -> tuple[list[Told], Arrays, Tensor]:
        """What the contagions are told in a step, and the environment after it."""
        self._probe.told = []
        return self._seen(self._quiet.advance(t, theta, env, sums)[0], theta)

    def emitted(self, carry: Arrays) -> dict[str, NDArray[np.float64]]:
        """What is carried of each shared sum [cells, lanes, floats]."""
        found = {}
        for contagion in self.all:
            stage = carry[f"state:{contagion.name}.stage"].numpy()
            for k, network in enumerate(contagion.spec.networks):
                if network.shared:
                    found[f"{contagion.name}/{network.name}"] = self.executor.sums(contagion.spec, k, stage)
        return found

    def require_followed(self, carry: Arrays) -> None:
        """Refuse agents with a state that isn't a contagion's."""
        for key in carry:
            name = key.removeprefix("state:").partition(".")[0]
            if key.startswith("state:") and name not in [contagion.name for contagion in self.all]:
                raise InputError(
                    f"No derivative is carried through {name}, whose agents have a state.",
                    "Use gradient=fd.",
                )

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """What is carried, for a checkpoint."""
        return {
            f"carried:{contagion.name}:{name}": array
            for contagion in self.all
            for name, array in self.executor.snapshot(contagion.spec).items()
        }

    def restore(self, loop: Steps, found: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`."""
        for contagion in self.all:
            prefix = f"carried:{contagion.name}:"
            kept = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
            self.executor.restore(contagion.spec, loop.model.population.numbering, loop.lanes, kept)


def environment(carry: Arrays) -> Arrays:
    """The floating arrays of the environment."""
    return {key: value for key, value in split(carry)[0].items() if key.startswith("env:")}


class CarriedForward(Plain):
    """Values, and derivatives that the executor carries, in the same rounds."""

    def __init__(self, loop: Steps, rounds: Rounds) -> None:
        super().__init__(loop, rounds)
        self.executor: Carrier = loop.executor  # type: ignore[assignment]
        self.contagions = Contagions(loop, self.executor)
        lanes, count = loop.theta.shape
        self.directions = torch.eye(count, dtype=torch.float64)[:, None, :].expand(count, lanes, count).contiguous()
        self.tangents: Arrays = {}
        self.recorded: list[Tensor] = []
        # Without protocols of another kind contagions are told the same in every step.
        self._steady = len(self.contagions.all) == len(loop.model.protocols)
        self._slopes: list[Slopes] | None = None

    def start(self) -> None:
        slopes, self.tangents = self._push(self.contagions.told_first, (self.loop.theta,), (self.directions,))
        for contagion, slope in zip(self.contagions.all, slopes, strict=True):
            self.executor.tell(contagion.spec, slope)
        super().start()
        self.contagions.require_followed(self.carry)

    @staticmethod
    def _push(function: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Slopes], Arrays]:
        """Derivatives of what the contagions are told, and of the environment."""
        moved, env, _ = push(function, primals, tangents)
        slopes = [
            Slopes(
                {s: tuple(_last(table) for table in tables) for s, tables in cumulative.items()},
                {name: _last(value) for name, value in factors.items()},
                {},
            )
            for cumulative, factors in moved
        ]
        return slopes, env

    def step(self, t: int) -> Arrays:
        theta, count = self.loop.theta, len(self.directions)
        summed = self.loop.emit(t, theta, self.carry)
        emitted = {
            key: torch.from_numpy(value).movedim(-1, 0) for key, value in self.contagions.emitted(self.carry).items()
        }
        sums, moved = self.open_along(t, summed, emitted)
        if self._slopes is None or not self._steady:
            pushed = {key: value[:count] for key, value in moved.items()}
            self._slopes, self.tangents = self._push(
                lambda theta, env, sums: self.contagions.told(t, theta, env, sums),
                (theta, environment(self.carry), sums),
                (self.directions, self.tangents, pushed),
            )
        for contagion, slope in zip(self.contagions.all, self._slopes, strict=True):
            shared = [network.name for network in contagion.spec.networks if network.shared]
            mine = {name: np.ascontiguousarray(_last(moved[f"{contagion.name}/{name}"])) for name in shared}
            self.executor.tell(contagion.spec, Slopes(slope.cumulative, slope.factors, mine))
        self.carry, records = self.loop.advance(t, theta, self.carry, sums)
        self.recorded.append(self._outputs())
        self.rounds.see(self.loop.env(self.carry))
        return records

    def _outputs(self) -> Tensor:
        """Derivatives of the step's outputs [outputs, lanes, P]: outputs are linear in the records."""
        lanes, count = self.loop.theta.shape
        records = {}
        for contagion in self.contagions.all:
            flow, people = self.executor.records(contagion.spec)
            records[f"{contagion.name}.flow"] = torch.from_numpy(flow.reshape(*flow.shape[:2], lanes * count))
            records[f"{contagion.name}.count"] = torch.from_numpy(people.reshape(*people.shape[:2], lanes * count))
        return self.loop.model.values(records).reshape(-1, lanes, count).clone()

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return (
            super().snapshot()
            | {f"tangent:{key}": value.numpy() for key, value in self.tangents.items()}
            | self.contagions.snapshot()
            | {"recorded": torch.stack(self.recorded).numpy()}
        )

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.tangents = {key[8:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("tangent:")}
        self.recorded = list(torch.from_numpy(found["recorded"].copy()))
        self.contagions.restore(self.loop, found)

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        return {"tangents": torch.stack(self.recorded).numpy()}


def _last(value: Tensor) -> NDArray[np.float64]:
    """[P, …] → [..., P]."""
    return np.moveaxis(value.detach().numpy(), 0, -1)

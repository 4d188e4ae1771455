"""The pure functions between two sums, and the rounds that carry the sums (paper, eq. 1).

A pass (`plain`, `tangent`, `alternates`) decides how derivatives go through them; the time loop is in
`lpm.simulation`.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vmap

from lpm import ring
from lpm.errors import RoundRefused, SessionRefused
from lpm.flame.model import Model
from lpm.flame.protocol import Step
from lpm.kernels.spec import Executor, Summed
from lpm.worlds.world import Exponents, World

__all__ = ["Arrays", "Rounds", "Steps", "push", "soft", "split", "spread"]

Arrays = dict[str, Tensor]

_FORWARD_MODE = threading.Lock()
"""Torch keeps the level of forward-mode differentiation once per process: two threads must not be in it together."""


def push(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Tangents of a function along a batch of directions.

    Args:
        function: of `primals`.
        primals: where.
        tangents: as `primals`, each with a leading axis of directions.
    """
    with _FORWARD_MODE:
        return vmap(lambda *direction: jvp(function, primals, direction)[1])(*tangents)


class Steps:
    """One run: the pure functions between two sums, bound to a model, seeds and an executor.

    Attributes:
        viewing: the number of the protocol that was last shown a step.
        drawing: see `Step`.
    """

    def __init__(self, model: Model, theta: Tensor, seeds: tuple[int, ...], executor: Executor, sizes: Arrays) -> None:
        self.model, self.seeds, self.executor, self.sizes = model, seeds, executor, sizes
        self.theta = theta
        self.lanes = theta.shape[0]
        self.pairs = [
            (number, protocol, network)
            for number, protocol in enumerate(model.protocols)
            for network in protocol.networks()
            if model.network(network).shared
        ]
        self._values = self._by_name(theta)
        self.viewing = -1
        self.drawing: set[int] | None = None
        self._settled: dict[str, Any] = {}
        self._most: dict[str, NDArray[np.int64] | None] = {}

    def _by_name(self, theta: Tensor) -> dict[str, Tensor]:
        return {parameter.name: theta[:, k] for k, parameter in enumerate(self.model.parameters)}

    def view(self, t: int, number: int, theta: Tensor, carry: Arrays, env: Arrays, sums: Mapping[str, Tensor]) -> Step:
        """What protocol `number` sees of step t."""
        plain = theta is self.theta and not theta.requires_grad
        values, settled = (self._values, self._settled) if plain else (self._by_name(theta), None)
        state = {key[6:]: value for key, value in carry.items() if key.startswith("state:")}
        sizes, seeds, executor = self.sizes, self.seeds, self.executor
        self.viewing = number
        return Step(
            t, self.model, number, self.lanes, values, state, env, sums, sizes, seeds, executor, settled, self.drawing
        )

    @staticmethod
    def env(carry: Arrays) -> Arrays:
        """The environment within the carry."""
        return {key[4:]: value for key, value in carry.items() if key.startswith("env:")}

    def start(self, theta: Tensor) -> Arrays:
        """The first carry: all protocols' arrays and the environment."""
        carry: Arrays = {}
        env: Arrays = {}
        for number, protocol in enumerate(self.model.protocols):
            change = protocol.start(self.view(-1, number, theta, carry, env, {}))
            carry |= {f"state:{protocol.name}.{key}": value for key, value in change.state.items()}
            env |= change.env
        return {key: value.contiguous() for key, value in (carry | {f"env:{k}": v for k, v in env.items()}).items()}

    def emit(self, t: int, theta: Tensor, carry: Arrays) -> dict[str, Summed]:
        """The shard's contributions to all shared networks."""
        env = self.env(carry)
        return {
            f"{protocol.name}/{network}": protocol.emit(self.view(t, number, theta, carry, env, {}), network)
            for number, protocol, network in self.pairs
        }

    def require_range(self, key: str, t: int, words: NDArray[np.int64]) -> None:
        """Refuse an opened sum that the people in a group can't have made: below 0, or above what all of them can send.

        Args:
            key: `protocol/network`.
            t: the step.
            words: the opened sum [cells, lanes].

        Raises:
            SessionRefused: naming the group; some shard contributed what it can't have.
        """
        if key not in self._most:
            self._most[key] = self._most_words(*key.split("/"))
        most = self._most[key]
        if most is None:
            return
        wrong = (words < 0) | (words > most)
        if wrong.any():
            group = int(np.flatnonzero(wrong.any(axis=1))[0])
            raise SessionRefused(
                f"The sum {key} of step {t} is impossible in group {group}: it is below 0, or more than all its people"
                " together can send. A party contributed what its people can't have sent.",
                "The result does not count. Ask every party to check its installation and its data.",
            )

    def _most_words(self, protocol: str, network: str) -> NDArray[np.int64] | None:
        """The largest sum that all people of a group can make [cells, 1]; None where there is no bound."""
        most = self.model.protocol(protocol).most(network)
        if most is None or not math.isfinite(most):
            return None if most is None else np.full((1, 1), np.iinfo(np.int64).max)
        # A sum of words: each agent's was rounded before, so the bound is rounded too.
        bound = self.sizes[network].numpy() * float(ring.encode(most))
        return np.minimum(bound, np.nextafter(2.0**63, 0)).astype(np.int64)[:, None]

    def advance(self, t: int, theta: Tensor, carry: Arrays, sums: Mapping[str, Tensor]) -> tuple[Arrays, Arrays]:
        """The carry after the step, and the records."""
        env = self.env(carry)
        for network in self.model.networks:
            env[f"scale/{network.name}"] = torch.ones((), dtype=torch.float64)
        for key, total in sums.items():
            people = self.sizes[key.partition("/")[2]].sum().clamp(min=1.0)
            env[key] = total.sum(0) / people
        after: Arrays = {}
        records: Arrays = {}
        for number, protocol in enumerate(self.model.protocols):
            step = self.view(t, number, theta, carry, env, sums)
            change = protocol.transition(step, protocol.policy(step, protocol.observe(step)))
            env = env | dict(change.env)
            after |= {f"state:{protocol.name}.{key}": value for key, value in change.state.items()}
            records |= change.records
        # A protocol that returns no new array keeps the old one.
        kept = {key: value for key, value in carry.items() if key.startswith("state:") and key not in after}
        return kept | after | {
            f"env:{key}": value.expand(self.lanes).clone() if value.dim() == 0 else value for key, value in env.items()
        }, records


def split(carry: Arrays) -> tuple[Arrays, Arrays]:
    """Floating arrays, which carry derivatives, and the others."""
    floats = {key: value.contiguous() for key, value in carry.items() if value.is_floating_point()}
    return floats, {key: value for key, value in carry.items() if key not in floats}


class Rounds:
    """Packs sums (and tangents or cotangents) into one round a step, and keeps the exponents and the digest of e."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.exponents = Exponents(world.parties)
        self.digest = b"\0" * 32

    def add(
        self, tensor: str, step: int, words: Mapping[str, NDArray[np.int64]], floats: Mapping[str, NDArray[np.float64]]
    ) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.float64]]]:
        """One round: words added as they are, floats at their public exponents."""
        while True:
            rescale = not all(self.exponents.fits(name, value) for name, value in floats.items())
            parts = [value.reshape(-1) for value in words.values()]
            parts += [self.exponents.encode(name, value).reshape(-1) for name, value in floats.items()]
            try:
                total = self.world.add(tensor, step, np.concatenate(parts), digest=self.digest, rescale=rescale)
            except RoundRefused as refused:
                if not refused.rescale:
                    raise
                self.exponents.lower(list(floats))
                continue
            if not self.world.one_owner:  # else the sums' means, which are in the environment, are enough
                digest = hashlib.sha256(self.digest)
                digest.update(np.ascontiguousarray(total).data)
                self.digest = digest.digest()
            opened, used = {}, 0
            for name, value in [*words.items(), *floats.items()]:
                opened[name] = total[used : used + value.size].reshape(value.shape)
                used += value.size
            return (
                {name: opened[name] for name in words},
                {name: self.exponents.decode(name, opened[name]) for name in floats},
            )

    def add_each(
        self, tensor: str, step: int, words: Mapping[str, NDArray[np.int64]], floats: Mapping[str, Any], mark: str
    ) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.float64]]]:
        """As `add`, of floats with a leading axis, along which each part has an exponent of its own.

        Args:
            tensor: see `add`.
            step: see `add`.
            words: see `add`.
            floats: arrays or tensors [X, …].
            mark: between a name and the number of a part.
        """
        named = {f"{key}{mark}{k}": np.asarray(part) for key, value in floats.items() for k, part in enumerate(value)}
        total, opened = self.add(tensor, step, words, named)
        return total, {
            key: np.stack([opened[f"{key}{mark}{k}"] for k in range(len(value))]) for key, value in floats.items()
        }

    def add_back(self, step: int, cotangents: Mapping[str, Tensor]) -> Arrays:
        """Σ over shards of cotangents of a step's sums [B, cells, lanes]: the adjoint of a sum is one."""
        _, opened = self.add_each("adjoint", step, {}, cotangents, "^")
        return {key: torch.from_numpy(value) for key, value in opened.items()}

    def see(self, env: Mapping[str, Tensor]) -> None:
        """Bind the environment into the digest that the next round compares."""
        seen = hashlib.sha256(self.digest)
        for name in sorted(env):
            seen.update(name.encode())
            seen.update(env[name].detach().contiguous().numpy().tobytes())
        self.digest = seen.digest()


def soft(value: Summed) -> Tensor:
    """The differentiable part of a sum."""
    assert value.soft is not None
    return value.soft


def spread(name: str) -> tuple[str, int]:
    """How an array of a pass's snapshot, by its name, is spread over shards: see `lpm.worlds.world.Spread`."""
    if name in ("step", "digest", "exponents"):
        return "same", 0
    if name in ("words", "recorded"):
        return "sum", 0
    head, _, rest = name.partition(":")
    if head == "carried":
        return {"by-agent": ("agents", 1), "in-all": ("sum", 0)}.get(rest.rpartition(":")[2], ("own", 0))
    if head == "kept":
        _, head, rest = rest.split(":", 2)
        head = "carry" if head.startswith("stages") else head
    if head in ("carry", "tangent"):
        # A tangent has the axis of directions before that of agents.
        return ("agents", int(head == "tangent")) if rest.startswith("state:") else ("same", 0)
    if head == "alternate":
        return "agents", 0
    return ("same", 0) if head == "sums" else ("own", 0)

"""The only time loop. How derivatives flow is an argument of it (paper, eq. 8 and 11).

Each step is emit (local) → ⊕ (the world) → observe, policy, transition (local). Between two sums everything is a pure
function of parameters, state and opened sums, so
- a plain run calls these functions;
- forward mode pushes P tangents through them and sends the tangents of the sums in the *same* round;
- reverse mode keeps each step's inputs, pulls cotangents back through them, and needs one more round per step, in which
  the cotangents of the sums are added up (the adjoint of a sum is a sum, then a broadcast).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vjp, vmap

from lpm import ring
from lpm.errors import InputError, RoundRefused
from lpm.flame.model import Model
from lpm.flame.protocol import Step
from lpm.kernels.spec import Executor, Summed
from lpm.worlds.local import LocalWorld
from lpm.worlds.world import Exponents, World

__all__ = ["Keeper", "Trajectory", "choose_executor", "run"]

Arrays = dict[str, Tensor]

_FORWARD_MODE = threading.Lock()
"""Torch keeps the level of forward-mode differentiation once per process: two threads must not be in it together."""


def _push(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Tangents of a function along a batch of directions.

    Args:
        function: of `primals`.
        primals: where.
        tangents: as `primals`, each with a leading axis of directions.
    """
    with _FORWARD_MODE:
        return vmap(lambda *direction: jvp(function, primals, direction)[1])(*tangents)


@dataclass(frozen=True)
class Trajectory:
    """What a run recorded of this shard.

    Attributes:
        words: exact outputs of this shard, 32 fraction bits [T, O, lanes].
        tangents: derivative of this shard's outputs by each lane's own parameters [T, O, lanes, P] (forward mode).
        gradient: this shard's part of Σ cotangent · outputs differentiated [B, lanes, P] (reverse mode).
        executor: what ran the contagions.
    """

    words: NDArray[np.int64]
    tangents: NDArray[np.float64] | None = None
    gradient: NDArray[np.float64] | None = None
    executor: str = ""

    @property
    def outputs(self) -> NDArray[np.float64]:
        """Outputs as numbers [T, O, lanes]."""
        return ring.decode(self.words)


@dataclass
class Keeper:
    """Where a run leaves checkpoints and finds one to go on from.

    Attributes:
        every: steps between two checkpoints; 0 for none.
        save: receives the state by name: arrays and plain values.
        found: a checkpoint to go on from.
    """

    every: int = 0
    save: Callable[[dict[str, Any]], object] = lambda state: None
    found: Mapping[str, Any] | None = None


def choose_executor(model: Model, derivative: str, wanted: str = "auto") -> Executor:
    """The executor of contagions: the fused one wherever it can run the model, else the reference.

    Raises:
        InputError: for an unknown name, or one that can't run this model.
    """
    from lpm.kernels.reference import Reference

    if wanted not in ("auto", "reference", "cpu"):
        raise InputError(f"The executor is {wanted!r}: auto, reference or cpu.")
    able = derivative == "none" and all(protocol.fused() for protocol in model.protocols)
    if wanted == "reference" or (wanted == "auto" and not able):
        return Reference()
    if not able:
        raise InputError(
            "The fused executor runs neither tangents nor per-agent infectivity.", "Use auto or reference."
        )
    from lpm.kernels.cpu import Fused

    return Fused()


class _Loop:
    """One run: the pure functions between two sums, bound to a model, a seed and an executor."""

    def __init__(self, model: Model, theta: Tensor, seed: int, executor: Executor, sizes: Arrays) -> None:
        self.model, self.seed, self.executor, self.sizes = model, seed, executor, sizes
        self.theta = theta
        self.lanes = theta.shape[0]
        self.pairs = [
            (number, protocol, network)
            for number, protocol in enumerate(model.protocols)
            for network in protocol.networks()
            if model.network(network).shared
        ]

    def _step(self, t: int, number: int, theta: Tensor, carry: Arrays, env: Arrays, sums: Mapping[str, Tensor]) -> Step:
        values = {parameter.name: theta[:, k] for k, parameter in enumerate(self.model.parameters)}
        state = {key[6:]: value for key, value in carry.items() if key.startswith("state:")}
        return Step(t, self.model, number, self.lanes, values, state, env, sums, self.sizes, self.seed, self.executor)

    @staticmethod
    def _env(carry: Arrays) -> Arrays:
        return {key[4:]: value for key, value in carry.items() if key.startswith("env:")}

    def start(self, theta: Tensor) -> Arrays:
        carry: Arrays = {}
        env: Arrays = {}
        for number, protocol in enumerate(self.model.protocols):
            change = protocol.start(self._step(-1, number, theta, carry, env, {}))
            carry |= {f"state:{protocol.name}.{key}": value for key, value in change.state.items()}
            env |= change.env
        return {key: value.contiguous() for key, value in (carry | {f"env:{k}": v for k, v in env.items()}).items()}

    def emit(self, t: int, theta: Tensor, carry: Arrays) -> dict[str, Summed]:
        env = self._env(carry)
        return {
            f"{protocol.name}/{network}": protocol.emit(self._step(t, number, theta, carry, env, {}), network)
            for number, protocol, network in self.pairs
        }

    def advance(self, t: int, theta: Tensor, carry: Arrays, sums: Mapping[str, Tensor]) -> tuple[Arrays, Arrays]:
        """The carry after the step, and the records."""
        env = self._env(carry)
        for network in self.model.networks:
            env[f"scale/{network.name}"] = torch.ones((), dtype=torch.float64)
        for key, total in sums.items():
            people = self.sizes[key.partition("/")[2]].sum().clamp(min=1.0)
            env[key] = total.sum(0) / people
        after: Arrays = {}
        records: Arrays = {}
        for number, protocol in enumerate(self.model.protocols):
            step = self._step(t, number, theta, carry, env, sums)
            change = protocol.transition(step, protocol.policy(step, protocol.observe(step)))
            env = env | dict(change.env)
            after |= {f"state:{protocol.name}.{key}": value for key, value in change.state.items()}
            records |= change.records
        # A protocol that returns no new array keeps the old one.
        kept = {key: value for key, value in carry.items() if key.startswith("state:") and key not in after}
        return kept | after | {
            f"env:{key}": value.expand(self.lanes).clone() if value.dim() == 0 else value for key, value in env.items()
        }, records


def _split(carry: Arrays) -> tuple[Arrays, Arrays]:
    """Floating arrays, which carry derivatives, and the others."""
    floats = {key: value.contiguous() for key, value in carry.items() if value.is_floating_point()}
    return floats, {key: value for key, value in carry.items() if key not in floats}


class _Rounds:
    """Packs sums (and tangents or cotangents) into one round a step, and keeps the exponents and the digest of e."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.exponents = Exponents(world.parties)
        self.digest = b"\0" * 32

    def add(
        self, tensor: str, step: int, words: Mapping[str, NDArray[np.int64]], floats: Mapping[str, NDArray[np.float64]]
    ) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.float64]]]:
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
            self.digest = hashlib.sha256(self.digest + total.tobytes()).digest()
            opened, used = {}, 0
            for name, value in [*words.items(), *floats.items()]:
                opened[name] = total[used : used + value.size].reshape(value.shape)
                used += value.size
            return (
                {name: opened[name] for name in words},
                {name: self.exponents.decode(name, opened[name]) for name in floats},
            )

    def see(self, env: Mapping[str, Tensor]) -> None:
        """Bind the environment into the digest that the next round compares."""
        seen = hashlib.sha256(self.digest)
        for name in sorted(env):
            seen.update(name.encode())
            seen.update(env[name].detach().contiguous().numpy().tobytes())
        self.digest = seen.digest()


def _census(model: Model, rounds: _Rounds) -> Arrays:
    """People in each group: of the shard for local networks, of all shards together for shared ones."""
    sizes: Arrays = {}
    shared = [network for network in model.networks if network.shared]
    for network in model.networks:
        counts = np.bincount(network.cell_of, minlength=network.cells)
        sizes[network.name] = torch.from_numpy(counts.astype(np.float64))
    if shared:
        people = {n.name: sizes[n.name].numpy().astype(np.int64) for n in shared}
        holders = {f"{name}#institutions": (count > 0).astype(np.int64) for name, count in people.items()}
        opened, _ = rounds.add("census", -1, people | holders, {})
        for network in shared:
            if rounds.world.disclosure is not None:
                rounds.world.disclosure.require(
                    network.name, opened[network.name], opened[f"{network.name}#institutions"]
                )
            sizes[network.name] = torch.from_numpy(opened[network.name].astype(np.float64))
    return sizes


def run(
    model: Model,
    theta: NDArray[np.float64],
    *,
    steps: int,
    seed: int,
    world: World | None = None,
    derivative: str = "none",
    cotangent: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    executor: str = "auto",
    keeper: Keeper | None = None,
    progress: Callable[[int, int], None] | None = None,
    trajectory: int = 0,
) -> Trajectory:
    """Run a model for many parameter vectors at once.

    Args:
        model: this shard.
        theta: parameter vectors, in the order of `model.parameters` [lanes, P].
        steps: T.
        seed: 64 bits; of this shard.
        world: who adds up; the Local world by default.
        derivative: "none"; "forward": tangents of the outputs; "reverse": gradient of Σ cotangent · outputs.
        cotangent: outputs [T, O, lanes] → cotangents [B, T, O, lanes] (reverse).
        executor: "auto", "reference" or "cpu".
        keeper: checkpoints.
        progress: called with (steps done, steps).
        trajectory: number of this run in its session, which addresses its rounds.

    Returns:
        Outputs of this shard and, if asked for, derivatives; the whole population's are the sums over shards.

    Raises:
        InputError: before any work, for a run that the model can't do.
    """
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps}: a whole number from 1.")
    if derivative not in ("none", "forward", "reverse"):
        raise InputError(f"The derivative is {derivative!r}: none, forward or reverse.")
    if not model.recorded:
        raise InputError("The model records nothing.", "Give Model(outputs={name: lpm.flow(…)}).")
    theta = np.ascontiguousarray(theta, dtype=np.float64)
    if theta.ndim != 2 or theta.shape[1] != len(model.parameters) or theta.shape[0] < 1:
        raise InputError(f"The parameters have shape {theta.shape}: [lanes, {len(model.parameters)}].")
    for protocol in model.protocols:
        protocol.require_steps(steps)
    world = world or LocalWorld()
    keeper = keeper or Keeper()
    chosen = choose_executor(model, derivative, executor)
    parameters = torch.from_numpy(theta)
    world.begin(trajectory, hashlib.sha256(theta.tobytes()).digest())
    rounds = _Rounds(world)
    sizes = _census(model, rounds)
    loop = _Loop(model, parameters, seed, chosen, sizes)
    worker = {"none": _Plain, "forward": _Forward, "reverse": _Reverse}[derivative](loop, rounds)

    lanes = theta.shape[0]
    words = np.zeros((steps, len(model.recorded), lanes), dtype=np.int64)
    first = 0
    if keeper.found is not None:
        first = int(keeper.found["step"])
        words[:first] = keeper.found["words"]
        rounds.digest = bytes(keeper.found["digest"])
        rounds.exponents.bits = dict(keeper.found["exponents"])
        worker.restore(keeper.found)
    else:
        worker.start()
    for t in range(first, steps):
        records = worker.step(t)
        words[t], _ = model.read(records)
        if keeper.every and (t + 1) % keeper.every == 0 and t + 1 < steps:
            keeper.save(
                {
                    "step": t + 1,
                    "words": words[: t + 1],
                    "digest": rounds.digest,
                    "exponents": rounds.exponents.export(),
                    **worker.snapshot(),
                }
            )
        if progress is not None:
            progress(t + 1, steps)
    result = worker.finish(words, cotangent)
    return Trajectory(words, **result, executor=chosen.name)


class _Plain:
    """No derivatives."""

    def __init__(self, loop: _Loop, rounds: _Rounds) -> None:
        self.loop, self.rounds = loop, rounds
        self.carry: Arrays = {}

    def start(self) -> None:
        self.carry = self.loop.start(self.loop.theta)
        self.rounds.see(self.loop._env(self.carry))

    def step(self, t: int) -> Arrays:
        summed = self.loop.emit(t, self.loop.theta, self.carry)
        sums = self.open(t, summed, {})[0]
        self.carry, records = self.loop.advance(t, self.loop.theta, self.carry, sums)
        self.rounds.see(self.loop._env(self.carry))
        return records

    def open(
        self, t: int, summed: Mapping[str, Summed], floats: Mapping[str, NDArray[np.float64]]
    ) -> tuple[Arrays, dict[str, NDArray[np.float64]]]:
        """⊕: exact sums as float64, and opened floats."""
        if not summed:
            return {}, {}
        words, opened = self.rounds.add("emit", t, {key: value.words.numpy() for key, value in summed.items()}, floats)
        return {key: torch.from_numpy(ring.decode(value)) for key, value in words.items()}, opened

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return {f"carry:{key}": value.numpy() for key, value in self.carry.items()}

    def restore(self, found: Mapping[str, Any]) -> None:
        self.carry = {
            key[6:]: torch.from_numpy(value.copy()) for key, value in found.items() if key.startswith("carry:")
        }

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        return {}


class _Forward(_Plain):
    """P tangents beside the values, in the same rounds."""

    def __init__(self, loop: _Loop, rounds: _Rounds) -> None:
        super().__init__(loop, rounds)
        lanes, count = loop.theta.shape
        # Direction p moves parameter p of every lane.
        self.directions = torch.eye(count, dtype=torch.float64)[:, None, :].expand(count, lanes, count).contiguous()
        self.tangents: Arrays = {}
        self.recorded: list[Tensor] = []

    def start(self) -> None:
        super().start()
        self.tangents = _push(lambda theta: _split(self.loop.start(theta))[0], (self.loop.theta,), (self.directions,))

    def step(self, t: int) -> Arrays:
        floats, others = _split(self.carry)
        theta = self.loop.theta
        summed = self.loop.emit(t, theta, self.carry)

        def soft_sums(theta: Tensor, floats: Arrays) -> Arrays:
            return {key: _soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

        pushed = {}
        if summed:
            pushed = _push(soft_sums, (theta, floats), (self.directions, self.tangents))
        named = {f"{key}~{k}": value[k].numpy() for key, value in pushed.items() for k in range(len(self.directions))}
        sums, opened = self.open(t, summed, named)
        moved = {
            key: torch.from_numpy(np.stack([opened[f"{key}~{k}"] for k in range(len(self.directions))])) for key in sums
        }

        def values(theta: Tensor, floats: Arrays, sums: Arrays) -> tuple[Arrays, Tensor]:
            carry, records = self.loop.advance(t, theta, floats | others, sums)
            return _split(carry)[0], self.loop.model.values(records)

        self.carry, records = self.loop.advance(t, theta, self.carry, sums)
        self.tangents, outputs = _push(values, (theta, floats, sums), (self.directions, self.tangents, moved))
        self.recorded.append(outputs)
        self.rounds.see(self.loop._env(self.carry))
        return records

    def snapshot(self) -> dict[str, NDArray[Any]]:
        return (
            super().snapshot()
            | {f"tangent:{key}": value.numpy() for key, value in self.tangents.items()}
            | {"recorded": torch.stack(self.recorded).numpy()}
        )

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.tangents = {key[8:]: torch.from_numpy(v.copy()) for key, v in found.items() if key.startswith("tangent:")}
        self.recorded = list(torch.from_numpy(found["recorded"].copy()))

    def finish(self, words: NDArray[np.int64], cotangent: object) -> dict[str, Any]:
        return {"tangents": torch.stack(self.recorded).permute(0, 2, 3, 1).numpy()}


@dataclass
class _Reverse(_Plain):
    """Keeps each step's inputs and pulls cotangents back through them."""

    loop: _Loop
    rounds: _Rounds
    kept: list[tuple[Arrays, Arrays]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carry: Arrays = {}

    def step(self, t: int) -> Arrays:
        before = self.carry
        summed = self.loop.emit(t, self.loop.theta, before)
        sums, _ = self.open(t, summed, {})
        self.kept.append((before, sums))
        self.carry, records = self.loop.advance(t, self.loop.theta, before, sums)
        self.rounds.see(self.loop._env(self.carry))
        return records

    def snapshot(self) -> dict[str, NDArray[Any]]:
        kept = {
            f"kept:{t}:{part}:{key}": value.numpy()
            for t, both in enumerate(self.kept)
            for part, arrays in zip(("carry", "sums"), both, strict=True)
            for key, value in arrays.items()
        }
        return super().snapshot() | kept

    def restore(self, found: Mapping[str, Any]) -> None:
        super().restore(found)
        self.kept = [({}, {}) for _ in range(int(found["step"]))]
        for name, value in found.items():
            if name.startswith("kept:"):
                _, t, part, key = name.split(":", 3)
                self.kept[int(t)][("carry", "sums").index(part)][key] = torch.from_numpy(value.copy())

    def finish(self, words: NDArray[np.int64], cotangent: Any) -> dict[str, Any]:
        pulled = torch.tensor(cotangent(ring.decode(words)), dtype=torch.float64)
        batch, theta = pulled.shape[0], self.loop.theta
        total = torch.zeros((batch, *theta.shape), dtype=torch.float64)
        floats, _ = _split(self.carry)
        after = {key: torch.zeros((batch, *value.shape), dtype=torch.float64) for key, value in floats.items()}
        for t in reversed(range(len(self.kept))):
            carry, sums = self.kept[t]
            floats, others = _split(carry)

            def values(
                theta: Tensor, floats: Arrays, sums: Arrays, t: int = t, others: Arrays = others
            ) -> tuple[Arrays, Tensor]:
                state, records = self.loop.advance(t, theta, floats | others, sums)
                return _split(state)[0], self.loop.model.values(records)

            pull = vjp(values, theta, floats, sums)[1]
            by_theta, by_floats, by_sums = vmap(pull)((after, pulled[:, t]))
            total = total + by_theta
            if sums:
                named = {f"{key}^{b}": value[b].numpy() for key, value in by_sums.items() for b in range(batch)}
                _, opened = self.rounds.add("adjoint", t, {}, named)
                returned = {
                    key: torch.from_numpy(np.stack([opened[f"{key}^{b}"] for b in range(batch)])) for key in sums
                }

                def soft_sums(theta: Tensor, floats: Arrays, t: int = t, others: Arrays = others) -> Arrays:
                    return {key: _soft(value) for key, value in self.loop.emit(t, theta, floats | others).items()}

                pull = vjp(soft_sums, theta, floats)[1]
                more_theta, more_floats = vmap(pull)(returned)
                total = total + more_theta
                by_floats = {key: value + more_floats[key] for key, value in by_floats.items()}
            after = by_floats
        pull = vjp(lambda theta: _split(self.loop.start(theta))[0], theta)[1]
        total = total + vmap(pull)(after)[0]
        return {"gradient": total.numpy()}


def _soft(value: Summed) -> Tensor:
    assert value.soft is not None
    return value.soft

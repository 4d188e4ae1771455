"""The only time loop. How derivatives flow is an argument of it (paper, eq. 8 and 11).

Each step is emit (local) → ⊕ (the world) → observe, policy, transition (local). Between two sums everything is a pure
function of parameters, state and opened sums (`lpm.passes.steps`), and a pass says what flows through these functions:
values alone, tangents beside them, or cotangents back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpm import ring
from lpm.errors import InputError
from lpm.flame.model import Model
from lpm.kernels.reference import Reference
from lpm.kernels.spec import Executor
from lpm.kernels.tangents import Tangents
from lpm.memory import require_memory
from lpm.passes.alternates import in_kernel, unfit
from lpm.passes.alternates_general import AlternatesGeneral
from lpm.passes.alternates_general_reverse import AlternatesGeneralReverse
from lpm.passes.alternates_reverse import AlternatesReverse
from lpm.passes.carried import CarriedForward, unfollowed
from lpm.passes.plain import Plain
from lpm.passes.score import Score
from lpm.passes.steps import Arrays, Rounds, Steps, spread
from lpm.passes.tangent import Forward, Reverse
from lpm.rng import require_seeds, whole
from lpm.worlds.distributed import agents_of_all, here
from lpm.worlds.world import World

__all__ = ["Keeper", "Trajectory", "choose_executor", "lanes_apart", "run"]


_PASSES: Mapping[str, type[Plain]] = {
    "none": Plain,
    "forward": Forward,
    "reverse": Reverse,
    "score": Score,
    "alternates": CarriedForward,
    "alternates-reverse": AlternatesReverse,
}
_BY_REFERENCE: Mapping[str, type[Plain]] = {
    "alternates": AlternatesGeneral,
    "alternates-reverse": AlternatesGeneralReverse,
}
"""By the reference executor, for protocols of any kind."""
_TIMES = {"none": 1, "forward": 3, "reverse": 6, "score": 4, "alternates": 6, "alternates-reverse": 8}
"""Memory by the reference executor in that of values alone, at least: measured."""
_ALTERNATES_IN_TORCH = 1_500
"""Bytes of each agent and lane that alternates by the reference executor take at least, whatever the protocols."""


@dataclass(frozen=True)
class Trajectory:
    """What a run recorded, of the whole population or, in a federation, of this shard.

    Attributes:
        words: exact outputs, 32 fraction bits [T, O, lanes].
        tangents: derivative of the outputs by each lane's own parameters [T, O, lanes, P] (forward mode).
        gradient: Σ cotangent · outputs differentiated [B, lanes, P] (reverse mode).
        executor: what ran the contagions.
        by_component: outputs [T, O, M, lanes] and scores of all decisions so far [T, M, lanes, P], of each of M closed
            components of this shard (`score`); if a shared network joins the shards, this shard's outputs and
            everybody's scores, M being 1.
    """

    words: NDArray[np.int64]
    tangents: NDArray[np.float64] | None = None
    gradient: NDArray[np.float64] | None = None
    executor: str = ""
    by_component: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

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

    Args:
        model: to be run.
        derivative: see `run`.
        wanted: "auto", "reference", "cpu", or, with a device's NAME (cpu, cuda, cuda:N), "device:NAME" for the fastest
            there, "torch:NAME" for tensor operations, "triton:NAME" for Triton kernels.

    Raises:
        InputError: for an unknown name, or one that can't run this model.
    """
    kind, _, device = str(wanted).partition(":")
    known = ("auto", "reference", "cpu", "device", "torch", "triton")
    if kind not in known or (kind in known[3:]) != bool(device):
        raise InputError(f"The executor is {wanted!r}: auto, reference, cpu, or device:NAME, torch:NAME, triton:NAME.")
    fused = all(protocol.fused() for protocol in model.protocols)
    if derivative in ("alternates", "alternates-reverse"):
        from lpm.kernels.alternates import Alternates

        reason = unfit(model)
        if reason is not None:
            raise InputError(f"The estimator alternates can't differentiate this model: {reason}.", "Use gradient=fd.")
        if wanted == "reference" or (wanted == "auto" and not in_kernel(model)):
            return Reference()
        if device or not in_kernel(model):
            raise InputError(
                f"The estimator alternates doesn't run this model by the executor {wanted}.", "Use the executor auto."
            )
        return Alternates(len(model.parameters)) if derivative == "alternates" else Alternates(0, taped=True)
    carries = derivative == "forward" and unfollowed(model) is None and lanes_apart(model)
    able = fused and (derivative == "none" or (carries and not device))
    if wanted == "reference" or (wanted == "auto" and not able):
        return Reference()
    if not able:
        raise InputError(
            f"The {'device' if device else 'fused'} executor runs neither {'tangents' if device else 'these tangents'} "
            "nor per-agent infectivity nor people who can be infected while infectious.",
            "Use auto or reference (no --device), or the gradient fd.",
        )
    if carries:
        return Tangents(len(model.parameters))
    if device:
        from lpm.kernels.device import choose

        return choose(kind, device)
    from lpm.kernels.cpu import Fused

    return Fused()


def lanes_apart(model: Model, executor: str = "auto") -> bool:
    """Whether lanes of one run of a model can have random numbers of their own: not on a device."""
    return executor in ("auto", "reference", "cpu") and all(
        protocol.fused() and protocol.by_executor() for protocol in model.protocols
    )


def _require_apart(model: Model, theta: NDArray[np.float64], seeds: int, derivative: str, executor: Executor) -> None:
    if seeds != theta.shape[0]:
        raise InputError(f"There are {seeds} seeds for {theta.shape[0]} parameter vectors: one, or one for each.")
    if derivative != "none" or executor.name not in ("reference", "cpu") or not lanes_apart(model):
        raise InputError(
            f"Lanes with seeds of their own are for runs without derivatives on the CPU: this one is {derivative!r} by "
            f"{executor.name}, or a protocol draws random numbers by itself.",
            "Run them one after the other.",
        )


def _require_memory(model: Model, lanes: int, derivative: str, executor: Executor) -> None:
    """Refuse a run that this machine, or the GPU that it is for, can't hold."""
    agents = agents_of_all(model)
    if not agents:
        return
    each = sum(p.least_memory(executor) for p in model.protocols)
    if isinstance(executor, Reference):
        each *= _TIMES[derivative]
        if derivative in _BY_REFERENCE:
            each = max(each, _ALTERNATES_IN_TORCH)
    purpose = f"{lanes} parameter vector{'s' if lanes > 1 else ''}"
    if derivative != "none":
        purpose += f" with derivatives ({derivative})"
    share = lanes * model.population.agents / agents
    require_memory(agents, share, each, purpose, device=executor.name.partition(":")[2])


def _census(model: Model, rounds: Rounds) -> Arrays:
    """People in each group: of the shard for local networks, of all shards together for shared ones."""
    sizes: Arrays = {}
    shared = [network for network in model.networks if network.shared]
    for network in model.networks:
        sizes[network.name] = torch.from_numpy(network.members.astype(np.float64))
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
    seed: int | Sequence[int],
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
        model: of everybody; with a `world`, this shard's.
        theta: parameter vectors, in the order of `model.parameters` [lanes, P].
        steps: T.
        seed: 64 bits; of this shard. One for each lane gives lanes random numbers of their own, without derivatives and
            if `lanes_apart(model)`.
        world: who adds up; by default the Local world or, under `torchrun`, the Distributed one.
        derivative: "none"; "forward": tangents of the outputs; "reverse": gradient of Σ cotangent · outputs;
            "score": scores of all decisions beside the outputs, by component; "alternates": derivatives of
            the outputs by cluster alternates, by the reference executor for protocols of any kind in one layer;
            "alternates-reverse": as "reverse", by cluster alternates likewise.
        cotangent: outputs [T, O, lanes] → cotangents [B, T, O, lanes] (reverse).
        executor: see `choose_executor`.
        keeper: checkpoints.
        progress: called with (steps done, steps).
        trajectory: number of this run in its session, which addresses its rounds.

    Returns:
        Outputs and, if asked for, derivatives: of the whole population where it has one owner; in a federation of this
        shard, and the whole population's are the sums over shards.

    Raises:
        InputError: before any work, for a run that the model can't do.
    """
    count = whole(steps)
    if count is None or count < 1:
        raise InputError(f"steps is {steps}: a whole number from 1.")
    steps, seeds = count, require_seeds(seed)
    if derivative not in _PASSES:
        raise InputError(f"The derivative is {derivative!r}: one of {', '.join(_PASSES)}.")
    if not model.recorded:
        raise InputError("The model records nothing.", "Give Model(outputs={name: lpm.flow(…)}).")
    theta = np.ascontiguousarray(theta, dtype=np.float64)
    if theta.ndim != 2 or theta.shape[1] != len(model.parameters) or theta.shape[0] < 1:
        raise InputError(f"The parameters have shape {theta.shape}: [lanes, {len(model.parameters)}].")
    for protocol in model.protocols:
        protocol.require_steps(steps)
    if world is None:
        world, model = here(model)
    keeper = keeper or Keeper()
    chosen = choose_executor(model, derivative, executor)
    if derivative.endswith("reverse") and cotangent is None:
        raise InputError("A run backwards needs to know of what: cotangent is None.", "Give cotangent=.")
    if len(seeds) != 1:
        _require_apart(model, theta, len(seeds), derivative, chosen)
    _require_memory(model, theta.shape[0], derivative, chosen)
    parameters = torch.from_numpy(theta)
    world.begin(trajectory, hashlib.sha256(theta.tobytes()).digest())
    rounds = Rounds(world)
    sizes = _census(model, rounds)
    loop = Steps(model, parameters, seeds, chosen, sizes)
    kind = CarriedForward if isinstance(chosen, Tangents) else _PASSES[derivative]
    if isinstance(chosen, Reference):
        kind = _BY_REFERENCE.get(derivative, kind)
    worker = kind(loop, rounds)

    lanes = theta.shape[0]
    words = np.zeros((steps, len(model.recorded), lanes), dtype=np.int64)
    first = 0
    found = world.parted(keeper.found, spread)
    if found is not None:
        first = int(found["step"])
        words[:first] = found["words"]
        rounds.digest = bytes(found["digest"])
        rounds.exponents.bits = dict(found["exponents"])
        worker.restore(found)
    else:
        worker.start()
    for t in range(first, steps):
        records = worker.step(t)
        words[t] = model.read(records)
        if keeper.every and (t + 1) % keeper.every == 0 and t + 1 < steps:
            state = {
                "step": t + 1,
                "words": words[: t + 1],
                "digest": rounds.digest,
                "exponents": rounds.exponents.export(),
                **worker.snapshot(),
            }
            kept = world.gathered(state, spread)
            if kept is not None:
                keeper.save(dict(kept))
        if progress is not None:
            progress(t + 1, steps)
    words = world.whole(words)
    found = worker.finish(words, cotangent)
    by_component = found.pop("by_component", None)
    derivatives = {name: world.whole(part) for name, part in found.items()}
    return Trajectory(words, **derivatives, executor=chosen.name, by_component=by_component)

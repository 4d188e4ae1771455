"""Estimators of derivatives behind one argument, `gradient=`, and the registry of what each of them can do.

`fd` runs each draw at θ ± h with the same random numbers (common random numbers), all lanes in one run; it is right
for any model and noisy. `tangent` propagates the derivative of the conditional expectation; it has little noise, is
right in dense mixing and badly wrong where people meet the same few others again and again. `alternates` follows what
would have been in each small group, and is right there too. `score` multiplies outputs by the likelihood ratio of the
decisions behind them: unbiased, and noisy unless components are small and closed. `st-gumbel`, the straight-through
Gumbel-softmax, stands here for comparison only: it is biased. `auto` (`lpm.analysis.audit`) measures them on the model
at hand and decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpm import ring, simulation
from lpm.errors import InputError
from lpm.flame.model import Model
from lpm.options import BIASED, GRADIENTS
from lpm.parameters import Parameter
from lpm.passes.alternates import surely_followed, unfit
from lpm.passes.score import components
from lpm.relax import straight_through
from lpm.rng import derive, require_seeds
from lpm.worlds.distributed import here
from lpm.worlds.world import World

__all__ = [
    "ESTIMATORS",
    "REGISTRY",
    "Differences",
    "Estimator",
    "Evaluation",
    "candidates",
    "differences",
    "evaluate",
    "require_estimator",
    "require_parameters",
    "to_lanes",
]

ESTIMATORS = tuple(name for name in GRADIENTS if name != "auto")
"""Names that `evaluate` takes; `auto` is resolved to one of them before."""


@dataclass(frozen=True)
class Estimator:
    """What one way of differentiating can do.

    Attributes:
        name: as `gradient=` calls it.
        what: a few words for tables.
        modes: "forward", and "reverse" where a scalar's gradient by any number of parameters costs one pass back.
        refuses: why it can't differentiate a model, or None if it can.
        promising: whether `auto` should spend runs on it; an audit that is asked for tries it anyway.
        surely: whether it is known before it runs that it is not refused while it runs.
    """

    name: str
    what: str
    modes: tuple[str, ...] = ("forward",)
    refuses: Callable[[Model], str | None] = lambda model: None
    promising: Callable[[Model], bool] = lambda model: True
    surely: Callable[[Model], bool] = lambda model: True

    @property
    def biased(self) -> bool:
        """Whether it is known to be wrong and stands here for comparison only; `auto` never takes it."""
        return self.name in BIASED

    @property
    def label(self) -> str:
        """Its name wherever it is shown: one that is known to be wrong says so."""
        return f"{self.name} (biased)" if self.biased else self.name


REGISTRY: Mapping[str, Estimator] = {
    each.name: each
    for each in (
        Estimator("fd", "central differences with common random numbers"),
        Estimator(
            "alternates",
            "what would have been in each small group",
            ("forward", "reverse"),
            refuses=unfit,
            # What a protocol of the user's own does shows when it runs, and may be refused then.
            surely=surely_followed,
        ),
        Estimator("tangent", "derivative of the conditional expectation of each decision", ("forward", "reverse")),
        Estimator(
            "score",
            "likelihood ratio of each decision, leave-one-out baseline",
            # Where everybody may have met everybody it has more noise than any other.
            promising=lambda model: bool(components(model).any()),
        ),
        Estimator("st-gumbel", "straight-through Gumbel-softmax", ("forward", "reverse")),
    )
}
"""All estimators by name; the audit tries each, and `fd` is what the others are measured against."""


def candidates(model: Model, mode: str = "forward", *, refusable: bool = False) -> tuple[str, ...]:
    """The estimators that `auto` tries on a model beside finite differences.

    Args:
        model: what is to be differentiated.
        mode: that they must have.
        refusable: whether those that may be refused while they run are among them.
    """
    return tuple(
        each.name
        for each in REGISTRY.values()
        if each.name != "fd"
        and not each.biased
        and mode in each.modes
        and each.refuses(model) is None
        and each.promising(model)
        and (refusable or each.surely(model))
    )


def require_parameters(model: Model) -> None:
    """Refuse to differentiate a model by nothing.

    Raises:
        InputError: if it has no parameters.
    """
    if not model.parameters:
        raise InputError(
            "The model has no parameters to differentiate by.", "Declare what may vary as lpm.Parameter(…)."
        )


def require_estimator(name: str, model: Model | None = None, mode: str = "forward") -> None:
    """Refuse an estimator that can't do what is asked, before any work.

    Args:
        name: one of `ESTIMATORS`.
        model: what it is to differentiate, if known.
        mode: "forward" or "reverse".

    Raises:
        InputError: naming the estimator, what it can't do, and what to use instead.
    """
    if name not in ESTIMATORS:
        raise InputError(f"The gradient is {name!r}: one of auto, {', '.join(ESTIMATORS)}.")
    if mode not in ("forward", "reverse"):
        raise InputError(f"The mode is {mode!r}: forward or reverse.")
    if name != "none" and model is not None:
        require_parameters(model)
    if mode == "reverse" and mode not in (REGISTRY[name].modes if name in REGISTRY else ()):
        able = " or ".join(f"gradient={each.name}" for each in REGISTRY.values() if mode in each.modes)
        raise InputError(f"The estimator {name} has no reverse mode.", f"Use mode=forward, or {able}.")
    reason = REGISTRY[name].refuses(model) if name in REGISTRY and model is not None else None
    if reason is not None and model is not None:
        able = " or ".join(
            each.name
            for each in REGISTRY.values()
            if mode in each.modes and not each.biased and each.refuses(model) is None
        )
        raise InputError(
            f"The estimator {name} can't differentiate this model: {reason}.", f"Use gradient={able or 'none'}."
        )


@dataclass(frozen=True)
class Evaluation:
    """Outputs of one shard for K draws, and their derivatives.

    Attributes:
        words: exact outputs [T, O, K].
        derivative: by each parameter [T, O, K, P]; None for `none`, and in reverse mode.
        gradient: Σ cotangent · outputs, differentiated [B, K, P] (reverse mode).
        estimator: which one.
        executor: what ran the contagions.
    """

    words: NDArray[np.int64]
    derivative: NDArray[np.float64] | None
    gradient: NDArray[np.float64] | None
    estimator: str
    executor: str

    @property
    def outputs(self) -> NDArray[np.float64]:
        """Outputs as numbers [T, O, K]."""
        return ring.decode(self.words)


@dataclass(frozen=True)
class Differences:
    """Lanes of central differences: K draws, then for each parameter the K draws above and below.

    Attributes:
        lanes: parameter vectors [K·(1+2P), P].
        distance: θ⁺ − θ⁻ of each draw and parameter [K, P].
    """

    lanes: NDArray[np.float64]
    distance: NDArray[np.float64]

    def quotient(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Difference quotients of outputs [T, O, lanes] → [T, O, K, P]."""
        draws, count = self.distance.shape
        shaped = outputs[..., draws:].reshape(*outputs.shape[:-1], count, 2, draws)
        return np.moveaxis((shaped[..., 0, :] - shaped[..., 1, :]) / self.distance.T, -2, -1)


def differences(theta: NDArray[np.float64], parameters: Sequence[Parameter], step: float) -> Differences:
    """Lanes for central differences.

    Args:
        theta: draws [K, P].
        parameters: in the order of the columns; lanes stay within their bounds.
        step: half distance relative to |θ|; for θ = 0, relative to the width of the bounds (or to 1).

    Raises:
        InputError: for a step that is not between 0 and 1.
    """
    if not 0 < step < 1:
        raise InputError(f"The step of finite differences is {step}: between 0 and 1.")
    blocks, distance = [theta], np.empty(theta.shape)
    for k, parameter in enumerate(parameters):
        low, high = parameter.bounds or (-np.inf, np.inf)
        width = high - low if np.isfinite(high - low) else 1.0
        half = step * np.where(theta[:, k] != 0, np.abs(theta[:, k]), width)
        above, below = theta.copy(), theta.copy()
        above[:, k] = np.minimum(theta[:, k] + half, high)
        below[:, k] = np.maximum(theta[:, k] - half, low)
        blocks += [above, below]
        distance[:, k] = above[:, k] - below[:, k]
    return Differences(np.concatenate(blocks), distance)


def evaluate(
    model: Model,
    theta: NDArray[np.float64],
    *,
    estimator: str,
    steps: int,
    seed: int | Sequence[int],
    mode: str = "forward",
    step: float = 0.02,
    cotangent: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    world: World | None = None,
    executor: str = "auto",
    keeper: simulation.Keeper | None = None,
    progress: Callable[[int, int], None] | None = None,
    trajectory: int = 0,
) -> Evaluation:
    """Run K draws of a model, with derivatives by one estimator.

    Args:
        model: this shard.
        theta: draws [K, P].
        estimator: one of `ESTIMATORS`.
        steps: T.
        seed: of this shard; or, for `none` and `fd`, one for each draw, where `simulation.run` takes them.
        mode: "forward", or "reverse" (where the estimator has it), which needs `cotangent`.
        step: of finite differences, relative.
        cotangent: outputs [T, O, K] → cotangents [B, T, O, K].
        world: who adds up.
        executor: see `simulation.run`.
        keeper: checkpoints.
        progress: called with (steps done, steps).
        trajectory: see `simulation.run`.

    Raises:
        InputError: for an unknown estimator or mode, or one that can't differentiate this model or in this world, or
            not in the memory that there is.
    """
    require_estimator(estimator, model, mode)
    seeds = require_seeds(seed)
    common: dict[str, Any] = {
        "steps": steps,
        "seed": seeds[0] if len(seeds) == 1 else seeds,
        "world": world,
        "executor": executor,
        "keeper": keeper,
        "progress": progress,
        "trajectory": trajectory,
    }
    if estimator == "none":
        run = simulation.run(model, theta, **common)
        return Evaluation(run.words, None, None, estimator, run.executor)
    if estimator == "fd":
        return _differences(model, differences(theta, model.parameters, step), common)
    if estimator == "score":
        return _score(model, theta, common)
    derivative = mode
    if estimator == "alternates":
        derivative = "alternates" if mode == "forward" else "alternates-reverse"
    if estimator == "st-gumbel" and executor == "auto":
        common["executor"] = "reference"  # what is carried beside the values is the tangent
    with straight_through() if estimator == "st-gumbel" else contextlib.nullcontext():
        run = simulation.run(model, theta, derivative=derivative, cotangent=cotangent, **common)
    return Evaluation(run.words, run.tangents, run.gradient, estimator, run.executor)


def _differences(model: Model, versions: Differences, common: Mapping[str, Any]) -> Evaluation:
    seed, draws, order = common["seed"], len(versions.distance), list(range(len(versions.lanes)))
    if not isinstance(seed, int):
        # Neighbouring lanes with one seed are drawn for together.
        order.sort(key=lambda lane: seed.index(seed[lane % draws]))
        common = {**common, "seed": [seed[lane % draws] for lane in order]}
    run = simulation.run(model, versions.lanes[order], **common)
    words = run.words[..., np.argsort(order)]
    return Evaluation(words[..., :draws], versions.quotient(ring.decode(words)), None, "fd", run.executor)


SCORE_RUNS = 8
"""Runs of `score` with random numbers of their own: each has the mean of the others as baseline."""


def _score(model: Model, theta: NDArray[np.float64], common: Mapping[str, Any]) -> Evaluation:
    """The mean of Σ_components (outputs − those of the other runs) × score, over `SCORE_RUNS` runs.

    With y and s of run r, and means over all R runs: 1/(R−1) · (Σ_r y_r s_r − ȳ Σ_r s_r). It is linear in the outputs:
    the sum of what shards make of their own outputs is the whole population's.

    Source: leave-one-out baseline, Kool, van Hoof and Welling (2019), "Buy 4 REINFORCE samples, get a baseline free".
    """
    if common["world"] is None:
        world, model = here(model)
        common = {**common, "world": world}
    first: simulation.Trajectory | None = None
    for k in range(SCORE_RUNS):
        seed = common["seed"] if k == 0 else derive(common["seed"], "score", k)
        # A checkpoint of the first run serves all: the others are repeated.
        more = {"seed": seed} if k == 0 else {"seed": seed, "keeper": None, "progress": None}
        run = simulation.run(model, theta, derivative="score", **{**common, **more})
        assert run.by_component is not None and run.tangents is not None
        outputs, scores = run.by_component
        product = np.einsum("tomk,tmkp->tokp", outputs, scores)
        if first is None:
            first, products, path, total, score = run, product, run.tangents, outputs, scores
        else:
            products, path, total, score = products + product, path + run.tangents, total + outputs, score + scores
    assert first is not None
    covariance = (products - np.einsum("tomk,tmkp->tokp", total / SCORE_RUNS, score)) / (SCORE_RUNS - 1)
    derivative = common["world"].whole(covariance) + path / SCORE_RUNS  # the paths are the whole's already
    return Evaluation(first.words, derivative, None, "score", first.executor)


def _column(name: str, values: Any) -> NDArray[np.float64]:
    try:
        given = np.asarray(values)
        # numpy reads text as numbers, and None as NaN.
        column = np.atleast_1d(given.astype(np.float64)) if given.dtype.kind in "iufO" and values is not None else None
    except (TypeError, ValueError):
        column = None
    if column is None:
        raise InputError(f"The parameter {name} is {values!r}: a number, or one for each draw.")
    if column.ndim > 1:
        raise InputError(f"The parameter {name} has shape {column.shape}: a number, or one for each draw.")
    return column


def to_lanes(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> NDArray[np.float64]:
    """Parameter values by name → draws [K, P] in the order of `parameters`; a number serves every draw.

    Raises:
        InputError: for a missing or unknown name, a value that is no number or outside its bounds, or draws of
            different length.
    """
    names = [parameter.name for parameter in parameters]
    unknown, missing = sorted(set(values) - set(names)), [name for name in names if name not in values]
    if unknown:
        raise InputError(f"The model has no parameter {unknown[0]}: there are {', '.join(names) or 'none'}.")
    if missing:
        raise InputError(f"The parameter {missing[0]} has no value.", f"Give params={{{missing[0]!r}: …}}.")
    columns = [_column(name, values[name]) for name in names]
    sizes = {column.size: name for name, column in zip(names, columns, strict=True) if column.size != 1}
    if len(sizes) > 1:
        (size, name), (other, second) = list(sizes.items())[:2]
        raise InputError(f"The parameter {second} has {other} values, {name} has {size}: one, or one for each draw.")
    for parameter, column in zip(parameters, columns, strict=True):
        for value in column:
            parameter.require(float(value))
    return np.stack(np.broadcast_arrays(*columns), axis=-1) if columns else np.zeros((1, 0))

"""Zero-shot sensitivity: how every recorded output answers to every parameter, from one differentiated run (eq. 11).

No sweep over parameters and no surrogate: a forward pass carries the derivative of each output at each step by each
parameter; a reverse pass goes back once for a few chosen targets and any number of parameters. From these come
elasticities (per cent of output for one per cent of parameter) and a ranking of parameters for each output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lpm.analysis.audit import Audit, resolve_estimator
from lpm.errors import InputError
from lpm.estimators import REGISTRY, evaluate, require_estimator, require_parameters, to_lanes
from lpm.flame.model import Model
from lpm.labels import to_dataset
from lpm.rng import derive, require_seed
from lpm.scenario import Scenario
from lpm.simulation import Keeper

__all__ = ["Part", "Sensitivity", "Target", "parse_targets", "sensitivity"]

KINDS = ("total", "peak")
"""What a target takes of an output: the sum over all steps, or the value at the step where it is largest."""


@dataclass(frozen=True)
class Target:
    """A number that a reverse pass differentiates.

    Attributes:
        output: recorded by the model.
        kind: one of `KINDS`. The derivative of a peak is that at its step: moving the step changes nothing to first
            order.
    """

    output: str
    kind: str

    def __str__(self) -> str:
        return f"{self.output}:{self.kind}"

    def pick(self, outputs: NDArray[np.float64], place: int) -> NDArray[np.float64]:
        """Weights [T] whose product with the output [T, O, 1] is the target."""
        if self.kind == "total":
            return np.ones(outputs.shape[0])
        weights = np.zeros(outputs.shape[0])
        weights[int(np.argmax(outputs[:, place, 0]))] = 1.0
        return weights


def parse_targets(texts: str | Sequence[str], outputs: Sequence[str]) -> tuple[Target, ...]:
    """Read targets such as `admissions`, `admissions:total` or `admissions:peak`.

    Args:
        texts: one or several; an output alone means both kinds.
        outputs: the outputs there are.

    Raises:
        InputError: for an output or kind there is not.
    """
    found: list[Target] = []
    for text in [texts] if isinstance(texts, str) else texts:
        match = re.fullmatch(r"([^:]+)(?::(.+))?", text.strip())
        output, kind = (match.group(1), match.group(2)) if match else (text, None)
        if output not in outputs or kind not in (None, *KINDS):
            raise InputError(
                f"The target {text!r} is none of this model: OUTPUT, OUTPUT:total or OUTPUT:peak, "
                f"with an output of {', '.join(outputs)}."
            )
        found += [Target(output, each) for each in (KINDS if kind is None else (kind,))]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Part:
    """What one replicate found.

    Attributes:
        outputs: [T, O].
        derivative: of every output at every step [T, O, P] (forward), or None.
        targets: derivative of each target [targets, P].
        values: of each target [targets].
    """

    outputs: NDArray[np.float64]
    derivative: NDArray[np.float64] | None
    targets: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The answer.

    Attributes:
        estimator: what differentiated.
        mode: "forward" or "reverse".
        executor: what ran the contagions.
        theta: parameter → value.
        outputs: mean over replicates, one variable per output: time.
        derivative: ∂ output / ∂ parameter, mean over replicates: time × parameter; None in reverse mode.
        standard_error: of `derivative`; None with one replicate, and in reverse mode.
        elasticity: θ/y · ∂y/∂θ of the means. Where y = 0 it is 0 if θ ∂y/∂θ is, else NaN: it has no value there.
        targets: one row per target and parameter: target, output, kind, parameter, value, derivative, elasticity, and
            from two replicates on derivative_se and elasticity_se.
        ranking: one row per output and parameter, the most important first: output, rank, parameter, importance,
            share (of the output's importances), elasticity_of_total and, from two replicates on, importance_se.
        replicates: runs with random numbers of their own.
        audit: the gradient audit, where `gradient="auto"`.
        units: output → unit.
    """

    estimator: str
    mode: str
    executor: str
    theta: dict[str, float]
    outputs: xr.Dataset
    derivative: xr.Dataset | None
    standard_error: xr.Dataset | None
    elasticity: xr.Dataset | None
    targets: pd.DataFrame
    ranking: pd.DataFrame
    replicates: int
    audit: Audit | None
    units: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The estimator's name, which says where it is known to be biased."""
        return REGISTRY[self.estimator].label

    def dataset(self) -> xr.Dataset:
        """All that is over time: `OUTPUT`, `d_OUTPUT`, `elasticity_OUTPUT` and, from two replicates on, `se_OUTPUT`."""
        merged: dict[str, Any] = {str(name): values for name, values in self.outputs.data_vars.items()}
        for prefix, part in (
            ("d", self.derivative),
            ("elasticity", self.elasticity),
            ("se", self.standard_error),
        ):
            if part is not None:
                merged |= {f"{prefix}_{name}": part[name] for name in part.data_vars}
        # A file takes a slash, as in the name of an institution's own output, for a folder.
        merged = {name.replace("/", "."): values for name, values in merged.items()}
        return xr.Dataset(merged, attrs={"estimator": self.label, "replicates": self.replicates})


def sensitivity(
    model: Model | Scenario,
    params: Mapping[str, float] | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    gradient: str = "auto",
    mode: str = "forward",
    targets: str | Sequence[str] = (),
    replicates: int = 1,
    step: float | None = None,
    executor: str = "auto",
    keeper: Keeper | None = None,
    done: Sequence[Part] = (),
    on_replicate: Callable[[list[Part]], object] = lambda parts: None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """How every output answers to every parameter, from one differentiated run per replicate.

    Args:
        model: a model with all its people, or a scenario (its parameters' defaults and its steps then serve).
        params: parameter name → value; those given replace a scenario's defaults.
        steps: T.
        seed: of all random numbers.
        gradient: an estimator of `lpm.estimators.REGISTRY`, or "auto" (an audit on this model chooses).
        mode: "forward": every output at every step; "reverse": the targets alone, for hundreds of parameters.
        targets: `OUTPUT`, `OUTPUT:total` or `OUTPUT:peak`, one or several; total and peak of every public output by
            default.
        replicates: runs with random numbers of their own; from two on there are standard errors.
        step: of finite differences, relative.
        executor: see `lpm.simulate`.
        keeper: checkpoints of the first run that is not in `done`.
        done: replicates of an interrupted call.
        on_replicate: receives all replicates so far after each.
        progress: called with (steps done, steps) of all replicates.

    Returns:
        Derivatives, elasticities, a ranking per output and the targets.

    Raises:
        InputError: before any work.

    Guarantee: the first replicate's outputs are those of `lpm.simulate` with the same seed, to the bit.
    """
    if isinstance(model, Scenario):
        scenario = model
        params = {name: scenario.defaults[name] for name in scenario.dynamics} | dict(params or {})
        steps = scenario.steps if steps is None else steps
        step = scenario.gradient.step if step is None else step
        model = scenario.build()
        assert isinstance(model, Model)
    if steps is None:
        raise InputError("The number of steps is missing.", "Give steps=….")
    if gradient == "none":
        raise InputError("The gradient is none: a sensitivity needs derivatives.", "Use gradient=auto.")
    if type(replicates) is not int or replicates < 1:
        raise InputError(f"replicates is {replicates}: a whole number from 1.")
    seed = require_seed(seed)
    require_parameters(model)
    if not model.recorded:
        raise InputError("The model records nothing.", "Give Model(outputs={name: lpm.flow(…)}).")
    step = 0.02 if step is None else step
    theta = to_lanes(model.parameters, params or {})
    if theta.shape[0] != 1:
        raise InputError("A sensitivity is taken at one value of each parameter.")
    wanted = parse_targets(targets or list(model.outputs), list(model.recorded))
    if gradient != "auto":
        require_estimator(gradient, model, mode)
    chosen, audit = resolve_estimator(model, theta, gradient, steps=steps, seed=seed, step=step, mode=mode)
    if audit is not None:
        audit.require_mode(mode)
    parts, executed = list(done), ""
    for k in range(len(parts), replicates):
        part, executed = _replicate(
            model,
            theta,
            wanted,
            chosen,
            mode,
            steps=steps,
            seed=seed if k == 0 else derive(seed, "replicate", k),
            step=step,
            executor=executor,
            keeper=keeper if k == len(done) else _without_start(keeper),
            progress=None if progress is None else lambda at, of, k=k: progress(k * of + at, replicates * of),
        )
        parts.append(part)
        on_replicate(parts)
    return _summarise(model, theta[0], wanted, parts, chosen, mode, executed, audit)


def _without_start(keeper: Keeper | None) -> Keeper | None:
    return None if keeper is None else Keeper(keeper.every, keeper.save)


def _replicate(
    model: Model,
    theta: NDArray[np.float64],
    wanted: Sequence[Target],
    estimator: str,
    mode: str,
    **run: Any,
) -> tuple[Part, str]:
    places = [list(model.recorded).index(target.output) for target in wanted]

    def picks(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.zeros((len(wanted), *outputs.shape))
        for b, (target, place) in enumerate(zip(wanted, places, strict=True)):
            weights[b, :, place, 0] = target.pick(outputs, place)
        return weights

    found = evaluate(
        model, theta, estimator=estimator, mode=mode, cotangent=picks if mode == "reverse" else None, **run
    )
    weights = picks(found.outputs)
    values = np.einsum("btok,tok->b", weights, found.outputs)
    if mode == "reverse":
        assert found.gradient is not None
        return Part(found.outputs[..., 0], None, found.gradient[:, 0], values), found.executor
    assert found.derivative is not None
    answers = np.einsum("btok,tokp->bp", weights, found.derivative)
    return Part(found.outputs[..., 0], found.derivative[:, :, 0], answers, values), found.executor


def elasticity_of(
    derivative: NDArray[np.float64], value: NDArray[np.float64], theta: NDArray[np.float64]
) -> NDArray[np.float64]:
    """θ/y · ∂y/∂θ; where y = 0, 0 if θ ∂y/∂θ = 0 and NaN otherwise.

    Args:
        derivative: [..., P].
        value: y [...].
        theta: [P].
    """
    change, value = derivative * theta, np.asarray(value)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = change / value
    return np.where(value != 0, ratio, np.where(change == 0, 0.0, np.nan))


def _standard_error(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.asarray(np.std(values, axis=0, ddof=1) / np.sqrt(len(values)))


def _importance(outputs: NDArray[np.float64], derivative: NDArray[np.float64], theta: NDArray[np.float64]) -> Any:
    """Σ_t |θ ∂y/∂θ| / Σ_t |y|: the mean absolute elasticity over time, steps weighed by their output [O, P].

    A plain mean over steps would be ruled by days on which hardly anything happens.
    """
    size = np.abs(outputs).sum(0)[:, None]
    change = np.abs(derivative * theta).sum(0)
    return np.divide(change, size, out=np.zeros_like(change), where=size > 0)


def _summarise(
    model: Model,
    theta: NDArray[np.float64],
    wanted: Sequence[Target],
    parts: Sequence[Part],
    estimator: str,
    mode: str,
    executor: str,
    audit: Audit | None,
) -> Sensitivity:
    names = [parameter.name for parameter in model.parameters]
    recorded = list(model.recorded)
    several = len(parts) > 1
    outputs = np.mean([part.outputs for part in parts], axis=0)

    def dataset(values: NDArray[np.float64]) -> xr.Dataset:
        return to_dataset(model, values[:, :, None], draws=False, parameters=True)

    derivative = error = elastic = None
    if mode == "forward":
        each = [part.derivative for part in parts if part.derivative is not None]
        mean = np.asarray(np.mean(each, axis=0))
        derivative = dataset(mean)
        error = dataset(_standard_error(each)) if several else None
        elastic = dataset(elasticity_of(mean, outputs, theta))
        for name in elastic.data_vars:
            elastic[name].attrs["units"] = "1"

    values = np.mean([part.values for part in parts], axis=0)
    answers = np.mean([part.targets for part in parts], axis=0)
    elasticity = elasticity_of(answers, values, theta)
    rows: dict[str, Any] = {
        "target": np.repeat([str(target) for target in wanted], len(names)),
        "output": np.repeat([target.output for target in wanted], len(names)),
        "kind": np.repeat([target.kind for target in wanted], len(names)),
        "parameter": np.tile(names, len(wanted)),
        "value": np.repeat(values, len(names)),
        "derivative": answers.reshape(-1),
        "elasticity": elasticity.reshape(-1),
    }
    if several:
        rows["derivative_se"] = _standard_error([part.targets for part in parts]).reshape(-1)
        own = [elasticity_of(part.targets, part.values, theta) for part in parts]
        rows["elasticity_se"] = _standard_error(own).reshape(-1)
    table = pd.DataFrame(rows)
    ranking = _rank(recorded, names, theta, parts, wanted, elasticity)
    return Sensitivity(
        estimator,
        mode,
        executor,
        dict(zip(names, theta.tolist(), strict=True)),
        to_dataset(model, outputs[:, :, None], draws=False),
        derivative,
        error,
        elastic,
        table,
        ranking,
        len(parts),
        audit,
        {name: output.unit for name, output in model.recorded.items()},
    )


def _rank(
    recorded: Sequence[str],
    names: Sequence[str],
    theta: NDArray[np.float64],
    parts: Sequence[Part],
    wanted: Sequence[Target],
    elasticity: NDArray[np.float64],
) -> pd.DataFrame:
    """Parameters by importance for each output: over time in forward mode, of the targets in reverse mode."""
    frames = []
    if parts[0].derivative is not None:
        outputs = np.mean([part.outputs for part in parts], axis=0)
        mean = np.mean([part.derivative for part in parts if part.derivative is not None], axis=0)
        importance = _importance(outputs, mean, theta)
        own = [_importance(part.outputs, part.derivative, theta) for part in parts if part.derivative is not None]
        totals = elasticity_of(mean.sum(0), outputs.sum(0), theta)
        subjects = list(recorded)
    else:
        importance, totals = np.abs(elasticity), elasticity
        own = [np.abs(elasticity_of(part.targets, part.values, theta)) for part in parts]
        subjects = [str(target) for target in wanted]
    for k, subject in enumerate(subjects):
        whole = np.nansum(importance[k])
        frame = pd.DataFrame(
            {
                "output": subject,
                "parameter": names,
                "importance": importance[k],
                "share": importance[k] / whole if whole > 0 else 0.0,
                "elasticity_of_total" if parts[0].derivative is not None else "elasticity": totals[k],
            }
        )
        if len(parts) > 1:
            frame["importance_se"] = _standard_error([each[k] for each in own])
        frame = frame.sort_values("importance", ascending=False, kind="stable", na_position="last")
        frame.insert(1, "rank", np.arange(1, len(names) + 1))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)

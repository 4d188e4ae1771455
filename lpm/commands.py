"""What the commands do, from options to a summary. The shell (`lpm.cli`) reads flags and shows results."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpm import console
from lpm.checkpoint import CheckpointStore
from lpm.errors import InputError
from lpm.options import Options
from lpm.processes import peak_memory_mb
from lpm.report.material import Fact, Fit
from lpm.ring import decode
from lpm.runs import Run
from lpm.scenario import Scenario, load

if TYPE_CHECKING:
    from lpm.evidence import Evidence
    from lpm.flame.model import Model
    from lpm.variational import LocalBackend

# The simulator and the plots are imported where they are used: the launcher of a federation needs neither.

__all__ = ["calibrate_command", "federate_command", "resume_command", "simulate_command"]

_LOCAL = Fact("One process", "Everybody's people and series are in this process: no privacy is claimed.", weaker=True)


def _scenario(options: Options) -> Scenario:
    if options.scenario is None:
        raise InputError("No scenario is given.", "Name the folder of one, such as simulations/nyc_boroughs.")
    return load(options.scenario).with_options(
        steps=options.steps,
        agents=options.agents,
        iterations=options.iterations,
        gradient=options.gradient,
        settings=options.settings,
    )


def _begin(run: Run, options: Options, scenario: Scenario, world: str) -> None:
    run.update(
        world=world,
        seed=options.seed or 0,
        steps=scenario.steps,
        agents=scenario.agents,
        scenario={"name": scenario.name, "hash": scenario.hash, "folder": str(scenario.folder)},
        parameters=scenario.defaults,
    )


def simulate_command(options: Options) -> dict[str, Any]:
    """Simulate a scenario at its parameters, in this process."""
    scenario = _scenario(options)
    run = Run.create(options.out, options.to_command(), scenario.name)
    return _simulate(run, options, scenario, None)


def _simulate(run: Run, options: Options, scenario: Scenario, found: Mapping[str, Any] | None) -> dict[str, Any]:
    from lpm.local import simulate
    from lpm.results import label_outputs, write_simulation
    from lpm.simulation import Keeper

    _begin(run, options, scenario, "local")
    began = time.monotonic()
    model = scenario.build()
    built = time.monotonic()
    store = run.checkpoints
    values = {name: value for name, value in scenario.defaults.items() if name in scenario.dynamics}
    gradient = options.gradient or "none"
    theta = np.array([[values[parameter.name] for parameter in model.parameters]])
    seed = options.seed or 0
    chosen = _choose_gradient(run, model, theta, gradient, scenario, seed)
    start = int(found["step"]) if found else 0
    with console.progress("Simulating", scenario.steps, start) as advance:
        result = simulate(
            model,
            values,
            steps=scenario.steps,
            seed=seed,
            gradient=chosen,
            step=scenario.gradient.step,
            keeper=Keeper(options.checkpoint_every or 0, lambda state: store.save(state, state["step"]), found),
            progress=lambda done, of: advance(),
        )
    run.update(
        executor=result.executor,
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb={"lpm": peak_memory_mb()},
    )
    names = list(scenario.outputs)
    words = result.words[:, : len(names), 0]
    np.save(run.path / "words.npy", words)
    outputs = label_outputs(scenario, decode(words))
    derivative = None if result.gradient is None else result.gradient[names].assign_coords(time=outputs.time)
    summary = write_simulation(
        run,
        scenario,
        outputs,
        facts=[_LOCAL],
        gradient=derivative,
        values=values,
        headline=f"Simulated {scenario.steps} days with {scenario.agents:,} agents in one process.",
    )
    run.update(status="done")
    return summary


def _choose_gradient(
    run: Run, model: Model, theta: NDArray[np.float64], gradient: str, scenario: Scenario, seed: int
) -> str:
    """The estimator of a run, which it keeps when it is resumed: an audit depends on the clock."""
    from lpm.analysis.audit import resolve_estimator

    kept = run.record().get("gradient")
    if isinstance(kept, dict):
        return str(kept["estimator"])
    chosen, audit = resolve_estimator(
        model, theta, gradient, steps=scenario.steps, seed=seed, step=scenario.gradient.step
    )
    run.update(gradient={"estimator": chosen, "reason": audit.reason if audit else "as asked"})
    return chosen


def calibrate_command(options: Options) -> dict[str, Any]:
    """Calibrate a scenario to its data, in this process."""
    scenario = _scenario(options)
    run = Run.create(options.out, options.to_command(), scenario.name)
    return _calibrate(run, options, scenario, None)


def _calibrate(run: Run, options: Options, scenario: Scenario, found: Mapping[str, Any] | None) -> dict[str, Any]:
    from lpm.results import write_study
    from lpm.variational import evidence_of, resumable

    _begin(run, options, scenario, "local")
    seed = options.seed or 0
    began = time.monotonic()
    evidence = evidence_of(scenario, seed)
    built = time.monotonic()
    store = run.checkpoints
    done = 0 if found is None or found["state"] is None else int(found["state"]["iteration"])
    with console.progress("Calibrating", scenario.calibration.iterations, done) as advance:
        study, backend = resumable(
            evidence,
            scenario,
            seed,
            found,
            lambda progress: store.save(progress.pack(), progress.step),
            lambda record, of: advance(f"loss {record.loss:.1f}"),
            lambda: options.time_limit is not None and time.monotonic() - began > options.time_limit,
        )
    run.update(
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb={"lpm": peak_memory_mb()},
        gradient={"estimator": study.choice.estimator, "reason": study.choice.reason},
    )
    fits = _fits(scenario, evidence, backend)
    summary = write_study(run, scenario, study, fits=fits, withheld=[], facts=[_LOCAL], seed=seed)
    run.update(status="done")
    return summary


def _fits(scenario: Scenario, evidence: Evidence, backend: LocalBackend) -> list[Fit]:
    dates = np.datetime64(scenario.start, "D") + np.arange(scenario.steps)
    held = scenario.steps - scenario.held_out if scenario.held_out else None
    bands = backend.forecasts["posterior"].bands
    return [
        Fit(
            each.institution,
            series.name,
            dates,
            np.asarray(series.values, dtype=np.float64)[: scenario.steps],
            bands[each.institution, series.name],
            held,
        )
        for each in evidence.observations
        for series in each.series
    ]


def federate_command(options: Options) -> dict[str, Any]:
    """Run a scenario with one process per institution and a coordinator, on this machine."""
    scenario = _scenario(options)
    run = Run.create(options.out, options.to_command(), scenario.name)
    return _federate(run, options, scenario, resume=False)


def _federate(run: Run, options: Options, scenario: Scenario, *, resume: bool) -> dict[str, Any]:
    from lpm import launch

    _begin(run, options, scenario, "federated")
    if options.steps is not None:
        # Both sides apply it as a setting, so that their scenarios have the same hash.
        options = options.with_(steps=None, settings=dict(options.settings) | {"scenario.steps": str(options.steps)})
    code = launch.federate(options, run.path, scenario.institutions, resume=resume)
    if code:
        raise SystemExit(code)
    # On one machine the launcher may look into the parties' folders; the coordinator never does.
    notes = [json.loads(path.read_text()) for path in sorted(run.path.glob("parties/*/summary.json"))]
    run.update(peak_memory_mb={note["party"]: note["peak_memory_mb"] for note in notes})
    return dict(run.record()["summary"])


def resume_command(path: Path, options: Options) -> dict[str, Any]:
    """Go on with a run from its last checkpoint."""
    run = Run.open(path)
    if options.command == "coordinator":
        raise InputError(
            f"{path} was begun by hand: `lpm resume` can't start the institutions' processes.",
            "Start `lpm coordinator` and each `lpm client` again, with the same flags and --resume.",
        )
    run.reopen()
    scenario = _scenario(options)
    recorded = run.record().get("scenario", {}).get("hash")
    if recorded not in (None, scenario.hash):
        raise InputError(f"The scenario {scenario.name} has changed since {path} was begun.", "Start a new run.")
    if options.command == "federate":
        return _federate(run, options, scenario, resume=True)
    store: CheckpointStore = run.checkpoints
    latest = store.latest()
    found = None if latest is None else latest.content
    return (_simulate if options.command == "simulate" else _calibrate)(run, options, scenario, found)

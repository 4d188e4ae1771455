"""What the commands do, from options to a summary. The shell (`lpm.cli`) reads flags and shows results."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpm import console, ranks
from lpm.errors import InputError
from lpm.leakage import LEAKAGE_PAGE, find_ledgers, read_leakage, write_page
from lpm.options import BIASED, Options
from lpm.processes import peak_memory_mb
from lpm.report.material import Fact, Fit
from lpm.ring import decode
from lpm.runs import Run, versions
from lpm.scenario import Scenario, load

if TYPE_CHECKING:
    from lpm.evidence import Evidence
    from lpm.flame.model import Model
    from lpm.variational import LocalBackend
    from lpm.worlds.process_group import Ranks

# The simulator and the plots are imported where they are used: the launcher of a federation needs neither.

__all__ = [
    "audit_command",
    "calibrate_command",
    "federate_command",
    "resume_command",
    "sensitivity_command",
    "simulate_command",
]

_AUDIT_AGENTS, _AUDIT_SEEDS = 4000, 8
"""Of a federation's gradient audit: a bias comes from how people meet and hardly from how many there are; and what is
still open after these runs is left to finite differences, since everybody waits for the verdict."""
_LOCAL = Fact("One owner", "Everybody's people and series are in one owner's processes: no privacy is claimed.", True)


def _scenario(options: Options) -> Scenario:
    if options.scenario is None:
        raise InputError("No scenario is given.", "Name the folder of one, such as simulations/nyc_boroughs.")
    scenario = load(options.scenario).with_options(
        steps=options.steps,
        agents=options.agents,
        iterations=options.iterations,
        gradient=options.gradient,
        settings=options.settings,
    )
    scenario.require_memory()
    return scenario


def _begin(run: Run, options: Options, scenario: Scenario, world: str, number: int = 1) -> None:
    run.update(
        world=world,
        ranks=number,
        seed=options.seed or 0,
        steps=scenario.steps,
        agents=scenario.agents,
        scenario={"name": scenario.name, "hash": scenario.hash, "folder": str(scenario.folder)},
        parameters=scenario.defaults,
    )


def _join(options: Options, scenario: Scenario) -> Ranks | None:
    """Meet the other ranks, if there are any, and see that all were started alike."""
    from lpm.worlds.process_group import DEADLINE, join

    device = "cpu"
    if options.device is not None:
        from lpm.kernels.device import find_device

        device = str(find_device(options.device))
    group = join(options.deadline or DEADLINE, device)
    if group is not None:
        asked = options.to_command()
        for own in ("out", "scenario", "json"):
            asked.pop(own, None)
        installed = versions()
        group.require_same(
            scenario=scenario.hash,
            command=sorted(asked.items(), key=str),
            lpm=installed["lpm"],
            torch=installed["torch"],
        )
    return group


def _new_run(options: Options, scenario: Scenario, group: Ranks | None) -> Run | None:
    """The run's directory, at the one process that writes it."""
    if group is not None and group.rank > 0:
        return None
    return Run.create(options.out, options.to_command(), scenario.name)


def _peak_memory(group: Ranks | None) -> dict[str, float]:
    if group is None:
        return {"lpm": peak_memory_mb()}
    return {f"rank {k}": float(peak[0]) for k, peak in enumerate(group.all(np.array([peak_memory_mb()])))}


def simulate_command(options: Options) -> dict[str, Any]:
    """Simulate a scenario at its parameters, in this process or on the ranks of `torchrun`."""
    scenario = _scenario(options)
    group = _join(options, scenario)
    return _simulate(_new_run(options, scenario, group), options, scenario, None, group)


def _simulate(
    run: Run | None, options: Options, scenario: Scenario, found: Mapping[str, Any] | None, group: Ranks | None
) -> dict[str, Any]:
    """Simulate; without a run at ranks that write nothing."""
    from lpm.local import simulate
    from lpm.results import label_outputs, write_simulation
    from lpm.simulation import Keeper
    from lpm.worlds.distributed import here

    count = 1 if group is None else group.ranks
    if run is not None:
        _begin(run, options, scenario, "local" if count == 1 else "distributed", count)
    began = time.monotonic()
    _, model = here(scenario.build())  # of a population that is spread out, a rank keeps its own part alone
    built = time.monotonic()

    def keep(state: Mapping[str, Any]) -> None:
        assert run is not None
        run.checkpoints.save(state, state["step"])

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
            executor=options.executor,
            keeper=Keeper(options.checkpoint_every or 0, keep, found),
            progress=lambda done, of: advance(),
        )
    memory = _peak_memory(group)
    if run is None:
        return {}
    run.update(
        executor=result.executor,
        device=result.executor.partition(":")[2] or "cpu",
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb=memory,
    )
    names = list(scenario.outputs)
    words = result.words[:, : len(names), 0]
    np.save(run.path / "words.npy", words)
    outputs = label_outputs(scenario, decode(words))
    derivative = None if result.gradient is None else result.gradient[names].assign_coords(time=outputs.time)
    where = "in one process" if count == 1 else f"on {count} ranks"
    summary = write_simulation(
        run,
        scenario,
        outputs,
        facts=[_LOCAL],
        gradient=derivative,
        values=values,
        headline=f"Simulated {scenario.steps} days with {scenario.agents:,} agents {where}.",
    )
    run.update(status="done")
    return summary


def _choose_gradient(
    run: Run | None,
    model: Model,
    theta: NDArray[np.float64],
    gradient: str,
    scenario: Scenario,
    seed: int,
    mode: str = "forward",
) -> str:
    """The estimator of a run, which it keeps when it is resumed: an audit depends on the clock."""
    from lpm.analysis.audit import resolve_estimator
    from lpm.worlds.process_group import agreed

    kept = agreed(None if run is None else run.record().get("gradient"))
    if isinstance(kept, dict):
        return str(kept["estimator"])
    chosen, audit = resolve_estimator(
        model, theta, gradient, steps=scenario.steps, seed=seed, step=scenario.gradient.step, mode=mode
    )
    if audit is not None:
        audit.require_mode(mode)
    if run is not None:
        asked = "as asked; BIASED, for comparison only" if chosen in BIASED else "as asked"
        run.update(gradient={"estimator": chosen, "reason": audit.reason if audit else asked})
    return chosen


def sensitivity_command(options: Options) -> dict[str, Any]:
    """Find how every output of a scenario answers to every parameter, in this process or on the ranks of `torchrun`."""
    from lpm.estimators import require_estimator

    scenario = _scenario(options)
    gradient = options.gradient or scenario.gradient.estimator
    if gradient not in ("auto", "none"):
        require_estimator(gradient, mode=options.mode)
    group = _join(options, scenario)
    return _sensitivity(_new_run(options, scenario, group), options, scenario, None, group)


def _sensitivity(
    run: Run | None, options: Options, scenario: Scenario, found: Mapping[str, Any] | None, group: Ranks | None
) -> dict[str, Any]:
    from lpm.analysis.sensitivity import Part, parse_targets, sensitivity
    from lpm.derivative_results import write_sensitivity
    from lpm.simulation import Keeper
    from lpm.worlds.distributed import here
    from lpm.worlds.process_group import agreed

    gradient = options.gradient or scenario.gradient.estimator
    count = 1 if group is None else group.ranks
    if run is not None:
        _begin(run, options, scenario, "local" if count == 1 else "distributed", count)
    began = time.monotonic()
    _, model = here(scenario.build())
    built = time.monotonic()
    parse_targets(options.targets, list(model.recorded))
    values = {name: value for name, value in scenario.defaults.items() if name in scenario.dynamics}
    seed = options.seed or 0
    if gradient != "none":
        theta = np.array([[values[parameter.name] for parameter in model.parameters]])
        gradient = _choose_gradient(run, model, theta, gradient, scenario, seed, options.mode)
    parts = [Part(*each) for each in agreed(found["parts"] if found else [])]
    state = found["state"] if found else None

    def save(now: Mapping[str, Any] | None, step: int) -> None:
        if run is None:
            return
        packed = [(part.outputs, part.derivative, part.targets, part.values) for part in parts]
        run.checkpoints.save({"parts": packed, "state": now}, len(parts) * scenario.steps + step)

    def keep(whole: list[Part]) -> None:
        parts[:] = whole
        save(None, 0)

    total, start = options.replicates * scenario.steps, len(parts) * scenario.steps + int(state["step"] if state else 0)
    with console.progress("Simulating", total, start) as advance:
        result = sensitivity(
            model,
            values,
            steps=scenario.steps,
            seed=seed,
            gradient=gradient,
            mode=options.mode,
            targets=options.targets,
            replicates=options.replicates,
            step=scenario.gradient.step,
            executor=options.executor,
            keeper=Keeper(options.checkpoint_every or 0, lambda now: save(now, now["step"]), state),
            done=tuple(parts),
            on_replicate=keep,
            progress=lambda done, of: advance(),
        )
    memory = _peak_memory(group)
    if run is None:
        return {}
    run.update(
        executor=result.executor,
        device=result.executor.partition(":")[2] or "cpu",
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb=memory,
    )
    summary = write_sensitivity(run, scenario, result, facts=[_LOCAL])
    run.update(status="done")
    return summary


def audit_command(options: Options) -> dict[str, Any]:
    """Measure how true each gradient estimator is on a scenario, in this process."""
    from lpm.analysis.audit import require_known

    scenario = _scenario(options)
    require_known(options.estimators)
    _require_alone()
    return _audit(Run.create(options.out, options.to_command(), scenario.name), options, scenario)


def _require_alone() -> None:
    if ranks.place().ranks > 1:
        raise InputError("lpm audit runs in one process.", "Start it without torchrun, with fewer agents (--agents).")


def _audit(run: Run, options: Options, scenario: Scenario) -> dict[str, Any]:
    from lpm.analysis.audit import audit_gradients
    from lpm.derivative_results import write_audit

    _begin(run, options, scenario, "local")
    began = time.monotonic()
    model = scenario.build()
    built = time.monotonic()
    values = {name: value for name, value in scenario.defaults.items() if name in scenario.dynamics}
    with console.progress("Auditing", options.seeds) as advance:
        audit = audit_gradients(
            model,
            values,
            steps=scenario.steps,
            seed=options.seed or 0,
            seeds=options.seeds,
            estimators=options.estimators or None,
            step=scenario.gradient.step,
            progress=lambda done, of: advance(),
        )
    run.update(
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb={"lpm": peak_memory_mb()},
        gradient={"estimator": audit.chosen, "reason": audit.reason},
    )
    summary = write_audit(run, scenario, audit, facts=[_LOCAL])
    run.update(status="done")
    return summary


def calibrate_command(options: Options) -> dict[str, Any]:
    """Calibrate a scenario to its data, in this process or on the ranks of `torchrun`."""
    scenario = _scenario(options)
    scenario.require_observed()
    group = _join(options, scenario)
    return _calibrate(_new_run(options, scenario, group), options, scenario, None, group)


def _calibrate(
    run: Run | None, options: Options, scenario: Scenario, found: Mapping[str, Any] | None, group: Ranks | None
) -> dict[str, Any]:
    """Calibrate: every rank takes the same steps of the posterior, with losses of the whole population."""
    from lpm.results import write_study
    from lpm.variational import evidence_of, resumable
    from lpm.worlds.process_group import agreed

    count = 1 if group is None else group.ranks
    if run is not None:
        _begin(run, options, scenario, "local" if count == 1 else "distributed", count)
    found = agreed(found)
    seed = options.seed or 0
    began = time.monotonic()
    evidence = evidence_of(scenario, seed, options.executor)
    built = time.monotonic()
    store = None if run is None else run.checkpoints
    done = 0 if found is None or found["state"] is None else int(found["state"]["iteration"])
    with console.progress("Calibrating", scenario.calibration.iterations, done) as advance:
        study, backend = resumable(
            evidence,
            scenario,
            seed,
            found,
            lambda progress: None if store is None else store.save(progress.pack(), progress.step),
            lambda record, of: advance(f"loss {record.loss:.1f}"),
            lambda: agreed(options.time_limit is not None and time.monotonic() - began > options.time_limit),
        )
    memory = _peak_memory(group)
    if run is None:
        return {}
    run.update(
        timings={"building_s": built - began, "computing_s": time.monotonic() - built},
        peak_memory_mb=memory,
        gradient={"estimator": study.choice.estimator, "reason": study.choice.reason},
        executor=evidence.ran,
        device=options.device or "cpu",
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
    if not options.simulate_only:
        scenario.require_observed()
    scenario.require_thresholds(options.sharing or scenario.federation.sharing)
    run = Run.create(options.out, options.to_command(), scenario.name)
    return _federate(run, options, scenario, resume=False)


def _federate(run: Run, options: Options, scenario: Scenario, *, resume: bool) -> dict[str, Any]:
    from lpm import launch

    plan = launch.plan(options, run.path, scenario.institutions)
    _begin(run, options, scenario, "federated")
    if scenario.gradient.estimator == "auto" and not options.simulate_only:
        options = options.with_(gradient=_audited(run, options, scenario))
    if options.steps is not None:
        # Both sides apply it as a setting, so that their scenarios have the same hash.
        options = options.with_(steps=None, settings=dict(options.settings) | {"scenario.steps": str(options.steps)})
    options = options.with_(sharing=options.sharing or scenario.federation.sharing)
    run.update(leakage=LEAKAGE_PAGE)  # the report links it; it is counted when all ledgers are closed
    code = launch.federate(options, run.path, plan, resume=resume)
    if code:
        raise SystemExit(code)
    # On one machine the launcher may look into the parties' folders; the coordinator never does.
    notes = [json.loads(path.read_text()) for path in sorted(run.path.glob("parties/*/summary.json"))]
    write_page(run.path / LEAKAGE_PAGE, [read_leakage(path) for path in find_ledgers(run.path)])
    run.update(
        executor=", ".join(sorted({note["executor"] for note in notes})),
        peak_memory_mb={note["party"]: note["peak_memory_mb"] for note in notes},
    )
    return dict(run.record()["summary"])


def _audited(run: Run, options: Options, scenario: Scenario) -> str:
    """The estimator that an audit on synthetic people in this process chooses; a resumed run keeps it.

    It sees no series and opens no sum. The coordinator reads the verdict in `run.json` and puts it into the manifest.
    """
    found = run.record().get("gradient")
    if found is None:
        from lpm.analysis import audit
        from lpm.estimators import candidates

        console.note("Auditing gradients on synthetic people.")
        model = scenario.with_options(agents=min(scenario.agents, _AUDIT_AGENTS)).build()
        seed = options.seed or 0
        verdict = audit.audit_gradients(
            model,
            np.array([scenario.defaults[parameter.name] for parameter in model.parameters]),
            steps=scenario.steps,
            seed=seed,
            seeds=_AUDIT_SEEDS,
            estimators=candidates(model),
            step=scenario.gradient.step,
        )
        found = {"estimator": verdict.chosen, "reason": verdict.reason, "audited_agents": model.population.agents}
        run.update(gradient=found)
    return str(found["estimator"])


def resume_command(path: Path, options: Options) -> dict[str, Any]:
    """Go on with a run from its last checkpoint."""
    run = Run.open(path)
    if options.command == "coordinator":
        raise InputError(
            f"{path} was begun by hand: `lpm resume` can't start the institutions' processes.",
            "Start `lpm coordinator` and each `lpm client` again, with the same flags and --resume.",
        )
    scenario = _scenario(options)
    recorded = run.record().get("scenario", {}).get("hash")
    if recorded not in (None, scenario.hash):
        raise InputError(f"The scenario {scenario.name} has changed since {path} was begun.", "Start a new run.")
    if options.command == "federate":
        if ranks.place().ranks > 1:
            raise InputError(f"{path} is a federation, which ranks can't resume.", "Resume it without torchrun.")
        run.reopen()
        return _federate(run, options, scenario, resume=True)
    if options.command == "audit":  # it keeps no checkpoints, and begins again
        _require_alone()
        run.reopen()
        return _audit(run, options, scenario)
    work = {"simulate": _simulate, "sensitivity": _sensitivity, "calibrate": _calibrate}[options.command]
    group = _join(options, scenario)
    if group is not None and group.rank > 0:
        return work(None, options, scenario, None, group)
    run.reopen()
    latest = run.checkpoints.latest()
    return work(run, options, scenario, None if latest is None else latest.content, group)

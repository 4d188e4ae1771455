"""The coordinator's part of a session, from the manifest to the report. It runs no model and holds nobody's data."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import numpy as np
import torch

from lpm.calibration.study import Progress
from lpm.calibration.study import run as run_study
from lpm.checkpoint import CheckpointStore
from lpm.privacy.dealer import LABEL
from lpm.privacy.dp import epsilon_of
from lpm.privacy.dropout import dropout_note
from lpm.privacy.policy import Policy
from lpm.privacy.withheld import decode_told, tensor_of
from lpm.processes import peak_memory_mb
from lpm.protocol.identity import COORDINATOR
from lpm.protocol.manifest import Terms
from lpm.report import Fact, Fit
from lpm.results import label_outputs, write_simulation, write_study
from lpm.runs import Run
from lpm.scenario import Scenario, load
from server.calibrator import FederatedBackend
from server.config import CoordinatorConfig, own_folder
from server.relay import CoordinatorSession, gather

__all__ = ["run"]

_ENGINES = {
    "crypten": (
        "additive shares over all pairs of institutions, end-to-end sealed; n−2 colluding institutions learn only the "
        "sum of the other two."
    ),
    "masked": (
        "masks over all pairs of institutions, added up by the coordinator under one more mask that it does not know; "
        "one institution that colludes with it lets it read group sums; n−2 that collude learn only the sum of the "
        "other two."
    ),
}

_log = logging.getLogger(__name__)

_SIMULATION = 4 << 40
"""Trajectory number of a plain simulation."""


def run(config: CoordinatorConfig) -> dict[str, Any]:
    """Hold one session: gather the parties, simulate or calibrate, write the run's files.

    Args:
        config: the coordinator's.

    Returns:
        the summary of the run, which is also in `run.json`.

    Raises:
        LpmError: as `server.relay.gather` and the session raise.
    """
    began = time.monotonic()
    torch.set_num_threads(1)
    scenario = load(config.scenario).with_options(
        steps=config.steps,
        agents=config.agents,
        iterations=config.iterations,
        gradient=config.gradient or None,
        settings={**config.settings, **({"calibration.draws": str(config.draws)} if config.draws else {})},
    )
    record = Run.open(config.out)
    seed = config.seed or 0
    # `lpm federate` has audited the gradient before it started anybody, and notes the verdict.
    noted = record.record().get("gradient", {})
    audit = str(noted.get("reason", "")) if noted.get("estimator") == scenario.gradient.estimator else ""
    terms = _terms(config, scenario, audit)
    record.update(
        world="federated",
        scenario={"name": scenario.name, "hash": scenario.hash, "folder": str(scenario.folder)},
        parties=list(config.parties),
        sharing=config.sharing,
        settings=dict(config.settings),
        seed=config.seed,
        steps=scenario.steps,
        agents=scenario.agents,
    )
    with gather(config, terms) as session:
        gathered = time.monotonic()
        _log.info("All %d parties are in; manifest %s.", len(config.parties), session.manifest.digest.hex()[:16])
        backend = FederatedBackend(session, scenario, lambda partial: _note_partial(record, partial))
        facts = _facts(scenario, terms, len(config.parties))
        if config.simulate_only:
            theta = np.array([[each.value for each in scenario.declared]])
            words = backend.words(theta, _SIMULATION, plain=True)
            worked = time.monotonic()
            _account(record, session, began, gathered, worked)
            np.save(config.out / "words.npy", words[:, :, 0])
            summary = write_simulation(
                record,
                scenario,
                label_outputs(scenario, decode_told(words)[:, :, 0]),
                facts=facts,
                values=scenario.defaults,
                headline=f"Simulated {scenario.steps} days, {scenario.agents:,} agents, {len(config.parties)} parties.",
            )
        else:
            summary = _calibrate(config, scenario, backend, record, seed, facts, began, gathered)
    if backend.noise:
        delta = Policy().delta
        spent = {"epsilon": epsilon_of(backend.noise, delta), "delta": delta, "noisy_sums": dict(backend.noise)}
        record.update(privacy={"mode": scenario.privacy.mode, **spent})
    # A ledger that is set back later, head and all, is found out by the head that was noted here.
    record.update(ledgers={party: dict(each.about) for party, each in session.partings.items()})
    record.update(status="done", summary=summary)
    return summary


def _calibrate(
    config: CoordinatorConfig,
    scenario: Scenario,
    backend: FederatedBackend,
    record: Run,
    seed: int,
    facts: list[Fact],
    began: float,
    gathered: float,
) -> dict[str, Any]:
    store = CheckpointStore(
        config.out / "checkpoint", (own_folder(config.keys) / "storage.key").read_bytes(), COORDINATOR
    )
    found = store.latest() if config.resume else None
    progress = None if found is None else Progress.unpack(found.content)

    def save(now: Progress) -> None:
        store.save(now.pack(), now.step)

    def deadline_passed() -> bool:
        return config.time_limit_seconds is not None and time.monotonic() - began > config.time_limit_seconds

    settings = scenario.study_settings(seed)
    if audit := backend.session.manifest.terms.audit:
        settings = dataclasses.replace(settings, reason=audit)
    study = run_study(
        scenario.parameters,
        backend,
        settings,
        # A score is opened only where losses are, as they are: noise would drown it.
        held_out=scenario.held_out > 0 and scenario.privacy.mode != "outputs+gradients",
        progress=progress,
        save=save,
        on_iteration=lambda each, count: _log.info(
            "Iteration %d of %d: loss %.1f, KL %.2f.", each.iteration + 1, count, each.loss, each.kl
        ),
        deadline_passed=deadline_passed,
    )
    worked = time.monotonic()
    _account(record, backend.session, began, gathered, worked)
    fits, released = [], set()
    dates = np.datetime64(scenario.start, "D") + np.arange(scenario.steps)
    for release in backend.releases.values():
        for name, table in release.tables.items():
            about = release.about[name]
            released.add(str(about["institution"]))
            fits.append(
                Fit(
                    str(about["institution"]),
                    str(about["series"]),
                    dates,
                    table[0],
                    table[1:],
                    scenario.steps - scenario.held_out if scenario.held_out else None,
                )
            )
    withheld = [name for name in scenario.institutions if name not in released]
    record.update(gradient={"estimator": study.choice.estimator, "reason": study.choice.reason})
    facts = facts + _partial_facts(record)
    return write_study(record, scenario, study, fits=fits, withheld=withheld, facts=facts, seed=seed)


def _terms(config: CoordinatorConfig, scenario: Scenario, audit: str = "") -> Terms:
    weaker = [*([scenario.weaker] if scenario.weaker else []), *config.labels]
    if config.unsafe:
        weaker.append("no disclosure control: groups of any size are opened")
    if config.seed is not None:
        weaker.append("public seed: whoever knows it and the code can simulate any party's people again")
    if scenario.thresholds:
        scenario.require_thresholds(config.sharing)
        weaker.append(LABEL)
    return Terms(
        scenario=scenario.name,
        scenario_hash=scenario.hash,
        session=config.session,
        sharing=config.sharing,
        droppable=scenario.droppable if config.sharing == "masked" and not config.simulate_only else (),
        thresholds=tuple(map(tensor_of, scenario.thresholds)),
        fraction_bits=scenario.federation.fraction_bits,
        bounds={name: network.bound * scenario.agents for name, network in scenario.networks.items()},
        exponents={name: scenario.federation.fraction_bits for name in scenario.networks},
        outputs=tuple(scenario.outputs),
        resolution_days=scenario.federation.resolution_days,
        privacy=scenario.mechanism.label,
        gradient="none" if config.simulate_only else scenario.gradient.estimator,
        audit=audit,
        steps=scenario.steps,
        agents=scenario.agents,
        deadline_seconds=config.deadline_seconds or scenario.federation.deadline_seconds,
        weaker=tuple(weaker),
    )


def _facts(scenario: Scenario, terms: Terms, parties: int) -> list[Fact]:
    """Who could see what, for the report."""
    groups = ", ".join(f"{name} ({network.groups})" for name, network in scenario.networks.items())
    facts = [
        Fact("Stays with each institution", "People, trajectories, series, losses, gradients, forecasts."),
        Fact(
            "Group sums",
            f"Opened to the institutions, not to the coordinator, each step: {groups}; cells of at least "
            f"{scenario.minimum_people} agents from {scenario.minimum_institutions} institutions.",
        ),
        Fact(
            "Opened to the coordinator",
            "Sums over all institutions of the public outputs "
            f"({', '.join(scenario.outputs)}), of losses, gradients and forecast scores.",
        ),
        Fact("Engine", f"{terms.sharing}: {_ENGINES[terms.sharing]}"),
        Fact("Differential privacy", terms.privacy + "."),
        Fact("Counted afterwards", "`lpm leakage RUN`, from each institution's signed ledger."),
        Fact("Fits", "Bands and series of an institution are shown only where it consented to release them."),
    ]
    if scenario.thresholds:
        facts.append(
            Fact(
                "Told above a threshold",
                f"{', '.join(scenario.thresholds)}: each day and draw only if {scenario.minimum_people} agents of "
                f"{scenario.minimum_institutions} institutions stand behind it; else it is missing here, too.",
            )
        )
    if terms.sharing == "masked":
        facts.append(Fact("Lost institutions", dropout_note(parties, terms.droppable)))
    return facts + [Fact("Weaker than the default", text, weaker=True) for text in terms.weaker]


def _note_partial(record: Run, partial: dict[str, Any]) -> None:
    record.update(partial=[*record.record().get("partial", []), partial])


def _partial_facts(record: Run) -> list[Fact]:
    """What a reader must know of sums that were opened without somebody."""
    return [
        Fact(
            "Sum without everybody",
            f"The {each['tensor']} of trajectory {each['trajectory']} is without {each['without']}, scaled up.",
            weaker=True,
        )
        for each in record.record().get("partial", [])
    ]


def _account(record: Run, session: CoordinatorSession, began: float, gathered: float, worked: float) -> None:
    record.update(
        rounds=session.rounds,
        bytes={"received": session.bytes_received, "sent": session.bytes_sent},
        timings={"gathering_s": gathered - began, "computing_s": worked - gathered},
        peak_memory_mb={COORDINATOR: peak_memory_mb()},
    )

"""Figures for docs/follow-one-number.md: the first iteration of a calibration, with everything that is usually hidden.

Five threads play the boroughs, with the real engine, real keys and real seals; a public seed stands in for their
secret ones. It needs `pip install -e ".[mpc]"` and half a minute:

    python docs/figures/follow_one_number.py

It writes follow_one_number.json and follow_one_number.png beside itself. Masks and seals are fresh in each run, so the
masked words differ; the sums do not.
"""

from __future__ import annotations

import datetime as dt
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from lpm import ring
from lpm.calibration.gvi import fit
from lpm.estimators import evaluate as run_draws
from lpm.evidence import Evidence
from lpm.privacy.memory_channel import in_memory_sums
from lpm.privacy.secure_sum import Opening
from lpm.protocol.messages import Task
from lpm.rng import derive
from lpm.scenario import Scenario, load
from lpm.worlds.federated import FederatedWorld
from lpm.worlds.world import Disclosure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SCENARIO = HERE.parents[1] / "simulations" / "nyc_boroughs"
BOROUGH, DAY = "queens", dt.date(2020, 3, 30)


def main() -> None:
    """Run one iteration and write what happened."""
    torch.set_num_threads(1)
    scenario = load(SCENARIO)
    names = scenario.institutions
    me = names.index(BOROUGH)
    shards = [
        Evidence(
            scenario.build([name], seed=0),
            [scenario.observation(name)],
            parameters=scenario.parameters,
            steps=scenario.steps,
            held_out=scenario.held_out,
            seed=0,
            step=scenario.gradient.step,
            replicates=scenario.calibration.replicates,
        )
        for name in names
    ]
    hub, engines = in_memory_sums(len(names))
    rule = Disclosure(scenario.minimum_people, scenario.minimum_institutions)
    worlds = [FederatedWorld(engine, rule) for engine in engines]
    seen: dict[str, Any] = {}

    def evaluate(theta: NDArray[np.float64], iteration: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        task = Task("evaluate", iteration, theta, "fd")

        def party(place: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            torch.set_num_threads(1)
            worlds[place].take(task.trajectory, task.digest)
            found = shards[place].evaluate(theta, task.trajectory, estimator="fd", world=worlds[place])
            worlds[place].tell_coordinator("loss", ring.encode(found[0]))
            worlds[place].tell_coordinator("gradient", ring.encode(found[1]).reshape(-1))
            return found

        with ThreadPoolExecutor(len(names)) as pool:
            own = list(pool.map(party, range(len(names))))
        totals = {round.tensor: ring.decode(words) for round, words in hub.totals.items()}
        seen.update(theta=theta, own=own, totals=totals)
        return totals["loss"], totals["gradient"].reshape(theta.shape)

    record = fit(
        scenario.parameters,
        evaluate,
        iterations=1,
        draws=scenario.calibration.draws,
        weight=scenario.calibration.weight,
        seed=0,
    ).records[0]

    (place, _), bodies = next(
        (item, body)
        for item, body in zip(hub.headers, hub.bodies, strict=True)
        if item[0] == me and item[1].round.tensor == "loss"
    )
    assert place == me
    masked = np.frombuffer(bodies[1][0], dtype="<i8")
    emit = next(
        (header, body[1])
        for (party, header), body in zip(hub.headers, hub.bodies, strict=True)
        if party == me and header.opening is Opening.PARTIES and header.round.tensor.startswith("emit")
    )
    figures = _figures(shards[me], seen, me, masked, DAY, scenario.start)
    figures |= _one_day(scenario, shards[me], seen["theta"])
    figures |= {
        "replicates": scenario.calibration.replicates,
        "group_words": (len(emit[1][0]) - 16) // 8,
        "sealed_bytes": len(emit[1][0]),
        "sealed_begin": emit[1][0][:16].hex(),
        "rounds": hub.rounds,
        "parameters": [parameter.name for parameter in scenario.parameters],
        "posterior_u": {"mean": list(record.mean), "sd": list(record.sd), "step": record.step},
    }
    (HERE / "follow_one_number.json").write_text(json.dumps(figures, indent=1) + "\n")
    _draw(figures)


def _figures(
    evidence: Evidence, seen: dict[str, Any], me: int, masked: NDArray[np.int64], day: dt.date, start: dt.date
) -> dict[str, Any]:
    theta, own, totals = seen["theta"], seen["own"], seen["totals"]
    series = next(each for each in evidence.observations[0].series if each.name == "admissions")
    index = (day - start).days
    words = ring.encode(own[me][0])
    return {
        "day": index,
        "observed": float(series.values[index]),
        "people": evidence.model.population.agents,
        "weight": evidence.model.population.weight,
        "theta": theta.tolist(),
        "loss_own": [float(v) for v in own[me][0]],
        "loss_word": int(words[0]),
        "masked_word": int(masked[0]),
        "zero_share": int((masked.astype(np.uint64) - words.astype(np.uint64)).astype(np.int64)[0]),
        "loss_of_each": [float(each[0][0]) for each in own],
        "loss_opened": totals["loss"].tolist(),
        "gradient_own": own[me][1][0].tolist(),
        "gradient_opened": totals["gradient"].reshape(theta.shape)[0].tolist(),
    }


def _one_day(scenario: Scenario, evidence: Evidence, theta: NDArray[np.float64]) -> dict[str, float]:
    """What draw 1 makes of the day: the mean of the replicates, from the whole city in one process: the same bits."""
    city = scenario.build(scenario.institutions, seed=0)
    columns = [scenario.parameters.index(parameter) for parameter in city.parameters]
    name = f"admissions/{BOROUGH}"
    at = list(city.recorded).index(name)
    seeds = [derive(0, "trajectory", 0, replicate) for replicate in range(scenario.calibration.replicates)]
    runs = [run_draws(city, theta[:1, columns], estimator="none", steps=scenario.steps, seed=seed) for seed in seeds]
    outputs = {name: torch.from_numpy(np.mean([run.outputs[:, at] for run in runs], axis=0).T)}
    values = {p.name: torch.from_numpy(theta[:1, k]) for k, p in enumerate(scenario.parameters)}
    series = next(each for each in evidence.observations[0].series if each.name == "admissions")
    index = (DAY - scenario.start).days
    return {
        "expected": float(series.expected(outputs, values)[0, index]),
        "log_probability": float(series.log_likelihood(outputs, values, slice(index, index + 1))[0]),
    }


def _draw(figures: dict[str, Any]) -> None:
    draws, slopes = np.shape(figures["theta"])[0], np.size(figures["theta"])
    steps = [
        ("Queens", f"file: {figures['observed']:.0f} admissions\n30 March 2020"),
        ("Queens", f"loss of draw 1\n{figures['loss_own'][0]:,.2f}"),
        ("Queens", f"word: round(loss · 2³²)\n{figures['loss_word']:,}"),
        ("Queens", f"+ share of zero, mod 2⁶⁴\n{figures['masked_word']:,}"),
        ("coordinator", f"sum of five masked words\n{figures['loss_opened'][0]:,.2f}"),
        ("coordinator", f"{draws} losses, {slopes} slopes\n→ one step of the posterior"),
    ]
    plane, axes = plt.subplots(figsize=(12, 2.5))
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 2.5)
    axes.axis("off")
    for k, (who, text) in enumerate(steps):
        colour = "#d7e8f2" if who == "Queens" else "#fbf0dd"
        box = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#777777"}
        left, top = 2.0 + 4.0 * (k % 3), 1.85 - 1.2 * (k // 3)
        axes.text(left, top, f"{who}\n{text}", ha="center", va="center", fontsize=10, bbox=box)
        if k % 3:
            axes.annotate("", (left - 1.45, top), (left - 2.55, top), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axes.annotate("", (2.0, 1.18), (10.0, 1.32), arrowprops={"arrowstyle": "->", "lw": 1.0, "color": "#777777"})
    plane.savefig(HERE / "follow_one_number.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()

"""What noise costs: the calibration of the five boroughs, and an output they open, against ε.

    python benchmarks/privacy_utility.py [--seeds 3]         # goes on where it was stopped, then draws the figure

`outputs+gradients`: the calibration of `nyc_boroughs` at a small number of agents, by the losses and gradients that the
coordinator would open. They are made in the **Local world**: the simulation, each borough's loss and gradient, the
clipping and every party's share of the noise are those of a federation (`lpm.privacy.dp` in words of the ring, added
up), and no bytes are sent. Noise is calibrated to ε for all that such a run opens: two sums an iteration and the
outputs. `outputs`: five parties over an in-memory channel simulate the town at 64 draws of the prior; their weekly
admissions are opened with noise, once. Scores are computed by one who holds all series, which no coordinator does.

Writes benchmarks/figures/privacy_utility.json and docs/figures/privacy_utility.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lpm import console, ring  # noqa: E402
from lpm.calibration.gvi import fit  # noqa: E402
from lpm.calibration.priors import Prior  # noqa: E402
from lpm.calibration.study import POSTERIOR, PRIOR  # noqa: E402
from lpm.evidence import Evidence  # noqa: E402
from lpm.privacy.dp import Mechanism, SecretStream, calibrated_multiplier  # noqa: E402
from lpm.privacy.memory_channel import in_memory_sums  # noqa: E402
from lpm.rng import derive  # noqa: E402
from lpm.scenario import Scenario, load  # noqa: E402
from lpm.variational import evidence_of  # noqa: E402
from lpm.worlds.federated import FederatedWorld  # noqa: E402
from lpm.worlds.world import Disclosure  # noqa: E402

FIGURES = ROOT / "benchmarks" / "figures" / "privacy_utility.json"
PICTURE = ROOT / "docs" / "figures" / "privacy_utility.png"
EPSILONS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 1e4, 1e5)
OUTPUT_EPSILONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
CLIP_ALONE = 1e9
"""An ε so large that what is lost is lost by the clip; not drawn."""
DELTA, HONEST = 1e-5, 2
DRAWS = 64
"""Of the prior, for the outputs and for forecasts."""

LOWEST_SHOWN = -8.0
"""Worse scores are drawn as triangles at this height."""

Evaluate = Callable[[NDArray[np.float64], int], tuple[NDArray[np.float64], NDArray[np.float64]]]


def opened(scenario: Scenario, parties: dict[str, Evidence], mechanism: Mechanism, key: bytes) -> Evaluate:
    """What the coordinator opens of an iteration: the sums of the parties' words, clipped and noisy as agreed."""
    bits = scenario.federation.fraction_bits

    def words(party: str, tensor: str, trajectory: int, rows: NDArray[np.float64]) -> NDArray[np.int64]:
        if not mechanism.covers(tensor):
            return ring.encode(rows, bits)
        stream = SecretStream(key + party.encode(), f"{trajectory}/{tensor}".encode())
        return mechanism.protect(tensor, rows, stream, bits)

    def evaluate(theta: NDArray[np.float64], trajectory: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        loss, gradient = np.zeros((len(theta), 1), np.int64), np.zeros(theta.shape, np.int64)
        for name, evidence in parties.items():
            own, slope = evidence.evaluate(theta, trajectory, estimator="fd")
            loss += words(name, "loss", trajectory, own[:, None])
            gradient += words(name, "gradient", trajectory, slope * scenario.units)
        return ring.decode(loss, bits)[:, 0], ring.decode(gradient, bits) / scenario.units

    return evaluate


def share_simulations(parties: dict[str, Evidence]) -> None:
    """One simulation of all people serves all boroughs: in the Local world each would repeat the same one."""
    simulate = next(iter(parties.values()))._run
    kept: dict[tuple[int, int], Any] = {}

    def run(theta: Any, trajectory: int, world: Any, estimator: str, replicate: int = 0, **more: Any) -> Any:
        if any(number != trajectory for number, _ in kept):
            kept.clear()
        if (trajectory, replicate) not in kept:
            kept[trajectory, replicate] = simulate(theta, trajectory, world, estimator, replicate, **more)
        return kept[trajectory, replicate]

    for evidence in parties.values():
        evidence._run = run  # type: ignore[method-assign]


def calibrate(scenario: Scenario, epsilon: float | None, seed: int) -> dict[str, Any]:
    """One calibration; ε None is the mode `none`, and `outputs` too, whose losses and gradients have no noise."""
    prior, settings = Prior.from_parameters(scenario.parameters), scenario.calibration
    whole = evidence_of(scenario, seed)
    parties = {
        each.institution: Evidence(
            whole.model,
            [each],
            parameters=scenario.parameters,
            steps=scenario.steps,
            held_out=scenario.held_out,
            seed=seed,
            step=scenario.gradient.step,
            replicates=settings.replicates,
        )
        for each in whole.observations
    }
    share_simulations(parties)
    mechanism = Mechanism()
    if epsilon is not None:
        multiplier = calibrated_multiplier(epsilon, DELTA, 2 * settings.iterations + 1)
        privacy = dataclasses.replace(scenario.privacy, mode="outputs+gradients", noise=multiplier, honest=HONEST)
        mechanism = dataclasses.replace(scenario, privacy=privacy).mechanism
    with console.progress(f"ε = {epsilon}, seed {seed}", settings.iterations) as advance:
        found = fit(
            prior,
            opened(scenario, parties, mechanism, f"{seed} {epsilon}".encode()),
            iterations=settings.iterations,
            draws=settings.draws,
            weight=settings.weight,
            seed=seed,
            on_iteration=lambda record, state: advance(f"loss {record.loss:.1f}"),
        )
    generator = torch.Generator().manual_seed(derive(seed, "posterior") >> 1)
    draws = found.posterior.sample(DRAWS, generator)[0].numpy()
    score = whole.forecast(draws, POSTERIOR).score
    before = prior.sample(DRAWS, torch.Generator().manual_seed(derive(seed, "prior") >> 1)).numpy()
    return {
        "epsilon": epsilon,
        "seed": seed,
        "noise_multiplier": None if epsilon is None else multiplier,
        "u_mean": list(found.records[-1].mean),
        "u_sd": list(found.records[-1].sd),
        "score": float(score[0] / score[2]),
        "score_of_the_prior": float(whole.forecast(before, PRIOR).score[0] / score[2]),
        "score_of_persistence": float(score[1] / score[2]),
    }


def weekly_admissions(scenario: Scenario, seed: int) -> NDArray[np.float64]:
    """What each borough adds to the weekly admissions of each draw [parties, draws, weeks], before any is opened."""
    prior = Prior.from_parameters(scenario.parameters)
    theta = prior.sample(DRAWS, torch.Generator().manual_seed(derive(seed, "prior") >> 1)).numpy()
    names = scenario.institutions
    hub, sums = in_memory_sums(len(names), "masked")
    rule = Disclosure(scenario.minimum_people, scenario.minimum_institutions)

    def work(place: int) -> NDArray[np.int64]:
        evidence = Evidence(
            scenario.build([names[place]], seed=0),
            [],
            parameters=scenario.parameters,
            steps=scenario.steps,
            held_out=0,
            seed=derive(seed, "party", place),
        )
        try:
            return evidence.words(theta, 1, world=FederatedWorld(sums[place], rule))
        except Exception as problem:
            hub.fail(problem)
            raise

    with ThreadPoolExecutor(len(names)) as pool:
        words = np.stack(list(pool.map(work, range(len(names)))))
    daily = ring.decode(words[:, :, list(scenario.outputs).index("admissions")])  # [parties, days, draws]
    return np.add.reduceat(daily, np.arange(0, scenario.steps, 7), axis=1).transpose(0, 2, 1)


def open_outputs(parts: NDArray[np.float64], epsilon: float, clip: float, seed: int) -> float:
    """Relative error of the mean weekly curve that is opened at an ε: RMS over weeks, against the curve's own RMS."""
    mechanism = Mechanism("outputs", calibrated_multiplier(epsilon, DELTA, 1), HONEST, {"outputs": clip})
    words = sum(
        mechanism.protect("outputs", part, SecretStream(b"%d %d" % (seed, k), b"outputs"), ring.FRACTION_BITS)
        for k, part in enumerate(parts)
    )
    told, true = ring.decode(np.asarray(words)).mean(axis=0), parts.sum(axis=0).mean(axis=0)
    return float(np.sqrt(((told - true) ** 2).mean() / (true**2).mean()))


def draw(found: dict[str, Any]) -> None:
    """The figure of the docs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = found["calibrations"]
    exact = [each for each in runs if each["epsilon"] is None]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.9), dpi=150, layout="constrained")
    for run in (each for each in runs if each["epsilon"] is not None):
        below = run["score"] < LOWEST_SHOWN
        left.plot(
            run["epsilon"], max(run["score"], LOWEST_SHOWN), "v" if below else "o", color="#0072B2", ms=4, alpha=0.55
        )
    noisy = sorted({each["epsilon"] for each in runs if each["epsilon"] is not None})
    middle = [float(np.median([each["score"] for each in runs if each["epsilon"] == epsilon])) for epsilon in noisy]
    left.plot(noisy, np.maximum(middle, LOWEST_SHOWN), "-", color="#0072B2", label="outputs+gradients, median of seeds")
    for key, label, colour, style in (
        ("score", "none; outputs", "#1b1f24", "-"),
        ("score_of_persistence", "persistence", "#B36F00", ":"),
        ("score_of_the_prior", "the prior's forecast", "#667080", "--"),
    ):
        left.axhline(np.mean([each[key] for each in exact]), color=colour, ls=style, lw=1.2, label=label)
    left.set(xscale="log", xlabel="ε of the whole run (δ = 1e-5)", ylabel="log score of a held-out observation, nats")
    left.legend(frameon=False, fontsize=8)
    left.set_title("What is learnt", fontsize=10, loc="left")
    for clip, curve in found["outputs"]["error"].items():
        right.plot(list(map(float, curve)), list(curve.values()), "o-", ms=4, label=f"clip {float(clip):,.0f}")
    right.axhline(1.0, color="#667080", ls="--", lw=1.2, label="as wrong as a curve of zeros")
    right.set(
        xscale="log", yscale="log", xlabel="ε of one opening (δ = 1e-5)", ylabel="relative error, weekly admissions"
    )
    right.legend(frameon=False, fontsize=8)
    right.set_title("What is opened: weekly admissions, mode outputs", fontsize=10, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Software": None})


def main() -> None:
    """Run what is missing, write after each run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--agents", type=int, default=4000)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--replicates", type=int, default=2)
    parser.add_argument("--clip-gradient", type=float, default=500.0)
    parser.add_argument("--out", type=Path, default=FIGURES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    scenario = load(ROOT / "simulations" / "nyc_boroughs").with_options(
        agents=given.agents, iterations=given.iterations
    )
    calibration = dataclasses.replace(scenario.calibration, replicates=given.replicates)
    privacy = dataclasses.replace(scenario.privacy, clip_gradient=given.clip_gradient)
    scenario = dataclasses.replace(scenario, calibration=calibration, privacy=privacy)
    about = {
        "what": "nyc_boroughs with noise; own computation by benchmarks/privacy_utility.py, in the Local world",
        "agents": scenario.agents,
        "iterations": given.iterations,
        "draws": calibration.draws,
        "replicates": given.replicates,
        "weight": calibration.weight,
        "delta": DELTA,
        "honest": HONEST,
        "clip_loss": privacy.clip_loss,
        "clip_gradient": privacy.clip_gradient,
        "noisy_sums": 2 * given.iterations + 1,
    }
    found: dict[str, Any] = about | {"calibrations": [], "clip_alone": [], "outputs": {}}
    if given.out.is_file():
        before = json.loads(given.out.read_text())
        if {name: before.get(name) for name in about} == about:
            found = before
    for seed in range(given.seeds):
        for epsilon in (None, *EPSILONS):
            if not any((each["epsilon"], each["seed"]) == (epsilon, seed) for each in found["calibrations"]):
                found["calibrations"].append(calibrate(scenario, epsilon, seed))
                _write(given.out, found)
        if not any(each["seed"] == seed for each in found.setdefault("clip_alone", [])):
            found["clip_alone"].append(calibrate(scenario, CLIP_ALONE, seed))
            _write(given.out, found)
    if not found["outputs"]:
        parts = weekly_admissions(scenario, 1)
        norms = np.linalg.norm(parts, axis=2)
        clips = [float(f"{np.quantile(norms, q):.2g}") for q in (0.5, 0.9)]
        found["outputs"] = {
            "draws": DRAWS,
            "largest_norm_of_a_party": float(norms.max()),
            "error": {
                str(clip): {
                    str(e): float(np.sqrt(np.mean([open_outputs(parts, e, clip, seed) ** 2 for seed in range(8)])))
                    for e in OUTPUT_EPSILONS
                }
                for clip in clips
            },
        }
        _write(given.out, found)
    draw(found)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(path)


if __name__ == "__main__":
    main()

"""Where derivatives get hard: error × cost of every estimator on populations beyond households and a city.

    python benchmarks/frontier.py [CASE …] [--estimators fd alternates …] [--seeds 40] [--draw]

10,000 people, 60 days, cumulative infections by up to four parameters. The reference are central differences with
common random numbers, steps of a twentieth, means over hundreds of runs.
An estimator's error is the relative L1 distance of its mean over other seeds from that; its cost, processor time in
plain runs, mixed with them one by one; its effort, cost × variance of a run, what a given precision takes. Then
`lpm.audit_gradients` says what `auto` picks. Adds to benchmarks/figures/frontier.json case by case, and goes on where
it was stopped; draws docs/figures/frontier.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import matplotlib
import numpy as np
import torch
from accuracy import cumulative, distance, measure
from numpy.typing import NDArray

import lpm
from lpm import console
from lpm.errors import InputError
from lpm.estimators import candidates, evaluate
from lpm.relax import one_minus_exp, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PLOT = ROOT / "benchmarks" / "figures" / "frontier.json", ROOT / "docs" / "figures" / "frontier.png"
AGENTS, DAYS = 10_000, 60
REFERENCE_RUNS, REFERENCE_STEP = 400, 0.05
AUDIT_PAIRS = 300
TORCH_SHARE = 5
"""A protocol of another kind runs in torch, tens of times slower: so one in five runs of the reference and audit."""
ESTIMATORS = ("fd", "tangent", "alternates", "alternates, households alone", "score", "st-gumbel")
SLOW = {"score": 3, "st-gumbel": 8}
"""Most runs of estimators that cost much or whose error is far beyond any bar."""
EXACT, MORE = ("dense graph, degree 40", "city alone"), 10
"""Cases whose bars are so low that they take ten times as many runs, and a reference of four times as many."""

NOISY = ("households, workplaces, classes, city", "re-infection")
"""Cases whose audit takes twice as many pairs: a few runs in which a chain of infections goes astray weigh much."""

_BOUNDS = (0.0, 5.0)
_HOUSEHOLD_SIZES = (0.31, 0.28, 0.16, 0.14, 0.07, 0.04)

Case = tuple[lpm.Model, dict[str, float]]


def parameter(name: str) -> lpm.Parameter:
    """A hazard per day."""
    return lpm.Parameter(name, prior="lognormal(-2, 0.5)", bounds=_BOUNDS, unit="1/day")


def homes(rng: np.random.Generator) -> NDArray[np.int64]:
    """Households of 1 to 6, neighbours side by side [agents]."""
    sizes = rng.choice(np.arange(1, 7), AGENTS, p=_HOUSEHOLD_SIZES)
    return np.repeat(np.arange(AGENTS), sizes)[:AGENTS]


def disease(
    over: dict[str, lpm.Parameter], *, waning: float = 0.0, infectivity: lpm.Attribute | None = None
) -> lpm.Contagion:
    """Daily SIR, or SIRS; 25 people are infectious at the start."""
    progression: dict[str, Any] = {"I": lpm.leave(probability=parameter("recovery"), to={"R": None})}
    if waning:
        progression["R"] = lpm.leave(probability=waning, to={"S": None})
    return lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        over=over,
        progression=progression,
        initial={"I": np.arange(25) * (AGENTS // 25)},
        infectivity=infectivity,
        name="disease",
    )


def assemble(places: dict[str, NDArray[np.int64]], theta: dict[str, float], **more: Any) -> Case:
    """A model in which people meet in places; those of more than 250 are no layers."""
    networks = [
        lpm.Groups(name, of=of, layer=bool(np.bincount(of[of >= 0]).max() <= 250)) for name, of in places.items()
    ]
    protocols = [*more.pop("before", []), disease({name: parameter(name) for name in places}, **more)]
    outputs = {"infections": lpm.flow("S -> I")}
    return lpm.Model(lpm.Population(AGENTS), networks, protocols, outputs=outputs), theta


def town(rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Homes; workplaces of 20 for seven in ten adults; school classes of 25 for the third and later of each home."""
    home = homes(rng)
    rank = np.arange(AGENTS) - np.searchsorted(home, home)
    child = rank >= 2
    pupils, adults = np.flatnonzero(child), np.flatnonzero(~child)
    workers = rng.permutation(adults)[: int(0.7 * adults.size)]
    work, school = np.full(AGENTS, -1), np.full(AGENTS, -1)
    work[workers] = np.arange(workers.size) // 20
    # Classes are of neighbours, who are not all in the same class: siblings seldom are.
    blocks = np.arange(pupils.size) // 100
    school[pupils] = blocks * 4 + rng.integers(0, 4, pupils.size)
    return {"household": home, "work": work, "school": school, "city": np.zeros(AGENTS, dtype=np.int64)}


THETA = {"household": 0.25, "work": 0.10, "school": 0.20, "city": 0.08, "recovery": 1 / 6}


def three_layers() -> Case:
    """Three layers of small groups that overlap, and a city."""
    return assemble(town(np.random.default_rng(1)), THETA)


def groups_of(size: int) -> Callable[[], Case]:
    """Groups that each person shares with others drawn anew, and a weak city."""

    def build() -> Case:
        rng = np.random.default_rng(size)
        group = rng.permutation(AGENTS) // size
        places = {"group": group, "city": np.zeros(AGENTS, dtype=np.int64)}
        return assemble(places, {"group": 0.22, "city": 0.05, "recovery": 1 / 6})

    return build


def reinfection() -> Case:
    """Homes, workplaces, a city; immunity is lost after 20 days in the mean."""
    places = town(np.random.default_rng(2))
    del places["school"]
    return assemble(places, {k: v for k, v in THETA.items() if k != "school"}, waning=0.05)


class Isolation(lpm.Protocol):
    """Who has an ill person at home goes into quarantine, more likely the more are ill, and comes back later."""

    name = "isolation"

    def expressions(self) -> tuple[lpm.Parameter, ...]:
        """What it depends on."""
        return (parameter("isolation"),)

    def start(self, step: Any) -> lpm.Change:
        """Everybody is about."""
        shape = (step.model.population.agents, step.lanes)
        return lpm.Change(state={"about": torch.ones(shape, dtype=torch.float64)})

    def transition(self, step: Any, action: Any) -> lpm.Change:
        """Leave or come back."""
        about, home = step.state["isolation.about"], step.model.network("household")
        ill = step.total("household", step.model.protocol("disease").occupancy(step, "I")).value()
        leaves = one_minus_exp(step.values["isolation"] * ill)[torch.from_numpy(home.cell_of)]
        words = torch.from_numpy(step.uniform(0, 2).astype(np.int64))[..., None]
        away = sample(about, [leaves], words[0])[0]
        back = sample(1.0 - about, [torch.full((1, step.lanes), 0.2, dtype=torch.float64)], words[1])[0]
        return lpm.Change(state={"about": about - away + back})


def isolation() -> Case:
    """Homes and a city; people with somebody ill at home infect nobody while they are in quarantine."""
    places = town(np.random.default_rng(3))
    places = {name: places[name] for name in ("household", "city")}
    theta = {"isolation": 0.3, "household": 0.3, "city": 0.3, "recovery": 1 / 6}
    return assemble(places, theta, before=[Isolation()], infectivity=lpm.Attribute("isolation.about"))


def graph(degree: int, hazard: float) -> Callable[[], Case]:
    """A random graph, drawn once."""

    def build() -> Case:
        rng = np.random.default_rng(degree)
        pairs = rng.integers(0, AGENTS, (AGENTS * degree // 2, 2))
        network = lpm.Edges("graph", pairs[pairs[:, 0] != pairs[:, 1]], agents_in_all=AGENTS)
        outputs = {"infections": lpm.flow("S -> I")}
        model = lpm.Model(lpm.Population(AGENTS), [network], [disease({"graph": parameter("graph")})], outputs=outputs)
        return model, {"graph": hazard, "recovery": 1 / 6}

    return build


def city() -> Case:
    """One city where everybody meets everybody."""
    return assemble({"city": np.zeros(AGENTS, dtype=np.int64)}, {"city": 0.35, "recovery": 1 / 6})


CASES: dict[str, Callable[[], Case]] = {
    "households, workplaces, classes, city": three_layers,
    "groups of 50, weak city": groups_of(50),
    "groups of 100, weak city": groups_of(100),
    "groups of 200, weak city": groups_of(200),
    "re-infection": reinfection,
    "isolation by a household member": isolation,
    "sparse graph, degree 4": graph(4, 0.15),
    "dense graph, degree 40": graph(40, 0.01),
    "city alone": city,
}


def reference(
    model: lpm.Model, theta: NDArray[np.float64], runs: int, advance: Callable[[str], None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard error [days, P] of central differences."""
    rows = []
    for seed in range(runs):
        rows.append(cumulative(model, theta, "fd", DAYS, 10**6 + seed, step=REFERENCE_STEP))
        advance("reference")
    return np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(runs)


def households_alone(model: lpm.Model) -> lpm.Model | None:
    """The model with its smallest groups as the only layer; None if it has no more."""
    layers = [n for n in model.networks if isinstance(n, lpm.Groups) and n.layer is not False and n.cells > 1]
    if len(layers) < 2:
        return None
    smallest = min(layers, key=lambda n: float(np.bincount(n.cell_of[n.cell_of > 0]).mean()))
    networks = [
        lpm.Groups(n.name, of=n.of, layer=n is smallest) if isinstance(n, lpm.Groups) else n for n in model.networks
    ]
    return lpm.Model(model.population, networks, model.protocols, outputs=model.outputs)


def judge(
    model: lpm.Model,
    theta: NDArray[np.float64],
    estimator: str,
    seeds: int,
    known: tuple[NDArray[np.float64], NDArray[np.float64]],
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Error, noise and cost of one estimator on one model."""
    rows, cost = measure(model, theta, estimator.partition(",")[0], DAYS, range(seeds), lambda: advance(estimator))
    found, names = distance(rows, *known), [each.name for each in model.parameters]
    return {
        "runs": seeds,
        "relative_l1": _named(names, found.relative_l1),
        "standard_error": _named(names, found.both_errors),
        "sd_of_a_run": _named(names, found.sd),
        "wrong_signs": int(found.wrong_signs.sum()),
        "cost": round(cost, 2),
        "effort": round(cost * float(np.mean(found.sd**2)), 4),
    }


def _named(names: list[str], values: NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def take(case: str, estimators: list[str], seeds: int, found: dict[str, Any]) -> None:
    """Fill in what is missing of one case, and write after each part."""
    model, values = CASES[case]()
    theta = np.array([[values[each.name] for each in model.parameters]])
    slowness = 1 if all(each.fused() for each in model.protocols) else TORCH_SHARE
    mine = found.setdefault(case, {"theta": values, "estimators": {}})
    if "reference" not in mine:
        runs = REFERENCE_RUNS // slowness * (4 if case in EXACT else 1)
        with console.progress(case, runs) as advance:
            mean, error = reference(model, theta, runs, advance)
        attack = evaluate(model, theta, estimator="none", steps=DAYS, seed=1).outputs[:, 0, 0].sum() / AGENTS
        mine["reference"] = {
            "runs": runs,
            "infections_per_person": round(float(attack), 3),
            "mean": mean.tolist(),
            "standard_error": error.tolist(),
        }
        write(found)
    known = (np.array(mine["reference"]["mean"]), np.array(mine["reference"]["standard_error"]))
    for estimator in estimators:
        if estimator in mine["estimators"]:
            continue
        runs = min(seeds * (MORE if case in EXACT else 1), SLOW.get(estimator, 10**6))
        chosen = households_alone(model) if "alone" in estimator else model
        if chosen is None:
            continue
        try:
            with console.progress(f"{case}: {estimator}", runs) as advance:
                mine["estimators"][estimator] = judge(chosen, theta, estimator, runs, known, advance)
        except InputError as refused:
            mine["estimators"][estimator] = {"refused": refused.message}
        write(found)
    if "auto" not in mine:
        # The default, two dozen pairs of runs, seldom tells a bias of a tenth from noise in so small a population.
        audit = lpm.audit_gradients(
            model,
            theta[0],
            steps=DAYS,
            seed=7,
            seeds=AUDIT_PAIRS * (2 if case in NOISY else 1) // slowness,
            step=REFERENCE_STEP,
            estimators=candidates(model, refusable=True),
        )
        mine["auto"] = {"picks": audit.chosen, "because": audit.reason, "pairs": audit.seeds}
        write(found)


def write(found: dict[str, Any]) -> None:
    """Keep what was found so far."""
    scratch = FIGURES.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(FIGURES)


def draw(found: dict[str, Any]) -> None:
    """Error against cost, a panel for each case."""
    shown = [case for case in CASES if case in found]
    figure, axes = plt.subplots(3, 3, figsize=(11, 9), layout="constrained", sharex=True, sharey=True)
    colours = dict(zip(ESTIMATORS, ("C0", "C1", "C2", "C8", "C3", "C4"), strict=True))
    for axis, case in zip(axes.flat, shown, strict=False):
        for name, each in found[case]["estimators"].items():
            if "refused" in each:
                continue
            error, spread = max(zip(each["relative_l1"].values(), each["standard_error"].values(), strict=True))
            axis.errorbar(each["cost"], max(error, 1e-3), yerr=spread, fmt="o", color=colours[name], label=name)
        axis.axhline(0.1, color="0.7", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", ylim=(1e-3, 1e2), title=f"{case}\nauto: {found[case]['auto']['picks']}")
        axis.title.set_fontsize(9)
    for axis in axes[-1]:
        axis.set_xlabel("cost, plain runs")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative L1, worst parameter")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Measure what is missing and draw all there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="; ".join(CASES))
    parser.add_argument("--estimators", nargs="*", default=list(ESTIMATORS))
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--draw", action="store_true", help="draw only")
    given = parser.parse_args()
    unknown = [case for case in given.cases if case not in CASES]
    if unknown:
        sys.exit(f"There is no case {unknown[0]!r}: {'; '.join(CASES)}.")
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    if not given.draw:
        for case in given.cases or CASES:
            take(case, given.estimators, given.seeds, found)
    draw(found)


if __name__ == "__main__":
    main()

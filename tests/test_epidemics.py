"""Analytic answers: final sizes, growth rates, the ODE limit, tiny networks and Reed–Frost households."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lpm

BETA = lpm.Parameter("beta", prior="lognormal(-1, 1)", bounds=(0.0, 50.0))


def _city(agents: int, stages: str, progression: dict, initial: dict) -> lpm.Model:
    contagion = lpm.Contagion(
        stages,
        "S -> E" if "E" in stages else "S -> I",
        {"I": 1.0},
        over={"city": BETA},
        progression=progression,
        initial=initial,
    )
    city = lpm.Groups("city", of=np.zeros(agents, dtype=int), groups=1, shared=True)
    return lpm.Model(
        lpm.Population(agents),
        [city],
        [contagion],
        outputs={"infectious": lpm.count("I"), "susceptible": lpm.count("S")},
    )


@pytest.mark.parametrize("reproduction", ["1.5", "2", "5"])
def test_final_size(vectors, reproduction):
    known = json.loads((vectors / "epidemic" / "sir_final_size.json").read_text())
    case = next(c for c in known["cases"] if c["R0"] == reproduction and c["s0"] == "0.99")
    agents = 200_000
    # A geometric stay of mean 1/γ days makes the discrete final-size equation the continuous one.
    model = _city(agents, "S I R", {"I": lpm.leave(probability=0.2, to={"R": None})}, {"I": np.arange(agents // 100)})
    run = lpm.simulate(model, {"beta": 0.2 * float(reproduction)}, steps=250, seed=4)
    found = 1 - float(run.outputs["susceptible"][-1]) / agents
    assert found == pytest.approx(float(case["final_fraction_ever_infected"]), rel=0.02)


@pytest.mark.parametrize(("latent", "infectious"), [(1, 1), (3, 1), (4, 4)])
def test_seir_growth_rate(vectors, latent, infectious):
    known = json.loads((vectors / "epidemic" / "seir_growth_rate.json").read_text())
    wanted = {
        "R0": "2.5",
        "mean_latent": "2",
        "mean_infectious": "5",
        "latent_stages": latent,
        "infectious_stages": infectious,
    }
    case = next(c for c in known["cases"] if all(c[key] == value for key, value in wanted.items()))
    agents, dt = 300_000, 0.05
    model = _city(
        agents, f"S E*{latent} I*{infectious} R", {"E -> I": dt / 2, "I -> R": dt / 5}, {"E": np.arange(agents // 500)}
    )
    run = lpm.simulate(model, {"beta": 2.5 / 5 * dt}, steps=400, seed=4)
    infected = run.outputs["infectious"].values
    # After the first stages have mixed, and before susceptibles run out (below 4 % infectious).
    first, last = 160, int(np.flatnonzero(infected < 0.03 * agents)[-1])
    slope = np.polyfit(np.arange(first, last) * dt, np.log(infected[first:last]), 1)[0]
    # Depletion slows growth by about half the share already infected; the bound is on what is left.
    depleted = 1 - float(run.outputs["susceptible"][(first + last) // 2]) / agents
    assert slope / (1 - depleted) == pytest.approx(float(case["r"]), rel=0.02)


def test_ode_limit(vectors):
    known = json.loads((vectors / "epidemic" / "ode_trajectories.json").read_text())["cases"][2]
    agents, dt, days = 200_000, 0.01, 15
    model = _city(agents, "S I R", {"I -> R": dt * float(known["gamma"])}, {"I": np.arange(agents // 100)})
    seeds = [lpm.simulate(model, {"beta": dt * float(known["beta"])}, steps=int(days / dt), seed=s) for s in (1, 2)]
    infectious = np.mean([run.outputs["infectious"].values for run in seeds], axis=0) / agents
    exact = {t: i for t, i in zip(known["t"], known["i"], strict=True) if 0 < t <= days}
    peak = max(map(float, known["i"]))
    for day, value in exact.items():
        assert infectious[round(day / dt) - 1] == pytest.approx(float(value), abs=0.02 * peak)


def test_tiny_networks(vectors):
    cases = json.loads((vectors / "epidemic" / "tiny_networks.json").read_text())["cases"]
    copies = 4000
    for case in cases:
        nodes, edges = case["nodes"], np.array(case["edges"]).reshape(-1, 2)
        shift = nodes * np.arange(copies)
        pairs = (edges[None] + shift[:, None, None]).reshape(-1, 2)
        seeds = (np.array(case["seeds"])[None] + shift[:, None]).reshape(-1)
        contagion = lpm.Contagion(
            "S I R",
            "S -> I",
            {"I": 1.0},
            over={"graph": BETA},
            progression={"I": lpm.leave(probability=1.0, to={"R": None})},
            initial={"I": seeds},
        )
        graph = lpm.Edges("graph", pairs, agents_in_all=nodes * copies)
        model = lpm.Model(lpm.Population(nodes * copies), [graph], [contagion], outputs={"new": lpm.flow("S -> I")})
        for value in case["values"]:
            chance = float(eval_fraction(value["p"]))
            run = lpm.simulate(model, {"beta": float(-np.log1p(-chance))}, steps=nodes, seed=1)
            found = float(run.outputs["new"].sum()) / copies
            sizes = {int(k): float(v) for k, v in value["final_size_probability"].items()}
            mean = sum(k * p for k, p in sizes.items())
            spread = np.sqrt(sum((k - mean) ** 2 * p for k, p in sizes.items()) / copies)
            # 4.5 standard errors: a false alarm about once in 3,000 runs of all cases.
            assert abs(found - float(value["expected_new_infections"])) < 4.5 * spread + 1e-9, (
                case["name"],
                value["p"],
            )


def eval_fraction(text: str) -> float:
    """`1/20` or `0.05` as a number."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)

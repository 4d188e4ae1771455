"""Cluster alternates backwards: the transpose of the pass forwards, whatever the model, and for many parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lpm
from lpm.bench.workload import default_values, workload
from lpm.kernels.alternates import Alternates
from lpm.passes import alternates_reverse
from lpm.simulation import run
from tests import models


def _town() -> tuple[lpm.Model, np.ndarray]:
    """Sub-stages, classes, branches, a shared network with mixing, a drawn start; three draws at once."""
    model = models.town(400)
    theta = np.array([[models.THETA[parameter.name] for parameter in model.parameters]] * 3)
    theta[1] *= 1.5
    theta[2, 0] *= 3
    return model, theta


def _neighbours() -> tuple[lpm.Model, np.ndarray]:
    """Two layers, a graph and a city, waning immunity, classes; two draws at once."""
    model = models.neighbours(400)
    theta = np.array([[models.THETA[parameter.name] for parameter in model.parameters]] * 2)
    theta[1] *= 1.3
    return model, theta


def _with_feedback() -> tuple[lpm.Model, np.ndarray]:
    """A learned network reads the opened sum, an event scales a network, two contagions share a parameter."""
    torch.manual_seed(0)
    caution = lpm.Parameter("caution", prior="normal(0, 1)")
    strictness = lpm.Parameter("strictness", prior="beta(2, 2)", bounds=(0.0, 1.0))
    rng = np.random.default_rng(3)
    people = lpm.Population(300, attributes={"household": np.sort(rng.integers(0, 100, 300))})
    city = lpm.Groups("city", of=rng.integers(0, 3, 300), groups=3, shared=True)
    club = lpm.Groups("club", of=rng.integers(-1, 20, 300))
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Sigmoid())
    mobility = lpm.Learned(network, [10.0 * lpm.driver("disease/city"), caution], ["mobility"], name="mobility_network")
    lockdown = lpm.Event(lpm.on_day(6), lpm.scale("city", by=1.0 - strictness), name="lockdown")
    rumour = lpm.Contagion(
        "U K", "U -> K", {"K": 1.0}, over={"club": models.BETA_HOME}, initial={"K": 0.05}, name="rumour"
    )
    disease = lpm.Contagion(
        "S E I R H",
        "S -> E",
        {"I": 1.0},
        over={"household": models.BETA_HOME, "city": 3.0 * models.BETA_CITY * lpm.driver("mobility")},
        # On most days whoever is exposed leaves, so staying is what might have been.
        progression={
            "E": lpm.leave(probability=0.97, to={"I": None}),
            "I": lpm.leave(rate=0.2, to={"R": 0.7, "H": None}),
        },
        initial={"I": models.INITIAL, "E": 0.5 * models.INITIAL},
        name="disease",
    )
    model = lpm.Model(
        people,
        [people.households, city, club],
        [mobility, lockdown, rumour, disease],
        outputs={
            "infections": lpm.flow("S -> E", protocol="disease"),
            "severe": lpm.flow("I -> H", protocol="disease"),
            "know": lpm.count("K", protocol="rumour"),
        },
    )
    values = {**models.THETA, "caution": 0.3, "strictness": 0.7}
    return model, np.array([[values[parameter.name] for parameter in model.parameters]])


CASES = {
    "town": (_town, 20),
    "feedback": (_with_feedback, 12),
    "one layer": (lambda: (workload(2_000, 1, parameters=6, layers=("household",)), default_values(6)), 40),
    "two layers": (lambda: (workload(2_000, 1, parameters=6), default_values(6)), 40),
    "no layer": (lambda: (workload(2_000, 1, parameters=6, layers=()), default_values(6)), 40),
    "edges beside layers": (_neighbours, 20),
    "edges": (lambda: (models.random_graph(500, 8, 2), np.array([[0.08, 0.2]])), 20),
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_back_is_the_transpose_of_the_pass_forward(name, monkeypatch):
    make, steps = CASES[name]
    model, theta = make()
    forward = run(model, theta, steps=steps, seed=3, derivative="alternates")
    weights = np.random.default_rng(1).normal(size=(3, *forward.words.shape))
    back = run(model, theta, steps=steps, seed=3, derivative="alternates-reverse", cotangent=lambda outputs: weights)
    assert np.array_equal(forward.words, back.words)
    assert forward.tangents is not None and back.gradient is not None
    expected = np.einsum("btok,tokp->bkp", weights, forward.tangents)
    scale = np.abs(expected).max(axis=(0, 1))
    assert (scale > 0.1).all(), scale
    assert (np.abs(back.gradient - expected).max(axis=(0, 1)) <= 1e-9 * scale).all()

    # A tape that is cut and made again is the same tape: cut at every step, and now and then.
    begun, restore = [], Alternates.restore
    monkeypatch.setattr(Alternates, "restore", lambda *args: (begun.append(1), restore(*args)))
    monkeypatch.setattr(alternates_reverse, "TAPE_BYTES", 0)
    # Over edges the tape also holds what every seed tells its neighbours.
    enough = 30 if "edges" in name else 12
    for room, least, most in ((0, steps // 2, steps * 2), (enough, 1, steps // 2)):
        begun.clear()
        monkeypatch.setattr(alternates_reverse, "TAPE_BYTES_PER_AGENT", room)
        cut = run(model, theta, steps=steps, seed=3, derivative="alternates-reverse", cotangent=lambda outputs: weights)
        assert least <= len(begun) <= most
        assert np.array_equal(cut.words, back.words) and np.array_equal(cut.gradient, back.gradient)


def test_a_contact_factor_for_each_of_a_hundred_neighbourhoods():
    """One pass back gives what a hundred tangents give, neighbourhoods that nobody is infected in included."""
    rng, neighbourhoods = np.random.default_rng(4), 100
    household = np.sort(rng.integers(0, 200, 500))
    home = rng.integers(0, neighbourhoods, 200)[household]
    people = lpm.Population(500, attributes={"household": household})
    factors = [lpm.Parameter(f"contacts_{k}", prior="lognormal(0, 0.5)") for k in range(neighbourhoods)]
    places = [lpm.Groups(f"place_{k}", of=np.where(home == k, 0, -1), layer=False) for k in range(neighbourhoods)]
    city = lpm.Groups("city", of=np.zeros(500, dtype=int), layer=False)
    sir = lpm.Contagion(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"household": 0.1, "city": 0.3, **{f"place_{k}": 0.2 * each for k, each in enumerate(factors)}},
        progression={"I -> R": 0.2},
        initial={"I": np.arange(0, 500, 20)},
    )
    model = lpm.Model(people, [people.households, city, *places], [sir], outputs={"infections": lpm.flow("S -> I")})
    params = {parameter.name: 1.0 for parameter in factors}
    asked = {"steps": 15, "seed": 2, "gradient": "alternates", "targets": ["infections:total"]}
    forward = lpm.sensitivity(model, params, **asked)
    back = lpm.sensitivity(model, params, mode="reverse", **asked)
    found, expected = back.targets["derivative"].to_numpy(), forward.targets["derivative"].to_numpy()
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()
    assert (found != 0).sum() > neighbourhoods / 2 and np.array_equal(found == 0, expected == 0)


def test_the_facade_gives_every_output_at_every_step():
    model = models.town(100)
    asked = {"steps": 6, "seed": 1, "gradient": "alternates"}
    forward, reverse = (
        lpm.simulate(model, models.THETA, **asked),
        lpm.simulate(model, models.THETA, mode="reverse", **asked),
    )
    assert forward.gradient is not None and reverse.gradient is not None
    for name in forward.outputs:
        np.testing.assert_allclose(reverse.gradient[name], forward.gradient[name], rtol=1e-9, atol=1e-9)

"""Cluster alternates: hard values untouched, exact in households, true where the tangent is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lpm
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.kernels.alternates import _Clusters
from lpm.kernels.clusters import SELDOM, SMALLEST, chance
from lpm.simulation import run
from tests import models
from tests.test_gradients import KNOWN, _fraction, _households, _published, _slopes


def _theta(model: lpm.Model, *changes: dict[str, float]) -> np.ndarray:
    rows = [{**models.THETA, **change} for change in (changes or ({},))]
    return np.array([[row[parameter.name] for parameter in model.parameters] for row in rows])


def test_alternates_leave_the_trajectory_alone_and_lanes_apart():
    model = models.town(400)
    theta = _theta(model, {}, {"beta_city": 0.7}, {"initial": 0.1})
    found = run(model, theta, steps=20, seed=3, derivative="alternates")
    assert np.array_equal(found.words, run(model, theta, steps=20, seed=3).words)
    assert found.tangents is not None and np.abs(found.tangents).max() > 1
    for k in range(3):
        alone = run(model, theta[k : k + 1], steps=20, seed=3, derivative="alternates")
        assert alone.tangents is not None
        np.testing.assert_allclose(alone.tangents[:, :, 0], found.tangents[:, :, k], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", [models.town, models.neighbours])
def test_the_order_of_agents_does_not_matter(make):
    order = np.random.default_rng(5).permutation(400)
    rows = []
    for model in (make(400), make(400, order=order)):
        rows.append(run(model, _theta(model), steps=20, seed=3, derivative="alternates").tangents)
    np.testing.assert_allclose(*rows, rtol=1e-7, atol=1e-7)


def test_no_flip_is_sifted_out(monkeypatch):
    """The byte of a cell bounds what its people may decide or offer: reading everybody in full finds nothing more."""
    model = models.town(3_000)
    theta = _theta(model)
    sifted = run(model, theta, steps=25, seed=3, derivative="alternates")
    day = _Clusters._day

    def in_full(*args):
        found = day(*args)
        return found._replace(code=np.full_like(found.code, 255))

    monkeypatch.setattr(_Clusters, "_day", in_full)
    full = run(model, theta, steps=25, seed=3, derivative="alternates")
    assert np.array_equal(sifted.words, full.words) and np.array_equal(sifted.tangents, full.tangents)


def test_a_flip_is_of_the_size_of_an_event_unless_that_is_seldom():
    masses = np.array([0.0, 1e-5, 1e-4, 1e-3, SELDOM, 0.1, 1.0])
    chances = np.array([chance(mass) for mass in masses])
    np.testing.assert_allclose(chances, [0.0, 2e-4, 2e-3, SELDOM, SELDOM, 0.1, 1.0])
    sizes = masses[1:] / chances[1:]
    assert (sizes >= SMALLEST - 1e-12).all() and (sizes <= 1.0).all()


@pytest.mark.parametrize("size", [2, 4, 5])
def test_alternates_are_exact_in_reed_frost_households(vectors, size):
    known = json.loads((vectors / "epidemic" / "reed_frost_households.json").read_text())["cases"]
    case = next(c for c in known if c["household_size"] == size and c["initial_infectives"] == 1)
    model = _households(size, 10_000)
    for value in case["values"]:
        slopes = _slopes(model, _fraction(value["escape_q"]), "alternates", 12, 10_000)
        error = slopes.std(ddof=1) / np.sqrt(len(slopes))
        assert abs(slopes.mean() - float(value["d_expected_d_p"])) < 3.1 * error, value["escape_q"]


def test_branches_sub_stages_drawn_starts_and_thinned_outputs():
    """Against central differences, output by output, on a model with every feature of a contagion."""
    model = models.town(10_000)
    theta = _theta(model)
    rows: dict[str, list[np.ndarray]] = {"alternates": [], "fd": []}
    for estimator, found in rows.items():
        for seed in range(10):
            result = evaluate(model, theta, estimator=estimator, steps=20, seed=seed, step=0.1)
            assert result.derivative is not None
            # Before the sixth day admissions are so few that the differences see none at all.
            found.append(result.derivative[6:, :, 0].sum(0))
    alternates, differences = np.array(rows["alternates"]), np.array(rows["fd"])
    error = np.hypot(alternates.std(0, ddof=1), differences.std(0, ddof=1)) / np.sqrt(10)
    z = (alternates.mean(0) - differences.mean(0)) / error
    # Twelve comparisons, |t| > 6 with 9 degrees of freedom: a false alarm in 400 runs.
    assert np.abs(z).max() < 6, z
    # And they can fail: most are known to better than a fifth.
    assert np.median(np.abs(error / differences.mean(0))) < 0.2


def test_a_difference_infects_a_neighbour_once_and_not_the_one_it_came_from():
    """Pairs of people: what one more case at the start leads to is known."""
    couples, days, hazard, recovery = 4_000, 40, 0.3, 0.2
    pairs = np.arange(2 * couples).reshape(-1, 2)
    sir = lpm.Contagion(
        stages="S I R",
        infection="S -> I",
        infectious={"I": 1.0},
        over={"couple": hazard},
        progression={"I -> R": recovery},
        initial={"I": models.INITIAL},
    )
    outputs = {"infections": lpm.flow("S -> I")}
    model = lpm.Model(lpm.Population(2 * couples), [lpm.Edges("couple", pairs)], [sir], outputs=outputs)
    share = 0.02
    escape, stays = np.exp(-hazard), np.exp(-recovery)
    partner = (1 - escape) / (1 - escape * stays)  # if only one of them begins infected
    exact = 2 * couples * partner * (1 - 2 * share)
    rows = [
        evaluate(model, np.array([[share]]), estimator="alternates", steps=days, seed=seed).derivative[:, 0, 0].sum()
        for seed in range(40)
    ]
    error = np.std(rows, ddof=1) / np.sqrt(len(rows))
    assert error < 0.02 * exact
    assert abs(np.mean(rows) - exact) < 4 * error, (np.mean(rows), exact, error)


def test_they_are_right_on_a_dense_random_graph():
    known = json.loads((KNOWN / "random_graph_gradient.json").read_text())
    model = models.random_graph(known["agents"], known["mean_degree"], known["graph_seed"])
    theta = _theta(model, known["theta"])
    rows = [
        np.cumsum(
            evaluate(model, theta, estimator="alternates", steps=known["days"], seed=seed).derivative[:, 0, 0], axis=0
        )
        for seed in range(120)
    ]
    reference = np.array(known["gradient"])
    distance = np.abs(np.mean(rows, axis=0) - reference).sum(0) / np.abs(reference).sum(0)
    assert (distance <= 0.10).all(), distance


@pytest.mark.parametrize("name", ["homecity", "work10c"])
def test_alternates_reproduce_the_published_gradients(vectors, name):
    known = json.loads((vectors / "gradients" / "cases.json").read_text())
    case = next(c for c in known["cases"] if c["name"] == name)
    model = _published(vectors / "gradients" / case["population"], known["parameters"])
    theta = np.array([[case["theta"][known["parameters"].index(p.name)] for p in model.parameters]])
    rows = []
    for seed in range(8):
        result = evaluate(model, theta, estimator="alternates", steps=case["days"], seed=seed)
        assert result.derivative is not None
        rows.append(np.cumsum(result.derivative[:, 0, 0], axis=0))
    columns = [known["parameters"].index(p.name) for p in model.parameters]
    reference = np.array(case["gradient"])[1:, columns]
    given = np.array(case["standard_error"])[1:, columns]
    own = np.array(rows)
    spread = np.hypot(own.std(0, ddof=1) / np.sqrt(len(own)), given)
    for k in range(len(columns)):
        if theta[0, k] == 0:
            continue
        z = ((own.mean(0) - reference)[9::10] / spread[9::10])[:, k]
        # Six days of three parameters in two cases: |t| > 7 with 7 degrees of freedom once in 130 runs at most.
        assert (np.abs(z) < 7).all(), (known["parameters"][columns[k]], z)
        distance = np.abs(own.mean(0) - reference)[:, k].sum() / np.abs(reference[:, k]).sum()
        assert distance < 0.2, distance
        clear = np.abs(reference[:, k]) > 5 * spread[:, k]
        assert (np.sign(own.mean(0)) == np.sign(reference))[clear, k].all()


def test_a_layer_of_large_groups_is_refused_with_the_remedy():
    people = lpm.Population(510)
    sir = lpm.Contagion("S I R", "S -> I", {"I": 1.0}, over={"office": models.BETA_CITY}, initial={"I": np.arange(3)})
    for layer in (True, False):
        office = lpm.Groups("office", of=np.arange(510) // 255, layer=layer)
        model = lpm.Model(people, [office], [sir], outputs={"infections": lpm.flow("S -> I")})
        if layer:
            with pytest.raises(InputError, match=r"office has a group of 255 people.*layer=False"):
                run(model, np.array([[0.5]]), steps=3, seed=1, derivative="alternates")
        else:
            assert run(model, np.array([[0.5]]), steps=3, seed=1, derivative="alternates").tangents is not None

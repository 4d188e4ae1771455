"""The estimators `score` and `st-gumbel`: exact answers on tiny networks and households, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lpm
from lpm import estimators
from lpm.analysis.audit import audit_gradients
from lpm.errors import InputError
from lpm.estimators import evaluate
from lpm.passes.score import components
from tests import models
from tests.test_gradients import HAZARD, _fraction, _households


def _tiny_networks(cases: list[dict], copies: int) -> lpm.Model:
    """Many copies of each network side by side; one output per network."""
    pairs, seeds, classes, first = [], [], [], 0
    for number, case in enumerate(cases):
        for _ in range(copies):
            pairs += [(first + a, first + b) for a, b in case["edges"]]
            seeds += [first + node for node in case["seeds"]]
            classes += [number] * case["nodes"]
            first += case["nodes"]
    reed_frost = lpm.Contagion(
        "S I R",
        "S -> I",
        {"I": 1.0},
        over={"tie": HAZARD},
        progression={"I": lpm.leave(probability=1.0, to={"R": None})},
        initial={"I": np.array(seeds)},
        classes="network",
    )
    return lpm.Model(
        lpm.Population(first, attributes={"network": np.array(classes)}),
        [lpm.Edges("tie", np.array(pairs), agents_in_all=first)],
        [reed_frost],
        outputs={case["name"]: lpm.flow("S -> I", thin=np.eye(len(cases))[k]) for k, case in enumerate(cases)},
    )


@pytest.mark.parametrize("at", [1, 2])
def test_score_is_right_on_tiny_networks(vectors, monkeypatch, at):
    monkeypatch.setattr(estimators, "SCORE_RUNS", 2)
    cases = json.loads((vectors / "epidemic" / "tiny_networks.json").read_text())["cases"]
    copies = 150
    model = _tiny_networks(cases, copies)
    assert len(np.unique(components(model))) == copies * (len(cases) + 1)  # one of the networks has two parts
    p = _fraction(cases[0]["values"][at]["p"])
    found = []
    for seed in range(10):
        result = evaluate(model, np.array([[-np.log(1 - p)]]), estimator="score", steps=6, seed=seed)
        assert result.derivative is not None
        found.append(result.derivative[:, :, 0, 0].sum(0) / copies / (1 - p))
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    exact = np.array([float(case["values"][at]["d_expected_d_p"]) for case in cases])
    # With ten runs |t| > 3 once in 67 and > 5 once in 1,300 networks; a bias of 20 % would fail on most.
    z = np.abs(mean - exact) / error
    assert (z < 5).all() and (z > 3).sum() <= 1, z
    assert np.median(error / exact) < 0.05


def test_score_is_right_with_branching_stages_and_a_drawn_start(monkeypatch):
    monkeypatch.setattr(estimators, "SCORE_RUNS", 2)
    household = np.repeat(np.arange(150), 3)
    people = lpm.Population(450, attributes={"household": household, "age": np.tile([0, 1, 2], 150)})
    disease = lpm.Contagion(
        stages="S E P A R",
        infection="S -> E",
        classes="age",
        infectious={"P": 1.0, "A": 0.5},
        over={"household": models.BETA_HOME},
        progression={
            "E": lpm.leave(mean_days=2.0, to={"P": [0.3, 0.5, 0.7], "A": None}),
            "P -> R": models.GAMMA,
            "A -> R": 0.4,
        },
        initial={"E": models.INITIAL},
    )
    model = lpm.Model(people, [people.households], [disease], outputs={"infections": lpm.flow("S -> E")})
    theta = np.array([[{"beta_home": 0.8, "gamma": 0.3, "initial": 0.2}[p.name] for p in model.parameters]])

    def totals(estimator: str, seeds: int) -> np.ndarray:
        runs = [evaluate(model, theta, estimator=estimator, steps=8, seed=seed, step=0.1) for seed in range(seeds)]
        return np.array([run.derivative[:, 0, 0].sum(0) for run in runs])

    score, differences = totals("score", 12), totals("fd", 400)
    error = np.hypot(score.std(0, ddof=1) / np.sqrt(12), differences.std(0, ddof=1) / np.sqrt(400))
    assert (np.abs(score.mean(0) - differences.mean(0)) < 3 * error).all()
    assert (np.abs(differences.mean(0)) > 5 * error).all()  # there is something to be right about


def test_decisions_of_score_change_no_value():
    model = models.town(90)
    theta = np.array([[models.THETA[parameter.name] for parameter in model.parameters]])
    plain = evaluate(model, theta, estimator="none", steps=5, seed=3)
    for estimator in ("score", "st-gumbel"):
        assert np.array_equal(evaluate(model, theta, estimator=estimator, steps=5, seed=3).words, plain.words)
    assert not components(model).any()  # the city joins all


def test_straight_through_is_biased_and_says_so(vectors):
    known = json.loads((vectors / "epidemic" / "reed_frost_households.json").read_text())["cases"]
    case = next(c for c in known if c["household_size"] == 4 and c["initial_infectives"] == 1)
    value = next(v for v in case["values"] if _fraction(v["escape_q"]) == 0.5)
    model = _households(4, 8000)
    slopes = []
    for seed in range(3):
        result = evaluate(model, np.array([[np.log(2.0)]]), estimator="st-gumbel", steps=5, seed=seed)
        assert result.derivative is not None
        slopes.append(result.derivative.sum() / 8000 / 0.5)
    exact = float(value["d_expected_d_p"])
    assert np.mean(slopes) < 0.9 * exact and np.std(slopes, ddof=1) < 0.05 * exact
    audit = audit_gradients(_households(2, 300), {"hazard": 0.7}, steps=2, seeds=4, estimators=["st-gumbel"])
    row = audit.table().set_index("estimator").loc["st-gumbel"]
    assert row["label"] == "st-gumbel (biased)" and "comparison" in row["note"] and audit.chosen == "fd"
    assert audit.reason == "the others are for comparison only"
    alone = audit_gradients(_households(2, 300), {"hazard": 0.7}, steps=2, seeds=2, estimators=["fd"])
    assert alone.chosen == "fd" and alone.reason == "no other estimator was asked for"


def test_an_estimator_that_cannot_is_refused_with_what_to_use_instead():
    model = models.town(60)
    with pytest.raises(InputError, match="score has no reverse mode") as refused:
        lpm.simulate(model, models.THETA, steps=2, gradient="score", mode="reverse")
    assert "gradient=tangent" in refused.value.remedy
    with pytest.raises(InputError, match="no estimator 'magic'"):
        audit_gradients(model, models.THETA, steps=2, estimators=["magic"])
    with pytest.raises(InputError, match="seeds is 1"):
        audit_gradients(model, models.THETA, steps=2, seeds=1)

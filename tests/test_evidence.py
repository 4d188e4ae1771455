"""What is compared with a series when several simulations stand for one expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpm import scenario as scenarios
from lpm import simulation
from lpm.calibration.study import Settings, choose
from lpm.errors import InputError
from lpm.evidence import debiased
from lpm.parameters import Parameter
from lpm.variational import LocalBackend, evidence_of
from tests.test_three_clinics import FOLDER


@pytest.mark.parametrize("replicates", [2, 3, 6])
def test_little_noise_leaves_no_bias_in_the_square_of_a_mean(replicates: int) -> None:
    runs = 1.0 + 0.01 * np.random.default_rng(1).normal(size=(replicates, 1))
    whole = torch.from_numpy(runs.mean(axis=0) ** 2)
    without = [torch.from_numpy(np.delete(runs, k, axis=0).mean(axis=0) ** 2) for k in range(replicates)]
    # The square of an expectation has one unbiased estimate: the mean product of two different runs.
    product = np.mean([a * b for k, a in enumerate(runs[:, 0]) for b in runs[:k, 0]])
    assert float(debiased(whole, without)) == pytest.approx(product, abs=1e-8)
    assert abs(float(whole) - product) > 1e-6


def test_noise_is_never_made_a_gain_of_more_than_its_limit() -> None:
    whole = torch.tensor([500.0], dtype=torch.float64)
    found = debiased(whole, [whole + 400.0, whole + 600.0])
    assert 480.0 < float(found) < 485.0
    assert debiased(whole, []) is whole


def test_a_loss_of_several_simulations_has_the_gradient_of_all_its_parts() -> None:
    world = scenarios.load(FOLDER).with_options(settings={"calibration.replicates": "3"})
    evidence = evidence_of(world, 1)
    theta = np.array([list(world.defaults.values())])
    loss, gradient = evidence.evaluate(theta, 5, estimator="fd")
    # A parameter of the observation alone changes no simulation: its derivative can be had from the loss itself.
    observed = [k for k, name in enumerate(evidence.names) if name not in world.dynamics]
    for k in observed:
        step = np.zeros_like(theta)
        step[0, k] = 1e-4 * theta[0, k]
        ends = [evidence.evaluate(theta + sign * step, 5, estimator="none")[0][0] for sign in (1, -1)]
        assert (ends[0] - ends[1]) / (2 * step[0, k]) == pytest.approx(gradient[0, k], rel=1e-4)
    assert observed
    assert evidence.evaluate(theta, 5, estimator="none")[0] == pytest.approx(loss, rel=1e-12)


def test_no_task_can_ask_for_more_simulations_than_the_scenario_says() -> None:
    evidence = evidence_of(scenarios.load(FOLDER), 1)
    theta = np.array([[1.0] * len(evidence.names)])
    for wrong in (0, evidence.replicates + 1, True):
        with pytest.raises(InputError, match="replicates"):
            evidence.evaluate(theta, 0, estimator="none", replicates=wrong)


@pytest.mark.parametrize("estimator", ["fd", "none"])
def test_replicates_that_run_at_once_are_those_that_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    evidence = evidence_of(scenarios.load(FOLDER), 1)
    evidence.replicates = 3
    theta = np.array([list(scenarios.load(FOLDER).defaults.values())] * 2) * np.array([[1.0], [1.05]])
    runs = []
    run = simulation.run
    monkeypatch.setattr(simulation, "run", lambda *given, **more: runs.append(1) or run(*given, **more))
    together = evidence.evaluate(theta, 5, estimator=estimator)
    assert len(runs) == 1
    monkeypatch.setattr("lpm.evidence.LANES", 1)
    one_by_one = evidence.evaluate(theta, 5, estimator=estimator)
    assert len(runs) == 4
    for found, expected in zip(together, one_by_one, strict=True):
        assert np.array_equal(found, expected)


def test_the_audit_asks_for_one_simulation_and_rejects_at_once_what_is_far_off() -> None:
    asked = []

    class Backend(LocalBackend):
        def __init__(self) -> None:
            pass

        def evaluate(self, theta, trajectory, estimator, *, replicates=None):
            asked.append((estimator, replicates))
            return np.zeros(len(theta)), np.full(theta.shape, 3.0 if estimator == "tangent" else 1.0)

    choice = choose([Parameter("a"), Parameter("b")], Backend(), Settings(1, 4, 1.0, 1, 0))
    assert choice.estimator == "fd"
    assert asked == [("fd", 1), ("tangent", 1)]


def test_how_many_draws_of_a_forecast_run_at_once_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = evidence_of(scenarios.load(FOLDER), 1)
    theta = np.array([list(scenarios.load(FOLDER).defaults.values())] * 11) * np.linspace(0.9, 1.1, 11)[:, None]
    together = evidence.words(theta, 5)
    monkeypatch.setattr("lpm.evidence.LANES", 4)
    assert np.array_equal(evidence.words(theta, 5), together)
    monkeypatch.setattr("lpm.evidence.LANES", 1)
    assert np.array_equal(evidence.words(theta, 5), together)
    assert len(np.unique(together[-1, 0])) > 6

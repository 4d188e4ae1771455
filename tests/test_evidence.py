"""What is compared with a series when several simulations stand for one expectation."""

from __future__ import annotations

import numpy as np
import pytest

from lpm import scenario as scenarios
from lpm.calibration.study import Settings, choose
from lpm.errors import InputError
from lpm.evidence import jackknife
from lpm.parameters import Parameter
from lpm.variational import LocalBackend, evidence_of
from tests.test_three_clinics import FOLDER


@pytest.mark.parametrize("replicates", [1, 2, 3, 6])
def test_the_jackknife_leaves_no_bias_in_the_square_of_a_mean(replicates: int) -> None:
    runs = np.random.default_rng(1).normal(size=replicates)
    subsets = jackknife(replicates)
    found = sum(share * runs[list(members)].mean() ** 2 for share, members in subsets)
    # The square of the expectation has one unbiased estimate: the mean product of two different runs.
    pairs = [a * b for k, a in enumerate(runs) for b in runs[:k]]
    assert found == pytest.approx(np.mean(pairs) if pairs else runs[0] ** 2)
    assert sum(share for share, _ in subsets) == pytest.approx(1.0)


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

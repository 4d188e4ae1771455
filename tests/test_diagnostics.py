"""Checks of posteriors and forecasts: a right posterior passes, wrong ones fail; scores against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lpm.calibration import diagnostics
from lpm.calibration.diagnostics import Check, Checks
from lpm.calibration.priors import Prior
from lpm.calibration.tempering import choose_weight
from lpm.errors import InputError
from lpm.parameters import Parameter

REPETITIONS, DRAWS = 400, 199


def conjugate(width: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draws [R, S, 2] and truths [R, 2] of a Gaussian model whose posterior is known, then widened and shifted."""
    rng = np.random.default_rng(7)
    truths = rng.standard_normal((REPETITIONS, 2))
    data = truths + 0.5 * rng.standard_normal(truths.shape)
    precision = 1.0 + 1.0 / 0.25
    mean, sd = data / 0.25 / precision, precision**-0.5
    noise = rng.standard_normal((REPETITIONS, DRAWS, 2))
    return mean[:, None, :] + sd * (shift + width * noise), truths


def test_a_right_posterior_passes_all() -> None:
    draws, truths = conjugate()
    assert diagnostics.coverage_check(draws, truths, ["a", "b"]).passed
    assert (diagnostics.sbc_p_values(diagnostics.sbc_ranks(draws, truths), DRAWS) > 0.01).all()
    result = diagnostics.tarp(draws, truths, seed=1)
    assert result.p_value > 0.01
    np.testing.assert_allclose(result.coverage, result.levels, atol=0.1)
    assert result.coverage[0] == 0.0 and result.coverage[-1] == 1.0


@pytest.mark.parametrize(("width", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.7)])
def test_wrong_posteriors_fail(width: float, shift: float) -> None:
    draws, truths = conjugate(width, shift)
    assert not diagnostics.coverage_check(draws, truths, ["a", "b"]).passed
    assert (diagnostics.sbc_p_values(diagnostics.sbc_ranks(draws, truths), DRAWS) < 1e-3).all()
    if shift == 0.0:
        result = diagnostics.tarp(draws, truths, seed=1)
        assert result.p_value < 1e-3
        assert (result.coverage[10] > result.levels[10]) == (width > 1)


def test_coverage_counts_and_their_limits() -> None:
    draws = np.tile(np.arange(101.0)[None, :, None], (3, 1, 1))
    truths = np.array([[5.0], [4.9], [96.0]])
    assert diagnostics.interval_coverage(draws, truths, 0.9).tolist() == pytest.approx([1 / 3])
    low, high = diagnostics.coverage_limits(20, 0.9, 0.95)
    assert (low, high) == (15, 20)
    assert stats.binom.cdf(low - 1, 20, 0.9) <= 0.025 < stats.binom.cdf(low, 20, 0.9)
    with pytest.raises(InputError, match="level is 90"):
        diagnostics.coverage_limits(20, 90)
    with pytest.raises(InputError, match="go together"):
        diagnostics.sbc_ranks(draws, truths[:2])


def test_ranks_are_uniform_for_every_number_of_bins() -> None:
    draws, truths = np.arange(9.0).reshape(1, 9, 1), np.array([[3.5]])
    assert diagnostics.sbc_ranks(draws, truths).tolist() == [[4]]
    even = np.repeat(np.arange(10), 5)[:, None]
    assert diagnostics.sbc_p_values(even, 9, bins=10).item() == pytest.approx(1.0)
    assert diagnostics.sbc_p_values(even, 9, bins=3).item() > 0.9


def test_effective_sample_size() -> None:
    assert diagnostics.effective_sample_size(np.full(50, -1e4)) == pytest.approx(50)
    assert diagnostics.effective_sample_size([0.0, -np.inf, -1e3]) == pytest.approx(1)
    weights = np.array([0.2, 0.3, 0.5])
    assert diagnostics.effective_sample_size(np.log(weights) + 700) == pytest.approx(1 / (weights**2).sum())
    with pytest.raises(InputError):
        diagnostics.effective_sample_size([-np.inf, -np.inf])


def test_scores_of_forecasts() -> None:
    assert diagnostics.log_score([-1000.0, -1001.0]) == pytest.approx(-1000 + np.log((1 + np.exp(-1)) / 2))
    rng = np.random.default_rng(2)
    draws = 3.0 + 2.0 * rng.standard_normal((20_000, 2))
    observed = np.array([4.0, -1.0])

    def crps_of(y: float) -> float:
        below = integrate.quad(lambda x: stats.norm.cdf(x, 3, 2) ** 2, -20, y)[0]
        return below + integrate.quad(lambda x: stats.norm.sf(x, 3, 2) ** 2, y, 26)[0]

    np.testing.assert_allclose(diagnostics.crps(draws, observed), [crps_of(y) for y in observed], rtol=0.03)
    # The estimator is unbiased: with two draws, its mean over many pairs is the same.
    pairs = diagnostics.crps(draws[:, 0].reshape(2, -1), np.full(10_000, 4.0))
    assert pairs.mean() == pytest.approx(crps_of(4.0), rel=0.05)
    # One level by the definition: half of |y − median| and α/2 of the interval score, over 1.5.
    values, y = np.arange(101.0), 98.0
    expected = (0.5 * 48 + 0.1 / 2 * (90 + 2 / 0.1 * 3)) / 1.5
    assert diagnostics.weighted_interval_score(values, y, [0.9]) == pytest.approx(expected)
    with pytest.raises(InputError):
        diagnostics.crps(np.ones((1, 3)), np.ones(3))


def test_the_headline_says_what_failed() -> None:
    good, bad = Check("90% coverage", True, "a 18/20"), Check("TARP", False, "p = 0.001")
    assert Checks((good,)).headline() == "All 1 checks passed: 90% coverage."
    assert Checks((good, bad)).headline() == "FAILED 1 of 2 checks: TARP (p = 0.001)."
    assert Checks(()).headline().startswith("UNCHECKED")
    assert Checks((good,)).passed and not Checks((good, bad)).passed


def test_the_weight_makes_up_for_a_likelihood_that_counts_the_data_four_times() -> None:
    prior = Prior([Parameter("x")])

    def simulate(theta: np.ndarray, seed: int) -> float:
        return float(theta[0] + 0.3 * np.random.default_rng(seed).standard_normal())

    def calibrate(data: float, weight: float, seed: int) -> np.ndarray:
        precision = 1.0 + 4.0 / (0.3**2 * weight)
        mean = 4.0 / (0.3**2 * weight) * data / precision
        return mean + precision**-0.5 * np.random.default_rng(seed).standard_normal((300, 1))

    choice = choose_weight(prior, simulate, calibrate, candidates=(8.0, 1.0, 4.0), repetitions=60, seed=3)
    assert choice.weight == 4.0 and choice.covers
    assert choice.coverage[1.0][0] < 0.75 < 0.8 < choice.coverage[4.0][0]
    assert 8.0 not in choice.coverage  # a narrower posterior did
    hopeless = choose_weight(prior, simulate, lambda d, w, s: np.zeros((9, 1)), candidates=(1.0,), repetitions=5)
    assert not hopeless.covers and hopeless.weight == 1.0
    with pytest.raises(InputError):
        choose_weight(prior, simulate, calibrate, candidates=(0.0,))
    assert prior.sample(1, torch.Generator().manual_seed(0)).shape == (1, 1)

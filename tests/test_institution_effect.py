"""An institution's own factor is integrated out exactly, learned from the fitted days alone, and differentiable."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lpm.errors import InputError
from lpm.institution_effect import InstitutionEffect
from lpm.observation import CountSeries, Observation
from lpm.parameters import Parameter

DAYS = 30
SCALE = Parameter("scale", prior="lognormal(0, 1)")
COUNTS = np.random.default_rng(4).poisson(40 * np.exp(0.5), DAYS).astype(np.float64)


def effect(sd: float = 0.3, learn: int = 20, values: np.ndarray = COUNTS) -> InstitutionEffect:
    """A Poisson series of a flat wave of 40 a day, seen e^0.5 times too large."""
    series = CountSeries("cases", "cases", values, scale=SCALE, likelihood="poisson", background=0.0)
    return InstitutionEffect(Observation("here", dt.date(2020, 1, 1), [series]), sd, learn)


OUTPUTS = {"cases": torch.full((2, DAYS), 40.0, dtype=torch.float64)}
THETA = {"scale": torch.tensor([1.0, 1.3], dtype=torch.float64)}


def integral(days: slice, scale: float, sd: float) -> float:
    """log of the probability of some days with z integrated out, by adaptive quadrature."""
    peak = float(np.log(COUNTS[days].mean() / (40 * scale)))

    def log_density(z: float) -> float:
        return stats.poisson.logpmf(COUNTS[days], 40 * scale * np.exp(z)).sum() + stats.norm.logpdf(z, 0, sd)

    top = log_density(peak)
    area = integrate.quad(lambda z: np.exp(log_density(z) - top), -4 * sd, 4 * sd, points=[peak], limit=200)[0]
    return top + float(np.log(area))


def test_the_marginal_likelihood_is_the_integral() -> None:
    found = effect().log_likelihood(OUTPUTS, THETA, slice(0, 20)).numpy()
    assert found == pytest.approx([integral(slice(0, 20), s, 0.3) for s in (1.0, 1.3)], abs=2e-3)


def test_a_forecast_is_conditional_on_the_fitted_days() -> None:
    found = effect().log_likelihood(OUTPUTS, THETA, slice(20, 30)).numpy()
    exact = [integral(slice(0, 30), s, 0.3) - integral(slice(0, 20), s, 0.3) for s in (1.0, 1.3)]
    assert found == pytest.approx(exact, abs=2e-3)


def test_held_out_days_never_change_the_factor() -> None:
    other = COUNTS.copy()
    other[20:29] = 400
    a, b = (effect(values=v).log_likelihood(OUTPUTS, THETA, slice(29, 30)) for v in (COUNTS, other))
    assert torch.equal(a, b)


def test_what_was_learned_is_kept_for_the_same_simulation_only() -> None:
    it, other = effect(), {"cases": OUTPUTS["cases"] * 1.2}
    first = it.log_likelihood(OUTPUTS, THETA, slice(21, 22))
    assert torch.equal(it.log_likelihood(OUTPUTS, THETA, slice(21, 22)), first)
    assert torch.equal(
        it.log_likelihood(other, THETA, slice(21, 22)), effect().log_likelihood(other, THETA, slice(21, 22))
    )
    early = it.log_likelihood(other, THETA, slice(5, 6))
    assert torch.equal(early, effect().log_likelihood(other, THETA, slice(5, 6)))


def test_predictions_take_up_the_level_that_was_seen() -> None:
    wide = {"cases": OUTPUTS["cases"][:1].expand(400, -1)}
    theta = {"scale": torch.ones(400, dtype=torch.float64)}
    drawn = effect().predict(wide, theta, torch.Generator().manual_seed(1))["cases"]
    assert drawn.shape == (400, DAYS)
    assert drawn.mean() == pytest.approx(COUNTS[:20].mean(), rel=0.02)
    ignorant = effect(learn=0).predict(wide, theta, torch.Generator().manual_seed(1))["cases"]
    # e^z with z normal of sd 0.3 around 0: 5 standard errors of 400 draws are 0.08
    assert np.log(ignorant.mean(axis=1)).mean() == pytest.approx(np.log(40), abs=0.08)
    again = effect(learn=0).predict(wide, theta, torch.Generator().manual_seed(1))["cases"]
    assert np.array_equal(ignorant, again)


def test_derivatives_flow_through_the_integral() -> None:
    scale = torch.tensor([0.9, 1.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: effect().log_likelihood(OUTPUTS, {"scale": s}, slice(0, 20)), (scale,), atol=1e-4
    )


def test_it_stands_in_for_an_observation() -> None:
    it = effect()
    assert (it.institution, it.start, it.series[0].name) == ("here", dt.date(2020, 1, 1), "cases")
    window = slice(20, 30)
    assert it.persistence_log_score(window) == it.observation.persistence_log_score(window)


@pytest.mark.parametrize(("sd", "learn", "named"), [(0.0, 20, "sd"), (float("nan"), 20, "sd"), (0.3, 31, "learn")])
def test_impossible_effects_are_refused(sd: float, learn: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        effect(sd, learn)

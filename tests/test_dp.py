"""Differential privacy: an exact sampler, books that are never below the truth, and an auditor who finds no more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from scipy.stats import chi2

from lpm import ring
from lpm.errors import InputError
from lpm.privacy.dp import (
    Mechanism,
    SecretStream,
    calibrated_multiplier,
    delta_of,
    discrete_gaussian,
    epsilon_lower_bound,
    epsilon_of,
)

CLIPS = {"outputs": 10.0, "loss": 5.0, "gradient": 2.0}


def cases(vectors: Path, name: str, key: str = "cases") -> list[dict]:
    found = json.loads((vectors / "dp" / f"{name}.json").read_text())[key]
    assert found
    return found


def test_the_sampler_draws_the_discrete_gaussian(vectors: Path) -> None:
    # Chi-squared at a false-alarm rate of 1e-6 for each of the variances.
    for case in cases(vectors, "discrete_gaussian_pmf"):
        variance = float(case["sigma2"])
        numerator, denominator = variance.as_integer_ratio()
        stream, count = SecretStream(b"test", case["sigma2"].encode()), 12_000
        drawn = np.array([discrete_gaussian(numerator, denominator, stream) for _ in range(count)])
        expected = {int(k): count * float(p) for k, p in case["pmf"].items() if count * float(p) >= 8}
        statistic, cells, rest = 0.0, -1, count
        for k, each in expected.items():
            for sign in {k, -k}:
                seen = int((drawn == sign).sum())
                statistic += (seen - each) ** 2 / each
                cells, rest = cells + 1, rest - seen
        beyond = count - sum(each * (2 if k else 1) for k, each in expected.items())
        if beyond >= 8:
            statistic, cells = statistic + (rest - beyond) ** 2 / beyond, cells + 1
        assert statistic < chi2.ppf(1 - 1e-6, cells), (case["sigma2"], statistic, cells)


def test_wide_noise_has_the_right_spread_and_no_bias() -> None:
    sigma, count = 2.0**40, 4000
    stream = SecretStream(b"wide", b"")
    drawn = np.array([discrete_gaussian(2**80, 1, stream) for _ in range(count)], dtype=np.float64) / sigma
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)


def test_the_stream_repeats_for_its_key_and_context_alone() -> None:
    def draw(key: bytes, context: bytes) -> list[int]:
        stream = SecretStream(key, context)
        return [stream.below(1000) for _ in range(20)]

    assert draw(b"a", b"1") == draw(b"a", b"1")
    assert len({tuple(draw(*each)) for each in [(b"a", b"1"), (b"a", b"2"), (b"b", b"1")]}) == 3
    assert repr(SecretStream(b"a", b"1")) == "SecretStream()"


def test_delta_is_never_below_the_exact_one(vectors: Path) -> None:
    for case in cases(vectors, "discrete_gaussian_delta"):
        multiplier = math.sqrt(float(case["sigma2"])) / case["sensitivity"]
        assert delta_of({repr(multiplier): 1}, float(case["epsilon"])) >= float(case["delta_exact"]) * (1 - 1e-12)


def test_epsilon_is_that_of_the_accounting_grid(vectors: Path) -> None:
    plain = 0
    for case in cases(vectors, "accounting_grid"):
        z, q, steps, delta = (case[k] for k in ("noise_multiplier", "sampling_probability", "steps", "delta"))
        pld, rdp = float(case["pld_epsilon"]), float(case["rdp_epsilon_library_orders"])
        assert pld <= rdp + 1e-3
        event = dp_accounting.GaussianDpEvent(z)
        if q < 1:  # no mechanism of ours samples: there the library alone is held to the grid
            event = dp_accounting.PoissonSampledDpEvent(q, event)
        best = int(case["rdp_integer_optimal_order"])
        accountant = dp_accounting.rdp.RdpAccountant([max(2, best - 1), best, best + 1]).compose(event, steps)
        assert accountant.get_epsilon(delta) == pytest.approx(float(case["rdp_epsilon_integer_orders"]), rel=1e-6)
        if q == 1:
            # Fractional orders, exact without sampling, bring the bound nearer to the truth.
            plain += 1
            assert float(case["exact_epsilon"]) <= epsilon_of({repr(float(z)): steps}, delta) <= rdp + 1e-9
            assert float(case["exact_epsilon"]) <= pld + 1e-3
    assert plain


def test_the_renyi_curve_and_the_conversion_are_never_below_the_truth(vectors: Path) -> None:
    for case in cases(vectors, "zcdp_to_dp"):
        rho, delta = float(case["rho"]), float(case["delta"])
        found = epsilon_of({repr(math.sqrt(1 / (2 * rho))): 1}, delta)
        assert found >= float(case["epsilon_exact_gaussian_sigma2_eq_1_over_2rho"])
        assert found <= float(case["epsilon_bun_steinke"])
    for case in cases(vectors, "analytic_gaussian"):
        z = calibrated_multiplier(float(case["epsilon"]), float(case["delta"]), 1) * float(case["sensitivity"])
        assert z >= float(case["sigma"]) * (1 - 1e-9)  # never less noise than the least that is enough


def test_the_reported_epsilon_is_the_librarys_for_the_mechanism_that_ran() -> None:
    mechanism = Mechanism("outputs+gradients", 7.5, 2, CLIPS)
    spent: dict[str, int] = {}
    for kind in ["evaluate"] * 40 + ["simulate"] + ["predict"] * 2:
        for multiplier, count in mechanism.releases(kind).items():
            spent[multiplier] = spent.get(multiplier, 0) + count
    assert spent == {"7.5": 81}
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(7.5), 81)
    assert epsilon_of(spent, 1e-6) == dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-6)
    assert epsilon_of({}, 1e-6) == 0.0
    assert epsilon_of(spent, 1e-6) <= 8.0 or calibrated_multiplier(8.0, 1e-6, 81) > 7.5


def test_a_contribution_is_clipped_and_the_noise_of_two_honest_parties_is_enough() -> None:
    mechanism = Mechanism("outputs+gradients", 3.0, 2, CLIPS)
    # A huge contribution moves the words by the clip and no more; what is not finite counts as nothing.
    streams = [[SecretStream(b"k", i.to_bytes(2, "big")) for i in range(300)] for _ in range(2)]
    still = [mechanism.protect("gradient", np.zeros((2, 3)), each, 32) for each in streams[0]]
    moved = [mechanism.protect("gradient", np.full((2, 3), 1e9), each, 32) for each in streams[1]]
    shift = ring.decode(np.array(moved) - np.array(still), 32)
    np.testing.assert_allclose(np.linalg.norm(shift, axis=2), 2.0, rtol=1e-6)
    odd = mechanism.protect("gradient", np.array([[np.nan, np.inf, 0.0]] * 2), SecretStream(b"k", b"\0\0"), 32)
    np.testing.assert_array_equal(odd, still[0])
    # Two shares add up to multiplier · 2 · clip · √K.
    spread = ring.decode(np.array(still), 32).std() * math.sqrt(2)
    assert spread == pytest.approx(3.0 * 2 * 2.0 * math.sqrt(2), rel=5 / math.sqrt(2 * 1800))


def _attack(mechanism: Mechanism, threshold: float, runs: int, delta: float) -> float:
    """What an auditor proves of one release to which the target contributes its clip, or its negative.

    The event is that the opened sum is above a threshold; the bound fails with probability 0.001.
    """

    def hits(sign: float, name: bytes) -> int:
        streams = [[SecretStream(name + bytes([p]), k.to_bytes(4, "big")) for k in range(runs)] for p in range(2)]
        target = [mechanism.protect("loss", np.array([[sign * 1e6]]), each, 32) for each in streams[0]]
        other = [mechanism.protect("loss", np.array([[1.0]]), each, 32) for each in streams[1]]
        return int((ring.decode(np.array(target) + np.array(other), 32) > threshold).sum())

    return epsilon_lower_bound(hits(1.0, b"a"), runs, hits(-1.0, b"b"), runs, delta, 0.999)


def test_an_auditor_proves_no_more_than_is_reported_and_catches_a_mechanism_with_too_little_noise() -> None:
    delta, multiplier = 1e-5, 1.0
    claimed = epsilon_of({repr(multiplier): 1}, delta)
    honest = _attack(Mechanism("outputs+gradients", multiplier, 2, CLIPS), 2 * CLIPS["loss"], 3000, delta)
    assert 0.5 < honest <= claimed
    # With an eighth of the noise, as if each party believed in 64 times as many honest ones, the auditor objects.
    cheat = _attack(Mechanism("outputs+gradients", multiplier, 128, CLIPS), 0.0, 3000, delta)
    assert cheat > claimed


def test_settings_that_make_no_mechanism_are_refused() -> None:
    for bad in ({"mode": "some"}, {"multiplier": 0.0}, {"honest": 0}, {"clips": {"loss": -1.0}}):
        with pytest.raises(InputError):
            Mechanism(**({"mode": "outputs", "clips": CLIPS} | bad))
    with pytest.raises(InputError, match="words wide"):
        Mechanism("outputs", 1e9, 2, CLIPS).protect("outputs", np.ones((1, 1)), SecretStream(b"k", b""), 40)

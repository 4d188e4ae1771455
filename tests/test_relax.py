"""Hard decisions with true derivatives, under every transform of torch.func."""

import numpy as np
import torch
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

from lpm.relax import attach, one_minus_exp, sample, thresholds


def test_one_minus_exp_is_accurate_and_a_probability():
    x = torch.cat(
        [torch.logspace(-12, 0.9, 500, dtype=torch.float64), torch.linspace(8, 1000, 500, dtype=torch.float64)]
    )
    p = one_minus_exp(x)
    exact = -torch.expm1(-x)
    assert float(((p - exact).abs() / exact)[:500].max()) < 1e-13
    assert float((p - exact).abs().max()) < 1e-9
    assert ((p >= 0) & (p <= 1)).all()
    assert float(one_minus_exp(torch.zeros(1, dtype=torch.float64))) == 0.0


def test_thresholds_are_exact_integers():
    assert thresholds(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [0, 2**31, 2**32]


def _decide(p: torch.Tensor) -> torch.Tensor:
    word = torch.arange(8, dtype=torch.int64)[:, None] * 2**29
    occupied = torch.ones((8, 1), dtype=torch.float64)
    first, second = sample(occupied, [p[0] * p[1], p[0]], word)
    return torch.stack([first.sum(), second.sum()])


def test_values_are_hard_and_derivatives_those_of_the_expectation():
    p = torch.tensor([0.6, 0.5], dtype=torch.float64)
    assert _decide(p).tolist() == [3.0, 2.0]  # words below 0.3 and below 0.6 of 2^32
    exact = 8 * torch.tensor([[0.5, 0.6], [0.5, -0.6]], dtype=torch.float64)
    assert torch.equal(jacfwd(_decide)(p), jacrev(_decide)(p))
    assert torch.allclose(jacfwd(_decide)(p), exact, rtol=0, atol=1e-12)
    directions = torch.eye(2, dtype=torch.float64)
    pushed = vmap(lambda d: jvp(_decide, (p,), (d,))[1])(directions)
    assert torch.allclose(pushed.T, exact, rtol=0, atol=1e-12)
    values, pull = vjp(_decide, p)
    assert values.tolist() == [3.0, 2.0]
    assert torch.allclose(vmap(lambda d: pull(d)[0])(directions), exact, rtol=0, atol=1e-12)


def test_attach_keeps_the_value_to_the_bit():
    rng = np.random.default_rng(1)
    hard, soft = torch.from_numpy(rng.normal(size=1000)), torch.from_numpy(1e12 * rng.normal(size=1000))
    assert torch.equal(attach(hard, soft), hard)

"""Variational inference on targets whose posterior is known, with gradients as noisy as a simulator's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from lpm.calibration.gvi import Evaluate, Fit, GviState, IterationRecord, fit
from lpm.calibration.posterior import Posterior
from lpm.errors import CheckpointError, InputError, LpmError
from lpm.parameters import Parameter

Array = np.ndarray


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of ten by ten gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def standard(size: int) -> list[Parameter]:
    """Parameters with standard-normal priors, so that θ is u."""
    return [Parameter(f"x{number}") for number in range(size)]


def gaussian(size: int, seed: int, noise: float = 0.4, common: float = 0.5) -> tuple[Evaluate, Array, Array]:
    """A rotated Gaussian likelihood, and the mean and covariance of its posterior under a standard-normal prior.

    The posterior's sds go from 0.03 to 0.5 of the prior's. Each gradient is off by a factor of sd `noise` per entry,
    and all of an iteration by a shift of sd `common` posterior sds, as when they share random numbers.
    """
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((size, size)))
    sd = np.geomspace(0.03, 0.5, size)
    information = axes @ np.diag(1 / sd**2 - 1) @ axes.T
    centre = rng.standard_normal(size)
    covariance = np.linalg.inv(information + np.eye(size))
    root = np.linalg.cholesky(np.linalg.inv(covariance))

    def evaluate(theta: Array, iteration: int) -> tuple[Array, Array]:
        random = np.random.default_rng([seed, iteration])
        gradient = (theta - centre) @ information
        loss = 0.5 * ((theta - centre) * gradient).sum(axis=1)
        factor = 1.0 + noise * random.standard_normal(theta.shape)
        return loss, gradient * factor + common * (root @ random.standard_normal(size))

    return evaluate, covariance @ information @ centre, covariance


def distance(found: Fit, mean: Array, covariance: Array) -> tuple[float, float, float]:
    """Error of the mean in posterior sds per parameter; smallest and largest ratio of sds over all directions."""
    location, factor = found.posterior.location.numpy(), found.posterior.factor.numpy()
    error = location - mean
    ratios = np.sqrt(np.linalg.eigvals(np.linalg.solve(covariance, factor @ factor.T)).real)
    return float(np.sqrt(error @ np.linalg.solve(covariance, error) / len(mean))), ratios.min(), ratios.max()


@pytest.mark.parametrize(("size", "iterations"), [(1, 60), (2, 60), (6, 80), (10, 100)])
def test_sixty_to_a_hundred_noisy_iterations_of_four_draws_find_a_gaussian(size: int, iterations: int) -> None:
    for seed in range(3):
        evaluate, mean, covariance = gaussian(size, seed)
        found = fit(standard(size), evaluate, iterations=iterations, draws=4, seed=seed)
        off, narrow, wide = distance(found, mean, covariance)
        assert off < 0.5 and narrow > 0.6 and wide < 1.6, (seed, off, narrow, wide)


def test_without_noise_it_is_exact_and_says_so() -> None:
    evaluate, mean, covariance = gaussian(4, 1, noise=0.0, common=0.0)
    found = fit(standard(4), evaluate, iterations=60, draws=4)
    off, narrow, wide = distance(found, mean, covariance)
    assert off < 0.01 and 0.99 < narrow and wide < 1.01
    assert found.converged and found.advice == "" and found.headline().startswith("Converged in 60")
    assert found.records[-1].noise < 0.01
    # The last objective is the negative log evidence, but for the likelihood's constant: both are known here.
    precision = np.linalg.inv(covariance)
    centre = np.linalg.solve(precision - np.eye(4), precision @ mean)
    expected = 0.5 * centre @ np.linalg.solve(np.eye(4) + np.linalg.inv(precision - np.eye(4)), centre)
    expected += 0.5 * np.linalg.slogdet(precision)[1]
    objective = np.mean([record.objective for record in found.records[-20:]])
    assert objective == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_the_weight_tempers_the_data(weight: float) -> None:
    evaluate, _, covariance = gaussian(2, 3, noise=0.0, common=0.0)
    information = np.linalg.inv(covariance) - np.eye(2)
    found = fit(standard(2), evaluate, iterations=50, weight=weight)
    expected = np.linalg.inv(information / weight + np.eye(2))
    factor = found.posterior.factor.numpy()
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=0.02, atol=1e-5)


def test_parameters_with_bounds_have_the_posterior_of_quadrature() -> None:
    parameter = Parameter("rate", "lognormal(-2, 0.5)", (0.02, 1.0))
    observed = 40.0  # a Poisson count with mean 200·rate

    def evaluate(theta: Array, iteration: int) -> tuple[Array, Array]:
        noise = 1.0 + 0.3 * np.random.default_rng(iteration).standard_normal(theta.shape)
        mean = 200.0 * theta
        return (mean - observed * np.log(mean))[:, 0], (200.0 - observed / theta) * noise

    theta = fit([parameter], evaluate, iterations=60).posterior.sample(20_000, torch.Generator().manual_seed(1))[0]
    grid = np.linspace(0.02, 1.0, 20_000)
    log_density = observed * np.log(grid) - 200.0 * grid - np.log(grid) - 0.5 * ((np.log(grid) + 2.0) / 0.5) ** 2
    density = np.exp(log_density - log_density.max())
    mean = (grid * density).sum() / density.sum()
    sd = np.sqrt(((grid - mean) ** 2 * density).sum() / density.sum())
    assert theta.mean().item() == pytest.approx(mean, abs=0.25 * sd)
    assert theta.std().item() == pytest.approx(sd, rel=0.15)


def banana(theta: Array, iteration: int) -> tuple[Array, Array]:
    """A likelihood with a bent ridge, its gradient off by 30 %."""
    x, y = theta[:, 0], theta[:, 1]
    rest = (y - 0.7 * x**2 + 0.5) / 0.3**2
    gradient = np.stack([(x - 0.3) / 0.64 - 1.4 * x * rest, rest], axis=1)
    noise = 1.0 + 0.3 * np.random.default_rng(iteration).standard_normal(gradient.shape)
    return 0.5 * ((x - 0.3) / 0.8) ** 2 + 0.5 * (rest * 0.3) ** 2, gradient * noise


def divergence(posterior: Posterior) -> float:
    """KL(q ‖ posterior) of the banana, by quadrature and draws."""
    line = np.linspace(-5, 5, 801)
    cells = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)

    def log_joint(theta: Array) -> Array:
        x, y = theta[:, 0], theta[:, 1]
        loss = 0.5 * ((x - 0.3) / 0.8) ** 2 + 0.5 * ((y - 0.7 * x**2 + 0.5) / 0.3) ** 2
        return -loss - 0.5 * (theta**2).sum(axis=1) - np.log(2 * np.pi)

    evidence = np.log(np.exp(log_joint(cells)).sum() * (line[1] - line[0]) ** 2)
    theta, _, log_q = posterior.sample(4000, torch.Generator().manual_seed(1))
    return float((log_q.numpy() - log_joint(theta.numpy()) + evidence).mean())


def test_a_spline_bends_where_a_gaussian_can_not() -> None:
    straight = fit(standard(2), banana, iterations=100, seed=2)
    bent = fit(standard(2), banana, iterations=100, seed=2, flow="spline")
    assert straight.converged
    assert divergence(bent.posterior) < 0.75 * divergence(straight.posterior) < 0.5


@pytest.mark.parametrize("flow", ["affine", "spline"])
def test_a_resumed_fit_has_the_same_bits(flow: str) -> None:
    iterations, stops = 14, (1, 5, 11)
    evaluate, _, _ = gaussian(3, 2)
    whole = fit(standard(3), evaluate, iterations=iterations, flow=flow, seed=4)
    state: GviState | None = None
    for stop in (*stops, None):
        last = _Stop(stop)
        part = fit(standard(3), evaluate, iterations=iterations, flow=flow, seed=4, state=state, on_iteration=last)
        file = io.BytesIO()
        torch.save(part.state.pack(), file)
        file.seek(0)
        state = GviState.unpack(torch.load(file, weights_only=True))
        assert state.iteration == (stop or iterations)
    assert part.records == whole.records
    for name, tensor in whole.posterior.state_dict().items():
        assert torch.equal(part.posterior.state_dict()[name], tensor), name
    again = fit(standard(3), evaluate, iterations=iterations, flow=flow, seed=4, state=whole.state)
    assert again.records == whole.records  # nothing was left to do


class _Stop:
    """Ends a fit after so many iterations in all."""

    def __init__(self, iterations: int | None) -> None:
        self.iterations = iterations

    def __call__(self, record: IterationRecord, state: GviState) -> bool:
        return state.iteration == self.iterations


def test_a_checkpoint_of_other_settings_is_refused() -> None:
    evaluate, _, _ = gaussian(2, 1)
    state = fit(standard(2), evaluate, iterations=3).state
    with pytest.raises(CheckpointError, match="draws, weight differ"):
        fit(standard(2), evaluate, iterations=6, draws=6, weight=2.0, state=state)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        GviState.unpack({"iteration": 3})


def spoiled(evaluate: Evaluate, spoil: Callable[[Array, Array, int], None]) -> Evaluate:
    """The same losses and gradients, some of them made useless."""

    def other(theta: Array, iteration: int) -> tuple[Array, Array]:
        loss, gradient = evaluate(theta, iteration)
        spoil(loss, gradient, iteration)
        return loss, gradient

    return other


def test_draws_that_are_not_finite_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def spoil(loss: Array, gradient: Array, iteration: int) -> None:
        if iteration % 2:
            loss[0] = np.nan
        if iteration == 4:
            gradient[1, 1] = np.inf

    evaluate, mean, covariance = gaussian(2, 1, noise=0.2, common=0.0)
    found = fit(standard(2), spoiled(evaluate, spoil), iterations=60)
    assert [record.dropped for record in found.records[:6]] == [0, 1, 0, 1, 1, 1]
    assert "1 of 4 draws dropped" in caplog.text
    assert distance(found, mean, covariance)[0] < 0.3 and found.converged


def test_a_wild_gradient_now_and_then_does_no_harm() -> None:
    def spoil(loss: Array, gradient: Array, iteration: int) -> None:
        if iteration % 5 == 0:
            gradient[iteration % 4] *= -1000.0

    evaluate, mean, covariance = gaussian(3, 1, noise=0.2, common=0.0)
    off, narrow, wide = distance(fit(standard(3), spoiled(evaluate, spoil), iterations=80), mean, covariance)
    assert off < 0.5 and narrow > 0.6 and wide < 1.6


def test_nothing_finite_is_an_error_that_names_the_parameters() -> None:
    evaluate, _, _ = gaussian(2, 1)
    with pytest.raises(LpmError, match=r"iteration 1 .* x0 -?\d.* to .*, x1 "):
        fit(standard(2), spoiled(evaluate, lambda loss, gradient, _: loss.fill(np.nan)), iterations=5)


def test_a_fit_that_has_not_converged_says_why() -> None:
    evaluate, _, _ = gaussian(2, 1)
    short = fit(standard(2), evaluate, iterations=8)
    assert not short.converged
    assert short.headline().startswith("NOT CONVERGED after 8 iterations: fewer than 16")
    noisy, _, _ = gaussian(2, 1, noise=0.0, common=20.0)
    found = fit(standard(2), noisy, iterations=30)
    assert not found.converged and "noisy gradients" in found.advice
    gone = fit(standard(2), spoiled(evaluate, lambda loss, *_: loss[:2].fill(np.nan)), iterations=40)
    assert not gone.converged and "no finite loss" in gone.advice


def test_it_stops_when_converged_if_asked_and_starts_from_a_posterior_if_given() -> None:
    evaluate, mean, covariance = gaussian(2, 1, noise=0.2, common=0.2)
    found = fit(standard(2), evaluate, iterations=200, stop_when_converged=True)
    assert found.converged and 16 <= len(found.records) < 100
    assert distance(found, mean, covariance)[0] < 0.5
    start = Posterior(standard(2))
    start.set_affine(torch.from_numpy(mean), torch.from_numpy(np.linalg.cholesky(covariance)))
    near = fit(standard(2), evaluate, iterations=16, start=start)
    assert near.records[0].step == 1.0 and distance(near, mean, covariance)[0] < 0.5
    with pytest.raises(InputError, match="is over x0, x1, not x0"):
        fit(standard(1), evaluate, iterations=3, start=start)


def test_impossible_settings_and_shapes_are_refused() -> None:
    evaluate, _, _ = gaussian(2, 1)
    with pytest.raises(InputError, match="draws is 0: a whole number from 1"):
        fit(standard(2), evaluate, draws=0)
    with pytest.raises(InputError, match="weight is nan"):
        fit(standard(2), evaluate, weight=float("nan"))
    with pytest.raises(InputError, match=r"shapes \(4,\) and \(4, 1\)"):
        fit(standard(2), lambda theta, _: (theta[:, 0], theta[:, :1]), iterations=2)


@pytest.mark.parametrize("draws", [1, 3])
def test_odd_numbers_of_draws_do(draws: int) -> None:
    evaluate, mean, covariance = gaussian(2, 1, noise=0.2, common=0.0)
    assert distance(fit(standard(2), evaluate, iterations=120 // draws, draws=draws), mean, covariance)[0] < 0.5

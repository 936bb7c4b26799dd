import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training.flow.likelihood import log_likelihood
from meam_training.flow.ode import denoise, integrate
from meam_training.flow.path import flow_matching_loss, interpolate, score_from_velocity, time_like

TIMES = st.floats(0.0, 0.99)
SOLVERS: tuple[Solver, ...] = get_args(Solver)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def test_the_interpolant_runs_from_noise_to_action():
    x_0, x_1 = tensor([[1.0, 2.0]] * 3), tensor([[5.0, -2.0]] * 3)
    x_t = interpolate(x_0, x_1, tensor([[0.0], [0.25], [1.0]]))
    np.testing.assert_allclose(x_t, [[1, 2], [2, 1], [5, -2]])


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_a_time_is_repeated_for_every_row(shape):
    times = time_like(torch.zeros(shape), 0.3)
    assert times.shape == (*shape[:-1], 1)
    assert (times == torch.tensor(0.3)).all()


def test_the_flow_matching_loss_is_the_weighted_mean_squared_error_of_the_velocity():
    generator = np.random.default_rng(0)
    predicted, x_0, x_1 = generator.normal(size=(3, 5, 2))
    weight = np.array([1.0, 0.0, 1.0, 0.5, 0.0])
    expected = np.mean(((predicted - (x_1 - x_0)) ** 2).mean(axis=1) * weight)
    loss = flow_matching_loss(tensor(predicted), tensor(x_0), tensor(x_1), tensor(weight))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_flow_matching_loss_is_right():
    x_0, x_1 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = tensor([1.0, 0.0, 2.0, 1.0])
    predicted = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: flow_matching_loss(p, x_0, x_1, weight), (predicted,))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_integration_of_an_affine_field_is_the_power_of_its_euler_step(steps):
    generator = np.random.default_rng(1)
    matrix, offset, drift, x_0 = (generator.normal(size=s) for s in ((3, 3), 3, 3, (5, 3)))
    reached = integrate(
        lambda x, t: x @ tensor(matrix).T + tensor(offset) + t * tensor(drift), tensor(x_0), Integration(steps)
    ).numpy()
    h = 1 / steps
    euler = np.eye(3) + h * matrix
    expected = x_0 @ np.linalg.matrix_power(euler, steps).T
    for k in range(steps):
        pushed = h * (offset + drift * k * h)
        expected = expected + np.linalg.matrix_power(euler, steps - 1 - k) @ pushed
    np.testing.assert_allclose(reached, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_integration_reads_the_field_at_the_beginning_of_every_step(steps):
    seen = []

    def velocity(x, t):
        seen.append(t[0].item())
        return 2 * t.expand_as(x)

    reached = integrate(velocity, torch.zeros(1, 2, dtype=torch.float64), Integration(steps))
    np.testing.assert_allclose(seen, np.arange(steps) / steps)
    np.testing.assert_allclose(reached, (steps - 1) / steps)


def gaussian(x, t, mean, std):
    """Density, velocity and score at time t of the flow from N(0, 1) to N(mean, std²), in one dimension."""
    variance = (1 - t) ** 2 + (t * std) ** 2
    offset = x - t * mean
    density = np.exp(-(offset**2) / (2 * variance)) / np.sqrt(variance)
    velocity = mean + (t * std**2 - (1 - t)) / variance * offset
    return density, velocity, -offset / variance


@given(t=TIMES, mean=st.floats(-2, 2), std=st.floats(0.05, 2))
def test_the_score_of_a_gaussian_follows_from_its_velocity(t, mean, std):
    x = np.linspace(-3, 3, 13)
    _, velocity, score = gaussian(x, t, mean, std)
    found = score_from_velocity(tensor(x)[:, None], tensor(velocity)[:, None], t)[:, 0]
    np.testing.assert_allclose(found, score, rtol=1e-8, atol=1e-8)


@given(t=TIMES, share=st.floats(0.01, 0.99), gap=st.floats(0.0, 2.0))
def test_the_score_of_a_mixture_follows_from_its_velocity(t, share, gap):
    x = np.linspace(-2, 2, 13)
    parts = [gaussian(x, t, -gap / 2, 0.3), gaussian(x, t, gap / 2, 0.5)]
    weights = np.array([share, 1 - share])[:, None] * [density for density, _, _ in parts]
    weights = weights / weights.sum(axis=0)
    velocity, score = (sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in (1, 2))
    found = score_from_velocity(tensor(x)[:, None], tensor(velocity)[:, None], t)[:, 0]
    np.testing.assert_allclose(found, score, rtol=1e-8, atol=1e-8)


def test_the_flow_to_a_gaussian_reaches_it_as_steps_grow():
    mean, std = 0.7, 0.4

    def velocity(x, t):
        return tensor(gaussian(x.numpy(), t.numpy(), mean, std)[1])

    x_0 = tensor(np.linspace(-2, 2, 9))[:, None]
    errors = [
        (integrate(velocity, x_0, Integration(steps)) - (mean + std * x_0)).abs().max().item()
        for steps in (50, 100, 200)
    ]
    assert errors[2] < 0.01
    # First order: half the step, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


# The midpoint scheme


class Curved:
    """A smooth field, nonlinear in x and t, in PyTorch and NumPy."""

    def __init__(self, seed, act=3):
        generator = np.random.default_rng(seed)
        self.inner, self.outer = generator.normal(size=(2, act, act)) / math.sqrt(act)
        self.offset, self.drift = generator.normal(size=(2, act))

    def __call__(self, x, t):
        return torch.tanh(x @ tensor(self.inner) + tensor(self.offset) + t * tensor(self.drift)) @ tensor(self.outer)

    def numpy(self, x, t):
        return np.tanh(x @ self.inner + self.offset + t * self.drift) @ self.outer

    def midpoint(self, x, steps, backwards=False):
        """Midpoint steps written from their definition."""
        h = 1 / steps
        for k in range(steps):
            t, signed = (1 - k * h, -h) if backwards else (k * h, h)
            x = x + signed * self.numpy(x + signed / 2 * self.numpy(x, t), t + signed / 2)
        return x


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), batch=st.integers(1, 4), act=st.integers(1, 4))
def test_the_midpoint_scheme_is_that_of_its_definition(seed, steps, batch, act):
    field, x_0 = Curved(seed, act), np.random.default_rng(seed + 1).normal(size=(batch, act))
    reached = integrate(field, tensor(x_0), Integration(2 * steps, "midpoint"))
    np.testing.assert_allclose(reached, field.midpoint(x_0, steps), rtol=1e-11, atol=1e-12)


def test_the_midpoint_scheme_is_of_second_order_and_eulers_of_first():
    field, x_0 = Curved(3), tensor(np.random.default_rng(4).normal(size=(20, 3)))
    exact = field.midpoint(x_0.numpy(), 5000)
    solvers: tuple[Solver, Solver] = ("euler", "midpoint")
    for solver, ratio in zip(solvers, (2, 4), strict=True):
        errors = [
            np.abs(integrate(field, x_0, Integration(steps, solver)).numpy() - exact).max() for steps in (32, 64, 128)
        ]
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.05)
        assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.05)
    # At the same number of evaluations it is the better one by far.
    euler, midpoint = (
        np.abs(integrate(field, x_0, Integration(10, solver)).numpy() - exact).max() for solver in solvers
    )
    assert midpoint < euler / 5


@pytest.mark.slow
@given(st.integers(1, 20), st.floats(-5, 5), st.floats(-5, 5))
def test_the_midpoint_scheme_is_exact_where_the_velocity_is_linear_in_time_alone(steps, constant, slope):
    reached = integrate(
        lambda x, t: constant + slope * t.expand_as(x), torch.ones(2, 3).double(), Integration(2 * steps, "midpoint")
    )
    np.testing.assert_allclose(reached, 1 + constant + slope / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("evaluations", [4, 12, 20])
def test_nfe_counts_the_evaluations_of_the_velocity(solver, evaluations):
    seen = []

    def velocity(x, t):
        assert t.shape == (1, 1)
        seen.append(t.item())
        return -x

    integrate(velocity, torch.ones(1, 2, dtype=torch.float64), Integration(evaluations, solver))
    assert len(seen) == evaluations
    if solver not in ("heun", "rk4"):  # which evaluate at the same time twice
        np.testing.assert_allclose(seen, np.arange(evaluations) / evaluations, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_steps_end_at_given_times_or_at_equal_distances(solver):
    field, x_0 = Curved(5), tensor(np.random.default_rng(6).normal(size=(2, 4, 3)))
    steps, together = 4, EVALUATIONS[solver]
    equal, given_equal, other = (
        integrate(field, x_0, Integration(steps * together, solver, time_grid=times))
        for times in (None, (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.5, 0.6, 1.0))
    )
    assert torch.equal(equal, given_equal)
    assert (equal - other).abs().max() > 1e-5


# Confinement to the box


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_denoised_action_is_the_mean_of_the_ends(t):
    mean, std, x = 0.4, 0.3, np.linspace(-2, 2, 9)

    def velocity(x, t):
        return tensor(gaussian(x.numpy(), t.numpy(), mean, std)[1])

    # Of jointly normal x_1 and x_t: the mean of x_1 given x_t.
    expected = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)
    np.testing.assert_allclose(denoise(velocity, tensor(x)[:, None], t, False)[:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(denoise(velocity, tensor(x)[:, None], t, True)[:, 0], expected.clip(-1, 1), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_confining_changes_nothing_where_the_denoised_actions_lie_in_the_box(solver, seed, steps):
    field, x_0 = Curved(seed), tensor(np.random.default_rng(seed + 1).normal(size=(5, 3)))

    def velocity(x, t):
        # Heun's scheme and rk4 evaluate it at t = 1 too, where it does not determine the denoised action.
        return (torch.tanh(3 * field(x, t)) - x) / (1 - t).clamp(min=0.01)

    evaluations = steps * EVALUATIONS[solver]
    free, confined = (integrate(velocity, x_0, Integration(evaluations, solver), confine) for confine in (False, True))
    torch.testing.assert_close(confined, free.clamp(-1, 1), rtol=1e-11, atol=1e-11)


# Log densities


def diagonal_gaussian(mean, std):
    """Exact velocity of the flow to a Gaussian with independent components, and its log density."""
    m, s = np.asarray(mean), np.asarray(std)

    def velocity(x, t):
        return tensor(m) + (t * tensor(s) ** 2 - (1 - t)) / ((1 - t) ** 2 + (t * tensor(s)) ** 2) * (x - t * tensor(m))

    def log_density(x):
        return (-0.5 * ((x - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)).sum(axis=-1)

    return velocity, log_density


def eye(act):
    return torch.eye(act, dtype=torch.float64)


def orthonormal(act, seed):
    return tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(act, act)))[0])


def test_the_log_density_of_a_resting_flow_is_that_of_the_noise():
    x = np.random.default_rng(0).normal(size=(4, 3))
    found = log_likelihood(lambda x, t: 0 * x, tensor(x), eye(3), 1)
    np.testing.assert_allclose(found, (-0.5 * x**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("std", "tolerance"), [((1.0, 1.0), 0.002), ((0.5, 0.7), 0.006), ((0.3, 0.2), 0.05)])
def test_the_log_density_of_a_gaussian_converges_to_its_closed_form(std, tolerance):
    velocity, log_density = diagonal_gaussian((0.3, -0.5), std)
    x = np.array([0.3, -0.5]) + np.array(std) * np.random.default_rng(1).uniform(-2, 2, size=(50, 2))
    errors = [
        np.abs(log_likelihood(velocity, tensor(x), eye(2), steps).numpy() - log_density(x)).max()
        for steps in (8, 64, 128, 256)
    ]
    assert errors[0] < tolerance
    assert errors[-1] < 1e-4
    # Second order: half the step, a quarter of the error, or less.
    assert errors[1] / errors[2] > 3.8
    assert errors[2] / errors[3] > 3.9


def test_the_density_of_a_random_network_flow_integrates_to_one():
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_density = log_likelihood(lambda x, t: network(torch.cat([x, t], -1)), grid[:, None], eye(1), 100)
    density = log_density.exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
    assert (density - torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)).abs().max() > 0.1  # no resting flow


@pytest.mark.slow
@given(seed=st.integers(0, 1000), steps=st.integers(1, 6), act=st.integers(1, 4))
def test_with_as_many_probes_as_components_the_divergence_is_the_exact_trace(seed, steps, act):
    field, x_1 = Curved(seed, act), np.random.default_rng(seed + 1).normal(size=(3, act))
    h, x, expansion = 1 / steps, x_1, np.zeros(3)
    for k in reversed(range(steps)):
        middle = x - h / 2 * field.numpy(x, (k + 1) * h)
        for i in range(act):
            ends = [field.numpy(middle + d * np.eye(act)[i], (k + 0.5) * h)[:, i] for d in (1e-5, -1e-5)]
            expansion += h * (ends[0] - ends[1]) / 2e-5
        x = x - h * field.numpy(middle, (k + 0.5) * h)
    np.testing.assert_allclose(x, field.midpoint(x_1, steps, backwards=True), rtol=1e-11, atol=1e-11)
    expected = -0.5 * (x**2 + np.log(2 * np.pi)).sum(axis=1) - expansion
    for probes in (eye(act), orthonormal(act, seed)):
        np.testing.assert_allclose(log_likelihood(field, tensor(x_1), probes, steps), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@given(seed=st.integers(0, 1000), count=st.sampled_from([1, 2, 3]))
def test_few_probes_are_right_on_average_over_an_orthonormal_basis(seed, count):
    field, x_1 = Curved(seed, 6), tensor(np.random.default_rng(seed).normal(size=(4, 6)))
    exact = log_likelihood(field, x_1, eye(6), 3)
    parts = [log_likelihood(field, x_1, probes, 3) for probes in orthonormal(6, seed).split(count)]
    torch.testing.assert_close(torch.stack(parts).mean(dim=0), exact, rtol=1e-10, atol=1e-10)
    assert (parts[0] - exact).abs().max() > 1e-6


def test_the_density_of_translated_actions_is_the_translated_density():
    field, shift = Curved(7), tensor([0.5, -1.0, 2.0])
    x_1 = tensor(np.random.default_rng(8).normal(size=(5, 3)))
    moved = log_likelihood(lambda x, t: field(x - t * shift, t) + shift, x_1 + shift, eye(3), 4)
    torch.testing.assert_close(moved, log_likelihood(field, x_1, eye(3), 4), rtol=1e-10, atol=1e-10)


def test_the_density_of_rotated_actions_is_that_of_the_others():
    field, turn = Curved(9), orthonormal(3, 10)
    x_1 = tensor(np.random.default_rng(8).normal(size=(5, 3)))
    turned = log_likelihood(lambda x, t: field(x @ turn, t) @ turn.T, x_1 @ turn.T, eye(3), 4)
    torch.testing.assert_close(turned, log_likelihood(field, x_1, eye(3), 4), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@given(order=st.permutations(range(6)))
def test_every_row_has_its_own_density_whatever_the_shape_of_the_batch(order):
    field, x_1 = Curved(11), tensor(np.random.default_rng(12).normal(size=(6, 3)))
    probes = orthonormal(3, 13)[:2]
    together = log_likelihood(field, x_1, probes, 3)
    torch.testing.assert_close(log_likelihood(field, x_1[list(order)], probes, 3), together[list(order)])
    torch.testing.assert_close(log_likelihood(field, x_1.view(2, 3, 3), probes, 3), together.view(2, 3))
    torch.testing.assert_close(log_likelihood(field, x_1[:1], probes, 3), together[:1])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_log_density_has_no_gradient_and_leaves_none_behind(enabled):
    scale, x_1 = torch.full((), 0.5, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        found = log_likelihood(lambda x, t: scale * torch.sin(x), x_1, torch.eye(3), 2)
    assert not found.requires_grad
    assert scale.grad is None
    assert x_1.grad is None
    assert torch.equal(x_1, torch.ones(2, 3))

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meam_training.flow.likelihood import log_likelihood


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


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
    x = np.array([0.3, -0.5]) + np.array(std) * np.random.default_rng(1).uniform(-2, 2, size=(20, 2))
    errors = [
        np.abs(log_likelihood(velocity, tensor(x), eye(2), steps).numpy() - log_density(x)).max()
        for steps in (8, 32, 64, 128)
    ]
    assert errors[0] < tolerance
    assert errors[-1] < 4e-4
    # Second order: half the step, a quarter of the error, or less.
    assert errors[1] / errors[2] > 3.7
    assert errors[2] / errors[3] > 3.8


def test_the_density_of_a_random_network_flow_integrates_to_one():
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_density = log_likelihood(
        lambda x, t: network(torch.cat([x, torch.full_like(x, t)], -1)), grid[:, None], eye(1), 100
    )
    density = log_density.exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
    assert (density - torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)).abs().max() > 0.1  # no resting flow


@pytest.mark.slow
@given(seed=st.integers(0, 1000), steps=st.integers(1, 6), act=st.integers(1, 4))
def test_with_as_many_probes_as_components_the_divergence_is_the_exact_trace(curved, seed, steps, act):
    field, x_1 = curved(seed, act), np.random.default_rng(seed + 1).normal(size=(3, act))
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
def test_few_probes_are_right_on_average_over_an_orthonormal_basis(curved, seed, count):
    field, x_1 = curved(seed, 6), tensor(np.random.default_rng(seed).normal(size=(4, 6)))
    exact = log_likelihood(field, x_1, eye(6), 3)
    parts = [log_likelihood(field, x_1, probes, 3) for probes in orthonormal(6, seed).split(count)]
    torch.testing.assert_close(torch.stack(parts).mean(dim=0), exact, rtol=1e-10, atol=1e-10)
    assert (parts[0] - exact).abs().max() > 1e-6


def test_the_density_of_translated_actions_is_the_translated_density(curved):
    field, shift = curved(7), tensor([0.5, -1.0, 2.0])
    x_1 = tensor(np.random.default_rng(8).normal(size=(5, 3)))
    moved = log_likelihood(lambda x, t: field(x - t * shift, t) + shift, x_1 + shift, eye(3), 4)
    torch.testing.assert_close(moved, log_likelihood(field, x_1, eye(3), 4), rtol=1e-10, atol=1e-10)


def test_the_density_of_rotated_actions_is_that_of_the_others(curved):
    field, turn = curved(9), orthonormal(3, 10)
    x_1 = tensor(np.random.default_rng(8).normal(size=(5, 3)))
    turned = log_likelihood(lambda x, t: field(x @ turn, t) @ turn.T, x_1 @ turn.T, eye(3), 4)
    torch.testing.assert_close(turned, log_likelihood(field, x_1, eye(3), 4), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@given(order=st.permutations(range(6)))
def test_every_row_has_its_own_density_whatever_the_shape_of_the_batch(curved, order):
    field, x_1 = curved(11), tensor(np.random.default_rng(12).normal(size=(6, 3)))
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

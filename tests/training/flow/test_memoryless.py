import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_training.flow.memoryless import (
    adjoint_matching_loss,
    lean_adjoint,
    memoryless_noise_scale,
    sample_memoryless_path,
)

STEPS = [1, 2, 5, 10]


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


@given(st.integers(1, 100), st.data())
def test_the_noise_scale_is_memoryless_and_finite(nfe, data):
    k = data.draw(st.integers(0, nfe - 1))
    t, h = k / nfe, 1 / nfe
    sigma = memoryless_noise_scale(k, nfe)
    assert sigma**2 == pytest.approx(2 * (1 - t + h) / (t + h))
    # One step later in both times: the schedule 2 (1 - t) / t plus what the shift adds to its numerator.
    assert sigma**2 == pytest.approx(2 * (1 - (t + h)) / (t + h) + 4 * h / (t + h))
    assert 0 < sigma < math.inf


@pytest.mark.parametrize("steps", STEPS)
def test_the_path_follows_the_euler_maruyama_scheme_and_ends_with_a_step_of_the_prior(affine, steps):
    policy, policy_np, _ = affine(0)
    prior, prior_np, _ = affine(1)
    generator = np.random.default_rng(2)
    x_0, noise = generator.normal(size=(4, 3)), generator.normal(size=(steps - 1, 4, 3))
    path = sample_memoryless_path(policy, prior, tensor(x_0), tensor(noise)).numpy()
    h, x = 1 / steps, x_0
    expected = [x]
    for k in range(steps - 1):
        t = k * h
        sigma = np.sqrt(2 * (1 - t + h) / (t + h))
        x = x + h * (2 * policy_np(x, t) - x / (t + h)) + np.sqrt(h) * sigma * noise[k]
        expected.append(x)
    expected.append(x + h * prior_np(x, 1 - h))
    assert path.shape == (steps + 1, 4, 3)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


def test_the_end_of_the_path_forgets_its_start():
    x_0 = tensor([[2.0], [-2.0]])
    noise = torch.zeros(199, 2, 1, dtype=torch.float64)

    def velocity(x, t):  # of the flow to N(0, 0.5²)
        return (0.25 * t - (1 - t)) / ((1 - t) ** 2 + 0.25 * t**2) * x

    end = sample_memoryless_path(velocity, velocity, x_0, noise)[-1]
    assert end.abs().max() < 0.02


def test_sampling_a_path_keeps_no_gradient():
    scale = torch.ones((), requires_grad=True)
    path = sample_memoryless_path(lambda x, t: scale * x, lambda x, t: scale * x, torch.ones(2, 3), torch.ones(4, 2, 3))
    assert not path.requires_grad


@pytest.mark.parametrize("steps", STEPS)
def test_the_adjoint_of_an_affine_prior_is_a_product_of_matrices(affine, steps):
    prior, _, matrix = affine(3)
    generator = np.random.default_rng(4)
    path, terminal = generator.normal(size=(steps + 1, 4, 3)), generator.normal(size=(4, 3))
    adjoints = lean_adjoint(prior, tensor(path), tensor(terminal)).numpy()
    h = 1 / steps
    assert adjoints.shape == (steps, 4, 3)
    for k in range(steps):
        product = np.eye(3)
        for j in range(k, steps):
            product = product @ (np.eye(3) + h * (2 * matrix - np.eye(3) / ((j + 1) * h)).T)
        np.testing.assert_allclose(adjoints[k], terminal @ product.T, rtol=1e-9, atol=1e-12)


def test_the_adjoint_of_a_curved_prior_uses_its_jacobian_along_the_path():
    generator = np.random.default_rng(5)
    path, terminal = generator.normal(size=(4, 2, 3)), generator.normal(size=(2, 3))
    adjoints = lean_adjoint(lambda x, t: torch.sin(x) * (1 + t), tensor(path), tensor(terminal)).numpy()
    expected = terminal
    for k in (2, 1, 0):
        t = (k + 1) / 3
        expected = expected + (2 * np.cos(path[k]) * (1 + t) - 1 / t) * expected / 3
        np.testing.assert_allclose(adjoints[k], expected, rtol=1e-10)


def test_the_adjoint_is_detached():
    weight = torch.ones((), requires_grad=True)
    terminal = torch.ones(2, 3, requires_grad=True)
    adjoints = lean_adjoint(lambda x, t: weight * x, torch.ones(4, 2, 3), terminal)
    assert not adjoints.requires_grad
    assert weight.grad is None


def test_the_adjoint_works_inside_no_grad():
    with torch.no_grad():
        adjoints = lean_adjoint(lambda x, t: 0 * x, torch.ones(2, 1, 1), torch.ones(1, 1))
    assert adjoints.item() == 0  # one step: a - a / (t + h) with t + h = 1


def test_the_loss_is_the_squared_mismatch_summed_over_the_path():
    generator = np.random.default_rng(6)
    policy, prior, adjoints = generator.normal(size=(3, 4, 5, 2))
    expected = 0.0
    for k in range(4):
        sigma = memoryless_noise_scale(k, 4)
        expected += ((2 / sigma * (policy[k] - prior[k]) + sigma * adjoints[k]) ** 2).sum() / 5
    assert adjoint_matching_loss(tensor(policy), tensor(prior), tensor(adjoints)).item() == pytest.approx(expected)


def test_the_loss_vanishes_where_the_policy_has_moved_against_the_adjoint():
    generator = np.random.default_rng(7)
    prior, adjoints = generator.normal(size=(2, 4, 5, 2))
    variances = np.array([memoryless_noise_scale(k, 4) ** 2 for k in range(4)])[:, None, None]
    policy = prior - variances / 2 * adjoints
    assert adjoint_matching_loss(tensor(policy), tensor(prior), tensor(adjoints)).item() == pytest.approx(0, abs=1e-25)
    assert adjoint_matching_loss(tensor(prior), tensor(prior), tensor(adjoints)).item() > 1


def test_the_gradient_of_the_loss_is_right():
    prior, adjoints = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = torch.zeros(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: adjoint_matching_loss(p, prior, adjoints), (policy,))

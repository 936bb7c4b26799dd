"""KL divergences of a policy's path from the prior's, against closed forms and densities."""

import math

import numpy as np
import pytest
import torch

from meam_training.flow.ancestral import (
    ancestral_cost,
    ancestral_kl_weights,
    ancestral_scales,
    denoised_difference,
    geometric_kl,
    sample_ancestral_path,
)
from meam_training.flow.memoryless import memoryless_cost, memoryless_kl, memoryless_noise_scale, sample_memoryless_path
from meam_training.flow.path import time_like


def normal(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def gaussian(mean, std):
    """Exact velocity of the flow to N(mean, std²)."""

    def velocity(x, t):
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)

    return velocity


def velocities(field, path):
    steps = len(path) - 1
    return torch.stack([field(path[k], time_like(path[k], k / steps)) for k in range(steps)])


def test_the_weights_of_ten_ancestral_steps_on_differences_of_the_velocity():
    expected = [0.0062, 0.0203, 0.0388, 0.0639, 0.1000, 0.1562, 0.2556, 0.4750, 1.3000]
    found = [(1 - k / 10) ** 2 * weight for k, weight in enumerate(ancestral_kl_weights(10))]
    np.testing.assert_allclose(found, expected, atol=6e-5)
    assert ancestral_kl_weights(2) == [0.5]


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_a_weight_is_half_the_squared_ratio_of_the_control_to_the_noise(steps):
    for k, weight in enumerate(ancestral_kl_weights(steps)):
        gain, scale = ancestral_scales(k, steps)
        assert weight == pytest.approx((gain / scale / (1 - k / steps)) ** 2 / 2)


TABLE = [  # s = m, K, reference: all steps and without the last, ancestral chain, geometric, exact at t = 1 - h
    (0.2, 10, 0.342, 0.231, 0.722, 0.382, 0.382),
    (0.2, 20, 0.394, 0.361, 0.835, 0.468, 0.468),
    (0.2, 50, 0.445, 0.440, 0.665, 0.495, 0.495),
    (0.5, 10, 0.441, 0.413, 0.934, 0.476, 0.476),
    (1.0, 10, 0.517, 0.510, 0.858, 0.494, 0.494),
]


@pytest.mark.parametrize(("m", "steps", "everything", "without_last", "chain", "geometric", "exact"), TABLE)
def test_the_estimates_for_a_shifted_gaussian(m, steps, everything, without_last, chain, geometric, exact):
    path = normal(0, steps + 1, 3, 1)  # the difference of the velocities is the same everywhere
    policy, prior = (velocities(gaussian(mean, m), path) for mean in (m, 0.0))
    by_step = memoryless_kl(policy, prior).mean(dim=1)
    assert by_step.sum().item() == pytest.approx(everything, abs=6e-4)
    assert by_step[:-1].sum().item() == pytest.approx(without_last, abs=6e-4)
    difference = denoised_difference(path, policy, prior, False)
    weights = torch.tensor(ancestral_kl_weights(steps), dtype=torch.float64)
    of_chain = (weights[:, None] * difference[:-1].square().sum(dim=-1)).sum(dim=0)
    assert of_chain.mean().item() == pytest.approx(chain, abs=6e-4)
    found = geometric_kl(difference)
    t = 1 - 1 / steps
    closed_form = (t * m) ** 2 / 2 / ((1 - t) ** 2 + (t * m) ** 2)
    torch.testing.assert_close(found, torch.full((3,), closed_form, dtype=torch.float64), rtol=1e-9, atol=0)
    assert closed_form == pytest.approx(exact, abs=6e-4)
    assert found[0].item() == pytest.approx(geometric, abs=6e-4)


def log_ratio(path, means, deviations):
    """Log density of the policy's stochastic steps less that of the prior's, for each path."""
    total = torch.zeros(path.shape[1], dtype=torch.float64)
    for k, deviation in enumerate(deviations):
        of_policy, of_prior = (((path[k + 1] - mean[k]) / deviation).square().sum(dim=-1) for mean in means)
        total += (of_prior - of_policy) / 2
    return total


@pytest.mark.parametrize("confine", [False, True])
def test_the_divergence_of_the_ancestral_chains_is_the_mean_log_ratio_of_their_densities(curved, confine):
    policy, prior, steps, rows = curved(1), curved(2), 6, 20_000
    path = sample_ancestral_path(policy, normal(3, rows, 3), normal(4, steps - 1, rows, 3), confine)
    of_policy, of_prior = velocities(policy, path), velocities(prior, path)
    means = []
    for velocity in (of_policy, of_prior):
        rows_of = []
        for k in range(steps - 1):
            t, u = k / steps, (k + 1) / steps
            action = path[k] + (1 - t) * velocity[k]
            action = action.clamp(-1, 1) if confine else action
            noise = (path[k] - t * action) / (1 - t)
            rows_of.append(u * action + (1 - u) * t * (1 - u) / (u * (1 - t)) * noise)
        means.append(rows_of)
    ratio = log_ratio(path, means, [ancestral_scales(k, steps)[1] for k in range(steps - 1)])
    difference = denoised_difference(path, of_policy, of_prior, confine)
    weights = torch.tensor(ancestral_kl_weights(steps), dtype=torch.float64)
    found = (weights[:, None] * difference[:-1].square().sum(dim=-1)).sum(dim=0).mean()
    assert found > 0.2
    assert found.item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / math.sqrt(rows))


def test_the_divergence_of_the_memoryless_chains_is_the_mean_log_ratio_of_their_densities(curved):
    policy, prior, steps, rows = curved(5), curved(6), 6, 20_000
    path = sample_memoryless_path(policy, prior, normal(7, rows, 3), normal(8, steps - 1, rows, 3))
    h = 1 / steps
    means = [
        [path[k] + h * (2 * v[k] - path[k] / (k * h + h)) for k in range(steps - 1)]
        for v in (velocities(policy, path), velocities(prior, path))
    ]
    deviations = [math.sqrt(h) * memoryless_noise_scale(k, steps) for k in range(steps - 1)]
    ratio = log_ratio(path, means, deviations)
    found = memoryless_kl(velocities(policy, path), velocities(prior, path))[:-1].sum(dim=0).mean()
    assert found > 0.2
    assert found.item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / math.sqrt(rows))


@pytest.mark.parametrize("steps", [2, 7])
def test_a_policy_that_is_the_prior_has_no_divergence(curved, steps):
    path, prior = normal(9, steps + 1, 4, 3), curved(10)
    velocity = velocities(prior, path)
    assert not memoryless_kl(velocity, velocity).any()
    assert not geometric_kl(denoised_difference(path, velocity, velocity, True)).any()


@pytest.mark.parametrize("steps", [2, 7])
def test_a_policy_that_follows_its_adjoints_has_their_cost(steps):
    path, prior, adjoints = normal(11, steps + 1, 4, 3), normal(12, steps, 4, 3), normal(13, steps, 4, 3)
    squared = torch.tensor([memoryless_noise_scale(k, steps) ** 2 for k in range(steps)], dtype=torch.float64)[
        :, None, None
    ]
    torch.testing.assert_close(memoryless_kl(prior - squared * adjoints / 2, prior), memoryless_cost(adjoints))
    # The ancestral loss vanishes where (c / s) dv = -s a.
    scales = [ancestral_scales(k, steps) for k in range(steps)]
    moved = torch.stack([v - s**2 / c * a for v, a, (c, s) in zip(prior, adjoints, scales, strict=True)])
    difference = denoised_difference(path, moved, prior, False)
    weights = torch.tensor(ancestral_kl_weights(steps), dtype=torch.float64)
    of_chain = weights[:, None] * difference[:-1].square().sum(dim=-1)
    torch.testing.assert_close(of_chain, ancestral_cost(adjoints)[:-1])
    assert not ancestral_cost(adjoints)[-1].any()


def test_clipped_denoised_actions_differ_only_inside_the_box():
    path = torch.zeros(3, 1, 2, dtype=torch.float64)
    policy = torch.tensor([[[5.0, 0.5]], [[5.0, 0.5]]]).double()
    prior = torch.tensor([[[3.0, -9.0]], [[3.0, -9.0]]]).double()
    found = denoised_difference(path, policy, prior, True)
    torch.testing.assert_close(found[:, 0], torch.tensor([[0.0, 1.5], [0.0, 1.25]]).double())

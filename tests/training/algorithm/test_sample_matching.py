import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from meam_training.algorithm.sample_matching import (
    denoised_among,
    gradient_cost,
    importance_weights,
    interpolant_kl,
    target_score_velocity,
    value_cost,
)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def tensors(arrays, dtype=torch.float64):
    first, second, third = (tensor(array).to(dtype) for array in arrays)
    return first, second, third


def log_normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)


def tilted(mean, std, peak, entropy_coef, inverse_temperature):
    """Mean and standard deviation of N(mean, std²)^(1 - lambda) exp(-tau (a - peak)²)."""
    precision = (1 - entropy_coef) / std**2 + 2 * inverse_temperature
    centre = ((1 - entropy_coef) * mean / std**2 + 2 * inverse_temperature * peak) / precision
    return centre, precision**-0.5


# Importance weights


@st.composite
def samples(draw, size=50.0):
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 4)))
    elements = st.floats(-size, size)
    return [draw(npst.arrays(np.float64, shape, elements=elements)) for _ in range(3)]


@given(samples(), st.floats(0.01, 0.99), st.floats(0, 0.99), st.floats(0, 5))
def test_the_weights_are_the_target_over_the_mixture_of_prior_and_policy(arrays, share, entropy_coef, tau):
    log_prior, log_policy, value = arrays
    prior, policy = (np.exp(a.astype(np.longdouble)) for a in (log_prior, log_policy))
    ratio = (
        prior ** (1 - entropy_coef) * np.exp(tau * value.astype(np.longdouble)) / (share * prior + (1 - share) * policy)
    )
    weights = importance_weights(*tensors(arrays), share, entropy_coef, tau)
    np.testing.assert_allclose(weights, (ratio / ratio.sum(axis=0)).astype(np.float64), rtol=1e-8, atol=1e-300)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(samples(size=1e30), st.floats(0.01, 0.99), st.floats(0, 0.99), st.sampled_from([0.0, 1.0, 1e6]))
def test_the_weights_of_an_observation_sum_to_one_and_none_exceeds_it(dtype, arrays, share, entropy_coef, tau):
    weights = importance_weights(*tensors(arrays, dtype), share, entropy_coef, tau)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    np.testing.assert_allclose(weights.sum(dim=0), 1, rtol=1e-5)


@given(samples(), st.floats(0.01, 0.99))
def test_where_nothing_is_to_change_all_weights_are_equal(arrays, share):
    log_prior, _, value = map(tensor, arrays)
    weights = importance_weights(log_prior, log_prior, value, share, 0.0, 0.0)
    np.testing.assert_allclose(weights, 1 / len(value), rtol=1e-12)


@given(samples(), st.floats(-100, 100))
def test_only_differences_between_samples_of_one_observation_count(arrays, constant):
    shifts = constant * torch.arange(arrays[0].shape[1], dtype=torch.float64)
    log_prior, log_policy, value = map(tensor, arrays)
    plain = importance_weights(log_prior, log_policy, value, 0.25, 0.3, 2.0)
    moved = importance_weights(log_prior + shifts, log_policy + shifts, value - shifts, 0.25, 0.3, 2.0)
    torch.testing.assert_close(moved, plain, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("entropy_coef", "tau"), [(0.0, 4.0), (0.5, 4.0), (0.5, 20.0)])
def test_at_the_target_the_weighted_samples_have_its_mean_but_for_a_bias_of_one_over_their_number(entropy_coef, tau):
    generator = np.random.default_rng(0)
    mean, std = tilted(0.0, 0.3, 0.5, entropy_coef, tau)
    biases = []
    for count in (4, 16):
        of_prior, rows = count // 4, 200_000
        x = np.concatenate(
            [
                0.3 * generator.normal(size=(of_prior, rows)),
                mean + std * generator.normal(size=(count - of_prior, rows)),
            ]
        )
        logs = tensor(log_normal(x, 0.0, 0.3)), tensor(log_normal(x, mean, std)), tensor(-((x - 0.5) ** 2))
        weights = importance_weights(*logs, of_prior / count, entropy_coef, tau).numpy()
        biases.append(((weights * x).sum(axis=0).mean() - mean) / mean)
        spread = np.sqrt((weights * (x - mean) ** 2).sum(axis=0).mean())
        assert spread == pytest.approx(std, rel=0.02)
    assert abs(biases[0]) < 0.04
    assert abs(biases[1]) < 0.012


def test_the_weights_know_the_mass_of_separated_modes():
    # 90 % at -0.5 and 10 % at 0.5: no sample lies between them, and no gradient leads across.
    generator = np.random.default_rng(1)
    right = generator.random(100_000) < 0.1
    x = np.where(right, 0.5, -0.5) + 0.05 * generator.normal(size=100_000)
    log_prior = np.logaddexp(np.log(0.9) + log_normal(x, -0.5, 0.05), np.log(0.1) + log_normal(x, 0.5, 0.05))
    columns = tensors([a[:, None] for a in (log_prior, log_prior, right.astype(float))])
    mass = importance_weights(*columns, 0.25, 0.5, 1.5).numpy()[right].sum()
    expected = math.sqrt(0.1) * math.exp(1.5) / (math.sqrt(0.1) * math.exp(1.5) + math.sqrt(0.9))
    assert mass == pytest.approx(expected, abs=0.01)


# The mean over candidates, given a point


def interpolants(seed, samples, draws=3, points=None, rows=4, act=3, latest=0.95):
    generator = np.random.default_rng(seed)
    x_1 = generator.uniform(-1, 1, size=(samples, rows, act))
    weight = generator.dirichlet(np.ones(samples), size=rows).T
    points = points or samples
    t = generator.uniform(0, latest, size=(draws, points, rows, 1))
    x_t = (1 - t) * generator.normal(size=(draws, points, rows, act)) + t * x_1[:points]
    return x_1, weight, x_t, t


def test_among_one_candidate_the_denoised_action_is_that_candidate():
    x_1, weight, x_t, t = interpolants(0, 1)
    found = denoised_among(tensor(x_1), tensor(weight), tensor(x_t), tensor(t))
    np.testing.assert_array_equal(found, np.broadcast_to(x_1, found.shape))


@pytest.mark.parametrize("samples", [2, 8])
def test_among_several_candidates_it_is_their_posterior_mean(samples):
    x_1, weight, x_t, t = interpolants(1, samples)
    found = denoised_among(tensor(x_1), tensor(weight), tensor(x_t), tensor(t)).numpy()
    for draw, point, row in np.ndindex(found.shape[:3]):
        time = t[draw, point, row]
        density = np.exp(-0.5 * (((x_t[draw, point, row] - time * x_1[:, row]) / (1 - time)) ** 2).sum(axis=-1))
        posterior = weight[:, row] * density
        posterior /= posterior.sum()
        np.testing.assert_allclose(found[draw, point, row], posterior @ x_1[:, row], rtol=1e-9, atol=1e-12)


def test_a_candidate_of_no_weight_does_not_count():
    x_1, weight, x_t, t = interpolants(2, 3)
    weight[1, :2] = 0
    without = np.delete(x_1, 1, axis=0), np.delete(weight, 1, axis=0)
    found = denoised_among(*(tensor(a) for a in (x_1, weight, x_t, t)))
    expected = denoised_among(*(tensor(a) for a in (*without, x_t, t)))
    torch.testing.assert_close(found[:, :, :2], expected[:, :, :2], rtol=1e-12, atol=1e-12)
    assert (found - expected)[:, :, 2:].abs().mean() > 0.01


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_the_mean_over_candidates_has_no_bias_and_less_noise_than_a_candidate(t):
    """For x_t from a candidate in proportion to the weights, and every function of x_t: E[(x_1 - mean) f(x_t)] = 0."""
    draws, generator = 200_000, np.random.default_rng(3)
    x_1, weight, _, _ = interpolants(3, 4, rows=1, act=2)
    source = generator.choice(4, size=draws, p=weight[:, 0])
    drawn = x_1[source, 0]
    x_t = (1 - t) * generator.normal(size=(draws, 2)) + t * drawn
    times = torch.full((draws, 1, 1, 1), t, dtype=torch.float64)
    found = denoised_among(tensor(x_1), tensor(weight), tensor(x_t)[:, None, None], times).numpy()[:, 0, 0]
    functions = np.stack([np.ones(draws), *x_t.T, x_t[:, 0] ** 2, np.sin(5 * x_t[:, 1])], axis=1)
    products = (drawn - found)[:, :, None] * functions[:, None, :]
    assert (np.abs(products.mean(axis=0)) < 4 * products.std(axis=0) / math.sqrt(draws)).all()
    assert (found.var(axis=0) < 0.9 * drawn.var(axis=0)).all()
    # At t = 0 the point says nothing.
    assert (np.ptp(found, axis=0) < 1e-12).all() == (t == 0)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.9, 0.999])
def test_the_mean_over_candidates_lies_between_them_in_float32_too(t):
    x_1, weight, x_t, _ = interpolants(4, 8, rows=64)
    times = np.full((*x_t.shape[:-1], 1), t)
    x_t = (1 - t) * np.random.default_rng(5).normal(size=x_t.shape) + t * x_1
    arrays = [tensor(a) for a in (x_1, weight, x_t, times)]
    exact, single = denoised_among(*arrays), denoised_among(*(a.float() for a in arrays))
    low, high = arrays[0].amin(dim=0), arrays[0].amax(dim=0)
    assert ((single >= low - 1e-6) & (single <= high + 1e-6)).all()
    # The logits are differences of numbers of about t^2 / (1 - t)^2.
    assert (single - exact).abs().max() < 1e-6 * (1 + (t / (1 - t)) ** 2)


# Target score matching


@given(t=st.floats(0.0, 1.0), mean=st.floats(-2, 2), std=st.floats(0.1, 3), x=st.floats(-3, 3))
def test_the_regression_on_a_gaussians_score_has_its_velocity_as_fixed_point(t, mean, std, x):
    # Everything is linear in two standard normals: the conditional mean is a covariance over a variance.
    x_0, x_1 = tensor([[0.0], [1.0], [0.0]]), mean + std * tensor([[0.0], [0.0], [1.0]])
    times, score = torch.full((3, 1), t, dtype=torch.float64), -(x_1 - mean) / std**2
    target = target_score_velocity(x_0, x_1, times, score)[:, 0].numpy()
    coefficients, of_x = target[1:] - target[0], np.array([1 - t, t * std])
    conditional = target[0] + coefficients @ of_x / (of_x @ of_x) * (x - t * mean)
    exact = mean + (t * std**2 - (1 - t)) / (of_x @ of_x) * (x - t * mean)
    assert conditional == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(t=st.floats(0.05, 0.95), x=st.floats(-1.5, 1.5), share=st.floats(0.05, 0.95))
def test_the_regression_on_a_mixtures_score_has_its_velocity_as_fixed_point(t, x, share):
    # By quadrature over the actions that x may have come from.
    x_1 = np.linspace(-4, 4, 4001)
    parts = np.array([share * np.exp(log_normal(x_1, -0.6, 0.2)), (1 - share) * np.exp(log_normal(x_1, 0.5, 0.4))])
    score = (parts * [-(x_1 + 0.6) / 0.2**2, -(x_1 - 0.5) / 0.4**2]).sum(axis=0) / parts.sum(axis=0)
    x_0 = (x - t * x_1) / (1 - t)
    posterior = parts.sum(axis=0) * np.exp(-0.5 * x_0**2)
    posterior /= posterior.sum()
    times = torch.full((len(x_1), 1), t, dtype=torch.float64)
    start, end, slope = tensors([a[:, None] for a in (x_0, x_1, score)])
    target = target_score_velocity(start, end, times, slope)[:, 0]
    assert posterior @ target.numpy() == pytest.approx(posterior @ (x_1 - x_0), rel=1e-6, abs=1e-6)


@given(t=st.floats(0, 1), mean=st.floats(-1, 1), policy_mean=st.floats(-1, 1), seed=st.integers(0, 100))
def test_a_policy_beside_the_target_is_pulled_towards_it(t, mean, policy_mean, seed):
    x_0, noise = np.random.default_rng(seed).normal(size=(2, 5, 1))
    x_1, times = policy_mean + 0.5 * noise, torch.full((5, 1), t, dtype=torch.float64)
    of_target, of_policy = (
        target_score_velocity(tensor(x_0), tensor(x_1), times, tensor(-(x_1 - centre) / 0.25))
        for centre in (mean, policy_mean)
    )
    np.testing.assert_allclose(of_target - of_policy, (1 - t) * (mean - policy_mean) / 0.25, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "expected"), [(4, 0.386), (8, 0.400), (32, 0.409)])
def test_few_samples_draw_the_fixed_point_towards_the_prior(samples, expected):
    # Two modes so far apart that a sample is in one or the other: all outcomes can be counted.
    prior, target, of_prior = 0.1, 0.411, samples // 4
    value = math.log(target / (1 - target) * (1 - prior) / prior)

    def chance(count, total, mass):
        return math.comb(total, count) * mass**count * (1 - mass) ** (total - count)

    def expected_mass(policy):
        mass = 0.0
        for k in range(samples + 1):
            rare = torch.arange(samples) < k
            logs = [torch.where(rare, math.log(p), math.log(1 - p)).double()[:, None] for p in (prior, policy)]
            weights = importance_weights(
                logs[0], logs[1], torch.where(rare, value, 0.0).double()[:, None], 0.25, 0.0, 1.0
            )
            ways = range(max(0, k - samples + of_prior), min(k, of_prior) + 1)
            odds = sum(chance(i, of_prior, prior) * chance(k - i, samples - of_prior, policy) for i in ways)
            mass += odds * weights[rare].sum().item()
        return mass

    policy = prior
    for _ in range(60):
        policy = expected_mass(policy)
    assert policy == pytest.approx(expected, abs=6e-4)


def test_the_cost_of_values_is_the_leading_order_of_their_tilts_divergence():
    generator = np.random.default_rng(0)
    value = generator.gamma(2.0, size=200_000)
    tau = 0.02
    # KL(p exp(tau Q) / Z || p) = tau E_tilted[Q] - log Z
    weight = np.exp(tau * value)
    divergence = tau * (weight * value).mean() / weight.mean() - np.log(weight.mean())
    found = value_cost(torch.tensor(value).view(2, -1)).mean().item()
    assert tau**2 * found == pytest.approx(divergence, rel=0.1)
    assert found == pytest.approx(value.var() / 2, rel=0.02)


def test_the_cost_of_a_gradient_is_the_divergence_of_the_regression_that_it_moves():
    gradient = torch.tensor([[3.0, -1.0], [0.0, 2.0]], dtype=torch.float64)
    t = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None, None].expand(2000, 2, 1)
    plain = torch.zeros(2000, 2, 2, dtype=torch.float64)
    with_score, without = (target_score_velocity(plain, plain, t, s.expand_as(plain)) for s in (gradient, 0 * gradient))
    divergence = interpolant_kl(with_score, without, t, 1.0).mean(dim=0)
    torch.testing.assert_close(divergence, gradient_cost(gradient), rtol=1e-5, atol=0)


@pytest.mark.parametrize("last", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("std", [0.2, 1.0])
def test_the_divergence_on_interpolants_of_a_shifted_gaussian_is_that_of_the_marginals(std, last):
    mean, n = 0.3, 200_000
    t = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    moved = mean * (1 - t) / ((1 - t) ** 2 + (t * std) ** 2)
    found = interpolant_kl(moved, torch.zeros_like(moved), t, last).mean().item()
    assert found == pytest.approx((last * mean) ** 2 / 2 / ((1 - last) ** 2 + (last * std) ** 2), rel=1e-3)

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_training.flow.ancestral import (
    ancestral_adjoint,
    ancestral_matching_loss,
    ancestral_scales,
    sample_ancestral_path,
)

STEPS = [1, 2, 5, 10]


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def step_coefficients(k, steps):
    """Of the ancestral step from k: shares of denoised action and noise in its mean, and its standard deviation."""
    t, u = k / steps, (k + 1) / steps
    rho = t * (1 - u) / (u * (1 - t))
    return u, (1 - u) * rho, (1 - u) * np.sqrt(1 - rho**2)


def gaussian_velocity(mean, std):
    """Exact velocity of the flow to N(mean, std²), and the standard deviation of its marginals."""

    def spread(t):
        return np.sqrt((1 - t) ** 2 + (t * std) ** 2)

    def velocity(x, t):
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)

    return velocity, spread


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_the_ancestral_path_redraws_the_part_of_the_noise_that_is_forgotten(affine, steps, confine):
    policy, policy_np, _ = affine(10)
    generator = np.random.default_rng(11)
    x_0, noise = generator.normal(size=(4, 3)), generator.normal(size=(steps - 1, 4, 3))
    path = sample_ancestral_path(policy, tensor(x_0), tensor(noise), confine).numpy()
    expected, x = [x_0], x_0
    for k in range(steps):
        t = k / steps
        of_action, of_noise, spread = step_coefficients(k, steps)
        action = x + (1 - t) * policy_np(x, t)
        action = action.clip(-1, 1) if confine else action
        x = of_action * action + of_noise * (x - t * action) / (1 - t) + (spread * noise[k] if k < steps - 1 else 0)
        expected.append(x)
    assert path.shape == (steps + 1, 4, 3)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)
    # The last step ends at the denoised action.
    action = path[-2] + policy_np(path[-2], 1 - 1 / steps) / steps
    np.testing.assert_allclose(path[-1], action.clip(-1, 1) if confine else action, rtol=1e-9, atol=1e-11)


@given(st.integers(1, 100), st.data())
def test_the_ancestral_transition_keeps_the_variance_of_the_noise(steps, data):
    k = data.draw(st.integers(0, steps - 1))
    t, u = k / steps, (k + 1) / steps
    _, of_noise, spread = step_coefficients(k, steps)
    gain, scale = ancestral_scales(k, steps)
    assert of_noise**2 + spread**2 == pytest.approx((1 - u) ** 2, abs=1e-15)
    assert scale == pytest.approx(spread, abs=1e-15)
    # A change dv moves the action by (1 - t) dv and the noise by -t dv.
    assert gain == pytest.approx(u * (1 - t) - of_noise * t)
    assert gain > 0
    assert scale > 0 or k == steps - 1
    assert (k == 0) == (of_noise == 0) or k == steps - 1  # the first step forgets the start altogether


def test_with_small_steps_the_ancestral_scheme_is_the_memoryless_sde():
    steps = 100_000
    for k in (10_000, 50_000, 90_000):
        t, (gain, scale) = k / steps, ancestral_scales(k, steps)
        # The SDE's drift is 2 v - x / t, its variance 2 (1 - t) / t a unit of time.
        assert gain == pytest.approx(2 / steps, rel=1e-3)
        assert scale**2 == pytest.approx(2 * (1 - t) / t / steps, rel=1e-3)


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_ancestral_sampling_has_the_flows_marginals_as_steps_grow(std):
    velocity, spread = gaussian_velocity(0.2, std)
    errors = []
    for steps in (50, 100, 200):
        # The path is affine in its start and its noise: unit rows give the variances exactly.
        units = torch.eye(steps + 1, dtype=torch.float64)
        path = sample_ancestral_path(velocity, units[0, :, None], units[1:-1, :, None], False)[..., 0]
        coefficients = path[:, :-1] - path[:, -1:]
        found = coefficients.square().sum(dim=1).sqrt().numpy()
        np.testing.assert_allclose(path[:, -1], 0.2 * np.linspace(0, 1, steps + 1), atol=1e-12)
        errors.append(np.abs(found - spread(np.linspace(0, 1, steps + 1))).max())
    assert errors[-1] < 0.015
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@given(
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1.0, 1e3, 1e30, 1e308]),
    start=st.floats(-10, 10),
)
def test_a_confined_ancestral_path_ends_in_the_box_whatever_the_velocity_is(steps, seed, size, start):
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(steps - 1, 2, 3))

    def velocity(x, t):
        return tensor(size * generator.uniform(-1, 1, size=x.shape))

    path = sample_ancestral_path(velocity, torch.full((2, 3), start, dtype=torch.float64), tensor(noise), True)
    assert path.isfinite().all()
    assert path[-1].abs().max() <= 1


def test_sampling_an_ancestral_path_keeps_no_gradient():
    scale = torch.ones((), requires_grad=True)
    path = sample_ancestral_path(lambda x, t: scale * x, torch.ones(2, 3), torch.ones(4, 2, 3), False)
    assert not path.requires_grad


@pytest.mark.slow
@given(steps=st.integers(1, 30), mean=st.floats(-2, 2), std=st.floats(0.05, 3), seed=st.integers(0, 100))
def test_the_ancestral_adjoint_of_a_gaussian_prior_is_exact_at_any_step_count(steps, mean, std, seed):
    velocity, spread = gaussian_velocity(mean, std)
    generator = np.random.default_rng(seed)
    path, terminal = generator.normal(size=(steps + 1, 3, 1)), generator.normal(size=(3, 1))
    adjoints, _ = ancestral_adjoint(velocity, tensor(path), tensor(terminal), False)
    assert adjoints.shape == (steps, 3, 1)
    # The solution of da/dt = -(2 v' - 1 / t) a: a_t = t (m_1 / m_t)² a_1.
    for k, found in enumerate(adjoints):
        u = (k + 1) / steps
        np.testing.assert_allclose(found, u * (spread(1) / spread(u)) ** 2 * terminal, rtol=1e-8)


def test_the_ancestral_adjoint_of_a_gaussian_prior_solves_the_continuous_equation():
    # What the test above takes for the solution, against small steps of the equation itself.
    mean, std, steps = 0.5, 0.4, 20_000
    _, spread = gaussian_velocity(mean, std)
    adjoint = 1.0
    for k in reversed(range(steps // 4, steps)):
        t = (k + 0.5) / steps
        slope = (t * std**2 - (1 - t)) / spread(t) ** 2
        adjoint *= np.exp((2 * slope - 1 / t) / steps)
    assert adjoint == pytest.approx(0.25 * (spread(1) / spread(0.25)) ** 2, rel=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_the_ancestral_adjoint_of_an_affine_prior_is_a_product_of_transposed_steps(affine, steps):
    prior, _, matrix = affine(12)
    generator = np.random.default_rng(13)
    path, terminal = generator.normal(size=(steps + 1, 4, 3)), generator.normal(size=(4, 3))
    adjoints, _ = ancestral_adjoint(prior, tensor(path), tensor(terminal), False)
    for k in range(steps):
        product = np.eye(3)
        for j in range(k + 1, steps):
            t = j / steps
            of_action, of_noise, _ = step_coefficients(j, steps)
            action = np.eye(3) + (1 - t) * matrix
            noise = (np.eye(3) - t * action) / (1 - t)
            product = product @ (of_action * action + of_noise * noise).T
        np.testing.assert_allclose(adjoints[k], terminal @ product.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("confine", [False, True])
def test_the_ancestral_adjoint_is_the_gradient_of_the_end_in_the_states_before(affine, confine):
    prior, _, _ = affine(14)
    generator = np.random.default_rng(15)
    x_0, noise = 0.3 * generator.normal(size=(4, 3)), 0.3 * generator.normal(size=(4, 4, 3))
    path = sample_ancestral_path(prior, tensor(x_0), tensor(noise), confine)
    terminal = tensor(generator.normal(size=(4, 3)))
    adjoints, _ = ancestral_adjoint(prior, path, terminal, confine)
    # A nudge of state k + 1 and the same noise afterwards.
    for k in range(4):
        for i in range(3):
            ends = []
            for sign in (1, -1):
                x = path[k + 1].clone()
                x[:, i] += sign * 1e-6
                for j in range(k + 1, 5):
                    t = j / 5
                    of_action, of_noise, spread = step_coefficients(j, 5)
                    action = x + (1 - t) * prior(x, torch.full((4, 1), t, dtype=torch.float64))
                    action = action.clamp(-1, 1) if confine else action
                    drawn = spread * noise[j] if j < 4 else 0
                    x = of_action * action + of_noise * (x - t * action) / (1 - t) + drawn
                ends.append((x * terminal).sum(dim=1))
            torch.testing.assert_close(adjoints[k, :, i], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_nothing_passes_through_a_clipped_action():
    prior = lambda x, t: 100 + 0 * x  # noqa: E731
    path = torch.zeros(4, 2, 1, dtype=torch.float64)
    terminal = torch.ones(2, 1, dtype=torch.float64)
    adjoints, _ = ancestral_adjoint(prior, path, terminal, True)
    assert adjoints[-1].eq(1).all()
    assert not adjoints[:-1].any()
    assert ancestral_adjoint(prior, path, terminal, False)[0][:-1].all()


def test_the_ancestral_adjoint_is_detached_and_works_inside_no_grad():
    weight, terminal = torch.ones((), requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        adjoints, _ = ancestral_adjoint(lambda x, t: weight * x, torch.ones(4, 2, 3), terminal, True)
    assert not adjoints.requires_grad
    assert weight.grad is None


def ancestral_residual_scales(steps):
    """c / s and s of every step; the last step's own ratio is infinite, and the one before is taken."""
    pairs = [ancestral_scales(k, steps) for k in range(steps)]
    ratios = [c / s for c, s in pairs[:-1]]
    return np.array([*ratios, ratios[-1] if ratios else 1.0]), np.array([s for _, s in pairs])


@pytest.mark.parametrize("steps", STEPS)
def test_the_ancestral_loss_is_the_squared_mismatch_summed_over_the_path(steps):
    generator = np.random.default_rng(16)
    policy, prior, adjoints = generator.normal(size=(3, steps, 5, 2))
    expected = 0.0
    for k, (ratio, scale) in enumerate(zip(*ancestral_residual_scales(steps), strict=True)):
        expected += ((ratio * (policy[k] - prior[k]) + scale * adjoints[k]) ** 2).sum() / 5
    found = ancestral_matching_loss(tensor(policy), tensor(prior), tensor(adjoints))
    assert found.item() == pytest.approx(expected)


@given(steps=st.integers(1, 20), seed=st.integers(0, 1000), where=st.integers(0, 1000))
def test_the_ancestral_loss_vanishes_only_where_the_policy_moves_against_the_adjoint(steps, seed, where):
    generator = np.random.default_rng(seed)
    prior, adjoints = generator.normal(size=(2, steps, 3, 2))
    gains, scales = np.array([ancestral_scales(k, steps) for k in range(steps)]).T
    policy = prior - (scales**2 / gains)[:, None, None] * adjoints
    np.testing.assert_array_equal(policy[-1], prior[-1])  # held to the prior, whatever the adjoint
    loss = ancestral_matching_loss(tensor(policy), tensor(prior), tensor(adjoints)).item()
    assert loss == pytest.approx(0, abs=1e-24)
    where %= policy.size
    policy.flat[where] += 0.1
    ratio = ancestral_residual_scales(steps)[0][where // 6]
    moved = ancestral_matching_loss(tensor(policy), tensor(prior), tensor(adjoints)).item()
    assert moved == pytest.approx((0.1 * ratio) ** 2 / 3)


def test_the_gradient_of_the_ancestral_loss_is_right():
    prior, adjoints = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = torch.zeros(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ancestral_matching_loss(p, prior, adjoints), (policy,))

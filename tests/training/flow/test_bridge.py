import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_training.flow.bridge import bridge_adjoint, tilted_velocity

MEAN = np.array([0.1, -0.2, 0.05])
COVARIANCE = np.array([[0.30, 0.12, -0.05], [0.12, 0.20, 0.04], [-0.05, 0.04, 0.10]])


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def marginal(t, covariance):
    return (1 - t) ** 2 * np.eye(len(covariance)) + t**2 * covariance


def gaussian_velocity(mean, covariance):
    """The exact velocity to N(mean, covariance), as (D - x) / (1 - t) with the regression D of x_1 on x_t."""

    def velocity(x, t):
        gains = np.stack([u * covariance @ np.linalg.inv(marginal(u, covariance)) for u in t.reshape(-1).numpy()])
        gains = tensor(gains).reshape(*t.shape[:-1], *covariance.shape)
        denoised = tensor(mean) + (gains @ (x - t * tensor(mean))[..., None])[..., 0]
        return (denoised - x) / (1 - t)

    return velocity


def draws(seed, rows=40, act=3, latest=0.95):
    generator = np.random.default_rng(seed)
    x_0, x_1 = generator.normal(size=(2, rows, act))
    return tensor(x_0), tensor(x_1), tensor(generator.uniform(0.05, latest, size=(rows, 1))), generator


@pytest.mark.parametrize("seed", range(3))
def test_without_reward_and_entropy_the_target_is_the_priors_velocity(curved, seed):
    prior = curved(seed)
    x_0, x_1, t, _ = draws(seed)
    x_t = (1 - t) * x_0 + t * x_1
    free = tilted_velocity(prior, x_0, x_1, t, torch.zeros_like(x_0), 0.0, confine=False)
    assert torch.equal(free, prior(x_t, t))
    confined = tilted_velocity(prior, x_0, x_1, t, torch.zeros_like(x_0), 0.0, confine=True)
    denoised = x_t + (1 - t) * prior(x_t, t)
    assert 0.1 < (denoised.abs() > 1).double().mean() < 0.9
    torch.testing.assert_close(x_t + (1 - t) * confined, denoised.clamp(-1, 1), rtol=1e-12, atol=1e-12)
    inside = denoised.abs() <= 1
    assert torch.equal(confined[inside], free[inside])


def test_a_gaussian_tilted_by_a_linear_value_has_a_target_without_noise():
    """Whatever x_0 and x_1, the target is the velocity to N(m + S g, S) at the x_t that they give."""
    x_0, x_1, t, generator = draws(0)
    gradient = generator.normal(size=3)
    target = tilted_velocity(
        gaussian_velocity(MEAN, COVARIANCE), x_0, x_1, t, tensor(gradient).expand_as(x_0), 0.0, confine=False
    )
    exact = gaussian_velocity(MEAN + COVARIANCE @ gradient, COVARIANCE)((1 - t) * x_0 + t * x_1, t)
    torch.testing.assert_close(target, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entropy_coef", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.7, 0.95])
def test_a_flattened_and_tilted_gaussian_has_a_target_whose_mean_given_the_point_is_its_velocity(t, entropy_coef):
    """All is affine in two standard normals, so that the conditional mean is a matrix of covariances."""
    gradient = np.array([0.4, -1.0, 0.3])
    covariance = COVARIANCE / (1 - entropy_coef)
    mean = MEAN + covariance @ gradient
    root = np.linalg.cholesky(covariance)
    # The first row has no noise; each further row has one component of x_0, then of x_1, at one standard deviation.
    x_0 = np.concatenate([np.zeros((1, 3)), np.eye(3), np.zeros((3, 3))])
    x_1 = mean + np.concatenate([np.zeros((4, 3)), root.T])
    times = torch.full((7, 1), t, dtype=torch.float64)
    prior = gaussian_velocity(MEAN, COVARIANCE)
    target = tilted_velocity(
        prior, tensor(x_0), tensor(x_1), times, tensor(gradient).expand(7, 3), entropy_coef, confine=False
    ).numpy()
    x_t = (1 - t) * x_0 + t * x_1
    of_target, of_x = target[1:] - target[0], x_t[1:] - x_t[0]
    slope = of_target.T @ of_x @ np.linalg.inv(of_x.T @ of_x)
    np.testing.assert_allclose(of_x.T @ of_x, marginal(t, covariance), rtol=1e-10, atol=1e-12)
    points = np.random.default_rng(1).normal(size=(7, 3))
    exact = gaussian_velocity(mean, covariance)(tensor(points), times)
    np.testing.assert_allclose(target[0] + (points - x_t[0]) @ slope.T, exact, rtol=1e-9, atol=1e-9)
    # Flow matching's target, x_1 - x_0, varies far more about that mean.
    noise = ((of_target - of_x @ slope.T) ** 2).sum()
    plain = (x_1 - x_0)[1:] - (x_1 - x_0)[0]
    of_plain = plain.T @ of_x @ np.linalg.inv(of_x.T @ of_x)
    assert 0 < noise < entropy_coef**2 * ((plain - of_x @ of_plain.T) ** 2).sum()


@pytest.mark.parametrize("entropy_coef", [0.1, 0.5])
def test_the_entropy_of_a_gaussian_without_a_score_is_the_one_with_its_score(entropy_coef):
    x_0, x_1, t, generator = draws(2)
    gradient = tensor(generator.normal(size=x_0.shape))
    prior = gaussian_velocity(MEAN, COVARIANCE)
    without = tilted_velocity(prior, x_0, x_1, t, gradient, entropy_coef, confine=False)
    score = -(x_1 - tensor(MEAN)) @ tensor(np.linalg.inv(COVARIANCE))
    by_score = tilted_velocity(prior, x_0, x_1, t, gradient - entropy_coef * score, 0.0, confine=False)
    torch.testing.assert_close(without, by_score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("confine", [False, True])
def test_a_covector_is_carried_back_by_the_jacobian_of_the_denoised_action(curved, confine):
    prior = curved(5)
    x_0, x_1, t, generator = draws(5)
    x = ((1 - t) * x_0 + t * x_1).requires_grad_()
    terminal = tensor(generator.normal(size=(2, *x.shape)))
    denoised = x + (1 - t) * prior(x, t)
    assert ((denoised.abs() > 1).any(dim=-1) & (denoised.abs() < 1).any(dim=-1)).any()
    if confine:
        denoised = denoised.clamp(-1, 1)
    expected = [torch.autograd.grad(denoised, x, part, retain_graph=True)[0] for part in terminal]
    found, velocity = bridge_adjoint(prior, x.detach(), t, terminal, confine)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(velocity, prior(x, t).detach(), rtol=0, atol=0)
    single, _ = bridge_adjoint(prior, x.detach(), t, terminal[0], confine)
    torch.testing.assert_close(single, expected[0], rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    assert not velocity.requires_grad


@given(
    seed=st.integers(0, 100),
    size=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    entropy_coef=st.floats(0, 0.95),
)
def test_a_confined_target_implies_a_denoised_action_in_the_box_however_steep_the_value(
    curved, seed, size, entropy_coef
):
    x_0, x_1, t, generator = draws(seed, latest=0.999)
    gradient = size * tensor(generator.normal(size=x_0.shape))
    target = tilted_velocity(curved(seed), x_0, x_1, t, gradient, entropy_coef, confine=True)
    denoised = (1 - t) * x_0 + t * x_1 + (1 - t) * target
    assert denoised.abs().max() <= 1 + 1e-13 * (1 + gradient.abs().max())  # rounding errors of the steepest step


@pytest.mark.parametrize("t", [1.0, 1 - 1e-7])
def test_a_confined_target_is_finite_up_to_the_end_of_flow_time(curved, t):
    x_0, x_1, times, generator = draws(4)
    gradient = 1e3 * tensor(generator.normal(size=x_0.shape))
    target = tilted_velocity(curved(4), x_0, x_1, torch.full_like(times, t), gradient, 0.3, confine=True)
    assert target.isfinite().all()
    assert target.abs().max() < 1e5

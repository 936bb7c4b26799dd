from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training.flow.ode import denoise, integrate

SOLVERS: tuple[Solver, ...] = get_args(Solver)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


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
        seen.append(t)
        return 2 * torch.full_like(x, t)

    reached = integrate(velocity, torch.zeros(1, 2, dtype=torch.float64), Integration(steps))
    np.testing.assert_allclose(seen, np.arange(steps) / steps)
    np.testing.assert_allclose(reached, (steps - 1) / steps)


def gaussian_velocity(x, t, mean, std):
    """Velocity at time t of the flow from N(0, 1) to N(mean, std²), in one dimension."""
    return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)


def test_the_flow_to_a_gaussian_reaches_it_as_steps_grow():
    mean, std = 0.7, 0.4

    def velocity(x, t):
        return tensor(gaussian_velocity(x.numpy(), t, mean, std))

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


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), batch=st.integers(1, 4), act=st.integers(1, 4))
def test_the_midpoint_scheme_is_that_of_its_definition(curved, seed, steps, batch, act):
    field, x_0 = curved(seed, act), np.random.default_rng(seed + 1).normal(size=(batch, act))
    reached = integrate(field, tensor(x_0), Integration(2 * steps, "midpoint"))
    np.testing.assert_allclose(reached, field.midpoint(x_0, steps), rtol=1e-11, atol=1e-12)


def test_the_midpoint_scheme_is_of_second_order_and_eulers_of_first(curved):
    field, x_0 = curved(3), tensor(np.random.default_rng(4).normal(size=(20, 3)))
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
        lambda x, t: constant + slope * torch.full_like(x, t),
        torch.ones(2, 3).double(),
        Integration(2 * steps, "midpoint"),
    )
    np.testing.assert_allclose(reached, 1 + constant + slope / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("evaluations", [4, 12, 20])
def test_nfe_counts_the_evaluations_of_the_velocity(solver, evaluations):
    seen = []

    def velocity(x, t):
        seen.append(t)
        return -x

    integrate(velocity, torch.ones(1, 2, dtype=torch.float64), Integration(evaluations, solver))
    assert len(seen) == evaluations
    if solver not in ("heun", "rk4"):  # which evaluate at the same time twice
        np.testing.assert_allclose(seen, np.arange(evaluations) / evaluations, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_steps_end_at_given_times_or_at_equal_distances(curved, solver):
    field, x_0 = curved(5), tensor(np.random.default_rng(6).normal(size=(2, 4, 3)))
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
        return tensor(gaussian_velocity(x.numpy(), t, mean, std))

    # Of jointly normal x_1 and x_t: the mean of x_1 given x_t.
    expected = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)
    np.testing.assert_allclose(denoise(velocity, tensor(x)[:, None], t, False)[:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(denoise(velocity, tensor(x)[:, None], t, True)[:, 0], expected.clip(-1, 1), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_confining_changes_nothing_where_the_denoised_actions_lie_in_the_box(curved, solver, seed, steps):
    field, x_0 = curved(seed), tensor(np.random.default_rng(seed + 1).normal(size=(5, 3)))

    def velocity(x, t):
        # Heun's scheme and rk4 evaluate it at t = 1 too, where it does not determine the denoised action.
        return (torch.tanh(3 * field(x, t)) - x) / max(1 - t, 0.01)

    evaluations = steps * EVALUATIONS[solver]
    free, confined = (integrate(velocity, x_0, Integration(evaluations, solver), confine) for confine in (False, True))
    torch.testing.assert_close(confined, free.clamp(-1, 1), rtol=1e-11, atol=1e-11)

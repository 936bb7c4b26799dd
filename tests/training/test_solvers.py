"""Solvers against their definitions in NumPy, closed forms, and what confinement promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy.spec import EVALUATIONS, Solver
from meam_training.solvers import denoised, solve, uniform_times

SOLVERS: tuple[Solver, ...] = get_args(Solver)
ORDERS: dict[Solver, int] = {"euler": 1, "ab2": 2, "midpoint": 2, "heun": 2, "rk4": 4}
RUNGE_KUTTA: dict[Solver, tuple[list[float], list[list[float]], list[float]]] = {  # nodes, matrix, weights
    "euler": ([0], [[0]], [1]),
    "midpoint": ([0, 1 / 2], [[0, 0], [1 / 2, 0]], [0, 1]),
    "heun": ([0, 1], [[0, 0], [1, 0]], [1 / 2, 1 / 2]),
    "rk4": (
        [0, 1 / 2, 1 / 2, 1],
        [[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    ),
}

Field = Callable[[np.ndarray, float], np.ndarray]
GRIDS = st.lists(st.floats(0.05, 1), min_size=1, max_size=6).map(
    lambda lengths: (0.0, *(np.cumsum(lengths) / np.sum(lengths)).tolist()[:-1], 1.0)
)


def by_definition(field: Field, x: np.ndarray, times: Sequence[float], solver: Solver, confine: bool) -> np.ndarray:
    """Butcher tableaus; Adams-Bashforth as the integral of the line through the last two velocities."""

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        if not confine or t == 1:
            return field(x, t)
        return (np.clip(x + (1 - t) * field(x, t), -1, 1) - x) / (1 - t)

    past: list[tuple[float, np.ndarray]] = []
    for t, u in itertools.pairwise(times):
        h = u - t
        if solver == "ab2":
            past.append((t, velocity(x, t)))
            (t_1, v_1), (t_2, v_2) = past[-2:] if len(past) > 1 else (past[0], past[0])
            slope = (v_2 - v_1) / (t_2 - t_1) if t_2 > t_1 else 0
            x = x + h * v_2 + slope * h**2 / 2
            continue
        nodes, matrix, weights = RUNGE_KUTTA[solver]
        k: list[np.ndarray] = []
        for c, row in zip(nodes, matrix, strict=True):
            k.append(velocity(x + h * sum((a * k_i for a, k_i in zip(row, k, strict=False)), np.zeros(())), t + c * h))
        x = x + h * sum((w * k_i for w, k_i in zip(weights, k, strict=True)), np.zeros(()))
    return np.clip(x, -1, 1) if confine else x


def random_field(seed: int, act: int) -> Field:
    generator = np.random.default_rng(seed)
    inner, outer = generator.normal(size=(2, act, act)) / math.sqrt(act)
    offset, drift = generator.normal(size=(2, act))
    return lambda x, t: np.tanh(x @ inner + offset + t * drift) @ outer


def on_tensors(field: Field) -> Callable[[torch.Tensor, float], torch.Tensor]:
    return lambda x, t: torch.from_numpy(np.asarray(field(x.numpy(), t)))


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), times=GRIDS, act=st.integers(1, 4))
def test_a_solver_is_that_of_its_definition_on_any_grid(
    solver: Solver, confine: bool, seed: int, times: tuple[float, ...], act: int
) -> None:
    field, x_0 = random_field(seed, act), np.random.default_rng(seed + 1).normal(size=(3, act))
    reached = solve(on_tensors(field), torch.from_numpy(x_0), times, solver, confine).numpy()
    np.testing.assert_allclose(reached, by_definition(field, x_0, times, solver, confine), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [1, 2], ids=["equal steps", "growing steps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_shrinks_with_the_order_of_the_solver(solver: Solver, power: int) -> None:
    # dx/dt = -2 t x^2 has the solution x_0 / (1 + x_0 t^2).
    x_0 = torch.linspace(0.2, 1, 5, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        times = [(k / steps) ** power for k in range(steps + 1)]
        errors.append((solve(lambda x, t: -2 * t * x * x, x_0, times, solver) - x_0 / (1 + x_0)).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDERS[solver], rel=0.15)


@pytest.mark.parametrize(("solver", "degree"), [("euler", 0), ("ab2", 0), ("midpoint", 1), ("heun", 1), ("rk4", 3)])
@given(times=GRIDS, factors=st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_a_velocity_that_is_a_polynomial_of_time_is_integrated_exactly(
    solver: Solver, degree: int, times: tuple[float, ...], factors: list[float]
) -> None:
    polynomial = np.polynomial.Polynomial(factors[: degree + 1])
    x_0 = torch.ones(2, dtype=torch.float64)
    reached = solve(lambda x, t: torch.full_like(x, polynomial(t)), x_0, times, solver)
    np.testing.assert_allclose(reached, 1 + polynomial.integ()(1), rtol=1e-11, atol=1e-11)


@given(times=GRIDS, slope=st.floats(-5, 5))
def test_of_a_velocity_linear_in_time_adams_bashforth_misses_only_what_its_first_step_does(
    times: tuple[float, ...], slope: float
) -> None:
    reached = solve(lambda x, t: torch.full_like(x, slope * t), torch.zeros(1, dtype=torch.float64), times, "ab2")
    np.testing.assert_allclose(reached, slope / 2 * (1 - times[1] ** 2), rtol=1e-10, atol=1e-10)


# Powers of two, so that the times of the midpoints are exact.
STEPS = (0.0, 0.25, 0.75, 1.0)
EVALUATED: dict[Solver, list[float]] = {
    "euler": [0, 0.25, 0.75],
    "ab2": [0, 0.25, 0.75],
    "midpoint": [0, 0.125, 0.25, 0.5, 0.75, 0.875],
    "heun": [0, 0.25, 0.25, 0.75, 0.75, 1],
    "rk4": [0, 0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1],
}


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_velocity_is_evaluated_so_often_and_at_these_times(solver: Solver, confine: bool) -> None:
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return -x

    solve(velocity, torch.ones(2), STEPS, solver, confine)
    assert seen == EVALUATED[solver]
    assert len(seen) == 3 * EVALUATIONS[solver]


@pytest.mark.parametrize("solver", SOLVERS)
@given(steps=st.integers(1, 200))
def test_uniform_times_take_the_asked_number_of_evaluations(solver: Solver, steps: int) -> None:
    times = uniform_times(steps * EVALUATIONS[solver], solver)
    assert (times[0], times[-1], len(times)) == (0, 1, steps + 1)
    np.testing.assert_allclose(np.diff(times), 1 / steps, rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(steps=st.integers(1, 1000), seed=st.integers(0, 10_000))
def test_an_euler_step_in_float32_adds_just_the_velocity_over_their_number(steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(5, generator=generator)
    velocities = torch.randn(min(steps, 20), 5, generator=generator)
    expected, taken = x_0, iter(velocities)
    for v in velocities:
        expected = expected + v / steps
    times = uniform_times(steps, "euler")[: len(velocities) + 1]
    assert torch.equal(solve(lambda x, t: next(taken), x_0, times, "euler"), expected)


# Confinement


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=100, deadline=None)
@given(times=GRIDS, start=st.floats(-50, 50), data=st.data())
def test_a_confined_flow_ends_in_the_box_whatever_the_velocity_is(
    solver: Solver, dtype: torch.dtype, times: tuple[float, ...], start: float, data: st.DataObject
) -> None:
    largest = torch.finfo(dtype).max / 16  # room for the sums of a step

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        spread = data.draw(st.sampled_from([1.0, 30.0, 1e6, largest]))
        return torch.tensor([data.draw(st.floats(-1, 1)) * spread for _ in range(2)], dtype=dtype)

    reached = solve(velocity, torch.tensor([start, -start / 2], dtype=dtype), times, solver, True)
    assert reached.abs().max() <= 1


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@settings(max_examples=100, deadline=None)
@given(times=GRIDS, start=st.floats(-50, 50), data=st.data())
def test_with_euler_and_midpoint_a_confined_flow_never_strays_far(
    solver: Solver, times: tuple[float, ...], start: float, data: st.DataObject
) -> None:
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(x.abs().max().item())
        spread = data.draw(st.sampled_from([1.0, 30.0, 1e6, 1e300]))
        return torch.tensor([data.draw(st.floats(-1, 1)) * spread for _ in range(2)], dtype=torch.float64)

    solve(velocity, torch.tensor([start, -start / 2], dtype=torch.float64), times, solver, True)
    assert max(seen) <= max(abs(start), 3) * (1 + 1e-9)


def test_confined_euler_ends_at_the_last_denoised_action() -> None:
    field, x_0 = random_field(0, 3), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[torch.Tensor, float]] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((x, t))
        return 3 * on_tensors(field)(x, t)

    reached = solve(velocity, x_0, uniform_times(5, "euler"), "euler", True)
    x, t = seen[-1]
    torch.testing.assert_close(reached, denoised(x, velocity(x, t), t, True), rtol=1e-13, atol=1e-13)
    assert (reached.abs() == 1).any()

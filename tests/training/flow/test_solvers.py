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

from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training.flow.solvers import PREFIX_SOLVERS, denoised, solve

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


def by_definition(
    field: Field,
    x: np.ndarray,
    times: Sequence[float],
    solver: Solver,
    confine: bool,
    known: np.ndarray | float = 0.0,
    weight: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Butcher tableaus; Adams-Bashforth as the integral of the line through the last two velocities."""

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        if t == 1 or not (confine or np.any(weight)):
            return field(x, t)
        x_1 = x + (1 - t) * field(x, t)
        x_1 = np.clip(x_1, -1, 1) if confine else x_1
        return (x_1 + weight * (known - x_1) - x) / (1 - t)

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


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_with_a_velocity_linear_in_time_adams_bashforth_errs_only_by_its_first_step(
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
def test_the_velocity_is_evaluated_at_the_times_of_the_scheme(solver: Solver, confine: bool) -> None:
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return -x

    solve(velocity, torch.ones(2), STEPS, solver, confine)
    assert seen == EVALUATED[solver]
    assert len(seen) == 3 * EVALUATIONS[solver]


@pytest.mark.parametrize("solver", SOLVERS)
@given(steps=st.integers(1, 200))
def test_uniform_times_take_the_requested_nfe(solver: Solver, steps: int) -> None:
    times = Integration(steps * EVALUATIONS[solver], solver).times
    assert (times[0], times[-1], len(times)) == (0, 1, steps + 1)
    np.testing.assert_allclose(np.diff(times), 1 / steps, rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(steps=st.integers(1, 1000), seed=st.integers(0, 10_000))
def test_an_euler_step_in_float32_adds_just_the_velocity_over_their_number(steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(5, generator=generator)
    velocities = torch.randn(min(steps, 20), 5, generator=generator)
    expected, taken = x_0, iter(velocities)
    for v in velocities:
        expected = expected + v / steps
    times = Integration(steps, "euler").times[: len(velocities) + 1]
    assert torch.equal(solve(lambda x, t: next(taken), x_0, times, "euler"), expected)


# Confinement


@pytest.mark.slow
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


@pytest.mark.slow
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

    reached = solve(velocity, x_0, Integration(5, "euler").times, "euler", True)
    x, t = seen[-1]
    torch.testing.assert_close(reached, denoised(x, velocity(x, t), t, True), rtol=1e-13, atol=1e-13)
    assert (reached.abs() == 1).any()


# Guided to a prefix


def guided(
    field: Field,
    x_0: np.ndarray,
    times: Sequence[float],
    solver: Solver,
    confine: bool,
    known: np.ndarray | float,
    weight: np.ndarray | float,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    start, share, target = (torch.as_tensor(array, dtype=dtype) for array in (x_0, weight, known))

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return on_tensors(field)(x, t).to(dtype)

    return solve(velocity, start, times, solver, confine, lambda x_1: (1 - share) * x_1 + share * target).numpy()


def test_a_prefix_is_for_solvers_that_evaluate_nothing_at_the_end() -> None:
    assert set(PREFIX_SOLVERS) == {solver for solver in SOLVERS if 1 not in EVALUATED[solver]}


@pytest.mark.slow
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), times=GRIDS, act=st.integers(1, 4))
def test_a_guided_flow_is_that_of_its_definition_on_any_grid_for_any_weights(
    solver: Solver, confine: bool, seed: int, times: tuple[float, ...], act: int
) -> None:
    field, generator = random_field(seed, act), np.random.default_rng(seed + 1)
    x_0, known = generator.normal(size=(3, act)), generator.uniform(-1, 1, (3, act))
    weight = np.clip(generator.uniform(-0.5, 1.5, (3, act)), 0, 1)
    reached = guided(field, x_0, times, solver, confine, known, weight)
    expected = by_definition(field, x_0, times, solver, confine, known, weight)
    np.testing.assert_allclose(reached, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@settings(max_examples=50, deadline=None)
@given(times=GRIDS, start=st.floats(-5, 5), number=st.floats(-1, 1), size=st.sampled_from([1.0, 100.0, 1e6]))
def test_a_prefix_of_weight_one_is_reproduced_whatever_the_velocity_is(
    solver: Solver,
    confine: bool,
    dtype: torch.dtype,
    times: tuple[float, ...],
    start: float,
    number: float,
    size: float,
) -> None:
    generator = np.random.default_rng(0)
    known, weight = np.array([number, -number, 0.5]), np.array([1.0, 1.0, 0.0])
    x_0 = np.array([start, -start / 2, 0.3])
    reached = guided(lambda x, _t: size * generator.normal(size=3), x_0, times, solver, confine, known, weight, dtype)
    # The path is straight, and no step of these grids is more than 40 times as long as the one before.
    np.testing.assert_allclose(reached[:2], known[:2], rtol=0, atol=1000 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), times=GRIDS)
def test_a_prefix_of_weight_zero_changes_nothing(
    solver: Solver, confine: bool, seed: int, times: tuple[float, ...]
) -> None:
    field, x_0 = random_field(seed, 3), np.random.default_rng(seed + 1).normal(size=(4, 3))
    plain = solve(on_tensors(field), torch.from_numpy(x_0), times, solver, confine).numpy()
    np.testing.assert_allclose(guided(field, x_0, times, solver, confine, 1e3, 0.0), plain, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@given(times=GRIDS, weight=st.floats(0, 1), known=st.floats(-1, 1), centre=st.floats(-1, 1))
def test_a_flow_to_one_point_ends_between_it_and_the_prefix_in_proportion_to_the_weight(
    solver: Solver, times: tuple[float, ...], weight: float, known: float, centre: float
) -> None:
    reached = guided(lambda x, t: (centre - x) / (1 - t), np.ones(2), times, solver, False, known, weight)
    np.testing.assert_allclose(reached, (1 - weight) * centre + weight * known, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@settings(deadline=None)
@given(seed=st.integers(0, 10_000), times=GRIDS, weight=st.floats(0, 1))
def test_a_little_more_weight_changes_the_result_a_little(
    solver: Solver, confine: bool, seed: int, times: tuple[float, ...], weight: float
) -> None:
    field, generator = random_field(seed, 3), np.random.default_rng(seed + 1)
    x_0, known = generator.normal(size=(4, 3)), generator.uniform(-1, 1, (4, 3))
    direction = -1 if weight > 0.5 else 1

    def change(by: float) -> float:
        ends = (guided(field, x_0, times, solver, confine, known, w) for w in (weight, weight + direction * by))
        return float(np.abs(next(ends) - next(ends)).max())

    # Lipschitz: the constant of a small change is no larger than that of a thousand times as much.
    assert change(1e-3) < 0.1
    assert change(1e-6) < 1e-4


@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
def test_every_evaluation_is_guided_once(solver: Solver) -> None:
    seen: list[torch.Tensor] = []

    def guide(x_1: torch.Tensor) -> torch.Tensor:
        seen.append(x_1)
        return x_1

    solve(lambda x, t: torch.full_like(x, 10.0), torch.zeros(2), STEPS, solver, True, guide)
    assert len(seen) == 3 * EVALUATIONS[solver]
    assert all((x_1 == 1).all() for x_1 in seen)  # clipped before


# Two ways to go

ACT = 8
WAY = 0.7 * (-1.0) ** np.arange(ACT)


def of_two_ways(x: np.ndarray, t: float) -> np.ndarray:
    """The exact velocity to N(m, s^2) and N(-m, s^2) with equal weights, s = 0.05."""
    s = 0.05
    variance = (1 - t) ** 2 + t**2 * s**2
    share = 1 / (1 + np.exp(np.clip(-2 * t * (x @ WAY) / variance, -500, 500)))[:, None]
    towards = [m + t * s**2 / variance * (x - t * m) for m in (WAY, -WAY)]
    return (share * towards[0] + (1 - share) * towards[1] - x) / (1 - t)


NOISE = np.random.default_rng(0).normal(size=(5000, ACT))


def share_of_the_way(solver: Solver, known: int, sign: int) -> float:
    """Share of the results that follow sign * WAY when its first `known` components are the prefix."""
    weight = (np.arange(ACT) < known).astype(float)
    reached = guided(of_two_ways, NOISE, Integration(10, solver).times, solver, False, sign * WAY, weight)
    np.testing.assert_allclose(reached[:, :known], np.tile(sign * WAY[:known], (len(NOISE), 1)), rtol=0, atol=1e-12)
    return float((sign * reached[:, known:] * WAY[known:] > 0).all(axis=1).mean())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
def test_after_a_prefix_of_more_than_half_the_chunk_every_result_follows_the_same_way(
    solver: Solver, sign: int
) -> None:
    assert share_of_the_way(solver, 0, sign) == pytest.approx(0.5, abs=0.03)
    for known in (5, 6, 7):
        assert share_of_the_way(solver, known, sign) == 1


@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
def test_the_longer_a_shorter_prefix_the_more_results_follow_its_way(solver: Solver) -> None:
    shares = [share_of_the_way(solver, known, 1) for known in range(6)]
    assert all(less + 0.03 < more for less, more in itertools.pairwise(shares))
    assert shares[4] < 0.95

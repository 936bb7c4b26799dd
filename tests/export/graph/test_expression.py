"""Sums on symbols: they are what NumPy and PyTorch compute, and take few operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meam_export.graph.expression import Emitter, Expression
from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training.flow.solvers import solve

SOLVERS: tuple[Solver, ...] = get_args(Solver)
ROWS, DIM = 3, 2


class EagerWriter:
    """Computes operators at once instead of writing them; what it calls a value is an array."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.counts = dtype, Counter[str]()
        self.added: list[Any] = []

    def product(self, inputs: Any, weight: Any, added: Any, alpha: float, beta: float) -> Any:
        self.added.append(added)
        rest = 0 if added is None else self.constant(beta) * added
        return self._note("Gemm", self.constant(alpha) * (inputs @ self.constant(weight).T) + rest)

    def op(self, name: str, *inputs: Any) -> Any:
        functions = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Clip": np.clip}
        return self._note(name, functions[name](*inputs))

    def constant(self, value: Any) -> Any:
        return np.asarray(value, dtype=self.dtype)

    def _note(self, name: str, value: np.ndarray) -> np.ndarray:
        assert value.dtype == self.dtype
        self.counts[name] += 1
        return value


def eager(dtype: str = "float64") -> tuple[EagerWriter, Emitter]:
    writer = EagerWriter(dtype)
    return writer, Emitter(writer)


def value(array: Any) -> Expression:
    return Expression.value(array)


STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 20), st.integers(0, 20), st.just(0.0)),
    st.tuples(st.just("subtract"), st.integers(0, 20), st.integers(0, 20), st.just(0.0)),
    st.tuples(st.just("scale"), st.integers(0, 20), st.just(0), st.sampled_from([-2.0, -1.0, 0.3, 0.5, 1.0, 3.0])),
    st.tuples(st.just("divide"), st.integers(0, 20), st.just(0), st.sampled_from([-0.5, 1.0, 3.0, 7.0])),
    st.tuples(st.just("clamp"), st.integers(0, 20), st.just(0), st.sampled_from([0.5, 1.0])),
    st.tuples(st.just("linear"), st.integers(0, 20), st.integers(0, 5), st.just(0.0)),
    st.tuples(st.just("emit"), st.integers(0, 20), st.just(0), st.just(0.0)),
)


def combine(name: str, a: Any, b: Any, number: float) -> Any:
    if name == "add":
        return a + b
    if name == "subtract":
        return a - b
    if name == "scale":
        return number * a
    if name == "divide":
        return a / number
    if name == "clamp":
        return (a.clamp if isinstance(a, Expression) else a.clip)(-number, number)
    return a


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(program=st.lists(STEPS, min_size=1, max_size=14), seed=st.integers(0, 1000), last=st.randoms())
def test_any_sum_of_sums_scales_clips_and_products_is_what_numpy_computes(
    program: list[tuple[str, int, int, float]], seed: int, last: Any
) -> None:
    generator = np.random.default_rng(seed)
    _, emit = eager()
    sums = [(value(x), x) for x in generator.normal(size=(2, ROWS, DIM))]
    for name, i, j, number in program:
        (a, x), (b, y) = sums[i % len(sums)], sums[j % len(sums)]
        if name in ("linear", "emit"):
            m, scale, constant = emit.up_to_scale(a)
            np.testing.assert_allclose(scale * np.asarray(m) + constant, x, rtol=1e-7, atol=1e-7)
        if name == "linear":
            weight, bias = generator.normal(size=(DIM, DIM)), generator.normal(size=DIM) * (j % 2)
            made = Expression.linear(emit.exactly(a), weight, bias), x @ weight.T + bias
        else:
            made = combine(name, a, b, number), combine(name, x, y, number)
        assume(made[0].resolved().terms)  # not something minus itself
        sums.append(made)
    last.shuffle(sums)
    for sum_, expected in sums:
        found: Any = emit.exactly(sum_)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


# The solvers on symbols


class Toy:
    """A velocity with one hidden layer, on symbols and on tensors."""

    def __init__(self, seed: int, bias: float = 0.3) -> None:
        generator = np.random.default_rng(seed)
        self.inner, self.weight = generator.normal(size=(2, DIM, DIM))
        self.drift, self.bias = generator.normal(size=DIM), bias * generator.normal(size=DIM)
        self.x_0 = generator.normal(size=(ROWS, DIM))

    def on_symbols(self, times: Sequence[float], solver: Solver, confine: bool, dtype: str) -> tuple[Any, EagerWriter]:
        writer, emit = eager(dtype)

        def velocity(x: Expression, t: float) -> Expression:
            m, scale, constant = emit.up_to_scale(x)
            hidden: Any = np.tanh(
                writer.constant(scale) * (m @ writer.constant(self.inner))
                + writer.constant(constant @ self.inner + t * self.drift if np.ndim(constant) else t * self.drift)
            )
            return Expression.linear(hidden, self.weight, self.bias)

        start = value(self.x_0.astype(dtype))
        if confine:  # as graph.py does
            start = value(emit.exactly(start + Expression({}, self.bias))) - Expression({}, self.bias)
        writer.counts.clear()
        return emit.exactly(solve(velocity, start, times, solver, confine)), writer

    def on_tensors(self, times: Sequence[float], solver: Solver, confine: bool, dtype: torch.dtype) -> np.ndarray:
        inner, weight, drift, bias, x_0 = (
            torch.from_numpy(array).to(dtype) for array in (self.inner, self.weight, self.drift, self.bias, self.x_0)
        )
        v = lambda x, t: torch.tanh(x @ inner + t * drift) @ weight.T + bias  # noqa: E731
        return solve(v, x_0, times, solver, confine).numpy()


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.floats(0.05, 1), min_size=1, max_size=8),
    bias=st.sampled_from([0.0, 0.3, 10.0]),
)
def test_a_solver_on_symbols_is_that_on_tensors(
    solver: Solver, confine: bool, seed: int, lengths: list[float], bias: float
) -> None:
    times = (0.0, *(np.cumsum(lengths) / np.sum(lengths)).tolist()[:-1], 1.0)
    toy = Toy(seed, bias)
    expected = toy.on_tensors(times, solver, confine, torch.float64)
    np.testing.assert_allclose(toy.on_symbols(times, solver, confine, "float64")[0], expected, rtol=1e-7, atol=1e-7)


HARD_GRIDS: dict[str, Callable[[int], Sequence[float]]] = {
    "equal": lambda n: [k / n for k in range(n + 1)],
    "first step of 1e-3": lambda n: [0.0, *np.linspace(1e-3, 1, n)] if n > 1 else [0.0, 1.0],
    "first step of 1e-6": lambda n: [0.0, *np.linspace(1e-6, 1, n)] if n > 1 else [0.0, 1.0],
    "last step of 1e-3": lambda n: [*np.linspace(0, 1 - 1e-3, n), 1.0] if n > 1 else [0.0, 1.0],
    "last step of 1e-6": lambda n: [*np.linspace(0, 1 - 1e-6, n), 1.0] if n > 1 else [0.0, 1.0],
    "alternating 1 and 30": lambda n: [0.0, *(np.cumsum([1, 30] * n)[:n] / np.cumsum([1, 30] * n)[n - 1])],
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 10, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("grid", HARD_GRIDS)
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_in_float32_symbols_round_little_more_than_tensors(
    solver: Solver, confine: bool, grid: str, steps: int
) -> None:
    times, ours, theirs = HARD_GRIDS[grid](steps), [], []
    for seed in range(3):
        toy = Toy(seed)
        exact = toy.on_tensors(times, solver, confine, torch.float64)
        found, _ = toy.on_symbols(times, solver, confine, "float32")
        ours.append(np.abs(found - exact).max())
        theirs.append(np.abs(toy.on_tensors(times, solver, confine, torch.float32) - exact).max())
    assert max(ours) < 2e-6 + 8 * max(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_emitted_up_to_scale_stays_in_the_range_of_float16(solver: Solver, confine: bool) -> None:
    # Heun's sum of two halves would double with every step, if nothing brought it back.
    for grid, steps in (("equal", 150), ("last step of 1e-6", 10)):
        toy = Toy(0)
        times, seen = HARD_GRIDS[grid](steps), []
        original = Emitter.up_to_scale

        def recorded(self: Emitter, sum_: Expression, original: Any = original, seen: list[float] = seen) -> Any:
            m, scale, constant = original(self, sum_)
            seen.append(float(np.abs(np.asarray(m)).max()))
            return m, scale, constant

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Emitter, "up_to_scale", recorded)
            toy.on_symbols(times, solver, confine, "float32")
        assert max(seen) < 10_000


# Few operators


def counts(solver: Solver, confine: bool, steps: int) -> dict[str, int]:
    times = Integration(steps * EVALUATIONS[solver], solver).times
    return dict(Toy(0).on_symbols(times, solver, confine, "float64")[1].counts)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 49, 100])
def test_free_euler_and_midpoint_steps_are_their_products_and_nothing_else(steps: int) -> None:
    # The one addition is that of all biases, at the end.
    assert counts("euler", False, steps) == {"Gemm": steps, "Add": 1}
    assert counts("midpoint", False, steps) == {"Gemm": 2 * steps, "Add": 1}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 49, 100])
def test_a_confined_euler_step_is_a_product_a_clip_and_an_addition_and_the_last_one_only_clips(steps: int) -> None:
    expected = {"Gemm": steps, "Clip": steps, "Add": steps - 1}
    assert counts("euler", True, steps) == {name: count for name, count in expected.items() if count}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_a_free_heun_step_is_two_products_and_an_addition(steps: int) -> None:
    # Every eighth step a multiplication: what is emitted doubles with every step.
    rescaled = {"Mul": 1} if steps > 7 else {}
    assert counts("heun", False, steps) == {"Gemm": 2 * steps, "Add": steps + 1, **rescaled}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "confine", "per_step"),
    [
        ("euler", False, 1),
        ("ab2", False, 4),
        ("midpoint", False, 2),
        ("heun", False, 4),
        ("rk4", False, 11),
        ("euler", True, 3),
        ("ab2", True, 8),
        ("midpoint", True, 9),
        ("heun", True, 9),
        ("rk4", True, 26),
    ],
)
def test_a_step_takes_as_many_operators_in_long_integrations_as_in_short_ones(
    solver: Solver, confine: bool, per_step: int
) -> None:
    for steps in (1, 3, 10, 30, 100):
        found = counts(solver, confine, steps)
        assert found["Gemm"] == steps * EVALUATIONS[solver]
        assert sum(found.values()) <= per_step * steps + 4


def test_a_product_takes_a_constant_as_its_bias_and_a_sum_as_its_third_input() -> None:
    x, hidden, weight, bias = np.ones((ROWS, DIM)), np.full((ROWS, DIM), 2.0), np.eye(DIM), np.array([1.0, -1.0])
    writer, emit = eager()
    found: Any = emit.exactly(Expression.linear(hidden, weight, bias))  # pyright: ignore[reportArgumentType]
    assert np.array_equal(found, hidden + bias)
    assert writer.counts == {"Gemm": 1}
    assert np.array_equal(writer.added[0], bias)
    writer, emit = eager()
    found = emit.exactly(value(x) + 0.5 * Expression.linear(hidden, weight, 0 * bias))  # pyright: ignore[reportArgumentType]
    assert np.array_equal(found, x + 0.5 * hidden)
    assert writer.counts == {"Gemm": 1}
    assert writer.added[0] is x


def test_without_a_bias_a_product_has_no_third_input() -> None:
    writer, emit = eager()
    emit.exactly(Expression.linear(np.ones((ROWS, DIM)), np.eye(DIM), np.zeros(DIM)))  # pyright: ignore[reportArgumentType]
    assert writer.added == [None]


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-15, 1 - 1e-15])
def test_clipping_again_is_no_operator(factor: float) -> None:
    x = np.linspace(-2, 2, ROWS * DIM).reshape(ROWS, DIM)
    writer, emit = eager()
    once = value(x).clamp(-1, 1)
    found: Any = emit.exactly((factor * once).clamp(-1, 1).clamp(-1, 1))
    assert np.array_equal(found, x.clip(-1, 1))
    assert writer.counts["Clip"] == 1


def test_other_bounds_other_scales_and_shifts_clip_again() -> None:
    x = np.linspace(-2, 2, ROWS * DIM).reshape(ROWS, DIM)
    inside = x.clip(-1, 1)
    cases: list[tuple[Callable[[Expression], Expression], np.ndarray]] = [
        (lambda clipped: clipped.clamp(-0.5, 0.5), inside.clip(-0.5, 0.5)),
        (lambda clipped: (2.0 * clipped).clamp(-1, 1), (2 * inside).clip(-1, 1)),
        (lambda clipped: (-1.0 * clipped).clamp(-1, 0.5), (-inside).clip(-1, 0.5)),
        (lambda clipped: (clipped + Expression({}, np.ones(DIM))).clamp(-1, 1), (inside + 1).clip(-1, 1)),
    ]
    for again, expected in cases:
        writer, emit = eager()
        found: Any = emit.exactly(again(value(x).clamp(-1, 1)))
        np.testing.assert_allclose(found, expected)
        assert writer.counts["Clip"] == 2


def test_a_part_of_an_emitted_sum_is_a_difference_unless_that_would_lose_its_digits() -> None:
    x, hidden = np.ones((ROWS, DIM)), np.full((ROWS, DIM), 0.1)
    for share, products in ((0.5, 1), (1e-4, 2)):
        writer, emit = eager("float32")
        product = Expression.linear(hidden.astype("f4"), np.eye(DIM), np.zeros(DIM))  # pyright: ignore[reportArgumentType]
        emit.up_to_scale(value(x.astype("f4")) + share * product)
        found: Any = emit.exactly(1.0 * product)
        assert np.abs(found - 0.1).max() < 1e-6
        assert writer.counts["Gemm"] == products


@pytest.mark.parametrize("tiny", [1e-13, -1e-14, 0.0])
def test_a_coefficient_that_is_a_rounding_error_is_none(tiny: float) -> None:
    writer, emit = eager()
    x, y = np.ones((2, ROWS, DIM))
    assert emit.exactly(value(x) + tiny * value(y)) is x
    assert not writer.counts

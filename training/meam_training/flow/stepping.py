"""Repeating a step with other numbers each time, in updates that may be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meam_training.flow.solvers import State, unrolled

__all__ = ["at", "repeat_step", "trace_steps"]


def repeat_step(
    step: Callable[..., State], state: State, numbers: Sequence[tuple[float, ...]], *, looped: bool
) -> State:
    """Apply a step once for every row of numbers, each time to the state that the last one left.

    Unrolled, every step is compiled on its own, with its numbers as constants: a third of a minute for ten evaluations
    of a velocity. On a CPU compiled code may loop over a step that is compiled once, which takes three seconds and
    costs 20 us a step. On CUDA it may not: a graph of kernels cannot hold a loop that the host decides on.

    Args:
        step: Maps the state, then one row of numbers, to the next state, of the same shapes and types. In a loop the
            numbers are tensors without axes.
        state: Initial state.
        numbers: Rows of numbers, all equally long.
        looped: Whether compiled code loops where it can; steps that carry gradients cannot.
    """
    if not (looped and _can_loop(state[0])):
        return unrolled(step, state, numbers)
    table = torch.tensor(numbers, dtype=state[0].dtype)

    def under_way(k: Tensor, *_: Tensor) -> Tensor:
        return k < len(numbers)

    def advance(k: Tensor, *now: Tensor) -> tuple[Tensor, ...]:
        return k + 1, *step(*now, *at(table, k).unbind())

    return torch.while_loop(under_way, advance, (torch.zeros((), dtype=torch.int64), *state))[1:]


def trace_steps(
    step: Callable[..., Tensor],
    x: Tensor,
    numbers: Sequence[tuple[float, ...]],
    inputs: Sequence[Tensor | Sequence[int]],
    *,
    looped: bool,
) -> Tensor:
    """Apply a step once for every row of numbers, as `repeat_step` does, and keep all states.

    Args:
        step: Maps the state, the step's row of every input, and its numbers, to the next state.
        x: Initial state.
        numbers: Rows of numbers, all equally long.
        inputs: Tensors with a row for every step, or whole numbers, one for every step.
        looped: As in `repeat_step`.

    Returns:
        The initial state and those after each step [steps + 1, ...].
    """
    if not (looped and numbers and _can_loop(x)):
        states = [x]
        for k, row in enumerate(numbers):
            states.append(step(states[-1], *(values[k] for values in inputs), *row))
        return torch.stack(states)
    table = torch.tensor(numbers, dtype=x.dtype)
    rows = [torch.as_tensor(values) for values in inputs]

    def under_way(k: Tensor, *_: Tensor) -> Tensor:
        return k < len(numbers)

    def advance(k: Tensor, now: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        then = step(now, *(at(values, k) for values in rows), *at(table, k).unbind())
        return k + 1, then, kept.index_copy(0, k[None] + 1, then[None])

    start = torch.zeros((), dtype=torch.int64), x, torch.stack([x] * (len(numbers) + 1))
    return torch.while_loop(under_way, advance, start)[2]


def at(values: Tensor, index: Any) -> Tensor:
    """Part of a tensor at an index of its first axis, which in a loop is a tensor without axes."""
    return values.index_select(0, index[None])[0] if isinstance(index, Tensor) else values[index]


def _can_loop(x: Tensor) -> bool:
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and x.device.type == "cpu" and not torch.is_grad_enabled()

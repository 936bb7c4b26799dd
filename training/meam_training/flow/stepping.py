"""Repeating a step with other numbers each time, in updates that may be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meam_training.flow.solvers import State, unrolled

__all__ = ["repeat_step"]


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
        return k + 1, *step(*now, *table.index_select(0, k[None])[0].unbind())

    return torch.while_loop(under_way, advance, (torch.zeros((), dtype=torch.int64), *state))[1:]


def _can_loop(x: Tensor) -> bool:
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and x.device.type == "cpu" and not torch.is_grad_enabled()

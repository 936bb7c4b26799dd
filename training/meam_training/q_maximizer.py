"""Q-maximised action chunks: the reward-guided part of the mixture behaviour prior."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["maximize_q", "pessimistic_value"]


def pessimistic_value(values: Float[Tensor, "critics batch"], pessimism: float) -> Float[Tensor, " batch"]:
    """Ensemble mean minus `pessimism` population standard deviations."""
    if pessimism == 0 or len(values) == 1:
        return values.mean(dim=0)
    return values.mean(dim=0) - pessimism * values.std(dim=0, correction=0)


def maximize_q(
    value: Callable[[Float[Tensor, "candidates batch act"]], Float[Tensor, "candidates batch"]],
    candidates: Float[Tensor, "candidates batch act"],
    steps: int,
    step_size: float,
) -> tuple[Float[Tensor, "batch act"], Float[Tensor, " batch"]]:
    """Climb a value by projected gradient ascent from several candidates and keep the best of all starts and ends.

    Steps have a fixed length, so the result lies within `steps * step_size` (root mean square per component) of a
    candidate, however steep the value is; every iterate lies in the box [-1, 1].

    Args:
        value: Value of actions, row by row; differentiable.
        candidates: Starting points, normalised action units; clipped into the box first.
        steps: Ascent steps.
        step_size: Length of a step, root mean square per component.

    Returns:
        The best action of every row, detached, and its value's gain over the first candidate, never negative.
    """
    starts = candidates.detach().clamp(-1, 1)
    with torch.no_grad():
        before = value(starts)
    x = starts
    length = step_size * math.sqrt(x.shape[-1])
    for _ in range(steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(value(x).sum(), x)
        norm = gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        x = (x.detach() + length * gradient / norm).clamp(-1, 1)
    with torch.no_grad():
        # A step of fixed length may overshoot: the starts compete too.
        points, values = torch.cat([starts, x]), torch.cat([before, value(x)])
    best, index = values.max(dim=0)
    return points.gather(0, index[None, :, None].expand(1, *x.shape[1:]))[0], best - before[0]

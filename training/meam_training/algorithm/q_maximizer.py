"""Q-maximised action chunks: the reward-guided part of the mixture behaviour prior."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.input_gradient import input_gradient

__all__ = ["maximize_q", "pessimistic_value"]


def pessimistic_value(values: Float[Tensor, "critics batch"], pessimism: float) -> Float[Tensor, " batch"]:
    """Ensemble mean minus `pessimism` population standard deviations."""
    if pessimism == 0 or len(values) == 1:
        return values.mean(dim=0)
    return values.mean(dim=0) - pessimism * values.std(dim=0, correction=0)


def maximize_q(
    value: Callable[[Float[Tensor, "starts batch act"]], Float[Tensor, "starts batch"]],
    starts: Float[Tensor, "starts batch act"],
    steps: int,
    step_size: float,
    trust_radius: float = math.inf,
) -> tuple[Float[Tensor, "batch act"], Float[Tensor, " batch"]]:
    """Maximise a value by projected gradient ascent from several starts, and keep the best of all starts and ends.

    The length of a step does not depend on the gradient's norm, and decreases linearly to zero, so that the ascent
    converges to a maximum rather than oscillating about it. Every iterate lies in the box [-1, 1] and within the trust
    radius of its start.

    Args:
        value: Value of actions, row by row; differentiable.
        starts: Starts of the ascent, normalised action units; clipped to the box first.
        steps: Ascent steps.
        step_size: Length of the first step, root mean square per component.
        trust_radius: Largest distance from the start, root mean square per component.

    Returns:
        The best action of each row, detached, and its gain in value over the first start, which is never negative.
    """
    starts = starts.detach().clamp(-1, 1)
    with torch.no_grad():
        before = value(starts)
    x = starts
    root = math.sqrt(x.shape[-1])
    for i in range(steps):
        gradient = input_gradient(value, x)
        norm = gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = x.detach() + step_size * (1 - i / steps) * root * gradient / norm - starts
        if math.isfinite(trust_radius):
            distance = moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            moved = moved * (trust_radius * root / distance).clamp_max(1.0)
        # Clipping moves no point away from its start, which lies in the box.
        x = (starts + moved).clamp(-1, 1)
    with torch.no_grad():
        # A step of fixed length may overshoot, so the starts compete too.
        points, values = torch.cat([starts, x]), torch.cat([before, value(x)])
    best, index = values.max(dim=0)
    return points.gather(0, index[None, :, None].expand(1, *x.shape[1:]))[0], best - before[0]

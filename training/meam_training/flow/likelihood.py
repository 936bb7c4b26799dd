"""Log densities of a flow's actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.stepping import repeat_step
from meam_training.flow.velocity import Velocity, linearize

__all__ = ["log_likelihood"]


def log_likelihood(
    velocity: Velocity, x_1: Float[Tensor, "*batch act"], probes: Float[Tensor, "probes act"], steps: int
) -> Float[Tensor, "*batch"]:
    """Log density of a flow's actions, by integrating the ODE and its divergence backwards in midpoint steps.

    log p(x_1) = log N(x_0; 0, I) - the integral of div v along the path. The divergence is estimated from its
    projection on the probes, and exact if there are as many probes as action components.

    Args:
        velocity: Velocity of the flow.
        x_1: Actions; held constant.
        probes: Orthonormal rows, at most as many as there are action components.
        steps: Midpoint steps, two velocity evaluations each.

    Returns:
        Log densities; nats, normalised action units. No gradient.

    References:
        Chen et al., Neural Ordinary Differential Equations, arXiv:1806.07366; Grathwohl et al., FFJORD,
        arXiv:1810.01367.
    """
    h, scale = 1 / steps, probes.shape[1] / len(probes)

    def step(x: Tensor, expansion: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        v, jacobian = linearize(velocity, x - h / 2 * velocity(x, t), t - h / 2)
        directions = probes[(slice(None), *[None] * (x.dim() - 1))]
        divergence = scale * (jacobian.product(probes) * directions).sum(dim=(0, -1))
        return x - h * v, expansion + h * divergence

    with torch.no_grad():
        start, times = (x_1.detach(), torch.zeros_like(x_1[..., 0])), [(k * h,) for k in range(steps, 0, -1)]
        x, expansion = repeat_step(step, start, times, looped=hasattr(velocity, "linearize"))
    return -0.5 * (x.square().sum(dim=-1) + x.shape[-1] * math.log(2 * math.pi)) - expansion

"""The linear path between noise and action: flow time t = 0 is noise, t = 1 is action, everywhere in this package."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["flow_matching_loss", "interpolate", "score_from_velocity", "time_like"]


def interpolate(
    x_0: Float[Tensor, "*batch act"], x_1: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch act"]:
    """Interpolant x_t = (1 - t) x_0 + t x_1 of noise x_0 and action x_1."""
    return (1 - t) * x_0 + t * x_1


def time_like(x: Float[Tensor, "*batch act"], t: float) -> Float[Tensor, "*batch 1"]:
    """Repeat a flow time for every row of x."""
    return torch.full_like(x[..., :1], t)


def flow_matching_loss(
    predicted: Float[Tensor, "batch act"],
    x_0: Float[Tensor, "batch act"],
    x_1: Float[Tensor, "batch act"],
    weight: Float[Tensor, "batch #act"],
) -> Float[Tensor, ""]:
    """Mean squared error against the conditional velocity x_1 - x_0.

    Args:
        predicted: Velocity at the interpolant of x_0 and x_1.
        x_0: Noise.
        x_1: Action.
        weight: Weight of each row or component; the mean divides by their number, not by the sum of the weights.

    References:
        Lipman et al., Flow Matching for Generative Modeling, arXiv:2210.02747.
    """
    return ((predicted - (x_1 - x_0)).square() * weight).mean()


def score_from_velocity(
    x: Float[Tensor, "*batch act"], velocity: Float[Tensor, "*batch act"], t: float
) -> Float[Tensor, "*batch act"]:
    """Score of the flow's marginal density at time t < 1, computed from its velocity there.

    With v = E[x_1 - x_0 | x_t] and x_t = (1 - t) x_0 + t x_1, the expected noise is E[x_0 | x_t] = x_t - t v, and the
    score is -E[x_0 | x_t] / (1 - t).

    Returns:
        (t v - x) / (1 - t); 1 / action unit.
    """
    return (t * velocity - x) / (1 - t)

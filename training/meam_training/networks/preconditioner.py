"""Preconditioning of a velocity field: the closed-form part that its network need not learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Preconditioner", "Preconditioning", "preconditioning"]

Number = TypeVar("Number", float, Tensor)


class Preconditioning(NamedTuple):
    """Coefficients at a flow time of v(x, t) = m + skip (x - t m) + gain F(scale (x - t m), t), with a network F."""

    skip: Any
    scale: Any
    gain: Any


def preconditioning(t: Number, std: Number) -> Preconditioning:
    """Coefficients with which F = 0 is the exact velocity of the actions N(m, std^2 I).

    With V = (1 - t)^2 + t^2 std^2, the variance of x_t, they are skip = (t std^2 - (1 - t)) / V, scale = 1 / sqrt(V)
    and gain = std / sqrt(V): the network's inputs and its regression targets have unit variance at all flow times.

    Args:
        t: Flow time.
        std: Standard deviation of the actions, normalised action units.

    References:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364 (for
        denoisers).
    """
    variance = (1 - t) ** 2 + (t * std) ** 2
    scale = variance**-0.5
    return Preconditioning((t * std**2 - (1 - t)) / variance, scale, std * scale)


class Preconditioner(nn.Module):
    """Mean and standard deviation of the actions; buffers, so that checkpoints hold them.

    Args:
        mean: Mean of each component of a chunk [act], normalised action units.
        std: Standard deviation of a component, normalised action units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def at(self, t: Tensor) -> Preconditioning:
        """Coefficients at flow times."""
        return preconditioning(t, self.std)

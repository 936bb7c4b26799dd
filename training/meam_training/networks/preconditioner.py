"""Preconditioning of a velocity field: the closed-form part that its network need not learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meam_training.flow.velocity import Time

__all__ = ["Preconditioner", "Preconditioning", "preconditioning"]


class Preconditioning(NamedTuple):
    """Coefficients at a flow time of v(x, t) = m + skip (x - t m) + gain F(scale (x - t m), t), with a network F."""

    skip: Any
    scale: Any
    gain: Any


def preconditioning(t: Time, std: Time) -> Preconditioning:
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
    _std: float

    def __init__(self, mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        _read_std(self)
        self.register_load_state_dict_post_hook(_read_std)

    def at(self, t: Time) -> Preconditioning:
        """Coefficients at flow times: numbers for one time of all rows, else of the times' shape."""
        return preconditioning(t, self._std)

    def centred(self, x: Tensor, t: Time) -> Tensor:
        """States less their mean at flow times, x - t m."""
        return torch.sub(x, self.mean, alpha=t) if not isinstance(t, Tensor) else x - t * self.mean

    def assemble(self, centred: Tensor, output: Tensor, c: Preconditioning) -> Tensor:
        """Velocity m + skip centred + gain output."""
        if not isinstance(c.skip, Tensor):
            return torch.add(torch.add(self.mean, centred, alpha=c.skip), output, alpha=c.gain)
        return self.mean + c.skip * centred + c.gain * output


def _read_std(preconditioner: Preconditioner, *_: object) -> None:
    """Keep the standard deviation as a number, with which coefficients at one time of all rows are numbers too.

    A function, as a copied module keeps the hooks of its original.
    """
    std = preconditioner.std
    preconditioner._std = math.nan if std.is_meta else float(std)  # without memory until it is loaded

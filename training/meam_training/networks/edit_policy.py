"""A policy over bounded edits of a flow's actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EditPolicy", "apply_edit", "xavier_linear"]

LOG_STD_RANGE = (-20.0, 2.0)
"""Bounds on the log standard deviations of the edit policy, before the tanh."""


class EditPolicy(nn.Module):
    """Tanh-Gaussian policy over edits of a flow's action, with a learned entropy temperature.

    A multi-layer perceptron on the encoded observation and the action, built like `VelocityField`, with one linear
    layer for the mean and one for the log standard deviation.

    Args:
        feature_dim: Dimension of an encoded observation.
        action_dim: Dimension of a flattened action chunk.
        hidden_dims: Widths of the hidden layers.

    References:
        Dong et al., EXPO, arXiv:2507.07986. Haarnoja et al., Soft Actor-Critic, arXiv:1812.05905.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        sizes = [feature_dim + action_dim, *hidden_dims]
        self.layers = nn.ModuleList(xavier_linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.mean = xavier_linear(sizes[-1], action_dim)
        self.log_std = xavier_linear(sizes[-1], action_dim)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    @property
    def alpha(self) -> Float[Tensor, ""]:
        """Entropy temperature, in units of value per nat; 1 initially."""
        return self.log_alpha.exp()

    def forward(
        self, features: Float[Tensor, "*batch features"], action: Float[Tensor, "*batch act"]
    ) -> tuple[Float[Tensor, "*batch act"], Float[Tensor, "*batch act"]]:
        """Mean and log standard deviation of the edit before the tanh, given flow actions in normalised units."""
        hidden = torch.cat([features, action], dim=-1)
        for layer in self.layers:
            hidden = F.gelu(layer(hidden), approximate="tanh")
        return self.mean(hidden), self.log_std(hidden).clamp(*LOG_STD_RANGE)

    def sample(
        self,
        features: Float[Tensor, "*batch features"],
        action: Float[Tensor, "*batch act"],
        noise: Float[Tensor, "*batch act"],
    ) -> tuple[Float[Tensor, "*batch act"], Float[Tensor, "*batch"]]:
        """Draw a reparameterised edit.

        Args:
            features: Encoded observations.
            action: Flow actions, normalised.
            noise: Standard normal draws.

        Returns:
            The edit tanh(u), u = mean + std noise, in [-1, 1]; and its log density in nats, which is finite even where
            the tanh rounds to ±1.
        """
        mean, log_std = self(features, action)
        u = mean + log_std.exp() * noise
        # log N(u; mean, std) - log |d tanh(u) / du|, with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))
        log_normal = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_normal - log_slope).sum(dim=-1)

    def mode(
        self, features: Float[Tensor, "*batch features"], action: Float[Tensor, "*batch act"]
    ) -> Float[Tensor, "*batch act"]:
        """Noiseless edit tanh(mean).

        The reference implementation always samples the edit, even in evaluation.
        """
        return self(features, action)[0].tanh()


def apply_edit(
    flow_actions: Float[Tensor, "*batch act"], edit: Float[Tensor, "*batch act"], edit_scale: float
) -> Float[Tensor, "*batch act"]:
    """Add an edit of at most `edit_scale` per component to flow actions, and clip the sum to the box [-1, 1]."""
    return (flow_actions + edit_scale * edit).clamp(-1, 1)


def xavier_linear(n_in: int, n_out: int) -> nn.Linear:
    """Make a linear layer with Xavier-uniform weights and zero biases."""
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

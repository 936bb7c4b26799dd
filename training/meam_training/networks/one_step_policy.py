"""A one-step policy, distilled from a flow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meam_training.networks.edit_policy import xavier_linear

__all__ = ["OneStepPolicy"]


class OneStepPolicy(nn.Module):
    """One-step policy mu(s, x_0): maps noise to an action chunk in one evaluation, like a `VelocityField` without time.

    Args:
        feature_dim: Dimension of an encoded observation.
        action_dim: Dimension of a flattened action chunk.
        hidden_dims: Widths of the hidden layers.

    References:
        Park et al., Flow Q-Learning, arXiv:2502.02538.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        sizes = [feature_dim + action_dim, *hidden_dims, action_dim]
        self.layers = nn.ModuleList(xavier_linear(n_in, n_out) for n_in, n_out in pairwise(sizes))

    def forward(
        self, features: Float[Tensor, "*batch features"], x_0: Float[Tensor, "*batch act"]
    ) -> Float[Tensor, "*batch act"]:
        """Normalised action chunks, not clipped: the caller clips them to [-1, 1] to act."""
        *hidden_layers, last = self.layers
        hidden = torch.cat([features, x_0], dim=-1)
        for layer in hidden_layers:
            hidden = F.gelu(layer(hidden), approximate="tanh")
        return last(hidden)

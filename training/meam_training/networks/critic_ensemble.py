"""The critic ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meam_training.config import Precision
from meam_training.networks.activation import cast, gelu
from meam_training.networks.data_statistics import DataStatistics

__all__ = ["CriticEnsemble"]


class CriticEnsemble(nn.Module):
    """Ensemble Q_1 … Q_M of independent value networks, evaluated together by batched matrix products.

    GELU, then LayerNorm, after every hidden layer, as in the reference implementation of QAM.

    Args:
        feature_dim: Dimension of an encoded observation.
        action_dim: Dimension of a flattened action chunk.
        hidden_dims: Widths of each member's hidden layers.
        num_critics: Number of members, M.
        precision: Element type of the matrix products between hidden layers.
        statistics: Put the networks' output in units of the data's returns, so that values start at their mean and
            an output of 1 is their standard deviation; None for the plain networks, in units of reward.

    Attributes:
        offset: Value at which the networks' output is 0.
        scale: Value that makes up an output of 1.
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int],
        num_critics: int,
        precision: Precision = "float32",
        statistics: DataStatistics | None = None,
    ) -> None:
        super().__init__()
        self.precision: Precision = precision
        units = (0.0, 1.0) if statistics is None else (statistics.value_offset, statistics.value_scale)
        for name, number in zip(("offset", "scale"), units, strict=True):
            self.register_buffer(name, torch.tensor(number, dtype=torch.float32), persistent=statistics is not None)
        sizes = list(pairwise([feature_dim + action_dim, *hidden_dims, 1]))
        self.weights = nn.ParameterList(xavier_uniform(num_critics, n_in, n_out) for n_in, n_out in sizes)
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, n_out) for _, n_out in sizes)
        self.norm_scales = nn.ParameterList(torch.ones(num_critics, 1, n) for n in hidden_dims)
        self.norm_biases = nn.ParameterList(torch.zeros(num_critics, 1, n) for n in hidden_dims)

    def forward(
        self, features: Float[Tensor, "batch features"], action: Float[Tensor, "batch act"]
    ) -> Float[Tensor, "critics batch"]:
        """Values of flattened, normalised action chunks, according to each critic; units of reward."""
        inputs = torch.cat([features, action], dim=-1)
        hidden = torch.bmm(inputs.expand(len(self.weights[0]), *inputs.shape), self.weights[0]) + self.biases[0]
        for i in range(1, len(self.weights)):  # torch 2.11 cannot trace slices of a ParameterList, nor zip over one
            weight, bias = self.weights[i], self.biases[i]
            scale, shift = self.norm_scales[i - 1], self.norm_biases[i - 1]
            hidden = F.layer_norm(gelu(hidden), hidden.shape[-1:], eps=1e-6) * scale + shift
            # The single output is computed in full precision: bf16 resolves a value only to within 0.4 %.
            precision = "float32" if weight is self.weights[-1] else self.precision
            product = torch.bmm(cast(hidden, precision), cast(weight, precision))
            hidden = product.to(bias.dtype) + bias
        return self.offset + self.scale * hidden.squeeze(-1)


def xavier_uniform(members: int, n_in: int, n_out: int) -> Tensor:
    bound = math.sqrt(6.0 / (n_in + n_out))
    return torch.empty(members, n_in, n_out).uniform_(-bound, bound)

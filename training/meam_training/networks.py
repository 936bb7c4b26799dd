"""The networks: observation encoder, velocity field, critic ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meam_training.flow import Velocity

__all__ = ["CriticEnsemble", "ObservationEncoder", "VelocityField"]


class ObservationEncoder(nn.Module):
    """Normalises raw observations and appends random Fourier features of them.

    Args:
        mean: Mean of every observation number.
        std: Scale of every observation number.
        fourier_features: Number of features, cosines and sines together; 0 for none.
        fourier_scale: Standard deviation of the frequencies.

    References:
        Tancik et al., Fourier Features Let Networks Learn High Frequency Functions, arXiv:2006.10739.
    """

    mean: Tensor
    std: Tensor
    frequencies: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], fourier_features: int = 0, fourier_scale: float = 1.0
    ) -> None:
        super().__init__()
        # Not persistent: the policy spec is the one place where statistics are kept.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.register_buffer("frequencies", fourier_scale * torch.randn(len(mean), fourier_features // 2))

    @property
    def output_dim(self) -> int:
        """Numbers in an encoded observation."""
        return self.mean.numel() + 2 * self.frequencies.shape[1]

    def decode(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch obs"]:
        """The raw observations of encoded ones."""
        return features[..., : self.mean.numel()] * self.std + self.mean

    def forward(self, observation: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch features"]:
        """Encode raw observations."""
        normalised = (observation - self.mean) / self.std
        if self.frequencies.shape[1] == 0:
            return normalised
        phase = normalised @ self.frequencies
        return torch.cat([normalised, torch.cos(phase), torch.sin(phase)], dim=-1)


class VelocityField(nn.Module):
    """v(s, x, t): a multi-layer perceptron on the encoded observation, the point of the flow and its time.

    tanh-approximated GELU, Xavier-uniform weights and zero biases, as in the reference implementation of QAM.

    Args:
        feature_dim: Numbers in an encoded observation.
        action_dim: Numbers in a flattened action chunk.
        hidden_dims: Hidden layers.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in pairwise([feature_dim + action_dim + 1, *hidden_dims, action_dim])
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, features: Float[Tensor, "*batch features"]) -> Velocity:
        """The field at fixed observations, v(x, t), whose share of the first layer is computed only once.

        x and t may have leading axes that the features lack.
        """
        first, *hidden_layers, last = self.layers
        assert isinstance(first, nn.Linear)
        of_features, of_x_t = first.weight[:, : features.shape[-1]], first.weight[:, features.shape[-1] :]
        projected = F.linear(features, of_features, first.bias)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            hidden = F.gelu(projected + F.linear(torch.cat([x, t], dim=-1), of_x_t), approximate="tanh")
            for layer in hidden_layers:
                hidden = F.gelu(layer(hidden), approximate="tanh")
            return last(hidden)

        return velocity

    def forward(
        self,
        features: Float[Tensor, "*batch features"],
        x: Float[Tensor, "*batch act"],
        t: Float[Tensor, "*batch 1"],
    ) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t in [0, 1]; normalised action units per unit of flow time."""
        return self.condition(features)(x, t)


class CriticEnsemble(nn.Module):
    """Q_1 … Q_M: independent value networks, evaluated together by batched matrix products.

    GELU, then LayerNorm, after every hidden layer, as in the reference implementation of QAM.

    Args:
        feature_dim: Numbers in an encoded observation.
        action_dim: Numbers in a flattened action chunk.
        hidden_dims: Hidden layers of every member.
        num_critics: Members.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int], num_critics: int) -> None:
        super().__init__()
        sizes = list(pairwise([feature_dim + action_dim, *hidden_dims, 1]))
        self.weights = nn.ParameterList(_xavier_uniform(num_critics, n_in, n_out) for n_in, n_out in sizes)
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, n_out) for _, n_out in sizes)
        self.norm_scales = nn.ParameterList(torch.ones(num_critics, 1, n) for n in hidden_dims)
        self.norm_biases = nn.ParameterList(torch.zeros(num_critics, 1, n) for n in hidden_dims)

    def forward(
        self, features: Float[Tensor, "batch features"], action: Float[Tensor, "batch act"]
    ) -> Float[Tensor, "critics batch"]:
        """Values of flattened, normalised action chunks."""
        inputs = torch.cat([features, action], dim=-1)
        hidden = inputs.expand(len(self.weights[0]), *inputs.shape)
        for weight, bias, scale, shift in zip(
            self.weights[:-1], self.biases[:-1], self.norm_scales, self.norm_biases, strict=True
        ):
            hidden = F.gelu(torch.baddbmm(bias, hidden, weight), approximate="tanh")
            hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * scale + shift
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1]).squeeze(-1)


def _xavier_uniform(members: int, n_in: int, n_out: int) -> Tensor:
    bound = math.sqrt(6.0 / (n_in + n_out))
    return torch.empty(members, n_in, n_out).uniform_(-bound, bound)

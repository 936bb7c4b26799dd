"""The networks: observation encoder, velocity field, critic ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meam_training.config import Precision

__all__ = ["ConditionedVelocity", "CriticEnsemble", "ObservationEncoder", "VelocityField"]


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
        precision: Type of the matrix products between hidden layers.
    """

    def __init__(
        self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int], precision: Precision = "float32"
    ) -> None:
        super().__init__()
        self.precision: Precision = precision
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in pairwise([feature_dim + action_dim + 1, *hidden_dims, action_dim])
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, features: Float[Tensor, "*batch features"]) -> ConditionedVelocity:
        """The field at fixed observations, v(x, t), whose share of the first layer is computed only once."""
        return ConditionedVelocity(self, features)

    def forward(
        self,
        features: Float[Tensor, "*batch features"],
        x: Float[Tensor, "*batch act"],
        t: Float[Tensor, "*batch 1"],
    ) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t in [0, 1]; normalised action units per unit of flow time."""
        return self.condition(features)(x, t)


class ConditionedVelocity:
    """v(x, t) of a velocity field at fixed observations; x and t may have leading axes that the features lack.

    Args:
        field: The velocity field.
        features: Encoded observations.
    """

    def __init__(self, field: VelocityField, features: Float[Tensor, "*batch features"]) -> None:
        first, *hidden, last = field.layers
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        self._of_x_t = first.weight[:, features.shape[-1] :]
        self._projected = F.linear(features, first.weight[:, : features.shape[-1]], first.bias)
        # Cast once, not at every evaluation.
        self._precision: Precision = field.precision
        self._hidden: list[tuple[Tensor, Tensor]] = []
        for layer in hidden:
            assert isinstance(layer, nn.Linear)
            self._hidden.append((_cast(layer.weight, field.precision), layer.bias))
        self._last = last

    def __call__(self, x: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t."""
        return self._last(gelu(self._inputs(x, t)[-1]))

    def linearize(
        self, x: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]
    ) -> tuple[Float[Tensor, "*batch act"], MlpJacobian]:
        """Velocity at x and time t, and its derivative in x there; nothing of it has a gradient."""
        with torch.no_grad():
            inputs = self._inputs(x, t)
            velocity = self._last(gelu(inputs[-1]))
            of_x = self._of_x_t[:, : x.shape[-1]]
            weights = [of_x, *(weight for weight, _ in self._hidden), self._last.weight]
            return velocity, MlpJacobian([gelu_slope(values) for values in inputs], weights)

    def _inputs(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """What enters the activation of every hidden layer."""
        inputs = [self._projected + F.linear(torch.cat([x, t], dim=-1), self._of_x_t)]
        for weight, bias in self._hidden:
            product = _cast(gelu(inputs[-1]), self._precision) @ weight.T
            inputs.append(product.to(bias.dtype) + bias)
        return inputs


class MlpJacobian:
    """Derivative of a multi-layer perceptron at many points at once.

    Args:
        slopes: Of the activations of every hidden layer [..., width].
        weights: Of every layer, [outputs, inputs].
    """

    def __init__(self, slopes: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self._slopes, self._weights = slopes, weights

    def transposed_product(self, index: int, covector: Float[Tensor, "batch out"]) -> Float[Tensor, "batch in"]:
        """J^T c at the points [index] of the first axis."""
        for slopes, weight in zip(self._slopes[::-1], self._weights[:0:-1], strict=True):
            covector = (covector.to(weight.dtype) @ weight).to(slopes.dtype) * slopes[index]
        return covector @ self._weights[0]

    def product(self, vectors: Float[Tensor, "vectors in"]) -> Float[Tensor, "vectors *batch out"]:
        """J u for every vector u at every point."""
        points = self._slopes[0].dim() - 1
        pushed = (vectors @ self._weights[0].T)[(slice(None), *[None] * points)]
        for slopes, weight in zip(self._slopes, self._weights[1:], strict=True):
            pushed = ((pushed * slopes).to(weight.dtype) @ weight.T).to(slopes.dtype)
        return pushed


class CriticEnsemble(nn.Module):
    """Q_1 … Q_M: independent value networks, evaluated together by batched matrix products.

    GELU, then LayerNorm, after every hidden layer, as in the reference implementation of QAM.

    Args:
        feature_dim: Numbers in an encoded observation.
        action_dim: Numbers in a flattened action chunk.
        hidden_dims: Hidden layers of every member.
        num_critics: Members.
        precision: Type of the matrix products between hidden layers.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int],
        num_critics: int,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.precision: Precision = precision
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
        hidden = torch.bmm(inputs.expand(len(self.weights[0]), *inputs.shape), self.weights[0]) + self.biases[0]
        for weight, bias, scale, shift in zip(
            self.weights[1:], self.biases[1:], self.norm_scales, self.norm_biases, strict=True
        ):
            hidden = F.layer_norm(gelu(hidden), hidden.shape[-1:], eps=1e-6) * scale + shift
            # Sums of a single output are taken in full precision: bf16 knows a value only to within 0.4 %.
            precision = "float32" if weight is self.weights[-1] else self.precision
            product = torch.bmm(_cast(hidden, precision), _cast(weight, precision))
            hidden = product.to(bias.dtype) + bias
        return hidden.squeeze(-1)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU.

    In compiled code it is written with a sigmoid, the same function, (1 + tanh z) / 2 = sigmoid(2 z): the compiler's
    vectorised tanh takes three times as long.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x * torch.sigmoid(2 * _gelu_argument(x))
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of `gelu`."""
    share = torch.sigmoid(2 * _gelu_argument(x))
    return share + x * share * (1 - share) * (2 * _GELU_SCALE) * (1 + 3 * _GELU_CUBIC * x * x)


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_argument(x: Tensor) -> Tensor:
    return _GELU_SCALE * x * (1 + _GELU_CUBIC * x * x)


def _cast(x: Tensor, precision: Precision) -> Tensor:
    return x.bfloat16() if precision == "bf16" else x


def _xavier_uniform(members: int, n_in: int, n_out: int) -> Tensor:
    bound = math.sqrt(6.0 / (n_in + n_out))
    return torch.empty(members, n_in, n_out).uniform_(-bound, bound)

"""The velocity field and its Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meam_training.config import Precision
from meam_training.flow.velocity import Jacobian, Time, of_rows
from meam_training.networks.activation import cast, gelu, gelu_slope
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.preconditioner import Preconditioner, Preconditioning

__all__ = ["ConditionedVelocity", "VelocityField"]


class VelocityField(nn.Module):
    """Velocity field v(s, x, t): a multi-layer perceptron on the encoded observation, the flow's state and its time.

    GELU in its tanh approximation, Xavier-uniform weights and zero biases, as in the reference implementation of QAM.
    LayerNorm after each GELU is optional, as in that of TRQAM.

    Args:
        feature_dim: Dimension of an encoded observation.
        action_dim: Dimension of a flattened action chunk.
        hidden_dims: Widths of the hidden layers.
        precision: Element type of the matrix products between hidden layers.
        layer_norm: Normalise every hidden layer after its activation.
        statistics: Precondition the network with the mean and the standard deviation of the data's actions; None for
            the plain network.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int],
        precision: Precision = "float32",
        layer_norm: bool = False,
        statistics: DataStatistics | None = None,
    ) -> None:
        super().__init__()
        self.preconditioner: Preconditioner | None = None
        if statistics is not None:
            mean = statistics.action_mean or (0.0,) * action_dim
            self.preconditioner = Preconditioner(mean, statistics.action_std)
        self.precision: Precision = precision
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in pairwise([feature_dim + action_dim + 1, *hidden_dims, action_dim])
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in hidden_dims if layer_norm)

    def condition(self, features: Float[Tensor, "*batch features"]) -> ConditionedVelocity:
        """Fix the observations, giving v(x, t); their contribution to the first layer is computed only once."""
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
    """Velocity field v(x, t) at fixed observations; x and t may have leading axes that the features lack.

    Args:
        field: The velocity field.
        features: Encoded observations.
    """

    def __init__(self, field: VelocityField, features: Float[Tensor, "*batch features"]) -> None:
        first, *hidden, last = field.layers
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        self._x_t_weight = first.weight[:, features.shape[-1] :]
        self._projected = F.linear(features, first.weight[:, : features.shape[-1]], first.bias)
        # Cast once, rather than at every evaluation.
        self._hidden: list[tuple[Tensor, Tensor]] = []
        for layer in hidden:
            assert isinstance(layer, nn.Linear)
            self._hidden.append((cast(layer.weight, field.precision), layer.bias))
        self._last, self._preconditioner = last, field.preconditioner
        self._norms: list[nn.LayerNorm] = []
        for norm in field.norms:
            assert isinstance(norm, nn.LayerNorm)
            self._norms.append(norm)

    def __call__(self, x: Float[Tensor, "*batch act"], t: Time) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t."""
        if self._preconditioner is None:
            return self._last(self._outputs(self._inputs(x, t)))
        centred, c = self._preconditioner.centred(x, t), self._preconditioner.at(t)
        output = self._last(self._outputs(self._inputs(c.scale * centred, t)))
        return self._preconditioner.assemble(centred, output, c)

    def linearize(self, x: Float[Tensor, "*batch act"], t: Time) -> tuple[Float[Tensor, "*batch act"], Jacobian]:
        """Evaluate the velocity and its Jacobian with respect to x; neither carries gradients."""
        with torch.no_grad():
            if self._preconditioner is None:
                return self._network_jacobian(x, t)
            centred, c = self._preconditioner.centred(x, t), self._preconditioner.at(t)
            output, jacobian = self._network_jacobian(c.scale * centred, t)
            return self._preconditioner.assemble(centred, output, c), PreconditionedJacobian(jacobian, c)

    def _network_jacobian(self, x: Tensor, t: Time) -> tuple[Tensor, MlpJacobian]:
        """Output of the network and its Jacobian with respect to its input x."""
        inputs = self._inputs(x, t)
        x_weight = self._x_t_weight[:, : x.shape[-1]]
        weights = [x_weight, *(weight for weight, _ in self._hidden), self._last.weight]
        norms = [LayerNormJacobian(norm, gelu(z)) for norm, z in zip(self._norms, inputs, strict=False)]
        jacobian = MlpJacobian([gelu_slope(values) for values in inputs], weights, norms)
        return self._last(self._outputs(inputs)), jacobian

    def _inputs(self, x: Tensor, t: Time) -> list[Tensor]:
        """Pre-activations of the hidden layers."""
        if of_rows(t):
            inputs = [self._projected + F.linear(torch.cat([x, t], dim=-1), self._x_t_weight)]
        else:
            x_weight, t_weight = self._x_t_weight[:, :-1], self._x_t_weight[:, -1]
            inputs = [self._projected + t * t_weight + F.linear(x, x_weight)]
        for weight, bias in self._hidden:
            outputs = self._outputs(inputs)
            if weight.dtype == outputs.dtype:
                inputs.append(F.linear(outputs, weight, bias))
            else:  # the products alone are computed in bf16
                inputs.append(F.linear(outputs.to(weight.dtype), weight).to(bias.dtype) + bias)
        return inputs

    def _outputs(self, inputs: list[Tensor]) -> Tensor:
        """Output of the last of the hidden layers whose pre-activations are given."""
        activated = gelu(inputs[-1])
        return self._norms[len(inputs) - 1](activated) if self._norms else activated


class LayerNormJacobian:
    """Jacobian diag(g) (I - 1 1^T / n - z z^T / n) / std of LayerNorm at many points, n components and z normalised.

    Args:
        norm: The LayerNorm, with scales g.
        x: Its inputs [..., n].
    """

    def __init__(self, norm: nn.LayerNorm, x: Float[Tensor, "*points width"]) -> None:
        centred = x - x.mean(dim=-1, keepdim=True)
        self._scale = norm.weight
        self._inverse_std = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
        self._normalised = centred * self._inverse_std

    def transposed_product(
        self, index: int | slice, covector: Float[Tensor, "*points width"]
    ) -> Float[Tensor, "*points width"]:
        """Product J^T c at the points [index] of the first axis."""
        return self._projected(covector * self._scale, self._normalised[index], self._inverse_std[index])

    def product(self, vectors: Float[Tensor, "*more width"]) -> Float[Tensor, "*more width"]:
        """Product J u for vectors at each point."""
        return self._projected(vectors, self._normalised, self._inverse_std) * self._scale

    @staticmethod
    def _projected(u: Tensor, normalised: Tensor, inverse_std: Tensor) -> Tensor:
        along = (u * normalised).mean(dim=-1, keepdim=True) * normalised
        return (u - u.mean(dim=-1, keepdim=True) - along) * inverse_std


class MlpJacobian:
    """Jacobian of a multi-layer perceptron at many points at once.

    Args:
        slopes: Derivatives of the activation of each hidden layer [..., width].
        weights: Weights of each layer [outputs, inputs].
        norms: Jacobians of the LayerNorm after each activation; none without LayerNorm.
    """

    def __init__(
        self, slopes: Sequence[Tensor], weights: Sequence[Tensor], norms: Sequence[LayerNormJacobian] = ()
    ) -> None:
        self._slopes, self._weights = slopes, weights
        self._norms = norms or [None] * len(slopes)

    def transposed_product(
        self, index: int | slice, covector: Float[Tensor, "*points out"]
    ) -> Float[Tensor, "*points in"]:
        """Product J^T c at the points [index] of the first axis, for one covector at each point or several."""
        for slopes, weight, norm in zip(self._slopes[::-1], self._weights[:0:-1], self._norms[::-1], strict=True):
            covector = (covector.to(weight.dtype) @ weight).to(slopes.dtype)
            if norm is not None:
                covector = norm.transposed_product(index, covector)
            covector = covector * slopes[index]
        return covector @ self._weights[0]

    def product(self, vectors: Float[Tensor, "vectors in"]) -> Float[Tensor, "vectors *batch out"]:
        """Product J u for each vector u at each point."""
        points = self._slopes[0].dim() - 1
        pushed = F.linear(vectors, self._weights[0])[(slice(None), *[None] * points)]
        for slopes, weight, norm in zip(self._slopes, self._weights[1:], self._norms, strict=True):
            pushed = pushed * slopes
            if norm is not None:
                pushed = norm.product(pushed)
            pushed = F.linear(pushed.to(weight.dtype), weight).to(slopes.dtype)
        return pushed


class PreconditionedJacobian:
    """Jacobian skip I + gain scale J of a preconditioned velocity, with the network's Jacobian J, at many points.

    Args:
        network: Jacobian of the network.
        preconditioning: Coefficients at the points [..., 1], or for all of them.
    """

    def __init__(self, network: MlpJacobian, preconditioning: Preconditioning) -> None:
        self._network, self._skip = network, preconditioning.skip
        self._factor = preconditioning.gain * preconditioning.scale

    def transposed_product(
        self, index: int | slice, covector: Float[Tensor, "*points act"]
    ) -> Float[Tensor, "*points act"]:
        """Product of the transpose with c at the points [index] of the first axis."""
        through = self._network.transposed_product(index, covector)
        if not of_rows(self._skip):
            return self._skip * covector + self._factor * through
        return self._skip[index] * covector + self._factor[index] * through

    def product(self, vectors: Float[Tensor, "vectors act"]) -> Float[Tensor, "vectors *batch act"]:
        """Product with each vector u at each point."""
        through = self._network.product(vectors)
        along = vectors[(slice(None), *[None] * (through.dim() - 2))]
        return self._skip * along + self._factor * through

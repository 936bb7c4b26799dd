"""The velocity field on symbolic sums: the graph holds one copy of the network per evaluation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meam_policy.extras import needs
from meam_training.networks.preconditioner import Preconditioning, preconditioning
from meam_training.networks.velocity_field import VelocityField

with needs("Export", "onnx-ir", "export"):
    import onnx_ir as ir

    from meam_export.graph.expression import Emitter, Expression
    from meam_export.graph.writer import GraphWriter

__all__ = ["UnrolledVelocity", "array_of", "linear_arrays", "velocity_arrays"]

Array = NDArray[np.float64]


class UnrolledVelocity:
    """The velocity v(x, t) on symbolic sums: every call writes the network once more, with the same weights.

    The observation's part of the first layer and the time enter through that layer's bias. One addition computes the
    biases of all calls; its constant is complete after the last call.

    Args:
        field: The velocity field.
        projected: The observation's part of the first layer [rows, width], without the bias.
        calls: Number of calls that will be made, the NFE.
        write: Writes operators.
        emit: Emits sums.
    """

    def __init__(
        self, field: VelocityField, projected: ir.Value, calls: int, write: GraphWriter, emit: Emitter
    ) -> None:
        self._write, self._emit = write, emit
        (weight, self._bias), *self._hidden, self._last = velocity_arrays(field)
        self._normalises = len(field.norms) > 0
        act, width = len(self._last[1]), len(self._bias)
        self._mean, self._std = np.zeros(act), None
        if field.preconditioner is not None:
            self._mean, self._std = array_of(field.preconditioner.mean), float(field.preconditioner.std)
        self._w_x, self._w_t = weight[:, -act - 1 : -1], weight[:, -1]
        self._constant = write.placeholder()
        sums = write.op("Add", write.op("Unsqueeze", projected, write.integers(1)), self._constant)
        flat = write.biases(write.op("Reshape", sums, write.integers(-1, calls * width)))
        biases = [flat] if calls == 1 else write.ops("Split", [flat], calls, axis=1, num_outputs=calls)
        self._biases = iter(biases)
        self._constants: list[Array] = []

    def __call__(self, x: Expression, t: float) -> Expression:
        """The velocity [rows, act] at x [rows, act] and flow time t in [0, 1]."""
        value, scale, constant = self._emit.up_to_scale(x)
        c = Preconditioning(0.0, 1.0, 1.0) if self._std is None else preconditioning(t, self._std)
        # The network's input, c.scale (x - t mean), with x = scale * value + constant
        scale, constant = c.scale * scale, c.scale * (constant - t * self._mean)
        # W_x x + w_t t + b
        shift = self._w_x @ np.broadcast_to(constant, self._w_x.shape[1])
        self._constants.append(self._bias + t * self._w_t + shift)
        self._constant.const_value = ir.tensor(np.stack(self._constants).astype(np.float32))
        hidden = self._normalised(self._write.hidden(value, self._w_x, next(self._biases), scale), len(self._w_x))
        for weight, bias in self._hidden:
            hidden = self._normalised(self._write.hidden(hidden, weight, bias), len(bias))
        output = Expression.linear(hidden, *self._last)
        if self._std is None:
            return output
        return c.gain * output + c.skip * x + Expression({}, self._mean - c.skip * t * self._mean)

    def _normalised(self, hidden: ir.Value, width: int) -> ir.Value:
        return self._write.normalised(hidden, width) if self._normalises else hidden


def velocity_arrays(field: VelocityField) -> list[tuple[Array, Array]]:
    """Weight and bias of each layer, in float64; those of a LayerNorm are folded into the layer after it."""
    layers = [linear_arrays(layer) for layer in field.layers]
    for index, norm in enumerate(field.norms, start=1):
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = layers[index]
        layers[index] = weight * array_of(norm.weight), bias + weight @ array_of(norm.bias)
    return layers


def linear_arrays(layer: nn.Module) -> tuple[Array, Array]:
    """Weight [outputs, inputs] and bias [outputs] of a linear layer, in float64."""
    assert isinstance(layer, nn.Linear)
    return array_of(layer.weight), array_of(layer.bias)


def array_of(tensor: torch.Tensor) -> Array:
    """A tensor as a NumPy array in float64."""
    return tensor.detach().double().cpu().numpy()

"""The policy as one ONNX graph, with the normalisers inside, the ODE unrolled, and the noise as an input.

The graph is written operator by operator rather than traced, so that a solver step costs little more than its matrix
products: the observation's part of the first layer is computed once, flow time is a constant in the first layer's bias,
and the solver's sums become the third inputs of the products (see `expression`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from meam_policy.extras import needs
from meam_policy.spec import PolicySpec, Precision
from meam_policy.spec.names import names_metadata
from meam_training.flow.solvers import solve
from meam_training.networks.action_normaliser import ActionNormaliser
from meam_training.networks.critic_ensemble import CriticEnsemble
from meam_training.networks.edit_policy import EditPolicy
from meam_training.networks.policy_module import PolicyModule

with needs("Export", "onnx", "export"):
    import onnx
    import onnx_ir as ir

    from meam_export.graph.expression import Emitter, Expression
    from meam_export.graph.writer import IR_VERSION, OPSET, GraphWriter, make_writer
from meam_export.graph.unrolled_velocity import UnrolledVelocity, array_of, linear_arrays, velocity_arrays

__all__ = ["build_graph", "graph_metadata"]


def build_graph(module: PolicyModule, spec: PolicySpec, precision: Precision = "fp32") -> bytes:
    """Write the policy as one self-contained ONNX file with a dynamic batch.

    Inputs: `observation` [batch, observation_dim], raw but less `spec.observation_offset`, which whoever runs the graph
    takes off in float64; and `noise` [batch, chunk_dim], standard normal; both float32.
    Output: `actions` [batch, chunk_size, action_dim], environment units, within the bounds. With best_of > 1 the noise
    is [batch, samples, chunk_dim] with any number of samples, and the chunk with the highest mean value is returned;
    further outputs are that mean, `value` [batch], and the critics' standard deviation of it, `disagreement` [batch].
    With takes_prefix there are two more inputs: `prefix` [batch, chunk_size, action_dim], the chunk to continue, in
    environment units, and `prefix_weight` [batch, chunk_size], from 0 (free) to 1 (prescribed).

    Args:
        module: The policy in PyTorch.
        spec: Dimensions, bounds and integration.
        precision: Precision of the velocity field, the edit policy and the one-step policy; all else is float32.

    Returns:
        Contents of an ONNX file, checked by `onnx.checker` with full shape inference.
    """
    graph = _PolicyGraph(module, spec, make_writer(precision))
    model = graph.model(graph_metadata(spec))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def graph_metadata(spec: PolicySpec) -> dict[str, str]:
    """The policy's contract, for the `metadata_props` of its graph; lists are separated by commas."""
    found: dict[str, Any] = {
        "spec_sha256": spec.identity,
        "method": spec.method,
        "environment_id": spec.environment_id,
        "license": spec.license,
        "chunk_size": spec.chunk_size,
        "execute_steps": spec.execute_steps,
        "nfe": spec.integration.nfe,
        "solver": spec.integration.solver,
        "control_rate_hz": spec.control_rate_hz,
        "action_scale": ",".join(f"{value:.9g}" for value in spec.action_scale),
        "action_offset": ",".join(f"{value:.9g}" for value in spec.action_offset),
        **names_metadata(spec.observation, spec.observation_names, spec.action_names, spec.observation_offset),
        "joint_names": ",".join(spec.action_names or ()),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


class _PolicyGraph:
    """The graph of one policy, under construction."""

    def __init__(self, module: PolicyModule, spec: PolicySpec, writer: GraphWriter) -> None:
        self._networks, self._spec, self._write = module.networks, spec, writer
        self._emit = Emitter(writer)
        self._several = spec.integration.best_of > 1
        middle = ("samples",) if self._several else ()
        self._observation = _input("observation", "batch", spec.observation_dim)
        self._noise = _input("noise", "batch", *middle, spec.chunk_dim)
        self._inputs = [self._observation, self._noise]
        self._features = self._encode()
        x_0 = self._noise
        if self._several:
            x_0 = writer.op("Reshape", x_0, writer.integers(-1, spec.chunk_dim))
            self._repeated = self._per_sample(self._features, self._networks.encoder.output_dim)
        else:
            self._repeated = self._features
        guide = self._prefix_guide() if module.takes_prefix else None
        x_1 = self._one_step(x_0) if module.one_step else self._flow(x_0, guide)
        if self._networks.edit_policy is not None and not module.one_step:
            x_1 = self._edited(self._networks.edit_policy, x_1)
        self._outputs = self._best_chunk(x_1) if self._several else {"actions": self._scaled(x_1)}

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished graph as a model with this metadata."""
        shapes = {"actions": ("batch", self._spec.chunk_size, self._spec.action_dim)}
        for name, value in self._outputs.items():
            value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shapes.get(name, ("batch",)))
        domains = {node.domain for node in self._write.nodes}
        graph = ir.Graph(
            self._inputs,
            list(self._outputs.values()),
            nodes=self._write.nodes,
            initializers=self._write.initializers,
            opset_imports={domain: 1 if domain else OPSET for domain in sorted(domains)},
            name="meam_policy",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="meam-policy", metadata_props=metadata)
        return ir.to_proto(model)

    def _encode(self) -> ir.Value:
        encoder, write = self._networks.encoder, self._write
        mean, std = (write.constant(array_of(values)) for values in (encoder.mean, encoder.std))
        normalised = write.op("Div", write.op("Sub", self._observation, mean), std)
        if encoder.limit is not None:
            normalised = write.op("Clip", normalised, write.constant(-encoder.limit), write.constant(encoder.limit))
        if encoder.frequencies.shape[1] == 0:
            return normalised
        phase = write.op("MatMul", normalised, write.constant(array_of(encoder.frequencies)))
        return write.op("Concat", normalised, write.op("Cos", phase), write.op("Sin", phase), axis=-1)

    def _per_sample(self, rows: ir.Value, width: int) -> ir.Value:
        """Repeat every row [batch, width] for each of its samples: [batch * samples, width]."""
        write = self._write
        shape = write.op("Concat", write.op("Shape", self._noise, start=0, end=2), write.integers(width), axis=0)
        repeated = write.op("Expand", write.op("Unsqueeze", rows, write.integers(1)), shape)
        return write.op("Reshape", repeated, write.integers(-1, width))

    def _prefix_guide(self) -> Callable[[Expression], Expression]:
        """Guide of the solver: the denoised action D becomes (1 - w) D + w p, with the prefix p and its weights w."""
        write, spec = self._write, self._spec
        prefix = _input("prefix", "batch", spec.chunk_size, spec.action_dim)
        weight = _input("prefix_weight", "batch", spec.chunk_size)
        self._inputs += [prefix, weight]
        flat = write.integers(-1, spec.chunk_dim)
        offset, scale, *_ = ActionNormaliser.of(spec)
        scaled = write.op("Div", write.op("Sub", prefix, write.constant(offset)), write.constant(scale))
        target = write.op("Reshape", write.op("Clip", scaled, write.constant(-1.0), write.constant(1.0)), flat)
        each = write.op(
            "Mul", write.op("Unsqueeze", weight, write.integers(2)), write.constant(np.ones(spec.action_dim))
        )
        share = write.op("Reshape", each, flat)
        rest, added = write.op("Sub", write.constant(1.0), share), write.op("Mul", share, target)

        def guide(x_1: Expression) -> Expression:
            return Expression.value(write.op("Add", write.op("Mul", self._emit.exactly(x_1), rest), added))

        return guide

    def _flow(self, x_0: ir.Value, guide: Callable[[Expression], Expression] | None) -> Expression:
        n, write = self._networks, self._write
        (weight, bias) = linear_arrays(n.deployed.layers[0])
        projected = write.gemm(self._features, weight[:, : -self._spec.chunk_dim - 1], None)
        if self._several:
            projected = self._per_sample(projected, len(bias))
        integration = self._spec.integration
        velocity = UnrolledVelocity(n.deployed, projected, integration.nfe, write, self._emit)
        start = Expression.value(x_0)
        if n.confine and n.deployed.preconditioner is None:
            # The last layer's bias b is added once, not to every denoised action: all steps sum multiples of
            # y = x + (1 - t) b, and x + (1 - t) (W h + b) = y + (1 - t) W h.
            bias_only = Expression({}, velocity_arrays(n.deployed)[-1][1])
            start = Expression.value(self._emit.exactly(start + bias_only)) - bias_only
        return solve(velocity, start, integration.times, integration.solver, n.confine, guide)

    def _one_step(self, x_0: ir.Value) -> Expression:
        assert self._networks.one_step is not None
        return self._perceptron(list(self._networks.one_step.layers), x_0)

    def _perceptron(self, layers: list[nn.Module], x: ir.Value) -> Expression:
        """A network on [features, x]; the features' part of its first layer is computed in float32."""
        write = self._write
        (weight, bias), *rest = (linear_arrays(layer) for layer in layers)
        split = weight.shape[1] - self._spec.chunk_dim
        projected = write.biases(write.gemm(self._repeated, weight[:, :split], write.constant(bias)))
        hidden = write.hidden(x, weight[:, split:], projected)
        for weight, bias in rest[:-1]:
            hidden = write.hidden(hidden, weight, bias)
        return Expression.linear(hidden, *rest[-1])

    def _edited(self, edit_policy: EditPolicy, x_1: Expression) -> Expression:
        """The flow's actions plus the mode of the edit; see `edit_policy.apply_edit`."""
        write, scale = self._write, self._networks.edit_scale
        x = self._emit.exactly(x_1.clamp(-1, 1))
        mean = self._perceptron([*edit_policy.layers, edit_policy.mean], x)
        edit = write.op("Tanh", self._emit.exactly(mean))
        return Expression.value(x) + scale * Expression.value(edit)

    def _scaled(self, x_1: Expression) -> ir.Value:
        """Actions clipped to [-1, 1], in environment units and within the bounds."""
        write, spec = self._write, self._spec
        offset, scale, low, high = ActionNormaliser.of(spec)
        # Clipped after scaling, to the narrower of both bounds: clip(x) s + o = clip(s x + o, o - s, o + s).
        low = np.maximum(np.float32(low), np.float32(offset - scale))
        high = np.minimum(np.float32(high), np.float32(offset + scale))
        rows = self._emit.exactly(x_1)
        value = write.op("Reshape", rows, write.integers(-1, spec.chunk_size, spec.action_dim))
        if np.any(scale != 1):
            value = write.op("Mul", value, write.constant(scale))
        if np.any(offset != 0):
            value = write.op("Add", value, write.constant(offset))
        value = write.op("Max", value, write.constant(low))
        return write.op("Min", value, write.constant(high))

    def _best_chunk(self, x_1: Expression) -> dict[str, ir.Value]:
        """Best-of-N: the sample with the highest mean value, that value, and the critics' standard deviation of it."""
        write, critic = self._write, self._networks.target_critic
        chunks = self._emit.exactly(x_1.clamp(-1, 1))
        values = _critic_values(critic, self._repeated, chunks, write)  # [critics, batch * samples]
        shape = write.op(
            "Concat", write.integers(len(critic.weights[0])), write.op("Shape", self._noise, start=0, end=2), axis=0
        )
        values = write.op("Reshape", values, shape)
        mean = write.op("ReduceMean", values, write.integers(0), keepdims=0)
        best = write.op("ArgMax", mean, axis=1, keepdims=1)  # [batch, 1]
        value = write.op("GatherElements", mean, best, axis=1)
        centred = write.op("Sub", values, write.op("Unsqueeze", mean, write.integers(0)))
        variance = write.op("ReduceMean", write.op("Mul", centred, centred), write.integers(0), keepdims=0)
        spread = write.op("Sqrt", write.op("GatherElements", variance, best, axis=1))
        samples = write.op("Reshape", chunks, write.op("Shape", self._noise))
        rows = write.op("GatherND", samples, best, batch_dims=1)  # [batch, chunk_dim]
        return {
            "actions": self._scaled(Expression.value(rows)),
            "value": write.op("Squeeze", value, write.integers(1)),
            "disagreement": write.op("Squeeze", spread, write.integers(1)),
        }


def _critic_values(critic: CriticEnsemble, features: ir.Value, chunks: ir.Value, write: GraphWriter) -> ir.Value:
    """Values [critics, rows] of all critics."""
    inputs = write.op("Concat", features, chunks, axis=-1)
    weights, biases = ([array_of(p) for p in parameters] for parameters in (critic.weights, critic.biases))
    # A norm's scale and shift are linear, so they are folded into the next layer.
    for layer, (scale, shift) in enumerate(zip(critic.norm_scales, critic.norm_biases, strict=True), start=1):
        biases[layer] = biases[layer] + array_of(shift) @ weights[layer]
        weights[layer] = array_of(scale).swapaxes(1, 2) * weights[layer]
    weights[-1], biases[-1] = (float(critic.scale) * array for array in (weights[-1], biases[-1]))
    biases[-1] = biases[-1] + float(critic.offset)
    hidden = inputs
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index:
            hidden = write.normalised(write.gelu(hidden), weight.shape[1])
        hidden = write.op("Add", write.op("MatMul", hidden, write.constant(weight)), write.constant(bias))
    return write.op("Squeeze", hidden, write.integers(2))


def _input(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

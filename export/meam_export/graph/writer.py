"""Writes ONNX operators and weights in one of the precisions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meam_policy.spec import Precision

__all__ = ["IR_VERSION", "OPSET", "GraphWriter", "make_writer"]

OPSET = 20
"""The oldest operator set with GELU as one operator; onnxruntime 1.17 reads it."""

IR_VERSION = 9
"""The ONNX file format version of this operator set."""

BLOCK = 128
"""Consecutive weights of a row that share a scale in int8."""

Array = NDArray[Any]


class GraphWriter:
    """Writes float32 operators; every weight is stored once, however often it is used.

    Attributes:
        nodes: Operators written so far, in order.
        initializers: Weights and constants.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._stored: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(self, name: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        """Writes one operator with one output."""
        return self.ops(name, inputs, 1, domain, **attributes)[0]

    def ops(
        self, name: str, inputs: Sequence[ir.Value], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Writes one operator with several outputs."""
        node = ir.node(name, inputs, attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs

    def store(self, array: Array) -> ir.Value:
        """Stores a constant with its own type and shape; equal constants are stored once."""
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._stored:
            tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=f"c{len(self.initializers)}")
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.initializers.append(value)
            self._stored[key] = value
        return self._stored[key]

    def placeholder(self) -> ir.Value:
        """Adds a constant whose `const_value` is set later."""
        self.initializers.append(ir.Value(name=f"c{len(self.initializers)}"))
        return self.initializers[-1]

    def constant(self, value: Array | float) -> ir.Value:
        """Stores a float32 constant."""
        return self.store(np.asarray(value, dtype=np.float32))

    def integers(self, *values: int) -> ir.Value:
        """Stores a vector of integers, e.g. a shape."""
        return self.store(np.array(values, dtype=np.int64))

    def product(self, inputs: ir.Value, weight: Array, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Writes alpha * inputs @ weight.T + beta * added, from and to float32, with weight [out, in]."""
        return self.gemm(inputs, weight, added, alpha, beta)

    def gemm(
        self, inputs: ir.Value, weight: Array, added: ir.Value | None, alpha: float = 1.0, beta: float = 1.0
    ) -> ir.Value:
        """Writes the same product in float32, whatever the writer's precision."""
        terms = (inputs, self.constant(weight.T)) + (() if added is None else (added,))
        factors: dict[str, Any] = {"alpha": alpha} if alpha != 1 else {}
        if beta != 1:
            factors["beta"] = beta
        return self.op("Gemm", *terms, **factors)

    def sum(self, value: ir.Value, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Writes alpha * value + beta * added, for products that cannot add by themselves."""
        if alpha != 1:
            value = self.op("Mul", value, self.constant(alpha))
        if added is None:
            return value
        if beta != 1:
            added = self.op("Mul", added, self.constant(beta))
        return self.op("Add", value, added)

    def biases(self, value: ir.Value) -> ir.Value:
        """Converts a float32 value to the type that `hidden` takes as its bias."""
        return value

    def hidden(self, inputs: ir.Value, weight: Array, bias: ir.Value | Array, alpha: float = 1.0) -> ir.Value:
        """Writes gelu(alpha * inputs @ weight.T + bias)."""
        added = self.constant(bias) if isinstance(bias, np.ndarray) else bias
        return self.gelu(self.product(inputs, weight, added, alpha, 1.0))

    def gelu(self, value: ir.Value) -> ir.Value:
        """Writes the tanh approximation of GELU."""
        return self.op("Gelu", value, approximate="tanh")

    def normalised(self, value: ir.Value, width: int) -> ir.Value:
        """Writes the LayerNorm of rows of a width, in float32, without scale and shift.

        These are linear, so they are folded into the next layer.
        """
        return self.op("LayerNormalization", value, self.constant(np.ones(width)), axis=-1, epsilon=1e-6)


class Int8Writer(GraphWriter):
    """Writes weights as 8-bit integers with one scale per block; their inputs are quantised at run time."""

    def product(self, inputs: ir.Value, weight: Array, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Writes alpha * inputs @ weight.T + beta * added, with 8-bit weights."""
        packed, scales = quantise(weight)
        n, k = weight.shape
        attributes = {"K": k, "N": n, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        value = self.op(
            "MatMulNBits", inputs, self.store(packed), self.store(scales), domain="com.microsoft", **attributes
        )
        return self.sum(value, added, alpha, beta)


class Float16Writer(GraphWriter):
    """Writes weights and hidden layers in float16; the integrated state stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self._halves: dict[ir.Value, ir.Value] = {}

    def half(self, value: ir.Value) -> ir.Value:
        """Casts a value to float16, once."""
        if value not in self._halves:
            cast = self.op("Cast", value, to=int(ir.DataType.FLOAT16))
            self._halves |= {value: cast, cast: cast}
        return self._halves[value]

    def biases(self, value: ir.Value) -> ir.Value:
        """Casts biases to float16 before they are split, with one operator for all layers."""
        return self.half(value)

    def hidden(self, inputs: ir.Value, weight: Array, bias: ir.Value | Array, alpha: float = 1.0) -> ir.Value:
        """Writes gelu(alpha * inputs @ weight.T + bias), in float16."""
        added = self.store(bias.astype(np.float16)) if isinstance(bias, np.ndarray) else bias
        factors: dict[str, Any] = {"alpha": alpha} if alpha != 1 else {}
        value = self.op("Gemm", self.half(inputs), self._weight(weight), added, **factors)
        activated = self.gelu(value)
        self._halves[activated] = activated
        return activated

    def normalised(self, value: ir.Value, width: int) -> ir.Value:
        """Writes the LayerNorm of rows of a width, in float32: half precision holds no variance of large values."""
        if self._halves.get(value) is value:
            value = self.op("Cast", value, to=int(ir.DataType.FLOAT))
        return super().normalised(value, width)

    def product(self, inputs: ir.Value, weight: Array, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Writes alpha * inputs @ weight.T + beta * added, with the product in float16."""
        value = self.op("MatMul", self.half(inputs), self._weight(weight))
        value = self.op("Cast", value, to=int(ir.DataType.FLOAT))
        return self.sum(value, added, alpha, beta)

    def _weight(self, weight: Array) -> ir.Value:
        return self.store(np.ascontiguousarray(weight.T).astype(np.float16))


def quantise(weight: Array) -> tuple[Array, Array]:
    """Round weights to 8 bits, with one scale per block of a row.

    Implemented here because onnxruntime's quantiser takes whole models, and configures the root logger when imported.

    Args:
        weight: Weights [out, in].

    Returns:
        Bytes [out, blocks, BLOCK] with the zero point 128, and scales [out * blocks]: the layout of MatMulNBits.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), dtype=np.float64)
    padded[:, :columns] = weight
    values = padded.reshape(rows, blocks, BLOCK)
    scales = np.abs(values).max(axis=-1) / 127
    rounded = np.rint(values / np.where(scales == 0, 1, scales)[..., None]) + 128
    return rounded.astype(np.uint8), scales.astype(np.float32).ravel()


def make_writer(precision: Precision) -> GraphWriter:
    """A new writer for a precision."""
    return {"fp32": GraphWriter, "int8": Int8Writer, "fp16": Float16Writer}[precision]()

"""How large the values of a policy graph can become: bounds on operators that expand their inputs.

Expand, Tile, ConstantOfShape and Range (and Pad, which no policy needs) are where small models do big damage: a number
in a shape becomes that many elements. onnxruntime even computes them while it loads, where nothing but constants goes
into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from meam_policy.graph.onnx_tensor import MAX_AXES, Tensor, integers
from meam_policy.graph.onnx_wire import WireReader, signed

__all__ = ["Growth"]

MAX_CONSTANT_ELEMENTS = 2**24
"""Elements computed from constants alone. onnxruntime holds them twice: 2**24 float32 numbers were measured to take
138 MB, 2**26 to take 522 MB."""

MAX_EXPANSION = 2**34
"""Elements of one expansion whose shape depends on the inputs, an unknown dimension counted as UNKNOWN_DIMENSION: one
times 2**24, or three of them times 16."""

UNKNOWN_DIMENSION = 2**10

# Where the operators that enlarge take their shape.
_EXPANDING = {b"ConstantOfShape": 0, b"Expand": 1, b"Range": 0, b"Tile": 1}

# Operators with further inputs whose result has no more elements than the first of them.
_NO_LARGER = (
    b"CastLike Clip DequantizeLinear LayerNormalization QuantizeLinear ReduceMax ReduceMean ReduceMin ReduceSum "
    b"ReduceSumSquare Reshape Slice Split Squeeze TopK Unsqueeze"
).split()

# Operators that carry the numbers of a shape from one place to another. Cast is none: -1 is 255 in eight bits.
_SHAPE_CARRIERS = (b"Identity", b"Reshape", b"Slice", b"Squeeze", b"Unsqueeze")


class Growth:
    """Follows a graph's nodes in their order, and refuses one that could allocate more than a policy needs.

    A value that depends on constants alone has a known number of elements, or one that is no larger than the product
    of the numbers of elements it is computed from. All of them together are bounded by MAX_CONSTANT_ELEMENTS and four
    times the weights, which quantised and transposed weights need.

    A shape that expands a value must be constant, or made of constants and dimensions of other values, by operators
    that only carry numbers about. Its product, each unknown dimension taken for UNKNOWN_DIMENSION, or the largest
    input if that is larger, is bounded by MAX_EXPANSION.
    """

    def __init__(self, reader: WireReader) -> None:
        self.reader = reader
        self.unknown = UNKNOWN_DIMENSION
        self.budget = MAX_CONSTANT_ELEMENTS
        self.tensors: dict[bytes, Tensor] = {}
        self.elements: dict[bytes, int] = {}
        self.shapes: dict[bytes, tuple[int, int]] = {}
        """Of a value that is a shape: at most how many numbers it has, and their product."""

    def add_input(self, dimensions: Sequence[int]) -> None:
        """Add an input of the graph, with its static dimensions."""
        self.unknown = max(self.unknown, math.prod(dimensions))

    def add_weight(self, tensor: Tensor) -> None:
        """Add an initialiser."""
        self._add_constant(tensor, tensor.name)
        self.budget += 4 * tensor.elements

    def _add_constant(self, tensor: Tensor, name: bytes) -> None:
        self.tensors[name] = tensor
        self.elements[name] = tensor.elements

    def add_node(
        self,
        operator: bytes,
        inputs: Sequence[bytes],
        outputs: Sequence[bytes],
        attributes: Mapping[bytes, dict[str, Any]],
    ) -> None:
        """Add the next node.

        Raises:
            FormatError: it makes too much out of constants, or takes a shape from where it cannot be bounded.
        """
        if operator == b"Constant":
            self._add_constant_node(outputs[0], *attributes.values())
            return
        elements = [self.elements.get(name, 1) for name in inputs]
        constant = bool(inputs) and all(name in self.elements for name in inputs if name)
        expansion = self._expansion(operator, inputs) if operator in _EXPANDING else None
        if outputs and (shape := self._shape(operator, inputs, attributes)):
            self.shapes[outputs[0]] = shape
        if not constant and (expansion is None or inputs[_EXPANDING[operator]] not in self.elements):
            return
        made = self._result(operator, elements, expansion)
        self.budget -= made
        if self.budget < 0:
            self._refuse(operator, f"makes more than {MAX_CONSTANT_ELEMENTS} numbers out of constants")
        if constant:
            self.elements.update(dict.fromkeys(outputs, made))

    def _add_constant_node(self, output: bytes, fields: dict[str, Any]) -> None:
        if "tensor" in fields:
            self._add_constant(fields["tensor"], output)
            return
        numbers = [signed(number) for number in fields.get("ints", [fields["i"]] if "i" in fields else [])]
        self.elements[output] = max(len(numbers), len(fields.get("floats", ())), 1)
        if numbers:
            self.shapes[output] = len(numbers), _product(numbers)

    def _result(self, operator: bytes, elements: Sequence[int], expansion: int | None) -> int:
        if expansion is not None:
            return expansion * (elements[0] if operator in (b"Expand", b"Tile") else 1)
        if operator == b"Concat":
            return sum(elements)
        return elements[0] if operator in _NO_LARGER else _product(elements)

    def _expansion(self, operator: bytes, inputs: Sequence[bytes]) -> int:
        """Elements of what an expanding operator makes, or by how many times it enlarges."""
        shapes = [self._shape_of(name) for name in inputs[_EXPANDING[operator] :]]
        known = [shape[1] for shape in shapes if shape is not None]
        if not shapes or len(known) < len(shapes):
            self._refuse(operator, "takes its shape from computed values; expected constants and dimensions")
        expansion = known[0] + (known[1] if operator == b"Range" and len(known) > 1 else 0)
        if expansion > MAX_EXPANSION:
            self._refuse(operator, f"makes more than {MAX_EXPANSION} numbers")
        return expansion

    def _shape(
        self, operator: bytes, inputs: Sequence[bytes], attributes: Mapping[bytes, dict[str, Any]]
    ) -> tuple[int, int] | None:
        """The shape that a node makes, where it makes one by carrying numbers about."""
        if operator in (b"Shape", b"Size"):
            start, end = (attributes.get(name, {}).get("i") for name in (b"start", b"end"))
            length = 1 if operator == b"Size" or (start in (0, None) and end == 1) else MAX_AXES
            return length, self.elements.get(inputs[0], self.unknown) if inputs else self.unknown
        if operator in _SHAPE_CARRIERS:
            return self._shape_of(inputs[0]) if inputs else None
        if operator not in (b"Concat", b"Gather", b"Mul"):
            return None
        shapes = [self._shape_of(name) for name in inputs]
        if not shapes or None in shapes:
            return None
        known = [shape for shape in shapes if shape is not None]
        if operator == b"Gather":  # may take one number several times
            count = known[-1][0]
            return count, _product([known[0][1]] * min(count, 64))
        lengths = [length for length, _ in known]
        if operator == b"Mul" and max(lengths) > 1:  # one number could multiply each of the others
            return None
        return (sum(lengths) if operator == b"Concat" else 1), _product([product for _, product in known])

    def _shape_of(self, name: bytes) -> tuple[int, int] | None:
        if name not in self.shapes and name in self.tensors and self.elements[name] <= 64:
            numbers = integers(self.reader, self.tensors[name])
            if numbers is not None:
                self.shapes[name] = len(numbers), _product(numbers)
        return self.shapes.get(name)

    def _refuse(self, operator: bytes, text: str) -> NoReturn:
        self.reader.refuse(f"has an operator {operator.decode()} that {text}, which no policy needs")


def _product(numbers: Sequence[int]) -> int:
    """The product of the absolute values; zeros and whatever is beyond all limits do not matter."""
    product = 1
    for number in numbers:
        product = min(product * max(abs(number), 1), 2**64)
    return product

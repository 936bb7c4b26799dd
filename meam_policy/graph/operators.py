"""The operators that a policy graph may use: how many inputs and outputs each takes, and which attributes.

onnxruntime relies on some of this without looking: a Split with more outputs than it declares ends the process. The
table is that of ONNX for the opsets which the gate accepts; where they differ it holds what any of them allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["SIGNATURES", "Signature"]


@dataclass(frozen=True)
class Signature:
    """What a node of an operator may look like.

    Attributes:
        inputs: Least and largest number of inputs; None is without limit.
        outputs: The same of outputs.
        attributes: The field of `AttributeProto` that holds the value, by the attribute's name.
    """

    inputs: tuple[int, int | None]
    outputs: tuple[int, int | None]
    attributes: Mapping[bytes, str]


# An operator, its inputs and its outputs (from-to, * without limit), and its attributes with the field of their value.
_DEFAULT_DOMAIN = """
    Abs 1 1
    Add 2 1
    And 2 1
    ArgMax 1 1 axis:i keepdims:i select_last_index:i
    ArgMin 1 1 axis:i keepdims:i select_last_index:i
    Cast 1 1 round_mode:s saturate:i to:i
    CastLike 2 1 round_mode:s saturate:i
    Clip 1-3 1
    Concat 1-* 1 axis:i
    Constant 0 1 value:t value_float:f value_floats:floats value_int:i value_ints:ints value_string:s \
        value_strings:strings
    ConstantOfShape 1 1 value:t
    Cos 1 1
    DequantizeLinear 2-3 1 axis:i block_size:i output_dtype:i
    Div 2 1
    DynamicQuantizeLinear 1 3
    Equal 2 1
    Erf 1 1
    Exp 1 1
    Expand 2 1
    Flatten 1 1 axis:i
    Gather 2 1 axis:i
    GatherElements 2 1 axis:i
    GatherND 2 1 batch_dims:i
    Gelu 1 1 approximate:s
    Gemm 2-3 1 alpha:f beta:f transA:i transB:i
    Greater 2 1
    Identity 1 1
    LayerNormalization 2-3 1-3 axis:i epsilon:f stash_type:i
    Less 2 1
    Log 1 1
    MatMul 2 1
    MatMulInteger 2-4 1
    Max 1-* 1
    Mean 1-* 1
    Min 1-* 1
    Mul 2 1
    Neg 1 1
    Not 1 1
    Or 2 1
    Pow 2 1
    QuantizeLinear 2-3 1 axis:i block_size:i output_dtype:i precision:i saturate:i
    Range 3 1 stash_type:i
    Reciprocal 1 1
    ReduceMax 1-2 1 axes:ints keepdims:i noop_with_empty_axes:i
    ReduceMean 1-2 1 axes:ints keepdims:i noop_with_empty_axes:i
    ReduceMin 1-2 1 axes:ints keepdims:i noop_with_empty_axes:i
    ReduceSum 1-2 1 keepdims:i noop_with_empty_axes:i
    ReduceSumSquare 1-2 1 axes:ints keepdims:i noop_with_empty_axes:i
    Relu 1 1
    Reshape 2 1 allowzero:i
    Shape 1 1 end:i start:i
    Sigmoid 1 1
    Sin 1 1
    Size 1 1
    Slice 3-5 1
    Split 1-2 1-* axis:i num_outputs:i
    Sqrt 1 1
    Squeeze 1-2 1
    Sub 2 1
    Sum 1-* 1
    Tanh 1 1
    Tile 2 1
    TopK 2 2 axis:i largest:i sorted:i
    Transpose 1 1 perm:ints
    Unsqueeze 2 1
    Where 3 1
"""
_MICROSOFT = """
    DynamicQuantizeMatMul 3-5 1
    MatMulNBits 3-6 1 K:i N:i accuracy_level:i bits:i block_size:i
"""


def _limits(text: str) -> tuple[int, int | None]:
    least, _, most = text.partition("-")
    return int(least), None if most == "*" else int(most or least)


def _signatures(table: str) -> Mapping[bytes, Signature]:
    found = {}
    for line in table.strip().splitlines():
        name, inputs, outputs, *attributes = line.split()
        fields = dict(attribute.split(":") for attribute in attributes)
        known = {key.encode(): field for key, field in fields.items()}
        found[name.encode()] = Signature(_limits(inputs), _limits(outputs), known)
    return MappingProxyType(found)


SIGNATURES: Mapping[bytes, Mapping[bytes, Signature]] = MappingProxyType(
    {b"": _signatures(_DEFAULT_DOMAIN), b"com.microsoft": _signatures(_MICROSOFT)}
)
"""The operators that policy graphs may use, by domain and name."""

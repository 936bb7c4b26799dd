"""The inputs and outputs that an ONNX file declares, with Triton's names for their types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meam_policy.errors import FormatError
from meam_policy.extras import needs
from meam_policy.spec import PolicySpec

__all__ = ["Signature", "Tensor", "check_signature", "read_signature"]

_DATA_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "DOUBLE": "TYPE_FP64",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
}
"""Triton's names for ONNX element types."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph; its shape excludes the batch axis, and is -1 where the size varies."""

    name: str
    data_type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph, in the order of its declarations."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def read_signature(graph: bytes, file: str) -> Signature:
    """Read the inputs and outputs that an ONNX file declares.

    Args:
        graph: Contents of the file.
        file: Name of the file in error messages.

    Raises:
        FormatError: the graph is not ONNX, or a tensor has a type or shape that Triton could not batch.
        MissingExtraError: onnx is not installed.
    """
    with needs("Triton's configuration", "onnx", "export"):
        import onnx
        from google.protobuf.message import DecodeError
    try:
        declared = onnx.load_from_string(graph).graph
    except DecodeError as error:
        raise FormatError(f"{file} is not a valid ONNX file: {error}. Export the policy again.") from error
    inputs, outputs = (
        tuple(_read_tensor(value, file) for value in values) for values in (declared.input, declared.output)
    )
    return Signature(inputs, outputs)


def check_signature(signature: Signature, spec: PolicySpec) -> None:
    """Refuse a graph that does not match the policy's spec, on which clients rely.

    Raises:
        FormatError: the graph takes other observations or returns other actions.
    """
    for kind, tensors, name, shape in (
        ("input", signature.inputs, "observation", (spec.observation_dim,)),
        ("output", signature.outputs, "actions", (spec.chunk_size, spec.action_dim)),
    ):
        seen = {tensor.name: tensor.shape for tensor in tensors}
        if seen.get(name) != shape:
            listed = ", ".join(f'"{other}" {["batch", *sizes]}' for other, sizes in seen.items()) or "none"
            raise FormatError(
                f'policy.onnx has the {kind}s {listed}; expected "{name}" {["batch", *shape]}, as in config.json. '
                "Export the policy again."
            )


def _read_tensor(value: Any, file: str) -> Tensor:
    import onnx

    tensor = value.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if element not in _DATA_TYPES:
        expected = ", ".join(_DATA_TYPES)
        raise FormatError(
            f'{file}: "{value.name}" has elements {element}; expected one of {expected}. Export the policy again.'
        )
    sizes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
    if sizes[:1] != [-1] or 0 in sizes:
        raise FormatError(
            f'{file}: "{value.name}" has the shape {sizes}; expected a first axis of any size, for the batch, and no '
            "empty axis. Export it with `meam export`."
        )
    return Tensor(value.name, _DATA_TYPES[element], tuple(sizes[1:]))

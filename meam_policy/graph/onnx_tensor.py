"""The constants of a policy graph: their elements, where those are in the file, and whether they are finite."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from meam_policy.graph.onnx_wire import TENSOR, Span, WireReader, quote, shorten, signed

__all__ = ["MAX_AXES", "Tensor", "holds_infinity_or_nan", "integers", "read_tensor"]

MAX_AXES = 16


class _Element(NamedTuple):
    """An element type of tensors.

    Attributes:
        name: As NumPy has it.
        bits: Of one element.
        typed: The field that may hold elements instead of raw_data.
        exponent: For floats, the bits of the exponent, which are all set in NaN and infinities and nowhere else.
    """

    name: str
    bits: int
    typed: str | None = None
    exponent: int = 0


# By number of TensorProto.DataType; texts, complex numbers and floats of 8 bits or fewer have no place in a policy.
_ELEMENTS = {
    1: _Element("float32", 32, "float_data", 0x7F80_0000),
    2: _Element("uint8", 8, "int32_data"),
    3: _Element("int8", 8, "int32_data"),
    4: _Element("uint16", 16, "int32_data"),
    5: _Element("int16", 16, "int32_data"),
    6: _Element("int32", 32, "int32_data"),
    7: _Element("int64", 64, "int64_data"),
    9: _Element("bool", 8, "int32_data"),
    10: _Element("float16", 16, None, 0x7C00),
    11: _Element("float64", 64, "double_data", 0x7FF0_0000_0000_0000),
    12: _Element("uint32", 32, "uint64_data"),
    13: _Element("uint64", 64, "uint64_data"),
    16: _Element("bfloat16", 16, None, 0x7F80),
    21: _Element("uint4", 4),
    22: _Element("int4", 4),
}
_INT32, _INT64 = 6, 7
_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


class Tensor(NamedTuple):
    """A constant.

    Attributes:
        name: As in the file; constants of nodes mostly have none.
        data_type: The number of TensorProto.DataType.
        dims: Its shape.
        field: The field of TensorProto that holds them; None where there are none.
        span: Where they are in the file.
    """

    name: bytes
    data_type: int
    dims: tuple[int, ...]
    field: str | None
    span: Span

    @property
    def element_type(self) -> str:
        """The type of its elements, by NumPy's name."""
        return _ELEMENTS[self.data_type].name

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its size in memory; two elements share a byte where they have four bits."""
        return (self.elements * _ELEMENTS[self.data_type].bits + 7) // 8


def read_tensor(reader: WireReader, span: Span) -> Tensor:
    """Read a tensor.

    Raises:
        FormatError: its elements are in another file, are not as many as its shape says, or are of a type that no
            policy needs.
    """
    fields = reader.read(span, TENSOR)
    name = reader.bytes(fields.get("name"))
    if "external_data" in fields or fields.get("data_location", 0):
        reader.refuse(f"keeps {quote(name)} in another file; external tensor data is not allowed")
    data_type = fields.get("data_type", 0)
    element = _ELEMENTS.get(data_type)
    if element is None:
        reader.refuse(f"has {quote(name)} of the element type {data_type}, which policy graphs may not use")
    dims = [signed(size) for size in fields.get("dims", ())]
    if len(dims) > MAX_AXES or not all(0 <= size < 2**31 for size in dims):
        shape = shorten(str(dims[: MAX_AXES + 1]))
        reader.refuse(f"has {quote(name)} of the shape {shape}; expected at most {MAX_AXES} sizes below 2**31")
    held = [field for field in _DATA_FIELDS if field in fields]
    field = held[0] if held else None
    if len(held) > 1 or field not in (None, "raw_data", element.typed):
        shown = f"{quote(name)} of the element type {data_type} in {' and '.join(held)}"
        reader.refuse(f"has the elements of {shown}; expected raw_data")
    tensor = Tensor(name, data_type, tuple(dims), field, fields[field] if field else (0, 0))
    if not _is_complete(reader, tensor):
        reader.invalid(f"{quote(name)} does not have the {tensor.elements} elements that its shape {dims} needs")
    return tensor


def _is_complete(reader: WireReader, tensor: Tensor) -> bool:
    start, end = tensor.span
    if tensor.field not in ("int32_data", "int64_data", "uint64_data"):
        return end - start == tensor.bytes
    # Numbers of one to ten bytes; only the last byte lacks the highest bit.
    last = np.frombuffer(reader.data, np.uint8, end - start, start) < 128
    return np.count_nonzero(last) == tensor.elements and (start == end or bool(last[-1]))


def holds_infinity_or_nan(reader: WireReader, tensor: Tensor) -> Literal["inf", "nan"] | None:
    """Look for numbers that are not finite: "nan" if there is one, else "inf", else None."""
    element = _ELEMENTS[tensor.data_type]
    if not element.exponent or not tensor.elements:
        return None
    kind = np.dtype(f"<u{element.bits // 8}")
    numbers = np.frombuffer(reader.data, kind, tensor.elements, tensor.span[0])
    infinity, no_sign = kind.type(element.exponent), kind.type(2 ** (element.bits - 1) - 1)
    # Without their signs, floats are ordered like the integers with the same bits: numbers, infinity, NaN. A block at
    # a time stays in the cache.
    largest = max((numbers[start : start + 2**16] & no_sign).max() for start in range(0, len(numbers), 2**16))
    if largest < infinity:
        return None
    return "inf" if largest == infinity else "nan"


def integers(reader: WireReader, tensor: Tensor) -> list[int] | None:
    """The elements of an int32 or int64 tensor; None for other types."""
    if tensor.data_type not in (_INT32, _INT64):
        return None
    position, end = tensor.span
    if tensor.field == "raw_data":
        kind = "<i4" if tensor.data_type == _INT32 else "<i8"
        return np.frombuffer(reader.data, kind, tensor.elements, position).tolist()
    numbers = []
    while position < end:
        number, position = reader.varint(position)
        numbers.append(signed(number))
    return numbers

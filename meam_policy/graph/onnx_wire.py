"""The wire format of protobuf, and the messages of ONNX that a policy graph may hold.

A parser that skips what it does not know, merges a message that appears twice and takes the last of two numbers leaves
room for a file that means one thing to the one who checks it and another to the one who runs it. This reader refuses
all of that.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from meam_policy.errors import FormatError

__all__ = [
    "ATTRIBUTE",
    "BRANCH",
    "DIMENSION",
    "ENTRY",
    "FUNCTION",
    "GRAPH",
    "MODEL",
    "NODE",
    "OPSET_IMPORT",
    "SHAPE",
    "TENSOR",
    "TENSOR_TYPE",
    "TYPE",
    "VALUE_INFO",
    "Message",
    "Span",
    "WireReader",
    "quote",
    "shorten",
    "signed",
]

MAX_FIELDS = 2**21
"""Protobuf fields of a file; bounds the time of the walk to about a second. A node with its types has about ten."""

MAX_TEXT_BYTES = 2**23
"""Texts of a file together: names, metadata, attributes. A hundred thousand nodes need about 3 million bytes, the names
of an observation of 28,000 pixels another."""


class Message(NamedTuple):
    """A protobuf message.

    Attributes:
        name: Its name.
        fields: Its fields by tag (number and wire type): name, wire type, and whether they repeat.
        texts: Names of the fields that hold text.
    """

    name: str
    fields: Mapping[int, tuple[str, int, bool]]
    texts: frozenset[str]


_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
Span = tuple[int, int]


class _Field(NamedTuple):
    number: int
    wire: int
    is_text: bool = False


def _message(name: str, one: Mapping[str, _Field], many: Mapping[str, _Field]) -> Message:
    fields = {f.number << 3 | f.wire: (field, f.wire, False) for field, f in one.items()}
    fields |= {f.number << 3 | f.wire: (field, f.wire, True) for field, f in many.items()}
    return Message(name, fields, frozenset(field for field, f in (*one.items(), *many.items()) if f.is_text))


def _varint(number: int) -> _Field:
    return _Field(number, _VARINT)


def _length(number: int) -> _Field:
    return _Field(number, _LENGTH)


def _text(number: int) -> _Field:
    return _Field(number, _LENGTH, is_text=True)


# From onnx.proto of onnx 1.23. Repeated numbers are read in the form in which its writers put them: one by one,
# packed in the data of tensors.
MODEL = _message(
    "ModelProto",
    {
        "ir_version": _varint(1),
        "producer_name": _text(2),
        "producer_version": _text(3),
        "domain": _text(4),
        "model_version": _varint(5),
        "doc_string": _text(6),
        "graph": _length(7),
    },
    {"opset_import": _length(8), "metadata_props": _length(14), "functions": _length(25)},
)
OPSET_IMPORT = _message("OperatorSetIdProto", {"domain": _text(1), "version": _varint(2)}, {})
ENTRY = _message("StringStringEntryProto", {"key": _text(1), "value": _text(2)}, {})
GRAPH = _message(
    "GraphProto",
    {"name": _text(2), "doc_string": _text(10)},
    {
        "node": _length(1),
        "initializer": _length(5),
        "input": _length(11),
        "output": _length(12),
        "value_info": _length(13),
        "metadata_props": _length(16),
    },
)
NODE = _message(
    "NodeProto",
    {"name": _text(3), "op_type": _text(4), "doc_string": _text(6), "domain": _text(7)},
    {"input": _text(1), "output": _text(2), "attribute": _length(5), "metadata_props": _length(9)},
)
ATTRIBUTE = _message(
    "AttributeProto",
    {
        "name": _text(1),
        "f": _Field(2, _FIXED32),
        "i": _varint(3),
        "s": _text(4),
        "t": _length(5),
        "doc_string": _text(13),
        "type": _varint(20),
    },
    {"floats": _Field(7, _FIXED32), "ints": _varint(8), "strings": _text(9)},
)
BRANCH = _message("AttributeProto", {"name": _text(1), "g": _length(6), "type": _varint(20)}, {})
"""An attribute that holds a branch of an If: a whole graph."""
TENSOR = _message(
    "TensorProto",
    {
        "data_type": _varint(2),
        "float_data": _length(4),
        "int32_data": _length(5),
        "int64_data": _length(7),
        "name": _text(8),
        "raw_data": _length(9),
        "double_data": _length(10),
        "uint64_data": _length(11),
        "doc_string": _text(12),
        "data_location": _varint(14),
    },
    {"dims": _varint(1), "external_data": _length(13), "metadata_props": _length(16)},
)
VALUE_INFO = _message(
    "ValueInfoProto",
    {"name": _text(1), "type": _length(2), "doc_string": _text(3)},
    {"metadata_props": _length(4)},
)
TYPE = _message("TypeProto", {"tensor_type": _length(1), "denotation": _text(6)}, {})
TENSOR_TYPE = _message("TypeProto.Tensor", {"elem_type": _varint(1), "shape": _length(2)}, {})
SHAPE = _message("TensorShapeProto", {}, {"dim": _length(1)})
DIMENSION = _message(
    "TensorShapeProto.Dimension", {"dim_value": _varint(1), "dim_param": _text(2), "denotation": _text(3)}, {}
)
FUNCTION = _message(
    "FunctionProto",
    {"name": _text(1), "doc_string": _text(8), "domain": _text(10), "overload": _text(13)},
    {
        "input": _length(4),
        "output": _length(5),
        "attribute": _length(6),
        "node": _length(7),
        "opset_import": _length(9),
        "attribute_proto": _length(11),
        "value_info": _length(12),
        "metadata_props": _length(14),
    },
)

# Fields that ONNX defines and no policy needs.
_REFUSED = {
    ("ModelProto", 20): "training information",
    ("ModelProto", 26): "device configurations",
    ("GraphProto", 14): "quantization annotations",
    ("GraphProto", 15): "sparse initializers",
    ("NodeProto", 8): "function overloads",
    ("NodeProto", 10): "device configurations",
    ("AttributeProto", 6): "subgraphs",
    ("AttributeProto", 10): "lists of tensors",
    ("AttributeProto", 11): "subgraphs",
    ("AttributeProto", 14): "type attributes",
    ("AttributeProto", 15): "type attributes",
    ("AttributeProto", 21): "attribute references",
    ("AttributeProto", 22): "sparse tensors",
    ("AttributeProto", 23): "sparse tensors",
    ("TensorProto", 3): "tensor segments",
    ("TensorProto", 6): "texts in tensors",
    ("TypeProto", 4): "sequences",
    ("TypeProto", 5): "maps",
    ("TypeProto", 7): "opaque types",
    ("TypeProto", 8): "sparse tensors",
    ("TypeProto", 9): "optional values",
}


_BYTES = ("s", "strings")
"""Texts of attributes, which ONNX does not require to be UTF-8."""


class WireReader:
    """Reads protobuf messages out of the bytes of a file; strict where parsers are known to differ."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        self._turns = itertools.repeat(None, MAX_FIELDS)  # of the loop below, whichever message it reads
        self._text_bytes = 0

    def refuse(self, text: str) -> NoReturn:
        """Raise FormatError: the file is ONNX, but not a policy."""
        raise FormatError(f"{self.name} {text}. Export the policy again with `meam export`.")

    def invalid(self, text: str) -> NoReturn:
        """Raise FormatError: the file is not ONNX."""
        raise FormatError(f"{self.name} is not a valid ONNX file: {text}. Download or export the policy again.")

    def read(self, span: Span, message: Message, owner: bytes = b"") -> dict[str, Any]:
        """Read a message, not the messages inside it (but for checking its metadata).

        Args:
            span: Where it is in the file.
            message: What it may hold.
            owner: What it belongs to, for errors.

        Returns:
            By name, what its fields hold: an unsigned integer, or the span of anything else; a list of them where the
            field may repeat.

        Raises:
            FormatError: it is cut short, has a field that it may not have, or one twice.
        """
        data, fields, found = self.data, message.fields, {}
        position, end = span
        try:
            for _ in self._turns:
                if position >= end:
                    break
                tag = data[position]
                if tag < 128:
                    position += 1
                else:
                    tag, position = self.varint(position)
                if tag not in fields:
                    self._refuse_field(message, tag, owner)
                name, wire, many = fields[tag]
                if wire == _FIXED32:
                    value = (position, position + 4)
                    position += 4
                else:
                    value = data[position]
                    if value < 128:
                        position += 1
                    else:
                        value, position = self.varint(position)
                    if wire == _LENGTH:
                        start = position
                        position += value
                        value = (start, position)
                if many:
                    if name in found:
                        found[name].append(value)
                    else:
                        found[name] = [value]
                elif name in found:
                    self.invalid(f"{message.name} has two fields {name}, expected one")
                else:
                    found[name] = value
            else:
                self.refuse(f"has more than {MAX_FIELDS} protobuf fields, which no policy needs")
        except IndexError:  # cheaper than looking before every byte
            position = end + 1
        if position != end:
            self.invalid(f"{message.name} is cut short at byte {min(end, len(data))} of {len(data)}")
        for name in message.texts & found.keys():
            for start, end in found[name] if isinstance(found[name], list) else [found[name]]:
                self._text_bytes += end - start
                if self._text_bytes > MAX_TEXT_BYTES:
                    self.refuse(f"has more than {MAX_TEXT_BYTES} bytes of names and metadata, which no policy needs")
                if name not in _BYTES and not data[start:end].isascii():
                    self.text((start, end))
        if "metadata_props" in found:
            for entry in found["metadata_props"]:  # nobody looks at most of them, but they must be sound
                self.read(entry, ENTRY)
        return found

    def varint(self, position: int) -> tuple[int, int]:
        """Read the unsigned 64-bit number at a position; it, and the position behind it."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), position
        self.invalid(f"a number at byte {position - 10} has more than ten bytes")

    def bytes(self, span: Span | None) -> bytes:
        """The bytes of a field, none of one that is missing."""
        return b"" if span is None else self.data[span[0] : span[1]]

    def text(self, span: Span | None) -> str:
        """The text of a field, "" of one that is missing."""
        try:
            return self.bytes(span).decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.name} is not a valid ONNX file: a text in it is not UTF-8. Download or export the policy again."
            ) from error

    def _refuse_field(self, message: Message, tag: int, owner: bytes) -> NoReturn:
        number, wire = tag >> 3, tag & 7
        where = f" in {quote(owner)}" if owner else ""
        what = _REFUSED.get((message.name, number)) if wire == _LENGTH else None
        if what:
            self.refuse(f"has {what}{where}; they are not allowed in policy graphs")
        known = {known >> 3 for known in message.fields} | {n for name, n in _REFUSED if name == message.name}
        if number in known or number == 0 or wire not in (_VARINT, _FIXED64, _LENGTH, _FIXED32):
            self.invalid(f"field {number} of {message.name}{where} has wire type {wire}")
        self.invalid(f"it has a field {number} of {message.name}{where}, which ONNX does not define")


def signed(number: int) -> int:
    """The 64-bit number in two's complement."""
    return number - 2**64 if number >= 2**63 else number


def quote(text: bytes | str) -> str:
    """A name out of the file, in quotes and on one line."""
    return json.dumps(shorten(text.decode(errors="replace") if isinstance(text, bytes) else text))


def shorten(text: str) -> str:
    """At most 60 characters of a text."""
    return text if len(text) <= 60 else text[:57] + "..."

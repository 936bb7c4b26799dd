"""The gate in front of onnxruntime: what a policy graph may hold, checked on the bytes of the file.

onnxruntime trusts what it loads: it opens the files that a graph names, runs its loops, and allocates what its shapes
ask for, while loading already. So a graph is walked here first, with a reader of protobuf's wire format that knows
only the messages of ONNX which a policy can need. Everything else is refused, unknown fields included: onnxruntime
would either ignore them, and run another graph than was exported, or give them a meaning that nobody checked.

Bounded are the file (2 GiB), its protobuf fields, its texts and metadata, its nodes, every dimension of inputs, outputs
and named values, the memory of everything that depends on constants alone, which onnxruntime computes while it loads,
and the memory and the multiplications of an inference, which follow from the shapes. Nesting is bounded because no
message that can hold itself is entered, but for the two branches of one If where the caller expects one: a tick graph
runs the network in one of them, and passes a value through in the other.

The shapes are followed for two sizes of the batch, not for all. onnxruntime may also have faults of its own: a folder
whose origin you do not trust is first looked at in a process with limits, by `meam verify --untrusted`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn

from meam_policy.errors import FormatError, VersionError
from meam_policy.graph.graph_cost import Cost, Sizes
from meam_policy.graph.graph_growth import Growth
from meam_policy.graph.onnx_tensor import MAX_AXES, Tensor, holds_infinity_or_nan, read_tensor
from meam_policy.graph.onnx_wire import (
    ATTRIBUTE,
    BRANCH,
    DIMENSION,
    ENTRY,
    FUNCTION,
    GRAPH,
    MODEL,
    NODE,
    OPSET_IMPORT,
    SHAPE,
    TENSOR_TYPE,
    TYPE,
    VALUE_INFO,
    Span,
    WireReader,
    quote,
    signed,
)
from meam_policy.graph.operators import SIGNATURES, Signature

__all__ = ["GraphSummary", "check_graph"]

# The oldest: opset 17 brought LayerNormalization, and came with IR version 8. The newest: those of onnx 1.23, whose
# messages and operators the tables below were written from; onnxruntime 1.32 loads them.
IR_VERSIONS = (8, 14)
OPSETS = (17, 28)

MAX_BYTES = 2**31 - 1
"""Largest protobuf message that parsers accept."""

MAX_NODES = 100_000
"""Also the limit for initialisers. A hundred velocity evaluations of a deep network need some thousands."""

MAX_DIMENSION = 2**20

_SUBGRAPH_OPERATORS = (b"If", b"Loop", b"Scan", b"SequenceMap")
_BOUNDS = (b"Clip", b"Max", b"Min")

_SIZES = (Sizes(rows=1, others=1), Sizes(rows=16, others=4))
"""Where the costs of an inference are bounded: for one observation, and for a batch, in proportion to it."""


@dataclass(frozen=True)
class GraphSummary:
    """Contents of a policy graph.

    Attributes:
        ir_version: Version of the ONNX file format.
        opset: Version of the default domain's operators.
        metadata: The model's `metadata_props`.
        nodes: Number of nodes.
        operators: How many nodes use each operator, by name; outside the default domain with the domain, as
            in "com.microsoft.MatMulNBits".
        weight_bytes: Bytes of all initialisers, once in memory.
        weight_types: Element types of all constants, by NumPy's names, sorted.
        inputs: Names of the inputs, in order.
    """

    ir_version: int
    opset: int
    metadata: Mapping[str, str]
    nodes: int
    operators: Mapping[str, int]
    weight_bytes: int
    weight_types: tuple[str, ...]
    inputs: tuple[str, ...]


def check_graph(graph: bytes, name: str = "policy.onnx", *, conditional: bool = False) -> GraphSummary:
    """Check the bytes of an ONNX file, without onnxruntime and without opening any file.

    Infinities are allowed in constants that only Clip, Max and Min read: an action may be unbounded on one side.

    Args:
        graph: The whole file.
        name: Name of the file in error messages.
        conditional: Allow one If whose second branch is one Identity; only tick graphs have it.

    Returns:
        What the graph holds.

    Raises:
        FormatError: the file is not ONNX, holds something that policy graphs may not (external data, subgraphs,
            functions, sparse tensors, an operator that is not in `SIGNATURES` or differs from its entry, a field that
            ONNX does not define), asks for more memory than a policy can need, or has a weight that is NaN or infinite.
        VersionError: its IR version, opset or an imported domain is not supported.
    """
    return _GraphCheck(graph, name, conditional).run()


# By number of AttributeProto.AttributeType, the field that holds the value.
_ATTRIBUTE_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_GRAPH_ATTRIBUTE = 5


class _GraphCheck:
    def __init__(self, data: bytes, name: str, conditional: bool) -> None:
        self.reader = WireReader(data, name)
        self.conditional = conditional
        self.growth = Growth(self.reader)
        self.costs = [Cost(self.reader, sizes) for sizes in _SIZES]
        self.operators: Counter[bytes] = Counter()
        self.infinite: set[bytes] = set()
        self.weight_types: set[str] = set()
        self.inputs: list[str] = []
        self.defined: set[bytes] = set()
        self.closed: set[bytes] = set()
        """Names that a branch has defined, which nothing outside may read."""
        self.read: list[tuple[bytes, list[bytes]]] = []
        # Read once: the same few serve for all steps of an unrolled graph.
        self.types: dict[bytes, tuple[int | None, ...] | None] = {}
        self.dimensions: dict[bytes, int | None] = {}
        self.attributes: dict[bytes, dict[str, Any]] = {}

    def run(self) -> GraphSummary:
        reader = self.reader
        self._check_beginning()
        model = reader.read((0, len(reader.data)), MODEL)
        domains = self._check_versions(model)
        self._check_functions(model.get("functions", ()))
        weight_bytes = self._check_nodes_and_weights(reader.read(model["graph"], GRAPH))
        self._check_domains(domains)
        return GraphSummary(
            ir_version=model["ir_version"],
            opset=domains[""],
            metadata=self._entries(model.get("metadata_props", ())),
            nodes=self.operators.total(),
            operators={name.decode(): count for name, count in sorted(self.operators.items())},
            weight_bytes=weight_bytes,
            weight_types=tuple(sorted(self.weight_types)),
            inputs=tuple(self.inputs),
        )

    def _check_beginning(self) -> None:
        reader, data = self.reader, self.reader.data
        if not data:
            reader.invalid("it is empty")
        if len(data) > MAX_BYTES:
            reader.refuse(f"has {len(data)} bytes; expected at most {MAX_BYTES}")
        if data.startswith(b"version https://git-lfs"):
            raise FormatError(
                f"{reader.name} is not a valid ONNX file: it is a git-lfs pointer, not the file. Run `git lfs pull`."
            )
        if data[:100].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            reader.invalid("it looks like an HTML page, such as a login or error page")

    def _check_versions(self, model: dict[str, Any]) -> dict[str, int]:
        """The version of every domain of operators."""
        reader = self.reader
        for needed in ("ir_version", "graph", "opset_import"):
            if needed not in model:
                reader.invalid(f"it has no {needed}")
        _require_version(reader.name, "IR version", signed(model["ir_version"]), IR_VERSIONS)
        domains = self._opset_imports(model["opset_import"])
        if "" not in domains:
            reader.invalid("it has no opset_import of the default domain")
        _require_version(reader.name, "opset", domains[""], OPSETS)
        return domains

    def _check_functions(self, functions: Sequence[Span]) -> None:
        reader = self.reader
        for function in functions:
            fields = reader.read(function, FUNCTION)
            shown = _operator(reader.bytes(fields.get("domain")), reader.bytes(fields.get("name")))
            reader.refuse(f"defines the function {shown}; functions are not allowed in policy graphs")

    def _check_domains(self, domains: Mapping[str, int]) -> None:
        # After the nodes, whose refusals say which operator needs the domain.
        for domain, version in domains.items():
            if domain and (domain != "com.microsoft" or version != 1):
                raise VersionError(
                    f"{self.reader.name} imports version {version} of the operator domain {quote(domain)}; expected "
                    f"only the default domain, or version 1 of com.microsoft ({_onnxruntime()} is installed). "
                    "Export the policy again with `meam export`."
                )

    def _opset_imports(self, spans: Sequence[Span]) -> dict[str, int]:
        domains: dict[str, int] = {}
        for span in spans:
            fields = self.reader.read(span, OPSET_IMPORT)
            domain = self.reader.text(fields.get("domain"))
            domain = "" if domain == "ai.onnx" else domain
            if domain in domains:
                self.reader.invalid(f"it imports the operator domain {quote(domain)} twice")
            domains[domain] = signed(fields.get("version", 0))
        return domains

    def _entries(self, spans: Sequence[Span]) -> dict[str, str]:
        entries = (self.reader.read(span, ENTRY) for span in spans)
        return {self.reader.text(entry.get("key")): self.reader.text(entry.get("value")) for entry in entries}

    def _check_nodes_and_weights(self, graph: dict[str, list[Span]]) -> int:
        """Check the graph; the bytes of its initialisers."""
        for value in graph.get("input", ()):
            name, dimensions = self._check_value_info(value)
            self._define([name])
            self.inputs.append(name.decode(errors="replace"))
            self.growth.add_input([size for size in dimensions or () if size is not None])
            for cost in self.costs:
                cost.add_input(name, dimensions)
        weight_bytes = self._check_body(graph)
        if self.infinite:
            for operator, inputs in self.read:
                self._check_infinities(operator, inputs)
        return weight_bytes

    def _check_body(self, graph: dict[str, list[Span]]) -> int:
        """Check a graph, or a branch, but for its inputs; the bytes of its initialisers, and of those in branches."""
        reader, nodes, initializers = self.reader, graph.get("node", []), graph.get("initializer", [])
        if max(len(nodes), len(initializers)) > MAX_NODES:
            reader.refuse(f"has {len(nodes)} nodes and {len(initializers)} weights; expected at most {MAX_NODES} each")
        for value in (*graph.get("output", ()), *graph.get("value_info", ())):
            self._check_value_info(value)
        weights = [read_tensor(reader, span) for span in initializers]
        self._define([tensor.name for tensor in weights])
        for tensor in weights:
            self._check_finite(tensor, tensor.name)
            self.growth.add_weight(tensor)
            for cost in self.costs:
                cost.add_weight(tensor)
        return sum(tensor.bytes for tensor in weights) + sum(self._check_node(node) for node in nodes)

    def _define(self, names: Sequence[bytes]) -> None:
        """Define names of values; no name may be defined twice."""
        for name in names:
            if name in self.defined or name in self.closed:
                self.reader.invalid(f"{quote(name)} is defined twice")
            self.defined.add(name)

    def _check_value_info(self, span: Span) -> tuple[bytes, tuple[int | None, ...] | None]:
        """The name of a value, and its dimensions: None where they are open, or all of them if it declares none."""
        reader = self.reader
        fields = reader.read(span, VALUE_INFO)
        kind = reader.bytes(fields.get("type"))
        if kind not in self.types:
            self.types[kind] = self._read_dimensions(fields)
        return reader.bytes(fields.get("name")), self.types[kind]

    def _read_dimensions(self, value: dict[str, Any]) -> tuple[int | None, ...] | None:
        reader, name = self.reader, self.reader.bytes(value.get("name"))
        kind = reader.read(value["type"], TYPE, name) if "type" in value else {}
        tensor = reader.read(kind["tensor_type"], TENSOR_TYPE, name) if "tensor_type" in kind else {}
        if "shape" not in tensor:
            return None
        spans = reader.read(tensor["shape"], SHAPE, name).get("dim", [])
        if len(spans) > MAX_AXES:
            reader.refuse(f"has {len(spans)} axes in the shape of {quote(name)}; expected at most {MAX_AXES}")
        sizes = tuple(self._dimension(span, name) for span in spans)
        for size in sizes:
            if size is not None and not 0 <= size <= MAX_DIMENSION:
                reader.refuse(f"has the dimension {size} in {quote(name)}; expected 0 to {MAX_DIMENSION}")
        return sizes

    def _dimension(self, span: Span, name: bytes) -> int | None:
        key = self.reader.bytes(span)
        if key not in self.dimensions:
            size = self.reader.read(span, DIMENSION, name).get("dim_value")
            self.dimensions[key] = None if size is None else signed(size)
        return self.dimensions[key]

    def _check_node(self, span: Span) -> int:
        """Check a node; the bytes of the initialisers in its branches."""
        reader, data = self.reader, self.reader.data
        node = reader.read(span, NODE)
        domain, operator = reader.bytes(node.get("domain")), reader.bytes(node.get("op_type"))
        domain = b"" if domain == b"ai.onnx" else domain
        if self.conditional and not domain and operator == b"If":
            self.conditional = False  # one, and none in its branches
            return self._check_if(node)
        signature = SIGNATURES.get(domain, {}).get(operator)
        if signature is None:
            self._refuse_operator(domain, operator)
        qualified = domain + b"." + operator if domain else operator
        self.operators[qualified] += 1
        inputs = [data[start:end] for start, end in node.get("input", ())]
        outputs = [data[start:end] for start, end in node.get("output", ())]
        self._require_defined(operator, inputs)
        self._define([name for name in outputs if name])
        attributes = self._read_attributes(node.get("attribute", ()), qualified, outputs)
        self._check_signature(signature, qualified.decode(), inputs, outputs, attributes)
        self.growth.add_node(operator, inputs, outputs, attributes)
        for cost in self.costs:
            cost.add_node(operator, inputs, outputs, attributes)
        self.read.append((operator, inputs))
        return 0

    def _require_defined(self, operator: bytes, inputs: Sequence[bytes]) -> None:
        for name in inputs:
            if name and name not in self.defined:  # onnxruntime would sort the nodes, and `Growth` miss constants
                self.reader.invalid(f"{operator.decode()} reads {quote(name)}, which nothing before it defines")

    def _check_if(self, node: dict[str, Any]) -> int:
        """Check an If: one condition, one output, a second branch that is one Identity; the bytes of its weights."""
        reader, data = self.reader, self.reader.data
        inputs, outputs = ([data[start:end] for start, end in node.get(side, ())] for side in ("input", "output"))
        if len(inputs) != 1 or len(outputs) != 1:
            reader.refuse(f"has an If with {len(inputs)} inputs and {len(outputs)} outputs; expected one of each")
        self.operators[b"If"] += 1
        self._require_defined(b"If", inputs)
        branches: dict[bytes, Span] = {}
        for span in node.get("attribute", ()):
            fields = reader.read(span, BRANCH, b"If")
            if fields.get("type") != _GRAPH_ATTRIBUTE or "g" not in fields:
                reader.refuse("has an If with an attribute that is no branch")
            branches[reader.bytes(fields.get("name"))] = fields["g"]
        if len(node.get("attribute", ())) != 2 or branches.keys() != {b"then_branch", b"else_branch"}:
            reader.refuse("has an If without the two branches then_branch and else_branch")
        passing = reader.read(branches[b"else_branch"], GRAPH, b"If")
        operators = [reader.bytes(reader.read(each, NODE).get("op_type")) for each in passing.get("node", ())]
        if operators != [b"Identity"] or passing.get("initializer"):
            reader.refuse("has an If whose else_branch computes something; expected one Identity")
        begun = self._check_branch(reader.read(branches[b"then_branch"], GRAPH, b"If"))
        kept = self._check_branch(passing)
        ends = [begun[0], kept[0]]
        self._define(outputs)
        for follower in (self.growth, *self.costs):
            follower.add_node(b"Where", [inputs[0], *ends], outputs, {})  # as large as the larger of both
        self.read += [(b"If", inputs), *((b"Identity", [end]) for end in ends)]
        return begun[1] + kept[1]

    def _check_branch(self, branch: dict[str, list[Span]]) -> tuple[bytes, int]:
        """Check a branch, whose names are then closed; the name of what it returns, and the bytes of its weights."""
        reader, outside = self.reader, set(self.defined)
        if branch.get("input") or len(branch.get("output", ())) != 1:
            reader.refuse("has an If with a branch that has inputs, or not one output")
        weight_bytes = self._check_body(branch)
        end = reader.bytes(reader.read(branch["output"][0], VALUE_INFO).get("name"))
        if end not in self.defined - outside:
            reader.invalid(f"a branch of its If returns {quote(end)}, which it does not define")
        self.closed |= self.defined - outside
        self.defined = outside
        return end, weight_bytes

    def _read_attributes(
        self, spans: Sequence[Span], operator: bytes, outputs: Sequence[bytes]
    ) -> dict[bytes, dict[str, Any]]:
        attributes = dict(self._read_attribute(span, operator) for span in spans)
        if len(attributes) < len(spans):
            self.reader.invalid(f"{operator.decode()} has two attributes of the same name")
        is_constant = operator == b"Constant"
        if is_constant and (len(attributes) != 1 or len(outputs) != 1):
            self.reader.invalid("a Constant needs one attribute and one output")
        for name, fields in attributes.items():
            if "tensor" in fields and is_constant:
                self._check_finite(fields["tensor"], outputs[0])
            elif "tensor" in fields and holds_infinity_or_nan(self.reader, fields["tensor"]):
                self._refuse_values(name, f" of {operator.decode()}")
        return attributes

    def _check_signature(
        self,
        signature: Signature,
        operator: str,
        inputs: Sequence[bytes],
        outputs: Sequence[bytes],
        attributes: Mapping[bytes, dict[str, Any]],
    ) -> None:
        self._check_number(operator, "inputs", inputs, signature.inputs)
        self._check_number(operator, "outputs", outputs, signature.outputs)
        for name, fields in attributes.items():
            field = signature.attributes.get(name)
            if field is None:
                self.reader.invalid(f"{operator} has the attribute {quote(name)}, which it does not take")
            if _ATTRIBUTE_VALUES[fields["type"]] != field:
                self.reader.invalid(f"the attribute {quote(name)} of {operator} has the type {fields['type']}")
        declared = attributes.get(b"num_outputs", {}).get("i")
        if declared is not None and signed(declared) != len(outputs):
            self.reader.invalid(f"{operator} has {len(outputs)} outputs and declares {signed(declared)}")

    def _check_number(self, operator: str, what: str, names: Sequence[bytes], limits: tuple[int, int | None]) -> None:
        least, most = limits
        if len(names) < least or (most is not None and len(names) > most):
            expected = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
            self.reader.invalid(f"{operator} has {len(names)} {what}; expected {expected}")
        # Max ends the process where one of its many inputs is left out.
        if not all(names if most is None else names[:least]):
            self.reader.invalid(f"{operator} leaves out one of its {what}, which it needs")

    def _refuse_operator(self, domain: bytes, operator: bytes) -> NoReturn:
        shown = _operator(domain, operator)
        if not domain and operator in _SUBGRAPH_OPERATORS:
            self.reader.refuse(f"uses the operator {shown}, which runs subgraphs; they are not allowed")
        where = f"the domain {quote(domain)}" if domain else "the default domain"
        self.reader.refuse(f"uses the operator {shown} of {where}, which is not one that policy graphs may use")

    def _read_attribute(self, span: Span, operator: bytes) -> tuple[bytes, dict[str, Any]]:
        """An attribute's name and fields, with its tensor read."""
        reader = self.reader
        key = reader.bytes(span) if span[1] - span[0] <= 64 else b""
        fields = self.attributes.get(key)
        if fields is None:
            fields = reader.read(span, ATTRIBUTE, operator)
            self._check_attribute(fields, operator)
            if "t" in fields:
                fields["tensor"] = read_tensor(reader, fields["t"])
            elif key:
                self.attributes[key] = fields
        return reader.bytes(fields.get("name")), fields

    def _check_attribute(self, fields: dict[str, Any], operator: bytes) -> None:
        reader = self.reader
        name, kind = reader.bytes(fields.get("name")), fields.get("type", 0)
        if kind not in _ATTRIBUTE_VALUES:
            reader.refuse(f"has the attribute {quote(name)} of type {kind} in {operator.decode()}: not allowed")
        held = [field for field in _ATTRIBUTE_VALUES.values() if field in fields]
        if held not in ([], [_ATTRIBUTE_VALUES[kind]]):
            reader.invalid(f"the attribute {quote(name)} of {operator.decode()} has the type {kind} and holds {held}")
        for start, end in (*fields.get("floats", ()), *([fields["f"]] if "f" in fields else [])):
            if not math.isfinite(struct.unpack("<f", reader.data[start:end])[0]):
                self._refuse_values(name, f" of {operator.decode()}")

    def _check_finite(self, tensor: Tensor, name: bytes) -> None:
        """Refuse NaN in a constant, and remember one that has infinities: who reads it decides."""
        self.weight_types.add(tensor.element_type)
        seen = holds_infinity_or_nan(self.reader, tensor)
        if seen == "nan":
            self._refuse_values(name)
        if seen == "inf":
            self.infinite.add(name)

    def _check_infinities(self, operator: bytes, inputs: Sequence[bytes]) -> None:
        if operator not in _BOUNDS:
            for name in self.infinite.intersection(inputs):
                self._refuse_values(name, f", which {operator.decode()} reads")

    def _refuse_values(self, name: bytes, where: str = "") -> NoReturn:
        self.reader.refuse(f"has a non-finite value in {quote(name)}{where}; expected finite numbers")


def _require_version(name: str, what: str, seen: int, supported: tuple[int, int]) -> None:
    if not supported[0] <= seen <= supported[1]:
        raise VersionError(
            f"{name} has {what} {seen}; this meam-policy reads {supported[0]} to {supported[1]} "
            f"({_onnxruntime()} is installed). Upgrade meam-policy, or export the policy again."
        )


def _onnxruntime() -> str:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return "no onnxruntime"


def _operator(domain: bytes, operator: bytes) -> str:
    return quote(domain + b"." + operator if domain else operator)[1:-1]

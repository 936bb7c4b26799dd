"""The gate over ONNX files, against files that onnx itself wrote and files that nobody should write."""

import contextlib
import importlib.metadata
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from meam_policy import BoxSpec, FormatError, MeamError, PolicySpec, VersionError
from meam_policy.graph import graph_check, onnx_wire
from meam_policy.graph.graph_check import GraphSummary, check_graph
from meam_policy.graph.operators import SIGNATURES
from meam_policy.spec import Integration

INF, NAN = np.inf, np.nan


def floats(values):
    return np.asarray(values, np.float32)


def integers(values):
    return np.asarray(values, np.int64)


def value_info(name, shape, element_type=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, element_type, shape)


def make_model(nodes=None, weights=(), *, opset=20, ir_version=10, domains=(), functions=(), **graph):
    """x [batch, 4] to y, by one Identity unless nodes are given; weights are tensors or arrays by name."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])] if nodes is None else nodes
    if isinstance(weights, dict):
        weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    made = helper.make_graph(
        nodes, "g", [value_info("x", ["batch", 4])], [value_info("y", None)], initializer=list(weights), **graph
    )
    imports = [helper.make_opsetid(name, version) for name, version in (("", opset), *domains)]
    return helper.make_model(made, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def make_bytes(*arguments, **keywords):
    return make_model(*arguments, **keywords).SerializeToString()


def node(operator, *inputs, **attributes):
    return helper.make_node(operator, list(inputs), ["y"], **attributes)


def refusal(graph, kind=FormatError):
    """The message of the refusal, which keeps the error contract."""
    with pytest.raises(MeamError) as caught:
        check_graph(graph)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith("policy.onnx ")
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 400
    return message


def varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number, content):
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


GOOD = make_model(
    [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["hidden"], alpha=0.5, transB=1),
        helper.make_node("Gelu", ["hidden"], ["activated"], approximate="tanh", name="activation"),
        helper.make_node("Constant", [], ["low"], value=numpy_helper.from_array(floats([-1]))),
        helper.make_node("Clip", ["activated", "low"], ["clipped"]),
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("Concat", ["rows", "width"], ["shape"], axis=-1),
        helper.make_node("Expand", ["clipped", "shape"], ["y"]),
    ],
    {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "bias": np.array([0.5, 1, 2], np.float16),
        "width": integers([3]),
    },
    value_info=[value_info("hidden", ["batch", 3]), value_info("activated", ["batch", 3])],
)
GOOD.metadata_props.add(key="method", value="by hand ø")
GOOD_BYTES = GOOD.SerializeToString()


def onnx_constants(model):
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    held = [attribute.t for node in constants for attribute in node.attribute if attribute.name == "value"]
    return [*model.graph.initializer, *held]


def onnx_summary(graph):
    """The same summary, by onnx's own parser."""
    model = onnx.load_from_string(graph)
    names = [n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}" for n in model.graph.node]
    return GraphSummary(
        ir_version=model.ir_version,
        opset=next(i.version for i in model.opset_import if i.domain in ("", "ai.onnx")),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        nodes=len(names),
        operators=Counter(names),
        weight_bytes=sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer),
        weight_types=tuple(sorted({numpy_helper.to_array(tensor).dtype.name for tensor in onnx_constants(model)})),
        inputs=tuple(value.name for value in model.graph.input),
    )


def test_summary_is_what_onnx_reads_in_the_same_file():
    summary = check_graph(GOOD_BYTES)
    assert summary == onnx_summary(GOOD_BYTES)
    assert (summary.ir_version, summary.opset, summary.nodes, summary.weight_bytes) == (10, 20, 7, 48 + 6 + 8)
    assert summary.metadata == {"method": "by hand ø"}


def test_graph_of_a_policy_folder_passes(make_policy):
    graph = (make_policy().folder / "policy.onnx").read_bytes()
    assert check_graph(graph) == onnx_summary(graph)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("kind", ["qam", "qam-edit", "me-am"])
def test_graph_that_this_package_exports_passes(kind, precision):
    pytest.importorskip("torch")
    from meam_export.graph.policy_graph import build_graph
    from meam_training import TrainConfig
    from meam_training.networks.meam_networks import build_networks
    from meam_training.networks.policy_module import PolicyModule

    sizes = {"hidden_dims": (16, 16), "critic_hidden_dims": (8, 8), "num_critics": 2}
    config = TrainConfig.preset(kind, **sizes, **({} if kind == "qam" else {"best_of": 3}))
    spec = PolicySpec(
        integration=Integration(nfe=4, solver=config.solver, best_of=config.best_of),
        observation=(BoxSpec((3,), "float64", (-INF,) * 3, (INF,) * 3),),
        action=BoxSpec((2,), "float32", (-INF, -1.0), (1.0, INF)),
        chunk_size=3,
        execute_steps=2,
        observation_mean=(0.0,) * 3,
        observation_std=(1.0,) * 3,
        action_offset=(0.0, 0.0),
        action_scale=(1.0, 2.0),
        method=config.method,
    )
    graph = build_graph(PolicyModule(build_networks(spec, config), spec), spec, precision)
    assert check_graph(graph) == onnx_summary(graph)


# Not ONNX


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"", "is empty"),
        (b"\n  <!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
        (b"\xef\xbb\xbf<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer, not the file"),
        (b"not a graph", "field 13 of ModelProto"),
        (b"\x80\x04\x95" + bytes(50), "ModelProto"),
        (b"PK\x03\x04" + bytes(50), "ModelProto"),
        (bytes(100), "field 0"),
        (b"\x08\x0a", "has no graph"),
    ],
    ids=["empty", "HTML", "HTML with a byte order mark", "LFS pointer", "text", "pickle", "zip", "zeros", "beginning"],
)
def test_file_that_is_not_onnx_is_refused(content, seen):
    message = refusal(content)
    assert "is not a valid ONNX file" in message
    assert seen in message


def test_lfs_pointer_names_the_command_that_fetches_the_file():
    assert "Run `git lfs pull`." in refusal(b"version https://git-lfs.github.com/spec/v1\n")


def test_graph_cut_short_anywhere_is_not_a_valid_file():
    whole = onnx.ModelProto()
    whole.CopyFrom(GOOD)
    whole.ClearField("metadata_props")  # which come last, so that a file without them is whole
    lengths = set(range(len(GOOD_BYTES))) - {whole.ByteSize()}
    for length in sorted(lengths):
        assert "is not a valid ONNX file" in refusal(GOOD_BYTES[:length])


def test_file_is_called_by_the_name_given():
    with pytest.raises(FormatError, match=r"^fast\.onnx is not a valid ONNX file"):
        check_graph(b"", "fast.onnx")


def assert_refused_or_read_as_onnx_does(graph):
    try:
        summary = check_graph(graph)
    except FormatError:
        return
    assert summary == onnx_summary(graph)


MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(GOOD_BYTES) - 1), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=3
)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(MUTATIONS)
def test_changed_file_is_refused_or_read_as_onnx_reads_it(mutations):
    graph = GOOD_BYTES
    for position, removed, inserted in mutations:
        graph = graph[:position] + inserted + graph[position + removed :]
    assert_refused_or_read_as_onnx_does(graph)


@pytest.mark.slow
def test_every_flipped_bit_is_refused_or_read_as_onnx_reads_it():
    for position in range(len(GOOD_BYTES)):
        for bit in range(8):
            changed = bytearray(GOOD_BYTES)
            changed[position] ^= 1 << bit
            assert_refused_or_read_as_onnx_does(bytes(changed))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read_as_onnx_reads_them(graph):
    assert_refused_or_read_as_onnx_does(graph)


# The wire format

HEAD = b"\x08\x0a" + field(8, b"\x10\x14")  # ir_version 10, opset 20


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"\x3a" + b"\xff" * 9 + b"\x01", "cut short"),
        (b"\x3a" + b"\xff" * 4 + b"\x0f", "cut short"),
        (b"\x3a" + b"\xff" * 9 + b"\x7f", "cut short"),
        (b"\x3a" + b"\xff" * 11, "more than ten bytes"),
        (b"\x3a" + b"\x80" * 10**6, "more than ten bytes"),
        (b"\x80" * 10 + b"\x01", "more than ten bytes"),
        (b"\x3a\x05\x0a\x0a\x00\x00\x00", "cut short"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x3c", "wire type 4"),
        (b"\x3e", "wire type 6"),
        (b"\x38\x00", "field 7 of ModelProto has wire type 0"),
        (b"\x3d\x00\x00\x00\x00", "wire type 5"),
        (b"\x02\x00", "field 0"),
        (b"\x3a\x00\x3a\x00", "two fields graph"),
        (b"\x3a\x00\x08\x0a", "two fields ir_version"),
        (b"\x3a", "cut short"),
        (b"\x80", "cut short"),
        (b"\x3a\x00" + field(14, field(1, b"\xff")), "not UTF-8"),
        (b"\x3a\x00" + field(8, b"\x10\x14"), "twice"),
        (b"\x3a\x00" + field(8, b"\x0a\x07ai.onnx\x10\x14"), "twice"),
    ],
)
def test_broken_wire_format_is_refused(content, seen):
    message = refusal(HEAD + content)
    assert "is not a valid ONNX file" in message
    assert seen in message


def test_negative_numbers_of_ten_bytes_are_read():
    graph = make_bytes([node("Concat", "x", "x", axis=-1)])
    assert b"\xff" * 9 + b"\x01" in graph
    assert check_graph(graph).operators == {"Concat": 1}


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (field(99, b""), "field 99 of ModelProto"),
        (b"\x48\x01", "field 9 of ModelProto"),
        (field(7, field(3, b"")), "field 3 of GraphProto"),
        (field(7, field(1, field(4, b"Add") + field(11, b""))), "field 11 of NodeProto"),
        (field(7, field(5, field(15, b""))), "field 15 of TensorProto"),
        (field(7, field(11, field(1, b"x") + field(2, field(3, b"")))), 'field 3 of TypeProto in "x"'),
    ],
)
def test_field_that_onnx_does_not_define_is_refused(content, seen):
    message = refusal(HEAD + content)
    assert seen in message
    assert "does not define" in message


def test_harmless_texts_are_allowed():
    model = onnx.ModelProto()
    model.CopyFrom(GOOD)
    model.doc_string = model.domain = model.producer_version = "text"
    model.model_version = 3
    graph = model.graph
    for part in (graph, graph.node[0], graph.initializer[0], graph.input[0], graph.value_info[0]):
        part.doc_string = "text"
        part.metadata_props.add(key="key", value="value")
    graph.node[0].attribute[0].doc_string = "text"
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    assert check_graph(model.SerializeToString()) == onnx_summary(GOOD_BYTES)


# What policies may not hold


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "weights.bin"])
def test_external_data_is_refused_and_no_file_is_opened(location, monkeypatch):
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    graphs = [make_bytes(weights=[tensor]), make_bytes([node("Constant", value=tensor)])]

    def refuse_to_open(*arguments, **keywords):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", refuse_to_open)
    monkeypatch.setattr("os.open", refuse_to_open)
    for graph in graphs:
        message = refusal(graph)
        assert "external tensor data is not allowed" in message
        assert '"w"' in message


@pytest.mark.parametrize("place", ["entry without location", "location without entry", "location beyond 32 bits"])
def test_external_data_is_refused_by_either_of_its_fields(place):
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    if place == "entry without location":
        tensor.external_data.add(key="location", value="x")
    elif place == "location without entry":
        tensor.data_location = TensorProto.EXTERNAL
    written = tensor.SerializeToString()
    if place == "location beyond 32 bits":  # which protobuf cuts off
        written += b"\x70" + varint(2**32 + 1)
    graph = HEAD + field(7, field(5, written))
    assert "external tensor data is not allowed" in refusal(graph)


def test_tensor_that_says_it_is_inside_the_file_is_allowed():
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    tensor.data_location = TensorProto.DEFAULT
    assert b"\x70\x00" in tensor.SerializeToString()
    assert check_graph(make_bytes(weights=[tensor])).weight_bytes == 4


def subgraph():
    return helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [])


@pytest.mark.parametrize("operator", ["Loop", "If", "Scan", "SequenceMap"])
def test_operators_that_run_subgraphs_are_refused_by_name(operator):
    message = refusal(make_bytes([node(operator, "x", body=subgraph())]))
    assert f"operator {operator}," in message
    assert "subgraphs" in message


def test_endless_loop_is_refused_without_being_run(make_policy):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["again"])],
        "body",
        [value_info("i", [], TensorProto.INT64), value_info("go_on", [], TensorProto.BOOL)],
        [value_info("again", [], TensorProto.BOOL)],
    )
    linear = make_policy()
    linear.replace_graph(make_bytes([helper.make_node("Loop", ["", "true"], [], body=body)], {"true": np.array(True)}))
    with pytest.raises(FormatError, match="Loop"):
        check_graph((linear.folder / "policy.onnx").read_bytes())


@pytest.mark.parametrize("attributes", [{"body": subgraph()}, {"bodies": [subgraph(), subgraph()]}])
def test_subgraph_of_an_allowed_operator_is_refused_with_its_name(attributes):
    message = refusal(make_bytes([node("Identity", "x", **attributes)]))
    assert 'subgraphs in "Identity"' in message


@pytest.mark.parametrize(
    ("domain", "operator"),
    [
        ("", "Pad"),
        ("", "RandomNormal"),
        ("", "NonZero"),
        ("", "SequenceConstruct"),
        ("", "MatMulNBits"),
        ("com.microsoft", "Add"),
        ("com.microsoft", "BeamSearch"),
        ("ai.onnx.ml", "TreeEnsemble"),
        ("my.own", "Add"),
    ],
)
def test_operator_outside_the_list_is_refused_with_its_domain(domain, operator):
    domains = [(domain, 1)] if domain else []
    message = refusal(make_bytes([helper.make_node(operator, ["x"], ["y"], domain=domain)], domains=domains))
    assert operator in message
    assert (f'"{domain}"' if domain else "the default domain") in message


def test_operator_names_cannot_break_the_message():
    assert len(refusal(make_bytes([node("\n" + "x" * 10_000, "x")]))) < 400


@pytest.mark.parametrize("operator", ["MatMulNBits", "DynamicQuantizeMatMul"])
def test_quantised_products_are_allowed_and_counted_by_domain(operator):
    nodes = [helper.make_node(operator, ["x", "x", "x"], ["y"], domain="com.microsoft")]
    assert check_graph(make_bytes(nodes, domains=[("com.microsoft", 1)])).operators == {f"com.microsoft.{operator}": 1}


def test_default_domain_may_be_called_by_its_long_name():
    model = make_model([helper.make_node("Neg", ["x"], ["y"], domain="ai.onnx")])
    model.opset_import[0].domain = "ai.onnx"
    summary = check_graph(model.SerializeToString())
    assert (summary.opset, summary.operators) == (20, {"Neg": 1})


def test_allowed_operators_are_those_of_onnx():
    """Numbers of inputs and outputs, and attributes: as wide as any of the opsets that are read."""
    fields = {"FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t"}
    fields |= {"FLOATS": "floats", "INTS": "ints", "STRINGS": "strings"}
    for operator, signature in SIGNATURES[b""].items():
        first, last = graph_check.OPSETS
        name = operator.decode()
        opsets = [opset for opset in range(first, last + 1) if onnx.defs.has(name, opset)]
        schemas = [onnx.defs.get_schema(name, opset) for opset in opsets]
        assert not any(schema.deprecated for schema in schemas), operator
        inputs = min(s.min_input for s in schemas), max(s.max_input for s in schemas)
        outputs = min(s.min_output for s in schemas), max(s.max_output for s in schemas)
        endless = 2**31 - 1
        assert signature.inputs == (inputs[0], None if inputs[1] == endless else inputs[1]), operator
        assert signature.outputs == (outputs[0], None if outputs[1] == endless else outputs[1]), operator
        kinds = {name: str(a.type).rpartition(".")[2] for schema in schemas for name, a in schema.attributes.items()}
        assert "GRAPH" not in kinds.values(), operator
        known = {name.encode(): fields[kind] for name, kind in kinds.items() if kind in fields}
        assert signature.attributes == known, operator


def test_functions_are_refused_with_domain_and_name():
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    nodes = [helper.make_node("Twice", ["x"], ["y"], domain="local")]
    message = refusal(make_bytes(nodes, domains=[("local", 1)], functions=[function]))
    assert "the function local.Twice" in message


def forbid_training(model):
    model.training_info.add()


def forbid_model_devices(model):
    model.configuration.add(name="two devices")


def forbid_quantization_annotation(model):
    model.graph.quantization_annotation.add(tensor_name="x")


def sparse():
    values = numpy_helper.from_array(floats([1]), "s")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(integers([2]), "i"), [4])


def forbid_sparse_initializer(model):
    model.graph.sparse_initializer.add().CopyFrom(sparse())


def forbid_sparse_constant(model):
    model.graph.node[0].attribute.append(helper.make_attribute("sparse_value", sparse()))


def forbid_overload(model):
    model.graph.node[0].overload = "other"


def forbid_node_devices(model):
    model.graph.node[0].device_configurations.add(configuration_id="x")


def forbid_reference(model):
    model.graph.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="outer")


def forbid_type(model):
    model.graph.node[0].attribute.append(helper.make_attribute("dtype", model.graph.input[0].type))


def forbid_tensors(model):
    model.graph.node[0].attribute.append(helper.make_attribute("all", [numpy_helper.from_array(np.zeros(1))]))


def forbid_attribute_type(model):
    model.graph.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.GRAPH, i=1)


def forbid_segment(model):
    model.graph.initializer.add(name="w", data_type=1, dims=[0]).segment.begin = 0


def forbid_sequence(model):
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1]))


def forbid_optional(model):
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    model.graph.value_info.append(helper.make_value_info("o", helper.make_optional_type_proto(inner)))


@pytest.mark.parametrize(
    ("forbid", "what"),
    [
        (forbid_training, "training information"),
        (forbid_model_devices, "device configurations"),
        (forbid_quantization_annotation, "quantization annotations"),
        (forbid_sparse_initializer, "sparse initializers"),
        (forbid_sparse_constant, "sparse tensors"),
        (forbid_overload, "function overloads"),
        (forbid_node_devices, "device configurations"),
        (forbid_reference, "attribute references"),
        (forbid_type, "type attributes"),
        (forbid_tensors, "lists of tensors"),
        (forbid_attribute_type, "of type 5"),
        (forbid_segment, "tensor segments"),
        (forbid_sequence, "sequences"),
        (forbid_optional, "optional values"),
    ],
)
def test_other_parts_of_onnx_are_refused(forbid, what):
    model = make_model()
    forbid(model)
    assert what in refusal(model.SerializeToString())


def test_constant_with_two_values_or_an_attribute_twice_is_refused():
    assert "one attribute" in refusal(make_bytes([node("Constant", value_int=1, value_float=2.0)]))
    twice = node("Gemm", "x", "x", alpha=1.0)
    twice.attribute.append(helper.make_attribute("alpha", 2.0))
    assert "two attributes" in refusal(make_bytes([twice]))


def test_attribute_holds_what_its_type_says():
    model = make_model([node("Constant", value_ints=[2**40])])
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(integers([1])))
    assert 'attribute "value_ints" of Constant has the type 7' in refusal(model.SerializeToString())


@pytest.mark.parametrize("place", ["weights", "weight and input", "weight and node", "nodes", "outputs of a node"])
def test_name_defined_twice_is_refused(place):
    one = numpy_helper.from_array(np.ones(1), "x" if place == "weight and input" else "w")
    weights = [one, one] if place == "weights" else [one] if place.startswith("weight") else []
    nodes = [helper.make_node("Neg", ["x"], ["w"])] if place in ("weight and node", "nodes") else []
    nodes += [helper.make_node("Split", ["x"], ["w", "w"])] if place == "outputs of a node" else []
    nodes += nodes if place == "nodes" else []
    name = '"x"' if place == "weight and input" else '"w"'
    assert f"{name} is defined twice" in refusal(make_bytes(nodes, weights))


def test_value_defined_later_or_nowhere_is_refused():
    backwards = [helper.make_node("Neg", ["z"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    assert 'Neg reads "z"' in refusal(make_bytes(backwards))
    check_graph(make_bytes(backwards[::-1]))
    assert 'Add reads "q"' in refusal(make_bytes([node("Add", "x", "q")]))


ODD_NODES = {
    "Split has 3 outputs and declares 2": helper.make_node("Split", ["x"], ["a", "b", "c"], num_outputs=2),
    "Neg has 2 inputs; expected 1": helper.make_node("Neg", ["x", "x"], ["y"]),
    "Neg has 0 outputs; expected 1": helper.make_node("Neg", ["x"], []),
    "Concat has 0 inputs; expected 1 or more": helper.make_node("Concat", [], ["y"], axis=0),
    "Clip has 4 inputs; expected 1 to 3": helper.make_node("Clip", ["x"] * 4, ["y"]),
    "Mul leaves out one of its inputs": helper.make_node("Mul", ["x", ""], ["y"]),
    "TopK leaves out one of its outputs": helper.make_node("TopK", ["x", "x"], ["", "i"]),
    "Max leaves out one of its inputs": helper.make_node("Max", ["x", "x", ""], ["y"]),
    'Relu has the attribute "axis", which it does not take': helper.make_node("Relu", ["x"], ["y"], axis=1),
    'the attribute "perm" of Transpose has the type 2': helper.make_node("Transpose", ["x"], ["y"], perm=1),
}


@pytest.mark.parametrize("message", ODD_NODES)
def test_nodes_that_onnx_does_not_have_are_refused(message):
    assert message in refusal(make_bytes([ODD_NODES[message]]))


def test_every_text_is_utf_8():
    model = make_model([node("Neg", "x")])
    model.graph.value_info.append(value_info("v", ["batch"]))
    data = model.SerializeToString()
    for text in (b"batch", b"Neg", b"x"):
        assert "a text in it is not UTF-8" in refusal(data.replace(text, b"\xe8" + text[1:]))


def test_optional_inputs_may_be_left_out():
    check_graph(make_bytes([helper.make_node("Clip", ["x", "", "x"], ["y"])]))
    check_graph(make_bytes([helper.make_node("Split", ["x"], ["a", "b"], num_outputs=2)]))


# Versions


def installed_onnxruntime():
    return f"onnxruntime {importlib.metadata.version('onnxruntime')}"


@pytest.mark.parametrize(("ir_version", "opset"), [(8, 17), (9, 20), (10, 21), (13, 26), (14, 28)])
def test_supported_versions_pass(ir_version, opset):
    summary = check_graph(make_bytes(opset=opset, ir_version=ir_version))
    assert (summary.ir_version, summary.opset) == (ir_version, opset)


@pytest.mark.parametrize("ir_version", [0, 7, 15, 2**40, -1])
def test_other_ir_versions_are_refused_with_the_supported_ones(ir_version):
    message = refusal(make_bytes(ir_version=ir_version), VersionError)
    assert f"IR version {ir_version};" in message
    assert "8 to 14" in message
    assert installed_onnxruntime() in message


@pytest.mark.parametrize("opset", [0, 16, 29, -1])
def test_other_opsets_are_refused_with_the_supported_ones(opset):
    message = refusal(make_bytes(opset=opset), VersionError)
    assert f"opset {opset};" in message
    assert "17 to 28" in message
    assert installed_onnxruntime() in message


@pytest.mark.parametrize(("domain", "version"), [("my.own", 1), ("ai.onnx.ml", 3), ("com.microsoft", 2)])
def test_import_of_another_domain_is_refused(domain, version):
    message = refusal(make_bytes(domains=[(domain, version)]), VersionError)
    assert f'version {version} of the operator domain "{domain}"' in message
    assert installed_onnxruntime() in message


def test_missing_onnxruntime_is_said(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "no onnxruntime is installed" in refusal(make_bytes(opset=16), VersionError)


def test_model_without_default_domain_or_graph_is_not_valid():
    model = make_model()
    model.opset_import[0].domain = "com.microsoft"
    assert "default domain" in refusal(model.SerializeToString())
    model = make_model()
    model.ClearField("graph")
    assert "has no graph" in refusal(model.SerializeToString())


# Numbers that are not finite

BFLOAT16 = {NAN: b"\xc0\x7f", INF: b"\x80\x7f", -INF: b"\x80\xff", 3.0: b"\x40\x40"}


def typed_or_raw(values, element_type, raw):
    if element_type == TensorProto.BFLOAT16:
        content = b"".join(BFLOAT16[value] for value in values)
        return helper.make_tensor("w", element_type, [len(values)], content, raw=True)
    array = np.array(values, helper.tensor_dtype_to_np_dtype(element_type))
    return numpy_helper.from_array(array, "w") if raw else helper.make_tensor("w", element_type, array.shape, array)


ELEMENT_TYPES = [
    (TensorProto.FLOAT, True),
    (TensorProto.FLOAT, False),
    (TensorProto.DOUBLE, True),
    (TensorProto.DOUBLE, False),
    (TensorProto.FLOAT16, True),
    (TensorProto.BFLOAT16, True),
]


@pytest.mark.parametrize(("element_type", "raw"), ELEMENT_TYPES)
def test_weights_that_are_not_finite_are_refused_with_their_name(element_type, raw):
    for value in (NAN, INF, -INF):
        tensor = typed_or_raw([3.0, value, 3.0], element_type, raw)
        message = refusal(make_bytes([node("Add", "x", "w")], [tensor]))
        assert 'non-finite value in "w"' in message
    check_graph(make_bytes([node("Add", "x", "w")], [typed_or_raw([3.0, 3.0], element_type, raw)]))


@pytest.mark.parametrize(("element_type", "raw"), ELEMENT_TYPES)
def test_bounds_may_be_infinite_but_not_nan(element_type, raw):
    for operator in ("Min", "Max", "Clip"):
        for value in (INF, -INF):
            check_graph(make_bytes([node(operator, "x", "w")], [typed_or_raw([3.0, value], element_type, raw)]))
        message = refusal(make_bytes([node(operator, "x", "w")], [typed_or_raw([NAN, INF], element_type, raw)]))
        assert 'non-finite value in "w"' in message


def test_infinite_bounds_that_something_else_reads_too_are_refused():
    nodes = [helper.make_node("Max", ["x", "low"], ["z"]), helper.make_node("Add", ["z", "low"], ["y"])]
    message = refusal(make_bytes(nodes, {"low": floats([-INF])}))
    assert 'non-finite value in "low", which Add reads' in message


def test_constants_of_nodes_are_held_to_the_same_rule():
    def graph(value, reader):
        constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(floats([value])))
        return make_bytes([constant, node(reader, "x", "c")])

    check_graph(graph(INF, "Min"))
    check_graph(graph(1, "Add"))
    assert 'non-finite value in "c", which Add reads' in refusal(graph(INF, "Add"))
    assert 'non-finite value in "c"' in refusal(graph(NAN, "Min"))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_attributes_that_are_not_finite_are_refused(value):
    filling = numpy_helper.from_array(floats([value]))
    for attributes in ({"alpha": float(value)}, {"alphas": [1.0, float(value)]}, {"value": filling}):
        name = next(iter(attributes))
        message = refusal(make_bytes([node("ConstantOfShape", "s", **attributes)], {"s": integers([1])}))
        assert f'non-finite value in "{name}" of ConstantOfShape' in message


def test_an_attribute_allowed_in_one_operator_is_checked_in_the_next():
    infinite = numpy_helper.from_array(floats([INF]))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=infinite),
        helper.make_node("ConstantOfShape", ["s"], ["y"], value=infinite),
    ]
    assert "ConstantOfShape" in refusal(make_bytes(nodes, {"s": integers([1])}))


@settings(max_examples=300, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_any_bits_are_finite_where_numpy_says_so(bits, dtype):
    array = np.array(bits, np.uint64).view(dtype)
    graph = make_bytes([node("Add", "x", "w")], {"w": array})
    if np.isfinite(array).all():
        assert check_graph(graph).weight_bytes == array.nbytes
    else:
        assert "non-finite" in refusal(graph)


@pytest.mark.parametrize("position", [0, 2**16 - 1, 2**16, 200_000])
def test_the_last_of_many_weights_is_looked_at(position):
    weights = np.ones(200_001, np.float32)
    weights[position] = NAN
    assert "non-finite" in refusal(make_bytes(weights={"w": weights}))


# Tensors


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.float32),
        np.zeros((), np.float32),
        np.zeros((3, 0), np.float32),
        integers([-1, 2**40]),
        np.array([0, 255], np.uint8),
        np.array([True]),
        np.array([2**63], np.uint64),
        np.array([-3], np.int16),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_any_shape_and_storage_are_read(array, raw):
    element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    typed = helper.make_tensor("w", element_type, array.shape, array.ravel())
    graph = make_bytes(weights=[numpy_helper.from_array(array, "w") if raw else typed])
    assert check_graph(graph).weight_bytes == array.nbytes


def test_four_bit_weights_take_half_a_byte():
    tensor = TensorProto(name="w", data_type=TensorProto.UINT4, dims=[5], raw_data=bytes(3))
    assert check_graph(make_bytes(weights=[tensor])).weight_bytes == 3


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"dims": [3]}, "does not have the 3 elements"),
        ({"dims": [2**20, 2**20]}, "does not have the"),
        ({"dims": []}, "does not have the 1 elements"),
        ({"dims": [1] * 17 + [2]}, "at most 16 sizes"),
        ({"dims": [2**62, 0]}, "below 2**31"),
        ({"dims": [-2]}, "[-2]"),
        ({"raw_data": bytes(9)}, "does not have the 2 elements"),
        ({"float_data": [1, 2]}, "raw_data and float_data"),
        ({"data_type": TensorProto.STRING}, "element type 8"),
        ({"data_type": TensorProto.COMPLEX64}, "element type 14"),
        ({"data_type": TensorProto.FLOAT8E4M3FN}, "element type 17"),
        ({"data_type": TensorProto.UNDEFINED}, "element type 0"),
        ({"data_type": 1000}, "element type 1000"),
    ],
)
def test_tensor_that_does_not_fit_its_type_and_shape_is_refused(changes, seen):
    good = {"name": "w", "data_type": TensorProto.FLOAT, "dims": [2], "raw_data": bytes(8)}
    message = refusal(make_bytes(weights=[TensorProto(**{**good, **changes})]))
    assert seen in message
    assert '"w"' in message


def test_numbers_of_varying_length_are_counted():
    tensor = helper.make_tensor("w", TensorProto.INT64, [3], [1, -1, 300])
    tensor.dims[0] = 4
    assert "does not have the 4 elements" in refusal(make_bytes(weights=[tensor]))
    unfinished = field(8, b"w") + b"\x10\x07\x08\x01" + field(7, b"\x01\x80")
    assert "does not have the 1 elements" in refusal(HEAD + field(7, field(5, unfinished)))


@pytest.mark.parametrize("place", ["input", "output", "value_info"])
@pytest.mark.parametrize(("size", "good"), [(0, True), (2**20, True), (2**20 + 1, False), (-1, False), (2**62, False)])
def test_declared_dimensions_are_bounded(place, size, good):
    model = make_model()
    getattr(model.graph, place).append(value_info("v", ["n", size]))
    if good:
        check_graph(model.SerializeToString())
    else:
        assert f'dimension {size} in "v"' in refusal(model.SerializeToString())


def test_declared_axes_are_bounded():
    assert "17 axes" in refusal(make_bytes(value_info=[value_info("v", [1] * 17)]))


@pytest.mark.parametrize("element_type", [TensorProto.DOUBLE, TensorProto.INT32])
def test_inputs_of_another_type_or_batch_are_left_to_the_session(make_policy, element_type):
    linear = make_policy(element_type=element_type, weight=np.zeros((3, 8)), noise_weight=np.zeros((8, 8)), batch=2)
    check_graph((linear.folder / "policy.onnx").read_bytes())


# Growth

LIMIT = 2**24


def expansions(size):
    """Graphs that make an array of `size` out of constants, by every way in which operators expand."""
    shape = {"s": integers([size])}
    return {
        "ConstantOfShape": make_bytes([node("ConstantOfShape", "s")], shape),
        "Expand": make_bytes([node("Expand", "x", "s")], shape),
        "Tile": make_bytes([node("Tile", "x", "s")], shape),
        "Range": make_bytes(
            [node("Range", "a", "b", "c")], {"a": integers(-1), "b": integers(size - 1), "c": integers(1)}
        ),
        "two factors": make_bytes([node("ConstantOfShape", "s")], {"s": integers([size // 2**10, 2**10])}),
        "int64_data": make_bytes(
            [node("ConstantOfShape", "s")], [helper.make_tensor("s", TensorProto.INT64, [1], [size])]
        ),
        "Constant": make_bytes(
            [helper.make_node("Constant", [], ["s"], value_ints=[size]), node("ConstantOfShape", "s")]
        ),
        "Constant tensor": make_bytes(
            [
                helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(integers([size]))),
                node("ConstantOfShape", "s"),
            ]
        ),
        "Concat": make_bytes(
            [helper.make_node("Concat", ["s", "s"], ["t"], axis=0), node("ConstantOfShape", "t")],
            {"s": integers([int(size**0.5)])},
        ),
        "Gather": make_bytes(
            [helper.make_node("Gather", ["s", "i"], ["t"]), node("ConstantOfShape", "t")],
            {"s": integers([int(size**0.25)]), "i": integers([0, 0, 0, 0])},
        ),
        "Mul": make_bytes(
            [helper.make_node("Mul", ["s", "s"], ["t"]), node("ConstantOfShape", "t")],
            {"s": integers([int(size**0.5)])},
        ),
        "carried": make_bytes(
            [
                helper.make_node("Unsqueeze", ["s", "axes"], ["t"]),
                helper.make_node("Squeeze", ["t", "axes"], ["u"]),
                node("ConstantOfShape", "u"),
            ],
            {**shape, "axes": integers([0])},
        ),
        "outer product": make_bytes(
            [
                helper.make_node("ConstantOfShape", ["s"], ["c"]),
                helper.make_node("ConstantOfShape", ["t"], ["d"]),
                node("MatMul", "c", "d"),
            ],
            {"s": integers([int(size**0.5), 1]), "t": integers([1, int(size**0.5)])},
        ),
    }


WAYS = sorted(expansions(LIMIT))


@pytest.mark.parametrize("way", WAYS)
def test_expansion_of_constants_is_bounded(way):
    check_graph(expansions(LIMIT // 4)[way])
    for size in (4 * LIMIT, 2**40):
        message = refusal(expansions(size)[way])
        assert "more than" in message
        assert "numbers" in message


def test_expansions_of_constants_are_bounded_together():
    def graph(count):
        nodes = [helper.make_node("ConstantOfShape", ["s"], [f"c{i}"]) for i in range(count)]
        return make_bytes(nodes, {"s": integers([LIMIT // 8])})

    check_graph(graph(8))
    assert "out of constants" in refusal(graph(9))


def test_doubled_constants_are_refused_before_they_are_large():
    nodes = [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(30)]
    assert "out of constants" in refusal(make_bytes(nodes, {"c0": np.zeros(1, np.float32)}))


def test_negative_and_zero_sizes_do_not_hide_large_ones():
    for shape in ([-1, 2**40], [0, 2**40], [-(2**40)]):
        assert "more than" in refusal(make_bytes([node("ConstantOfShape", "s")], {"s": integers(shape)}))


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile", "Range"])
def test_shape_out_of_computed_values_is_refused(operator):
    inputs = {"ConstantOfShape": ["s"], "Expand": ["x", "s"], "Tile": ["x", "s"], "Range": ["s", "s", "s"]}[operator]
    nodes = [helper.make_node("Cast", ["x"], ["s"], to=7), node(operator, *inputs)]
    message = refusal(make_bytes(nodes))
    assert f"{operator} that takes its shape from computed values" in message


def sized_by_inputs(dimensions, constant):
    """A constant expanded by that many dimensions of inputs and one constant."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n"] * dimensions + ["s"], ["shape"], axis=0),
        node("ConstantOfShape", "shape"),
    ]
    return make_bytes(nodes, {"s": integers([constant])})


@pytest.mark.parametrize(
    ("dimensions", "constant", "good"), [(1, 1, 1), (1, 2**22, 1), (2, 2**12, 1), (1, 2**25, 0), (3, 17, 0), (4, 1, 0)]
)
def test_shapes_made_of_dimensions_are_bounded(dimensions, constant, good):
    graph = sized_by_inputs(dimensions, constant)
    if good:
        check_graph(graph)
    else:
        assert "more than" in refusal(graph)


def test_sizes_that_a_cast_could_wrap_are_refused():
    nodes = [
        helper.make_node("Cast", ["s"], ["small"], to=TensorProto.UINT16),
        helper.make_node("Cast", ["small"], ["large"], to=TensorProto.INT64),
        node("ConstantOfShape", "large"),
    ]
    assert "computed values" in refusal(make_bytes(nodes, {"s": integers([-1, -1, -1])}))


def test_transposed_and_dequantised_weights_are_no_growth():
    weights = {"w": np.zeros((300, 300), np.uint8), "scale": floats(1)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"]),
        node("MatMul", "x", "t"),
    ]
    check_graph(make_bytes(nodes, weights))


@pytest.mark.parametrize("inputs", [[], [""], ["", "w"], ["w"], ["x"], ["w"] * 4, ["x"] * 4], ids=str)
def test_nodes_with_too_few_or_odd_inputs_end_in_a_summary_or_a_refusal(inputs):
    for operator in sorted({**SIGNATURES[b""], **SIGNATURES[b"com.microsoft"]}):
        domain = "" if operator in SIGNATURES[b""] else "com.microsoft"
        made = helper.make_node(operator.decode(), inputs, [], domain=domain)
        graph = make_bytes([made], {"w": integers([2])}, domains=[("com.microsoft", 1)])
        with contextlib.suppress(FormatError):
            assert check_graph(graph).nodes == 1, operator


# Numbers of things, and work


def test_nodes_weights_and_fields_are_limited(monkeypatch):
    monkeypatch.setattr(graph_check, "MAX_NODES", 6)
    assert "7 nodes" in refusal(GOOD_BYTES)
    monkeypatch.setattr(graph_check, "MAX_NODES", 7)
    check_graph(GOOD_BYTES)
    assert "8 weights" in refusal(make_bytes(weights={f"w{i}": np.zeros(1) for i in range(8)}))
    monkeypatch.setattr(onnx_wire, "MAX_FIELDS", 50)
    assert "more than 50 protobuf fields" in refusal(GOOD_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [field(7, b"\x0a\x00" * 2_200_000), field(7, b"") + b"\x72\x00" * 2_200_000],
    ids=["nodes", "metadata"],
)
def test_millions_of_empty_messages_are_refused_by_their_number(content):
    assert "protobuf fields" in refusal(HEAD + content)


def test_weights_are_checked_by_thousands_at_a_time():
    graph = make_bytes(weights={f"w{i}": np.ones((500, 500), np.float32) for i in range(10)})
    calls = Counter()
    profiler = sys.getprofile()
    sys.setprofile(lambda frame, event, function: calls.update([event]))
    try:
        check_graph(graph)
    finally:
        sys.setprofile(profiler)
    assert 0 < calls["call"] + calls["c_call"] < 2_500_000 / 500


def test_a_good_policy_loads_and_acts_after_refusals(make_policy):
    for graph in (b"", GOOD_BYTES[:-9], *(expansions(2**40).values()), make_bytes([node("Loop", "x")])):
        refusal(graph)
    good = make_policy()
    np.testing.assert_array_equal(good.load().act(np.ones(3), deterministic=True), good.chunks([np.ones(3)])[0, 0])

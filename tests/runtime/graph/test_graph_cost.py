"""The cost of an inference, told from shapes alone: against what onnxruntime computes, and for graphs that explode."""

import itertools
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from meam_policy import BoxSpec, FormatError, PolicySpec
from meam_policy.graph import graph_check, onnx_wire
from meam_policy.graph.graph_check import check_graph
from meam_policy.graph.graph_cost import Cost, Sizes
from meam_policy.graph.operators import SIGNATURES
from meam_policy.spec import Integration

LIMIT_S = 5.0


def ints(*values):
    return np.array(values, np.int64)


def node(operator, inputs, outputs="y", **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def graph_of(nodes, weights=None, inputs=None, opset=20):
    inputs = inputs or {"x": ["batch", 4]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def refusal(graph):
    began = time.monotonic()
    with pytest.raises(FormatError) as caught:
        check_graph(graph)
    assert time.monotonic() - began < LIMIT_S
    return str(caught.value)


def followed(graph, sizes, monkeypatch):
    """The shapes that the gate tells, and whether they are of whole numbers, by the name of the value."""
    kept = []

    class Kept(Cost):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(graph_check, "Cost", Kept)
    monkeypatch.setattr(graph_check, "_SIZES", (sizes,))
    check_graph(graph)
    return {name.decode(): (value.shape, value.whole) for name, value in kept[0].values.items() if name}


def computed(graph, sizes):
    """The shapes that onnxruntime computes, and whether of whole numbers."""
    model = onnx.load_from_string(graph)
    names = [name for made in model.graph.node for name in made.output if name]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        open_sizes = itertools.chain([sizes.rows], itertools.repeat(sizes.others))
        shape = [n if isinstance(n, int) else m for n, m in zip(value.shape, open_sizes, strict=False)]
        feeds[value.name] = np.ones(shape, np.float32)
    arrays = map(np.asarray, session.run(None, feeds))
    return dict(zip(names, ((np.shape(array), array.dtype.kind in "iu") for array in arrays), strict=True))


PACKED = {"packed": np.zeros((8, 1, 16), np.uint8), "scales": np.ones(8, np.float32)}
NODES: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "ArgMax": ([node("ArgMax", "x", axis=1, keepdims=0)], {}),
    "ArgMin": ([node("ArgMin", "x", axis=-1)], {}),
    "CastLike": ([node("CastLike", "x k")], {"k": ints(1)}),
    "Clip": ([node("Clip", "x k")], {"k": np.float32(0)}),
    "Concat": ([node("Concat", "x k", axis=0)], {"k": np.ones((3, 4), np.float32)}),
    "ConstantOfShape": ([node("Shape", "x", "s"), node("ConstantOfShape", "s")], {}),
    "DequantizeLinear": ([node("DequantizeLinear", "w k")], {"w": np.ones((3, 2), np.uint8), "k": np.float32(1)}),
    "DynamicQuantizeLinear": ([node("DynamicQuantizeLinear", "x", "y scale zero")], {}),
    "Expand": ([node("Unsqueeze", "x k", "u"), node("Expand", "u s")], {"k": ints(1), "s": ints(3, 1)}),
    "Flatten": ([node("Unsqueeze", "x k", "u"), node("Flatten", "u", axis=2)], {"k": ints(1)}),
    "Flatten from the end": ([node("Flatten", "x", axis=-1)], {}),
    "Gather": ([node("Gather", "x k", axis=1)], {"k": ints(0, 3, 0).reshape(3, 1)}),
    "Gather one": ([node("Gather", "x k", axis=-1)], {"k": np.int64(2)}),
    "GatherElements": ([node("GatherElements", "w k", axis=1)], {"w": np.ones((3, 4)), "k": ints(0, 1).reshape(2, 1)}),
    "GatherND": ([node("GatherND", "w k", batch_dims=1)], {"w": np.ones((3, 4, 5)), "k": ints(0, 1, 2).reshape(3, 1)}),
    "Gemm": ([node("Gemm", "x w b", transB=1)], {"w": np.ones((6, 4), np.float32), "b": np.ones(6, np.float32)}),
    "Gemm of columns": ([node("Gemm", "x x", transA=1)], {}),
    "LayerNormalization": ([node("LayerNormalization", "x k", "y mean std")], {"k": np.ones(4, np.float32)}),
    "MatMul": ([node("MatMul", "x w")], {"w": np.ones((5, 4, 3), np.float32)}),
    "MatMul of a vector": ([node("MatMul", "w x")], {"w": np.ones((2, 1), np.float32)}),
    "MatMul with a vector": ([node("MatMul", "x w")], {"w": np.ones(4, np.float32)}),
    "MatMulInteger": (
        [node("DynamicQuantizeLinear", "x", "q scale zero"), node("MatMulInteger", "q w")],
        {"w": np.ones((4, 3), np.uint8)},
    ),
    "MatMulNBits": (
        [
            helper.make_node(
                "MatMulNBits", ["x", *PACKED], ["y"], domain="com.microsoft", K=4, N=8, bits=8, block_size=16
            )
        ],
        PACKED,
    ),
    "DynamicQuantizeMatMul": (
        [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "k"], ["y"], domain="com.microsoft")],
        {"w": np.ones((4, 3), np.uint8), "k": np.ones(1, np.float32)},
    ),
    "QuantizeLinear": ([node("QuantizeLinear", "x k")], {"k": np.float32(1)}),
    "Range": ([node("Range", "a b c")], {"a": np.int64(9), "b": np.int64(-2), "c": np.int64(-4)}),
    "ReduceSum": ([node("ReduceSum", "x k", keepdims=0)], {"k": ints(-1)}),
    "ReduceSum of all": ([node("ReduceSum", "x")], {}),
    "ReduceSum of nothing": ([node("ReduceSum", "x", noop_with_empty_axes=1)], {}),
    **{name: ([node(name, "x k")], {"k": ints(0)}) for name in ("ReduceMax", "ReduceMean", "ReduceMin")},
    "ReduceSumSquare": ([node("ReduceSumSquare", "x k")], {"k": ints(0, 1)}),
    "Reshape": ([node("Reshape", "x k")], {"k": ints(0, 2, -1)}),
    "Reshape to a dimension": (
        [
            node("Shape", "x", "rows", end=1),
            node("Concat", "rows two rest", "shape", axis=0),
            node("Reshape", "x shape"),
        ],
        {"two": ints(2), "rest": ints(-1)},
    ),
    "Shape": ([node("Unsqueeze", "x k", "u"), node("Shape", "u", start=1, end=-1)], {"k": ints(1)}),
    "Size": ([node("Size", "x")], {}),
    "Slice": ([node("Slice", "x a b c d")], {"a": ints(-1), "b": ints(-9), "c": ints(1), "d": ints(-2)}),
    "Slice of the first axes": ([node("Slice", "x a b")], {"a": ints(0, 1), "b": ints(2**62, 3)}),
    "Slice with a step": (
        [node("Slice", "x a b  d".replace("  ", " k "))],
        {"a": ints(0), "b": ints(4), "k": ints(1), "d": ints(3)},
    ),
    "Split": ([node("Split", "x", "y z u", axis=1, num_outputs=3)], {}),
    "Split by sizes": ([node("Split", "x k", "y z", axis=1)], {"k": ints(1, 3)}),
    "Squeeze": ([node("Unsqueeze", "x k", "u"), node("Squeeze", "u k")], {"k": ints(1)}),
    "Squeeze of all": ([node("Unsqueeze", "x k", "u"), node("Squeeze", "u")], {"k": ints(0, 2)}),
    "Tile": ([node("Tile", "x k")], {"k": ints(2, 3)}),
    "TopK": ([node("TopK", "x k", "y z")], {"k": ints(2)}),
    "Transpose": ([node("Transpose", "x")], {}),
    "Transpose by axes": ([node("Unsqueeze", "x k", "u"), node("Transpose", "u", perm=[2, 0, 1])], {"k": ints(1)}),
    "Where": (
        [node("Greater", "x k", "g"), node("Where", "g x w")],
        {"k": np.float32(0), "w": np.ones((3, 1, 1), np.float32)},
    ),
    "a shape that is multiplied": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s i", "n"),
            node("Mul", "n three", "m"),
            node("Unsqueeze", "m i", "u"),
            node("ConstantOfShape", "u"),
        ],
        {"i": np.int64(0), "three": np.int64(3)},
    ),
    "a part of a shape": (
        [node("Shape", "x", "s"), node("Slice", "s a b", "t"), node("Identity", "t", "u"), node("Expand", "x1 u")],
        {"a": ints(0), "b": ints(1), "x1": np.ones((2, 1), np.float32)},
    ),
}
for name in ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"):
    NODES[name] = ([node(name, "x w")], {"w": np.ones((3, 1, 4), np.float32)})
for name in ("Equal", "Greater", "Less"):
    NODES[name] = ([node(name, "x w")], {"w": np.ones((3, 1, 1), np.float32)})
for name in ("Abs", "Cos", "Erf", "Exp", "Gelu", "Identity", "Log", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sin"):
    NODES[name] = ([node(name, "x")], {})
for name in ("Sqrt", "Tanh"):
    NODES[name] = ([node(name, "x")], {})
NODES["Cast"] = ([node("Cast", "x", to=7)], {})
NODES["Not"] = ([node("Greater", "x k", "g"), node("Not", "g")], {"k": np.float32(0)})
for name in ("And", "Or"):
    NODES[name] = ([node("Greater", "x k", "g"), node(name, "g g")], {"k": np.float32(0)})


@pytest.mark.parametrize("sizes", [Sizes(1, 1), Sizes(5, 3)], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_shapes_and_types_are_those_that_onnxruntime_computes(name, sizes, monkeypatch):
    nodes, weights = NODES[name]
    if name == "MatMul of a vector":  # as many rows as the vector has numbers
        sizes = Sizes(1, 1)
    graph = graph_of(nodes, weights)
    told = followed(graph, sizes, monkeypatch)
    for value, found in computed(graph, sizes).items():
        assert told[value] == found, value


WHOLE = {
    "constants": ([node("Div", "a b")], {"a": np.array([-(2**63)]), "b": ints(-1)}),
    "constants of 32 bits": (
        [node("Div", "a b")],
        {"a": np.array([-(2**31)], np.int32), "b": np.array([-1], np.int32)},
    ),
    "an observation": ([node("Cast", "x", "n", to=7), node("Div", "n b")], {"b": ints(-1)}),
    "constants of nodes": (
        [
            node("Constant", "", "a", value_int=-(2**63)),
            node("Constant", "", "b", value_ints=[-1]),
            node("Unsqueeze", "a k", "c"),
            node("Div", "c b"),
        ],
        {"k": ints(0)},
    ),
    "a filled shape": (
        [
            node("Shape", "x", "s"),
            node("ConstantOfShape", "s", "a", value=numpy_helper.from_array(ints(1))),
            node("Div", "a b"),
        ],
        {"b": ints(-1)},
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_dividing_whole_numbers_is_refused(name):
    """onnxruntime 1.32 divides the least number by -1, for which processors end the process."""
    nodes, weights = WHOLE[name]
    assert "has an operator Div of whole numbers, which no policy needs" in refusal(graph_of(nodes, weights))


def test_every_operator_is_compared():
    used = {made.op_type.encode() for nodes, _ in NODES.values() for made in nodes}
    assert used | {b"Constant"} == {*SIGNATURES[b""], *SIGNATURES[b"com.microsoft"]}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("kind", ["qam", "qam-edit", "me-am"])
def test_every_shape_of_an_exported_graph_is_told(kind, precision, monkeypatch):
    pytest.importorskip("torch")
    from meam_export.graph.policy_graph import build_graph
    from meam_training import TrainConfig
    from meam_training.networks.meam_networks import build_networks
    from meam_training.networks.policy_module import PolicyModule

    sizes = {"hidden_dims": (16, 16), "critic_hidden_dims": (8, 8), "num_critics": 2}
    several = 1 if kind == "qam" else 3
    config = TrainConfig.preset(kind, **sizes, **({} if kind == "qam" else {"best_of": several}))
    box = BoxSpec((3,), "float32", (-np.inf,) * 3, (np.inf,) * 3)
    spec = PolicySpec(
        observation=(box,),
        action=BoxSpec((2,), "float32", (-1.0,) * 2, (1.0,) * 2),
        chunk_size=2,
        execute_steps=1,
        observation_mean=(0.0,) * 3,
        observation_std=(1.0,) * 3,
        action_offset=(0.0,) * 2,
        action_scale=(1.0,) * 2,
        integration=Integration(nfe=3, best_of=several),
        method=kind,
    )
    networks = build_networks(spec, config)
    graph = build_graph(PolicyModule(networks, spec), spec, precision)
    for open_sizes in (Sizes(1, 1), Sizes(5, 3)):
        told = followed(graph, open_sizes, monkeypatch)
        for value, shape in computed(graph, open_sizes).items():
            assert told[value] == shape, value


def chain(operator, count, **attributes):
    return [node(operator, f"v{i} v{i}", f"v{i + 1}", **attributes) for i in range(count)]


EXPLODING: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, Any] | None]] = {
    "outer products": (
        [node("Reshape", "x column", "a"), node("Reshape", "x row", "b"), node("Mul", "a b")],
        {"column": ints(-1, 1), "row": ints(1, -1)},
        {"x": ["batch", 2**20]},
    ),
    "outer products of a batch": (
        [
            node("Reshape", "x column", "a"),
            node("Reshape", "x row", "b"),
            node("Mul", "a b", "c"),
            node("MatMul", "c c"),
        ],
        {"column": ints(-1, 1), "row": ints(1, -1)},
        {"x": ["batch", 2**12]},
    ),
    "chain of Concat": ([node("Identity", "x", "v0"), *chain("Concat", 40, axis=1)], {}, None),
    "chain of Concat along the batch": ([node("Identity", "x", "v0"), *chain("Concat", 40, axis=0)], {}, None),
    "square of the batch again and again": (
        [
            node("Identity", "x", "v0"),
            *[
                made
                for i in range(6)
                for made in (
                    node("Reshape", f"v{i} column", f"a{i}"),
                    node("Reshape", f"v{i} row", f"b{i}"),
                    node("Mul", f"a{i} b{i}", f"v{i + 1}"),
                )
            ],
        ],
        {"column": ints(-1, 1), "row": ints(1, -1)},
        {"x": ["batch", 1]},
    ),
    "hundreds of large products": (
        [
            node("Expand", "x big", "v0"),
            *chain("MatMul", 300),
        ],
        {"big": ints(2048, 2048)},
        {"x": ["batch", 1]},
    ),
    "weights used again and again": (
        [node("Expand", "x wide", "v0"), *[node("MatMul", f"v{i} w", f"v{i + 1}") for i in range(9000)]],
        {"wide": ints(8, 1024), "w": np.zeros((1024, 1024), np.float32)},
        {"x": ["batch", 1]},
    ),
    "tiles of tiles": (
        [node("Identity", "x", "v0"), *[node("Tile", f"v{i} k", f"v{i + 1}") for i in range(8)]],
        {"k": ints(1, 32)},
        None,
    ),
    "an axis of nothing": (
        [
            node("Cast", "x", "n", to=7),
            node("Slice", "w n n", "none"),
            node("Reshape", "none n", "a"),
            node("ReduceSum", "a k"),
        ],
        {"w": np.zeros(4, np.float32), "k": ints(0)},
        None,
    ),
    "a product of computed shapes": (
        [node("Cast", "x", "n", to=7), node("Reshape", "x n", "a"), node("MatMul", "a a")],
        {},
        None,
    ),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_graph_that_explodes_when_it_runs_is_refused_by_its_shapes(name):
    nodes, weights, inputs = EXPLODING[name]
    message = refusal(graph_of(nodes, weights, inputs))
    assert "no policy needs" in message


def test_gathering_a_value_several_times_is_counted():
    k = np.zeros((64, 64), np.int64)
    nodes = [node("Identity", "x", "v0"), *[node("Gather", f"v{i} k", f"v{i + 1}", axis=1) for i in range(4)]]
    assert "numbers" in refusal(graph_of(nodes, {"k": k}))


NOT_ALLOWED = {
    "an axis twice": ([node("Unsqueeze", "x k")], {"k": ints(0, 0)}),
    "an axis that is not there": ([node("Transpose", "x", perm=[0, 5])], {}),
    "sizes that do not fit": ([node("Add", "x k")], {"k": np.ones((3, 3), np.float32)}),
    "a step of zero": ([node("Slice", "x a b c d")], {"a": ints(0), "b": ints(1), "c": ints(0), "d": ints(0)}),
    "a negative size": ([node("TopK", "x k", "y z")], {"k": ints(-3)}),
    "more parts than there are": ([node("Split", "x k", "y z", axis=1)], {"k": ints(3, 3)}),
}


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_nodes_that_onnx_does_not_allow_are_left_to_onnxruntime(name):
    nodes, weights = NOT_ALLOWED[name]
    check_graph(graph_of(nodes, weights))


def test_a_thousand_evaluations_of_a_wide_network_are_allowed():
    nodes = [node("MatMul", "x first", "v0")]
    for i in range(4000):
        nodes += [node("MatMul", f"v{i} w", f"a{i}"), node("Gelu", f"a{i}", f"v{i + 1}")]
    weights = {"first": np.zeros((4, 1024), np.float32), "w": np.zeros((1024, 1024), np.float32)}
    check_graph(graph_of(nodes, weights))


def test_a_large_batch_costs_in_proportion():
    check_graph(graph_of([node("MatMul", "x w")], {"w": np.zeros((2**20, 32), np.float32)}, {"x": ["batch", 2**20]}))


@pytest.mark.parametrize("size", [300 * 10**6, 2**23 + 1])
def test_metadata_is_bounded_before_it_is_read(size):
    model = onnx.load_from_string(graph_of([node("Identity", "x")]))
    model.metadata_props.add(key="note", value="é" * (size // 2))
    message = refusal(model.SerializeToString())
    assert "names and metadata" in message


@pytest.mark.parametrize("place", ["doc_string", "names", "node metadata", "attribute"])
def test_texts_are_bounded_together_wherever_they_are(place, monkeypatch):
    monkeypatch.setattr(onnx_wire, "MAX_TEXT_BYTES", 1000)
    nodes = [node("Identity", "x", "a"), node("Gelu", "a", approximate="none")]
    check_graph(graph_of(nodes))
    if place == "doc_string":
        nodes[0].doc_string = "x" * 1000
    elif place == "names":
        nodes[0].name = nodes[1].name = "x" * 500
    elif place == "node metadata":
        nodes[0].metadata_props.add(key="x" * 500, value="x" * 500)
    else:
        nodes[1].attribute[0].s = b"\xff" * 1000
    assert "more than 1000 bytes" in refusal(graph_of(nodes))

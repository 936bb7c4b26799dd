"""Operators and weights in every precision, run in onnxruntime against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_export.graph.writer import (
    BLOCK,
    IR_VERSION,
    OPSET,
    Float16Writer,
    GraphWriter,
    Int8Writer,
    make_writer,
    quantise,
)

WEIGHTS = st.builds(
    lambda rows, columns, size, seed: size * np.random.default_rng(seed).standard_normal((rows, columns)),
    st.integers(1, 5),
    st.sampled_from([1, 2, 6, 127, 128, 129, 200, 256, 300]),
    st.sampled_from([1e-6, 0.1, 1.0, 1e4]),
    st.integers(0, 10_000),
)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def run(
    writer: GraphWriter, write: Callable[[ir.Value, ir.Value], ir.Value], x: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, onnx.ModelProto]:
    """What the written operators make of x and c, and the model."""
    inputs = [
        ir.Value(name=name, shape=ir.Shape(["rows", array.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in (("x", x), ("c", c))
    ]
    output = write(*inputs)
    output.name, output.dtype = "y", ir.DataType.FLOAT
    domains = {"", *(node.domain for node in writer.nodes)}
    graph = ir.Graph(
        inputs,
        [output],
        nodes=writer.nodes,
        initializers=writer.initializers,
        opset_imports={domain: 1 if domain else OPSET for domain in domains},
        name="test",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, {"x": x.astype(np.float32), "c": c.astype(np.float32)})[0]
    return np.asarray(found), model


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def arrays(rows: int, n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(n_in)
    return (
        generator.standard_normal((rows, n_in)),
        generator.standard_normal((n_out, n_in)) / np.sqrt(n_in),
        generator.standard_normal((rows, n_out)),
    )


def test_there_is_a_writer_for_every_precision() -> None:
    assert [type(make_writer(p)) for p in ("fp32", "int8", "fp16")] == [GraphWriter, Int8Writer, Float16Writer]


# Rounding to 8 bits


def dequantised(packed: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    rows, blocks, block = packed.shape
    whole = (packed.astype(np.float64) - 128) * scales.astype(np.float64).reshape(rows, blocks, 1)
    return whole.reshape(rows, blocks * block)[:, :columns]


@settings(deadline=None)
@given(weight=WEIGHTS)
def test_a_weight_is_rounded_to_the_nearest_of_255_multiples_of_its_blocks_scale(weight: np.ndarray) -> None:
    rows, columns = weight.shape
    packed, scales = quantise(weight)
    blocks = -(-columns // BLOCK)
    assert (packed.dtype, packed.shape) == (np.uint8, (rows, blocks, BLOCK))
    assert (scales.dtype, scales.shape) == (np.float32, (rows * blocks,))
    of_weight = np.repeat(scales.reshape(rows, blocks), BLOCK, axis=1)[:, :columns]
    error = np.abs(dequantised(packed, scales, columns) - weight)
    assert (error <= 0.5 * of_weight * (1 + 1e-4)).all()
    for row, block in np.ndindex(rows, blocks):  # the largest weight of a block is hit
        part = weight[row, block * BLOCK : (block + 1) * BLOCK]
        assert scales.reshape(rows, blocks)[row, block] == pytest.approx(np.abs(part).max() / 127, rel=1e-6)
        assert np.abs(packed[row, block].astype(int) - 128).max() == 127


def test_blocks_of_zeros_stay_zeros_and_padding_is_zero() -> None:
    weight = np.zeros((2, 200))
    weight[1, 150] = 3.0
    packed, scales = quantise(weight)
    np.testing.assert_allclose(dequantised(packed, scales, 200), weight, rtol=1e-7)
    assert scales.reshape(2, 2)[0].tolist() == [0, 0]
    assert (packed[:, 1, 200 - BLOCK :] == 128).all()
    assert packed[1, 1, 150 - BLOCK] == 255


def test_the_order_of_the_signs_does_not_matter_and_minus_128_is_never_used() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 140))
    (packed, scales), (mirrored, same) = quantise(weight), quantise(-weight)
    assert np.array_equal(scales, same)
    assert np.array_equal(packed.astype(int) - 128, 128 - mirrored.astype(int))
    assert packed.min() >= 1


SCALES = pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.25, 1.0), (-2.0, 0.5)])


@pytest.mark.parametrize("n_in", [1, 6, 128, 130, 300])
@SCALES
def test_onnxruntime_reads_the_8_bits_as_they_are_meant(n_in: int, alpha: float, beta: float) -> None:
    x, weight, c = arrays(5, n_in, 7)
    writer = Int8Writer()
    found, model = run(writer, lambda x, c: writer.product(x, weight, c, alpha, beta), x, c)
    expected = alpha * x @ dequantised(*quantise(weight), n_in).T + beta * c
    # The inputs may be rounded too, to 8 bits of the largest of a block.
    slack = abs(alpha) * np.abs(x).max() / 254 * np.abs(weight).sum(axis=1).max() + 1e-5
    assert np.abs(found - expected).max() <= slack
    assert operators(model).count("MatMulNBits") == 1
    assert sum(array.dtype == np.uint8 for array in stored(model)) == 1


# Operators in float32


@SCALES
def test_a_float32_product_is_one_gemm(alpha: float, beta: float) -> None:
    x, weight, c = arrays(5, 6, 7)
    writer = GraphWriter()
    found, model = run(writer, lambda x, c: writer.product(x, weight, c, alpha, beta), x, c)
    assert np.abs(found - (alpha * x @ weight.T + beta * c)).max() < 1e-5
    assert operators(model) == ["Gemm"]
    written = {attribute.name for attribute in model.graph.node[0].attribute}
    assert written == {name for name, factor in (("alpha", alpha), ("beta", beta)) if factor != 1}


def test_a_product_with_nothing_added_has_two_inputs() -> None:
    x, weight, c = arrays(5, 6, 7)
    for writer in (GraphWriter(), Int8Writer(), Float16Writer()):
        found, model = run(writer, lambda x, _c, w=writer: w.product(x, weight, None, 2.0, 1.0), x, c)
        assert np.abs(found - 2 * x @ weight.T).max() < 0.1
        assert "Add" not in operators(model)
        if type(writer) is GraphWriter:
            assert len(model.graph.node[0].input) == 2


@pytest.mark.parametrize(("kind", "tolerance"), [(GraphWriter, 1e-5), (Int8Writer, 0.05), (Float16Writer, 5e-3)])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_hidden_layer_is_gelu_of_a_product_and_a_bias(
    kind: type[GraphWriter], tolerance: float, alpha: float
) -> None:
    x, weight, c = arrays(5, 40, 7)
    expected = gelu(alpha * x @ weight.T + c)
    constant = gelu(alpha * x @ weight.T + c[0])
    writer, other = kind(), kind()
    computed, _ = run(writer, lambda x, c: in_float32(writer, writer.hidden(x, weight, writer.biases(c), alpha)), x, c)
    fixed, _ = run(other, lambda x, _c: in_float32(other, other.hidden(x, weight, c[0], alpha)), x, c)
    assert np.abs(computed - expected).max() < tolerance
    assert np.abs(fixed - constant).max() < tolerance
    assert np.abs(fixed - computed)[1:].max() > 0.1


def in_float32(writer: GraphWriter, value: ir.Value) -> ir.Value:
    return writer.op("Cast", value, to=int(ir.DataType.FLOAT))


def test_equal_constants_are_stored_once_and_different_ones_are_not() -> None:
    writer = GraphWriter()
    weight = np.arange(6.0).reshape(2, 3)
    stored = [writer.constant(array) for array in (weight, weight.copy(), weight.T, weight.reshape(3, 2), weight + 1)]
    assert stored[0] is stored[1]
    assert len({id(value) for value in stored}) == 4  # the transpose holds the same numbers in another order
    assert writer.integers(1) is writer.integers(1)
    assert writer.integers(1) is not writer.constant(np.ones(1))  # of another type
    assert writer.constant(1.0) is not writer.constant(np.ones(1))  # of another shape
    assert len({value.name for value in writer.initializers}) == len(writer.initializers) == 7
    weight[:] = 0  # what was stored is not the caller's array
    tensor = stored[0].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), np.arange(6, dtype=np.float32).reshape(2, 3))


def test_weights_used_twice_are_stored_once_in_every_precision() -> None:
    x, weight, c = arrays(5, 6, 6)
    for writer in (GraphWriter(), Int8Writer(), Float16Writer()):

        def twice(x: ir.Value, c: ir.Value, writer: GraphWriter = writer) -> ir.Value:
            return writer.product(writer.product(x, weight, c, 1.0, 1.0), weight, c, 0.5, 1.0)

        _, model = run(writer, twice, x, c)
        assert len([array for array in stored(model) if array.size >= weight.size]) == 1


def stored(model: onnx.ModelProto) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


# float16


def test_float16_weights_take_16_bits_and_layers_stay_in_float16_between_each_other() -> None:
    x, weight, c = arrays(5, 6, 6)
    writer = Float16Writer()

    def write(x: ir.Value, c: ir.Value) -> ir.Value:
        hidden = writer.hidden(x, weight, writer.biases(c))
        return writer.product(writer.hidden(hidden, weight, c_0), weight, c, 1.0, 1.0)

    c_0 = c[0]
    found, model = run(writer, write, x, c)
    expected = gelu(gelu(x @ weight.T + c) @ weight.T + c_0) @ weight.T + c
    assert np.abs(found - expected).max() < 0.01
    assert {array.dtype.name for array in stored(model)} == {"float16"}
    # The input and its bias once each, and the result back.
    assert operators(model).count("Cast") == 3


def test_what_is_added_to_a_float16_product_keeps_all_its_digits() -> None:
    x, weight, c = np.zeros((2, 3)), np.ones((4, 3)), np.full((2, 4), 1 + 2.0**-20)
    writer = Float16Writer()
    found, _ = run(writer, lambda x, c: writer.product(x, weight, c, 1.0, 1.0), x, c)
    assert np.array_equal(found, np.float32(c))

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from meam_policy import ActionError, BoxSpec, ConfigError, DeviceError, FormatError, MeamError, MeamPolicy, PolicySpec
from meam_policy.inference.session import CPU_BATCH, Optimization, PolicySession


def load_error(linear):
    with pytest.raises(FormatError) as caught:
        linear.load()
    message = str(caught.value)
    assert "policy.onnx" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("dims", "name", "seen", "expected"),
    [
        ((5, 8, 4, 2), "observation", 5, 3),
        ((3, 6, 4, 2), "noise", 6, 8),
        ((3, 8, 3, 2), "actions", "3, 2", "4, 2"),
        ((3, 8, 4, 3), "actions", "4, 3", "4, 2"),
    ],
)
def test_graph_of_other_dimensions_is_refused_with_both(make_policy, dims, name, seen, expected):
    message = load_error(make_policy(graph_dims=dims))
    assert f'"{name}"' in message
    assert f"['batch', {seen}]" in message
    assert f"['batch', {expected}]" in message
    assert "config.json" in message


@pytest.mark.parametrize(
    "names",
    [
        {"observation": "obs"},
        {"noise": "eps"},
        {"actions": "action"},
    ],
)
def test_graph_with_renamed_inputs_or_outputs_is_refused_with_both_lists(make_policy, names):
    message = load_error(make_policy(graph_names=names))
    assert repr(next(iter(names.values()))) in message
    assert "'noise', 'observation'" in message
    assert "'actions'" in message


def test_graph_with_swapped_inputs_is_refused(make_policy):
    message = load_error(make_policy(graph_names={"observation": "noise", "noise": "observation"}))
    assert "\"noise\" is tensor(float) ['batch', 3]; expected tensor(float) ['batch', 8]" in message


def graph_of(inputs, outputs, nodes, weights=None):
    """The bytes of a graph; its nodes are the arguments of `make_node`, the last of them attributes.

    Inputs and outputs have a first axis "batch", but for those whose shape is None: they are scalars.
    """
    first, last = (
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [] if shape is None else ["batch", *shape])
            for name, shape in side.items()
        ]
        for side in (inputs, outputs)
    )
    made = [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes]
    constants = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(made, "g", first, last, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


GOOD_INPUTS, GOOD_OUTPUTS = {"observation": [2], "noise": [2]}, {"actions": [1, 2]}


@pytest.mark.parametrize(
    ("inputs", "outputs", "nodes", "seen"),
    [
        ({"observation": [2]}, {"actions": [1, 2]}, [("Identity", ["observation"], ["actions"])], "['observation']"),
        (
            {**GOOD_INPUTS, "task": [1]},
            GOOD_OUTPUTS,
            [("Add", ["observation", "noise"], ["x"]), ("Add", ["x", "task"], ["actions"])],
            "'task'",
        ),
        (
            GOOD_INPUTS,
            {**GOOD_OUTPUTS, "value": [2]},
            [("Identity", ["observation"], ["actions"]), ("Identity", ["noise"], ["value"])],
            "'value'",
        ),
        ({"observation": [2], "actions": [1, 2]}, {"noise": [2]}, [("Identity", ["observation"], ["noise"])], "noise"),
    ],
    ids=["missing input", "extra input", "extra output", "input and output swapped"],
)
def test_graph_with_missing_extra_or_swapped_ends_is_refused(make_spec, inputs, outputs, nodes, seen):
    spec = make_spec([free_box_like(make_spec, 2)], chunk_size=1, execute_steps=1)
    with pytest.raises(FormatError, match=re.escape(seen)) as caught:
        PolicySession(graph_of(inputs, outputs, nodes), spec)
    assert "expected" in str(caught.value)


def free_box_like(make_spec, size):
    box = make_spec().observation[0]
    return type(box)((size,), box.dtype, (-np.inf,) * size, (np.inf,) * size)


@pytest.mark.parametrize("element_type", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32])
def test_graph_of_another_element_type_is_refused(make_policy, element_type):
    name = {TensorProto.DOUBLE: "double", TensorProto.FLOAT16: "float16", TensorProto.INT32: "int32"}[element_type]
    message = load_error(make_policy(element_type=element_type, weight=np.zeros((3, 8))))
    assert f"tensor({name})" in message
    assert "expected tensor(float)" in message


def test_graph_with_a_fixed_batch_is_refused(make_policy):
    assert "[2, 3]" in load_error(make_policy(batch=2))


@pytest.mark.parametrize("shape", [[2], [], [1, 2, 1]])
def test_graph_with_actions_of_another_rank_is_refused(make_spec, shape):
    spec = make_spec([free_box_like(make_spec, 2)], chunk_size=1, execute_steps=1)
    nodes = [("Add", ["observation", "noise"], ["actions"])]
    with pytest.raises(FormatError):
        PolicySession(graph_of(GOOD_INPUTS, {"actions": shape}, nodes), spec)


def truncated(graph, generator):
    return [graph[: int(length)] for length in generator.integers(1, len(graph) - 1, 20)]


def test_graph_truncated_anywhere_is_refused(make_policy):
    linear = make_policy()
    graph = (linear.folder / "policy.onnx").read_bytes()
    for broken in truncated(graph, np.random.default_rng(0)):
        linear.replace_graph(broken)
        load_error(linear)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"not a graph", b"<!DOCTYPE html><html><body>Sign in</body></html>", b"\x80\x04\x95" + b"\0" * 50],
    ids=["empty", "zero", "text", "HTML", "pickle"],
)
def test_file_that_is_not_onnx_is_refused(make_policy, content):
    linear = make_policy()
    linear.replace_graph(content)
    assert "policy.onnx is not a valid ONNX file" in load_error(linear)


def test_graph_that_only_onnxruntime_can_refuse_is_a_format_error_with_its_cause(make_policy):
    linear = make_policy()
    nodes = [("Add", ["observation", "noise"], ["actions"])]  # 3 numbers and 8 do not add up
    linear.replace_graph(graph_of({"observation": [3], "noise": [8]}, {"actions": [4, 2]}, nodes))
    with pytest.raises(FormatError, match=r"policy\.onnx cannot be loaded by onnxruntime 1\.\d+\.\d+: .") as caught:
        linear.load()
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value.__cause__, MeamError)


def test_a_good_policy_loads_and_acts_after_a_broken_one(make_policy):
    broken, good = make_policy(), make_policy()
    broken.replace_graph(b"not a graph")
    load_error(broken)
    np.testing.assert_array_equal(good.load().act(np.ones(3), deterministic=True), good.chunks([np.ones(3)])[0, 0])


def test_cpu_policy_reports_its_provider(make_policy):
    assert make_policy().load().provider == "CPUExecutionProvider"


def test_auto_reports_the_provider_that_it_chose(make_policy):
    onnxruntime = pytest.importorskip("onnxruntime")
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert make_policy().load(device="auto").provider in ("CPUExecutionProvider", "CUDAExecutionProvider")[: 1 + cuda]


def test_cuda_without_cuda_is_an_error_and_not_the_cpu(make_policy):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime offers CUDA")
    with pytest.raises(DeviceError) as caught:
        make_policy().load(device="cuda")
    for fragment in ('device="cuda"', "CPUExecutionProvider", "meam-policy[gpu]"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:0", "", None])
def test_unknown_device_is_refused_with_the_known_ones(make_policy, device):
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda, tensorrt") as caught:
        make_policy().load(device=device)
    assert repr(device) in str(caught.value)


def test_session_takes_any_batch_size(make_policy):
    linear = make_policy()
    policy = linear.load()
    for size in (1, 2, 17, 300):
        rows = np.random.default_rng(size).integers(-4, 5, (size, 3)) / 4
        np.testing.assert_array_equal(policy.sample(rows, np.zeros((size, 8))), linear.chunks(rows))


def test_graph_and_spec_suffice_without_a_folder(make_policy):
    linear = make_policy()
    spec = PolicySpec.from_json((linear.folder / "config.json").read_bytes())
    policy = MeamPolicy(spec, PolicySession((linear.folder / "policy.onnx").read_bytes(), spec))
    np.testing.assert_array_equal(policy.act(np.ones(3), deterministic=True), linear.chunks([np.ones(3)])[0, 0])


OBSERVATION_DIM, CHUNK, WIDTH, ROWS = 29, (5, 8), 64, 96
CHUNK_DIM = CHUNK[0] * CHUNK[1]


def dense_layers():
    random = np.random.default_rng(0)
    sizes = [OBSERVATION_DIM + CHUNK_DIM, WIDTH, WIDTH, CHUNK_DIM]
    for inputs, outputs in pairwise(sizes):
        weight, bias = random.normal(size=(inputs, outputs)) / np.sqrt(inputs), random.normal(size=outputs) / 4
        yield weight.astype(np.float32), bias.astype(np.float32)


LAYERS = list(dense_layers())
OBSERVATION, NOISE = (
    np.random.default_rng(1).normal(size=(ROWS, size)).astype(np.float32) for size in (OBSERVATION_DIM, CHUNK_DIM)
)


def network_graph():
    nodes: list[tuple[Any, ...]] = [("Concat", ["observation", "noise"], ["x0"], {"axis": 1})]
    weights = {"shape": np.array([-1, *CHUNK])}
    for index, (weight, bias) in enumerate(LAYERS):
        weights |= {f"w{index}": weight, f"b{index}": bias}
        nodes.append(("Gemm", [f"x{index}", f"w{index}", f"b{index}"], [f"y{index}"]))
        nodes.append(("Tanh", [f"y{index}"], [f"x{index + 1}"]))
    nodes.append(("Reshape", [f"x{len(LAYERS)}", "shape"], ["actions"]))
    inputs = {"observation": [OBSERVATION_DIM], "noise": [CHUNK_DIM]}
    return graph_of(inputs, {"actions": CHUNK}, nodes, weights)


def network_in_numpy(observation, noise):
    x = np.concatenate([observation, noise], axis=1).astype(np.float64)
    for weight, bias in LAYERS:
        x = np.tanh(x @ weight + bias)
    return x.reshape(-1, *CHUNK)


@pytest.fixture
def network(make_spec):
    """Make a session of a network with three layers, wide enough for onnxruntime's blocked and threaded kernels."""
    action = BoxSpec((CHUNK[1],), "float32", (-1.0,) * CHUNK[1], (1.0,) * CHUNK[1])
    spec = make_spec([free_box_like(make_spec, OBSERVATION_DIM)], action, chunk_size=CHUNK[0])
    graph = network_graph()
    return lambda **arguments: PolicySession(graph, spec, **arguments)


def test_a_network_computes_what_numpy_computes(network):
    chunks = network().run(OBSERVATION, NOISE)
    assert (chunks.dtype, chunks.shape) == (np.float32, (ROWS, *CHUNK))
    np.testing.assert_allclose(chunks, network_in_numpy(OBSERVATION, NOISE), rtol=0, atol=2e-6)


def test_repeated_runs_give_the_same_bits(network):
    session = network()
    first = session.run(OBSERVATION, NOISE)
    for _ in range(20):
        np.testing.assert_array_equal(session.run(OBSERVATION, NOISE), first)
    np.testing.assert_array_equal(network().run(OBSERVATION, NOISE), first)


def test_threads_do_not_change_the_bits(network):
    expected = network().run(OBSERVATION, NOISE)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(network(threads=threads).run(OBSERVATION, NOISE), expected)


@pytest.mark.parametrize("fixed_batch", [None, 1, 5, ROWS])
def test_batch_sizes_do_not_change_the_bits_even_more_of_them_than_buffers_are_kept(network, fixed_batch):
    session = network(fixed_batch=fixed_batch)
    expected = network().run(OBSERVATION, NOISE)
    # 5 does not divide 96: the last batches are of other sizes.
    for size in (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 64, ROWS, 1, 2, 96, 3):
        parts = [session.run(OBSERVATION[i : i + size], NOISE[i : i + size]) for i in range(0, ROWS, size)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("optimization", get_args(Optimization))
def test_every_optimization_level_computes_the_network(network, optimization):
    chunks = network(optimization=optimization).run(OBSERVATION, NOISE)
    np.testing.assert_allclose(chunks, network_in_numpy(OBSERVATION, NOISE), rtol=0, atol=2e-6)


@pytest.mark.parametrize("fixed_batch", [None, 1, 4])
def test_later_runs_and_writing_into_results_leave_other_results_alone(network, fixed_batch):
    session = network(fixed_batch=fixed_batch)
    first = session.run(OBSERVATION[:4], NOISE[:4])
    kept = first.copy()
    second = session.run(OBSERVATION[4:8], NOISE[4:8])
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)
    first[:] = 77
    np.testing.assert_array_equal(session.run(OBSERVATION[:4], NOISE[:4]), kept)


@pytest.mark.parametrize("fixed_batch", [None, 1, 4, 7])
def test_inputs_are_not_modified_and_may_be_read_only_and_of_any_layout(network, fixed_batch):
    session = network(fixed_batch=fixed_batch)
    inputs = [np.asfortranarray(OBSERVATION[:8]), np.repeat(NOISE[:8], 2, axis=1)[:, ::2]]
    for array in inputs:
        array.flags.writeable = False
    np.testing.assert_array_equal(session.run(*inputs), session.run(OBSERVATION[:8], NOISE[:8]))
    np.testing.assert_array_equal(inputs[0], OBSERVATION[:8])
    np.testing.assert_array_equal(inputs[1], NOISE[:8])


@pytest.mark.slow
@pytest.mark.parametrize("fixed_batch", [None, 4])
def test_eight_threads_at_once_get_the_results_of_one(network, fixed_batch):
    session = network(fixed_batch=fixed_batch)
    slices = [slice(i % 40, i % 40 + 1 + i % 12) for i in range(400)]
    expected = [session.run(OBSERVATION[rows], NOISE[rows]) for rows in slices]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda rows: session.run(OBSERVATION[rows], NOISE[rows]), slices))
    for result, chunks in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, chunks)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"threads": 0}, "threads is 0; expected 1 to 1024"),
        ({"fixed_batch": 0}, "fixed_batch is 0; expected 1 to 65536, or None"),
        ({"fixed_batch": -3}, "fixed_batch is -3"),
        ({"optimization": "most"}, "optimization is 'most'; expected one of none, basic, extended, all"),
    ],
)
def test_settings_out_of_range_are_refused(network, arguments, fragment):
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        network(**arguments)


@pytest.mark.parametrize("fixed_batch", [1, 3])
def test_graph_with_another_fixed_batch_than_the_asked_for_is_refused(make_policy, fixed_batch):
    linear = make_policy(batch=2)
    with pytest.raises(FormatError, match=re.escape("[2, 3]; expected tensor(float) ['batch', 3]")):
        linear.load(fixed_batch=fixed_batch)


def test_policy_with_a_fixed_batch_acts_as_without(make_policy):
    linear = make_policy()
    rows = np.random.default_rng(0).integers(-4, 5, (7, 3)) / 4
    for size in (1, 2, 7, 9):
        policy = linear.load(fixed_batch=size, seed=0)
        np.testing.assert_array_equal(policy.act(rows, deterministic=True), linear.chunks(rows)[:, 0])
        np.testing.assert_array_equal(policy.sample(rows[0], np.ones(8)), linear.chunks(rows[:1], 1)[0])


def test_error_while_running_is_an_action_error_and_the_session_goes_on(make_spec):
    spec = make_spec([free_box_like(make_spec, 2)], chunk_size=1, execute_steps=1)
    # A table of four numbers, looked up at the observation.
    nodes: list[tuple[Any, ...]] = [
        ("Cast", ["observation"], ["index"], {"to": TensorProto.INT64}),
        ("Gather", ["table", "index"], ["found"]),
        ("Add", ["found", "noise"], ["sum"]),
        ("Reshape", ["sum", "shape"], ["actions"]),
    ]
    weights = {"table": np.arange(4, dtype=np.float32), "shape": np.array([-1, 1, 2])}
    session = PolicySession(graph_of(GOOD_INPUTS, GOOD_OUTPUTS, nodes, weights), spec)
    zeros = np.zeros((1, 2), np.float32)
    with pytest.raises(ActionError, match=r"policy\.onnx failed while it ran; no action is returned: .") as caught:
        session.run(zeros + 4, zeros)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    np.testing.assert_array_equal(session.run(zeros + 3, zeros), [[[3, 3]]])


@pytest.mark.parametrize("fixed_batch", [None, 1, 3])
def test_of_several_chunks_the_best_acts_and_its_value_and_the_disagreement_are_returned(make_policy, fixed_batch):
    linear = make_policy(best_of=5)
    random = np.random.default_rng(0)
    rows, noise = random.integers(-8, 9, (7, 3)) / 8, random.integers(-8, 9, (7, 40)) / 8
    session = linear.load(fixed_batch=fixed_batch).session
    outputs = session.run_all(rows.astype(np.float32), noise.astype(np.float32))
    sums = linear.samples(rows, noise).sum(axis=(2, 3))
    assert set(outputs) == {"actions", "value", "disagreement"}
    np.testing.assert_array_equal(outputs["actions"], linear.chunks(rows, noise))
    np.testing.assert_array_equal(outputs["value"], sums.max(axis=1))
    np.testing.assert_array_equal(outputs["disagreement"], sums.max(axis=1) - sums.min(axis=1))
    assert len(set(sums.argmax(axis=1))) > 1, "the same sample is always the best"
    np.testing.assert_array_equal(session.run(rows.astype(np.float32), noise.astype(np.float32)), outputs["actions"])


def test_graph_of_one_chunk_is_refused_for_a_policy_that_chooses_and_the_other_way_round(make_policy):
    one, several = make_policy(), make_policy(best_of=2)
    with pytest.raises(FormatError, match=re.escape("outputs ['actions']; expected ['noise', 'observation'] and")):
        PolicySession(one.graph, several.spec)
    with pytest.raises(FormatError, match=re.escape("'disagreement', 'value']; expected")):
        PolicySession(several.graph, one.spec)


@pytest.mark.parametrize("fixed_batch", [None, 3])
@pytest.mark.parametrize(
    ("noise", "value", "name"),
    [
        ([24], [], "noise"),
        ([3, 8], [], "noise"),
        (["samples", 7], [], "noise"),
        (["samples", 8], [1], "value"),
        (["samples", 8], None, "value"),
    ],
    ids=["flat noise", "fixed samples", "other chunk", "value with an axis more", "one value for the batch"],
)
def test_choosing_graph_of_other_shapes_is_refused(make_spec, noise, value, name, fixed_batch):
    outputs = {"actions": [4, 2], "value": value, "disagreement": []}
    nodes: list[tuple[Any, ...]] = [
        ("Slice", ["observation", "zero", "two", "one"], ["pair"]),
        ("Tile", ["pair", "repeats"], ["row"]),
        ("Reshape", ["row", "shape"], ["actions"]),
        ("ReduceSum", ["observation", "one"], ["disagreement"], {"keepdims": 0}),
        ("ReduceSum", ["observation", *([] if value is None else ["one"])], ["value"], {"keepdims": int(value == [1])}),
    ]
    weights = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "repeats": np.array([1, 4]),
        "shape": np.array([-1, 4, 2]),
    }
    graph = graph_of({"observation": [3], "noise": noise}, outputs, nodes, weights)
    spec = make_spec(best_of=2)
    with pytest.raises(FormatError, match=rf'"{name}" is tensor\(float\)'):
        PolicySession(graph, spec, fixed_batch=fixed_batch)


# Graphs that take a prefix

TOLD_INPUTS = {"observation": [3], "noise": [8], "prefix": [4, 2], "prefix_weight": [4]}


def continuing(inputs, reads=("prefix", "prefix_weight")):
    """actions = reshape(noise) + prefix * prefix_weight, or of other inputs, and nothing of the observation."""
    nodes: list[tuple[Any, ...]] = [("Reshape", ["noise", "shape"], ["chunks"])]
    total = "chunks"
    if "prefix_weight" in reads:
        nodes.append(("Unsqueeze", ["prefix_weight", "last"], ["share"]))
    if set(reads) == {"prefix", "prefix_weight"}:
        nodes += [("Mul", ["prefix", "share"], ["given"]), ("Add", [total, "given"], ["sum"])]
        total = "sum"
    elif reads:
        nodes.append(("Add", [total, "share" if reads == ("prefix_weight",) else "prefix"], ["sum"]))
        total = "sum"
    nodes.append(("Identity", [total], ["actions"]))
    return graph_of(inputs, {"actions": [4, 2]}, nodes, {"shape": np.array([-1, 4, 2]), "last": np.array([2])})


@pytest.fixture
def prefix_session(make_spec):
    return lambda **arguments: PolicySession(continuing(TOLD_INPUTS), make_spec(), **arguments)


def prefix_rows(count):
    random = np.random.default_rng(0)
    return [random.normal(size=(count, *shape)).astype(np.float32) for shape in TOLD_INPUTS.values()]


def test_a_session_says_whether_its_graph_takes_a_prefix(make_policy, prefix_session):
    assert prefix_session().takes_prefix
    assert not make_policy().load().session.takes_prefix


@pytest.mark.parametrize("fixed_batch", [None, 1, 3, 7, 9])
@pytest.mark.parametrize("rows", [1, 2, 7, CPU_BATCH, 2 * CPU_BATCH + 1])
def test_every_row_gets_its_own_prefix_in_batches_of_any_size(prefix_session, fixed_batch, rows):
    observation, noise, prefix, weight = prefix_rows(rows)
    found = prefix_session(fixed_batch=fixed_batch).run_all(observation, noise, prefix, weight)
    assert set(found) == {"actions"}
    np.testing.assert_array_equal(found["actions"], noise.reshape(-1, 4, 2) + prefix * weight[..., None])


@pytest.mark.parametrize("fixed_batch", [None, 3])
def test_without_a_prefix_zeros_are_given_also_after_one_was(prefix_session, fixed_batch):
    session, (observation, noise, prefix, weight) = prefix_session(fixed_batch=fixed_batch), prefix_rows(5)
    session.run_all(observation, noise, prefix, weight)
    for found in (
        session.run(observation, noise),
        session.run_all(observation, noise)["actions"],
        session.run_all(observation, noise, prefix)["actions"],
        session.run_all(observation, noise, None, weight)["actions"],
    ):
        np.testing.assert_array_equal(found, noise.reshape(-1, 4, 2))


def test_prefixes_may_be_read_only_and_of_any_layout_and_are_not_modified(prefix_session):
    observation, noise, prefix, weight = prefix_rows(5)
    given = np.asfortranarray(prefix), np.repeat(weight, 2, axis=1)[:, ::2]
    for array in given:
        array.flags.writeable = False
    expected = prefix_session().run_all(observation, noise, prefix, weight)["actions"]
    np.testing.assert_array_equal(prefix_session().run_all(observation, noise, *given)["actions"], expected)
    np.testing.assert_array_equal(given[0], prefix)
    np.testing.assert_array_equal(given[1], weight)


@pytest.mark.parametrize("name", ["prefix", "prefix_weight"])
def test_graph_with_one_of_the_two_inputs_of_a_prefix_is_refused(make_spec, name):
    inputs = {key: shape for key, shape in TOLD_INPUTS.items() if key in ("observation", "noise", name)}
    with pytest.raises(FormatError, match=f"has the inputs .*'{name}'.*; expected .*meam export") as caught:
        PolicySession(continuing(inputs, (name,)), make_spec())
    assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize("fixed_batch", [None, 3])
@pytest.mark.parametrize(
    ("name", "shape"), [("prefix", [4, 1]), ("prefix", [1, 2]), ("prefix_weight", [1]), ("prefix_weight", [4, 2])]
)
def test_graph_whose_prefix_has_another_shape_is_refused(make_spec, name, shape, fixed_batch):
    inputs = {**TOLD_INPUTS, name: shape}
    nodes: list[tuple[Any, ...]] = [
        ("Reshape", ["noise", "shape"], ["chunks"]),
        *[("ReduceSum", [name, "axes"], [f"{name}_sum"]) for name in ("prefix", "prefix_weight")],
        ("Identity", ["chunks"], ["actions"]),
    ]
    weights = {"shape": np.array([-1, 4, 2]), "axes": np.array([1])}
    graph = graph_of(inputs, {"actions": [4, 2]}, nodes, weights)
    with pytest.raises(FormatError, match=rf'"{name}" is tensor\(float\) .*expected tensor\(float\) \[\'batch\', 4'):
        PolicySession(graph, make_spec(), fixed_batch=fixed_batch)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prefix_of_another_number_of_rows_is_an_action_error_and_the_session_goes_on(prefix_session, rows):
    session, (observation, noise, prefix, weight) = prefix_session(), prefix_rows(2)
    with pytest.raises(ActionError, match="no action is returned"):
        session.run_all(observation, noise, *(array[:rows] for array in prefix_rows(3)[2:]))
    found = session.run_all(observation, noise, prefix, weight)["actions"]
    np.testing.assert_array_equal(found, noise.reshape(-1, 4, 2) + prefix * weight[..., None])

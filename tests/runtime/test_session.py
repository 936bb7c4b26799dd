import re

import numpy as np
import pytest
from onnx import TensorProto, helper

from meam_policy import ConfigError, DeviceError, FormatError, MeamPolicy, PolicySpec
from meam_policy.session import PolicySession


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
        {"observation": "noise", "noise": "observation"},
    ],
)
def test_graph_with_renamed_inputs_or_outputs_is_refused_with_both_lists(make_policy, names):
    if "observation" in names and "noise" in names:
        message = load_error(make_policy(graph_names=names))
        assert '"observation" is tensor(float)' in message
    else:
        message = load_error(make_policy(graph_names=names))
        assert repr(next(iter(names.values()))) in message
        assert "'noise', 'observation'" in message
        assert "'actions'" in message


def graph_of(inputs, outputs, nodes):
    first, last = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in side.items()]
        for side in (inputs, outputs)
    )
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", first, last)
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
    message = load_error(linear)
    assert "cannot be loaded" in message


def test_loading_errors_keep_their_cause(make_policy):
    linear = make_policy()
    linear.replace_graph(b"not a graph")
    with pytest.raises(FormatError) as caught:
        linear.load()
    assert caught.value.__cause__ is not None


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
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda") as caught:
        make_policy().load(device=device)
    assert repr(device) in str(caught.value)


def test_threads_do_not_change_the_actions(make_policy):
    linear = make_policy()
    rows = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_array_equal(linear.load(threads=2).sample(rows, seed=0), linear.load().sample(rows, seed=0))


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

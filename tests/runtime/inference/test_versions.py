from pathlib import Path

import numpy as np
import onnx
import pytest

from meam_policy import DeviceError, FormatError, VersionError
from meam_policy.graph.graph_check import IR_VERSIONS, OPSETS, GraphSummary, check_graph
from meam_policy.inference.versions import least_version, load_failure, requires_onnxruntime, unreadable

onnxruntime = pytest.importorskip("onnxruntime")

REMEDY = "take another graph of the policy by variant=, or upgrade onnxruntime. It says:"
# As onnxruntime 1.20.1 and 1.22.1 write them.
OPSET_MESSAGE = (
    "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/graph/model_load_utils.h:46 void onnxruntime::"
    "model_load_utils::ValidateOpsetForDomain(const std::unordered_map<std::__cxx11::basic_string<char>, int>&, const "
    "onnxruntime::logging::Logger&, bool, const std::string&, int) ONNX Runtime only *guarantees* support for models "
    "stamped with official released onnx opset versions. Opset 28 is under development and support for this is "
    "limited. The operator schemas and or other functionality may change before next ONNX release and in this case "
    "ONNX Runtime will not guarantee backward compatibility. Current official support for domain ai.onnx is till "
    "opset 22.\n"
)
BITS_MESSAGE = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: /onnxruntime_src/onnxruntime/"
    "contrib_ops/cpu/quantization/matmul_nbits.cc:92 onnxruntime::contrib::MatMulNBits<T1>::MatMulNBits(const "
    "onnxruntime::OpKernelInfo&) [with T1 = float] nbits_ == 4 was false. Only 4b quantization is supported for "
    "MatMulNBits op, additional bits support is planned.\n"
)


def summary(opset=17, ir_version=8, operators=("MatMul",)):
    return GraphSummary(
        ir_version, opset, {}, len(operators), dict.fromkeys(operators, 1), 0, ("float32",), ("observation", "noise")
    )


@pytest.mark.parametrize(
    ("graph", "version"),
    [
        (summary(), (1, 17)),
        (summary(opset=20, ir_version=9), (1, 17)),
        (summary(opset=21), (1, 18)),
        (summary(ir_version=10), (1, 18)),
        (summary(opset=22), (1, 21)),
        (summary(operators=["MatMul", "com.microsoft.MatMulNBits"]), (1, 22)),
        (summary(opset=23, operators=["com.microsoft.MatMulNBits"]), (1, 23)),
        (summary(ir_version=11), (1, 23)),
        (summary(opset=24), (1, 24)),
        (summary(opset=26), (1, 25)),
        (summary(opset=27), (1, 32)),
        (summary(ir_version=14), (1, 32)),
    ],
)
def test_least_version_is_that_of_opset_ir_version_and_operators(graph, version):
    assert least_version(graph) == version


def test_an_old_onnxruntime_is_told_what_it_cannot_load(light_graph):
    light = {"graphs with 8-bit weights (int8)": "1.22"}
    assert unreadable("1.16.3") == {"policies": "1.17"} | light
    assert unreadable("1.21.0") == light
    assert unreadable("1.22.0") == unreadable("2.0") == unreadable("unknown") == {}
    published = (Path(__file__).parents[3] / "model_cards" / "pockets" / "policy.onnx").read_bytes()
    assert requires_onnxruntime(check_graph(published)) == "1.17"
    assert requires_onnxruntime(check_graph(light_graph())) == "1.22"


def test_every_graph_that_may_be_loaded_has_a_least_version():
    for opset in range(OPSETS[0], OPSETS[1] + 1):
        for ir_version in range(IR_VERSIONS[0], IR_VERSIONS[1] + 1):
            assert (1, 17) <= least_version(summary(opset, ir_version)) <= (1, 32)


def test_installed_onnxruntime_loads_what_it_is_new_enough_for(light_graph, make_policy):
    installed = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    for graph in (light_graph(), make_policy().graph):
        if least_version(check_graph(graph)) <= installed:
            onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    identity = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    for opset in range(OPSETS[0], OPSETS[1] + 1):
        identity.opset_import[0].version = opset
        if least_version(summary(opset)) <= installed:
            onnxruntime.InferenceSession(identity.SerializeToString(), providers=["CPUExecutionProvider"])


def test_variant_that_needs_a_newer_onnxruntime_is_refused_with_both_versions_and_what_to_do(
    make_policy, light_graph, old_onnxruntime
):
    linear = make_policy()
    linear.add_variant("int8", light_graph(), precision="int8")
    with pytest.raises(VersionError) as caught:
        linear.load(variant="int8")
    needs = "int8.onnx needs onnxruntime 1.22 or newer, and this is 1.20.1"
    assert str(caught.value) == f"{needs}: {REMEDY} {old_onnxruntime}."
    assert linear.load().act(np.zeros(3)).shape == (2,)


@pytest.mark.parametrize(
    ("message", "end", "needed"),
    [(OPSET_MESSAGE, "domain ai.onnx is till opset 22.", "1.32"), (BITS_MESSAGE, "bits support is planned.", "1.32")],
)
def test_long_message_of_onnxruntime_is_shortened_to_its_kind_and_cause(message, end, needed):
    error = load_failure("k3.onnx", summary(opset=28), "1.22.1", message, on_cpu=True)
    assert isinstance(error, VersionError)
    text = str(error)
    assert len(text) < 400
    assert "\n" not in text
    needs = f"k3.onnx needs onnxruntime {needed} or newer, and this is 1.22.1"
    assert text.startswith(f"{needs}: {REMEDY} {message[:40]}")
    assert text.endswith(end)


def test_sign_of_age_without_a_known_version_asks_for_a_newer_one():
    error = load_failure("k3.onnx", summary(), "1.40.0", "No Op registered for New", on_cpu=True)
    assert isinstance(error, VersionError)
    assert str(error) == f"k3.onnx needs a newer onnxruntime, and this is 1.40.0: {REMEDY} No Op registered for New."


def test_broken_graph_is_no_question_of_the_version():
    error = load_failure("k3.onnx", summary(), "1.20.1", "Type Error: shapes do not fit", on_cpu=True)
    assert type(error) is FormatError
    assert str(error) == "k3.onnx cannot be loaded by onnxruntime 1.20.1: Type Error: shapes do not fit"
    # What the CPU needs is not what a GPU does.
    light = summary(operators=["com.microsoft.MatMulNBits"])
    assert type(load_failure("int8.onnx", light, "1.20.1", "out of memory", on_cpu=False)) is FormatError
    assert type(load_failure("int8.onnx", light, "1.20.1", "out of memory", on_cpu=True)) is VersionError


@pytest.mark.parametrize("version", ["1.33.0", "2.0", "1.32.0.dev20261101", "unknown"])
def test_versions_of_any_form_are_read(version):
    error = load_failure("int8.onnx", summary(opset=28), version, "broken", on_cpu=True)
    assert type(error) is FormatError


def test_device_that_fails_otherwise_stays_a_device_error(make_policy, monkeypatch):
    def create(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    with pytest.raises(DeviceError, match="cannot run policy.onnx: out of memory"):
        make_policy().load(device="cuda")

"""Triton model repositories, read with Triton's own protobuf schema."""

from __future__ import annotations

import importlib
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper

from meam_export import triton
from meam_export.graph.policy_graph import build_graph
from meam_export.triton import repository, write_triton_repository
from meam_policy import BoxSpec, ConfigError, FormatError, IntegrityError, NotFoundError, OutputError, PolicySpec
from meam_policy.folder.policy_folder import sha256
from meam_policy.spec import Integration
from meam_training import TrainConfig
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.policy_module import PolicyModule

# Generated modules, whose members pyright cannot see.
schema: Any = importlib.import_module("tritonclient.grpc.model_config_pb2")
service: Any = importlib.import_module("tritonclient.grpc.service_pb2")
service_grpc: Any = importlib.import_module("tritonclient.grpc.service_pb2_grpc")

CONFIG = TrainConfig.preset("qam", hidden_dims=(8,), critic_hidden_dims=(8,), num_critics=2)
SPEC = PolicySpec(
    integration=Integration(nfe=4, solver=CONFIG.solver),
    observation=(
        BoxSpec((2,), "float32", (-np.inf,) * 2, (np.inf,) * 2, key="arm"),
        BoxSpec((1,), "float32", (-np.inf,), (np.inf,), key="ball"),
    ),
    action=BoxSpec((2,), "float32", (-1.0, -1.0), (1.0, 1.0)),
    chunk_size=3,
    execute_steps=2,
    observation_mean=(0.0,) * 3,
    observation_std=(1.0,) * 3,
    action_offset=(0.0,) * 2,
    action_scale=(1.0,) * 2,
    method="qam",
    environment_id="meam/Arm-v0",
    control_rate_hz=50.0,
)
Shape = Sequence[str | int]


def make_policy(folder: Path, graph: bytes, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    model = onnx.load_from_string(graph) if changes else None
    if model is not None:  # as if it had been exported so
        for entry in model.metadata_props:
            entry.value = replace(SPEC, **changes).identity if entry.key == "spec_sha256" else entry.value
        graph = model.SerializeToString()
    spec = replace(SPEC, **changes, files={"policy.onnx": sha256(graph)})
    (folder / "policy.onnx").write_bytes(graph)
    (folder / "config.json").write_text(spec.to_json())
    return folder


@pytest.fixture(scope="module")
def module() -> PolicyModule:
    torch.manual_seed(0)
    return PolicyModule(build_networks(SPEC, CONFIG), SPEC)


@pytest.fixture(scope="module")
def exported(module: PolicyModule) -> bytes:
    return build_graph(module, SPEC)


def in_torch(module: PolicyModule, feed: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(feed["observation"]), torch.tensor(feed["noise"])).numpy()


@pytest.fixture
def policy(exported: bytes, tmp_path: Path) -> Path:
    return make_policy(tmp_path / "arm", exported)


def hand_made(
    observation: Shape = ("batch", 3),
    noise: Shape = ("batch", "n", 6),
    element: int = TensorProto.FLOAT,
    actions: Shape = ("batch", 3, 2),
    scalars: Sequence[str] = ("value", "disagreement"),
) -> bytes:
    """Actions from the mean of n noises; one number a row from the observation, another from the noises."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    both = helper.make_tensor("both", TensorProto.INT64, [2], [1, 2])
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 3, 2])
    nodes = [
        helper.make_node("ReduceMean", ["noise", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["actions"]),
        helper.make_node("ReduceSum", ["observation", "axes"], ["value"], keepdims=0),
        helper.make_node("ReduceMax", ["noise", "both"], ["disagreement"], keepdims=0),
    ]
    kept = [node for node in nodes if node.output[0] in {"mean", "actions", *scalars}]
    graph = helper.make_graph(
        kept,
        "policy",
        [
            helper.make_tensor_value_info("observation", element, observation),
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, noise),
        ],
        [
            helper.make_tensor_value_info("actions", TensorProto.FLOAT, actions),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in scalars),
        ],
        [axes, both, shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def read_config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="ascii"), schema.ModelConfig())


def tensors(entries: Any) -> dict[str, tuple[int, list[int]]]:
    return {entry.name: (entry.data_type, list(entry.dims)) for entry in entries}


def parameters(model: Path) -> dict[str, str]:
    return {key: value.string_value for key, value in read_config(model).parameters.items()}


def files_under(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_repository_holds_the_configuration_and_the_graph_and_nothing_else(
    policy: Path, exported: bytes, tmp_path: Path
) -> None:
    model = write_triton_repository(policy, tmp_path / "models")
    assert model == tmp_path / "models" / "arm"
    assert files_under(tmp_path / "models") == {"arm/config.pbtxt", "arm/1/model.onnx"}
    assert (model / "1" / "model.onnx").read_bytes() == exported


def test_every_field_of_the_configuration_on_the_cpu(policy: Path, exported: bytes, tmp_path: Path) -> None:
    model = write_triton_repository(policy, tmp_path / "models", max_batch_size=20, instances=3, max_queue_delay_us=150)
    zeros = {
        "observation": schema.ModelWarmup.Input(data_type="TYPE_FP32", dims=[3], zero_data=True),
        "noise": schema.ModelWarmup.Input(data_type="TYPE_FP32", dims=[6], zero_data=True),
    }
    strings = {
        "intra_op_thread_count": "1",
        "inter_op_thread_count": "1",
        "policy_version": "1",
        "policy_spec_sha256": SPEC.identity,
        "policy_graph_sha256": sha256(exported),
        "policy_method": "qam",
        "policy_environment_id": "meam/Arm-v0",
        "policy_observation": '[{"key": "arm", "shape": [2]}, {"key": "ball", "shape": [1]}]',
        "policy_chunk_size": "3",
        "policy_execute_steps": "2",
        "policy_best_of": "1",
        "policy_noise_scale": "1.0",
        "policy_control_rate_hz": "50.0",
    }
    assert read_config(model) == schema.ModelConfig(
        name="arm",
        backend="onnxruntime",
        max_batch_size=20,
        input=[
            schema.ModelInput(name="observation", data_type="TYPE_FP32", dims=[3]),
            schema.ModelInput(name="noise", data_type="TYPE_FP32", dims=[6]),
        ],
        output=[schema.ModelOutput(name="actions", data_type="TYPE_FP32", dims=[3, 2])],
        version_policy=schema.ModelVersionPolicy(latest=schema.ModelVersionPolicy.Latest(num_versions=1)),
        instance_group=[schema.ModelInstanceGroup(kind="KIND_CPU", count=3)],
        dynamic_batching=schema.ModelDynamicBatching(max_queue_delay_microseconds=150),
        model_warmup=[
            schema.ModelWarmup(name=f"batch_{size}", batch_size=size, inputs=zeros) for size in (1, 4, 16, 20)
        ],
        parameters={key: schema.ModelParameter(string_value=value) for key, value in strings.items()},
    )


def test_on_gpus_products_keep_float32_and_no_cpu_threads_are_set(policy: Path, tmp_path: Path) -> None:
    on_cpu = read_config(write_triton_repository(policy, tmp_path / "cpu"))
    on_gpu = read_config(write_triton_repository(policy, tmp_path / "gpu", device="gpu", instances=2))
    cuda = schema.ModelOptimizationPolicy.ExecutionAccelerators.Accelerator(name="cuda", parameters={"use_tf32": "0"})
    assert list(on_gpu.optimization.execution_accelerators.gpu_execution_accelerator) == [cuda]
    assert list(on_gpu.instance_group) == [schema.ModelInstanceGroup(kind="KIND_GPU", count=2)]
    assert set(on_cpu.parameters) - set(on_gpu.parameters) == {"intra_op_thread_count", "inter_op_thread_count"}
    for changed in ("optimization", "instance_group", "parameters"):
        on_cpu.ClearField(changed)
        on_gpu.ClearField(changed)
    assert on_cpu == on_gpu


def test_the_declared_tensors_are_those_of_the_onnx_file(policy: Path, tmp_path: Path) -> None:
    model = write_triton_repository(policy, tmp_path / "models")
    config, graph = read_config(model), onnx.load(model / "1" / "model.onnx").graph
    for entries, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [entry.name for entry in entries] == [value.name for value in values]
        for entry, value in zip(entries, values, strict=True):
            batch, *axes = value.type.tensor_type.shape.dim
            assert batch.dim_param
            assert list(entry.dims) == [axis.dim_value for axis in axes]
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_the_written_graph_runs_on_the_declared_inputs(
    policy: Path, module: PolicyModule, tmp_path: Path, batch: int
) -> None:
    model = write_triton_repository(policy, tmp_path / "models")
    config = read_config(model)
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    generator = np.random.default_rng(0)
    feed = {entry.name: generator.standard_normal((batch, *entry.dims), dtype=np.float32) for entry in config.input}
    outputs = [np.asarray(output) for output in session.run([entry.name for entry in config.output], feed)]
    assert [output.shape for output in outputs] == [(batch, *entry.dims) for entry in config.output]
    assert np.abs(outputs[0] - in_torch(module, feed)).max() < 1e-5


def test_axes_of_any_size_and_one_number_a_row_are_declared_as_triton_wants_them(tmp_path: Path) -> None:
    model = write_triton_repository(make_policy(tmp_path / "best", hand_made()), tmp_path / "models", max_batch_size=4)
    config = read_config(model)
    single = schema.TYPE_FP32
    assert tensors(config.input) == {"observation": (single, [3]), "noise": (single, [-1, 6])}
    assert tensors(config.output) == {
        "actions": (single, [3, 2]),
        "value": (single, [1]),
        "disagreement": (single, [1]),
    }
    reshaped = {entry.name: list(entry.reshape.shape) for entry in config.output if entry.HasField("reshape")}
    assert reshaped == {"value": [], "disagreement": []}
    assert not any(entry.HasField("reshape") for entry in config.input)
    # Warm-up data must have a size for every axis, and the graph must run on it.
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    for sample in config.model_warmup:
        assert {name: list(entry.dims) for name, entry in sample.inputs.items()} == {
            "observation": [3],
            "noise": [1, 6],
        }
        feed = {n: np.zeros((sample.batch_size, *entry.dims), np.float32) for n, entry in sample.inputs.items()}
        outputs = [np.asarray(output) for output in session.run([entry.name for entry in config.output], feed)]
        assert [len(output) for output in outputs] == [sample.batch_size] * 3


def test_a_policy_that_chooses_among_chunks_declares_their_number_as_free(tmp_path: Path) -> None:
    spec, config = replace(SPEC, integration=replace(SPEC.integration, best_of=3)), replace(CONFIG, best_of=3)
    torch.manual_seed(0)
    graph = build_graph(PolicyModule(build_networks(spec, config), spec), spec)
    folder = make_policy(tmp_path / "arm", graph, integration=spec.integration)
    model = write_triton_repository(folder, tmp_path / "models")
    read = read_config(model)
    assert tensors(read.input)["noise"] == (schema.TYPE_FP32, [-1, 6])
    assert {entry.name: list(entry.dims) for entry in read.output} == {
        "actions": [3, 2],
        "value": [1],
        "disagreement": [1],
    }
    metadata = {entry.key: entry.value for entry in onnx.load(model / "1" / "model.onnx").metadata_props}
    assert parameters(model)["policy_spec_sha256"] == metadata["spec_sha256"]
    assert parameters(model)["policy_best_of"] == "3"


def test_a_model_is_followed_by_its_next_versions(policy: Path, exported: bytes, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_triton_repository(policy, models)
    other = make_policy(tmp_path / "other", exported, execute_steps=3, control_rate_hz=None)
    for version in (2, 3):
        model = write_triton_repository(other, models, model_name="arm", device="gpu", max_batch_size=8)
        assert files_under(models) == {"arm/config.pbtxt", *(f"arm/{n}/model.onnx" for n in range(1, version + 1))}
        config = read_config(model)
        assert config.max_batch_size == 8
        assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
        assert parameters(model)["policy_version"] == str(version)
        assert parameters(model)["policy_execute_steps"] == "3"
        assert "policy_control_rate_hz" not in parameters(model)
    # A withdrawn version's number is not taken by another policy while a later one is there.
    (model / "2" / "model.onnx").unlink()
    (model / "2").rmdir()
    write_triton_repository(policy, models)
    assert parameters(model)["policy_version"] == "4"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"noise": ("batch", 1, 6)}, r'inputs "noise" as TYPE_FP32 \[.batch., -1, 6\].*as TYPE_FP32 \[.batch., 1, 6\]'),
        ({"scalars": ["value"]}, r'outputs "disagreement" as TYPE_FP32 \[.batch.\]; this policy has it as none'),
        ({"element": TensorProto.DOUBLE}, r'inputs "observation" as TYPE_FP32 .*as TYPE_FP64'),
    ],
)
def test_a_version_with_other_tensors_is_refused_and_named(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    models = tmp_path / "models"
    model = write_triton_repository(make_policy(tmp_path / "arm", hand_made()), models)
    before = (model / "config.pbtxt").read_bytes()
    other = make_policy(tmp_path / "other", hand_made(**changes))
    with pytest.raises(OutputError, match=difference):
        write_triton_repository(other, models, model_name="arm")
    assert files_under(models) == {"arm/config.pbtxt", "arm/1/model.onnx"}
    assert (model / "config.pbtxt").read_bytes() == before
    assert write_triton_repository(other, models).name == "other"


def edit(model: Path) -> None:
    text = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(text.replace("count: 1", "count: 4"))


def write_it_by_hand(model: Path) -> None:
    (model / "config.pbtxt").write_text('backend: "onnxruntime"\n')


def change_line_ends(model: Path) -> None:
    text = (model / "config.pbtxt").read_bytes()
    (model / "config.pbtxt").write_bytes(text.replace(b"\n", b"\r\n"))


def annotate_in_latin_1(model: Path) -> None:
    with (model / "config.pbtxt").open("ab") as file:
        file.write("# größer\n".encode("latin-1"))


@pytest.mark.parametrize("change", [edit, write_it_by_hand, change_line_ends, annotate_in_latin_1])
def test_a_configuration_changed_by_hand_is_not_replaced(
    policy: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = write_triton_repository(policy, tmp_path / "models")
    change(model)
    changed = (model / "config.pbtxt").read_bytes()
    with pytest.raises(OutputError, match=r"config.pbtxt was edited.*configs/NAME.pbtxt"):
        write_triton_repository(policy, tmp_path / "models")
    assert (model / "config.pbtxt").read_bytes() == changed
    assert files_under(model) == {"config.pbtxt", "1/model.onnx"}


def test_a_configuration_of_ones_own_is_left_alone(policy: Path, tmp_path: Path) -> None:
    model = write_triton_repository(policy, tmp_path / "models")
    (model / "configs").mkdir()
    (model / "configs" / "h100.pbtxt").write_text("mine")
    write_triton_repository(policy, tmp_path / "models")
    assert (model / "configs" / "h100.pbtxt").read_text() == "mine"
    assert (model / "2" / "model.onnx").is_file()


def occupy_with_file(model: Path) -> None:
    model.parent.mkdir()
    model.write_text("mine")


def occupy_with_notes(model: Path) -> None:
    model.mkdir(parents=True)
    (model / "notes.txt").write_text("mine")


def occupy_with_another_model(model: Path) -> None:
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.plan").write_text("mine")


def lose_the_graph(model: Path) -> None:
    donor = make_policy(model.parent.parent / "donor", hand_made())
    write_triton_repository(donor, model.parent, model_name=model.name)
    (model / "1" / "model.onnx").unlink()


@pytest.mark.parametrize("occupy", [occupy_with_file, occupy_with_notes, occupy_with_another_model, lose_the_graph])
def test_what_is_not_a_model_of_ours_is_left_alone(
    policy: Path, tmp_path: Path, occupy: Callable[[Path], None]
) -> None:
    occupy(tmp_path / "models" / "arm")
    before = files_under(tmp_path / "models")
    with pytest.raises(OutputError, match="models/arm .*Choose another model name, or delete it first"):
        write_triton_repository(policy, tmp_path / "models")
    assert files_under(tmp_path / "models") == before


def test_an_empty_folder_becomes_the_model(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "arm").mkdir(parents=True)
    assert parameters(write_triton_repository(policy, tmp_path / "models"))["policy_version"] == "1"


def test_a_repository_that_cannot_be_made_is_named(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file/models/arm cannot be written"):
        write_triton_repository(policy, tmp_path / "file" / "models")


def test_a_writer_that_fails_leaves_the_model_as_it_was(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    model = write_triton_repository(policy, models)
    before = (model / "config.pbtxt").read_bytes()
    next_version = repository._next_version

    def overtaken(model: Path, signature: Any) -> int:
        version = next_version(model, signature)
        (model / str(version)).mkdir()
        (model / str(version) / "model.onnx").write_text("another writer was faster")
        return version

    monkeypatch.setattr(repository, "_next_version", overtaken)
    with pytest.raises(OutputError, match="models/arm cannot be written"):
        write_triton_repository(policy, models)
    assert (model / "config.pbtxt").read_bytes() == before
    assert (model / "2" / "model.onnx").read_text() == "another writer was faster"
    assert sorted(file.name for file in model.iterdir()) == ["1", "2", "config.pbtxt"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("arm", "arm"), ("Me AM, v2.1", "Me_AM_v2.1"), (".hidden-1", "hidden-1"), ("-x", "x"), ("größe", "gr_e")],
)
def test_the_model_is_named_after_the_folder(exported: bytes, tmp_path: Path, folder: str, name: str) -> None:
    make_policy(tmp_path / folder, exported)
    for path in (tmp_path / folder, f"{tmp_path / folder}/", tmp_path / folder / ".." / folder):
        model = write_triton_repository(path, tmp_path / "models")
        assert model.name == name
        assert read_config(model).name == name


def test_the_working_directory_has_a_name_too(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(policy)
    assert write_triton_repository(".", tmp_path / "models").name == "arm"


@pytest.mark.parametrize("name", ["", ".", "..", "../arm", "a/b", "a b", ".arm", "-arm", "arm\n", "größe", "a\0"])
def test_a_name_that_is_no_plain_folder_name_is_refused(policy: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="model name is"):
        write_triton_repository(policy, tmp_path / "models", model_name=name)
    assert not (tmp_path / "models").exists()


def test_a_folder_whose_name_has_nothing_to_keep_needs_a_name(exported: bytes, tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "策略", exported)
    with pytest.raises(ConfigError, match="made of the folder's name '策略'.*Give another model name"):
        write_triton_repository(policy, tmp_path / "models")
    assert write_triton_repository(policy, tmp_path / "models", model_name="arm").is_dir()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_batch_size": 0},
        {"max_batch_size": 2**31},
        {"instances": 0},
        {"max_queue_delay_us": -1},
        {"device": "cuda"},
    ],
)
def test_arguments_out_of_range_are_refused(policy: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))} is .*; expected"):
        write_triton_repository(policy, tmp_path / "models", **arguments)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"<html>", "not a valid ONNX file"),
        (b"", 'has the inputs none; expected "observation"'),
        (hand_made(observation=(2, 3)), r'"observation" has the shape \[2, 3\]; expected a first axis of any size'),
        (hand_made(observation=()), r'"observation" has the shape \[\]'),
        (hand_made(noise=("batch", 0, 6)), r'"noise" has the shape \[-1, 0, 6\]'),
        (hand_made(element=TensorProto.STRING), '"observation" has elements STRING; expected one of FLOAT'),
        (hand_made(observation=("batch", 4)), r"expected \"observation\" \['batch', 3\], as in config.json"),
        (hand_made(actions=("batch", 2, 3)), r"expected \"actions\" \['batch', 3, 2\], as in config.json"),
    ],
)
def test_a_graph_that_triton_could_not_batch_is_refused(tmp_path: Path, graph: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_triton_repository(make_policy(tmp_path / "arm", graph), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_changed_graph_and_a_missing_policy_are_refused(policy: Path, tmp_path: Path) -> None:
    (policy / "policy.onnx").write_bytes(hand_made())
    with pytest.raises(IntegrityError, match="policy.onnx has SHA-256"):
        write_triton_repository(policy, tmp_path / "models")
    with pytest.raises(NotFoundError, match="does not exist"):
        write_triton_repository(tmp_path / "nowhere", tmp_path / "models")


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "arm", hand_made(), environment_id="a\ud800")
    with pytest.raises(FormatError, match=r"'a\\ud800' is not Unicode text"):
        write_triton_repository(policy, tmp_path / "models")
    assert not (tmp_path / "models").exists()


class OneModel(service_grpc.GRPCInferenceServiceServicer):
    """As much of the protocol as the client of the docstring needs: checks requests by config.pbtxt, runs the graph."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.config = read_config(model)
        self.session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        self.seen: dict[str, np.ndarray] = {}

    def ModelInfer(self, request: Any, context: Any) -> Any:
        assert request.model_name == self.config.name
        expected = {entry.name: list(entry.dims) for entry in self.config.input}
        assert {entry.name: list(entry.shape)[1:] for entry in request.inputs} == expected
        assert {entry.datatype for entry in request.inputs} == {"FP32"}
        for entry, data in zip(request.inputs, request.raw_input_contents, strict=True):
            self.seen[entry.name] = np.frombuffer(data, np.float32).reshape(entry.shape)
        actions = np.asarray(self.session.run(["actions"], self.seen)[0])
        output = service.ModelInferResponse.InferOutputTensor(name="actions", datatype="FP32", shape=actions.shape)
        return service.ModelInferResponse(outputs=[output], raw_output_contents=[actions.tobytes()])


def test_the_client_of_the_docstring_gets_a_chunk_of_actions(
    policy: Path, module: PolicyModule, tmp_path: Path
) -> None:
    servicer = OneModel(write_triton_repository(policy, tmp_path / "models"))
    server = grpc.server(ThreadPoolExecutor(1))
    service_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    client = re.search(r"^    import numpy.*?(?=^\S)", triton.__doc__ or "", re.DOTALL | re.MULTILINE)
    assert client is not None
    names: dict[str, Any] = {}
    try:
        exec(textwrap.dedent(client[0]).replace("8001", str(port)), names)
        names["client"].close()
    finally:
        server.stop(None).wait()
    assert names["actions"].shape == (1, 3, 2)
    assert np.abs(names["actions"] - in_torch(module, servicer.seen)).max() < 1e-5


def test_the_request_of_the_docstring_has_the_declared_tensors(policy: Path, tmp_path: Path) -> None:
    config = read_config(write_triton_repository(policy, tmp_path / "models"))
    found = re.search(r"-d '(.*?)'", triton.__doc__ or "", re.DOTALL)
    assert found is not None
    inputs = json.loads(found[1])["inputs"]
    assert {entry["name"]: entry["shape"][1:] for entry in inputs} == {e.name: list(e.dims) for e in config.input}
    assert all(np.prod(entry["shape"]) == len(entry["data"]) for entry in inputs)


def test_a_policy_that_is_told_how_its_chunk_begins_declares_what_it_is_told(
    module: PolicyModule, tmp_path: Path
) -> None:
    told = PolicyModule(module.networks, SPEC, takes_prefix=True)
    model = write_triton_repository(make_policy(tmp_path / "arm", build_graph(told, SPEC)), tmp_path / "models")
    config, single = read_config(model), schema.TYPE_FP32
    assert tensors(config.input) == {
        "observation": (single, [3]),
        "noise": (single, [6]),
        "prefix": (single, [3, 2]),
        "prefix_weight": (single, [3]),
    }
    assert tensors(config.output) == {"actions": (single, [3, 2])}
    assert all(set(sample.inputs) == set(tensors(config.input)) for sample in config.model_warmup)
    session, generator = onnxruntime.InferenceSession(model / "1" / "model.onnx"), np.random.default_rng(0)
    for batch in (1, 7):
        feed = {entry.name: generator.uniform(-1, 1, (batch, *entry.dims)).astype(np.float32) for entry in config.input}
        feed["prefix_weight"] = feed["prefix_weight"].clip(0, 1)
        with torch.no_grad():
            (expected,) = told.decide(*(torch.from_numpy(feed[entry.name]) for entry in config.input))
        assert np.abs(np.asarray(session.run(["actions"], feed)[0]) - expected.numpy()).max() < 1e-5


def test_a_version_that_is_told_how_its_chunk_begins_is_another_model(
    policy: Path, module: PolicyModule, tmp_path: Path
) -> None:
    write_triton_repository(policy, tmp_path / "models", model_name="arm")
    before = files_under(tmp_path / "models")
    told = build_graph(PolicyModule(module.networks, SPEC, takes_prefix=True), SPEC)
    with pytest.raises(OutputError, match="prefix"):
        write_triton_repository(make_policy(tmp_path / "told", told), tmp_path / "models", model_name="arm")
    assert files_under(tmp_path / "models") == before

"""A policy as a model of NVIDIA Triton Inference Server, which serves a fleet of robots from one engine.

    REPOSITORY/arm/config.pbtxt     what goes in and comes out, how requests are batched, where it runs
    REPOSITORY/arm/1/model.onnx     the policy's graph; the next export is arm/2/model.onnx

Start it with `tritonserver --model-repository=REPOSITORY`. A robot sends the flattened observation, as
`PolicySpec.observation` orders its boxes, and the noise the chunk is made from: standard normal numbers, or zeros
for the deterministic policy. Every request carries a batch axis; the server joins requests of several robots.

    import numpy as np
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient("localhost:8001")
    observation = np.zeros((1, 3), np.float32)
    noise = np.random.default_rng().standard_normal((1, 6), dtype=np.float32)
    inputs = []
    for name, array in (("observation", observation), ("noise", noise)):
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)
    actions = client.infer("arm", inputs).as_numpy("actions")  # [1, chunk_size, action_dim], environment units

The same over HTTP, without any library:

    curl localhost:8000/v2/models/arm/infer -d '{"inputs": [
        {"name": "observation", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]},
        {"name": "noise", "shape": [1, 6], "datatype": "FP32", "data": [0, 0, 0, 0, 0, 0]}]}'

A policy that chooses among several chunks takes noise [batch, n, chunk_dim] for any n, and also gives `value` and
`disagreement` [batch, 1]; requests with the same n are batched.

`GET /v2/models/arm/config` answers the configuration; its `parameters` named `policy_…` hold what a client needs to
know besides shapes, such as how many actions of a chunk to execute and at which rate. They describe the version
`policy_version`; a response's `model_version` says which version made it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from meam_policy.atomic_files import atomic_folder, write_atomically
from meam_policy.errors import ConfigError, FormatError, MissingExtraError, OutputError
from meam_policy.folder.policy_folder import GRAPH_FILE, locate_policy, read_graph, read_spec, sha256
from meam_policy.spec import PolicySpec

__all__ = ["TritonDevice", "write_triton_repository"]

TritonDevice = Literal["cpu", "gpu"]
"""Where Triton runs a policy: "gpu" is every GPU that the server sees."""

_CONFIG, _MODEL = "config.pbtxt", "model.onnx"
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[1-9][0-9]*")
_SEAL = "# Written by meam export. SHA-256 of the lines below: "
_DATA_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "DOUBLE": "TYPE_FP64",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
}
"""Triton's names of ONNX element types."""


@dataclass(frozen=True)
class _Tensor:
    """An input or output of the graph; its shape is without the batch axis, -1 where the size varies."""

    name: str
    data_type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Signature:
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


class _Symbol(str):
    """Text that the protobuf text format writes without quotes: the name of an enumeration's value."""


def write_triton_repository(
    policy_folder: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    max_batch_size: int = 256,
    instances: int = 1,
    device: TritonDevice = "cpu",
    max_queue_delay_us: int = 0,
) -> Path:
    """Add a policy to a Triton model repository: as a new model, or as the next version of the one of that name.

    A new model appears whole. A new version of a model must take and give the same tensors. It appears whole too, and
    `config.pbtxt` is then replaced by one made from these arguments; Triton serves the newest version. Settings of
    your own belong into `configs/NAME.pbtxt` in the model's folder, which is left alone (`--model-config-name=NAME`):
    a `config.pbtxt` edited by hand is not overwritten.

    Args:
        policy_folder: What `meam export` wrote, or a Hub repo id "owner/name".
        repository: The model repository; made if need be.
        model_name: Name of the model; by default that of the policy folder, in which characters other than ASCII
            letters, digits, "_", "." and "-" become "_".
        max_batch_size: Most rows that Triton runs at once, and that one request may have; 1 or more.
        instances: Copies of the model that run side by side, on the CPU with one thread each; on GPUs, for each GPU.
        device: "cpu" or "gpu".
        max_queue_delay_us: How long a request may wait for others to be batched with, microseconds. With 0, a batch
            is what has arrived while the instances were busy; with more, every request waits this long unless a
            full batch gathers sooner.

    Returns:
        The model's folder, `repository / model_name`.

    Raises:
        NotFoundError: there is no such policy.
        HubError: the Hub could not deliver the policy.
        FormatError: the policy is broken, or Triton could not batch its graph.
        ConfigError: an argument is out of range, or no model name can be made of the folder's.
        OutputError: the model that is there has other inputs or outputs, was not written by `meam export` or was
            edited since, or the repository cannot be written.
        MissingExtraError: onnx is not installed.

    References:
        Triton's model_repository.md, model_configuration.md, batcher.md, the comments of model_config.proto, and the
        README of its onnxruntime backend.
    """
    _check_numbers(
        max_batch_size=(max_batch_size, 1), instances=(instances, 1), max_queue_delay_us=(max_queue_delay_us, 0)
    )
    if device not in get_args(TritonDevice):
        raise ConfigError(f"device is {device!r}; expected one of {', '.join(get_args(TritonDevice))}.")
    folder = locate_policy(policy_folder)
    spec = read_spec(folder)
    graph = read_graph(folder, spec)
    signature = _read_signature(graph, GRAPH_FILE)
    _check_signature(signature, spec)
    model = Path(repository).expanduser().absolute() / _model_name(policy_folder, model_name)
    version = _next_version(model, signature)
    parameters = {**_thread_parameters(device), **_policy_parameters(spec, version)}
    config = {
        "name": model.name,
        "backend": "onnxruntime",
        "max_batch_size": max_batch_size,
        "input": [_tensor_config(tensor) for tensor in signature.inputs],
        "output": [_tensor_config(tensor) for tensor in signature.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"kind": _Symbol(f"KIND_{device.upper()}"), "count": instances}],
        # No preferred batch sizes: with [4, 8], ten waiting robots would be served as eight, then two.
        "dynamic_batching": {"max_queue_delay_microseconds": max_queue_delay_us},
        **_device_config(device),
        "parameters": _map({key: {"string_value": value} for key, value in parameters.items()}),
        "model_warmup": _warmup(signature.inputs, max_batch_size),
    }
    _write(model, version, graph, _sealed("".join(f"{line}\n" for line in _lines(config)).encode()))
    return model


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if not least <= number < 2**31:
            raise ConfigError(f"{name} is {number}; expected {least} to {2**31 - 1}.")


def _model_name(policy_folder: str | os.PathLike[str], given: str | None) -> str:
    """The given name, or one made of the last part of the path: Triton's names become folders and parts of URLs."""
    source = os.path.basename(os.path.abspath(os.path.expanduser(policy_folder)))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", source).lstrip(".-") if given is None else given
    if not _MODEL_NAME.fullmatch(name) or (given is None and not name.strip("_")):
        made = "" if given is not None else f", made of the folder's name {source!r}"
        raise ConfigError(
            f'The model name is {name!r}{made}; expected letters, digits, "_", "." and "-", the first not "." or "-". '
            "Give another model name."
        )
    return name


def _read_signature(graph: bytes, file: str) -> _Signature:
    """The tensors that the ONNX file itself declares.

    Raises:
        FormatError: the graph is not ONNX, or a tensor is of a type or shape that Triton could not batch.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtraError("Triton's configuration needs onnx: pip install 'meam-policy[export]'.") from error
    try:
        declared = onnx.load_from_string(graph).graph
    except DecodeError as error:
        raise FormatError(f"{file} is not a valid ONNX file: {error}. Export the policy again.") from error
    inputs, outputs = (
        tuple(_read_tensor(value, file) for value in values) for values in (declared.input, declared.output)
    )
    return _Signature(inputs, outputs)


def _read_tensor(value: Any, file: str) -> _Tensor:
    import onnx

    tensor = value.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if element not in _DATA_TYPES:
        expected = ", ".join(_DATA_TYPES)
        raise FormatError(f'{file}: "{value.name}" has elements {element}; expected one of {expected}. Export it anew.')
    sizes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
    if sizes[:1] != [-1] or 0 in sizes:
        raise FormatError(
            f'{file}: "{value.name}" has the shape {sizes}; expected a first axis of any size, for the batch, and no '
            "empty axis. Export it with `meam export`."
        )
    return _Tensor(value.name, _DATA_TYPES[element], tuple(sizes[1:]))


def _check_signature(signature: _Signature, spec: PolicySpec) -> None:
    """The graph and the `config.json` that clients go by must speak of the same policy."""
    for kind, tensors, name, shape in (
        ("input", signature.inputs, "observation", (spec.observation_dim,)),
        ("output", signature.outputs, "actions", (spec.chunk_size, spec.action_dim)),
    ):
        seen = {tensor.name: tensor.shape for tensor in tensors}
        if seen.get(name) != shape:
            listed = ", ".join(f'"{other}" {["batch", *sizes]}' for other, sizes in seen.items()) or "none"
            raise FormatError(
                f'policy.onnx has the {kind}s {listed}; expected "{name}" {["batch", *shape]}, as config.json says. '
                "Export the policy again."
            )


def _tensor_config(tensor: _Tensor) -> dict[str, Any]:
    config = {"name": tensor.name, "data_type": _Symbol(tensor.data_type), "dims": tensor.shape or (1,)}
    # Triton knows no empty dims: one number a row is [batch] in the graph and [batch, 1] for clients.
    return config if tensor.shape else {**config, "reshape": {"shape": ()}}


def _device_config(device: TritonDevice) -> dict[str, Any]:
    """Nothing on the CPU: the backend's default is every graph optimisation of onnxruntime."""
    if device == "cpu":
        return {}
    # TF32 rounds the factors of every product to ten bits, which the parity check of the export does not cover.
    cuda = {"name": "cuda", "parameters": _map({"use_tf32": "0"})}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}}


def _thread_parameters(device: TritonDevice) -> dict[str, str]:
    """One thread an instance: these graphs are small, and instances scale better than threads within one."""
    return {"intra_op_thread_count": "1", "inter_op_thread_count": "1"} if device == "cpu" else {}


def _warmup(inputs: Sequence[_Tensor], max_batch_size: int) -> list[dict[str, Any]]:
    """Zeros for batches of 1, 4, 16, … and the largest, before the first robot asks; axes of any size have size 1."""
    data = {
        tensor.name: {
            "data_type": _Symbol(tensor.data_type),
            "dims": tuple(max(size, 1) for size in tensor.shape) or (1,),
            "zero_data": True,
        }
        for tensor in inputs
    }
    sizes = sorted({4**power for power in range(16) if 4**power < max_batch_size} | {max_batch_size})
    return [{"name": f"batch_{size}", "batch_size": size, "inputs": _map(data)} for size in sizes]


def _policy_parameters(spec: PolicySpec, version: int) -> dict[str, str]:
    boxes = [{"key": box.key, "shape": list(box.shape)} for box in spec.observation]
    parameters = {
        "policy_version": version,
        "policy_spec_sha256": spec.identity,
        "policy_graph_sha256": spec.files[GRAPH_FILE],
        "policy_method": spec.method,
        "policy_environment_id": spec.environment_id,
        "policy_observation": json.dumps(boxes),
        "policy_chunk_size": spec.chunk_size,
        "policy_execute_steps": spec.execute_steps,
        "policy_best_of": spec.integration.best_of,
        "policy_control_rate_hz": spec.control_rate_hz,
    }
    return {key: str(value) for key, value in parameters.items() if value is not None}


def _next_version(model: Path, signature: _Signature) -> int:
    """1 for a new model; otherwise one more than the newest version, which must have the same signature.

    Raises:
        OutputError: the folder is not a model that `meam export` wrote, or its signature is another.
    """
    remedy = "Choose another model name, or delete it first."
    try:
        there = sorted(file.name for file in model.iterdir()) if model.exists() or model.is_symlink() else []
        if not there:
            return 1
        versions = [int(name) for name in there if _VERSION.fullmatch(name)]
        if not versions or _CONFIG not in there:
            raise OutputError(f"{model} holds {', '.join(there[:10])}; expected {_CONFIG} and versions. {remedy}")
        _check_seal(model / _CONFIG)
        newest = model / str(max(versions)) / _MODEL
        _check_same(_read_signature(newest.read_bytes(), str(newest)), signature, model, remedy)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"The model {model} cannot be read: {error.strerror or error}. {remedy}") from error
    return max(versions) + 1


def _check_same(old: _Signature, new: _Signature, model: Path, remedy: str) -> None:
    for kind in ("inputs", "outputs"):
        before, now = ({tensor.name: tensor for tensor in getattr(side, kind)} for side in (old, new))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise OutputError(
                    f'{model} has among its {kind} "{name}" as {_describe(before.get(name))}; this policy has it as '
                    f"{_describe(now.get(name))}, and versions of one model must agree. {remedy}"
                )


def _describe(tensor: _Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.data_type} {['batch', *tensor.shape]}"


def _sealed(text: bytes) -> bytes:
    return f"{_SEAL}{sha256(text)}\n".encode() + text


def _check_seal(config: Path) -> None:
    """Refuse to replace what somebody has edited.

    Raises:
        OutputError: the file is not as `meam export` wrote it.
    """
    data = config.read_bytes()
    if data != _sealed(data.partition(b"\n")[2]):
        raise OutputError(
            f"{config} was edited, or not written by `meam export`; expected it as written, for a new version replaces "
            "it. Move your settings to configs/NAME.pbtxt beside it, or choose another model name."
        )


def _map(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """A protobuf map, which its text format writes as repeated entries."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _lines(message: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Protobuf text format of a message: a dict is a message, a list a repeated one, a tuple repeated numbers."""
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield f"{indent}{name} {{"
                yield from _lines(item, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(item)}"


def _scalar(value: str | bool | int | tuple[int, ...]) -> str:
    if isinstance(value, _Symbol):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _quoted(text: str) -> str:
    """A string in quotes: printable ASCII as it is but for quotes and backslashes, every other byte in octal."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"config.json: {text!r} is not Unicode text ({error.reason}); expected text. Export the policy again."
        ) from error
    escaped = {ord('"'): r"\"", ord("\\"): r"\\"}
    shown = (escaped.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}") for byte in data)
    return f'"{"".join(shown)}"'


def _write(model: Path, version: int, graph: bytes, config: bytes) -> None:
    """Write a version. It appears before its configuration, for only one writer can make it."""
    try:
        with atomic_folder(model if version == 1 else model / str(version)) as hidden:
            folder = hidden / str(version) if version == 1 else hidden
            folder.mkdir(exist_ok=True)
            (folder / _MODEL).write_bytes(graph)
            if version == 1:
                (hidden / _CONFIG).write_bytes(config)
        if version > 1:
            write_atomically(model / _CONFIG, config)
    except OSError as error:
        raise OutputError(f"The Triton model {model} cannot be written: {error.strerror or error}.") from error

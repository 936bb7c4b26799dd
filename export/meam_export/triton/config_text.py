"""Triton's configuration of a policy, in the text format of protocol buffers, with a seal that reveals edits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from meam_export.triton.signature import Signature, Tensor
from meam_policy.errors import FormatError
from meam_policy.folder.policy_folder import GRAPH_FILE, sha256
from meam_policy.spec import PolicySpec

__all__ = ["TritonDevice", "config_text", "is_as_written"]

TritonDevice = Literal["cpu", "gpu"]
"""Where Triton runs a policy: "gpu" means every GPU visible to the server."""

_SEAL = "# Written by meam export. SHA-256 of the lines below: "


class _Symbol(str):
    """The name of an enum value, which the protobuf text format writes without quotes."""


def config_text(
    name: str,
    signature: Signature,
    spec: PolicySpec,
    version: int,
    *,
    max_batch_size: int,
    instances: int,
    device: TritonDevice,
    max_queue_delay_us: int,
) -> bytes:
    """Write `config.pbtxt` for a version of a policy.

    Args:
        name: Name of the model.
        signature: Inputs and outputs of its graph.
        spec: The policy's spec; its chunk size, control rate etc. become parameters that clients can read.
        version: Version that `spec` describes.
        max_batch_size: Largest batch; see `write_triton_repository` for this and the arguments below.
        instances: Copies that run in parallel.
        device: "cpu" or "gpu".
        max_queue_delay_us: How long a request may wait for a fuller batch, microseconds.

    Returns:
        Printable ASCII; its first line is a hash of the rest, which `is_as_written` checks.

    Raises:
        FormatError: the spec holds text that is not Unicode.
    """
    parameters = {**_thread_parameters(device), **_policy_parameters(spec, version)}
    config = {
        "name": name,
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
    return _sealed("".join(f"{line}\n" for line in _lines(config)).encode())


def is_as_written(text: bytes) -> bool:
    """Whether a `config.pbtxt` is byte for byte what `config_text` wrote."""
    return text == _sealed(text.partition(b"\n")[2])


def _sealed(text: bytes) -> bytes:
    return f"{_SEAL}{sha256(text)}\n".encode() + text


def _tensor_config(tensor: Tensor) -> dict[str, Any]:
    config = {"name": tensor.name, "data_type": _Symbol(tensor.data_type), "dims": tensor.shape or (1,)}
    # Triton accepts no empty dims: one number per row is [batch] in the graph and [batch, 1] for clients.
    return config if tensor.shape else {**config, "reshape": {"shape": ()}}


def _device_config(device: TritonDevice) -> dict[str, Any]:
    """Settings of the device; none on the CPU, where the backend enables all of onnxruntime's optimisations anyway."""
    if device == "cpu":
        return {}
    # TF32 rounds the factors of every product to ten bits, which the export's parity check does not cover.
    cuda = {"name": "cuda", "parameters": _map({"use_tf32": "0"})}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}}


def _thread_parameters(device: TritonDevice) -> dict[str, str]:
    """One CPU thread per instance: the graphs are small, and more instances scale better than more threads."""
    return {"intra_op_thread_count": "1", "inter_op_thread_count": "1"} if device == "cpu" else {}


def _warmup(inputs: Sequence[Tensor], max_batch_size: int) -> list[dict[str, Any]]:
    """Warm-up requests of zeros, for batches of 1, 4, 16, … and the largest; axes of any size have size 1."""
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
        "policy_observation_offset": json.dumps(spec.observation_offset) if spec.observation_offset else None,
        "policy_chunk_size": spec.chunk_size,
        "policy_execute_steps": spec.execute_steps,
        "policy_best_of": spec.integration.best_of,
        "policy_noise_scale": spec.acting.noise_scale,
        "policy_control_rate_hz": spec.control_rate_hz,
    }
    return {key: str(value) for key, value in parameters.items() if value is not None}


def _map(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """A protobuf map, which the text format writes as repeated entries."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _lines(message: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Protobuf text format of a message: dicts are messages, lists repeated messages, tuples repeated numbers."""
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
    """A quoted string: quotes and backslashes are escaped, bytes outside printable ASCII written in octal.

    Raises:
        FormatError: the text is not Unicode.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"config.json: {text!r} is not Unicode text ({error.reason}); expected text. Export the policy again."
        ) from error
    escaped = {ord('"'): r"\"", ord("\\"): r"\\"}
    shown = (escaped.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}") for byte in data)
    return f'"{"".join(shown)}"'

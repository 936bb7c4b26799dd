"""A Triton model repository: models and their numbered versions."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

from meam_export.triton.config_text import TritonDevice, config_text, is_as_written
from meam_export.triton.signature import Signature, Tensor, check_signature, read_signature
from meam_policy.atomic_files import atomic_folder, given_folder, write_atomically, write_failure
from meam_policy.errors import ConfigError, OutputError
from meam_policy.folder.policy_folder import GRAPH_FILE, locate_policy, read_config, read_graph
from meam_policy.given_files import read_regular
from meam_policy.graph.graph_check import check_graph
from meam_policy.graph.graph_identity import check_identity

__all__ = ["write_triton_repository"]

_CONFIG, _MODEL = "config.pbtxt", "model.onnx"
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[1-9][0-9]*")


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
    """Add a policy to a Triton model repository: as a new model, or as the next version of the model of that name.

    A new version must have the same inputs and outputs as the newest one. Models and versions appear in the repository
    only when complete. After a new version, `config.pbtxt` is replaced by one made from these arguments; Triton serves
    the newest version. Put settings of your own into `configs/NAME.pbtxt` in the model's folder, which is never touched
    (`--model-config-name=NAME`): a manually edited `config.pbtxt` is not overwritten.

    Args:
        policy_folder: A folder that `meam export` wrote, or a Hub repo id "owner/name".
        repository: The model repository; created if needed.
        model_name: Name of the model; by default the policy folder's, with characters other than ASCII letters, digits,
            "_", "." and "-" replaced by "_".
        max_batch_size: Largest number of rows of a batch, and of a single request; 1 or more.
        instances: Copies of the model that run in parallel: on the CPU with one thread each, on GPUs per GPU.
        device: "cpu" or "gpu".
        max_queue_delay_us: How long a request may wait for a fuller batch, microseconds. With 0, a batch holds what
            arrived while all instances were busy; otherwise every request waits this long unless a full batch gathers
            sooner.

    Returns:
        The model's folder, `repository / model_name`.

    Raises:
        NotFoundError: there is no such policy.
        HubError: the policy cannot be downloaded from the Hub.
        FormatError: the policy is broken, or Triton could not batch its graph.
        ConfigError: an argument is out of range, or the folder's name yields no model name.
        OutputError: the existing model has other inputs or outputs, was not written by `meam export` or was edited
            since, or the repository cannot be written.
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
    config = read_config(folder)
    spec, graph = config.spec, read_graph(folder, config.spec)
    signature = read_signature(graph, GRAPH_FILE)
    check_signature(signature, spec)
    check_identity(check_graph(graph), config.graph_identity(None), GRAPH_FILE)
    model = given_folder("repository", repository).absolute() / _model_name(policy_folder, model_name)
    version = _next_version(model, signature)
    config = config_text(
        model.name,
        signature,
        spec,
        version,
        max_batch_size=max_batch_size,
        instances=instances,
        device=device,
        max_queue_delay_us=max_queue_delay_us,
    )
    _write(model, version, graph, config)
    return model


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if not least <= number < 2**31:
            raise ConfigError(f"{name} is {number}; expected {least} to {2**31 - 1}.")


def _model_name(policy_folder: str | os.PathLike[str], given: str | None) -> str:
    """The given name, or one made from the last part of the path; Triton uses it in paths and URLs.

    Raises:
        ConfigError: the given name holds other characters, or the path yields no name.
    """
    source = os.path.basename(os.path.abspath(os.path.expanduser(policy_folder)))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", source).lstrip(".-") if given is None else given
    if not _MODEL_NAME.fullmatch(name) or (given is None and not name.strip("_")):
        made = "" if given is not None else f", made of the folder's name {source!r}"
        raise ConfigError(
            f'The model name is {name!r}{made}; expected letters, digits, "_", "." and "-", the first not "." or "-". '
            "Give another model name."
        )
    return name


def _next_version(model: Path, signature: Signature) -> int:
    """1 for a new model; otherwise one more than the newest version, which must have the same signature.

    Raises:
        OutputError: the folder is not a model that `meam export` wrote, or its signature differs.
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
        _check_same(read_signature(read_regular(newest), str(newest)), signature, model, remedy)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"The model {model} cannot be read: {error.strerror or error}. {remedy}") from error
    return max(versions) + 1


def _check_same(old: Signature, new: Signature, model: Path, remedy: str) -> None:
    for kind in ("inputs", "outputs"):
        before, now = ({tensor.name: tensor for tensor in getattr(side, kind)} for side in (old, new))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise OutputError(
                    f'{model} has among its {kind} "{name}" as {_describe(before.get(name))}; this policy has it as '
                    f"{_describe(now.get(name))}, and versions of one model must agree. {remedy}"
                )


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.data_type} {['batch', *tensor.shape]}"


def _check_seal(config: Path) -> None:
    """Refuse to replace an edited configuration.

    Raises:
        OutputError: the file differs from what `meam export` wrote.
    """
    if not is_as_written(read_regular(config)):
        raise OutputError(
            f"{config} was edited, or not written by `meam export`; expected it unchanged, since a new version "
            "replaces it. Move your settings to configs/NAME.pbtxt beside it, or choose another model name."
        )


def _write(model: Path, version: int, graph: bytes, config: bytes) -> None:
    """Write a version before its configuration: of two concurrent writers, only one can create the folder."""
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
        reason = write_failure(error, model, len(graph) + len(config))
        raise OutputError(f"The Triton model {model} cannot be written: {reason}.") from error

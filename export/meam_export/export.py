"""Writing a policy folder from a checkpoint."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors.torch import save

from meam_export.card import render_card
from meam_export.graph import PolicyModule, build_graph
from meam_export.parity import check_parity, random_inputs
from meam_policy.errors import ConfigError, OutputError
from meam_policy.folder import CONFIG_FILE, GRAPH_FILE, sha256
from meam_policy.spec import PolicySpec, Solver
from meam_training.algorithm import MeamNetworks
from meam_training.checkpoint import Checkpoint

__all__ = ["export_policy"]

GOLDEN_INPUTS = 16


def export_policy(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    flow_steps: int | None = None,
    solver: Solver | None = None,
) -> Path:
    """Export a checkpoint as a policy folder, which `MeamPolicy.from_pretrained` loads without PyTorch.

    The folder holds `config.json`, one self-contained `policy.onnx`, `model.safetensors` (the networks),
    `golden.safetensors` (random observations and noises with the expected actions) and `README.md` (the model card).
    It appears whole, after the graph has been run in onnxruntime against PyTorch.

    Args:
        checkpoint: A checkpoint, its folder, or a training folder, of which the newest checkpoint is taken.
        output_dir: The policy folder to write; must not exist, or be empty.
        flow_steps: Velocity evaluations of the exported policy; None takes those of training. A policy is trained as
            the map that its own steps make, so another number changes its actions.
        solver: Integration scheme of the exported policy, "euler" or "midpoint"; None takes that of training.

    Returns:
        The policy folder.

    Raises:
        OutputError: the folder holds something already, or cannot be written.
        NotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is broken.
        ConfigError: flow_steps or solver is out of range.
        ParityError: the graph does not compute what the checkpoint does; nothing is written.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    folder = Path(output_dir).expanduser().absolute()
    _check_output_folder(folder)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.load(checkpoint)
    try:
        spec = replace(
            source.spec,
            flow_steps=source.spec.flow_steps if flow_steps is None else flow_steps,
            solver=solver or source.spec.solver,
        )
    except ValueError as error:
        raise ConfigError(f"Cannot export with flow_steps={flow_steps}, solver={solver!r}: {error}") from error
    networks = source.load_networks().eval()
    module = PolicyModule(networks, spec)
    graph = build_graph(module, spec)
    report = check_parity(graph, module, spec)
    files = {
        GRAPH_FILE: graph,
        "model.safetensors": _model(networks),
        "golden.safetensors": _golden(module, spec),
    }
    spec = replace(spec, files={name: sha256(data) for name, data in files.items()})
    files[CONFIG_FILE] = spec.to_json().encode()
    files["README.md"] = render_card(spec, source, report).encode()
    _write(folder, files)
    return folder


def _check_output_folder(folder: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        OutputError: the folder exists and is not an empty folder.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        what = "a policy" if (folder / CONFIG_FILE).is_file() else "something"
        raise OutputError(f"{folder} already holds {what}. Choose another output folder, or delete it first.")


def _model(networks: MeamNetworks) -> bytes:
    """The networks a run can be understood and continued from; other averaged copies are of use in training only."""
    acting = {"target_policy"} | ({"target_critic"} if networks.config.best_of > 1 else set())
    state = networks.state_dict().items()
    kept = {
        name: tensor.contiguous()
        for name, tensor in state
        if not name.startswith("target_") or name.split(".")[0] in acting
    }
    return save(kept)


def _golden(module: PolicyModule, spec: PolicySpec) -> bytes:
    """Inputs and the actions that PyTorch computes from them, to check a policy on the machine it runs on."""
    observations, noise = random_inputs(spec, GOLDEN_INPUTS, seed=1)
    with torch.no_grad():
        actions = module(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()
    arrays = {"observation": observations, "noise": noise, "actions": np.ascontiguousarray(actions)}
    return safetensors.numpy.save(arrays)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write into a hidden folder beside the target first; config.json moves last, and only with it is it a policy."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.is_dir():  # an empty one, perhaps somebody's working directory
            for name in sorted(files, key=lambda name: name == CONFIG_FILE):
                (temporary / name).rename(folder / name)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"The policy folder {folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

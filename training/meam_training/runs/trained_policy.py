"""Trained policies, wherever their weights are: in a run, in a checkpoint or in a published policy folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from meam_policy.errors import ConfigError, FormatError
from meam_policy.folder.policy_folder import MODEL_FILE, find_policy, read_graph, read_spec, sha256
from meam_policy.given_files import given_path, read_regular
from meam_policy.spec import PolicySpec
from meam_policy.typed import typed
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks, build_networks
from meam_training.runs.checkpoint import Checkpoint

__all__ = ["TrainedPolicy", "load_networks"]

UNPUBLISHED = ("target_prior.", "target_policy.", "target_critic.", "trust_region.")
"""Beginnings of the names of weights that a policy folder may lack: only training uses them."""


@dataclass(frozen=True, eq=False, repr=False)
class TrainedPolicy:
    """A policy with its networks.

    Attributes:
        name: The path or Hub repo id that was given.
        spec: Its specification; that of a policy folder has the integration of the exported graph.
        config: The settings it was trained with.
        networks: Its networks, on the CPU and in float32.
        weights: SHA-256 of the file that holds its weights, in hexadecimal.
        commit: The commit on the Hub that it is of; None if it was a folder on this machine.
    """

    name: str
    spec: PolicySpec
    config: TrainConfig
    networks: MeamNetworks
    weights: str
    commit: str | None = None

    def __repr__(self) -> str:
        """Short description; the weights would fill pages."""
        return f"TrainedPolicy({self.name!r}, method={self.config.method!r})"

    @classmethod
    def load(cls, policy_or_run: str | os.PathLike[str]) -> TrainedPolicy:
        """Read a policy's networks; nothing is unpickled.

        Args:
            policy_or_run: A policy folder or its Hub repo id; or a checkpoint, or a run, whose newest one is taken.

        Raises:
            NotFoundError: there is no such folder, or no checkpoint or weights in it.
            FormatError: a file of the policy folder is broken, or was changed since its export.
            CheckpointError: the checkpoint is broken.
            HubError: the Hub could not deliver the policy.
            ConfigError: the path is empty, or no path.
        """
        if _is_training(policy_or_run):
            checkpoint = Checkpoint.load(policy_or_run)
            networks = checkpoint.load_networks()
            weights = sha256(read_regular(checkpoint.path / MODEL_FILE))
            return cls(str(policy_or_run), checkpoint.spec, checkpoint.config, networks, weights)
        folder, commit = find_policy(policy_or_run)
        spec = read_spec(folder)
        config = _settings(spec)
        networks = _networks(spec, config, _weights(folder, spec))
        return cls(str(policy_or_run), spec, config, networks, spec.files[MODEL_FILE], commit)


@typed()
def load_networks(policy_or_run: str | os.PathLike[str]) -> MeamNetworks:
    """Load the networks of a policy folder in PyTorch, for further research.

    `networks.encoder` encodes raw observations (less `spec.observation_offset`, if there is one), `networks.act` maps
    these and noise to chunks in [-1, 1], `networks.prior`, `networks.policy` and `networks.critic` are the parts;
    `PolicyModule(networks, spec)` maps observations to actions in environment units. Target networks that are not
    published are copies of what they follow.

    Args:
        policy_or_run: A policy folder or its Hub repo id; or a checkpoint, or a run, whose newest one is taken.

    Returns:
        The networks, on the CPU, in float32 and in evaluation mode; they integrate the flow as the policy does.

    Raises:
        NotFoundError: there is no such folder, or no checkpoint or weights in it.
        FormatError: a file of the policy folder is broken, or was changed since its export.
        CheckpointError: the checkpoint is broken.
        HubError: the Hub could not deliver the policy.
        ConfigError: the path is empty, or no path.
    """
    trained = TrainedPolicy.load(policy_or_run)
    trained.networks.integration = trained.spec.integration
    return trained.networks.eval()


def _is_training(given: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a run or a checkpoint, the names `latest` and `best` included."""
    if not isinstance(given, (str, os.PathLike)) or not str(given).strip():
        return False  # locate_policy refuses it
    path = given_path("The policy or run", given)
    in_run = path.absolute().parent.name == "checkpoints" and path.absolute().parent.is_dir()
    return in_run or any((path / name).exists() for name in ("run.json", "trainer.json", "checkpoints"))


def _settings(spec: PolicySpec) -> TrainConfig:
    try:
        return TrainConfig.from_json(json.dumps(dict(spec.hyperparameters)))
    except ConfigError as error:
        raise FormatError(
            f"config.json: hyperparameters are not the settings of a training run ({str(error).rstrip('.')}); expected "
            "those that `meam train` wrote, from which its networks are built. Export the policy again."
        ) from error


def _weights(folder: Path, spec: PolicySpec) -> dict[str, Tensor]:
    data = read_graph(folder, spec, MODEL_FILE)
    try:
        return load(data)
    except SafetensorError as error:
        raise FormatError(
            f"{folder / MODEL_FILE} is not a safetensors file ({error}). Download or export the policy again."
        ) from error


def _networks(spec: PolicySpec, config: TrainConfig, weights: dict[str, Tensor]) -> MeamNetworks:
    """Build the networks with a policy folder's weights."""
    settings = replace(config, precision="float32")  # deployed policies always compute in float32
    with torch.device("meta"):  # allocates nothing: the sizes are those of a file from elsewhere
        expected = {name: tensor.shape for name, tensor in MeamNetworks(spec, settings).state_dict().items()}
    missing = [name for name in expected if name not in weights and not name.startswith(UNPUBLISHED)]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        seen = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which its networks have not"
        raise FormatError(
            f"{MODEL_FILE} {seen}; expected the weights that config.json describes. Export the policy again."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name] or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise FormatError(
                f"{MODEL_FILE}: {name} is {tensor.dtype} {list(tensor.shape)}; expected finite float32 "
                f"{list(expected[name])}. Export the policy again."
            )
    networks = build_networks(spec, settings)
    networks.load_state_dict(weights, strict=False)
    followed = (("target_prior", "prior"), ("target_policy", "policy"), ("target_critic", "critic"))
    for copied, original in followed:
        held = getattr(networks, copied, None)
        if held is not None and not any(name.startswith(f"{copied}.") for name in weights):
            held.load_state_dict(getattr(networks, original).state_dict())
    return networks

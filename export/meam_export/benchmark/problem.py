"""The policy that the benchmark times, and the files from which the contestants load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from meam_export.benchmark.settings import InferenceSetting
from meam_export.graph.parity import draw_noise, random_observations, reference
from meam_policy.spec import BoxSpec, PolicySpec
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks, build_networks
from meam_training.networks.policy_module import PolicyModule
from meam_training.runs.checkpoint import Checkpoint

__all__ = [
    "Problem",
    "checkpoint_problem",
    "formula",
    "formula_obstacle",
    "linear_layers",
    "random_problem",
    "read_networks",
    "record",
    "write_networks",
]

_INPUTS = 16
_ROWS = 64
_CLEAR = 1e-3
"""Inputs are kept only if the values of the best two chunks differ by more than this share of the values' spread:
closer than that, other float32 arithmetic may choose the other chunk."""


@dataclass(frozen=True)
class Problem:
    """A policy that draws one chunk per decision, in float32.

    Attributes:
        setting: Sizes of the networks.
        networks: The networks with their weights.
        spec: The policy's spec.
        config: Settings of the run that trained it.
    """

    setting: InferenceSetting
    networks: MeamNetworks
    spec: PolicySpec
    config: TrainConfig


def random_problem(setting: InferenceSetting) -> Problem:
    """A policy with random weights, the same in every run, and non-zero biases."""
    obs, act = setting.observation_dim, setting.action_dim
    config = TrainConfig.preset(
        "qam",
        hidden_dims=setting.hidden_dims,
        critic_hidden_dims=setting.hidden_dims,
        num_critics=setting.num_critics,
        nfe=setting.nfe,
        chunk_size=setting.chunk_size,
    )
    spec = PolicySpec(
        observation=(BoxSpec((obs,), "float64", (-np.inf,) * obs, (np.inf,) * obs),),
        action=BoxSpec((act,), "float32", (-2.0,) * act, (1.0,) * act),
        chunk_size=setting.chunk_size,
        execute_steps=setting.chunk_size,
        observation_mean=(0.3,) * obs,
        observation_std=(1.5,) * obs,
        action_offset=(-0.5,) * act,
        action_scale=(1.5,) * act,
        integration=config.integration,
        method=config.method,
    )
    networks = build_networks(spec, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return Problem(setting, networks, spec, config)


def checkpoint_problem(path: Path, batch: int = 1) -> Problem:
    """A trained policy that draws one chunk per decision.

    Raises:
        NotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is broken.
    """
    checkpoint = Checkpoint.load(path)
    spec, config = checkpoint.spec, checkpoint.config
    spec = replace(spec, integration=replace(spec.integration, best_of=1))
    sizes = (spec.observation_dim, spec.action_dim, spec.chunk_size, config.hidden_dims)
    critics = config.num_critics if config.trains_policy else 0
    setting = InferenceSetting(f"checkpoint {path.name}", *sizes, critics, spec.integration.nfe, batch)
    return Problem(setting, checkpoint.load_networks().eval(), spec, config)


def record(networks: MeamNetworks, spec: PolicySpec, batch: int) -> dict[str, NDArray[Any]]:
    """Inputs, and the policy's actions in float64.

    Returns:
        `observation` [n, batch, obs], `noise` [n, batch, noise_dim], `expected` [n, batch, chunk_size, action_dim], and
        `scale` [action_dim], the half width of every action.
    """
    rows = batch * max(1, min(_INPUTS, _ROWS // batch))
    spare = rows if spec.integration.best_of == 1 else 2 * rows
    exact = reference(PolicyModule(networks, spec))
    observation, noise = random_observations(spec, spare, seed=5), draw_noise(spec, spare, seed=5)
    with torch.no_grad():
        inputs = tuple(torch.from_numpy(array).double() for array in (observation, noise))
        expected = exact(*inputs).numpy()
        clear = np.ones(spare, bool)
        if spec.integration.best_of > 1:
            best, second = exact.all_values(*inputs).sort(dim=0, descending=True).values[:2]
            clear = (best - second > _CLEAR * best.std()).numpy()
    kept = np.flatnonzero(clear)[:rows]
    kept = kept[: len(kept) // batch * batch]
    arrays = {"observation": observation, "noise": noise, "expected": expected}
    found = {name: array[kept].reshape(-1, batch, *array.shape[1:]) for name, array in arrays.items()}
    return {**found, "scale": np.array(spec.action_scale)}


def linear_layers(networks: MeamNetworks) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights [out, in] and biases [out] of the deployed velocity field; its input is the encoded observation, x, t."""
    layers = [layer for layer in networks.deployed.layers if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]


def formula_obstacle(problem: Problem) -> str | None:
    """Why `formula` does not describe this policy; None if it does."""
    networks, spec = problem.networks, problem.spec
    plain = spec.integration.solver == "euler" and not networks.confine and spec.integration.time_grid is None
    if plain and networks.edit_policy is None and not networks.encoder.frequencies.shape[1]:
        return None
    return "written for Euler steps of an unconfined flow, without edits or Fourier features"


def formula(problem: Problem) -> dict[str, NDArray[np.float32]]:
    """The arrays of the policy's formula, which the NumPy and JAX contestants compute.

    The normalised observation is s = (o - `mean`) / `std`; x <- x + v(s, x, t) / K at each of the K `times` t; v is a
    tanh-GELU network with the layers `weight.0`, `bias.0`, ...; the actions are `offset` + `scale` clip(x, -1, 1),
    clipped to `low` and `high`, all of them flattened [chunk_size * action_dim].
    """
    spec, chunk = problem.spec, problem.spec.chunk_size
    per_action = {"offset": spec.action_offset, "scale": spec.action_scale, "low": spec.action.low}
    found: dict[str, Any] = {
        "mean": spec.observation_mean,
        "std": spec.observation_std,
        "times": np.arange(spec.integration.nfe) / spec.integration.nfe,
        **{name: np.tile(values, chunk) for name, values in per_action.items()},
        "high": np.tile(spec.action.high, chunk),
    }
    for i, (weight, bias) in enumerate(linear_layers(problem.networks)):
        found |= {f"weight.{i}": weight, f"bias.{i}": bias}
    return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in found.items()}


def write_networks(folder: Path, problem: Problem) -> None:
    """Write a problem's networks to a folder from which `read_networks` reads them."""
    (folder / "train_config.json").write_text(problem.config.to_json(), encoding="utf-8")
    state: Mapping[str, torch.Tensor] = problem.networks.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def read_networks(folder: Path, spec: PolicySpec) -> MeamNetworks:
    """Read the networks that `write_networks` wrote."""
    config = TrainConfig.from_json((folder / "train_config.json").read_bytes())
    networks = build_networks(spec, config)
    networks.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return networks

"""Arrays that a public implementation computed, as the networks, batch and noise of an update."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meam_policy.spec import BoxSpec, Integration, PolicySpec
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

Arrays = dict[str, np.ndarray[Any, Any]]

NETWORKS = {
    "actor_slow": "prior",
    "actor_fast": "policy",
    "target_actor_slow": "target_prior",
    "critic": "critic",
    "target_critic": "target_critic",
}
UNREAD = {"target_actor_fast"}
"""Kept by the public code of TRQAM, and never read."""


@dataclass
class Case:
    """One case of a file: its arrays, `in/…` and `out/…`, and what they are in our code.

    Attributes:
        tolerance: Largest difference allowed, as a share of the array's largest number.
    """

    arrays: Arrays
    meta: Mapping[str, Any]
    networks: MeamNetworks
    config: TrainConfig
    batch: ChunkBatch
    noise: MeamNoise
    features: Tensor
    dtype: torch.dtype
    tolerance: float

    def input(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[f"in/{name}"], dtype=self.dtype)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return weights(self.arrays, prefix)

    def assert_same(self, ours: Tensor, name: str) -> None:
        self.assert_equals(ours, self.arrays[f"out/{name}"], name)

    def assert_equals(self, ours: Tensor, expected: np.ndarray[Any, Any], name: str) -> None:
        ours = ours.detach()
        assert ours.dtype == self.dtype
        assert tuple(ours.shape) == expected.shape
        error = np.abs(ours.double().numpy() - expected).max() / np.abs(expected).max()
        print(f"parity {self.dtype} {name} {error:.1e}")  # read by benchmarks/accuracy: pytest -rP
        assert error <= self.tolerance, f"{name} differs by {error:.1e} of its scale"


def weights(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    """The reference's weights under our names and in our layout."""
    found = {}
    for key, array in arrays.items():
        if not key.startswith(prefix):
            continue
        module, _, layer, kind = key.removeprefix(f"{prefix}modules_").split("/")
        if module in UNREAD:
            continue
        name, (layer_kind, index) = NETWORKS[module], layer.split("_")
        if "critic" in name:
            part = {"kernel": "weights", "scale": "norm_scales"}.get(kind)
            part = part or {"Dense": "biases", "LayerNorm": "norm_biases"}[layer_kind]
            found[f"{name}.{part}.{index}"] = torch.tensor(array if kind == "kernel" else array[:, None])
        else:
            part = {"Dense": "layers", "LayerNorm": "norms"}[layer_kind]
            of = "bias" if kind == "bias" else "weight"
            found[f"{name}.{part}.{index}.{of}"] = torch.tensor(array.T if kind == "kernel" else array)
    return found


MakeCase = Callable[..., Case]


@pytest.fixture(scope="session")
def reference_arrays() -> Callable[..., Arrays]:
    """The arrays of a file whose names begin with any of the prefixes, without them."""

    def read(file: str, *prefixes: str) -> Arrays:
        with np.load(Path(__file__).parents[1] / "fixtures" / file) as arrays:
            return {
                key.removeprefix(prefix): arrays[key]
                for prefix in prefixes
                for key in arrays.files
                if key.startswith(prefix)
            }

    return read


@pytest.fixture(scope="session")
def make_case() -> MakeCase:
    """A case of the given arrays, with the settings of a preset."""

    def make(arrays: Arrays, preset: str, settings: Mapping[str, str], dtype: torch.dtype, tolerance: float) -> Case:
        meta = json.loads(str(arrays["in/meta_json"]))
        given = {ours: meta[theirs] for ours, theirs in settings.items()}
        config = TrainConfig.preset(preset, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        observed, acted = arrays["in/batch/observations"].shape[-1], arrays["in/batch/actions"].shape[-1]
        spec = PolicySpec(
            integration=Integration(nfe=config.nfe),
            observation=(BoxSpec((observed,), "float32", (-np.inf,) * observed, (np.inf,) * observed),),
            action=BoxSpec((acted,), "float32", (-1.0,) * acted, (1.0,) * acted),
            chunk_size=config.chunk_size,
            execute_steps=config.chunk_size,
            observation_mean=(0.0,) * observed,
            observation_std=(1.0,) * observed,
            action_offset=(0.0,) * acted,
            action_scale=(1.0,) * acted,
            method=config.method,
        )
        networks = MeamNetworks(spec, config)
        found = weights(arrays, "in/params/")
        own = {k: v for k, v in networks.state_dict().items() if k.startswith(("encoder.", "trust_region."))}
        networks.load_state_dict({**found, **own}, strict=True)
        networks.to(dtype)

        def put(key: str) -> Tensor:
            return torch.tensor(arrays[f"in/{key}"], dtype=dtype)

        batch = ChunkBatch(
            observations=put("batch/observations"),
            actions=put("batch/actions").flatten(1),
            rewards=put("batch/rewards")[:, -1],
            next_observations=put("batch/next_observations")[:, -1],
            masks=put("batch/masks")[:, -1],
            valid=put("batch/valid")[:, -1],
            within=put("batch/valid")[:, -1:].expand(-1, spec.chunk_dim),
            **dict.fromkeys(("returns", "known"), torch.zeros(0, dtype=dtype)),
        )
        # The reference draws one chunk for one decision; there is nothing random but what follows.
        assert config.best_of == spec.integration.best_of == 1
        drawn = draw_noise(config.batch_size, spec.chunk_dim, config, torch.Generator(), torch.device("cpu"))
        used = {
            "next_x_0": put("next_noise")[:, 0],
            "flow_x_0": put("flow_x0"),
            "flow_t": put("flow_t"),
            "sde_x_0": put("sde_x0"),
            "sde": put("sde_noise")[:-1],
        }
        unused = {field: tensor.to(dtype) for field, tensor in drawn._asdict().items() if field not in used}
        assert not any(tensor.numel() for tensor in unused.values())
        noise = MeamNoise(**{**unused, **used})
        features = networks.encoder(batch.observations)
        return Case(arrays, meta, networks, config, batch, noise, features, dtype, tolerance)

    return make

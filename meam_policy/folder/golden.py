"""The golden actions of a policy folder, computed by PyTorch, with which a machine's actions are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import FormatError, NotFoundError
from meam_policy.folder.policy_folder import read_graph
from meam_policy.folder.safetensors_reader import read_arrays
from meam_policy.spec import PolicySpec

__all__ = ["GOLDEN_FILE", "Golden"]

GOLDEN_FILE = "golden.safetensors"

_DRAWN = 8

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """Inputs, and the actions of the policy as trained.

    Attributes:
        observation: Raw observations [n, observation_dim], less `spec.observation_offset`.
        noise: Noise [n, noise_dim].
        actions: Chunks [n, chunk_size, action_dim], environment units; None if the inputs were drawn here.
    """

    observation: Rows
    noise: Rows
    actions: Rows | None

    @classmethod
    def draw(cls, spec: PolicySpec) -> Golden:
        """Draw inputs without actions, for a folder that has none: observations of the training data's spread."""
        random = np.random.default_rng(0)
        with np.errstate(over="ignore"):
            spread = random.standard_normal((_DRAWN, spec.observation_dim)) * np.array(spec.observation_std)
        most = float(np.finfo(np.float32).max)
        observation = np.clip(np.array(spec.observation_mean) + spread, -most, most).astype(np.float32)
        return cls(observation, random.standard_normal((_DRAWN, spec.noise_dim), dtype=np.float32), None)

    @classmethod
    def read(cls, folder: Path, spec: PolicySpec) -> Golden:
        """Read the folder's golden.safetensors.

        Raises:
            NotFoundError: there is none.
            IntegrityError: its hash is not the one that `config.json` records.
            FormatError: it is broken, or does not fit the policy.
        """
        if GOLDEN_FILE not in spec.files:
            raise NotFoundError(
                f"{folder} has no {GOLDEN_FILE} in its config.json, so there are no actions to compare with; expected "
                "what `meam export` writes. Export the policy again."
            )
        arrays = read_arrays(read_graph(folder, spec, GOLDEN_FILE), GOLDEN_FILE)
        if set(arrays) != {"observation", "noise", "actions"}:
            raise FormatError(
                f"{GOLDEN_FILE} holds {sorted(arrays) or 'nothing'}; expected ['actions', 'noise', 'observation']. "
                "Export the policy again."
            )
        count = arrays["actions"].shape[:1]
        shapes = {
            "observation": (*count, spec.observation_dim),
            "noise": (*count, spec.noise_dim),
            "actions": (*count, spec.chunk_size, spec.action_dim),
        }
        for name, array in arrays.items():
            if array.shape != shapes[name]:
                raise FormatError(
                    f'{GOLDEN_FILE}: "{name}" has the shape {list(array.shape)}; expected {list(shapes[name])}, as '
                    "config.json says. Export the policy again."
                )
            if not np.isfinite(array).all():
                row = np.argwhere(~np.isfinite(array))[0][0]
                raise FormatError(
                    f'{GOLDEN_FILE}: "{name}" has NaN or infinity in row {row}; expected finite numbers. '
                    "Export the policy again."
                )
        return cls(**arrays)

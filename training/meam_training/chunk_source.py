"""Where a learner's batches come from."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from meam_policy.spec import PolicySpec
from meam_training.algorithm import ChunkBatch
from meam_training.config import TrainConfig
from meam_training.dataset import OfflineDataset

__all__ = ["ChunkSource", "DeviceChunks"]


class ChunkSource(Protocol):
    """Draws batches of chunks, on the training device."""

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        ...

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks, their starts uniform over the rows."""
        ...


class DeviceChunks:
    """The data set's chunks on the training device, actions normalised to [-1, 1]."""

    def __init__(self, config: TrainConfig, dataset: OfflineDataset, spec: PolicySpec, device: torch.device) -> None:
        sampler = dataset.chunk_sampler(config.chunk_size, config.discount)
        targets = sampler.targets
        normalised = (sampler.actions - np.array(spec.action_offset)) / np.array(spec.action_scale)

        def put(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._observations = put(sampler.observations)
        self._actions = put(normalised.clip(-1, 1).astype(np.float32))
        self._next_observations = put(sampler.next_observations)
        self._rewards, self._masks, self._valid = map(put, (targets.rewards, targets.masks, targets.valid))
        self._last_rows = put(targets.last_rows)
        self._offsets = torch.arange(config.chunk_size, device=device)

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        return len(self._rewards)

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks, their starts uniform over the rows."""
        device = self._rewards.device
        starts = torch.randint(len(self._rewards), (batch_size,), generator=generator, device=device)
        return ChunkBatch(
            observations=self._observations[starts],
            actions=self._actions[starts[:, None] + self._offsets].flatten(1),
            rewards=self._rewards[starts],
            next_observations=self._next_observations[self._last_rows[starts]],
            masks=self._masks[starts],
            valid=self._valid[starts],
        )

"""Sources of a learner's batches."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meam_policy.errors import DatasetError
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch
from meam_training.config import TrainConfig
from meam_training.data.action_chunk import ActionChunkBatch
from meam_training.data.dataset import OfflineDataset
from meam_training.data.dataset_cache import rows_per_block
from meam_training.data.reward_offset import RewardOffset
from meam_training.networks.action_normaliser import ActionNormaliser

__all__ = ["ChunkSource", "DeviceChunks", "HostChunks", "chunk_batch", "make_chunk_source"]

COMFORTABLE_SHARE = 0.5
"""Share of the device's free memory that the data may occupy; the networks and other processes need the rest."""


class ChunkSource(Protocol):
    """Draws batches of chunks on the training device.

    Attributes:
        offset: What is taken off the rewards.
    """

    offset: RewardOffset

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        ...

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks, their starts uniform over the rows, or over those of each part of the data by its share."""
        ...


class DeviceChunks:
    """The data set's chunks on the training device, actions normalised to [-1, 1]."""

    def __init__(self, config: TrainConfig, dataset: OfflineDataset, spec: PolicySpec, device: torch.device) -> None:
        self.offset = RewardOffset.of(dataset, config.reward_offset, config.discount)
        dataset = self.offset.off(dataset)
        sampler = dataset.chunk_sampler(config.chunk_size, config.discount, config.pad_chunks)
        rows, starts = len(dataset), len(sampler)
        self._observations, self._next_observations = torch.empty(2, rows, dataset.observation_dim, device=device)
        self._actions = torch.empty(rows, dataset.action_dim, device=device)
        normalise = ActionNormaliser.of(spec).normalise
        self._rewards, self._masks, self._valid = torch.empty(3, starts, device=device)
        self._last_rows, self._steps = torch.empty(2, starts, dtype=torch.int64, device=device)
        self._offsets = torch.arange(config.chunk_size, device=device)
        self._returns, self._known = (
            values.to(device) for values in _returns(dataset, config.pretrains_critics, config.discount, self.offset)
        )
        self._draw = _Draw(dataset, starts, device)
        targets = (self._rewards, self._masks, self._valid, self._last_rows, self._steps)
        step, discount = rows_per_block(dataset.observation_dim), config.discount**config.chunk_size
        for part in (slice(first, first + step) for first in range(0, rows, step)):
            self._observations[part] = _tensor(dataset.observations[part])
            self._actions[part] = _tensor(normalise(dataset.actions[part]).astype(np.float32))
            self._next_observations[part] = _tensor(dataset.next_observations[part])
            found = sampler.targets(np.arange(starts)[part])
            found = found._replace(rewards=self.offset.raised(found.rewards, found.masks, discount))
            for target, values in zip(targets, found, strict=True):
                target[part] = _tensor(values)

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        return len(self._rewards)

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks, their starts uniform over the rows."""
        starts = self._draw(batch_size, generator)
        return ChunkBatch(
            observations=self._observations[starts],
            actions=self._actions[(starts[:, None] + self._offsets) % len(self._actions)].flatten(1),
            rewards=self._rewards[starts],
            next_observations=self._next_observations[self._last_rows[starts]],
            masks=self._masks[starts],
            valid=self._valid[starts],
            within=_components(self._offsets < self._steps[starts, None], self._actions.shape[1]),
            returns=self._returns[starts],
            known=self._known[starts],
        )


class HostChunks:
    """The data set's chunks, kept in host memory or on disk; only each batch is copied to the training device.

    For critics that are pretrained, the data's returns are kept in memory, eight bytes a row. Draws batches
    bit-identical to those of `DeviceChunks`.

    Args:
        config: Settings.
        dataset: The data.
        spec: How actions are normalised.
        device: Training device.
        with_returns: Whether chunks carry their returns if critics are pretrained; otherwise zeros.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: OfflineDataset,
        spec: PolicySpec,
        device: torch.device,
        *,
        with_returns: bool = True,
    ) -> None:
        self.offset = RewardOffset.of(dataset, config.reward_offset, config.discount)
        dataset = self.offset.off(dataset)
        self._sampler = dataset.chunk_sampler(config.chunk_size, config.discount, config.pad_chunks)
        self._discount = config.discount**config.chunk_size
        self._normalise = ActionNormaliser.of(spec).normalise
        self._device = device
        self._draw = _Draw(dataset, len(self._sampler), device)
        wanted = with_returns and config.pretrains_critics
        self._returns, self._known = _returns(dataset, wanted, config.discount, self.offset)

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        return len(self._sampler)

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks, their starts uniform over the rows."""
        return self.at(self._draw(batch_size, generator).cpu().numpy())

    def at(self, starts: NDArray[np.int64]) -> ChunkBatch:
        """Batch of the chunks that start at the given rows [batch]."""
        batch = self._sampler.batch(starts)
        rewards = self.offset.raised(batch.rewards, batch.masks, self._discount)
        batch = batch._replace(actions=self._normalise(batch.actions).astype(np.float32), rewards=rewards)
        on_host = chunk_batch(batch, self._returns[starts], self._known[starts])
        return ChunkBatch(*(values.to(self._device) for values in on_host))


def make_chunk_source(
    config: TrainConfig, dataset: OfflineDataset, spec: PolicySpec, device: torch.device
) -> DeviceChunks | HostChunks:
    """Put the data on the training device if they fit into half of its free memory; else leave them where they are.

    Args:
        config: Settings.
        dataset: Training data.
        spec: How actions are normalised.
        device: Training device.

    Raises:
        DatasetError: no episode is as long as a chunk.
    """
    # Of a row; and two int64.
    numbers = 2 * dataset.observation_dim + dataset.action_dim + 3 + 2 * config.pretrains_critics
    needed = len(dataset) * (4 * numbers + 16)
    # torchrun's processes on this machine share its memory.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    resident = needed * sharing <= COMFORTABLE_SHARE * _free_memory(device)
    return (DeviceChunks if resident else HostChunks)(config, dataset, spec, device)


def chunk_batch(batch: ActionChunkBatch, returns: Tensor, known: Tensor) -> ChunkBatch:
    """Put a batch of NumPy arrays, whose actions are normalised, into tensors on the CPU.

    Args:
        batch: The chunks.
        returns: Returns of the data from their first actions on [batch].
        known: Recorded shares of these [batch].
    """
    return ChunkBatch(
        observations=_tensor(batch.observations),
        actions=_tensor(batch.actions.reshape(len(batch.actions), -1)),
        rewards=_tensor(batch.rewards),
        next_observations=_tensor(batch.next_observations),
        masks=_tensor(batch.masks),
        valid=_tensor(batch.valid),
        within=_components(_tensor(batch.within), batch.actions.shape[2]),
        returns=returns,
        known=known,
    )


def _returns(dataset: OfflineDataset, wanted: bool, discount: float, offset: RewardOffset) -> tuple[Tensor, Tensor]:
    """Raised returns of the data from each row on, their known shares [n]; zeros if nobody wants them."""
    if not wanted:
        nothing = torch.zeros(1).expand(len(dataset))
        return nothing, nothing
    found = dataset.discounted_returns(discount)
    returns = found.continued(dataset.rewards, discount) + offset.level
    return _tensor(returns.astype(np.float32)), _tensor((1 - found.tails).astype(np.float32))


def _components(actions: Tensor, action_dim: int) -> Tensor:
    """One number for each action of a chunk [batch, H] as one for each of its components [batch, act]."""
    return actions.float().repeat_interleave(action_dim, dim=1)


class _Draw:
    """Draws rows at which chunks start: uniformly, or within each part of the data by its share."""

    def __init__(self, dataset: OfflineDataset, starts: int, device: torch.device) -> None:
        self._starts, self._device, self._parts = starts, device, None
        if dataset.parts:
            rows, shares = (np.array(numbers) for numbers in zip(*dataset.parts, strict=True))
            first = np.cumsum(rows) - rows
            # The last rows of the last part start no chunk.
            sizes = np.minimum(rows, starts - first)
            if (sizes < 1).any():
                raise DatasetError(
                    f"The last data set has {rows[-1]} rows, in which no chunk starts; expected more of them. Use "
                    "shorter chunks."
                )
            self._parts = tuple(torch.from_numpy(each).to(device) for each in (first, sizes, np.cumsum(shares)[:-1]))

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        if self._parts is None:
            return torch.randint(self._starts, (batch_size,), generator=generator, device=self._device)
        first, sizes, upto = self._parts
        drawn = torch.rand(batch_size, generator=generator, device=self._device, dtype=torch.float64)
        part = torch.searchsorted(upto, drawn, right=True)
        # The remainder of a number this large is as good as uniform.
        within = torch.randint(2**62, (batch_size,), generator=generator, device=self._device) % sizes[part]
        return first[part] + within


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _free_memory(device: torch.device) -> float:
    """Memory still available to this process on a device, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):
        return math.inf  # Windows does not report it, and swaps to disk
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # Linux, where most memory that is not free is page cache
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # the container's limit
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(limit.with_name("memory.current").read_text()))
    return free

"""Data-parallel training: N processes, started by torchrun, that are together equivalent to a single one.

All processes draw the same batch and noise, and each works on its own rows; gradients are averaged, so the weights stay
equal everywhere. N processes with B / N rows each match one process with batch size B, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from meam_policy.errors import CheckpointError, ConfigError
from meam_training.algorithm.batch import ROW_AXES, ChunkBatch, MeamNoise, mixed_rows
from meam_training.config import TrainConfig
from meam_training.setting_text import SettingText

__all__ = ["ProcessGroup", "process_group"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """The group of processes that train together, seen from this process.

    Attributes:
        rank: Number of this process, from 0; the first one writes checkpoints and logs.
        size: Number of processes.
        device: Device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which writes the files."""
        return self.rank == 0

    def check(self, config: TrainConfig) -> None:
        """Check that the processes can divide a batch evenly.

        Raises:
            ConfigError: they cannot, or a setting needs the whole batch in one process.
        """
        if self.size == 1:
            return
        if config.online_steps:
            raise ConfigError(
                SettingText(
                    "{online_steps} is {0}; expected 0 with {1} processes, since there is only one environment. Use a "
                    "single process for online training.",
                    config.online_steps,
                    self.size,
                )
            )
        # Rows of the batch behind one observation whose candidates are weighed, which no two processes can share.
        groups = {"reweighted": config.candidates, "two_scale": 2 * config.candidates}
        unit = groups.get(config.objective, 1) if config.trains_policy else 1
        if config.batch_size % (unit * self.size):
            raise ConfigError(
                SettingText(
                    "{batch_size} is {0}; expected a multiple of {1} for {2} processes{3}.",
                    config.batch_size,
                    unit * self.size,
                    self.size,
                    f" and {config.candidates} candidates" if unit > 1 else "",
                )
            )
        if 0 < mixed_rows(config.batch_size, config) < self.size:
            raise ConfigError(
                SettingText(
                    "{mixture_weight} is {0}; expected 0, or at least one row of the batch for each of the {1} "
                    "processes.",
                    config.mixture_weight,
                    self.size,
                )
            )
        if config.adaptive_mixture:
            raise ConfigError(
                SettingText(
                    "{adaptive_mixture:True} compares rows of the whole batch, and does not work with {0} processes; "
                    "expected {adaptive_mixture:False}.",
                    self.size,
                )
            )

    def rows_of(self, batch: ChunkBatch, noise: MeamNoise) -> tuple[ChunkBatch, MeamNoise]:
        """This process's rows of an update's batch and noise: every size-th, so that the first rows are divided too."""
        if self.size == 1:
            return batch, noise
        mine = slice(self.rank, None, self.size)

        def rows(name: str, values: Tensor) -> Tensor:
            axis = ROW_AXES[name]
            return values if axis is None else values[(slice(None),) * axis + (mine,)]

        return ChunkBatch(*(values[mine] for values in batch)), MeamNoise(*map(rows, noise._fields, noise))

    def average(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Average gradients over the processes."""
        present = [gradient for gradient in gradients if gradient is not None]
        if self.size == 1 or not present:
            return list(gradients)
        flat = torch.cat([gradient.flatten() for gradient in present])
        dist.all_reduce(flat)
        parts = iter(flat.div_(self.size).split([gradient.numel() for gradient in present]))
        return [gradient if gradient is None else next(parts).view_as(gradient) for gradient in gradients]

    def average_metrics(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average metrics over the processes; of those named `…_max`, take the maximum."""
        if self.size == 1 or not metrics:
            return dict(metrics)
        mine = torch.stack([value.float() for value in metrics.values()])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        values = torch.stack(everyone)
        return {
            name: values[:, i].amax() if name.endswith("_max") else values[:, i].mean()
            for i, name in enumerate(metrics)
        }

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes get the same answer, so that they stop together."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def check_same_step(self, step: int) -> None:
        """Check that all processes resume from the same update.

        Raises:
            CheckpointError: they do not, because they see different folders.
        """
        if self.size == 1:
            return
        mine = torch.tensor(step, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        steps = [int(other) for other in everyone]
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"The processes find checkpoints of the updates {steps}; expected the same one everywhere. Give them "
                "an output folder that all machines share."
            )

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(config: TrainConfig, device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes started by torchrun, with NCCL on CUDA and gloo on the CPU; without torchrun, a group of one.

    Raises:
        ConfigError: several processes cannot train with these settings.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield ProcessGroup()
        return
    joined = not dist.is_initialized()
    if joined:
        # The others wait while the first process evaluates, which may exceed NCCL's default timeout of ten minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        group = ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
        group.check(config)
        yield group
        group.wait()  # a process that leaves while the others still talk to it takes them down
    finally:
        if joined:
            dist.destroy_process_group()

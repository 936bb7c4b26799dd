"""Data-parallel training: N processes, started by torchrun, that together do what one would.

Every process draws the same batch and the same noise and works on its own rows of them; gradients are averaged, so the
weights stay equal everywhere. N processes with batch B / N each are one process with batch B, up to rounding.
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

__all__ = ["ProcessGroup", "process_group"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0; the first one writes checkpoints and logs.
        size: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def check(self, config: TrainConfig) -> None:
        """Check that the processes can share a batch evenly.

        Raises:
            ConfigError: they cannot, or a setting looks at the whole batch at once.
        """
        if self.size == 1:
            return
        if config.online_steps:
            raise ConfigError(
                f"online_steps is {config.online_steps}; expected 0 with several processes: there is one environment."
            )
        unit = config.candidates if config.objective == "reweighted" and config.trains_policy else 1
        if config.batch_size % (unit * self.size):
            raise ConfigError(
                f"batch_size is {config.batch_size}; expected a multiple of {unit * self.size} for {self.size} "
                f"processes" + (f" and {unit} candidates." if unit > 1 else ".")
            )
        if 0 < mixed_rows(config.batch_size, config) < self.size:
            raise ConfigError(
                f"mixture_weight is {config.mixture_weight}; expected 0, or at least one row of the batch for each of "
                f"the {self.size} processes."
            )
        if config.adaptive_mixture:
            raise ConfigError(
                f"adaptive_mixture compares rows of the whole batch, so it does not go with {self.size} processes."
            )

    def rows_of(self, batch: ChunkBatch, noise: MeamNoise) -> tuple[ChunkBatch, MeamNoise]:
        """This process's rows of an update's batch and noise: every size-th, so that the first rows are shared too."""
        if self.size == 1:
            return batch, noise
        mine = slice(self.rank, None, self.size)

        def rows(name: str, values: Tensor) -> Tensor:
            axis = ROW_AXES[name]
            return values if axis is None else values[(slice(None),) * axis + (mine,)]

        return ChunkBatch(*(values[mine] for values in batch)), MeamNoise(*map(rows, noise._fields, noise))

    def average(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Mean of the gradients over the processes."""
        present = [gradient for gradient in gradients if gradient is not None]
        if self.size == 1 or not present:
            return list(gradients)
        flat = torch.cat([gradient.flatten() for gradient in present])
        dist.all_reduce(flat)
        parts = iter(flat.div_(self.size).split([gradient.numel() for gradient in present]))
        return [gradient if gradient is None else next(parts).view_as(gradient) for gradient in gradients]

    def average_metrics(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means of what is logged over the processes; of a maximum the maximum."""
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
        """Whether the flag is set in any process: all must leave the loop together."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def check_same_step(self, step: int) -> None:
        """Check that all processes go on from the same update.

        Raises:
            CheckpointError: they do not, for they see different folders.
        """
        if self.size == 1:
            return
        mine = torch.tensor(step, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        steps = [int(other) for other in everyone]
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"The processes find checkpoints of the updates {steps}; expected the same "
                "one. Give them an output folder that all machines share."
            )

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(config: TrainConfig, device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, by NCCL on CUDA and gloo on the CPU; without it there is only one.

    Raises:
        ConfigError: they cannot share the work of these settings.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield ProcessGroup()
        return
    joined = not dist.is_initialized()
    if joined:
        # The others wait while the first one evaluates, which may take longer than the ten minutes of NCCL's default.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        group = ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
        group.check(config)
        yield group
    finally:
        if joined:
            dist.destroy_process_group()

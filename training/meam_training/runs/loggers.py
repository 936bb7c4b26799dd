"""TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from meam_policy.errors import ConfigError, MissingExtraError
from meam_training.config import TrainConfig

__all__ = ["MetricSink", "TensorBoardSink", "WandBSink"]

PROJECT = "meam-policy"
"""Project of Weights & Biases, unless WANDB_PROJECT names another."""


class MetricSink(Protocol):
    """Where numbers go beside the CSV files."""

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log the numbers of a step, under `group/name`."""
        ...

    def close(self, failed: bool) -> None:
        """End the log; `failed` if an exception ended the run."""
        ...


class TensorBoardSink:
    """TensorBoard's event files, in the folder `tensorboard` of the run.

    Numbers are written as scalars of float32, which every reader of event files takes for scalars. TensorBoard's newer
    kind, a tensor of float64, is none to most of them.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "Logging to TensorBoard needs tensorboard: pip install 'meam-policy[log]'."
            ) from error
        # Always, for TensorBoard hides nothing at the first mark of this kind, but at every later one.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        for name, value in row.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self, failed: bool) -> None:
        """End the log."""
        self._writer.close()


class WandBSink:
    """Weights & Biases; the id of the run makes it go on with the same one."""

    def __init__(self, folder: Path, config: TrainConfig, run_id: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "Logging to Weights & Biases needs wandb: pip install 'meam-policy[log]'."
            ) from error
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=asdict(config),
                allow_val_change=True,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {error}. Log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave wandb out of loggers."
            ) from error

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log({f"{group}/{name}": value for name, value in row.items()}, step=step)

    def close(self, failed: bool) -> None:
        """End the log."""
        self._run.finish(exit_code=int(failed))

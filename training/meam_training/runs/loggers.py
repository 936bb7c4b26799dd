"""Logging to TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from meam_policy.errors import ConfigError
from meam_policy.extras import needs
from meam_training.config import TrainConfig

__all__ = ["MetricSink", "TensorBoardSink", "WandBSink"]

PROJECT = "meam-policy"
"""Project in Weights & Biases, unless WANDB_PROJECT names another."""


class MetricSink(Protocol):
    """Logger of metrics in addition to the CSV files."""

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log a step's metrics under `group/name`."""
        ...

    def close(self, failed: bool) -> None:
        """Close the log; `failed` tells whether an exception ended the run."""
        ...


class TensorBoardSink:
    """Writes TensorBoard event files to the run's subfolder `tensorboard`.

    Metrics are written as float32 scalars, which every reader of event files understands. Most of them do not recognise
    TensorBoard's newer float64 tensors as scalars.
    """

    def __init__(self, folder: Path, step: int) -> None:
        with needs("Logging to TensorBoard", "tensorboard", "log"):
            from torch.utils.tensorboard import SummaryWriter
        # Set for new runs too: TensorBoard ignores the first purge mark of a log and obeys only later ones.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log a step's metrics."""
        for name, value in row.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self, failed: bool) -> None:
        """Close the log."""
        self._writer.close()


class WandBSink:
    """Logs to Weights & Biases; a run with a known id is continued."""

    def __init__(self, folder: Path, config: TrainConfig, run_id: str) -> None:
        with needs("Logging to Weights & Biases", "wandb", "log"):
            import wandb
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
                "remove wandb from loggers."
            ) from error

    def write(self, group: str, step: int, row: Mapping[str, float]) -> None:
        """Log a step's metrics."""
        self._run.log({f"{group}/{name}": value for name, value in row.items()}, step=step)

    def close(self, failed: bool) -> None:
        """Close the log."""
        self._run.finish(exit_code=int(failed))

"""The numbers of a run: metrics.csv and evaluations.csv always, TensorBoard and Weights & Biases on request.

All of them get the same numbers, rounded to nine digits, which tell any two of float32 apart; TensorBoard keeps them in
float32.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from meam_policy.errors import OutputError
from meam_training.config import TrainConfig
from meam_training.runs.csv_file import CsvFile
from meam_training.runs.loggers import MetricSink, TensorBoardSink, WandBSink

__all__ = ["EVALUATIONS_FILE", "METRICS_FILE", "RunLog", "SilentLog"]

METRICS_FILE = "metrics.csv"

EVALUATIONS_FILE = "evaluations.csv"


class RunLog:
    """Writes a run's metrics and evaluations; a context manager.

    A resumed run goes on in the same files: what they hold of later steps than the one it resumes from is dropped.

    Args:
        folder: Folder of the run.
        config: Its settings; `loggers` says where the numbers go beside the CSV files.
        step: Updates done before.
        run_id: Id in Weights & Biases; the same one goes on with the same run.
        metrics: Columns of `metrics.csv` after the step; the updates per second come last, unasked.
        evaluations: Columns of `evaluations.csv` after the step.

    Raises:
        MissingExtraError: TensorBoard or Weights & Biases is asked for and not installed.
        ConfigError: Weights & Biases refuses to start.
        OutputError: a file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        step: int,
        run_id: str,
        metrics: Sequence[str],
        evaluations: Sequence[str],
    ) -> None:
        self._values: dict[str, list[Tensor]] = {}
        with _full_disk_is_an_output_error(folder):
            self._metrics = CsvFile(folder / METRICS_FILE, (*metrics, "updates_per_second"), step)
            self._evaluations = CsvFile(folder / EVALUATIONS_FILE, evaluations, step)
            self._sinks: list[MetricSink] = []
            if "tensorboard" in config.loggers:
                self._sinks.append(TensorBoardSink(folder, step))
            if "wandb" in config.loggers:
                self._sinks.append(WandBSink(folder, config, run_id))
        self._folder = folder
        self._start = time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take the metrics of one update; scalars, left on their device until the next row."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value.detach())

    def write(self, step: int) -> dict[str, float]:
        """Log the means of the metrics since the last row, and the updates per second.

        Raises:
            OutputError: a file cannot be written.
        """
        row = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        # The gradient's norm is the one metric of every update; a warm-up online has no updates.
        updates = len(self._values.get("gradient_norm", ()))
        row["updates_per_second"] = updates / (time.perf_counter() - self._start)
        self._values, self._start = {}, time.perf_counter()
        return self._log(self._metrics, "train", step, row)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log an evaluation.

        Raises:
            OutputError: a file cannot be written.
        """
        return self._log(self._evaluations, "evaluation", step, metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation of that update is logged."""
        return self._evaluations.has(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time that passes within out of the updates per second."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def flush(self) -> None:
        """Put all rows on the disk, so that they outlast a power failure.

        Raises:
            OutputError: it is full.
        """
        with _full_disk_is_an_output_error(self._folder):
            for file in (self._metrics, self._evaluations):
                file.flush()

    def _log(self, file: CsvFile, group: str, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        row = {name: float(f"{value:.9g}") for name, value in metrics.items()}
        with _full_disk_is_an_output_error(self._folder):
            file.append(step, row)
            for sink in self._sinks:
                sink.write(group, step, row)
        return row


class SilentLog(RunLog):
    """The log of a process that trains along with another one, which writes."""

    def __init__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        pass

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Forget them."""

    def write(self, step: int) -> dict[str, float]:
        """Log nothing."""
        return {}

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log nothing."""
        return {}

    def has_evaluation(self, step: int) -> bool:
        """Always: this process has none to make up for."""
        return True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is timed."""
        yield

    def flush(self) -> None:
        """Nothing is written."""


@contextlib.contextmanager
def _full_disk_is_an_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror or error
        raise OutputError(f"The log in {folder} cannot be written: {reason}. The checkpoints are intact.") from error

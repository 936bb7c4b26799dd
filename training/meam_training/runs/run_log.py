"""The log of a run: metrics.csv and evaluations.csv always, TensorBoard and Weights & Biases on request.

All of them get the same numbers, rounded to nine significant digits, enough to distinguish any two float32 numbers;
TensorBoard stores them as float32.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    A resumed run continues the same files; rows of steps after the one it resumes from are dropped.

    Args:
        folder: Folder of the run.
        config: Settings of the run; `loggers` lists the loggers besides the CSV files.
        step: Steps completed before.
        run_id: Id in Weights & Biases; a known id continues that run.
        metrics: Columns of `metrics.csv` after the step; `updates_per_second` is appended to them.
        evaluations: Columns of `evaluations.csv` after the step.
        clock: Time in seconds, from any origin.

    Raises:
        MissingExtraError: TensorBoard or Weights & Biases is requested but not installed.
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
        clock: Callable[[], float] = time.perf_counter,
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
        self._clock, self._start = clock, clock()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Collect the metrics of one update: scalars, which stay on their device until the next row is written."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value.detach())

    def write(self, step: int) -> dict[str, float]:
        """Log the mean metrics since the last row, and the updates per second.

        Raises:
            OutputError: a file cannot be written.
        """
        row = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        # Counts gradient norms, the one metric of every update; the online warm-up has none.
        updates = len(self._values.get("gradient_norm", ()))
        row["updates_per_second"] = updates / (self._clock() - self._start)
        self._values, self._start = {}, self._clock()
        return self._log(self._metrics, "train", step, row)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log an evaluation.

        Raises:
            OutputError: a file cannot be written.
        """
        return self._log(self._evaluations, "evaluation", step, metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation is logged for the step."""
        return self._evaluations.has(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the context from the updates per second."""
        before = self._clock()
        yield
        self._start += self._clock() - before

    def flush(self) -> None:
        """Flush all rows to disk, so that they survive a power failure.

        Raises:
            OutputError: the disk is full.
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
    """Log of a process that writes nothing, because another process of its group does."""

    def __init__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        pass

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Discard the metrics."""

    def write(self, step: int) -> dict[str, float]:
        """Log nothing."""
        return {}

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log nothing."""
        return {}

    def has_evaluation(self, step: int) -> bool:
        """Return True, so that this process never makes up for a missing evaluation."""
        return True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do nothing, as nothing is timed."""
        yield

    def flush(self) -> None:
        """Do nothing, as nothing is written."""


@contextlib.contextmanager
def _full_disk_is_an_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror or error
        raise OutputError(f"The log in {folder} cannot be written: {reason}. The checkpoints are intact.") from error

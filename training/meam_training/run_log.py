"""The numbers of a run: metrics.csv and evaluations.csv always, TensorBoard and Weights & Biases on request.

All of them get the same numbers, rounded to nine digits, which tell any two of float32 apart.
"""

from __future__ import annotations

import contextlib
import csv
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from meam_policy.errors import ConfigError, MissingExtraError, OutputError
from meam_training.algorithm import METRICS
from meam_training.checkpoint import flush_to_disk
from meam_training.config import TrainConfig
from meam_training.evaluation import EVALUATION_METRICS
from meam_training.online import ONLINE_METRICS

__all__ = ["EVALUATIONS_FILE", "METRICS_FILE", "RunLog", "SilentLog", "write_atomically"]

METRICS_FILE = "metrics.csv"
EVALUATIONS_FILE = "evaluations.csv"
PROJECT = "meam-policy"
"""Project of Weights & Biases, unless WANDB_PROJECT names another."""


class RunLog:
    """Writes a run's metrics and evaluations; a context manager.

    A resumed run goes on in the same files: what they hold of later steps than the one it resumes from is dropped.

    Args:
        folder: Folder of the run.
        config: Its settings; `loggers` says where the numbers go beside the CSV files.
        step: Updates done before.
        run_id: Id in Weights & Biases; the same one goes on with the same run.

    Raises:
        MissingExtraError: TensorBoard or Weights & Biases is asked for and not installed.
        ConfigError: Weights & Biases refuses to start.
        OutputError: a file cannot be written.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int, run_id: str) -> None:
        columns = (*METRICS, *ONLINE_METRICS, "gradient_norm", "updates_per_second")
        self._values: dict[str, list[Tensor]] = {}
        with _full_disk_is_an_output_error(folder):
            self._metrics = _CsvFile(folder / METRICS_FILE, columns, step)
            self._evaluations = _CsvFile(folder / EVALUATIONS_FILE, EVALUATION_METRICS, step)
            self._sinks: list[_Sink] = []
            if "tensorboard" in config.loggers:
                self._sinks.append(_TensorBoard(folder, step))
            if "wandb" in config.loggers:
                self._sinks.append(_WandB(folder, config, run_id))
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

    def _log(self, file: _CsvFile, group: str, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is timed."""
        yield

    def flush(self) -> None:
        """Nothing is written."""


class _Sink(Protocol):
    def write(self, group: str, step: int, row: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _CsvFile:
    """A CSV file with a row a step. It appears with its first row."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self._path, self._columns = path, ("step", *columns)
        if path.is_file():
            kept = [row for row in _whole_rows(path) if int(row["step"]) <= step]
            # By name: a newer version may have more columns.
            lines = [self._columns, *([row.get(name, "") for name in self._columns] for row in kept)]
            write_atomically(path, "".join(",".join(line) + "\n" for line in lines))

    def has(self, step: int) -> bool:
        return self._path.is_file() and any(int(row["step"]) == step for row in _whole_rows(self._path))

    def append(self, step: int, row: Mapping[str, float]) -> None:
        lines = [] if self._path.is_file() else [self._columns]
        lines.append((str(step), *(f"{row[name]:.9g}" if name in row else "" for name in self._columns[1:])))
        with self._path.open("a", newline="", encoding="utf-8") as file:
            file.write("".join(",".join(line) + "\n" for line in lines))

    def flush(self) -> None:
        if self._path.is_file():
            flush_to_disk(self._path)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, but for a last one that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [row for row in csv.DictReader(lines) if None not in row.values() and (row.get("step") or "").isdigit()]


class _TensorBoard:
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
        for name, value in row.items():
            # Only the new style has double precision.
            self._writer.add_scalar(f"{group}/{name}", value, step, new_style=True, double_precision=True)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
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
        self._run.log({f"{group}/{name}": value for name, value in row.items()}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is at all times there with its old or its new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_to_disk(path.parent)


@contextlib.contextmanager
def _full_disk_is_an_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror or error
        raise OutputError(f"The log in {folder} cannot be written: {reason}. The checkpoints are intact.") from error

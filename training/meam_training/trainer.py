"""The training loop."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from meam_policy.errors import CheckpointError, ConfigError, DeviceError, LockedError, OutputError
from meam_policy.spec import PolicySpec
from meam_training.algorithm import METRICS, KnownValue
from meam_training.checkpoint import Checkpoint
from meam_training.chunk_source import ChunkSource, DeviceChunks
from meam_training.config import TrainConfig
from meam_training.dataset import OfflineDataset
from meam_training.learner import Learner

__all__ = ["make_spec", "train"]

METRICS_FILE = "metrics.csv"

_FREE = (
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "evaluate_every",
    "evaluate_episodes",
    "loggers",
    "device",
    "threads",
    "compile",
)
"""Settings in which a resumed run may differ."""

_COLUMNS = (*METRICS, "gradient_norm", "updates_per_second")

Progress = Callable[[int, dict[str, float]], None]
"""Called with the updates done and the latest metrics."""


def train(
    config: TrainConfig,
    dataset: OfflineDataset,
    output_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    on_progress: Progress | None = None,
    value: KnownValue | None = None,
) -> Checkpoint:
    """Train a policy. Ctrl-C finishes the update, writes a checkpoint and raises KeyboardInterrupt.

    Args:
        config: Settings.
        dataset: Training data.
        output_dir: Folder of the run: `checkpoints/step_…` and `metrics.csv`. Created if need be.
        resume: Go on from the newest checkpoint, if there is one; on the CPU the result is bit-equal to that of an
            uninterrupted run. Only `steps`, `checkpoint_every`, `log_every`, `device` and
            `threads` may differ from its settings.
        on_progress: Called after every `log_every` updates, and at the end.
        value: Known value of actions, instead of learned critics: raw observations [batch, obs] and normalised,
            flattened chunks [batch, act] to [batch], differentiable. Give the same one to resume.

    Returns:
        The last checkpoint; its `path` is a folder that `meam_export.export_policy` takes.

    Raises:
        ConfigError: the known value is not one value per row, or not differentiable, or does not go with best_of.
        OutputError: the folder cannot be written, or holds a run and `resume` is false.
        LockedError: another process is training into the folder.
        CheckpointError: the run in the folder has other settings, or is broken.
        DatasetError: no episode is as long as a chunk.
        DeviceError: the device is not usable here.
        DivergedError: a gradient is not finite; the last checkpoint is intact.
    """
    if value is not None and config.best_of > 1:
        raise ConfigError(f"best_of is {config.best_of}; expected 1 with a known value, which cannot be exported.")
    device = _device(config.device)
    spec, data = make_spec(config, dataset), dataset.fingerprint + ("" if value is None else " with a known value")
    chunks = DeviceChunks(config, dataset, spec, device)
    folder = Path(output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be made: {error.strerror}.") from error
    if Checkpoint.latest(folder) is None:
        _check_empty(folder)
    if value is not None:
        _check_value(value, chunks, config, device)
    with _lock(folder), _threads(config.threads), _finish_on_interrupt() as interrupted:
        last = Checkpoint.latest(folder)
        if last is not None and not resume:
            raise OutputError(
                f"{folder} already holds a run of {last.step} updates. Resume it, or choose another output folder."
            )
        learner = Learner(spec, config, device, value)
        if last is not None:
            _check_same_run(last, config, spec, data)
            last.restore(learner.networks, learner.optimizer, learner.generator)
        first = 0 if last is None else last.step
        log = _MetricsLog(folder / METRICS_FILE, first)
        for step in range(first + 1, config.steps + 1):
            metrics = learner.update(chunks, step)
            log.add(metrics)
            if step % config.log_every == 0 or step == config.steps:
                row = log.write(step)
                if on_progress is not None:
                    on_progress(step, row)
            stop = bool(interrupted)
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                if step < config.pretrain_steps:
                    learner.networks.start_policy_from_prior()  # so that what is exported now is what has been learned
                last = Checkpoint.save(
                    folder, step, config, spec, data, learner.networks, learner.optimizer, learner.generator
                )
            if stop:
                raise KeyboardInterrupt
    assert last is not None  # there is at least one step, and the last one saves
    return last


def make_spec(config: TrainConfig, dataset: OfflineDataset) -> PolicySpec:
    """What a policy trained with these settings on this data is; its file hashes are still empty."""
    wide = dataset.observations.astype(np.float64)
    mean, std = wide.mean(axis=0), wide.std(axis=0)
    # A constant number has no scale; rounding gives it a tiny one, which would blow up at deployment.
    constant = std <= 1e-6 * np.maximum(1.0, np.abs(mean))
    low, high = np.array(dataset.action_box.low), np.array(dataset.action_box.high)
    return PolicySpec(
        observation=dataset.observation_boxes,
        action=dataset.action_box,
        chunk_size=config.chunk_size,
        execute_steps=config.execute_steps or config.chunk_size,
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(np.where(constant, 1.0, std).tolist()),
        action_offset=tuple(((high + low) / 2).tolist()),
        action_scale=tuple(((high - low) / 2).tolist()),
        flow_steps=config.flow_steps,
        solver=config.solver,
        best_of=config.best_of,
        method=config.method,
        hyperparameters={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
        training_data=dataset.dataset_id,
        environment_id=dataset.environment_id,
        control_rate_hz=dataset.control_rate_hz,
    )


class _MetricsLog:
    """Appends means of the metrics to a CSV file; rows after the resumed step are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._values: dict[str, list[Tensor]] = {}
        self._start = time.perf_counter()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                lines = file.read().splitlines()
            kept = [
                line for line in lines[1:] if line.split(",", 1)[0].isdigit() and int(line.split(",", 1)[0]) <= step
            ]
            path.write_text("".join(f"{line}\n" for line in [*lines[:1], *kept]), encoding="utf-8")

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value.detach())

    def write(self, step: int) -> dict[str, float]:
        row = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        updates = len(self._values["gradient_norm"])  # the one metric of every update
        row["updates_per_second"] = updates / (time.perf_counter() - self._start)
        new = not self._path.is_file()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *_COLUMNS])
            writer.writerow([step, *(f"{row[name]:.6g}" if name in row else "" for name in _COLUMNS)])
        self._values, self._start = {}, time.perf_counter()
        return row


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device is "{name}"; expected "auto", "cpu", "cuda" or "cuda:N".') from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device is "{name}"; expected "auto", "cpu", "cuda" or "cuda:N".')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise DeviceError(f'device is "{name}", but torch sees {seen} CUDA device(s) here. Use device="cpu" or "auto".')
    return device


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything but what a run leaves there before its first checkpoint."""
    strangers = sorted(
        p.name for p in folder.iterdir() if p.name not in (".lock", ".lock.pid", "checkpoints", METRICS_FILE)
    )
    metrics = folder / METRICS_FILE
    if metrics.is_file() and not metrics.read_bytes().startswith(f"step,{_COLUMNS[0]},".encode()):
        strangers.append(METRICS_FILE)
    if strangers:
        raise OutputError(
            f"{folder} already holds {', '.join(strangers[:5])}, which is not of a training run. "
            "Choose another output folder."
        )


def _check_value(value: KnownValue, chunks: ChunkSource, config: TrainConfig, device: torch.device) -> None:
    """Try a known value on a few chunks.

    Raises:
        ConfigError: it does not return one finite, differentiable number per row.
    """
    batch = chunks.sample(2, torch.Generator(device).manual_seed(0))
    actions = batch.actions.requires_grad_()
    values: object = value(batch.observations, actions)
    seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if seen != (2,):
        raise ConfigError(f"value returned {seen} for two rows; expected a tensor of shape (2,).")
    assert isinstance(values, Tensor)
    if not values.isfinite().all():
        raise ConfigError(f"value returned {values.tolist()}; expected finite numbers.")
    if config.trains_policy and not values.requires_grad:
        raise ConfigError("value is not differentiable in the actions; expected PyTorch operations on them throughout.")


def _check_same_run(last: Checkpoint, config: TrainConfig, spec: PolicySpec, data: str) -> None:
    free = {name: getattr(config, name) for name in _FREE}
    if config.mirror_steps > 1:
        del free["steps"]  # it decides where the stages begin
    if replace(last.config, **free) != config:
        ours, theirs = asdict(config), asdict(last.config)
        changed = [f"{k}: {theirs[k]!r} there, {ours[k]!r} now" for k in ours if k not in free and ours[k] != theirs[k]]
        raise CheckpointError(f"The run in {last.path.parent.parent} has other settings: {'; '.join(changed)}.")
    if last.data != data or replace(last.spec, hyperparameters={}) != replace(spec, hyperparameters={}):
        raise CheckpointError(
            f"The run in {last.path.parent.parent} was trained on other data, or with another kind of value. "
            "Use the same data set, and a known value if it had one."
        )
    if last.step > config.steps:
        raise CheckpointError(f"The run has done {last.step} updates already; expected steps of as many or more.")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock, holder = filelock.FileLock(folder / ".lock", timeout=0), folder / ".lock.pid"
    try:
        lock.acquire()
        holder.write_text(str(os.getpid()), encoding="utf-8")
    except filelock.Timeout as error:
        pid = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        raise LockedError(f"Process {pid} is training into {folder}. Wait for it, or choose another folder.") from error
    except OSError as error:
        raise OutputError(f"The output folder {folder} is not writable: {error.strerror}.") from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _finish_on_interrupt() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of stopping in the middle of an update; a second one stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The folder of a run: its files, and the lock that only one process at a time can hold.

config.json                 the settings
run.json                    origin of the data, and the run's id in Weights & Biases
metrics.csv                 mean metrics, one row every `log_every` updates
evaluations.csv             evaluations, one row every `evaluate_every` updates and one for the last
observations.safetensors    a sample of the data's observations, on which the exported policy is checked
checkpoints/step_00010000/  see `meam_training.runs.checkpoint`
tensorboard/, wandb/        if `loggers` has them
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
from safetensors.torch import save
from torch import Tensor

from meam_policy.atomic_files import write_atomically, write_failure
from meam_policy.errors import CheckpointError, ConfigError, LockedError, MeamError, OutputError
from meam_policy.given_files import read_regular
from meam_policy.spec import PolicySpec
from meam_training.algorithm.update import METRICS
from meam_training.config import TrainConfig
from meam_training.learning.calibration import CALIBRATION_METRICS
from meam_training.learning.distributed import ProcessGroup
from meam_training.learning.evaluation import EVALUATION_METRICS, Evaluation
from meam_training.learning.learner import Learner
from meam_training.learning.online import ONLINE_METRICS, OnlineLearning
from meam_training.networks.trust_region import TRUST_REGION_METRICS
from meam_training.runs.checkpoint import OBSERVATIONS_FILE, Checkpoint, TrainingState
from meam_training.runs.run_log import RunLog, SilentLog
from meam_training.setting_text import SettingText

__all__ = ["Run", "RunRecord", "load_settings", "open_run"]

CONFIG_FILE = "config.json"
RECORD_FILE = "run.json"
FORMAT_VERSION = 1

UPDATE_COLUMNS = (*METRICS, *TRUST_REGION_METRICS, *ONLINE_METRICS, *CALIBRATION_METRICS, "gradient_norm")
"""Columns of `metrics.csv`: metrics of updates, of online episodes and, now and then, of the critics' calibration."""


@dataclass(frozen=True)
class RunRecord:
    """Content of `run.json`.

    Attributes:
        origin: Arguments of `meam train` that name the data; empty if unknown.
        run_id: Id of the run in Weights & Biases.
    """

    origin: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @classmethod
    def load(cls, folder: Path) -> RunRecord | None:
        """Read the record of a folder; None if it has none.

        Raises:
            OutputError: there is a `run.json`, but not of a training run.
        """
        file = folder / RECORD_FILE
        try:
            data = json.loads(read_regular(file))
            if data["meam_run"] != FORMAT_VERSION:
                raise ValueError(f"its version is {data['meam_run']!r}, expected {FORMAT_VERSION}")
            return cls(dict(data["origin"]), str(data["run_id"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{file} is not that of a training run ({error}). Choose another output folder, or delete the file."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the record to a folder."""
        data = {"meam_run": FORMAT_VERSION, "origin": dict(self.origin), "run_id": self.run_id}
        write_atomically(folder / RECORD_FILE, json.dumps(data, indent=2) + "\n")


def load_settings(folder: Path) -> TrainConfig | None:
    """Read the settings with which a run was last trained; None if the folder holds no run.

    Raises:
        CheckpointError: the settings are broken.
    """
    if RunRecord.load(folder) is None or not (folder / CONFIG_FILE).is_file():
        last = Checkpoint.latest(folder)
        return None if last is None else last.config
    try:
        return TrainConfig.from_json(read_regular(folder / CONFIG_FILE))
    except (OSError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is broken ({error}). Delete it to use the checkpoint's settings."
        ) from error


@dataclass
class Run:
    """A run that this process trains; opened by `open_run`.

    Attributes:
        folder: Folder of the run.
        config: Settings of the run.
        spec: Specification of the policy.
        data: Fingerprint of the data.
        log: Log of metrics and evaluations.
        last: Newest checkpoint, if there is one.
        best_score: Score of the best checkpoint, if any has a score.
        writes: Whether this process writes the run's files; of several that train together, only the first does.
    """

    folder: Path
    config: TrainConfig
    spec: PolicySpec
    data: str
    log: RunLog
    last: Checkpoint | None
    best_score: float | None
    writes: bool = True

    @property
    def step(self) -> int:
        """Steps completed (updates, then online steps) at the newest checkpoint."""
        return 0 if self.last is None else self.last.step

    def restore(self, learner: Learner, online: OnlineLearning | None = None) -> None:
        """Restore a learner, and its online part, from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: the checkpoint is broken.
        """
        if self.last is not None:
            restored = self.last.restore(self._state(self.last.step, learner))
            if online is not None and restored.online is not None:
                online.restore(restored.online)

    def keep_observations(self, observations: Tensor) -> None:
        """Save raw observations [n, obs] of the data, on which the exported policy will be checked.

        A resumed run keeps those it has. A run without a checkpoint overwrites them, as they may be of other data.

        Raises:
            OutputError: the file cannot be written, for instance because the disk is full.
        """
        file = self.folder / OBSERVATIONS_FILE
        if self.writes and not (self.step and file.exists()):
            data = save({"observations": observations.cpu().contiguous()})
            try:
                write_atomically(file, data)
            except OSError as error:
                raise OutputError(f"{file} cannot be written: {write_failure(error, file, len(data))}.") from error

    def is_best(self, evaluation: Evaluation | None) -> bool:
        """Whether an evaluation's score exceeds those of all checkpoints."""
        if evaluation is None or evaluation.score is None:
            return False
        return self.best_score is None or evaluation.score > self.best_score

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after a step: every `evaluate_every` steps, and after the last one."""
        every = self.config.evaluate_every
        return bool(every) and (step % every == 0 or step == self.config.steps + self.config.online_steps)

    def is_calibrated(self, step: int) -> bool:
        """Whether to compare the critics with the data's returns after a step: with checkpoints and evaluations.

        Not before there are critics, nor online, where new rewards come in.
        """
        c = self.config
        due = step % c.checkpoint_every == 0 or step == c.steps or self.is_due(step)
        return due and c.pretraining < step <= c.steps

    def lacks_evaluation(self) -> bool:
        """Whether the newest checkpoint was due for evaluation but was not evaluated."""
        return bool(self.step) and self.is_due(self.step) and not self.log.has_evaluation(self.step)

    def save(
        self, step: int, learner: Learner, evaluation: Evaluation | None, online: OnlineLearning | None = None
    ) -> None:
        """Write a checkpoint, then delete surplus ones.

        Raises:
            OutputError: the checkpoint cannot be written, for instance because the disk is full; earlier ones are
                intact.
        """
        if not self.writes:
            return
        score = None if evaluation is None else evaluation.score
        self.log.flush()
        recorded = online.state() if online is not None and step > self.config.steps else None
        self.last = Checkpoint.save(self.folder, self._state(step, learner, score, recorded))
        if self.is_best(evaluation):
            self.best_score = score
        Checkpoint.prune(self.folder, self.config.keep_checkpoints)

    def _state(
        self,
        step: int,
        learner: Learner,
        score: float | None = None,
        online: Mapping[str, Tensor] | None = None,
    ) -> TrainingState:
        return TrainingState(
            step=step,
            config=self.config,
            spec=self.spec,
            data=self.data,
            networks=learner.networks,
            optimizer=learner.optimizer,
            generator=learner.generator,
            score=score,
            online=online,
        )


@contextlib.contextmanager
def open_run(
    folder: Path,
    config: TrainConfig,
    spec: PolicySpec,
    data: str,
    *,
    resume: bool,
    origin: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[Run]:
    """Start or resume the run in a folder, which is locked against other processes within the context.

    Args:
        folder: Folder of the run, created if necessary.
        config: Settings.
        spec: Specification of the policy.
        data: Fingerprint of the data.
        resume: Resume from the newest checkpoint, if there is one.
        origin: Origin of the data; None keeps the recorded one.
        group: The processes that train together. All others wait for the first one to open the run, and write nothing.

    Raises:
        OutputError: the folder cannot be written, holds other files, or holds a run although `resume` is false.
        LockedError: another process is training into the folder.
        CheckpointError: the run in the folder has other settings or data, or is broken.
        MissingExtraError: a logger is not installed.
    """
    group = group or ProcessGroup()
    if not group.is_first:
        if group.agree(False):
            raise OutputError("The first process could not open the run; see its error message for the reason.")
        yield Run(folder, config, spec, data, SilentLog(), Checkpoint.latest(folder), None, writes=False)
        return
    began = False
    try:
        with _begun(folder, config, spec, data, resume, origin) as run:
            began = True
            group.agree(False)
            yield run
    except MeamError:
        if not began:
            group.agree(True)
        raise


@contextlib.contextmanager
def _begun(
    folder: Path,
    config: TrainConfig,
    spec: PolicySpec,
    data: str,
    resume: bool,
    origin: Mapping[str, Any] | None,
) -> Iterator[Run]:
    _make(folder)
    record = RunRecord.load(folder)
    if record is None and Checkpoint.latest(folder) is None:
        _check_empty(folder)
    with _lock(folder):
        last, best = Checkpoint.latest(folder), Checkpoint.best(folder)
        if last is not None:
            if not resume:
                raise OutputError(
                    f"{folder} already holds a run of {last.step} updates. Resume it, or choose another output folder."
                )
            _check_same_run(last, config, spec, data)
        record = record or RunRecord()
        record = record if origin is None else replace(record, origin=origin)
        _write_settings(folder, record, config)
        step = 0 if last is None else last.step
        with RunLog(folder, config, step, record.run_id, UPDATE_COLUMNS, EVALUATION_METRICS) as log:
            yield Run(folder, config, spec, data, log, last, None if best is None else best.score)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be created: {error.strerror}.") from error


def _check_empty(folder: Path) -> None:
    """Refuse a folder that already holds files of something else."""
    ours = (".lock", ".lock.pid", f".{RECORD_FILE}.tmp")
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise OutputError(
            f"{folder} already holds {', '.join(others[:5])}, which is not part of a training run. "
            "Choose another output folder."
        )


def _write_settings(folder: Path, record: RunRecord, config: TrainConfig) -> None:
    """Write `run.json`, which marks the folder as a run's, then the settings."""
    try:
        record.save(folder)
        write_atomically(folder / CONFIG_FILE, config.to_json())
    except OSError as error:
        reason = write_failure(error, folder, len(config.to_json()))
        raise OutputError(f"The output folder {folder} cannot be written: {reason}.") from error


def _check_same_run(last: Checkpoint, config: TrainConfig, spec: PolicySpec, data: str) -> None:
    online = last.step > last.config.steps
    ours, theirs = config.deciding(online=online), last.config.deciding(online=online)
    if ours != theirs:
        names = [name for name in {**theirs, **ours} if getattr(last.config, name) != getattr(config, name)]
        if "method" in names:
            names = ["method"]  # the other differences follow from it
        changed = [f"{{{name}}}: {{{2 * i + 1}!r}} there, {{{2 * i + 2}!r}} now" for i, name in enumerate(names)]
        values = [getattr(settings, name) for name in names for settings in (last.config, config)]
        raise CheckpointError(
            SettingText(
                f"The run in {{0}} has other settings: {'; '.join(changed)}. Resume it with its own settings, or "
                "choose another output folder.",
                last.path.parent.parent,
                *values,
            )
        )
    # How the environment is made decides no weights but those of online learning, and older runs do not record it.
    there, now = (replace(each, hyperparameters={}, environment=None) for each in (last.spec, spec))
    if last.data != data or there != now:
        raise CheckpointError(
            f"The run in {last.path.parent.parent} was trained on other data, or with another kind of value "
            "or prior. Resume it with the same data set, and with a known value and a known prior if it had them."
        )
    if last.step > last.config.steps != config.steps:
        raise CheckpointError(
            SettingText(
                "{steps} is {0}, but the run began online training after {1} updates. Set {steps} to {1}.",
                config.steps,
                last.config.steps,
            )
        )
    if last.step > config.steps + config.online_steps:
        raise CheckpointError(
            SettingText(
                "{steps} + {online_steps} is {0}, but the run has already done {1} steps; expected {1} or more.",
                config.steps + config.online_steps,
                last.step,
            )
        )


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
        lock.release()
        raise OutputError(f"The output folder {folder} is not writable: {error.strerror}.") from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()

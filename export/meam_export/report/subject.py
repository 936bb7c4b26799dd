"""What a report is about: a training run or a policy folder, as far as its files tell."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError, FormatError, NotFoundError
from meam_policy.folder.policy_folder import CONFIG_FILE, GRAPH_FILE, MODEL_FILE, read_spec
from meam_policy.given_files import given_path, read_regular
from meam_policy.spec import PolicySpec
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.csv_file import read_rows
from meam_training.runs.run_folder import RECORD_FILE, RunRecord, load_settings
from meam_training.runs.run_log import EVALUATIONS_FILE, METRICS_FILE
from meam_training.runs.trained_policy import load_networks
from meam_training.runs.watch import RunWarning, warnings_of

__all__ = ["Rows", "Subject", "open_subjects"]

Rows = Sequence[Mapping[str, float]]
"""Rows of a CSV file of a run: numbers by the names of their columns, each row with its step."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A run or a policy folder.

    Attributes:
        name: Its path as it was given.
        weights: Folder whose networks are shown: a checkpoint, or the policy folder; None if there is none yet.
        config: The settings it was trained with.
        spec: What the policy is; None of a run without a checkpoint.
        step: Steps at the checkpoint; None of a policy folder that is not beside its run.
        run: Folder of the run; None if only the policy folder is known.
        policy: Its policy folder; None if none was given.
        origin: Arguments of `meam train` that name the data; empty if unknown.
        data: Fingerprint of the training data; None if unknown.
        metrics: Rows of metrics.csv.
        evaluations: Rows of evaluations.csv.
        notes: What is not there or not whole, in sentences.
    """

    name: str
    weights: Path | None
    config: TrainConfig
    spec: PolicySpec | None
    step: int | None = None
    run: Path | None = None
    policy: Path | None = None
    origin: Mapping[str, Any] | None = None
    data: str | None = None
    metrics: Rows = ()
    evaluations: Rows = ()
    notes: tuple[str, ...] = ()

    def return_half_width(self, row: Mapping[str, float]) -> float | None:
        """Half the width of the 95 % interval of an evaluation's mean return, over its episodes; None if unknown."""
        if "return_std" not in row:
            return None
        return 1.96 * row["return_std"] / math.sqrt(self.config.evaluate_episodes)

    @property
    def environment(self) -> str | None:
        """The environment it was trained for; None if unknown."""
        recorded = None if self.spec is None else self.spec.recorded_environment
        return None if recorded is None else str(recorded.for_evaluation)

    @property
    def training_data(self) -> str | None:
        """Name of its data; None if unknown."""
        return None if self.spec is None else self.spec.training_data

    @cached_property
    def warnings(self) -> list[RunWarning]:
        """What its metrics warn about."""
        return warnings_of(self.config, self.metrics)

    @cached_property
    def networks(self) -> MeamNetworks | None:
        """Its networks, on the CPU; None if there are no weights.

        Raises:
            MeamError: they are broken.
        """
        if self.weights is None or (self.weights == self.policy and not (self.weights / MODEL_FILE).is_file()):
            return None
        return load_networks(self.weights)

    @cached_property
    def observations(self) -> NDArray[np.float32] | None:
        """The sample of raw observations [n, obs] that the run kept of its data; None if there is none.

        Raises:
            CheckpointError: it is broken.
        """
        if self.run is None or self.weights is None:
            return None
        return Checkpoint.load(self.weights).read_observations()


def open_subjects(paths: Sequence[str | os.PathLike[str]]) -> list[Subject]:
    """Read runs and policy folders; a policy folder that was exported from one of the runs is joined to it.

    Args:
        paths: Folders of runs, of checkpoints, or of policies.

    Raises:
        NotFoundError: a folder does not exist, or is neither.
        FormatError: a file of one is broken.
        CheckpointError: a checkpoint is broken.
        ConfigError: none is given, one is given twice, or a path is none.
    """
    if not paths:
        raise ConfigError("No run is given; expected the folders of one or more runs or policies.")
    folders = [given_path("RUN", path) for path in paths]
    for folder in folders:
        if sum(other.resolve() == folder.resolve() for other in folders) > 1:
            raise ConfigError(f"{folder} is given twice; expected every run once.")
    opened = [_open(folder) for folder in folders]
    runs, policies = ([s for s in opened if (s.run is None) == alone] for alone in (False, True))
    joined: dict[int, Subject] = {}
    for policy in policies:
        source = next((i for i, run in enumerate(runs) if i not in joined and _is_export(policy, run)), None)
        if source is not None:
            joined[source] = replace(runs[source], policy=policy.policy, spec=policy.spec)
    taken = {run.policy for run in joined.values()}
    found = [joined.get(i, run) for i, run in enumerate(runs)]
    return found + [policy for policy in policies if policy.policy not in taken]


def _is_export(policy: Subject, run: Subject) -> bool:
    """Whether a policy was exported from a run, as its settings and the data's statistics have it."""
    if policy.spec is None or run.spec is None or policy.config != run.config:
        return False
    names = ("environment_id", "training_data", "observation_mean", "observation_std", "action_offset", "action_scale")
    return all(getattr(policy.spec, name) == getattr(run.spec, name) for name in names)


def _open(folder: Path) -> Subject:
    if not folder.exists() and folder.parent.name != "checkpoints":
        raise NotFoundError(f"There is no folder {folder}; expected that of a run or of a policy.")
    if folder.absolute().parent.name == "checkpoints":
        return _open_run(folder.absolute().parent.parent, Checkpoint.load(folder), str(folder))
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is a file; expected the folder of a run or of a policy.")
    if (folder / GRAPH_FILE).exists() or ((folder / CONFIG_FILE).exists() and not _is_run(folder)):
        return _open_policy(folder)
    if not _is_run(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and (_is_run(path) or _is_policy(path)))
        hint = f" It holds {', '.join(inside[:6])}: give these." if inside else " `meam train` writes runs."
        raise NotFoundError(f"{folder} is no run and no policy: it has no {RECORD_FILE} and no {GRAPH_FILE}.{hint}")
    return _open_run(folder, Checkpoint.latest(folder), str(folder))


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() or (folder / "checkpoints").is_dir()


def _is_policy(folder: Path) -> bool:
    return (folder / GRAPH_FILE).is_file()


def _open_run(folder: Path, last: Checkpoint | None, name: str) -> Subject:
    config, record = load_settings(folder), RunRecord.load(folder)
    if config is None:
        raise NotFoundError(f"{folder} holds no settings of a run, which was stopped before it began. Start it again.")
    metrics, notes = _read(folder / METRICS_FILE)
    evaluations, more = _read(folder / EVALUATIONS_FILE)
    notes += more
    if last is None:
        notes.append("The run has no checkpoint yet, so there are no networks to show.")
    elif metrics and last.step - metrics[-1]["step"] >= config.log_every:
        notes.append(
            f"{METRICS_FILE} ends at step {metrics[-1]['step']:.0f}, and the checkpoint is of step {last.step}: the "
            "curves end there, and warnings about what follows are not known."
        )
    if not metrics:
        notes.append(f"There is no {METRICS_FILE}, or no row in it, so there are no curves and no warnings.")
    return Subject(
        name=name,
        weights=None if last is None else last.path,
        config=config,
        spec=None if last is None else last.spec,
        step=None if last is None else last.step,
        run=folder,
        origin={} if record is None else record.origin,
        data=None if last is None else last.data,
        metrics=metrics,
        evaluations=evaluations,
        notes=tuple(notes),
    )


def _open_policy(folder: Path) -> Subject:
    spec = read_spec(folder)
    try:
        config = TrainConfig.from_json(json.dumps(dict(spec.hyperparameters)))
    except ConfigError as error:
        raise FormatError(
            f"{folder / CONFIG_FILE}: hyperparameters are not the settings of a training run "
            f"({str(error).rstrip('.')}); expected those that `meam train` wrote. Export the policy again."
        ) from error
    notes = ["Only the policy folder is given, which has no log: give its run beside it for curves and warnings."]
    if not (folder / MODEL_FILE).is_file():
        notes.append(f"{MODEL_FILE} is missing, so there are no networks to show.")
    return Subject(str(folder), folder, config, spec, policy=folder, notes=tuple(notes))


def _read(path: Path) -> tuple[Rows, list[str]]:
    """The finite numbers of a run's CSV file, and what is wrong with it, in sentences."""
    if not path.exists():
        return [], []
    try:
        text, rows = read_regular(path), read_rows(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(
            f"{path} is broken ({reason}); expected the numbers that `meam train` logged. Restore it, or delete it to "
            "do without curves."
        ) from error
    if text and not rows and not text.startswith(b"step,"):
        raise FormatError(
            f"{path} begins with {text[:20]!r}; expected a table whose first column is step. Restore it, or delete it "
            "to do without curves."
        )
    notes = []
    if text and not text.endswith(b"\n"):
        notes.append(f"The last line of {path.name} is only partly there, and left out.")
    infinite = sum(not math.isfinite(value) for row in rows for value in row.values())
    if infinite:
        notes.append(f"Of the numbers in {path.name}, {infinite} are infinite or none, and left out.")
    return [{name: value for name, value in row.items() if math.isfinite(value)} for row in rows], notes

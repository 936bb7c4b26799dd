"""Checkpoints: everything needed to resume a run, or to export its policy, in one folder that is written atomically.

step_00010000/
policy_spec.json            the policy's specification, without file hashes
train_config.json           the run's settings
model.safetensors           all networks
trainer.safetensors         Adam's moments and the generator's state
trainer.json                step, score, fingerprint of the data, and the optimiser's parameter groups
online.safetensors          transitions recorded online, if the run has begun online training
hashes.json                 SHA-256 of all the others; earlier versions wrote none

Only complete checkpoints have such a name: while being written or deleted, they have a hidden one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from meam_policy.atomic_files import atomic_folder, delete_folder, flush_to_disk, given_folder, write_failure
from meam_policy.errors import CheckpointError, ConfigError, NotFoundError, OutputError
from meam_policy.given_files import open_regular, read_regular, require_regular
from meam_policy.spec import PolicySpec
from meam_policy.typed import typed
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks, build_networks

__all__ = ["OBSERVATIONS_FILE", "Checkpoint", "TrainingState"]

_SPEC, _CONFIG, _MODEL = "policy_spec.json", "train_config.json", "model.safetensors"
_TRAINER, _STATE = "trainer.safetensors", "trainer.json"
_ONLINE = "online.safetensors"
_HASHES = "hashes.json"

_BLOCK = 2**20

OBSERVATIONS_FILE = "observations.safetensors"
"""File of the run's folder with a sample of the data's observations, on which the exported policy is checked."""

_NAME = re.compile(r"step_(\d{8,})")
_LATEST, _BEST = "latest", "best"


@dataclass(frozen=True, eq=False, repr=False)
class TrainingState:
    """Everything that a checkpoint holds.

    Attributes:
        step: Steps completed: updates, then online steps.
        config: The run's settings.
        spec: Specification of the policy.
        data: Fingerprint of the training data; see `OfflineDataset.fingerprint`.
        networks: All networks.
        optimizer: Their optimiser.
        generator: Source of the updates' randomness.
        score: Mean return of the evaluation in the environment at this step; None if there was none.
        online: State returned by `OnlineLearning.state`; None before the first online step.
    """

    step: int
    config: TrainConfig
    spec: PolicySpec
    data: str
    networks: MeamNetworks
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    score: float | None = None
    online: Mapping[str, Tensor] | None = None

    def __repr__(self) -> str:
        """Short description; the tensors would fill pages."""
        return f"TrainingState(step={self.step}, method={self.config.method!r}, score={self.score})"


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Folder of the checkpoint.
        step: Steps completed: updates, then online steps.
        config: The run's settings.
        spec: Specification of the policy.
        data: Fingerprint of the training data; see `OfflineDataset.fingerprint`.
        score: Mean return of the evaluation in the environment at this step; None if there was none.
    """

    path: Path
    step: int
    config: TrainConfig
    spec: PolicySpec
    data: str
    score: float | None = None

    def __repr__(self) -> str:
        """Short description; settings and spec would fill pages."""
        return f"Checkpoint({str(self.path)!r}, step={self.step}, method={self.config.method!r}, score={self.score})"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint.

        Args:
            path: A checkpoint's folder; a run's folder, whose newest checkpoint is taken; or one of the names
                `RUN/checkpoints/latest` and `RUN/checkpoints/best`.

        Raises:
            NotFoundError: there is no such folder, no checkpoint in it, or, for `best`, none with a score.
            CheckpointError: a file of these but the weights is missing, broken or damaged; the message names the newest
                older checkpoint that is whole.
            ConfigError: `path` is empty, or no path.
        """
        folder = given_folder("path", path)
        if folder.name in (_LATEST, _BEST) and folder.parent.name == "checkpoints" and not folder.exists():
            return cls._named(folder)
        if not folder.is_dir():
            raise NotFoundError(f"There is no checkpoint folder {folder}. Give the folder that `meam train` wrote.")
        if not (folder / _STATE).is_file() and not _NAME.fullmatch(folder.name):
            newest = cls.latest(folder)
            if newest is None:
                raise NotFoundError(f"{folder} holds no checkpoint. Give the folder that `meam train` wrote.")
            return newest
        try:
            return cls._open(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).rstrip(".").replace("config.json", _SPEC) or repr(error)
            raise CheckpointError(f"The checkpoint {folder} is broken ({reason}). {_remedy(folder)}") from error

    @classmethod
    def _open(cls, folder: Path) -> Checkpoint:
        state = json.loads(read_regular(_checked(folder, _STATE)))
        config = TrainConfig.from_json(read_regular(_checked(folder, _CONFIG)))
        spec = PolicySpec.from_json(read_regular(_checked(folder, _SPEC)))
        return cls(folder, int(state["step"]), config, spec, str(state["data"]), _score(state))

    def is_whole(self) -> bool:
        """Whether every file can be read, and has the hash that was recorded when it was written."""
        try:
            for name in (_MODEL, _TRAINER, *([_ONLINE] if (self.path / _ONLINE).exists() else [])):
                with safe_open(_checked(self.path, name), "pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return False
        return True

    def read_observations(self) -> NDArray[np.float32] | None:
        """Read the sample of raw observations [n, obs] that the run saved; None if it saved none.

        Raises:
            CheckpointError: the file is broken, or of another run.
        """
        file = self.path.absolute().parent.parent / OBSERVATIONS_FILE
        if not file.is_file():
            return None
        try:
            rows = load_arrays(file)["observations"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is broken ({error}). Delete it to do without.") from error
        expected = rows.ndim == 2 and len(rows) > 0 and rows.shape[1] == self.spec.observation_dim
        if not expected or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise CheckpointError(
                f"{file} is broken: it holds {rows.dtype} {list(rows.shape)}; expected finite float32 "
                f"[n, {self.spec.observation_dim}]. Delete it to do without."
            )
        return rows

    @classmethod
    def _named(cls, path: Path) -> Checkpoint:
        run = path.parent.parent
        found = cls.best(run) if path.name == _BEST else cls.latest(run)
        if found is None:
            missing = "checkpoint that was evaluated in an environment" if path.name == _BEST else "checkpoint"
            raise NotFoundError(f"{run} holds no {missing}. Give the folder of another checkpoint.")
        return found

    @classmethod
    def latest(cls, output_dir: str | os.PathLike[str]) -> Checkpoint | None:
        """Open the newest checkpoint of a run; None if there is none.

        Args:
            output_dir: The run's folder; it need not exist.

        Raises:
            CheckpointError: a file of the checkpoint is missing or broken.
            ConfigError: `output_dir` is empty, or no path.
        """
        while folders := _folders(output_dir):
            try:
                return cls.load(folders[-1])
            except (CheckpointError, NotFoundError):
                if folders[-1].is_dir():
                    raise
                # Otherwise, the run in progress has just deleted it and has newer ones.
        return None

    @classmethod
    def best(cls, output_dir: str | os.PathLike[str]) -> Checkpoint | None:
        """Open the checkpoint with the highest score, the earliest of equal ones; None if no checkpoint has a score.

        Args:
            output_dir: The run's folder; it need not exist.

        Raises:
            CheckpointError: a file of the checkpoint is missing or broken.
            ConfigError: `output_dir` is empty, or no path.
        """
        scores = _scores(output_dir)
        return cls.load(max(scores, key=lambda folder: scores[folder])) if scores else None

    @classmethod
    @typed("output_dir")
    def prune(cls, output_dir: str | os.PathLike[str], keep: int) -> None:
        """Delete all checkpoints except the newest `keep` and the best one, and remnants of killed processes.

        Args:
            output_dir: The run's folder.
            keep: Number of newest checkpoints to keep, at least 1.

        Raises:
            OutputError: a checkpoint cannot be deleted.
            ConfigError: `output_dir` is empty, or no path, or `keep` is below 1.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep}; expected 1 or more checkpoints.")
        scores = _scores(output_dir)
        best = {max(scores, key=lambda folder: scores[folder])} if scores else set()
        try:
            for folder in set(_folders(output_dir)[:-keep]) - best:
                delete_folder(folder)
            for remnant in _checkpoints(output_dir).glob(".step_*"):
                shutil.rmtree(remnant)
        except OSError as error:
            raise OutputError(f"An old checkpoint cannot be deleted: {error}. Delete it manually.") from error

    @classmethod
    @typed("output_dir")
    def save(cls, output_dir: str | os.PathLike[str], state: TrainingState) -> Checkpoint:
        """Write a checkpoint, which appears complete and flushed to disk, or not at all. Earlier ones are untouched.

        Args:
            output_dir: The run's folder.
            state: State to save.

        Raises:
            OutputError: the folder cannot be written, for instance because the disk is full.
            ConfigError: `output_dir` is empty, or no path.
        """
        folder = _checkpoints(output_dir) / f"step_{state.step:08d}"
        tensors, layout = _flatten_optimizer(state.optimizer.state_dict())
        arrays = {
            _MODEL: _contiguous(state.networks.state_dict()),
            _TRAINER: _contiguous({**tensors, "generator": state.generator.get_state()}),
            **({} if state.online is None else {_ONLINE: _contiguous(state.online)}),
        }
        plain = {"step": state.step, "score": state.score, "data": state.data, "optimizer": layout}
        texts = {_SPEC: state.spec.to_json(), _CONFIG: state.config.to_json(), _STATE: json.dumps(plain)}
        try:
            with atomic_folder(folder, replace=True) as hidden:
                for name, held in arrays.items():
                    save_file(held, hidden / name)
                for name, text in texts.items():
                    (hidden / name).write_text(text, encoding="utf-8")
                hashes = {path.name: _sha256(path) for path in sorted(hidden.iterdir())}
                (hidden / _HASHES).write_text(json.dumps({"sha256": hashes}, indent=2), encoding="utf-8")
            flush_to_disk(folder.parent.parent)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for held in arrays.values() for tensor in held.values())
            reason = write_failure(error, folder, needed + sum(map(len, texts.values())))
            raise OutputError(
                f"The checkpoint {folder} cannot be written: {reason}. Earlier ones are intact."
            ) from error
        return cls(folder, state.step, state.config, state.spec, state.data, state.score)

    def load_networks(self) -> MeamNetworks:
        """Build the networks with the checkpoint's weights, on the CPU and in float32.

        Raises:
            CheckpointError: the weights are missing, broken, damaged, or do not fit the networks.
        """
        # Deployed policies always compute in float32.
        networks = build_networks(self.spec, replace(self.config, precision="float32"))
        weights = self._read(_MODEL)
        try:
            networks.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path / _MODEL} does not fit its settings: {error}") from error
        return networks

    @typed()
    def restore(self, state: TrainingState) -> TrainingState:
        """Resume from the checkpoint: restore the state of a run's networks, optimiser and generator.

        Args:
            state: State of the run; its networks, optimiser and generator are changed in place.

        Returns:
            The state with the checkpoint's step, score and, if that step was online, the transitions recorded so far.

        Raises:
            CheckpointError: a file is missing, broken, damaged, or of another run.
            ConfigError: an argument has another type.
        """
        tensors, optimizer = self._read(_TRAINER), state.optimizer
        try:
            layout = json.loads(read_regular(self.path / _STATE))["optimizer"]
            state.networks.load_state_dict(self._read(_MODEL), strict=True)
            _restore_generator(state.generator, tensors.pop("generator"), self)
            capturable = [group.get("capturable") for group in optimizer.param_groups]
            optimizer.load_state_dict(_unflatten_optimizer(tensors, layout))
            for group, ours in zip(optimizer.param_groups, capturable, strict=True):
                group["capturable"] = ours  # depends on the device, not on the run
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The checkpoint {self.path} does not fit this run: {error}") from error
        online = self.read_online() if self.step > state.config.steps else None
        return replace(state, step=self.step, score=self.score, online=online)

    def read_online(self) -> dict[str, Tensor]:
        """Read the state that `OnlineLearning.state` returned.

        Raises:
            CheckpointError: the file is missing, broken or damaged.
        """
        return self._read(_ONLINE)

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(_checked(self.path, name))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name} is missing or broken ({error}). {_remedy(self.path)}") from error


def _checked(folder: Path, name: str) -> Path:
    """Path of a checkpoint's file, which has the hash that was recorded with it, if one was.

    Raises:
        ValueError: it has another one, or the hashes are broken.
        OSError: it cannot be read, or is no regular file.
    """
    file = folder / name
    try:
        hashes = json.loads(read_regular(folder / _HASHES))["sha256"]
        expected = hashes.get(name)
    except FileNotFoundError:  # of an earlier version
        require_regular(file)
        return file
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_HASHES} is no object of hashes") from error
    seen = _sha256(file)
    if seen != expected:
        raise ValueError(
            f"{name} has SHA-256 {seen[:16]}…, but {_HASHES} records {str(expected)[:16]}…: it was damaged or changed"
        )
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(file) as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _remedy(folder: Path) -> str:
    """What to do about a checkpoint that is broken: which older one is whole."""
    older = [path for path in _numbered(folder.parent) if _number(path) < _number(folder)]
    for path in reversed(older):
        try:
            whole = Checkpoint._open(path).is_whole()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if whole:
            return f"The newest older one that is whole is {path}: export that, or delete {folder} to resume from it."
    return f"No older one is whole. Delete {folder}, and train anew."


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors by name and plain data."""
    tensors = {f"{i}.{name}": value for i, moments in state["state"].items() for name, value in moments.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _restore_generator(generator: torch.Generator, state: Tensor, checkpoint: Checkpoint) -> None:
    """Restore a generator's state, or reseed it if the checkpoint is from another kind of device."""
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
    else:
        generator.manual_seed((checkpoint.config.seed + 7919 * checkpoint.step) % 2**63)


def _unflatten_optimizer(tensors: Mapping[str, Tensor], layout: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": layout["param_groups"]}


def _checkpoints(output_dir: str | os.PathLike[str]) -> Path:
    return given_folder("output_dir", output_dir) / "checkpoints"


def _folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Folders of a run's checkpoints, oldest first."""
    return _numbered(_checkpoints(output_dir))


def _numbered(checkpoints: Path) -> list[Path]:
    return sorted((path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name)), key=_number)


def _number(folder: Path) -> int:
    """The step in the name of a checkpoint's folder; 0 under another name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else 0


def _scores(output_dir: str | os.PathLike[str]) -> dict[Path, float]:
    """Scores of the checkpoints that have one, oldest first."""
    scores = {}
    for folder in _folders(output_dir):
        try:
            score = _score(json.loads(read_regular(_checked(folder, _STATE))))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # broken or just deleted, so it cannot be the best
        if score is not None:
            scores[folder] = score
    return scores


def _score(state: Mapping[str, Any]) -> float | None:
    score = state.get("score")
    return None if score is None else float(score)

"""Checkpoints: everything needed to go on with a run, or to export its policy, in one folder written atomically.

step_00010000/
policy_spec.json            what the policy is, without file hashes
train_config.json           the run's settings
model.safetensors           all networks
trainer.safetensors         Adam's moments and the generator's state
trainer.json                step, score, fingerprint of the data, and the optimiser's plain settings

Only whole checkpoints bear such a name: they are written, and deleted, under hidden ones.
"""

from __future__ import annotations

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
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from meam_policy.atomic_files import atomic_folder, delete_folder, flush_to_disk
from meam_policy.errors import CheckpointError, NotFoundError, OutputError
from meam_policy.spec import PolicySpec
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks, build_networks

__all__ = ["OBSERVATIONS_FILE", "Checkpoint", "TrainingState"]

_SPEC, _CONFIG, _MODEL = "policy_spec.json", "train_config.json", "model.safetensors"
_TRAINER, _STATE = "trainer.safetensors", "trainer.json"
_ONLINE = "online.safetensors"

OBSERVATIONS_FILE = "observations.safetensors"
"""In the training folder: a sample of the data's observations, at which an exported policy is checked."""

_NAME = re.compile(r"step_(\d{8,})")
_LATEST, _BEST = "latest", "best"


@dataclass(frozen=True, eq=False, repr=False)
class TrainingState:
    """Everything a checkpoint holds.

    Attributes:
        step: Updates done.
        config: The run's settings.
        spec: What the policy is.
        data: Fingerprint of the training data; see `OfflineDataset.fingerprint`.
        networks: All networks.
        optimizer: What moves them.
        generator: Source of the updates' randomness.
        score: Mean return of the evaluation in the environment at this step; None if there was none.
        online: What `OnlineLearning.state` gave; None before the first online step.
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
        """One line: the tensors would fill pages."""
        return f"TrainingState(step={self.step}, method={self.config.method!r}, score={self.score})"


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its folder.
        step: Updates done.
        config: The run's settings.
        spec: What the policy is.
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
        """One line: settings and spec would fill pages."""
        return f"Checkpoint({str(self.path)!r}, step={self.step}, method={self.config.method!r}, score={self.score})"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint.

        Args:
            path: A checkpoint folder; a training folder, whose newest checkpoint is taken; or a name in its
                `checkpoints`: `RUN/checkpoints/latest`, `RUN/checkpoints/best`.

        Raises:
            NotFoundError: there is no such folder, no checkpoint in it, or none with a score to be the best.
            CheckpointError: a file is missing or broken.
        """
        folder = Path(path).expanduser()
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
            state = json.loads((folder / _STATE).read_bytes())
            config = TrainConfig.from_json((folder / _CONFIG).read_bytes())
            spec = PolicySpec.from_json((folder / _SPEC).read_bytes())
            return cls(folder, int(state["step"]), config, spec, str(state["data"]), _score(state))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).rstrip(".").replace("config.json", _SPEC) or repr(error)
            raise CheckpointError(
                f"The checkpoint {folder} is broken ({reason}). Delete its folder to go on with the one before."
            ) from error

    def read_observations(self) -> NDArray[np.float32] | None:
        """Raw observations [n, obs] of the data, as the run kept them; None if it kept none.

        Raises:
            CheckpointError: their file is broken, or of another run.
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
        """The newest checkpoint of a training folder, or None.

        Args:
            output_dir: The training folder; it need not exist.

        Raises:
            CheckpointError: a file of it is missing or broken.
        """
        while folders := _folders(output_dir):
            try:
                return cls.load(folders[-1])
            except (CheckpointError, NotFoundError):
                if folders[-1].is_dir():
                    raise
                # Else the run that is going on has deleted it meanwhile, and has newer ones.
        return None

    @classmethod
    def best(cls, output_dir: str | os.PathLike[str]) -> Checkpoint | None:
        """The checkpoint with the highest score, of equal ones the earliest; None where there are no scores.

        Args:
            output_dir: The training folder; it need not exist.

        Raises:
            CheckpointError: a file of it is missing or broken.
        """
        scores = _scores(output_dir)
        return cls.load(max(scores, key=lambda folder: scores[folder])) if scores else None

    @classmethod
    def prune(cls, output_dir: str | os.PathLike[str], keep: int) -> None:
        """Delete all checkpoints but the newest `keep` and the best one, and what killed processes left.

        Args:
            output_dir: The training folder.
            keep: How many of the newest to keep, at least 1.

        Raises:
            OutputError: something cannot be deleted.
        """
        scores = _scores(output_dir)
        best = {max(scores, key=lambda folder: scores[folder])} if scores else set()
        try:
            for folder in set(_folders(output_dir)[:-keep]) - best:
                delete_folder(folder)
            for left in _checkpoints(output_dir).glob(".step_*"):
                shutil.rmtree(left)
        except OSError as error:
            raise OutputError(f"An old checkpoint cannot be deleted: {error}. Delete it by hand.") from error

    @classmethod
    def save(cls, output_dir: str | os.PathLike[str], state: TrainingState) -> Checkpoint:
        """Write a checkpoint: it is there whole and on the disk, or not at all. Earlier ones are left alone.

        Args:
            output_dir: The training folder.
            state: What to write.

        Raises:
            OutputError: the folder cannot be written, for instance because the disk is full.
        """
        folder = _checkpoints(output_dir) / f"step_{state.step:08d}"
        tensors, layout = _flatten_optimizer(state.optimizer.state_dict())
        try:
            with atomic_folder(folder, replace=True) as hidden:
                save_file(_contiguous(state.networks.state_dict()), hidden / _MODEL)
                save_file(_contiguous({**tensors, "generator": state.generator.get_state()}), hidden / _TRAINER)
                if state.online is not None:
                    save_file(_contiguous(state.online), hidden / _ONLINE)
                (hidden / _SPEC).write_text(state.spec.to_json(), encoding="utf-8")
                (hidden / _CONFIG).write_text(state.config.to_json(), encoding="utf-8")
                plain = {"step": state.step, "score": state.score, "data": state.data, "optimizer": layout}
                (hidden / _STATE).write_text(json.dumps(plain), encoding="utf-8")
            flush_to_disk(folder.parent.parent)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"The checkpoint {folder} cannot be written: {error}. Earlier ones are intact."
            ) from error
        return cls(folder, state.step, state.config, state.spec, state.data, state.score)

    def load_networks(self) -> MeamNetworks:
        """The networks with the checkpoint's weights, on the CPU.

        Raises:
            CheckpointError: the weights are missing, broken, or not of these networks.
        """
        networks = build_networks(self.spec, replace(self.config, precision="float32"))  # deployment is always exact
        weights = self._read(_MODEL)
        try:
            networks.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path / _MODEL} does not fit its settings: {error}") from error
        return networks

    def restore(self, state: TrainingState) -> TrainingState:
        """Go on from the checkpoint: put a run's networks, optimiser and generator into the state they had.

        Args:
            state: The run now; its networks, optimiser and generator are changed in place.

        Returns:
            The run with the checkpoint's step, score and, if that step was online, what was recorded by then.

        Raises:
            CheckpointError: a file is missing, broken, or of another run.
        """
        tensors, optimizer = self._read(_TRAINER), state.optimizer
        try:
            layout = json.loads((self.path / _STATE).read_bytes())["optimizer"]
            state.networks.load_state_dict(self._read(_MODEL), strict=True)
            _restore_generator(state.generator, tensors.pop("generator"), self)
            capturable = [group.get("capturable") for group in optimizer.param_groups]
            optimizer.load_state_dict(_unflatten_optimizer(tensors, layout))
            for group, ours in zip(optimizer.param_groups, capturable, strict=True):
                group["capturable"] = ours  # it belongs to the device, not to the run
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The checkpoint {self.path} does not fit this run: {error}") from error
        online = self.read_online() if self.step > state.config.steps else None
        return replace(state, step=self.step, score=self.score, online=online)

    def read_online(self) -> dict[str, Tensor]:
        """What `OnlineLearning.state` gave.

        Raises:
            CheckpointError: it is missing or broken.
        """
        return self._read(_ONLINE)

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path / name} is missing or broken ({error}). Delete {self.path} to go on with the one before."
            ) from error


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors by name, and plain data."""
    tensors = {f"{i}.{name}": value for i, moments in state["state"].items() for name, value in moments.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _restore_generator(generator: torch.Generator, state: Tensor, checkpoint: Checkpoint) -> None:
    """Go on with the random numbers; on another kind of device, whose state is another one, with new ones."""
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
    return Path(output_dir).expanduser() / "checkpoints"


def _folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    found = [path for path in _checkpoints(output_dir).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _scores(output_dir: str | os.PathLike[str]) -> dict[Path, float]:
    """The scores of the checkpoints that have one, oldest first."""
    scores = {}
    for folder in _folders(output_dir):
        try:
            score = _score(json.loads((folder / _STATE).read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # broken, or deleted meanwhile: in no case the best
        if score is not None:
            scores[folder] = score
    return scores


def _score(state: Mapping[str, Any]) -> float | None:
    score = state.get("score")
    return None if score is None else float(score)

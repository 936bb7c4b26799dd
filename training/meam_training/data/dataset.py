"""Offline data: recorded transitions, checked before training."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError, NotFoundError
from meam_policy.spec import BoxSpec
from meam_training.data.action_chunk import ActionChunkSampler
from meam_training.data.dataset_cache import Columns, array_blocks, fingerprint, moments, open_cached
from meam_training.data.discounted_returns import DiscountedReturns, discounted_returns
from meam_training.data.minari_files import find_minari, source_files
from meam_training.data.minari_source import minari_recording
from meam_training.data.ogbench_source import ogbench_recording
from meam_training.data.recording_description import described_boxes
from meam_training.data.row_check import (
    ActionBounds,
    RowCheck,
    action_box_spec,
    flags,
    numbers,
    observation_box_specs,
    unit_box,
)

__all__ = ["OfflineDataset"]


@dataclass(frozen=True, eq=False, repr=False)
class OfflineDataset:
    """Recorded transitions, one per row, with the spaces they were recorded in.

    Create one with `from_minari`, `from_ogbench` or `from_arrays`; all three check the data. The first two convert the
    data once into arrays that are memory-mapped from then on, so that data sets may exceed the available memory; see
    `meam_training.data.dataset_cache`.

    Attributes:
        observations: Flattened observations [n, observation_dim].
        actions: Flattened actions in environment units [n, action_dim].
        rewards: Rewards [n].
        next_observations: Observations after the actions [n, observation_dim].
        terminations: True where the task ended, so that there are no further rewards [n]; may be true mid-episode.
        episode_ends: True at the last row of every recorded episode [n].
        observation_boxes: Boxes of the observation, in the order of flattening.
        action_box: Box of the action; its bounds are finite.
        dataset_id: Name of the data set, if known.
        environment_id: Environment the data was recorded in, if known.
        control_rate_hz: Rate at which actions were applied, if known.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    terminations: NDArray[np.bool_]
    episode_ends: NDArray[np.bool_]
    observation_boxes: tuple[BoxSpec, ...]
    action_box: BoxSpec
    dataset_id: str | None = None
    environment_id: str | None = None
    control_rate_hz: float | None = None

    def __repr__(self) -> str:
        """Short description; the arrays would fill pages."""
        episodes = np.count_nonzero(self.episode_ends)
        return (
            f"OfflineDataset({self.dataset_id!r}, transitions={len(self)}, episodes={episodes}, "
            f"observation_dim={self.observation_dim}, action_dim={self.action_dim})"
        )

    def __len__(self) -> int:
        """Number of transitions."""
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        """Dimension of a flattened observation."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """Dimension of a flattened action."""
        return self.actions.shape[1]

    @cached_property
    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each recorded episode [episodes]."""
        starts = np.concatenate([[0], np.flatnonzero(self.episode_ends)[:-1] + 1])
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    @cached_property
    def observation_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each observation component [observation_dim]."""
        return moments(lambda: array_blocks(self.observations))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all recorded numbers, in hexadecimal, by which a resumed run recognises its data."""
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")
        return fingerprint({name: array_blocks(getattr(self, name)) for name in names})

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike | Mapping[str, ArrayLike],
        actions: ArrayLike,
        rewards: ArrayLike,
        next_observations: ArrayLike | Mapping[str, ArrayLike],
        terminations: ArrayLike,
        truncations: ArrayLike,
        *,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
        dataset_id: str | None = None,
        environment_id: str | None = None,
        control_rate_hz: float | None = None,
    ) -> OfflineDataset:
        """Take transitions from arrays with one row per transition.

        Args:
            observations: Observations [n, …], shaped as in the observation space; for a Dict, a mapping of arrays.
            actions: Actions [n, …], shaped as in the action space.
            rewards: Rewards [n].
            next_observations: Observations after the actions, like `observations`.
            terminations: True where the task ended [n].
            truncations: True where the episode was cut off [n]. An episode ends at either flag, and at the last row.
            observation_space: Box, or Dict of Boxes; None takes an unbounded Box.
            action_space: Box; None takes the given bounds, or [-1, 1], in which the actions must then lie.
            action_low: Lower bounds of the actions, where the space has none: one number, or one for each number of an
                action; None takes the space's.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds, as many simulators do, rather than refuse those beyond.
            dataset_id: Name of the data set, recorded in policies trained on it.
            environment_id: Environment the data was recorded in.
            control_rate_hz: Rate at which the actions were applied, Hz.

        Raises:
            DatasetError: lengths differ, a shape or type does not fit its space, or a value is not finite or out of
                bounds; the message names episode, step and field.
        """
        ended, cut = (flags(v, n) for v, n in ((terminations, "terminations"), (truncations, "truncations")))
        if ended.shape != cut.shape:
            raise DatasetError(
                f"terminations has {len(ended)} rows and truncations {len(cut)}; expected one of each per transition."
            )
        if not len(ended):
            raise DatasetError("The data has no transitions; expected at least one.")
        ends = ended | cut
        ends[-1] = True
        boxes = observation_box_specs(observation_space, observations)
        bounds = ActionBounds(action_low, action_high, clip_actions)
        if action_space is None:
            action_space = unit_box(numbers(actions, "actions").shape, bounds)
        action_box = action_box_spec(action_space, bounds)
        return cls(
            **RowCheck(boxes, action_box, clip_actions)(observations, actions, rewards, next_observations, ended, ends),
            observation_boxes=boxes,
            action_box=action_box,
            dataset_id=dataset_id,
            environment_id=environment_id,
            control_rate_hz=control_rate_hz,
        )

    @classmethod
    def from_minari(
        cls,
        id_or_path: str | os.PathLike[str],
        *,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
    ) -> OfflineDataset:
        """Read a local Minari data set.

        Terminations in the middle of a recorded episode are kept: there are no further rewards after them, but the
        episode goes on. The files are checked before Minari opens them: nothing in a data set is executed.

        Args:
            id_or_path: A Minari id such as "D4RL/door/human-v2" (under `MINARI_DATASETS_PATH`, by default
                ~/.minari/datasets), or the folder of a data set.
            action_low: Lower bounds of the actions, where the space has none: one number, or one for each number of an
                action; None takes the space's.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds, as many simulators do, rather than refuse those beyond.

        Raises:
            NotFoundError: there is no such local data set.
            DatasetError: as in `from_arrays`; or the files would run code, refer to files outside the data set, or are
                not Minari's.
        """
        folder = find_minari(id_or_path)
        bounds = ActionBounds(action_low, action_high, clip_actions)
        return open_cached(
            folder, source_files(folder), bounds.key, lambda: minari_recording(folder, bounds), cls._from_recording
        )

    @classmethod
    def from_ogbench(
        cls,
        npz: str | os.PathLike[str],
        environment_id: str | None = None,
        *,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
    ) -> OfflineDataset:
        """Read a data set in OGBench's `.npz` format.

        Args:
            npz: The file; the last row of each trajectory has `terminals` set and no successor.
            environment_id: OGBench single-task name, such as "cube-single-play-singletask-task1-v0", from whose goal
                rewards and masks are computed, as in OGBench. Required if the file contains no rewards.
            action_low: Lower bounds of the actions, where the space has none: one number, or one for each number of an
                action; None takes the space's.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds, as many simulators do, rather than refuse those beyond.

        Raises:
            NotFoundError: there is no such file or environment.
            DatasetError: as in `from_arrays`; or the file is not OGBench's.
            MissingExtraError: rewards have to be computed and OGBench is not installed.
        """
        path = Path(npz).expanduser()
        if not path.is_file():
            raise NotFoundError(f"There is no file {path}.")
        bounds = ActionBounds(action_low, action_high, clip_actions)
        settings = [path.stem, environment_id, environment_id and _installed_version("ogbench"), *bounds.key]
        source = path.resolve()
        return open_cached(
            source, [source], settings, lambda: ogbench_recording(path, environment_id, bounds), cls._from_recording
        )

    def chunk_sampler(self, chunk_size: int, discount: float) -> ActionChunkSampler:
        """Make a sampler of action chunks.

        Args:
            chunk_size: Actions in a chunk, at least 1.
            discount: Discount per environment step, in (0, 1].

        Raises:
            DatasetError: no episode is as long as a chunk.
        """
        return ActionChunkSampler(
            self.observations,
            self.actions,
            self.next_observations,
            self.rewards,
            self.terminations,
            self.episode_ends,
            chunk_size,
            discount,
        )

    def discounted_returns(self, discount: float) -> DiscountedReturns:
        """Discounted sum of the rewards from each row on, up to a termination or the end of its episode.

        Args:
            discount: Discount per environment step, in (0, 1].
        """
        return discounted_returns(self.rewards, self.terminations, self.episode_ends, discount)

    @classmethod
    def _from_recording(cls, about: dict[str, Any], columns: Columns) -> OfflineDataset:
        observation_boxes, action_box = described_boxes(about)
        widths = {"observations": sum(box.size for box in observation_boxes), "actions": action_box.size}
        if any(columns[name].shape[1:] != (width,) for name, width in widths.items()):
            raise ValueError(f"Columns are not {widths} numbers wide")  # a broken cache
        names = ("dataset_id", "environment_id", "control_rate_hz")
        dataset = cls(
            **columns,
            observation_boxes=observation_boxes,
            action_box=action_box,
            **{name: about[name] for name in names},
        )
        if "fingerprint" in about:
            # Fills the cached properties without a pass over the data.
            mean, std = np.array(about["moments"])
            vars(dataset).update(fingerprint=about["fingerprint"], observation_moments=(mean, std))
        return dataset


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

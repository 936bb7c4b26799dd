"""Offline data: recorded transitions, checked before training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.environments.make import beyond_id
from meam_policy.errors import ConfigError, DatasetError, NotFoundError
from meam_policy.given_files import given_path
from meam_policy.spec import BoxSpec, EnvironmentSpec
from meam_policy.typed import typed
from meam_training.data.action_chunk import ActionChunkSampler, check_chunk_size
from meam_training.data.clipped_actions import ClippedEpisode, clipped_in
from meam_training.data.dataset_cache import (
    COLUMNS,
    Columns,
    Recording,
    array_blocks,
    cache_place,
    fingerprint,
    in_memory,
    moments,
    open_cached,
)
from meam_training.data.discounted_returns import DiscountedReturns, discounted_returns
from meam_training.data.hdf5_source import hdf5_recording
from meam_training.data.lerobot_source import is_lerobot, lerobot_files, lerobot_recording
from meam_training.data.minari_files import find_minari, source_files
from meam_training.data.minari_source import minari_recording
from meam_training.data.observation_offset import common_offset
from meam_training.data.ogbench_source import ogbench_recording
from meam_training.data.reading_choices import ReadingChoices
from meam_training.data.recording_description import describe_recording, described_boxes
from meam_training.data.row_check import (
    ActionBounds,
    RowCheck,
    action_box_spec,
    flags,
    numbers,
    observation_box_specs,
    undeclared_box_spec,
    unit_box,
)
from meam_training.data.selection import chosen_rows, common, joined_blocks, joined_boxes, normalised_shares

if TYPE_CHECKING:
    from minari import MinariDataset

__all__ = ["OfflineDataset"]


@dataclass(frozen=True, eq=False, repr=False)
class OfflineDataset:
    """Recorded transitions, one per row, with the spaces they were recorded in.

    Create one with `from_minari`, `from_ogbench` or `from_arrays`; all three check the data. The first two convert the
    data once into arrays that are memory-mapped from then on, so that data sets may exceed the available memory; see
    `meam_training.data.dataset_cache`.

    Attributes:
        observations: Flattened observations [n, observation_dim], less `observation_offset`.
        actions: Flattened actions in environment units [n, action_dim].
        rewards: Rewards [n].
        next_observations: Observations after the actions [n, observation_dim], less `observation_offset`.
        terminations: True where the task ended, so that there are no further rewards [n]; may be true mid-episode.
        episode_ends: True at the last row of every recorded episode [n].
        observation_boxes: Boxes of the observation, in the order of flattening.
        action_box: Box of the action; its bounds are finite.
        dataset_id: Name of the data set, if known.
        environment_id: Environment the data was recorded in, if known.
        control_rate_hz: Rate at which actions were applied, if known.
        left_out: What the data set has and this one leaves out, such as images, by name.
        environment: How that environment is made, if it is recorded: arguments, time limit, wrappers, and another
            environment for evaluation.
        measured_bounds: Whether `action_box` is the range of the recorded actions, because nobody declared bounds.
        parts: Rows of each of the data sets that were joined, and its share of a batch; empty for one that was not
            joined, or whose rows all count the same.
        observation_offset: What was taken off every number of the observations in float64, such as of positions in map
            coordinates, whose digits float32 would not hold; empty if that is nothing.
        clipped: What was clipped of the recorded actions, by episode, in order.
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
    left_out: tuple[str, ...] = ()
    environment: EnvironmentSpec | None = None
    measured_bounds: bool = False
    parts: tuple[tuple[int, float], ...] = ()
    observation_offset: tuple[float, ...] = ()
    clipped: tuple[ClippedEpisode, ...] = ()

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

    @property
    def recorded_environment(self) -> EnvironmentSpec | None:
        """The environment the data was recorded in, with what its id alone does not give it; None if unknown."""
        if self.environment is not None:
            return beyond_id(self.environment)
        return None if self.environment_id is None else EnvironmentSpec(self.environment_id)

    @property
    def not_followed(self) -> tuple[str, ...]:
        """What the recorded environment has and one made from it would lack, in words: so it is not made."""
        recorded = self.recorded_environment
        return () if recorded is None else recorded.for_evaluation.refused

    @cached_property
    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each recorded episode [episodes]."""
        starts = np.concatenate([[0], np.flatnonzero(self.episode_ends)[:-1] + 1])
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    @cached_property
    def observation_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each component of `observations` [observation_dim]."""
        return moments(lambda: array_blocks(self.observations))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all recorded numbers and shares, in hexadecimal, by which a resumed run recognises its data."""
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")
        numbers = fingerprint({name: array_blocks(getattr(self, name)) for name in names})
        return _with_parts(_with_offset(numbers, self.observation_offset), self.parts)

    @classmethod
    @typed()
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
            ConfigError: an argument has another type.
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
            action_box = undeclared_box_spec(unit_box(numbers(actions, "actions").shape), bounds)
        else:
            action_box = action_box_spec(action_space, bounds)
        check = RowCheck(boxes, action_box, clip_actions)
        return cls(
            **check(observations, actions, rewards, next_observations, ended, ends),
            observation_boxes=boxes,
            action_box=action_box,
            dataset_id=dataset_id,
            environment_id=environment_id,
            control_rate_hz=control_rate_hz,
            left_out=(),
            environment=None,
            measured_bounds=False,
            parts=(),
            observation_offset=check.observation_offset,
            clipped=tuple(check.clipped),
        )

    @classmethod
    @typed()
    def from_minari(
        cls,
        id_or_path: str | os.PathLike[str] | MinariDataset,
        *,
        observation_keys: Sequence[str] | None = None,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
    ) -> OfflineDataset:
        """Read a local Minari data set.

        Terminations in the middle of a recorded episode are kept: there are no further rewards after them, but the
        episode goes on. The files are checked before Minari opens them: nothing in a data set is executed.

        Args:
            id_or_path: A Minari id such as "D4RL/door/human-v2" (under `MINARI_DATASETS_PATH`, by default
                ~/.minari/datasets), or the folder of a data set; or a `MinariDataset`, of which those episodes are
                taken that it was filtered to.
            observation_keys: Keys of a Dict observation, in the order of flattening; None takes all.
            action_low: Lower bounds of the actions, where the space has none: one number, or one for each number of an
                action; None takes the space's.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds, as many simulators do, rather than refuse those beyond.

        Raises:
            NotFoundError: there is no such local data set.
            DatasetError: as in `from_arrays`; or the files would run code, refer to files outside the data set, or are
                not Minari's.
            ConfigError: an argument has another type.
        """
        bounds = ActionBounds(action_low, action_high, clip_actions)
        if not isinstance(id_or_path, (str, os.PathLike)):
            if not hasattr(id_or_path, "storage"):
                raise DatasetError(
                    f"The data set is {id_or_path!r}; expected a Minari id, the path of a folder, or a MinariDataset."
                )
            whole = cls.from_minari(
                id_or_path.storage.data_path,
                observation_keys=observation_keys,
                action_low=action_low,
                action_high=action_high,
                clip_actions=clip_actions,
            )
            chosen, total = np.asarray(id_or_path.episode_indices), np.count_nonzero(whole.episode_ends)
            return whole if np.array_equal(chosen, np.arange(total)) else whole.choose_episodes(chosen)
        folder, choices = find_minari(id_or_path), ReadingChoices.of(observation_keys, bounds=bounds)
        dataset = open_cached(
            folder,
            source_files(folder),
            bounds.key if observation_keys is None else choices.as_settings(),
            lambda: minari_recording(folder, bounds, choices.observation_keys),
            cls._from_recording,
        )
        if dataset.not_followed:
            warnings.warn(
                f"{dataset.dataset_id} was recorded with {'; and '.join(dataset.not_followed)}. So its environment, "
                f"{dataset.environment_id}, is not made for evaluation. Name one as it is registered (--env-id), or "
                "record the data again without that; in Python give one: train(env=...), rollout(policy, env).",
                UserWarning,
                stacklevel=3,
            )
        return dataset

    @classmethod
    @typed()
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
            ConfigError: an argument has another type.
        """
        path = given_path("npz", npz)
        source, bounds = _existing(path), ActionBounds(action_low, action_high, clip_actions)
        settings = [path.stem, environment_id, environment_id and _installed_version("ogbench"), *bounds.key]
        return open_cached(
            source, [source], settings, lambda: ogbench_recording(path, environment_id, bounds), cls._from_recording
        )

    @classmethod
    @typed()
    def from_hdf5(
        cls,
        path: str | os.PathLike[str],
        *,
        observation_keys: Sequence[str] | None = None,
        action_key: str | None = None,
        action_space: spaces.Space[Any] | None = None,
        reward: str | None = None,
        termination: str | None = None,
        environment_id: str | None = None,
        control_rate_hz: float | None = None,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
    ) -> OfflineDataset:
        """Read an HDF5 file in the layout of D4RL or of robomimic.

        D4RL: `observations`, `actions`, `rewards` and `terminals`, with `timeouts`, `next_observations` or both. An
        episode ends where the task ended, at a timeout and, without `timeouts`, where the next row does not follow.

        robomimic: `data/demo_*` with `obs/…`, `actions`, `rewards` and `dones`.

        Where the observation after the last action of an episode is unknown, that row is left out, unless the task
        ended there.

        Args:
            path: The file.
            observation_keys: Observations of a robomimic file, in the order of flattening; None takes all, in
                alphabetical order, none of which may be images.
            action_key: Actions of a robomimic file; None takes "actions".
            action_space: Box with finite bounds; None takes [-1, 1], in which the actions must then lie.
            reward: Rewards of a robomimic file: a key; "end" for 1 at the end of every demonstration, which then
                terminates; or "none" for 0. None takes "rewards".
            termination: Flags of a robomimic file that are true where the task ended; None takes "dones", as robomimic
                does, if there are any.
            environment_id: Environment the data was recorded in.
            control_rate_hz: Rate at which the actions were applied, Hz; None takes the recorded one, if there is one.
            action_low: Lower bounds of the actions, as in `from_minari`.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds.

        Raises:
            NotFoundError: there is no such file.
            DatasetError: as in `from_arrays`; or the file is of another layout, or refers to other files.
            ConfigError: an argument has another type.
        """
        source = _existing(path)
        choices = ReadingChoices.of(
            observation_keys,
            action_key=action_key,
            action_space=action_space,
            reward=reward,
            termination=termination,
            environment_id=environment_id,
            control_rate_hz=control_rate_hz,
            bounds=ActionBounds(action_low, action_high, clip_actions),
        )
        return open_cached(
            source, [source], choices.as_settings(), lambda: hdf5_recording(source, choices), cls._from_recording
        )

    @classmethod
    @typed()
    def from_lerobot(
        cls,
        folder: str | os.PathLike[str],
        *,
        observation_keys: Sequence[str] | None = None,
        action_key: str | None = None,
        action_space: spaces.Space[Any] | None = None,
        reward: str | None = None,
        termination: str | None = None,
        environment_id: str | None = None,
        control_rate_hz: float | None = None,
        action_low: float | Sequence[float] | None = None,
        action_high: float | Sequence[float] | None = None,
        clip_actions: bool = False,
    ) -> OfflineDataset:
        """Read a LeRobot data set on this machine, of version 2.0, 2.1 or 3.0.

        Images and videos are not read; `left_out` has their names. A single "observation.state" becomes a Box, other
        columns a Dict without the prefix "observation.". LeRobot does not record what came after the last action of an
        episode, so that row is left out, unless the task ended there; `next.done` only says that an episode is over.

        Args:
            folder: The folder with `meta/info.json`.
            observation_keys: Columns of the observation, in the order of flattening; None takes all columns of numbers
                that begin with "observation.", in the recorded order.
            action_key: Column of the actions; None takes "action".
            action_space: Box with finite bounds; None takes the range of the recorded actions, since LeRobot declares
                none: the policy then never exceeds what was demonstrated.
            reward: Column of the rewards; "end" for 1 at the end of every episode, which then terminates; or "none" for
                0. None takes "next.reward", or else "next.success".
            termination: Column of flags that are true where the task ended; None takes "next.success", if there is one.
            environment_id: Environment the data was recorded in.
            control_rate_hz: Rate at which the actions were applied, Hz; None takes the recorded `fps`.
            action_low: Lower bounds of the actions, as in `from_minari`.
            action_high: Upper bounds, likewise.
            clip_actions: Clip actions to the bounds.

        Raises:
            NotFoundError: there is no such data set.
            DatasetError: as in `from_arrays`; or a file or a column is missing or broken, or of another version.
            MissingExtraError: pyarrow is not installed.
            ConfigError: an argument has another type.
        """
        given = given_path("folder", folder).resolve()
        if not is_lerobot(given):
            raise NotFoundError(f"{given} is no LeRobot data set; expected a folder with meta/info.json.")
        choices = ReadingChoices.of(
            observation_keys,
            action_key=action_key,
            action_space=action_space,
            reward=reward,
            termination=termination,
            environment_id=environment_id,
            control_rate_hz=control_rate_hz,
            bounds=ActionBounds(action_low, action_high, clip_actions),
        )
        return open_cached(
            given,
            lerobot_files(given),
            choices.as_settings(),
            lambda: lerobot_recording(given, choices),
            cls._from_recording,
        )

    @classmethod
    @typed()
    def joined(
        cls,
        datasets: Sequence[OfflineDataset],
        shares: Sequence[float] | None = None,
        *,
        environment_id: str | None = None,
    ) -> OfflineDataset:
        """Join data sets of the same spaces, one after the other.

        Data sets from caches are joined in a cache beside that of the first, others in memory. Normalisation is that of
        all rows.

        Args:
            datasets: Two data sets or more.
            shares: Share of a batch that each of them has, in any unit; None gives every row the same chance.
            environment_id: Environment of the joined data, as it is registered; None takes the one that the data sets
                record, where those that record none do not count.

        Raises:
            DatasetError: spaces, rates or environments differ, or there is not one positive share for each.
            ConfigError: an argument has another type.
        """
        if not datasets:
            raise DatasetError("There are no data sets to join; expected at least one.")
        named = {f"{number}: {each.dataset_id or 'arrays'}": each for number, each in enumerate(datasets, 1)}
        rows = [len(each) for each in datasets]
        given = normalised_shares(rows if shares is None else shares, len(datasets))
        boxes = joined_boxes({name: each.observation_boxes for name, each in named.items()}, measured=True)
        measured = all(each.measured_bounds for each in datasets)
        (action_box,) = joined_boxes({name: (each.action_box,) for name, each in named.items()}, measured)
        rates = {name: each.control_rate_hz for name, each in named.items()}
        recorded = {name: each.recorded_environment for name, each in named.items()}
        rate = common(rates, "control rate", "Resample one of them.")
        environments = {name: None if spec is None else str(spec) for name, spec in recorded.items()}
        environment = None
        if environment_id is None and common(environments, "environment", "Name one: environment_id= (--env-id)."):
            environment = next(spec for spec in recorded.values() if spec is not None)
            environment_id = environment.id
        parts = [{name: getattr(each, name) for name in COLUMNS} for each in datasets]
        offsets = [each.observation_offset for each in datasets]
        offset = common_offset(offsets, datasets[0].observation_dim)
        episodes = [int(np.count_nonzero(each.episode_ends)) for each in datasets]
        shown = zip(given, (each.dataset_id or "arrays" for each in datasets), strict=True)
        name = " + ".join(f"{s:.3g} {n}" for s, n in shown)
        about = {
            **describe_recording(boxes, action_box, name, environment_id, rate, environment),
            "measured_bounds": measured,
            "left_out": sorted({name for each in datasets for name in each.left_out}),
            "observation_offset": offset,
            "clipped": [
                clipped._replace(episode=int(start) + clipped.episode)
                for start, each in zip(np.cumsum(episodes) - episodes, datasets, strict=True)
                for clipped in each.clipped
            ],
        }
        place = cache_place(datasets[0].observations)
        if place is None or any(cache_place(each.observations) is None for each in datasets):
            whole = cls._from_recording(about, in_memory(joined_blocks(parts, offsets, offset)))
        else:
            settings = [json.dumps(about), *(each.fingerprint for each in datasets)]
            source = place / f"joined-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
            read = partial(_joined_recording, about, parts, offsets)
            whole = open_cached(source, [], settings, read, cls._from_recording)
        if shares is None:
            return whole
        joined = replace(whole, parts=tuple(zip(rows, given, strict=True)))
        prints = _with_parts(whole.fingerprint, joined.parts)
        vars(joined).update(observation_moments=whole.observation_moments, fingerprint=prints)
        return joined

    @typed()
    def choose_episodes(self, episodes: slice | Sequence[int] | NDArray[np.int_]) -> OfflineDataset:
        """Choose episodes; those that follow each other are not copied.

        Args:
            episodes: Their numbers, counted from 0 and each once, or a slice of them without a step.

        Raises:
            DatasetError: there is no such episode, one is given twice, or the data was joined with shares.
            ConfigError: an argument has another type.
        """
        if self.parts:
            raise DatasetError(
                "The data was joined with shares; expected one data set. Choose episodes before joining."
            )
        rows = chosen_rows(self.episode_ends, episodes, self.dataset_id or "the data")
        total = np.count_nonzero(self.episode_ends)
        if isinstance(rows, slice) and rows == slice(0, len(self)):
            return self
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        kept = np.count_nonzero(columns["episode_ends"])
        name = f"{self.dataset_id or 'arrays'} ({kept} of {total} episodes)"
        chosen = np.arange(total)[episodes]
        return replace(self, **columns, dataset_id=name, clipped=clipped_in(self.clipped, chosen))

    @typed()
    def chunk_sampler(self, chunk_size: int, discount: float, pad: bool = False) -> ActionChunkSampler:
        """Make a sampler of action chunks.

        Args:
            chunk_size: Actions in a chunk, at least 1.
            discount: Discount per environment step, in (0, 1].
            pad: Whether chunks may start at every row, also where they cross the end of their episode.

        Raises:
            DatasetError: no episode is as long as a chunk.
            ConfigError: an argument has another type.
        """
        check_chunk_size(chunk_size, self.episode_ends)
        return ActionChunkSampler(
            self.observations,
            self.actions,
            self.next_observations,
            self.rewards,
            self.terminations,
            self.episode_ends,
            chunk_size,
            discount,
            pad,
        )

    @typed()
    def discounted_returns(self, discount: float) -> DiscountedReturns:
        """Discounted sum of the rewards from each row on, up to a termination or the end of its episode.

        Args:
            discount: Discount per environment step, in (0, 1].

        Raises:
            ConfigError: the discount is out of range.
        """
        if not 0 < discount <= 1:
            raise ConfigError(f"discount is {discount}; expected a number above 0, at most 1.")
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
            left_out=tuple(about.get("left_out", ())),
            environment=None if about["environment"] is None else EnvironmentSpec.from_json(about["environment"]),
            measured_bounds=about.get("measured_bounds", False),
            observation_offset=tuple(about.get("observation_offset", ())),
            clipped=tuple(ClippedEpisode(*each) for each in about.get("clipped", ())),
            **{name: about[name] for name in names},
        )
        if "fingerprint" in about:
            # Fills the cached properties without a pass over the data.
            mean, std = np.array(about["moments"])
            prints = _with_offset(about["fingerprint"], dataset.observation_offset)
            vars(dataset).update(fingerprint=prints, observation_moments=(mean, std))
        return dataset


def _existing(path: str | os.PathLike[str]) -> Path:
    """Absolute path of a file that exists."""
    given = given_path("path", path)
    if not given.is_file():
        raise NotFoundError(f"There is no file {given}.")
    return given.resolve()


def _joined_recording(
    about: dict[str, Any], parts: Sequence[Columns], offsets: Sequence[tuple[float, ...]]
) -> Recording:
    return Recording(about, joined_blocks(parts, offsets, about["observation_offset"]))


def _with_offset(numbers: str, offset: tuple[float, ...]) -> str:
    """A fingerprint of recorded numbers and of what was taken off the observations."""
    return hashlib.sha256(json.dumps([numbers, offset]).encode()).hexdigest() if offset else numbers


def _with_parts(numbers: str, parts: tuple[tuple[int, float], ...]) -> str:
    """A fingerprint of recorded numbers and of the shares that they have in a batch."""
    return hashlib.sha256(json.dumps([numbers, parts]).encode()).hexdigest() if parts else numbers


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

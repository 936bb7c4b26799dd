"""Recording one's own environment or robot, step by step."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike, NDArray

from meam_policy.environments.space_check import AnyEnv
from meam_policy.errors import ConfigError, DatasetError
from meam_policy.spec import BoxSpec
from meam_policy.typed import typed
from meam_training.collection.dataset_folder import new_dataset_folder
from meam_training.collection.demonstrators.episode import Episode, stacked
from meam_training.collection.minari_writer import DescribedEnvironment, Metadata, write_minari
from meam_training.collection.partial_recording import PartialRecording
from meam_training.data.row_check import RowCheck, action_box_spec, flags, numbers, observation_box_specs

__all__ = ["Recorder"]

Observation = ArrayLike | Mapping[str, ArrayLike]


JITTER = 1e-4
"""Rounding of a recorded number from which it is warned about: 0.1 mm or 0.1 mrad is the jitter of a sensor."""


class _Step(NamedTuple):
    action: NDArray[Any]
    observation: Any
    reward: np.float32
    terminated: bool
    success: bool


class Recorder:
    """Records an environment or robot of one's own into a local Minari data set, without a simulator.

    Every step is checked when it is recorded. An episode is on the disk once it has ended: after a kill, or on another
    day, the recording is continued with `resume=True`. The data set appears with `finish`, whole.

    Args:
        dataset_id: Minari id, e.g. "lab/arm-v0".
        observation_space: A Box, or a Dict of Boxes; finite bounds are not needed.
        action_space: A Box of floats with finite bounds, in which every action must lie.
        root: Folder of the Minari data sets; None takes Minari's own.
        control_rate_hz: Rate at which actions are applied, Hz; None if there is none.
        environment: The environment of Gymnasium that is recorded, if it is one: its id, arguments, time limit and
            wrappers are recorded, and policies trained on the data are evaluated in it. None for a robot.
        environment_id: Name that policies trained on the data will record; None takes the environment's, if it is
            given.
        success: Whether every step says whether the task has succeeded.
        resume: Continue the unfinished recording of this data set, if there is one.

    Attributes:
        running: Whether an episode has begun and not ended.

    Raises:
        ConfigError: the name is not a Minari id, the rate is not above 0, or the unfinished recording has other
            settings.
        DatasetError: a space is not of these kinds, or the unfinished recording is broken.
        SpaceError: a space within a Dict is not a Box.
        OutputError: the data set already exists, there is an unfinished recording although `resume` is false, or the
            folder cannot be written.
        LockedError: another process is recording the data set.
        MissingExtraError: minari is not installed.

    Example:
        spaces = env.observation_space, env.action_space
        with Recorder("lab/arm-v0", *spaces, environment=env, resume=True) as recorder:
            while recorder.episodes < 50:
                recorder.reset(env.reset()[0])
                while recorder.running:
                    action = operator.action()
                    recorder.step(action, *env.step(action)[:4])
            folder = recorder.finish()
    """

    @typed("environment")
    def __init__(
        self,
        dataset_id: str,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        root: str | os.PathLike[str] | None = None,
        control_rate_hz: float | None = None,
        environment: AnyEnv | None = None,
        environment_id: str | None = None,
        success: bool = False,
        resume: bool = False,
    ) -> None:
        self._boxes = observation_box_specs(observation_space, ())
        self._action_box = action_box_spec(action_space)
        if control_rate_hz is not None and not 0 < control_rate_hz < math.inf:
            raise ConfigError(f"control_rate_hz is {control_rate_hz}; expected a rate above 0, or None.")
        self._check = RowCheck(self._boxes, self._action_box)
        made_by = None if environment is None else _specification(environment, observation_space)
        self._described = DescribedEnvironment(observation_space, action_space, made_by)
        self._name, self._success = dataset_id, success
        about = {"meam_environment_id": environment_id, "control_rate_hz": control_rate_hz}
        self._about = {name: value for name, value in about.items() if value is not None}
        self._folder = new_dataset_folder(dataset_id, root)
        settings = {
            **about,
            "success": success,
            "observation_space": [box.to_json() for box in self._boxes],
            "action_space": self._action_box.to_json(),
            **({} if made_by is None else {"environment": made_by.to_json()}),
        }
        self._opened = ExitStack()
        partial = PartialRecording.open(
            self._folder.with_name(f".{self._folder.name}.partial"), settings, resume=resume
        )
        self._recording = self._opened.enter_context(partial)
        self._is_open = True
        self._steps: list[_Step] = []
        self._first: Any = None
        self._told_rounding = False
        self.running = False

    @property
    def episodes(self) -> int:
        """Episodes recorded so far, those before a resumption included."""
        return self._recording.progress.episodes

    @property
    def transitions(self) -> int:
        """Steps of these episodes."""
        return self._recording.progress.transitions

    def reset(self, observation: Observation) -> None:
        """Begin an episode.

        Args:
            observation: Its first observation, shaped as in the observation space; a mapping for a Dict.

        Raises:
            ConfigError: the last episode has not ended, or the recorder is closed.
            DatasetError: the observation has another shape or type, or is not finite or within bounds.
        """
        self._require_open()
        if self.running:
            raise ConfigError(
                f"Episode {self.episodes} has not ended after {len(self._steps)} steps; expected a step with "
                "terminated or truncated before reset. Or drop the episode: recorder.discard()."
            )
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], Mapping):
            raise DatasetError(
                "The observation is a pair (observation, info), as env.reset() returns it; expected the observation "
                "alone: recorder.reset(env.reset()[0])."
            )
        # As a step that stays there, whose action is within any bounds.
        self._checked(observation, np.reshape(self._action_box.low, self._action_box.shape), 0.0, observation, False)
        self._first, self._steps, self.running = self._observation(observation), [], True

    def step(
        self,
        action: ArrayLike,
        observation: Observation,
        reward: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        *,
        success: ArrayLike | None = None,
    ) -> None:
        """Record a step; the arguments after the action are in the order in which `env.step` returns them.

        The arrays are copied. A step that is refused is not recorded, and the episode may go on with a right one.

        Args:
            action: The action, shaped as in the action space and within its bounds.
            observation: The observation after it.
            reward: Its reward: a number.
            terminated: Whether the task has ended, so that nothing more is earned.
            truncated: Whether the recording of the episode was cut.
            success: Whether the task has succeeded; given if and only if the recorder was made with `success=True`.

        Raises:
            ConfigError: no episode has begun, `success` is given or missing against the recorder's setting, or the
                recorder is closed.
            DatasetError: a number is not finite or out of bounds, or has another shape or type; the message names
                field, episode and step.
            OutputError: the episode has ended and cannot be written; it is kept in memory, and written again with the
                next one.
        """
        self._require_open()
        if not self.running:
            raise ConfigError("No episode has begun; expected recorder.reset(observation) before recorder.step.")
        if (success is not None) != self._success:
            given = "missing" if success is None else "given"
            raise ConfigError(f"success is {given}, but the recorder was made with success={self._success}.")
        over, cut = _flag(terminated, "terminated"), _flag(truncated, "truncated")
        won = success is not None and _flag(success, "success")
        before = self._steps[-1].observation if self._steps else self._first
        row = self._checked(before, action, reward, observation, over or cut)
        acted = _converted(action, self._action_box, "action")
        self._steps.append(_Step(acted, self._observation(observation), row["rewards"][0], over, won))
        if over or cut:
            self._end()

    def discard(self) -> None:
        """Drop the episode that has begun and not ended, if there is one."""
        self._first, self._steps, self.running = None, [], False

    def finish(self) -> Path:
        """Write the data set, and close the recorder.

        Returns:
            The folder of the data set, which `OfflineDataset.from_minari` reads.

        Raises:
            ConfigError: there are no episodes, an episode has not ended, or the recorder is closed.
            OutputError: the data set cannot be written.
        """
        self._require_open()
        if self.running or not self.episodes:
            what = f"episode {self.episodes} has not ended" if self.running else "no episode has been recorded"
            raise ConfigError(f"The data set cannot be finished: {what}. End it with a step, or drop it: discard().")
        self._recording.flush()
        about = Metadata("recorder", f"{self._name}, recorded step by step.", self._about)
        self._recording.finish(write_minari(self._recording, self._name, self._described, about), self._folder)
        self.close()
        return self._folder

    def close(self) -> None:
        """Close the recording, to continue it later; an episode that has not ended is dropped with a warning."""
        if not self._is_open:
            return
        self._is_open = False
        dropped = len(self._steps) if self.running else None
        self.discard()
        self._opened.close()
        if dropped is not None:
            warnings.warn(
                f"Episode {self.episodes} of {self._name} has not ended: its {dropped} steps are dropped. End an "
                "episode by a step with truncated=True.",
                UserWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        steps, first = self._steps, self._first
        self.discard()
        episode = Episode(
            stacked([first, *(step.observation for step in steps)]),
            np.stack([step.action for step in steps]),
            np.array([step.reward for step in steps], dtype=np.float32),
            np.array([step.terminated for step in steps]),
            np.array([step.success for step in steps]) if self._success else None,
        )
        self._recording.add(episode, [])
        # A robot's episodes are dear: each is on the disk before the next one begins.
        self._recording.flush()

    def _checked(self, before: Any, action: Any, reward: Any, observation: Any, ended: bool) -> dict[str, NDArray[Any]]:
        rewards, ends = _one(np.ravel(numbers(reward, "reward")), "reward"), np.array([ended])
        seen = [_one(values, "observation") for values in (before, observation)]
        check = self._check.at(self.episodes, len(self._steps))
        return check(seen[0], _one(action, "action"), rewards, seen[1], ends, ends)

    def _observation(self, values: Any) -> Any:
        if self._boxes[0].key is None:
            return self._part(values, self._boxes[0], "observation")
        return {str(box.key): self._part(values[box.key], box, f'observation "{box.key}"') for box in self._boxes}

    def _part(self, values: Any, box: BoxSpec, name: str) -> NDArray[Any]:
        copy = _converted(values, box, name)
        error = float(np.abs(np.asarray(values, np.float64).reshape(box.shape) - copy).max())
        if error > JITTER and not self._told_rounding:
            self._told_rounding = True
            warnings.warn(
                f"The {name} is rounded by {error:.2g}, to {box.dtype}, as its space says. Declare the space as "
                "np.float64 to keep the digits of large numbers, such as of positions in map coordinates.",
                UserWarning,
                stacklevel=4,
            )
        return copy

    def _require_open(self) -> None:
        if not self._is_open:
            raise ConfigError(f"The recorder of {self._name} is closed. Make another one to record further.")


def _one(values: Any, name: str) -> Any:
    """Values as a batch of one, for `RowCheck`."""
    if isinstance(values, Mapping):
        return {key: _one(part, f'{name} "{key}"') for key, part in values.items()}
    return numbers(values, name)[None]


def _flag(value: ArrayLike, name: str) -> bool:
    array = numbers(value, name)
    if array.size != 1:
        raise DatasetError(f"{name} has shape {array.shape}; expected one flag.")
    return bool(flags(array.reshape(1), name)[0])


def _converted(values: ArrayLike, box: BoxSpec, name: str) -> NDArray[Any]:
    """A copy in the type of its space: whoever calls may use its arrays again.

    Raises:
        DatasetError: a whole number is expected, and the value is not one.
    """
    array = np.asarray(values)
    copy = array.astype(box.dtype)
    if copy.dtype.kind != "f" and not np.array_equal(copy, array):
        raise DatasetError(f"{name} has numbers that are no {box.dtype}; expected whole numbers, as its space says.")
    return copy.reshape(box.shape)


def _specification(environment: AnyEnv, observation_space: spaces.Space[Any]) -> EnvSpec | None:
    """How an environment is made, as far as it can be recorded.

    Raises:
        ConfigError: it is no environment, or its observations are not those that are recorded.
    """
    if not isinstance(environment, (gymnasium.Env, gymnasium.vector.VectorEnv)):
        raise ConfigError(f"environment is {environment!r}; expected an environment of Gymnasium, or None for a robot.")
    described = DescribedEnvironment.of(environment)
    if described.observation_space != observation_space:
        raise ConfigError(
            f"environment has the observation space {described.observation_space}, but {observation_space} is to be "
            "recorded; expected the environment whose observations are recorded, with its wrappers."
        )
    if described.spec is None:
        warnings.warn(
            f"How {environment} is made cannot be recorded: gymnasium.make did not make it, or its arguments are not "
            "plain numbers, texts, lists and dicts. Policies trained on the data will not say where to be evaluated, "
            "unless environment_id does.",
            stacklevel=4,
        )
    return described.spec

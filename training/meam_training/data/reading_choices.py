"""What is read of a file, where the file alone does not decide it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meam_policy.errors import DatasetError
from meam_policy.spec import BoxSpec
from meam_training.data.row_check import DECLARED, ActionBounds, action_box_spec, undeclared_box_spec

__all__ = ["MADE_REWARDS", "ReadingChoices", "StoredEpisode", "stored_episode"]

MADE_REWARDS = ("end", "none")
"""Rewards that no file stores: 1 at the end of every episode, which then terminates, for demonstrations that all
succeed; and 0 everywhere, for behaviour cloning."""


@dataclass(frozen=True)
class ReadingChoices:
    """What is read of a file.

    Attributes:
        observation_keys: Keys of the observation, in the order in which they are flattened; None for the default.
        action_key: Key of the action; None for the default.
        action_space: Box of the action; None for the default.
        reward: Key of the rewards, or one of `MADE_REWARDS`; None for the default.
        termination: Key of the flags that are true where the task ended; None for the default.
        environment_id: Environment the data was recorded in.
        control_rate_hz: Rate at which the actions were applied, Hz; None takes what the file says.
        bounds: What the user says about the bounds of the actions.
    """

    observation_keys: tuple[str, ...] | None = None
    action_key: str | None = None
    action_space: spaces.Space[Any] | None = None
    reward: str | None = None
    termination: str | None = None
    environment_id: str | None = None
    control_rate_hz: float | None = None
    bounds: ActionBounds = DECLARED

    @classmethod
    def of(cls, observation_keys: Sequence[str] | None, **others: Any) -> ReadingChoices:
        """The choices, with the keys as a tuple.

        Raises:
            DatasetError: a key is given twice, or none.
        """
        if isinstance(observation_keys, str):
            observation_keys = (observation_keys,)
        keys = None if observation_keys is None else tuple(observation_keys)
        if keys is not None and (not keys or len(set(keys)) < len(keys)):
            raise DatasetError(f"observation_keys are {list(keys)}; expected one key or more, each once.")
        return cls(keys, **others)

    def action_box(self, measured: spaces.Box) -> BoxSpec:
        """The box of the action: the chosen space or, without one, that of the file, within the chosen bounds.

        Args:
            measured: Box of the file, whose bounds give way to chosen ones.

        Raises:
            DatasetError: it is not a Box of floats, or its bounds are missing or contradict each other.
        """
        if self.action_space is not None:
            return action_box_spec(self.action_space, self.bounds)
        return undeclared_box_spec(measured, self.bounds)

    def as_settings(self) -> list[str]:
        """The choices as settings of a conversion; see `dataset_cache.open_cached`."""
        box = None if self.action_space is None else action_box_spec(self.action_space, self.bounds)
        shown = {**vars(self), "action_space": None if box is None else box.to_json()}
        del shown["bounds"]
        return [json.dumps(shown, sort_keys=True), *self.bounds.key]


@dataclass(frozen=True, eq=False)
class StoredEpisode:
    """An episode of T steps, with the attributes of Minari's `EpisodeData`.

    Attributes:
        id: Its number or name.
        observations: Observations [T + 1, …], or a mapping of them.
        actions: Actions [T, …].
        rewards: Rewards [T].
        terminations: True where the task ended [T].
        truncations: False; the last step is the episode's end anyway [T].
    """

    id: Any
    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]


def stored_episode(
    name: Any,
    observations: dict[str, NDArray[Any]] | NDArray[Any],
    actions: NDArray[Any],
    rewards: NDArray[Any] | Literal["end", "none"],
    terminations: NDArray[Any] | None,
    last_observation: dict[str, NDArray[Any]] | NDArray[Any] | None = None,
) -> StoredEpisode | None:
    """Make an episode of rows with as many observations as actions.

    Without the observation after the last action, that action is left out, because nobody knows what came of it:
    unless it ended the task, so that nothing depends on what came.

    Args:
        name: Its number or name.
        observations: Observations [T, …], or a mapping of them.
        actions: Actions [T, …].
        rewards: Rewards [T], or how they are made.
        terminations: True where the task ended [T]; None where it never does.
        last_observation: Observation after the last action, or a mapping of them; None if unknown.

    Returns:
        The episode; None if no row of it has a successor.

    Raises:
        DatasetError: the lengths differ.
    """
    columns = observations if isinstance(observations, dict) else {"": observations}
    after = last_observation if isinstance(last_observation, dict) else {"": last_observation}
    length = len(actions)
    ended = np.zeros(length, bool) if terminations is None else np.asarray(terminations)
    if isinstance(rewards, str):
        made = np.zeros(length, np.float32)
        if rewards == "end" and length:
            made[-1], ended = 1.0, np.arange(length) == length - 1
        rewards = made
    for key, column in (*columns.items(), ("rewards", rewards), ("terminations", ended)):
        if len(column) != length:
            raise DatasetError(
                f"Episode {name} has {length} actions and {len(column)} {key or 'observations'}; expected as many."
            )
    if not length:
        return None
    if last_observation is None and not ended[-1]:
        length -= 1
        whole = columns
    else:
        whole = {
            key: np.concatenate([column, column[-1:] if last_observation is None else np.asarray(after[key])[None]])
            for key, column in columns.items()
        }
    if not length:
        return None
    seen = whole if isinstance(observations, dict) else whole[""]
    return StoredEpisode(name, seen, actions[:length], rewards[:length], ended[:length], np.zeros(length, bool))

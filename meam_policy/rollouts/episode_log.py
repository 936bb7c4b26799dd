"""The log of one episode, and the interface of the policy that acts in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import SpaceError
from meam_policy.spec import PolicySpec

__all__ = ["ActingPolicy", "EpisodeLog", "Trajectory", "one_number", "timed_act"]


class ActingPolicy(Protocol):
    """What `rollout` needs of a policy; `MeamPolicy` has it."""

    spec: PolicySpec

    @property
    def inferences(self) -> int:
        """Network runs so far."""
        ...

    def act(self, observation: Any) -> NDArray[Any]:
        """Choose the next action, or one for every row of a batch."""
        ...

    def reset(self, seed: int | Sequence[int] | None = None, mask: NDArray[np.bool_] | None = None) -> None:
        """Start a new episode in the slots with a true mask [slots], or in all; `seed` may have one seed a slot.

        A slot that begins with a seed s draws the noise that a single environment draws after `reset(seed=s)`.
        """
        ...


class Trajectory(NamedTuple):
    """A whole episode of T environment steps.

    Attributes:
        observations: T + 1 rows; one array per key for a Dict space.
        actions: [T, …] as in the action space.
        rewards: [T].
        terminations: [T]; true where the task ended. Where the last one is false, the episode was truncated.
    """

    observations: NDArray[Any] | dict[str, NDArray[Any]]
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]


class EpisodeLog:
    """What happens in an episode, step by step.

    Args:
        observation: The first one, or None if observations and actions are not to be kept.

    Attributes:
        rewards: Reward of every step.
        success: Whether the environment reported success at any step; None if it never said.
        cut: Whether the episode was cut off before the environment ended it.
    """

    def __init__(self, observation: Any = None) -> None:
        self._observations = None if observation is None else [observation]
        self._actions: list[NDArray[Any]] = []
        self._terminations: list[bool] = []
        self.rewards: list[float] = []
        self.success: bool | None = None
        self.cut = False

    def add(self, action: NDArray[Any], observation: Any, reward: Any, terminated: bool, flag: Any) -> None:
        """Take a step: the action, and what came of it.

        Args:
            action: The action.
            observation: The observation after it, which nobody may change any more.
            reward: The reward, a number or an array of one.
            terminated: Whether the task ended.
            flag: Whether the environment reported success; None if it did not report.

        Raises:
            SpaceError: the reward is not one number.
        """
        self.rewards.append(one_number(reward))
        if flag is not None:
            self.success = bool(flag) or bool(self.success)
        if self._observations is not None:
            self._observations.append(observation)
            self._actions.append(action)
            self._terminations.append(bool(terminated))

    def trajectory(self) -> Trajectory:
        """The whole episode, if it was kept."""
        observations = self._observations or []
        return Trajectory(
            {key: np.stack([row[key] for row in observations]) for key in observations[0]}
            if isinstance(observations[0], Mapping)
            else np.stack(observations),
            np.stack(self._actions),
            np.array(self.rewards),
            np.array(self._terminations),
        )


def one_number(reward: Any) -> float:
    """A reward as a number; code around PyTorch and dm_env gives an array of one.

    Raises:
        SpaceError: it is not one number.
    """
    try:
        values = np.empty(0) if reward is None else np.asarray(reward, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.size != 1:
        seen = f"an array of shape {values.shape}" if values.size else repr(reward)[:60]
        raise SpaceError(
            f"The environment's reward is {seen}; expected one number. Wrap the environment so that it returns one."
        )
    return float(values.reshape(()))


def timed_act(policy: ActingPolicy, observation: Any, latencies: list[float]) -> NDArray[Any]:
    """Act, and note the seconds it took if the network ran."""
    before, start = policy.inferences, time.perf_counter()
    action = policy.act(observation)
    if policy.inferences > before:
        latencies.append(time.perf_counter() - start)
    return action

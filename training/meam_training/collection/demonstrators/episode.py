"""Recorded episodes, and the seeding that makes them reproducible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.rollouts.episodes import longest_episode

__all__ = ["Episode", "Observations", "episode_generator", "record_steps", "seeded_globally", "stacked"]

Observations = NDArray[Any] | dict[str, NDArray[Any]]
"""Observations with one row each; for a Dict space, one such array per key."""


class Episode(NamedTuple):
    """A recorded episode of T steps: T + 1 observations, and T of everything else.

    Terminations may be mid-episode; successes are None where nothing says whether a step succeeded.
    """

    observations: Observations
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminations: NDArray[np.bool_]
    successes: NDArray[np.bool_] | None = None


def episode_generator(seed: int, episode: int) -> np.random.Generator:
    """Make the random generator of an episode, which is independent of earlier episodes."""
    return np.random.default_rng([seed, episode])


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which OGBench's oracles and mazes use, and restore its state on exit.

    Args:
        seed: Seed from 0 to 2**32 - 1.
    """
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def record_steps(env: gymnasium.Env[Any, Any], act: Callable[[Any], NDArray[Any]], seed: int) -> Episode:
    """Act in an environment until it ends the episode, or for as many steps as `rollout` waits for that.

    Args:
        env: The environment.
        act: Maps an observation to an action.
        seed: Seed of the environment's reset.
    """
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards, terminations, ended = [observation], [], [], [], False
    longest = longest_episode(env)
    while not ended:
        actions.append(act(observation))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        terminations.append(terminated)
        ended = terminated or truncated
        if not ended and len(actions) == longest:
            warnings.warn(
                f"An episode was cut off after {longest} steps, because the environment had not ended it. Set "
                "max_episode_steps (--max-episode-steps) for another length.",
                stacklevel=2,
            )
            ended = True
    return Episode(
        stacked(observations),
        np.stack(actions),
        np.array(rewards, dtype=np.float32),
        np.array(terminations, dtype=bool),
    )


def stacked(observations: list[Any]) -> Observations:
    """Stack the observations of an episode, by key for a Dict space."""
    if isinstance(observations[0], Mapping):
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)

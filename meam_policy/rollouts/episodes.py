"""Episodes of a policy in a Gymnasium environment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.acting.observation import flatten_observation
from meam_policy.environments.space_check import AnyEnv, check_env, episode_limit
from meam_policy.errors import ConfigError, WorkerError
from meam_policy.rollouts.episode_log import ActingPolicy, EpisodeLog, Trajectory, timed_act
from meam_policy.rollouts.result import RolloutResult
from meam_policy.rollouts.vector_episodes import vector_episodes
from meam_policy.typed import typed

__all__ = ["LONGEST_EPISODE", "longest_episode", "rollout"]

LONGEST_EPISODE = 10_000
"""Steps after which an episode is cut off where neither the environment nor the user says when."""

MOST_EPISODES = 10**7
"""Episodes of one rollout: the figures of more are too many to be kept."""


def longest_episode(env: AnyEnv) -> int:
    """Steps after which an episode is cut off: `LONGEST_EPISODE`, or the environment's own limit if that is longer."""
    return max(LONGEST_EPISODE, episode_limit(env) or 0)


@typed("env")
def rollout(
    policy: ActingPolicy,
    env: AnyEnv,
    episodes: int,
    seed: int,
    *,
    record: bool = False,
    max_episode_steps: int | None = None,
    on_episode: Callable[[int], None] | None = None,
    on_trajectory: Callable[[int, Trajectory], None] | None = None,
) -> RolloutResult:
    """Run whole episodes. Episode i resets environment and policy with seed + i, so the result is reproducible.

    In a vector environment it is the same result, episode by episode, up to what the batch changes in the network's
    float32 rounding: see `vector_episodes`. Make an `AsyncVectorEnv` before the policy is loaded, or with
    `context="spawn"`: a session of onnxruntime does not survive a fork.

    An interrupt passes on; what was finished has been given to `on_episode` and `on_trajectory`.

    Args:
        policy: A `MeamPolicy`, or anything with its `act`, `reset`, `spec` and `inferences`.
        env: One environment, or a Gymnasium vector environment of any autoreset mode.
        episodes: Number of episodes, 1 to `MOST_EPISODES`.
        seed: Seed of the first episode, at least 0.
        record: Keep the observations.
        max_episode_steps: Steps after which an episode that the environment has not ended is cut off, as by a time
            limit; None takes `LONGEST_EPISODE`, or the environment's own limit if that is longer.
        on_episode: Called with the number of finished episodes after every one.
        on_trajectory: Called with the index and all that happened of every episode, as they finish: in a vector
            environment that is another order than that of the indices.

    Raises:
        SpaceError: the policy cannot act in the environment, see `check_env`; or a reward is not one number.
        ConfigError: episodes, seed or max_episode_steps is out of range, or the vector environment cannot reset slots
            one by one.
        WorkerError: a process of an `AsyncVectorEnv` died, which is closed then; its `partial` has the result of the
            episodes that were finished, which are not a fair sample: short ones finish first.

    Warns:
        UserWarning: episodes were cut off.
    """
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ConfigError(f"max_episode_steps is {max_episode_steps}; expected 1 or more.")
    if not 1 <= episodes <= MOST_EPISODES or seed < 0:
        raise ConfigError(
            f"episodes is {episodes} and seed is {seed}; expected episodes from 1 to {MOST_EPISODES} and seed >= 0."
        )
    check_env(policy.spec, env)
    latencies: list[float] = []
    keep = record or on_trajectory is not None
    longest = max_episode_steps or longest_episode(env)
    arguments: dict[str, Any] = {"longest": longest, "keep": keep, "latencies": latencies}
    if isinstance(env, gymnasium.vector.VectorEnv):
        run = vector_episodes(policy, env, episodes, seed, **arguments)
    else:
        run = _single_episodes(policy, env, episodes, seed, **arguments)
    cut = 0
    raw = replace(policy.spec, observation_offset=())
    figures: dict[int, tuple[float, int, bool | None]] = {}
    paths: dict[int, NDArray[np.float32]] = {}
    try:
        for index, log in run:
            cut += log.cut
            figures[index] = sum(log.rewards), len(log.rewards), log.success
            if record:
                paths[index] = flatten_observation(raw, log.trajectory().observations)[0]
            if on_trajectory is not None:
                on_trajectory(index, log.trajectory())
            if on_episode is not None:
                on_episode(len(figures))
    except WorkerError as error:
        error.partial = replace(_result(figures, paths, latencies), partial=True) if figures else None
        raise
    if cut:
        warnings.warn(
            f"{cut} of {episodes} episodes were cut off after {longest} steps, because the environment had not ended "
            "them by then. Choose another limit: max_episode_steps= (--max-episode-steps).",
            UserWarning,
            stacklevel=3,
        )
    return _result(figures, paths, latencies)


def _result(
    figures: Mapping[int, tuple[float, int, bool | None]],
    paths: Mapping[int, NDArray[np.float32]],
    latencies: list[float],
) -> RolloutResult:
    """The result of episodes by index, of which each has return, length and success."""
    returns, lengths, successes = zip(*(figures[index] for index in sorted(figures)), strict=True)
    return RolloutResult(
        returns=np.array(returns),
        lengths=np.array(lengths),
        # An environment that reports success only where it is reached did not reach it elsewhere.
        successes=None if all(s is None for s in successes) else np.array([bool(s) for s in successes]),
        latencies=np.array(latencies),
        observations=[paths[index] for index in sorted(paths)],
    )


def _single_episodes(
    policy: ActingPolicy,
    env: gymnasium.Env[Any, Any],
    episodes: int,
    seed: int,
    *,
    longest: int,
    keep: bool,
    latencies: list[float],
) -> Iterator[tuple[int, EpisodeLog]]:
    """Run whole episodes one after the other; the arguments and results of `vector_episodes`."""
    for index in range(episodes):
        policy.reset(seed=seed + index)
        observation, _ = env.reset(seed=seed + index)
        log, done = EpisodeLog(deepcopy(observation) if keep else None), False
        while not done:
            action = timed_act(policy, observation, latencies)
            observation, reward, terminated, truncated, info = env.step(action)
            flag = info.get("success", info.get("is_success"))
            log.add(action, deepcopy(observation) if keep else None, reward, terminated, flag)
            log.cut = len(log.rewards) >= longest and not (terminated or truncated)
            done = terminated or truncated or log.cut
        yield index, log

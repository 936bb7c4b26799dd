"""Running a policy in an environment, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.episode_log import ActingPolicy, EpisodeLog, Trajectory, timed_act
from meam_policy.errors import ConfigError
from meam_policy.observation import flatten_observation
from meam_policy.space_check import AnyEnv, check_env
from meam_policy.vector_rollout import vector_episodes

__all__ = ["RolloutResult", "mean_interval", "rollout"]


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """What happened in a number of episodes.

    Attributes:
        returns: Undiscounted return of every episode [episodes].
        lengths: Steps of every episode [episodes].
        successes: Whether the environment reported success at any step (`info["success"]` or `info["is_success"]`)
            [episodes]; None if it never says.
        latencies: Seconds of every `act` call that ran the network, in a vector environment for all slots that needed
            it; the calls in between only take queued actions.
        observations: The observations of every episode, each [steps + 1, observation_dim], if they were recorded.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None
    latencies: NDArray[np.float64]
    observations: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def return_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return; see `mean_interval`."""
        return mean_interval(self.returns)

    @property
    def success_rate(self) -> float | None:
        """Share of episodes with success, or None if the environment never reports it."""
        return None if self.successes is None else float(self.successes.mean())

    def latency_ms(self, percentile: float) -> float:
        """A percentile (0 to 100) of the inference latency, in milliseconds."""
        return float(np.percentile(self.latencies, percentile) * 1e3)

    def summary(self) -> dict[str, Any]:
        """The figures as JSON data: return, success and action latency."""
        low, high = self.return_interval
        return {
            "episodes": len(self.returns),
            "return_mean": self.return_mean,
            "ci_low": low,
            "ci_high": high,
            "success": self.success_rate,
            "length_mean": float(self.lengths.mean()),
            "latency_p50_ms": self.latency_ms(50),
            "latency_p99_ms": self.latency_ms(99),
        }


def mean_interval(values: NDArray[Any], level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Confidence interval of a mean by the percentile bootstrap, with a fixed seed.

    Args:
        values: Independent draws [n], n >= 1; for one value, or equal values, the interval is a point.
        level: Coverage, between 0 and 1.
        resamples: Bootstrap resamples.

    References:
        Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    draws, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    means = [draws[generator.integers(len(draws), size=len(draws))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rollout(
    policy: ActingPolicy,
    env: AnyEnv,
    episodes: int,
    seed: int,
    *,
    record: bool = False,
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
        env: One environment, or a Gymnasium vector environment of any autoreset mode; it must end its episodes by
            itself.
        episodes: Number of episodes, at least 1.
        seed: Seed of the first episode, at least 0.
        record: Keep the observations.
        on_episode: Called with the number of finished episodes after every one.
        on_trajectory: Called with the index and all that happened of every episode, as they finish: in a vector
            environment that is another order than that of the indices.

    Raises:
        SpaceError: the policy cannot act in the environment; see `check_env`.
        ConfigError: episodes or seed is out of range, or the vector environment cannot reset slots one by one.
    """
    if episodes < 1 or seed < 0:
        raise ConfigError(f"episodes is {episodes} and seed is {seed}; expected episodes >= 1 and seed >= 0.")
    check_env(policy.spec, env)
    latencies: list[float] = []
    keep = record or on_trajectory is not None
    if isinstance(env, gymnasium.vector.VectorEnv):
        run = vector_episodes(policy, env, episodes, seed, keep=keep, latencies=latencies)
    else:
        run = _single_episodes(policy, env, episodes, seed, keep=keep, latencies=latencies)
    figures: dict[int, tuple[float, int, bool | None]] = {}
    paths: dict[int, NDArray[np.float32]] = {}
    for index, log in run:
        figures[index] = sum(log.rewards), len(log.rewards), log.success
        if record:
            paths[index] = flatten_observation(policy.spec, log.trajectory().observations)[0]
        if on_trajectory is not None:
            on_trajectory(index, log.trajectory())
        if on_episode is not None:
            on_episode(len(figures))
    returns, lengths, successes = zip(*(figures[index] for index in sorted(figures)), strict=True)
    return RolloutResult(
        returns=np.array(returns),
        lengths=np.array(lengths),
        successes=None if None in successes else np.array(successes, dtype=bool),
        latencies=np.array(latencies),
        observations=[paths[index] for index in sorted(paths)],
    )


def _single_episodes(
    policy: ActingPolicy,
    env: gymnasium.Env[Any, Any],
    episodes: int,
    seed: int,
    *,
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
            log.add(action, deepcopy(observation) if keep else None, float(reward), terminated, flag)
            done = terminated or truncated
        yield index, log

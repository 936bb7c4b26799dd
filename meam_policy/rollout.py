"""Running a policy in an environment, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError, SpaceError
from meam_policy.observation import flatten_observation
from meam_policy.spec import PolicySpec

__all__ = ["RolloutResult", "check_spaces", "mean_interval", "rollout"]


class ActingPolicy(Protocol):
    """What `rollout` needs of a policy; `MeamPolicy` has it."""

    spec: PolicySpec

    @property
    def inferences(self) -> int:
        """Network runs so far."""
        ...

    def act(self, observation: Any) -> NDArray[Any]:
        """Choose the next action."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode."""
        ...


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """What happened in a number of episodes.

    Attributes:
        returns: Undiscounted return of every episode [episodes].
        lengths: Steps of every episode [episodes].
        successes: Whether the environment reported success at any step (`info["success"]` or `info["is_success"]`)
            [episodes]; None if it never says.
        latencies: Seconds of every `act` call that ran the network; the calls in between only take a queued action.
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


def check_spaces(spec: PolicySpec, env: gymnasium.Env[Any, Any]) -> None:
    """Check that an environment speaks the policy's language.

    Raises:
        SpaceError: keys, shapes or action bounds differ; the message names the first that does.
    """
    ours, theirs = spec.observation_space, env.observation_space
    if isinstance(ours, gymnasium.spaces.Dict):
        if not isinstance(theirs, gymnasium.spaces.Dict) or set(theirs.spaces) != set(ours.spaces):
            raise SpaceError(f"The environment's observation space is {theirs}; the policy expects {ours}.")
        for key in ours.spaces:
            _check_shape(f'observation "{key}"', ours[key].shape, theirs[key].shape)
    else:
        _check_shape("observation", ours.shape, theirs.shape if isinstance(theirs, gymnasium.spaces.Box) else theirs)
    action = env.action_space
    if not isinstance(action, gymnasium.spaces.Box):
        raise SpaceError(f"The environment's action space is {action}; the policy acts in {spec.action_space}.")
    _check_shape("action", spec.action_space.shape, action.shape)
    for side in ("low", "high"):
        mine, other = (np.ravel(getattr(space, side)).tolist() for space in (spec.action_space, action))
        if not np.allclose(mine, other):
            raise SpaceError(f"The environment's action bounds differ: {side} is {other}, the policy has {mine}.")


def _check_shape(name: str, expected: object, seen: object) -> None:
    if expected != seen:
        raise SpaceError(f"The environment's {name} has shape {seen}; the policy was trained with {expected}.")


def rollout(
    policy: ActingPolicy,
    env: gymnasium.Env[Any, Any],
    episodes: int,
    seed: int,
    *,
    record: bool = False,
    on_episode: Callable[[int], None] | None = None,
) -> RolloutResult:
    """Run whole episodes. Episode i resets environment and policy with seed + i, so the result is reproducible.

    Args:
        policy: A `MeamPolicy`, or anything with its `act`, `reset`, `spec` and `inferences`.
        env: One environment, not a vector environment; it must end its episodes by itself.
        episodes: Number of episodes, at least 1.
        seed: Seed of the first episode, at least 0.
        record: Keep the observations.
        on_episode: Called with the number of finished episodes after every one.

    Raises:
        SpaceError: the environment's spaces are not the policy's.
        ConfigError: episodes or seed is out of range.
    """
    if episodes < 1 or seed < 0:
        raise ConfigError(f"episodes is {episodes} and seed is {seed}; expected episodes >= 1 and seed >= 0.")
    check_spaces(policy.spec, env)
    returns, lengths, successes, latencies, paths = [], [], [], [], []
    for episode in range(episodes):
        policy.reset(seed=seed + episode)
        observation, _ = env.reset(seed=seed + episode)
        path, rewards, success, reported, done = [observation], [], False, False, False
        while not done:
            before, start = policy.inferences, time.perf_counter()
            action = policy.act(observation)
            if policy.inferences > before:
                latencies.append(time.perf_counter() - start)
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            rewards.append(float(reward))
            flag = info.get("success", info.get("is_success"))
            success, reported = success or bool(flag), reported or flag is not None
            if record:
                path.append(observation)
        returns.append(sum(rewards))
        lengths.append(len(rewards))
        successes.append(success if reported else None)
        if record:
            paths.append(_stack(policy.spec, path))
        if on_episode is not None:
            on_episode(episode + 1)
    return RolloutResult(
        returns=np.array(returns),
        lengths=np.array(lengths),
        successes=None if None in successes else np.array(successes, dtype=bool),
        latencies=np.array(latencies),
        observations=paths,
    )


def _stack(spec: PolicySpec, path: list[Any]) -> NDArray[np.float32]:
    return np.concatenate([flatten_observation(spec, observation)[0] for observation in path])

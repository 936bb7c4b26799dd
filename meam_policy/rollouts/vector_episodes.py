"""Runs a policy in a vector environment, with the same episodes as in a single environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.environments.vector_environment import named_workers
from meam_policy.errors import ConfigError
from meam_policy.rollouts.episode_log import ActingPolicy, EpisodeLog, timed_act

__all__ = ["vector_episodes"]

VectorEnv = gymnasium.vector.VectorEnv[Any, Any, Any]


def vector_episodes(
    policy: ActingPolicy, env: VectorEnv, episodes: int, seed: int, *, longest: int, keep: bool, latencies: list[float]
) -> Iterator[tuple[int, EpisodeLog]]:
    """Run whole episodes, several at a time.

    Episode i runs in slot i modulo `env.num_envs`, with seed + i for the environment and for the policy's noise. So
    which episodes count does not depend on how long they last; taking the first ones to finish would favour short
    ones. When a slot's episode ends, the slot is reset with the next seed, whatever the autoreset mode: a reset that
    the environment does by itself has no seed, and is undone. A slot whose episodes are all done goes on with ones
    that do not count.

    Args:
        policy: What acts, with one slot an environment.
        env: Vector environment whose `reset` takes a list of seeds and `options["reset_mask"]`, as Gymnasium's do.
        episodes: Number of episodes, at least 1.
        seed: Seed of the first one.
        longest: Steps after which an episode that goes on is cut off.
        keep: Keep observations and actions.
        latencies: Takes the seconds of every `act` that ran the network, for all slots together.

    Yields:
        Number and log of every episode, as they finish.

    Raises:
        ConfigError: the environment cannot reset some slots and leave the others alone.
        WorkerError: a process of an `AsyncVectorEnv` died.
    """
    _check_resets(env)
    with named_workers(env):
        number = np.arange(env.num_envs)
        seeds = [seed + int(i) for i in number]
        policy.reset(seed=seeds)
        observation, _ = env.reset(seed=seeds)  # pyright: ignore[reportArgumentType]
        logs = [EpisodeLog(_row(observation, slot) if keep else None) for slot in range(env.num_envs)]
        while True:
            actions = timed_act(policy, observation, latencies)
            observation, rewards, terminated, truncated, info = env.step(actions)
            ended = np.logical_or(terminated, truncated)
            for slot in np.flatnonzero(number < episodes).tolist():
                seen = _last_observation(observation, info, slot) if keep else None
                logs[slot].add(actions[slot], seen, rewards[slot], terminated[slot], _flag(info, slot))
                logs[slot].cut = len(logs[slot].rewards) >= longest and not ended[slot]
                ended[slot] |= logs[slot].cut
            for slot in np.flatnonzero(ended & (number < episodes)).tolist():
                yield int(number[slot]), logs[slot]
            number[ended] += env.num_envs
            if (number >= episodes).all():
                return
            if ended.any():
                observation = _begin(policy, env, observation, ended, [seed + int(i) for i in number])
            for slot in np.flatnonzero(ended).tolist():
                logs[slot] = EpisodeLog(_row(observation, slot) if keep else None)


def _check_resets(env: VectorEnv) -> None:
    mode = env.metadata.get("autoreset_mode")
    # There, Gymnasium's worker resets once more, without a seed, at the step after a reset.
    if getattr(mode, "value", mode) == "NextStep" and getattr(env.unwrapped, "shared_memory", True) is False:
        raise ConfigError(
            "The vector environment is an AsyncVectorEnv with shared_memory=False and autoreset mode NEXT_STEP, which "
            "loses seeded resets; expected shared_memory=True, or autoreset_mode=AutoresetMode.DISABLED."
        )


def _begin(policy: ActingPolicy, env: VectorEnv, observation: Any, mask: NDArray[np.bool_], seeds: list[int]) -> Any:
    """Start new episodes in some slots; returns the observation of all."""
    before = {slot: _row(observation, slot) for slot in np.flatnonzero(~mask).tolist()}
    options = {"reset_mask": mask.copy()}
    observation, _ = env.reset(seed=seeds, options=options)  # pyright: ignore[reportArgumentType]
    for slot, row in before.items():
        if not _equal(row, _row(observation, slot)):
            raise ConfigError(
                f"The vector environment has reset slot {slot}, whose episode was going on; expected it to reset the "
                'slots of options["reset_mask"] only. Use Gymnasium\'s SyncVectorEnv or AsyncVectorEnv (1.1 or newer).'
            )
    policy.reset(seed=seeds, mask=mask)
    return observation


def _row(observation: Any, slot: int) -> Any:
    """A copy of a slot's observation: the environment may write the next one into the same memory."""
    if isinstance(observation, Mapping):
        return {key: np.array(value[slot]) for key, value in observation.items()}
    return np.array(observation[slot])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)
    return np.array_equal(one, other, equal_nan=True)


def _last_observation(observation: Any, info: Mapping[str, Any], slot: int) -> Any:
    """What the slot's step led to; where its episode has ended and is reset already, `observation` has the next one."""
    return info["final_obs"][slot] if _has(info, "final_obs", slot) else _row(observation, slot)


def _flag(info: Mapping[str, Any], slot: int) -> Any:
    """Whether the slot reported success; None if it did not report."""
    if _has(info, "final_info", slot):
        info = info["final_info"]
    return next((info[name][slot] for name in ("success", "is_success") if _has(info, name, slot)), None)


def _has(info: Mapping[str, Any], name: str, slot: int) -> bool:
    """Whether the slot's info has a key: `info["_KEY"]` marks it, in Gymnasium's convention."""
    return name in info and (f"_{name}" not in info or bool(info[f"_{name}"][slot]))

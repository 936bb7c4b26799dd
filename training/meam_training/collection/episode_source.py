"""Sources of a data set's episodes: scripted demonstrators and policies."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from meam_policy.errors import ConfigError
from meam_training.collection.demonstrators import (
    MANIPULATION_FAMILIES,
    Episode,
    ManipulationDemonstrator,
    PocketsDemonstrator,
    PointmazeDemonstrator,
    PolicyDemonstrator,
)
from meam_training.collection.demonstrators.episode import record_steps

__all__ = ["EpisodeSource", "episode_source"]


@dataclass(frozen=True)
class EpisodeSource:
    """Records the episodes of a data set, one after another.

    Attributes:
        name: Name of the demonstrator or policy.
        record: Records the episode with the given number, counted from 0.
        generators: Random generators whose state carries over between episodes; empty if each episode has its own.
        policy: Identity of the policy; None for a scripted demonstrator.
        close: Closes the environments opened for recording.
    """

    name: str
    record: Callable[[int], Episode]
    generators: tuple[np.random.Generator, ...] = ()
    policy: str | None = None
    close: Callable[[], None] = lambda: None


def episode_source(
    environment_id: str,
    env: gymnasium.Env[Any, Any],
    seed: int,
    policy: str | os.PathLike[str] | None,
    mode_shares: Mapping[str, float] | None,
) -> EpisodeSource:
    """Make the source of an environment's episodes: its scripted demonstrator, or a policy.

    Args:
        environment_id: See `collect`.
        env: The environment; the caller closes it.
        seed: Seed of all randomness, at least 0.
        policy: Policy folder, or Hub repo id; None takes the scripted demonstrator.
        mode_shares: Probability with which the Pockets demonstrator aims at each pocket.

    Raises:
        ConfigError: there is no demonstrator for the environment, or `mode_shares` does not fit it.
        NotFoundError: there is no such policy.
        SpaceError: the environment's spaces differ from the policy's.
        MissingExtraError: the simulator or onnxruntime is not installed.
    """
    if mode_shares is not None and (policy is not None or environment_id != "meam/Pockets-v0"):
        what = environment_id if policy is None else "a policy"
        raise ConfigError(f"mode_shares is a setting of meam/Pockets-v0's demonstrator, not of {what}. Leave it out.")
    if policy is not None:
        trained = PolicyDemonstrator(policy, env, seed=seed)
        return EpisodeSource(f"policy {trained.identity}", trained.record_episode, policy=trained.identity)
    if environment_id == "meam/Pockets-v0":
        return _pockets(env, seed, mode_shares)
    if environment_id.startswith("pointmaze"):
        pointmaze = PointmazeDemonstrator(environment_id, seed=seed)
        return EpisodeSource("scripted demonstrator", lambda _: pointmaze.record_episode(), (pointmaze.generator,))
    if environment_id.startswith(MANIPULATION_FAMILIES):
        manipulation = ManipulationDemonstrator(environment_id, seed=seed)
        name = f"OGBench's scripted oracles ({manipulation.kind})"
        return EpisodeSource(name, manipulation.record_episode, close=manipulation.close)
    raise ConfigError(
        f"There is no demonstrator for {environment_id}. Known: meam/Pockets-v0, and OGBench's pointmaze, "
        f"{', '.join(MANIPULATION_FAMILIES)} tasks. Or give a policy."
    )


def _pockets(env: gymnasium.Env[Any, Any], seed: int, mode_shares: Mapping[str, float] | None) -> EpisodeSource:
    demonstrator = PocketsDemonstrator(mode_shares, seed=seed)
    reset_seeds = np.random.default_rng([seed, 1])

    def record(_: int) -> Episode:
        # From the upper half of the seeds, never those of an evaluation, which counts up from its own seed.
        reset_seed = int(reset_seeds.integers(2**31, 2**32))
        demonstrator.reset()
        return record_steps(env, demonstrator.act, reset_seed)

    return EpisodeSource("scripted demonstrator", record, (demonstrator.generator, reset_seeds))

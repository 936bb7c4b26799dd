"""A demonstrator that acts with a trained policy."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import gymnasium

from meam_policy.environments.space_check import check_spaces
from meam_policy.policy import MeamPolicy
from meam_training.collection.demonstrators.episode import Episode, episode_generator, record_steps

__all__ = ["PolicyDemonstrator"]


class PolicyDemonstrator:
    """Runs a policy with sampled noise; each episode has its own seeds for the environment and the policy.

    Args:
        path_or_repo_id: Policy folder, or Hub repo id; see `MeamPolicy.from_pretrained`.
        env: Environment that ends its episodes by itself; the caller closes it.
        seed: Seed of initial states and noise.

    Attributes:
        identity: SHA-256 of the policy's specification, which includes the graph's hash, in hexadecimal.

    Raises:
        NotFoundError: there is no such policy.
        FormatError: its files do not conform to the format.
        SpaceError: the environment's spaces differ from the policy's.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path_or_repo_id: str | os.PathLike[str], env: gymnasium.Env[Any, Any], seed: int = 0) -> None:
        self._policy, self._env, self._seed = MeamPolicy.from_pretrained(path_or_repo_id), env, seed
        check_spaces(self._policy.spec, env)
        self.identity = hashlib.sha256(self._policy.spec.to_json().encode()).hexdigest()

    def record_episode(self, episode: int) -> Episode:
        """Run one episode.

        Args:
            episode: Number of the episode; the same number gives the same data.
        """
        generator = episode_generator(self._seed, episode)
        # From the upper half of the seeds, never those of an evaluation, which counts up from its own seed.
        reset_seed, noise_seed = (int(seed) for seed in generator.integers(2**31, 2**32, size=2))
        self._policy.reset(seed=noise_seed)
        return record_steps(self._env, self._policy.act, reset_seed)

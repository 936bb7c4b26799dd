"""A demonstrator that is a trained policy."""

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
    """Runs a policy with sampled noise; every episode seeds environment and policy on its own.

    Args:
        path_or_repo_id: Policy folder, or Hub repo id; see `MeamPolicy.from_pretrained`.
        env: Environment that ends its episodes by itself. It stays the caller's to close.
        seed: Seed of starts and noise.

    Attributes:
        identity: SHA-256 of what the policy is, its graph's hash included, in hexadecimal.

    Raises:
        NotFoundError: there is no such policy.
        FormatError: its files are not what the format says.
        SpaceError: the environment's spaces are not the policy's.
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
        # The upper half of the seeds: never the starts of an evaluation, which counts up from its own seed.
        start, noise = (int(seed) for seed in generator.integers(2**31, 2**32, size=2))
        self._policy.reset(seed=noise)
        return record_steps(self._env, self._policy.act, start)

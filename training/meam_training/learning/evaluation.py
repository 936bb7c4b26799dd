"""Evaluations while training: the policy's return in its environment, or without one what the data can tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import torch
from torch import Tensor

from meam_policy.environments.space_check import check_spaces
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch
from meam_training.algorithm.critic_loss import td_target
from meam_training.config import TrainConfig
from meam_training.learning.chunk_source import ChunkSource
from meam_training.learning.network_session import NetworkSession
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["EVALUATION_METRICS", "DataEvaluator", "EnvironmentEvaluator", "Evaluation", "Evaluator"]

EVALUATION_METRICS = (
    "return_mean",
    "return_std",
    "success",
    "length_mean",
    "length_std",
    "td_error",
    "action_difference",
    "value_data",
    "value_policy",
)
"""Names of everything that `Evaluation.metrics` may hold."""

SEED = 1_000_000
"""Of the first episode; far from the seeds of `meam eval`, so that choosing the best checkpoint flatters none of its
figures."""

_ROWS = 1024


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: Its numbers.
        score: What decides the best checkpoint: the mean return; None without an environment, since none of the other
            numbers ranks policies.
    """

    metrics: dict[str, float]
    score: float | None


class Evaluator(Protocol):
    """Evaluates networks, always in the same way, and leaves the training's randomness alone."""

    def __call__(self, networks: MeamNetworks, stop: Callable[[], object]) -> Evaluation | None:
        """Evaluate; None if `stop()` became true meanwhile."""
        ...


class EnvironmentEvaluator:
    """Runs the policy in an environment, acting as it will be exported.

    - return_mean, return_std: mean and standard deviation of the return over the episodes; of a single one 0.
    - length_mean, length_std: likewise, of the number of steps.
    - success: share of the episodes with success, if the environment reports it.

    The deviations are those of the episodes run (divided by their number), not of the means.

    Args:
        env: The environment.
        spec: What the policy is.
        episodes: Episodes of an evaluation; every time the same ones.

    Raises:
        SpaceError: the environment's spaces are not the policy's.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], spec: PolicySpec, episodes: int) -> None:
        check_spaces(spec, env)
        self._env, self._spec, self._episodes = env, spec, episodes

    def __call__(self, networks: MeamNetworks, stop: Callable[[], object]) -> Evaluation | None:
        """Evaluate; None if `stop()` was true after an episode."""

        def check(finished: int) -> None:
            if stop():
                raise _Stopped

        policy = MeamPolicy(self._spec, NetworkSession(networks, self._spec))
        try:
            result = rollout(policy, self._env, self._episodes, SEED, on_episode=check)
        except _Stopped:
            return None
        metrics = {
            "return_mean": result.return_mean,
            "return_std": float(result.returns.std()),
            "length_mean": float(result.lengths.mean()),
            "length_std": float(result.lengths.std()),
        }
        if result.success_rate is not None:
            metrics["success"] = result.success_rate
        return Evaluation(metrics, result.return_mean if math.isfinite(result.return_mean) else None)


class DataEvaluator:
    """Compares policy and critics with a fixed sample of the data, of which the rows within one episode count.

    - td_error: root mean square of r + gamma^h Q(s', a') - Q(s, a), by the averaged critics, a' as the policy acts,
      pessimistic as in training.
    - action_difference: root mean square difference of the policy's chunks and the data's, normalised action units.
    - value_data, value_policy: mean Q at the data's and at the policy's chunks.

    Values need critics or a known value, the TD error critics: a `bc` run has the difference alone.

    Args:
        chunks: Where the sample is drawn from.
        config: Settings of the run.
        device: Where the chunks are.

    References:
        Seno & Imai, d3rlpy, JMLR 2022 (its environment-free metrics).
    """

    def __init__(self, chunks: ChunkSource, config: TrainConfig, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(SEED)
        self._config = config
        self._batch: ChunkBatch = chunks.sample(min(_ROWS, len(chunks)), generator)
        size = (len(self._batch.actions), config.best_of * self._batch.actions.shape[1])
        self._noise, self._next_noise = torch.randn((2, *size), generator=generator, device=device)

    @torch.no_grad()
    def __call__(self, networks: MeamNetworks, stop: Callable[[], object]) -> Evaluation:
        """Evaluate; this is too short to be stopped."""
        n, batch = networks, self._batch
        features = n.encoder(batch.observations)
        actions = n.act(features, self._noise)
        found = {"action_difference": self._mean((actions - batch.actions).square().mean(dim=1)).sqrt()}
        if n.policy is not None:
            at_data = n.values(features, batch.actions).mean(dim=0)
            found["value_data"] = self._mean(at_data)
            found["value_policy"] = self._mean(n.values(features, actions).mean(dim=0))
            if n.known_value is None:
                target = td_target(n, batch, self._config, self._next_noise)
                found["td_error"] = self._mean((target - at_data).square()).sqrt()
        return Evaluation({name: value.item() for name, value in found.items()}, score=None)

    def _mean(self, rows: Tensor) -> Tensor:
        valid = self._batch.valid
        return (rows * valid).sum() / valid.sum().clamp(min=1)


class _Stopped(Exception):
    """An evaluation was given up."""

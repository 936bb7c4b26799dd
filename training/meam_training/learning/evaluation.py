"""Evaluation during training: the policy's return in its environment or, without one, metrics on the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import torch
from torch import Tensor

from meam_policy.environments.make import named_failures
from meam_policy.environments.space_check import check_spaces
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout
from meam_policy.spec import EnvironmentSpec, PolicySpec
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
"""Names of all metrics that `Evaluation.metrics` may hold."""

SEED = 1_000_000
"""Seed of the first episode; far from the seeds of `meam eval`, so that selecting the best checkpoint does not bias its
results."""

_ROWS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        metrics: Metrics by name.
        score: Mean return, which selects the best checkpoint; None without an environment, since none of the other
            metrics ranks policies.
    """

    metrics: dict[str, float]
    score: float | None


class Evaluator(Protocol):
    """Evaluates networks, each time with the same episodes or data, without touching training's random generators."""

    def __call__(self, networks: MeamNetworks, stop: Callable[[], object]) -> Evaluation | None:
        """Evaluate the networks. Returns None if `stop()` became true in the meantime."""
        ...


class EnvironmentEvaluator:
    """Evaluates the policy in an environment, where it samples, as it will when exported without another acting rule.

    - return_mean, return_std: mean and standard deviation of the return over the episodes; the latter is 0 for a single
      episode.
    - length_mean, length_std: the same for the number of environment steps.
    - success: share of successful episodes, if the environment reports success.

    The standard deviations are those of the episodes (normalised by their number), not standard errors of the means.

    Args:
        env: The environment.
        spec: Specification of the policy.
        episodes: Episodes per evaluation, the same ones each time.
        environment: How it was made, to be named where it fails; None if it was made by hand.

    Raises:
        SpaceError: the environment's spaces are not the policy's.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        spec: PolicySpec,
        episodes: int,
        environment: EnvironmentSpec | None = None,
    ) -> None:
        check_spaces(spec, env)
        self._environment = environment
        self._env, self._spec, self._episodes = env, spec, episodes

    def __call__(self, networks: MeamNetworks, stop: Callable[[], object]) -> Evaluation | None:
        """Evaluate the networks. Returns None if `stop()` was true after an episode."""

        def check(finished: int) -> None:
            if stop():
                raise _Stopped

        policy = MeamPolicy(self._spec, NetworkSession(networks, self._spec))
        try:
            with named_failures(self._environment):
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
    """Compares policy and critics with a fixed sample of the data; only actions and values that are learned from count.

    - td_error: root mean square of y - Q'(s, a), with target critics Q' and the pessimistic TD target y of training.
    - action_difference: root mean square difference of the policy's chunks and the data's, normalised action units.
    - value_data, value_policy: mean Q' at the data's and at the policy's chunks.

    The values need critics or a known value, and the TD error needs critics; a `bc` run has only `action_difference`.

    Args:
        chunks: Source of the sample.
        config: Settings of the run.
        device: Device of the chunks.

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
        """Evaluate the networks; this is quick, so `stop` is ignored."""
        n, batch = networks, self._batch
        features = n.encoder(batch.observations)
        actions = n.act(features, self._noise)
        found = {"action_difference": _mean((actions - batch.actions).square(), batch.within).sqrt()}
        if n.policy is not None:
            at_data = n.values(features, batch.actions).mean(dim=0)
            found["value_data"] = _mean(at_data, batch.valid)
            found["value_policy"] = _mean(n.values(features, actions).mean(dim=0), batch.valid)
            if n.known_value is None:
                target = td_target(n, batch, self._config, self._next_noise)
                found["td_error"] = _mean((target - at_data).square(), batch.valid).sqrt()
        return Evaluation({name: value.item() for name, value in found.items()}, score=None)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1)


class _Stopped(BaseException):
    """The evaluation was stopped before its end."""

"""A ladder of variants: what fewer solver steps and lower precision cost in accuracy, and what they save in time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from meam_export.graph.parity import Rows, draw_noise, random_observations
from meam_export.variants.build import BuiltVariant
from meam_policy.environments.make import named_failures
from meam_policy.errors import ConfigError
from meam_policy.inference.session import PolicySession
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult
from meam_policy.spec import EnvironmentSpec, Integration, PolicySpec
from meam_policy.typed import typed, typed_fields
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.policy_module import PolicyModule

__all__ = ["FIGURES", "LadderTask", "measure_ladder", "sliced_wasserstein"]

FIGURES = {
    "action_error": "root mean square difference from policy.onnx, same noise, share of the half width",
    "ode_error": "the same from the exact solution of the ODE (rk4, 200 evaluations)",
    "sliced_w1": "sliced Wasserstein-1 distance between its chunks and those of the policy as trained, in half widths, "
    "averaged over observations",
    "parity_error": "root mean square difference of the graph from PyTorch in float64, share of the half width",
    "return_mean": "mean return of the evaluation episodes",
    "return_low": "lower end of its 95 % confidence interval",
    "return_high": "upper end of it",
    "success": "share of successful episodes",
    "latency_p50_ms": "median milliseconds of one inference on the exporting machine, batch 1, one CPU thread",
    "latency_p99_ms": "99th percentile of it",
}
"""What the names in `VariantSpec.measured` mean."""

_INPUTS, _OBSERVATIONS, _DRAWS, _DIRECTIONS = 512, 64, 64, 32
_FINE_NFE = 200
_ROUNDS, _RUNS = 20, 20


@dataclass(frozen=True)
class LadderTask:
    """The environment in which returns are measured.

    Attributes:
        env: The environment.
        episodes: Episodes per variant, and per acting rule.
        seed: Seed of a variant's first episode; acting rules are compared from `acting.ACTING_SEED` on.
        environment: How it was made, to be named where it fails; None if it was made by hand.
    """

    env: gymnasium.Env[Any, Any]
    episodes: int
    seed: int
    environment: EnvironmentSpec | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field is of another type, or out of range.
        """
        typed_fields(self)
        if self.episodes < 1 or self.seed < 0:
            raise ConfigError(
                f"episodes is {self.episodes} and seed is {self.seed}; expected episodes >= 1 and seed >= 0."
            )

    @typed()
    def run(self, policy: MeamPolicy, seed: int) -> RolloutResult:
        """Run the episodes of a policy, from a seed on.

        Raises:
            ConfigError: an environment with arguments of its own failed while it ran.
        """
        with named_failures(self.environment):
            return rollout(policy, self.env, self.episodes, seed)


def measure_ladder(
    variants: Sequence[BuiltVariant],
    networks: MeamNetworks,
    policy: PolicySpec,
    observations: Rows | None,
    task: LadderTask | None = None,
) -> dict[str, dict[str, float]]:
    """Measure every variant; see `FIGURES` for what is measured.

    A variant with another `best_of` than the policy acts differently on purpose, so no errors are measured for it.

    Args:
        variants: The variants.
        networks: Trained networks.
        policy: The policy itself.
        observations: Raw observations [n, obs] from the data or the policy; None takes random ones.
        task: Where returns are measured; None measures none.

    Returns:
        For every variant by name, its figures by the names in `FIGURES`.
    """
    rows = random_observations(policy, _INPUTS, seed=3) if observations is None else observations[-_INPUTS:]
    scale = np.array(policy.action_scale)
    noise = draw_noise(policy, len(rows), seed=3)
    trained = PolicyModule(networks, policy)
    fine_integration = Integration(_FINE_NFE, "rk4", best_of=policy.integration.best_of)
    fine = PolicyModule(networks, replace(policy, integration=fine_integration))
    as_trained, exact = (_in_torch(module, rows, noise) for module in (trained, fine))
    few = np.repeat(rows[:_OBSERVATIONS], _DRAWS, axis=0)
    draws = draw_noise(policy, len(few), seed=4)
    cloud = _in_torch(trained, few, draws) / scale
    sessions = {v.name: PolicySession(v.graph, v.policy_spec, name=v.spec.file) for v in variants}
    latencies = _latencies(sessions, {v.name: v.policy_spec for v in variants}, rows[:1])
    measured: dict[str, dict[str, float]] = {}
    for variant in variants:
        session = sessions[variant.name]
        figures = {"parity_error": variant.parity.rms_error}
        if variant.spec.integration.best_of == policy.integration.best_of:
            found = session.run(rows, noise)
            figures["action_error"] = _rms((found - as_trained) / scale)
            figures["ode_error"] = _rms((found - exact) / scale)
            figures["sliced_w1"] = _mean_distance(session.run(few, draws) / scale, cloud)
        figures |= latencies[variant.name]
        if task is not None:
            acting = MeamPolicy(variant.policy_spec, session)
            result = task.run(acting, task.seed)
            low, high = result.return_interval
            figures |= {"return_mean": result.return_mean, "return_low": low, "return_high": high}
            if result.success_rate is not None:
                figures["success"] = result.success_rate
        measured[variant.name] = figures
    return measured


def sliced_wasserstein(one: NDArray[Any], other: NDArray[Any], directions: NDArray[Any]) -> float:
    """Mean over directions of the Wasserstein-1 distance between two projected samples of equal size.

    Args:
        one: Sample [n, dim].
        other: Sample [n, dim].
        directions: Unit vectors [k, dim].

    References:
        Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015.
    """
    sorted_ = [np.sort(sample @ directions.T, axis=0) for sample in (one, other)]
    return float(np.abs(sorted_[0] - sorted_[1]).mean())


def _mean_distance(chunks: NDArray[Any], others: NDArray[Any]) -> float:
    """Mean sliced Wasserstein-1 distance between the samples at each observation.

    Moving every number by 1 gives a distance of 1 in one dimension and about 0.8 in many.
    """
    flat, flat_others = (array.reshape(-1, _DRAWS, int(np.prod(array.shape[1:]))) for array in (chunks, others))
    directions = np.random.default_rng(0).standard_normal((_DIRECTIONS, flat.shape[-1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean([sliced_wasserstein(a, b, directions) for a, b in zip(flat, flat_others, strict=True)]))


def _latencies(
    sessions: Mapping[str, PolicySession], specs: Mapping[str, PolicySpec], row: Rows
) -> dict[str, dict[str, float]]:
    """Latencies of one inference, measured in turns, so that a busy moment affects all variants alike."""
    noise = {name: draw_noise(specs[name], 1, seed=5) for name in sessions}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_ROUNDS):
        for name, session in sessions.items():
            session.run(row, noise[name])  # brings its weights into the cache
            for _ in range(_RUNS):
                start = time.perf_counter()
                session.run(row, noise[name])
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {f"latency_p{p}_ms": float(np.percentile(times, p) * 1e3) for p in (50, 99)}
        for name, times in seconds.items()
    }


@torch.no_grad()
def _in_torch(module: PolicyModule, observations: Rows, noise: Rows) -> NDArray[np.float32]:
    return module(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()


def _rms(error: NDArray[Any]) -> float:
    return float(np.sqrt(np.square(error).mean()))

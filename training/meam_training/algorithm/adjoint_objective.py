"""Adjoint matching: the policy's objective along its own memoryless SDE, and the terminal condition.

A path X_0 ... X_1 is sampled from the policy's memoryless SDE, and the lean adjoint a is integrated backwards along it,
using only the drift of the target prior. The loss, a mean over rows and a sum over steps and components, is

    |2 (v(X_t, t) - v_prior(X_t, t)) / sigma_t + sigma_t a_t|^2,

which is minimal where the policy's velocity differs from the prior's by -sigma_t^2 a_t / 2. With `sde="ancestral"`,
exact conditional steps replace the Euler steps; see `meam_training.flow.ancestral`. The terminal condition is

    a(1) = -tau grad Q(s, X_1) + lambda score_prior(s, X_1).

References:
    Domingo-Enrich et al., Adjoint Matching, arXiv:2409.08861. Li & Levine, arXiv:2601.14234 (its use for Q).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.config import TrainConfig
from meam_training.flow.ancestral import (
    ancestral_adjoint,
    ancestral_cost,
    ancestral_matching_loss,
    denoised_difference,
    geometric_kl,
    sample_ancestral_path,
)
from meam_training.flow.input_gradient import input_gradient
from meam_training.flow.memoryless import (
    adjoint_matching_loss,
    lean_adjoint,
    memoryless_cost,
    memoryless_kl,
    sample_memoryless_path,
)
from meam_training.flow.path import score_from_velocity, time_like
from meam_training.flow.velocity import RecordedVelocity
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.trust_region import Tilt

__all__ = [
    "ADJOINT_METRICS",
    "adjoint_loss",
    "prior_score",
    "terminal_adjoint",
    "terminal_parts",
    "tilted",
    "value_gradient",
]

ADJOINT_METRICS = ("adjoint_max", "outside_box")
"""Names of the logged metrics: the largest component of the adjoint at the path's last step, and the share of
components of X_1 outside the box."""


def adjoint_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Adjoint matching along the policy's own memoryless SDE, relative to the target prior.

    Args:
        n: All networks; the policy is trained.
        features: Encoded observations of the batch.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The loss, and the metrics `ADJOINT_METRICS`; with a KL budget also `BUDGET_METRICS`.
    """
    assert n.policy is not None
    prior, policy = n.tilted_prior.condition(features), RecordedVelocity(n.policy.condition(features))
    reference, tilt = config.sde == "reference", n.tilt(config)
    if reference:
        path = sample_memoryless_path(policy, prior, noise.sde_x_0, noise.sde)
        steps = len(path) - 1
        policy(path[-2], time_like(path[-2], (steps - 1) / steps))  # the path's last step evaluated only the prior
    else:
        path = sample_ancestral_path(policy, noise.sde_x_0, noise.sde, config.confine)
        steps = len(path) - 1
    terminal = terminal_parts(n, features, path[-1], config)
    if n.trust_region is None:
        terminal = tilted(terminal, tilt)
    if reference:
        adjoints = lean_adjoint(prior, path, terminal)
        with torch.no_grad():
            times = torch.stack([time_like(path[0], k / steps) for k in range(steps)])
            prior_velocity = prior(path[:-1], times)
    else:
        adjoints, prior_velocity = ancestral_adjoint(prior, path, terminal, config.confine)
    metrics = {"outside_box": (path[-1].abs() > 1).float().mean()}
    velocity = torch.stack(policy.velocities)
    if n.trust_region is not None:
        metrics |= _budget_metrics(path, velocity.detach(), prior_velocity, adjoints[:, 0], config)
        adjoints = tilted(adjoints, tilt)
    metrics["adjoint_max"] = adjoints[-1].abs().max()
    loss = (adjoint_matching_loss if reference else ancestral_matching_loss)(velocity, prior_velocity, adjoints)
    if n.trust_region is not None and config.kl_dual == "reference":
        loss = n.trust_region.mu * loss  # as published; it matters where gradients are clipped by their joint norm
    return loss, metrics


def _budget_metrics(
    path: Float[Tensor, "states batch act"],
    policy_velocity: Float[Tensor, "states-1 batch act"],
    prior_velocity: Float[Tensor, "states-1 batch act"],
    adjoints: Float[Tensor, "states-1 batch act"],
    config: TrainConfig,
) -> dict[str, Tensor]:
    """What a KL budget needs to know, per action of a chunk: the policy's KL divergence and the unit cost.

    And `last_step_drift`, |v_policy - v_prior|^2 at the last step, whose KL divergence would be infinite, as it has no
    noise: the squared distance in standard deviations of the noise that is left at its start.
    """
    if config.sde == "reference":
        kl, cost = memoryless_kl(policy_velocity, prior_velocity).sum(dim=0), memoryless_cost(adjoints)
    else:
        kl = geometric_kl(denoised_difference(path, policy_velocity, prior_velocity, config.confine))
        cost = ancestral_cost(adjoints)
    drift = (policy_velocity[-1] - prior_velocity[-1]).square().sum(dim=-1)
    found = {"path_kl": kl, "unit_cost": cost.sum(dim=0), "last_step_drift": drift}
    return {name: value.mean() / config.chunk_size for name, value in found.items()}


def terminal_adjoint(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    x_1: Float[Tensor, "batch act"],
    config: TrainConfig,
) -> Float[Tensor, "batch act"]:
    """Terminal adjoint a(1) = -tau grad Q(s, x_1) + lambda score_prior(s, x_1), without terms that push out of the box.

    See `terminal_parts` for how both are evaluated.
    """
    return tilted(terminal_parts(n, features, x_1, config), n.tilt(config))


def terminal_parts(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    x_1: Float[Tensor, "batch act"],
    config: TrainConfig,
) -> Float[Tensor, "parts batch act"]:
    """Parts of the terminal adjoint, which `tilted` weights: -grad Q(s, x_1) and, with entropy, score_prior(s, x_1).

    Q is the mean of the target critics at the clipped action, so its gradient vanishes outside the box. The score is
    evaluated at the clipped action too; each component is bounded by `score_limit`, and is zero where it would drive
    x_1 further out: away from the data a learned score extrapolates, and training diverges without these limits.
    """
    gradient = value_gradient(n, features, x_1)
    if not config.entropy_coef:
        return -gradient[None]
    score = prior_score(n, features, x_1, config)
    outward = (x_1.abs() >= 1) & (score * x_1 < 0)
    return torch.stack([-gradient, score.masked_fill(outward, 0.0)])


def tilted(parts: Float[Tensor, "*steps parts batch act"], tilt: Tilt) -> Float[Tensor, "*steps batch act"]:
    """Sum of the parts of an adjoint, that of Q times tau and that of the score times lambda."""
    total = tilt.inverse_temperature * parts[..., 0, :, :]
    return total + tilt.entropy_coef * parts[..., 1, :, :] if parts.shape[-3] > 1 else total


def value_gradient(
    n: MeamNetworks, features: Float[Tensor, "batch features"], x_1: Float[Tensor, "batch act"]
) -> Float[Tensor, "batch act"]:
    """Gradient of Q, the mean of the target critics at the clipped action; zero in components outside the box."""
    features = features.detach()
    return input_gradient(lambda x: n.values(features, x.clamp(-1, 1)).mean(dim=0), x_1)


def prior_score(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    x_1: Float[Tensor, "batch act"],
    config: TrainConfig,
) -> Float[Tensor, "batch act"]:
    """Score of the target prior at t = 1 - score_eps and the clipped action; components bounded by `score_limit`."""
    t, inside = 1 - config.score_eps, x_1.clamp(-1, 1)
    with torch.no_grad():
        velocity = n.tilted_prior.condition(features)(inside, time_like(inside, t))
    return score_from_velocity(inside, velocity, t).clamp(-config.score_limit, config.score_limit)

"""Regression on the score of the policy's target density, at the policy's own samples.

With x_1 a sample of the target policy, x_0 standard normal, t uniform and x_t = (1 - t) x_0 + t x_1, the loss is the
mean over rows, draws of (x_0, t) and components of

    |v(s, x_t, t) - (x_1 - x_0 + (1 - t) score + t x_0)|^2,
    score = (1 - lambda) score_prior(s, x_1) + tau grad Q(s, x_1),

which is the score of the target density, apart from the terms that keep x_1 in the box; see
`meam_training.algorithm.sample_matching`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.adjoint_objective import prior_score, terminal_parts, tilted
from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.algorithm.sample_matching import gradient_cost, interpolant_kl, target_score_velocity
from meam_training.config import TrainConfig
from meam_training.flow.path import interpolate
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["TARGET_SCORE_METRICS", "target_score_loss"]

TARGET_SCORE_METRICS = ("adjoint_max",)
"""Names of the logged metrics: the largest component of the terminal adjoint at the samples."""


def target_score_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Regression on the score of the target density at the policy's own samples.

    Args:
        n: All networks; the policy is trained, on samples of its own.
        features: Encoded observations of the batch.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The loss, and the metrics `TARGET_SCORE_METRICS`; with a KL budget also the first two of `BUDGET_METRICS`.
    """
    assert n.policy is not None
    x_1 = samples.candidates[0]
    parts = terminal_parts(n, features, x_1, config)
    adjoint = tilted(parts, n.tilt(config))
    score = prior_score(n, features, x_1, config) - adjoint
    x_0, t = noise.match_x_0[:, 0], noise.match_t[:, 0]
    x_1, score = x_1.expand_as(x_0), score.expand_as(x_0)
    target = target_score_velocity(x_0, x_1, t, score)
    x_t = interpolate(x_0, x_1, t)
    velocity = n.policy.condition(features)(x_t, t)
    metrics = {"adjoint_max": adjoint.abs().max()}
    if n.trust_region is not None:
        with torch.no_grad():
            of_prior = n.tilted_prior.condition(features)(x_t, t)
            kl = interpolant_kl(velocity.detach(), of_prior, t, 1 - 1 / config.nfe)
        metrics["path_kl"] = kl.mean() / config.chunk_size
        metrics["unit_cost"] = gradient_cost(parts[0]).mean() / config.chunk_size
    return (velocity - target).square().mean(), metrics

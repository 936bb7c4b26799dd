"""Adjoint matching on bridges at all flow times: no SDE, no backward sweep.

With x_1 from the target policy's ODE, K points x_t of its bridge to fresh noise, t = 1/K, 2/K … 1, and the terminal
adjoint a(1) of adjoint matching at x_1, the loss is that of adjoint matching, with the adjoint a_t either carried back
by the Jacobian of the prior's denoised action (`bridge_adjoint="denoiser"`), or scaled, t a(1) ("scalar"). Across the
decision between modes both are biased, the scalar form also within narrow modes.

References:
    Dong et al., Q-Learning with Scalar Adjoint Matching, arXiv:2610.10437 (the scalar form, and the grid).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.adjoint_objective import terminal_parts, tilted
from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.config import TrainConfig
from meam_training.flow.bridge import bridge_adjoint
from meam_training.flow.memoryless import adjoint_matching_loss, memoryless_cost, memoryless_kl
from meam_training.flow.path import interpolate, time_like
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["BRIDGE_METRICS", "bridge_loss"]

BRIDGE_METRICS = ("adjoint_max",)
"""Names of the logged metrics: the largest component of the terminal adjoint at the samples."""


def bridge_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Adjoint matching on bridges from the policy's own samples, relative to the target prior.

    Args:
        n: All networks; the policy is trained, on samples of its own.
        features: Encoded observations of the batch.
        samples: Samples of the policy.
        noise: The update's randomness; `bridge_x_0` sets the number of points.
        config: Settings.

    Returns:
        The loss, and the metrics `BRIDGE_METRICS`; with a KL budget also the first two of `BUDGET_METRICS`.
    """
    assert n.policy is not None
    x_1 = samples.acted_x_1[0]
    terminal = terminal_parts(n, features, x_1, config)
    x_0 = noise.bridge_x_0
    t = torch.stack([time_like(x_1, (k + 1) / len(x_0)) for k in range(len(x_0))])
    x_t = interpolate(x_0, x_1.expand_as(x_0), t)
    prior, tilt = n.tilted_prior.condition(features), n.tilt(config)
    parts = terminal[:, None].expand(-1, *x_0.shape)
    if config.bridge_adjoint == "denoiser":
        parts, prior_velocity = bridge_adjoint(prior, x_t, t, parts, config.confine)
    else:
        with torch.no_grad():
            parts, prior_velocity = t * parts, prior(x_t, t)
    adjoints = tilted(parts.transpose(0, 1), tilt)
    velocity = n.policy.condition(features)(x_t, t)
    metrics = {"adjoint_max": adjoints[-1].abs().max()}
    if n.trust_region is not None:
        kl, cost = memoryless_kl(velocity.detach(), prior_velocity), memoryless_cost(parts[0])
        metrics["path_kl"] = kl.sum(dim=0).mean() / config.chunk_size
        metrics["unit_cost"] = cost.sum(dim=0).mean() / config.chunk_size
    return adjoint_matching_loss(velocity, prior_velocity, adjoints), metrics

"""Weigh early in flow time, where modes are decided; adjoint late, within a mode. Simulation-free.

Flow time is split at `switch_time`, t_c. The loss is a mean over components and

    t_c mean of n w |v(s, x_t, t) - T_early|^2 over observations, their candidates and t in (0, t_c)
    + (1 - t_c) mean of |v(s, x_t, t) - T_late|^2 over observations, the policy's own samples and t in (t_c, 1).

Early, n candidates x_1 per observation carry the weights w of the reweighted objective, and the target is not one
candidate's velocity but the mean over all of them, given x_t. Late, the target is the prior's velocity plus the
gradient of Q at the sample, carried to x_t by the Jacobian of the prior's denoised action, without noise where the
prior is Gaussian within a mode; see `meam_training.flow.bridge`. Gradients do not know the weights of separated modes,
and densities say little about shifts within a mode: hence both.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.adjoint_objective import value_gradient
from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.candidates import budget_metrics, draw_candidates
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.algorithm.sample_matching import denoised_among, importance_weights
from meam_training.config import TrainConfig
from meam_training.flow.bridge import tilted_velocity
from meam_training.flow.path import interpolate
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["TWO_SCALE_METRICS", "two_scale_loss"]

TWO_SCALE_METRICS = ("effective_samples", "early_loss", "late_loss")
"""Names of the logged metrics: the effective sample size 1 / sum w^2 as a share of the candidates, and the two parts of
the loss."""


def two_scale_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Weighted flow matching before `switch_time`, adjoint matching on bridges after it.

    Args:
        n: All networks; the policy is trained, on samples of its own.
        features: Encoded observations of the batch; the early part uses the first ones, the late part all.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The loss, and the metrics `TWO_SCALE_METRICS`; with a KL budget also the first two of `BUDGET_METRICS`.

    References:
        Xu et al., Stable Target Field for Reduced Variance Score Estimation, arXiv:2302.00670 (means over candidates).
    """
    early, metrics = _early_loss(n, features[: noise.sample_x_0.shape[1]], samples, noise, config)
    late = _late_loss(n, features, samples, noise, config)
    loss = config.switch_time * early + (1 - config.switch_time) * late
    return loss, {"early_loss": early.detach(), "late_loss": late.detach(), **metrics}


def _early_loss(
    n: MeamNetworks,
    features: Float[Tensor, "rows features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Loss before the switch, and what its candidates say."""
    assert n.policy is not None
    count = len(noise.sample_x_0)
    c, tilt = draw_candidates(n, features, samples.candidates, noise, config), n.tilt(config)
    weight = importance_weights(
        c.log_prior, c.log_policy, c.value, c.prior_share, tilt.entropy_coef, tilt.inverse_temperature
    )
    x_0, t = noise.match_x_0, config.switch_time * noise.match_t
    x_t = interpolate(x_0, c.x_1.expand_as(x_0), t)
    target = (denoised_among(c.x_1, weight, x_t, t) - x_t) / (1 - t)
    error = (n.policy.condition(features)(x_t, t) - target).square().mean(dim=-1)
    effective = (1 / weight.square().sum(dim=0)).mean() / count
    metrics = {"effective_samples": effective, **budget_metrics(n, c, config)}
    return (count * weight * error).mean(), metrics


def _late_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> Float[Tensor, ""]:
    """Loss after the switch."""
    assert n.policy is not None
    x_1 = samples.acted_x_1[0].clamp(-1, 1)
    tilt = n.tilt(config)
    gradient = tilt.inverse_temperature * value_gradient(n, features, x_1)
    x_0, t = noise.bridge_x_0[0], 1 - (1 - config.switch_time) * noise.bridge_t[0]
    prior = n.tilted_prior.condition(features)
    target = tilted_velocity(prior, x_0, x_1, t, gradient, tilt.entropy_coef, config.confine)
    return (n.policy.condition(features)(interpolate(x_0, x_1, t), t) - target).square().mean()

"""Flow matching on samples of policy and prior, with importance weights towards the policy's target density.

For each observation, n candidates x_1 are drawn: a share m, about a quarter, from the target prior and the others from
the target policy. The loss, a mean over observations, candidates, draws of (x_0, t) and components, is

    n w |v(s, x_t, t) - (x_1 - x_0)|^2,    x_t = (1 - t) x_0 + t x_1,
    w ~ p_prior^(1 - lambda) exp(tau Q) / (m p_prior + (1 - m) p_policy) at x_1,

where the weights w of an observation sum to 1; see `meam_training.algorithm.sample_matching`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.candidates import budget_metrics, draw_candidates
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.algorithm.sample_matching import importance_weights
from meam_training.config import TrainConfig
from meam_training.flow.path import flow_matching_loss, interpolate
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["REWEIGHTED_METRICS", "reweighted_loss"]

REWEIGHTED_METRICS = ("effective_samples",)
"""Names of the logged metrics: the effective sample size 1 / sum w^2 as a share of the candidates, in (0, 1]."""


def reweighted_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Flow matching on samples of policy and prior, with importance weights towards the policy's target density.

    For each observation, about a quarter of the candidates come from the prior and the others from the policy, so that
    no mode of the prior is lost; the densities are the flows' own likelihoods. Densities determine the weights of
    separated modes, which gradients do not. Candidates lie in the box and their weights are bounded, so the loss cannot
    diverge, whatever lambda, tau and the critics, as long as tau Q is finite.

    Args:
        n: All networks; the policy is trained.
        features: Encoded observations of the batch; only the first batch // candidates are used.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The loss, and the metrics `REWEIGHTED_METRICS`; with a KL budget also the first two of `BUDGET_METRICS`.

    References:
        Tong et al., Improving and Generalizing Flow-Based Generative Models, arXiv:2302.00482 (weighted flow matching).
    """
    assert n.policy is not None
    count, rows, _ = noise.sample_x_0.shape
    features = features[:rows]
    c, tilt = draw_candidates(n, features, samples.candidates, noise, config), n.tilt(config)
    weight = importance_weights(
        c.log_prior, c.log_policy, c.value, c.prior_share, tilt.entropy_coef, tilt.inverse_temperature
    )
    effective = (1 / weight.square().sum(dim=0)).mean() / count
    x_0, t = noise.match_x_0, noise.match_t
    x_1 = c.x_1.expand_as(x_0)
    predicted = n.policy.condition(features)(interpolate(x_0, x_1, t), t)
    weight = (count * weight).expand(x_0.shape[:-1])
    loss = flow_matching_loss(predicted.flatten(0, 2), x_0.flatten(0, 2), x_1.flatten(0, 2), weight.reshape(-1, 1))
    return loss, {"effective_samples": effective, **budget_metrics(n, c, config)}

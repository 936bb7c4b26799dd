"""Candidates: samples of policy and prior for each observation, with their log densities and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.sample_matching import value_cost
from meam_training.config import TrainConfig
from meam_training.flow.likelihood import log_likelihood
from meam_training.networks.known_prior import KnownField
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.velocity_field import VelocityField

__all__ = ["Candidates", "budget_metrics", "draw_candidates"]


class Candidates(NamedTuple):
    """Samples of a mixture of prior and policy for each observation; no gradients.

    Attributes:
        x_1: The samples, clipped to the box [candidates, rows, act]; the first ones are the prior's.
        log_prior: Their log densities under the target prior, nats [candidates, rows].
        log_policy: Their log densities under the target policy, nats [candidates, rows].
        value: Their values, means of the target critics [candidates, rows].
        prior_share: Share of the samples drawn from the prior, in (0, 1).
    """

    x_1: Tensor
    log_prior: Tensor
    log_policy: Tensor
    value: Tensor
    prior_share: float


def draw_candidates(
    n: MeamNetworks,
    features: Float[Tensor, "rows features"],
    from_prior: int,
    noise: MeamNoise,
    config: TrainConfig,
) -> Candidates:
    """Draw candidates for each observation, from the flows of the target prior and of the target policy.

    Args:
        n: All networks.
        features: Encoded observations.
        from_prior: Candidates of each observation drawn from the prior.
        noise: The update's randomness; `sample_x_0` sets the number of candidates.
        config: Settings.
    """
    assert n.target_policy is not None
    count, rows, _ = noise.sample_x_0.shape
    with torch.no_grad():
        x_1 = torch.cat(
            [
                n.flow(n.tilted_prior, features, noise.sample_x_0[:from_prior]),
                n.flow(n.target_policy, features, noise.sample_x_0[from_prior:]),
            ]
        ).clamp(-1, 1)
        repeated = features.expand(count, *features.shape)
        value = n.values(repeated.flatten(0, 1), x_1.flatten(0, 1)).mean(dim=0).view(count, rows)

    def log_density(field: VelocityField | KnownField) -> Tensor:
        return log_likelihood(field.condition(features), x_1, noise.probes, config.likelihood_steps)

    return Candidates(x_1, log_density(n.tilted_prior), log_density(n.target_policy), value, from_prior / count)


@torch.no_grad()
def budget_metrics(
    n: MeamNetworks,
    features: Float[Tensor, "rows features"],
    candidates: Candidates,
    noise: MeamNoise,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """What a KL budget needs to know, per action of a chunk; nothing without a budget.

    `path_kl` is the mean log ratio of policy and prior at the policy's candidates, `unit_cost` the leading order of the
    target's KL divergence at tau = 1, from the values of the prior's.
    """
    if n.trust_region is None:
        return {}
    from_prior = round(candidates.prior_share * len(candidates.x_1))
    of_prior = candidates.value[:from_prior]
    if from_prior == 1:
        # One sample has no variance; the noise of the policy's first candidate is free for another of the prior's.
        another = n.flow(n.tilted_prior, features, noise.sample_x_0[1]).clamp(-1, 1)
        of_prior = torch.cat([of_prior, n.values(features, another).mean(dim=0)[None]])
    log_ratio = (candidates.log_policy - candidates.log_prior)[from_prior:]
    found = {"path_kl": log_ratio, "unit_cost": value_cost(of_prior)}
    return {name: value.mean() / config.chunk_size for name, value in found.items()}

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
        prior_value: Values of the prior's samples, for the unit cost, at least two with a KL budget [samples, rows].
        prior_share: Share of the samples drawn from the prior, in (0, 1).
    """

    x_1: Tensor
    log_prior: Tensor
    log_policy: Tensor
    value: Tensor
    prior_value: Tensor
    prior_share: float


def draw_candidates(
    n: MeamNetworks,
    features: Float[Tensor, "rows features"],
    of_policy: Float[Tensor, "candidates rows act"],
    noise: MeamNoise,
    config: TrainConfig,
) -> Candidates:
    """Draw the prior's candidates for each observation, and weigh them beside the policy's.

    Args:
        n: All networks.
        features: Encoded observations.
        of_policy: The policy's candidates.
        noise: The update's randomness; `sample_x_0` sets the number of candidates.
        config: Settings.
    """
    count, rows, _ = noise.sample_x_0.shape
    from_prior = count - len(of_policy)
    # One sample has no variance; the noise of the policy's first candidate is free for another of the prior's.
    another = 1 if from_prior == 1 and n.trust_region is not None else 0
    with torch.no_grad():
        of_prior = n.flow(n.tilted_prior, features, noise.sample_x_0[: from_prior + another])
        drawn = torch.cat([of_prior, of_policy]).clamp(-1, 1)
        repeated = features.expand(len(drawn), *features.shape)
        values = n.values(repeated.flatten(0, 1), drawn.flatten(0, 1)).mean(dim=0).view(-1, rows)
    kept = [*range(from_prior), *range(from_prior + another, len(drawn))]
    x_1, value = drawn[kept], values[kept]

    def log_density(field: VelocityField | KnownField) -> Tensor:
        return log_likelihood(field.condition(features), x_1, noise.probes, config.likelihood_steps)

    return Candidates(
        x_1,
        log_density(n.tilted_prior),
        log_density(n.deployed),
        value,
        values[: from_prior + another],
        from_prior / count,
    )


def budget_metrics(n: MeamNetworks, candidates: Candidates, config: TrainConfig) -> dict[str, Tensor]:
    """What a KL budget needs to know, per action of a chunk; nothing without a budget.

    `path_kl` is the mean log ratio of policy and prior at the policy's candidates, `unit_cost` the leading order of the
    target's KL divergence at tau = 1, from the values of the prior's.
    """
    if n.trust_region is None:
        return {}
    c = candidates
    log_ratio = (c.log_policy - c.log_prior)[round(c.prior_share * len(c.x_1)) :]
    found = {"path_kl": log_ratio, "unit_cost": value_cost(c.prior_value)}
    return {name: value.mean() / config.chunk_size for name, value in found.items()}

"""Samples of the policy's flow that an update needs, from one integration of its ODE.

The TD target, the critics' penalty, the policy's loss and the heads each ask for some. Drawn together they cost fewer
and larger products, and the penalty and the policy's loss share theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["PolicySamples", "draw_policy_samples", "prior_candidates"]


class PolicySamples(NamedTuple):
    """Ends of the deployed policy's flow, as the solver leaves them; no gradients. What is not used has no rows.

    Attributes:
        next_features: Encoded observations after the chunks [batch, features].
        next_x_1: Samples at them, for the TD target [best_of, batch, act].
        acted_x_1: Samples at the batch's observations: for the values to penalise [best_of, batch, act], the first of
            which bridges lead to, too.
        candidates: The policy's candidates [candidates of the policy, rows, act].
        head_x_1: Samples at the batch's observations, for the heads [1, batch, act].
    """

    next_features: Tensor
    next_x_1: Tensor
    acted_x_1: Tensor
    candidates: Tensor
    head_x_1: Tensor


@torch.no_grad()
def draw_policy_samples(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    batch: ChunkBatch,
    noise: MeamNoise,
    config: TrainConfig,
) -> PolicySamples:
    """Draw all samples of the deployed policy that an update needs.

    Args:
        n: All networks.
        features: Encoded observations of the batch.
        batch: The chunks.
        noise: The update's randomness.
        config: Settings.
    """
    next_features = n.encoder(batch.next_observations)
    _, rows, act = noise.sample_x_0.shape
    targets = next_features if n.known_value is None else next_features[:0]
    starts = [
        (targets, noise.next_x_0[: len(targets)].unflatten(-1, (config.best_of, act)).movedim(1, 0)),
        (features[: len(noise.acted_x_0)], noise.acted_x_0.unflatten(-1, (-1, act)).movedim(1, 0)),
        (features[:rows], noise.sample_x_0[prior_candidates(config) :]),
        (features[: len(noise.head_x_0)], noise.head_x_0[None]),
    ]
    return PolicySamples(next_features, *n.flow_together(n.deployed, starts))


def prior_candidates(config: TrainConfig) -> int:
    """How many of an observation's candidates come from the prior.

    Prior samples make the weights of `two_scale` vary even at the optimum, so an eighth has to do there.
    """
    return {
        "reweighted": config.candidates // 4,
        "two_scale": max(1, config.candidates // 8),
    }.get(config.objective, 0)

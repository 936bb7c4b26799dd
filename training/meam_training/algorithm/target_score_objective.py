"""Regression on the score of the policy's target, at the policy's own samples."""

from __future__ import annotations

import torch
from torch import Tensor

from meam_training.algorithm.adjoint_objective import prior_score, terminal_adjoint
from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.sample_matching import target_score_velocity
from meam_training.config import TrainConfig
from meam_training.flow.path import interpolate
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["target_score_loss"]


def target_score_loss(
    n: MeamNetworks, features: Tensor, noise: MeamNoise, config: TrainConfig, metrics: dict[str, Tensor]
) -> Tensor:
    """Regression on the target's score at the policy's own samples."""
    assert n.target_policy is not None
    assert n.policy is not None
    with torch.no_grad():
        x_1 = n.flow(n.target_policy, features, noise.sample_x_0[0])
    adjoint = terminal_adjoint(n, features, x_1, config)
    score = prior_score(n, features, x_1, config) - adjoint
    x_0, t = noise.match_x_0[:, 0], noise.match_t[:, 0]
    x_1, score = x_1.expand_as(x_0), score.expand_as(x_0)
    target = target_score_velocity(x_0, x_1, t, score)
    metrics["adjoint_max"] = adjoint.abs().max()
    return (n.policy.condition(features)(interpolate(x_0, x_1, t), t) - target).square().mean()

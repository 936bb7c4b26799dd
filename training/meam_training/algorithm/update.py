"""One gradient update of critic, mixture prior, policy and heads, read top to bottom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from meam_training.algorithm.adjoint_objective import adjoint_loss
from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.critic_loss import critic_loss
from meam_training.algorithm.head_losses import head_losses
from meam_training.algorithm.prior_loss import mixture_prior_loss, prior_loss
from meam_training.algorithm.reweighted_objective import reweighted_loss
from meam_training.algorithm.target_score_objective import target_score_loss
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["METRICS", "Losses", "compute_losses", "pretraining_losses", "update_targets"]

METRICS = (
    "prior_loss",
    "critic_loss",
    "policy_loss",
    "value_mean",
    "value_std",
    "adjoint_max",
    "outside_box",
    "effective_samples",
    "mixture_gain",
    "mixture_distance",
    "mixture_outside",
    "mixture_disagreement",
    "mixture_kept",
    "edit_value",
    "edit_entropy",
    "edit_alpha",
    "distill_loss",
    "one_step_value",
)
"""Names of everything that `Losses.metrics` may hold."""


class Losses(NamedTuple):
    """The losses of one update, and what is logged beside them."""

    total: Tensor
    metrics: dict[str, Tensor]


def compute_losses(
    networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise, config: TrainConfig, later_stage: bool = False
) -> Losses:
    """The losses of one update: their gradient moves critics, prior and policy; nothing else is changed.

    Args:
        networks: All networks; the targets are read, never trained.
        batch: Chunks of the data.
        noise: The update's randomness.
        config: Settings.
        later_stage: In a stage of mirror descent after the first the prior is an earlier policy, and stays.
    """
    n = networks
    if n.policy is None:
        return pretraining_losses(n, batch, noise)
    features = n.encoder(batch.observations)
    total, metrics = torch.zeros_like(batch.rewards[0]), {}
    if n.known_value is None:
        total = total + critic_loss(n, features, batch, noise, config, metrics)
    if not later_stage:
        total = total + mixture_prior_loss(n, features, batch, noise, config, metrics)
    objective = {"adjoint": adjoint_loss, "target_score": target_score_loss, "reweighted": reweighted_loss}
    policy_loss = objective[config.objective](n, features, noise, config, metrics)
    metrics["policy_loss"] = policy_loss
    total = total + policy_loss + head_losses(n, features, noise, config, metrics)
    return Losses(total, metrics)


def pretraining_losses(networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise) -> Losses:
    """The loss of an update that trains only the prior, on the data alone; all there is to `bc`."""
    features = networks.encoder(batch.observations)
    loss = prior_loss(networks.prior, features, batch.actions, batch.valid, noise)
    return Losses(loss, {"prior_loss": loss})


@torch.no_grad()
def update_targets(networks: MeamNetworks, polyak: float) -> None:
    """Move the averaged networks towards their originals by the share `polyak`.

    Call it before the optimiser's step: the reference implementation averages the weights the update began with.
    """
    if networks.policy is None:
        return
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (networks.target_prior, networks.prior),
        (networks.target_critic, networks.critic),
    ]
    if networks.target_policy is not None:
        pairs.append((networks.target_policy, networks.policy))
    averaged = tuple(parameter for target, _ in pairs for parameter in target.parameters())
    current = tuple(parameter for _, source in pairs for parameter in source.parameters())
    get_ema_multi_avg_fn(1 - polyak)(averaged, current, 0)

"""One gradient update of critics, mixture prior, policy and heads.

The gradient is that of the sum of the losses. Each loss trains its own networks and treats all others as constants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from meam_training.algorithm.adjoint_objective import ADJOINT_METRICS, adjoint_loss
from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.bridge_objective import BRIDGE_METRICS, bridge_loss
from meam_training.algorithm.critic_loss import CRITIC_METRICS, critic_loss, return_loss
from meam_training.algorithm.head_losses import HEAD_METRICS, head_losses
from meam_training.algorithm.policy_samples import draw_policy_samples
from meam_training.algorithm.prior_loss import MIXTURE_METRICS, mixture_prior_loss, prior_loss
from meam_training.algorithm.reweighted_objective import REWEIGHTED_METRICS, reweighted_loss
from meam_training.algorithm.target_score_objective import TARGET_SCORE_METRICS, target_score_loss
from meam_training.algorithm.two_scale_objective import TWO_SCALE_METRICS, two_scale_loss
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["BUDGET_METRICS", "METRICS", "Losses", "compute_losses", "pretraining_losses", "update_targets"]

BUDGET_METRICS = ("path_kl", "unit_cost", "last_step_drift")
"""Names of the metrics that every objective logs if there is a KL budget, and the last of them only `adjoint`.

In this order: estimate of the policy's KL divergence from the prior, nats per action; the unit cost, what it would be
at tau = 1 to leading order, squared units of value per action; and how far the policy drifts from the prior in the
SDE's last step, see `meam_training.algorithm.adjoint_objective`.
"""

METRICS = tuple(
    dict.fromkeys(
        (
            "prior_loss",
            "critic_loss",
            "policy_loss",
            *CRITIC_METRICS,
            *ADJOINT_METRICS,
            *TARGET_SCORE_METRICS,
            *REWEIGHTED_METRICS,
            *TWO_SCALE_METRICS,
            *BRIDGE_METRICS,
            *BUDGET_METRICS,
            *MIXTURE_METRICS,
            *HEAD_METRICS,
        )
    )
)
"""Names of all metrics that `Losses.metrics` may hold: the losses, then the metrics that their modules add."""

OBJECTIVES = {
    "adjoint": adjoint_loss,
    "bridge": bridge_loss,
    "target_score": target_score_loss,
    "reweighted": reweighted_loss,
    "two_scale": two_scale_loss,
}
"""The policy's loss by `TrainConfig.objective`."""


class Losses(NamedTuple):
    """Total loss of an update, and its metrics: the individual losses, and what their modules add."""

    total: Tensor
    metrics: dict[str, Tensor]


def compute_losses(
    networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise, config: TrainConfig, later_stage: bool = False
) -> Losses:
    """Compute the losses of one update, whose gradient trains critics, prior, policy and heads; changes nothing.

    Args:
        networks: All networks; the target networks are evaluated, never trained.
        batch: Chunks of the data.
        noise: The update's randomness.
        config: Settings. The losses take all of their settings from here; `networks` keeps only those it needs to be
            built and to act.
        later_stage: Whether this is a mirror-descent stage after the first, in which the prior is an earlier policy and
            is not trained.
    """
    n = networks
    if n.policy is None:
        return pretraining_losses(n, batch, noise, critics=False)
    features = n.encoder(batch.observations)
    samples = draw_policy_samples(n, features, batch, noise, config)
    losses, metrics = {}, {}
    if n.known_value is None:
        losses["critic_loss"], logged = critic_loss(n, features, batch, samples, noise, config)
        metrics |= logged
    if not later_stage:
        losses["prior_loss"], logged = mixture_prior_loss(n, features, batch, noise, config)
        metrics |= logged
    losses["policy_loss"], logged = OBJECTIVES[config.objective](n, features, samples, noise, config)
    metrics |= logged
    heads_loss, logged = head_losses(n, features, samples, noise, config)
    metrics |= logged
    return Losses(sum(losses.values(), heads_loss), losses | metrics)


def pretraining_losses(networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise, *, critics: bool) -> Losses:
    """Compute the losses of an update on the data alone: of the prior, the only one of `bc`, and of the critics.

    Args:
        networks: All networks.
        batch: Chunks of the data.
        noise: The update's randomness.
        critics: Whether critics are trained too, on the data's returns; not where values are known.
    """
    n, features = networks, networks.encoder(batch.observations)
    total = prior_loss(n.prior, features, batch.actions, batch.within, noise)
    losses = {"prior_loss": total}
    if critics and n.known_value is None:
        losses["critic_loss"] = return_loss(n, features, batch)
        total = total + losses["critic_loss"]
    return Losses(total, losses)


@torch.no_grad()
def update_targets(networks: MeamNetworks, polyak: float) -> None:
    """Polyak averaging: move the target networks towards the trained ones by the fraction `polyak`.

    Call this before the optimiser's step: like the reference implementation, it averages the weights from before the
    update.
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

"""Temporal differences over chunks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.q_maximizer import pessimistic_value
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["critic_loss", "td_target"]


@torch.no_grad()
def td_target(
    n: MeamNetworks,
    batch: ChunkBatch,
    config: TrainConfig,
    next_x_0: Float[Tensor, "batch noise"],
    next_edit: Float[Tensor, "batch noise"] | None = None,
) -> Float[Tensor, " batch"]:
    """The pessimistic TD target r + gamma^H mask Q(s', a') of chunks, a' as the policy acts.

    Args:
        n: All networks; the averaged critics are read.
        batch: The chunks.
        config: Settings.
        next_x_0: Starts of the policy's flow.
        next_edit: Noise of the edit policy; None takes its mode.
    """
    features = n.encoder(batch.next_observations)
    values = n.target_critic(features, n.act(features, next_x_0, next_edit))
    next_value = pessimistic_value(values, config.pessimism)
    return batch.rewards + config.discount**config.chunk_size * batch.masks * next_value


def critic_loss(
    n: MeamNetworks,
    features: Tensor,
    batch: ChunkBatch,
    noise: MeamNoise,
    config: TrainConfig,
    metrics: dict[str, Tensor],
) -> Tensor:
    """Pessimistic TD over the chunk, a' as the policy acts."""
    target = td_target(n, batch, config, noise.next_x_0, noise.next_edit if config.edit_scale else None)
    values = n.critic(features, batch.actions)
    loss = ((values - target).square() * batch.valid).mean()
    metrics |= {
        "critic_loss": loss,
        "value_mean": values.mean(),
        "value_std": values.std(dim=0, correction=0).mean(),
    }
    return loss

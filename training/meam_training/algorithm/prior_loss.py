"""Flow matching of the mixture prior: the data, and a share of Q-maximised chunks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.q_maximizer import maximize_q, pessimistic_value
from meam_training.config import TrainConfig
from meam_training.flow.path import flow_matching_loss, interpolate
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.velocity_field import VelocityField

__all__ = ["mixture_prior_loss", "prior_loss"]


def mixture_prior_loss(
    n: MeamNetworks,
    features: Tensor,
    batch: ChunkBatch,
    noise: MeamNoise,
    config: TrainConfig,
    metrics: dict[str, Tensor],
) -> Tensor:
    """Flow matching on the data, with a share of Q-maximised chunks."""
    actions, weight = batch.actions, batch.valid
    mixed = len(noise.bandwidth)
    if mixed:
        guided = _q_maximized(n, features[:mixed], batch.actions, noise, config, metrics)
        actions = torch.cat([guided, batch.actions[mixed:]])
    loss = prior_loss(n.prior, features, actions, weight, noise)
    metrics["prior_loss"] = loss
    return loss


def prior_loss(prior: VelocityField, features: Tensor, x_1: Tensor, weight: Tensor, noise: MeamNoise) -> Tensor:
    """Flow matching on given chunks, a weight for every row."""
    x_t = interpolate(noise.flow_x_0, x_1, noise.flow_t)
    return flow_matching_loss(prior(features, x_t, noise.flow_t), noise.flow_x_0, x_1, weight)


def _q_maximized(
    n: MeamNetworks,
    features: Tensor,
    actions: Tensor,
    noise: MeamNoise,
    config: TrainConfig,
    metrics: dict[str, Tensor],
) -> Float[Tensor, "mixed act"]:
    """Chunks of high pessimistic value, blurred by the bandwidth, inside the box.

    Logged with them: the gain in value over the data's own chunk, the distance (root mean square per component) to the
    nearest chunk of the batch, the share of components outside the batch's range, the critics' standard deviation.
    """
    data, actions = actions, actions[: len(features)]
    flowed = n.flow(n.target_prior, features, noise.ascent_x_0[::2]) if len(noise.ascent_x_0) else noise.ascent_x_0
    candidates = torch.cat([actions[None], flowed.detach(), actions + config.ascent_spread * noise.ascent_x_0[1::2]])

    def values(x: Tensor) -> Float[Tensor, "critics candidates mixed"]:
        flat = features.expand(len(x), *features.shape).flatten(0, 1)
        return n.values(flat, x.flatten(0, 1)).unflatten(1, x.shape[:2])

    def value(x: Tensor) -> Tensor:
        return pessimistic_value(values(x).flatten(1), config.pessimism).view(x.shape[:2])

    best, gain = maximize_q(value, candidates, config.ascent_steps, config.ascent_step_size, config.trust_radius)
    with torch.no_grad():
        # Disagreement of the critics, at the data's actions and at the maximising ones.
        seen, unseen = values(torch.stack([actions, best])).var(dim=0, correction=0)
        distance = torch.cdist(best, data) / math.sqrt(actions.shape[-1])
        outside = (best < data.amin(dim=0)) | (best > data.amax(dim=0))
    metrics |= {
        "mixture_gain": gain.mean(),
        "mixture_distance": distance.amin(dim=1).mean(),
        "mixture_outside": outside.float().mean(),
        "mixture_disagreement": unseen.sqrt().mean(),
    }
    blurred = (best + config.mixture_bandwidth * noise.bandwidth).clamp(-1, 1)
    if not config.adaptive_mixture:
        return blurred
    kept = noise.accept * unseen <= seen.mean()
    metrics["mixture_kept"] = kept.float().mean()
    return torch.where(kept[:, None], blurred, actions)

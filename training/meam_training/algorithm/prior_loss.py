"""Flow matching of the mixture prior, on the data and a share of Q-maximised chunks.

The loss is the mean over the batch and over components of

    w |v(s, x_t, t) - (x_1 - x_0)|^2,    x_t = (1 - t) x_0 + t x_1,

where x_0 is standard normal, t uniform, and w is 1 for chunks that lie within one episode, else 0. In the first rows, a
share `mixture_weight` of the batch, x_1 is the result of gradient ascent on the pessimistic value plus
`mixture_bandwidth` times noise, clipped to the box; in the others it is the data's chunk. Taking the first rows is no
restriction, as the batch is drawn at random.
"""

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

__all__ = ["MIXTURE_METRICS", "mixture_prior_loss", "prior_loss"]

MIXTURE_METRICS = (
    "mixture_gain",
    "mixture_distance",
    "mixture_outside",
    "mixture_disagreement",
    "mixture_kept",
)
"""Names of the metrics of the Q-maximised chunks.

In this order: the gain in value over the data's own chunk, the distance (root mean square per component) to the nearest
chunk of the batch, the share of components outside the batch's range, the critics' standard deviation at the
Q-maximised chunks, and with `adaptive_mixture` the share of them that is kept.
"""


def mixture_prior_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    batch: ChunkBatch,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Flow matching on the data, with a share of Q-maximised chunks.

    Args:
        n: All networks; the prior is trained.
        features: Encoded observations of the batch.
        batch: The chunks.
        noise: The update's randomness; its field `bandwidth` sets the number of Q-maximised rows.
        config: Settings.

    Returns:
        The loss, and the metrics `MIXTURE_METRICS` if any row is Q-maximised.
    """
    actions, metrics = batch.actions, {}
    mixed = len(noise.bandwidth)
    if mixed:
        guided, metrics = _q_maximized(n, features[:mixed], batch.actions, noise, config)
        actions = torch.cat([guided, batch.actions[mixed:]])
    return prior_loss(n.prior, features, actions, batch.within, noise), metrics


def prior_loss(
    prior: VelocityField,
    features: Float[Tensor, "batch features"],
    x_1: Float[Tensor, "batch act"],
    weight: Float[Tensor, "batch act"],
    noise: MeamNoise,
) -> Float[Tensor, ""]:
    """Flow matching on given chunks, with a weight for each component of their actions."""
    x_t = interpolate(noise.flow_x_0, x_1, noise.flow_t)
    return flow_matching_loss(prior(features, x_t, noise.flow_t), noise.flow_x_0, x_1, weight)


def _q_maximized(
    n: MeamNetworks,
    features: Float[Tensor, "mixed features"],
    actions: Float[Tensor, "batch act"],
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, "mixed act"], dict[str, Tensor]]:
    """Q-maximised chunks of pessimistic value, with bandwidth noise, clipped to the box; and `MIXTURE_METRICS`."""
    data, actions = actions, actions[: len(features)]
    flowed = n.flow(n.tilted_prior, features, noise.ascent_x_0[::2]) if len(noise.ascent_x_0) else noise.ascent_x_0
    starts = torch.cat([actions[None], flowed.detach(), actions + config.ascent_spread * noise.ascent_x_0[1::2]])

    def values(x: Tensor) -> Float[Tensor, "critics points mixed"]:
        flat = features.expand(len(x), *features.shape).flatten(0, 1)
        return n.values(flat, x.flatten(0, 1)).unflatten(1, x.shape[:2])

    def value(x: Tensor) -> Tensor:
        return pessimistic_value(values(x).flatten(1), config.pessimism).view(x.shape[:2])

    best, gain = maximize_q(value, starts, config.ascent_steps, config.ascent_step_size, config.trust_radius)
    with torch.no_grad():
        # Variance over the critics, at the data's actions and at the Q-maximised ones.
        seen, unseen = values(torch.stack([actions, best])).var(dim=0, correction=0)
        distance = torch.cdist(best, data) / math.sqrt(actions.shape[-1])
        outside = (best < data.amin(dim=0)) | (best > data.amax(dim=0))
    metrics = {
        "mixture_gain": gain.mean(),
        "mixture_distance": distance.amin(dim=1).mean(),
        "mixture_outside": outside.float().mean(),
        "mixture_disagreement": unseen.sqrt().mean(),
    }
    blurred = (best + config.mixture_bandwidth * noise.bandwidth).clamp(-1, 1)
    if not config.adaptive_mixture:
        return blurred, metrics
    kept = noise.accept * unseen <= seen.mean()
    return torch.where(kept[:, None], blurred, actions), metrics | {"mixture_kept": kept.float().mean()}

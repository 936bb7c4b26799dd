"""The critics' loss: temporal differences (TD) over action chunks, and a penalty on the policy's values.

The loss is the mean over critics and rows, where chunks without a target (see
`meam_training.data.action_chunk.ChunkTargets`) count as zero, of

    ((Q_i(s, a) - y) / scale)^2,    y = r + gamma^H mask (mean_j Q'_j(s', a') - pessimism std_j Q'_j(s', a')),

plus `value_penalty` times the mean of gamma^H mask (Q_i(s, a_policy) - Q_i(s, a)) / (tau scale^2), with 1 / tau of at
most scale, which keeps the policy's actions from being valued above the data's for nothing. It weighs what the next
state's value counts in the target: where values rest on values of the policy's own actions, errors are passed on and
grow; where they rest on rewards alone, there is nothing to pass on. Here scale is the standard deviation of the data's
returns with `normalise_values`, else 1, a is a chunk of H actions, r its discounted reward, s' the state after it, a'
and a_policy are chunks chosen by the policy at s' and s, Q' the target critics, and tau the inverse temperature.

At its minimum Q_i is y - c / (2 tau) (pi(a | s) / pi_data(a | s) - 1) with c = `value_penalty` gamma^H mask: the
policy's exponent tau Q loses c / 2 nats per multiple of the data's density, whatever the scale of rewards, and however
little of the returns' spread an action decides.

References:
    Dong et al., Q-Learning with Scalar Adjoint Matching, arXiv:2610.10437 (the penalty). Kumar et al., Conservative
    Q-Learning, arXiv:2006.04779.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.algorithm.q_maximizer import pessimistic_value
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["CRITIC_METRICS", "critic_loss", "return_loss", "td_target"]

CRITIC_METRICS = ("value_mean", "value_std", "value_excess")
"""Names of the metrics besides the loss: the mean of Q over critics and batch, the critics' standard deviation, and
with `value_penalty` how far Q at the policy's actions lies above Q at the data's, a mean over critics and batch, where
chunks without a target count as zero."""


@torch.no_grad()
def td_target(
    n: MeamNetworks,
    batch: ChunkBatch,
    config: TrainConfig,
    next_x_0: Float[Tensor, "batch noise"],
    next_edit: Float[Tensor, "batch noise"] | None = None,
) -> Float[Tensor, " batch"]:
    """Pessimistic TD target r + gamma^H mask Q'(s', a') of chunks, with a' chosen by the policy.

    Args:
        n: All networks; the target critics are evaluated.
        batch: The chunks.
        config: Settings.
        next_x_0: Initial noise of the policy's flow.
        next_edit: Noise of the edit policy; None takes its mode.
    """
    features = n.encoder(batch.next_observations)
    return _target(n, batch, config, features, n.act(features, next_x_0, next_edit))


def _target(n: MeamNetworks, batch: ChunkBatch, config: TrainConfig, features: Tensor, actions: Tensor) -> Tensor:
    """TD target of chunks, given the encoded next observations and the chunks chosen there."""
    next_value = pessimistic_value(n.target_critic(features, actions), config.pessimism)
    return batch.rewards + _bootstrapped(batch, config) * next_value


def _bootstrapped(batch: ChunkBatch, config: TrainConfig) -> Float[Tensor, " batch"]:
    """What the next state's value counts in a chunk's target: gamma^H, and nothing where the episode terminated."""
    return config.discount**config.chunk_size * batch.masks


def critic_loss(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    batch: ChunkBatch,
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Squared error of the critics against the pessimistic TD target of the chunks.

    Args:
        n: All networks; the critics are trained.
        features: Encoded observations of the batch.
        batch: The chunks.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The loss, and the metrics `CRITIC_METRICS`.
    """
    edits = (noise.next_edit, noise.acted_edit) if config.edit_scale else (None, None)
    with torch.no_grad():
        chosen = n.choose_among(samples.next_features, samples.next_x_1, edits[0])
        target = _target(n, batch, config, samples.next_features, chosen)
    values = n.critic(features, batch.actions)
    loss = (((values - target) / n.critic.scale).square() * batch.valid).mean()
    metrics = {"value_mean": values.mean(), "value_std": values.std(dim=0, correction=0).mean()}
    if config.value_penalty:
        with torch.no_grad():
            acted = n.choose_among(features, samples.acted_x_1, edits[1])
        excess = (n.critic(features, acted) - values) * batch.valid
        penalised = (excess * _bootstrapped(batch, config)).mean()
        # A temperature above the returns' spread decides nothing, but would have the penalty outweigh all targets.
        temperature = torch.as_tensor(n.tilt(config).temperature).clamp(max=n.critic.scale)
        loss = loss + config.value_penalty * temperature * penalised / n.critic.scale**2
        metrics["value_excess"] = excess.mean()
    return loss, metrics


def return_loss(n: MeamNetworks, features: Float[Tensor, "batch features"], batch: ChunkBatch) -> Float[Tensor, ""]:
    """Squared error of the critics against the data's returns, by which critics are pretrained.

    They start from the values of the behaviour: TD targets would need thousands of updates to tell actions apart, and
    until then their noise is all that a policy could follow.

    Args:
        n: All networks; the critics are trained.
        features: Encoded observations of the batch.
        batch: The chunks; the recorded share of its return is the weight of each.

    Returns:
        The mean over critics and rows, where chunks without a target count as zero, of
        known ((Q_i(s, a) - G) / scale)^2, with scale as in `critic_loss`.
    """
    error = (n.critic(features, batch.actions) - batch.returns) / n.critic.scale
    return (error.square() * batch.valid * batch.known).mean()

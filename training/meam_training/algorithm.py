"""ME-AM: the networks, and one gradient update of critic, mixture prior and policy."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meam_policy.spec import PolicySpec
from meam_training.adjoint import adjoint_matching_loss, lean_adjoint, sample_memoryless_path
from meam_training.config import TrainConfig
from meam_training.flow import flow_matching_loss, integrate, interpolate, score_from_velocity, time_like
from meam_training.networks import CriticEnsemble, ObservationEncoder, VelocityField
from meam_training.q_maximizer import maximize_q, pessimistic_value

__all__ = [
    "METRICS",
    "ChunkBatch",
    "Losses",
    "MeamNetworks",
    "MeamNoise",
    "compute_losses",
    "draw_noise",
    "pretraining_losses",
    "update_targets",
]

METRICS = (
    "prior_loss",
    "critic_loss",
    "policy_loss",
    "value_mean",
    "value_std",
    "adjoint_max",
    "outside_box",
    "mixture_gain",
    "mixture_distance",
)
"""Names of everything that `Losses.metrics` may hold."""


class ChunkBatch(NamedTuple):
    """A batch of action chunks on the training device.

    Attributes:
        observations: Raw observations [batch, obs].
        actions: Normalised, flattened chunks [batch, act], act = chunk_size * action_dim, in [-1, 1].
        rewards: Discounted chunk rewards [batch].
        next_observations: Raw observations after the chunks [batch, obs].
        masks: 0 after a termination, else 1 [batch].
        valid: 1 where the chunk lies within one episode, else 0 [batch].
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    masks: Tensor
    valid: Tensor


class MeamNoise(NamedTuple):
    """All randomness of one update; standard normal but for `flow_t`, uniform in [0, 1].

    Attributes:
        next_x_0: Starts of the policy's ODE for the TD target [batch, act].
        flow_x_0: Noise ends of the prior's interpolants [batch, act].
        flow_t: Times of the interpolants [batch, 1].
        sde_x_0: Starts of the memoryless SDE [batch, act].
        sde: Noise of its stochastic steps [flow_steps - 1, batch, act].
        candidates: Starts of the prior's samples for the Q-maximised actions [candidates - 1, mixed, act].
        bandwidth: Noise on the Q-maximised actions [mixed, act].
    """

    next_x_0: Tensor
    flow_x_0: Tensor
    flow_t: Tensor
    sde_x_0: Tensor
    sde: Tensor
    candidates: Tensor
    bandwidth: Tensor


class Losses(NamedTuple):
    """The losses of one update, and what is logged beside them."""

    total: Tensor
    metrics: dict[str, Tensor]


class MeamNetworks(nn.Module):
    """Encoder, mixture prior, policy and critics of one run, with the Polyak averages of prior and critics.

    A `bc` run has no policy and no critics: what it deploys is the prior itself.

    Args:
        spec: Dimensions and normalisation.
        config: Sizes and method.
    """

    def __init__(self, spec: PolicySpec, config: TrainConfig) -> None:
        super().__init__()
        action_dim = spec.noise_dim
        self.encoder = ObservationEncoder(
            spec.observation_mean, spec.observation_std, config.fourier_features, config.fourier_scale
        )
        features = self.encoder.output_dim
        self.prior = VelocityField(features, action_dim, config.hidden_dims)
        self.policy: VelocityField | None = None
        if config.trains_policy:
            self.policy = VelocityField(features, action_dim, config.hidden_dims)
            self.critic = CriticEnsemble(features, action_dim, config.critic_hidden_dims, config.num_critics)
            self.target_prior = copy.deepcopy(self.prior).requires_grad_(False)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def start_policy_from_prior(self) -> None:
        """Make the policy and the averaged prior copies of the prior, as adjoint matching fine-tunes a given flow."""
        if self.policy is not None:
            self.policy.load_state_dict(self.prior.state_dict())
            self.target_prior.load_state_dict(self.prior.state_dict())

    @property
    def deployed(self) -> VelocityField:
        """The velocity field that acts: the policy, or for `bc` the prior."""
        return self.prior if self.policy is None else self.policy


def draw_noise(
    batch_size: int, action_dim: int, config: TrainConfig, generator: torch.Generator, device: torch.device
) -> MeamNoise:
    """Draw the randomness of one update."""
    mixed = _mixed_rows(batch_size, config)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return MeamNoise(
        next_x_0=normal(batch_size, action_dim),
        flow_x_0=normal(batch_size, action_dim),
        flow_t=torch.rand((batch_size, 1), generator=generator, device=device),
        sde_x_0=normal(batch_size, action_dim),
        sde=normal(config.flow_steps - 1, batch_size, action_dim),
        candidates=normal(config.ascent_candidates - 1, mixed, action_dim),
        bandwidth=normal(mixed, action_dim),
    )


def compute_losses(networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise, config: TrainConfig) -> Losses:
    """The losses of one update: their gradient moves critics, prior and policy; nothing else is changed.

    Args:
        networks: All networks; the targets are read, never trained.
        batch: Chunks of the data.
        noise: The update's randomness.
        config: Settings.
    """
    n = networks
    if n.policy is None:
        return pretraining_losses(n, batch, noise)
    features = n.encoder(batch.observations)
    next_features = n.encoder(batch.next_observations)
    metrics: dict[str, Tensor] = {}

    # Critic: pessimistic TD over the chunk, a' from the policy's ODE.
    with torch.no_grad():
        next_actions = integrate(n.policy.condition(next_features), noise.next_x_0, config.flow_steps).clamp(-1, 1)
        next_value = pessimistic_value(n.target_critic(next_features, next_actions), config.pessimism)
        target = batch.rewards + config.discount**config.chunk_size * batch.masks * next_value
    values = n.critic(features, batch.actions)
    critic_loss = ((values - target).square() * batch.valid).mean()

    # Prior: flow matching on the data, with a share of Q-maximised chunks.
    prior_actions = batch.actions
    mixed = len(noise.bandwidth)
    if mixed:
        guided, gain = _q_maximized(n, features[:mixed], batch.actions[:mixed], noise, config)
        metrics |= {
            "mixture_gain": gain.mean(),
            "mixture_distance": (guided - batch.actions[:mixed]).square().mean(dim=-1).sqrt().mean(),
        }
        prior_actions = torch.cat([guided, batch.actions[mixed:]])
    prior_loss = _prior_loss(n.prior, features, prior_actions, batch.valid, noise)

    # Policy: adjoint matching along its own memoryless SDE, relative to the averaged prior.
    prior, policy = n.target_prior.condition(features), n.policy.condition(features)
    path = sample_memoryless_path(policy, prior, noise.sde_x_0, noise.sde)
    adjoints = lean_adjoint(prior, path, _terminal_adjoint(n, features, path[-1], config))
    times = torch.stack([time_like(path[0], k / config.flow_steps) for k in range(config.flow_steps)])
    with torch.no_grad():
        prior_velocity = prior(path[:-1], times)
    policy_loss = adjoint_matching_loss(policy(path[:-1], times), prior_velocity, adjoints)

    metrics |= {
        "critic_loss": critic_loss,
        "prior_loss": prior_loss,
        "policy_loss": policy_loss,
        "value_mean": values.mean(),
        "value_std": values.std(dim=0, correction=0).mean(),
        "adjoint_max": adjoints[-1].abs().max(),
        "outside_box": (path[-1].abs() > 1).float().mean(),
    }
    return Losses(critic_loss + prior_loss + policy_loss, metrics)


def pretraining_losses(networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise) -> Losses:
    """The loss of an update that trains only the prior, on the data alone; all there is to `bc`."""
    features = networks.encoder(batch.observations)
    loss = _prior_loss(networks.prior, features, batch.actions, batch.valid, noise)
    return Losses(loss, {"prior_loss": loss})


@torch.no_grad()
def update_targets(networks: MeamNetworks, polyak: float) -> None:
    """Move the averaged prior and critics towards their originals by the share `polyak`.

    Call it before the optimiser's step: the reference implementation averages the weights the update began with.
    """
    if networks.policy is None:
        return
    pairs = ((networks.target_prior, networks.prior), (networks.target_critic, networks.critic))
    for target, source in pairs:
        for averaged, current in zip(target.parameters(), source.parameters(), strict=True):
            averaged.lerp_(current, polyak)


def _mixed_rows(batch_size: int, config: TrainConfig) -> int:
    """Rows of a batch whose prior target is Q-maximised: a fixed number, since the rows are drawn at random anyway."""
    return max(1, round(config.mixture_weight * batch_size)) if config.mixture_weight else 0


def _prior_loss(prior: VelocityField, features: Tensor, x_1: Tensor, weight: Tensor, noise: MeamNoise) -> Tensor:
    x_t = interpolate(noise.flow_x_0, x_1, noise.flow_t)
    return flow_matching_loss(prior(features, x_t, noise.flow_t), noise.flow_x_0, x_1, weight)


def _q_maximized(
    n: MeamNetworks, features: Tensor, actions: Tensor, noise: MeamNoise, config: TrainConfig
) -> tuple[Float[Tensor, "mixed act"], Float[Tensor, " mixed"]]:
    """Chunks of high pessimistic value, blurred by the bandwidth, inside the box; and their gain over the data's."""
    with torch.no_grad():
        samples = integrate(n.target_prior.condition(features), noise.candidates, config.flow_steps)
    candidates = torch.cat([actions[None], samples])

    def value(x: Tensor) -> Tensor:
        flat = features.expand(len(x), *features.shape).flatten(0, 1)
        return pessimistic_value(n.target_critic(flat, x.flatten(0, 1)), config.pessimism).view(x.shape[:2])

    best, gain = maximize_q(value, candidates, config.ascent_steps, config.ascent_step_size)
    return (best + config.mixture_bandwidth * noise.bandwidth).clamp(-1, 1), gain


def _terminal_adjoint(
    n: MeamNetworks, features: Tensor, x_1: Float[Tensor, "batch act"], config: TrainConfig
) -> Float[Tensor, "batch act"]:
    """a(1) = -tau grad Q(s, x_1) + lambda score_prior(s, x_1), with nothing that pushes out of the box.

    Q is the mean of the averaged critics at the clipped action, so its gradient vanishes outside the box. The score
    is read at the clipped action too, each component bounded by `score_limit`, and zero where it would drive x_1
    further out: outside the data a learned score extrapolates, and unconfined it diverges.
    """
    with torch.enable_grad():
        x = x_1.detach().requires_grad_()
        value = n.target_critic(features.detach(), x.clamp(-1, 1)).mean(dim=0).sum()
        (gradient,) = torch.autograd.grad(value, x)
    adjoint = -config.inverse_temperature * gradient
    if config.entropy_coef:
        t = 1 - config.score_eps
        inside = x_1.clamp(-1, 1)
        with torch.no_grad():
            velocity = n.target_prior(features, inside, time_like(inside, t))
        score = score_from_velocity(inside, velocity, t).clamp(-config.score_limit, config.score_limit)
        outward = (x_1.abs() >= 1) & (score * x_1 < 0)
        adjoint = adjoint + config.entropy_coef * score.masked_fill(outward, 0.0)
    return adjoint

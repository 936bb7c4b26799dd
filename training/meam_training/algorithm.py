"""ME-AM: the networks, and one gradient update of critic, mixture prior and policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from meam_policy.spec import PolicySpec, Solver
from meam_training.adjoint import (
    adjoint_matching_loss,
    ancestral_adjoint,
    ancestral_matching_loss,
    lean_adjoint,
    sample_ancestral_path,
    sample_memoryless_path,
)
from meam_training.config import TrainConfig
from meam_training.flow import (
    RecordedVelocity,
    flow_matching_loss,
    integrate,
    interpolate,
    log_likelihood,
    score_from_velocity,
    time_like,
)
from meam_training.heads import EditPolicy, OneStepPolicy, apply_edit, distill_loss, edit_loss
from meam_training.networks import CriticEnsemble, ObservationEncoder, VelocityField
from meam_training.q_maximizer import maximize_q, pessimistic_value
from meam_training.sample_matching import importance_weights, target_score_velocity

__all__ = [
    "METRICS",
    "ChunkBatch",
    "KnownValue",
    "Losses",
    "MeamNetworks",
    "MeamNoise",
    "compute_losses",
    "draw_noise",
    "mixed_rows",
    "pretraining_losses",
    "td_target",
    "update_targets",
]

_DRAWS = 4
"""Interpolants of every sample: a regression row is cheap beside the sample and its density."""

KnownValue = Callable[[Tensor, Tensor], Tensor]
"""Value of normalised chunks at raw observations: [batch, obs], [batch, act] -> [batch]; differentiable."""

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
    """All randomness of one update: standard normal, but for times and `accept`, uniform in [0, 1], and `probes`.

    What the settings do not use has no rows.

    Attributes:
        next_x_0: Starts of the policy's ODE for the TD target [batch, best_of * act].
        next_edit: Noise of the edit policy there [batch, best_of * act].
        flow_x_0: Noise ends of the prior's interpolants [batch, act].
        flow_t: Times of the interpolants [batch, 1].
        sde_x_0: Starts of the memoryless SDE [batch, act].
        sde: Noise of its stochastic steps [sde_steps - 1, batch, act].
        sample_x_0: Starts of the samples on which a policy without an SDE is trained [candidates, rows, act].
        match_x_0: Noise ends of their interpolants [draws, candidates, rows, act].
        match_t: Times of those [draws, candidates, rows, 1].
        probes: Orthonormal directions of the divergence [probes, act].
        candidates: Starts of the search for Q-maximised actions [ascent_candidates - 1, mixed, act].
        bandwidth: Noise on the Q-maximised actions [mixed, act].
        accept: Whether to keep them [mixed].
        head_x_0: Starts of the flow for the edit and one-step policies [batch, act].
        edit: Noise of the edit policy [batch, act].
    """

    next_x_0: Tensor
    next_edit: Tensor
    flow_x_0: Tensor
    flow_t: Tensor
    sde_x_0: Tensor
    sde: Tensor
    sample_x_0: Tensor
    match_x_0: Tensor
    match_t: Tensor
    probes: Tensor
    candidates: Tensor
    bandwidth: Tensor
    accept: Tensor
    head_x_0: Tensor
    edit: Tensor


class Losses(NamedTuple):
    """The losses of one update, and what is logged beside them."""

    total: Tensor
    metrics: dict[str, Tensor]


class MeamNetworks(nn.Module):
    """Encoder, mixture prior, policy and critics of one run, with the Polyak averages of what needs them.

    A `bc` run has no policy and no critics: what it deploys is the prior itself. A policy trained on samples of its own
    (every objective but `adjoint`) is averaged too; the average draws the samples, and is what acts.

    Args:
        spec: Dimensions and normalisation.
        config: Sizes and method.

    Attributes:
        known_value: If set, the value of normalised chunks at raw observations, [batch, obs], [batch, act] -> [batch],
            instead of the critics'.
        flow_steps, solver, times, best_of: How it acts: as the settings say, in equal steps.
    """

    def __init__(self, spec: PolicySpec, config: TrainConfig) -> None:
        super().__init__()
        action_dim = spec.chunk_dim
        self.config = config
        self.flow_steps, self.best_of = config.flow_steps, config.best_of
        self.solver: Solver = config.solver
        self.times: tuple[float, ...] | None = None
        self.known_value: KnownValue | None = None
        self.encoder = ObservationEncoder(
            spec.observation_mean, spec.observation_std, config.fourier_features, config.fourier_scale
        )
        features = self.encoder.output_dim
        self.prior = VelocityField(features, action_dim, config.hidden_dims, config.precision)
        self.policy: VelocityField | None = None
        self.target_policy: VelocityField | None = None
        self.edit_policy: EditPolicy | None = None
        self.one_step: OneStepPolicy | None = None
        if config.trains_policy:
            self.policy = VelocityField(features, action_dim, config.hidden_dims, config.precision)
            self.critic = CriticEnsemble(
                features, action_dim, config.critic_hidden_dims, config.num_critics, config.precision
            )
            self.target_prior = copy.deepcopy(self.prior).requires_grad_(False)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
            if config.objective != "adjoint":
                self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
            if config.edit_scale:
                self.edit_policy = EditPolicy(features, action_dim, config.hidden_dims)
            if config.distill_coef:
                self.one_step = OneStepPolicy(features, action_dim, config.hidden_dims)

    def start_policy_from_prior(self) -> None:
        """Make the policy and the averaged prior copies of the prior, as adjoint matching fine-tunes a given flow."""
        if self.policy is not None:
            for copied in (self.policy, self.target_prior, self.target_policy):
                if copied is not None:
                    copied.load_state_dict(self.prior.state_dict())

    def start_mirror_stage(self) -> None:
        """Make the policy so far the prior of what follows."""
        for copied in (self.prior, self.target_prior):
            copied.load_state_dict(self.deployed.state_dict())

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in full precision for a while, as the exported policy does."""
        parts = [part for part in self.modules() if isinstance(part, (VelocityField, CriticEnsemble))]
        for part in parts:
            part.precision = "float32"
        try:
            yield
        finally:
            for part in parts:
                part.precision = self.config.precision

    @property
    def deployed(self) -> VelocityField:
        """The velocity field that acts: the policy, its average if there is one, or for `bc` the prior."""
        return self.target_policy or self.policy or self.prior

    def flow(
        self,
        field: VelocityField,
        features: Tensor,
        x_0: Float[Tensor, "*batch act"],
        inpaint: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Follow one of the fields from noise to action; see `solvers.solve`."""
        velocity, confine = field.condition(features), self.config.confine
        return integrate(velocity, x_0, self.flow_steps, self.solver, confine, self.times, inpaint)

    def act(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
    ) -> Float[Tensor, "batch act"]:
        """Chunks as the policy acts: flow, edit, clip, and the best of several.

        Args:
            features: Encoded observations.
            noise: Starts of the flow, best_of of them in a row.
            edit_noise: Noise of the edit policy; None takes its mode.
        """
        return self.choose(features, noise, edit_noise)[0]

    def choose(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
    ) -> tuple[Float[Tensor, "batch act"], Float[Tensor, "critics batch"] | None]:
        """What `act` returns, and its values by every averaged critic; None where there is no choice."""
        x_1, values = self.candidates(features, noise, edit_noise)
        if values is None:
            return x_1[0], None
        best = values.mean(dim=0).argmax(dim=0)[None, :]
        chosen = x_1.gather(0, best[:, :, None].expand(1, *x_1.shape[1:]))[0]
        return chosen, values.gather(1, best.expand(len(values), *best.shape))[:, 0]

    def candidates(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
    ) -> tuple[Float[Tensor, "samples batch act"], Float[Tensor, "critics samples batch"] | None]:
        """All chunks of which `choose` takes one, and their values; None where there is only one."""
        x_0 = noise.unflatten(-1, (self.best_of, -1)).movedim(1, 0)
        x_1 = self.flow(self.deployed, features, x_0)
        repeated = features.expand(self.best_of, *features.shape)
        if self.edit_policy is not None:
            x_1 = x_1.clamp(-1, 1)
            if edit_noise is None:
                edit = self.edit_policy.mode(repeated, x_1)
            else:
                drawn = edit_noise.unflatten(-1, (self.best_of, -1)).movedim(1, 0)
                edit, _ = self.edit_policy.sample(repeated, x_1, drawn)
            x_1 = apply_edit(x_1, edit, self.config.edit_scale)
        x_1 = x_1.clamp(-1, 1)
        if self.best_of == 1:
            return x_1, None
        values = self.values(repeated.flatten(0, 1), x_1.flatten(0, 1))
        return x_1, values.unflatten(1, (self.best_of, -1))

    def values(
        self, features: Float[Tensor, "batch features"], actions: Float[Tensor, "batch act"]
    ) -> Float[Tensor, "critics batch"]:
        """Values of chunks by every averaged critic, or by the one known value."""
        if self.known_value is not None:
            return self.known_value(self.encoder.decode(features), actions)[None]
        return self.target_critic(features, actions)


def draw_noise(
    batch_size: int, action_dim: int, config: TrainConfig, generator: torch.Generator, device: torch.device
) -> MeamNoise:
    """Draw the randomness of one update."""
    mixed = mixed_rows(batch_size, config)
    adjoint = config.objective == "adjoint"
    per_state = config.candidates if config.objective == "reweighted" else 1
    rows = 0 if adjoint else batch_size // per_state
    probes = min(config.divergence_probes, action_dim) if config.objective == "reweighted" else 0
    heads = batch_size if config.edit_scale or config.distill_coef else 0
    edits = batch_size if config.edit_scale else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    return MeamNoise(
        next_x_0=normal(batch_size, config.best_of * action_dim),
        next_edit=normal(edits, config.best_of * action_dim),
        flow_x_0=normal(batch_size, action_dim),
        flow_t=uniform(batch_size, 1),
        sde_x_0=normal(batch_size if adjoint else 0, action_dim),
        sde=normal((config.sde_steps or config.flow_steps) - 1, batch_size if adjoint else 0, action_dim),
        sample_x_0=normal(per_state, rows, action_dim),
        match_x_0=normal(_DRAWS, per_state, rows, action_dim),
        match_t=uniform(_DRAWS, per_state, rows, 1),
        probes=_orthonormal(normal(action_dim, probes).T),
        candidates=normal(config.ascent_candidates - 1, mixed, action_dim),
        bandwidth=normal(mixed, action_dim),
        accept=uniform(mixed if config.adaptive_mixture else 0),
        head_x_0=normal(heads, action_dim),
        edit=normal(edits, action_dim),
    )


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
        total = total + _critic_loss(n, features, batch, noise, config, metrics)
    if not later_stage:
        total = total + _mixture_prior_loss(n, features, batch, noise, config, metrics)
    objective = {"adjoint": _adjoint_loss, "target_score": _target_score_loss, "reweighted": _reweighted_loss}
    policy_loss = objective[config.objective](n, features, noise, config, metrics)
    metrics["policy_loss"] = policy_loss
    total = total + policy_loss + _head_losses(n, features, noise, config, metrics)
    return Losses(total, metrics)


def pretraining_losses(networks: MeamNetworks, batch: ChunkBatch, noise: MeamNoise) -> Losses:
    """The loss of an update that trains only the prior, on the data alone; all there is to `bc`."""
    features = networks.encoder(batch.observations)
    loss = _prior_loss(networks.prior, features, batch.actions, batch.valid, noise)
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


def mixed_rows(batch_size: int, config: TrainConfig) -> int:
    """Rows of a batch whose prior target is Q-maximised: a fixed number, since the rows are drawn at random anyway."""
    return max(1, round(config.mixture_weight * batch_size)) if config.mixture_weight else 0


def _orthonormal(vectors: Float[Tensor, "probes act"]) -> Float[Tensor, "probes act"]:
    """Gram-Schmidt, which a CUDA graph can capture, unlike a QR decomposition."""
    rows: list[Tensor] = []
    for vector in vectors:
        for row in rows:
            vector = vector - (vector @ row) * row
        rows.append(vector / vector.norm())
    return torch.stack(rows) if rows else vectors


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


def _critic_loss(
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


def _mixture_prior_loss(
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
    loss = _prior_loss(n.prior, features, actions, weight, noise)
    metrics["prior_loss"] = loss
    return loss


def _prior_loss(prior: VelocityField, features: Tensor, x_1: Tensor, weight: Tensor, noise: MeamNoise) -> Tensor:
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
    flowed = n.flow(n.target_prior, features, noise.candidates[::2]) if len(noise.candidates) else noise.candidates
    candidates = torch.cat([actions[None], flowed.detach(), actions + config.ascent_spread * noise.candidates[1::2]])

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


def _adjoint_loss(
    n: MeamNetworks, features: Tensor, noise: MeamNoise, config: TrainConfig, metrics: dict[str, Tensor]
) -> Tensor:
    """Adjoint matching along the policy's own memoryless SDE, relative to the averaged prior."""
    assert n.policy is not None
    prior, policy = n.target_prior.condition(features), RecordedVelocity(n.policy.condition(features))
    if config.sde == "reference":
        path = sample_memoryless_path(policy, prior, noise.sde_x_0, noise.sde)
        steps = len(path) - 1
        policy(path[-2], time_like(path[-2], (steps - 1) / steps))  # where the path follows the prior
        adjoints = lean_adjoint(prior, path, _terminal_adjoint(n, features, path[-1], config))
        with torch.no_grad():
            times = torch.stack([time_like(path[0], k / steps) for k in range(steps)])
            prior_velocity = prior(path[:-1], times)
        loss = adjoint_matching_loss
    else:
        path = sample_ancestral_path(policy, noise.sde_x_0, noise.sde, config.confine)
        terminal = _terminal_adjoint(n, features, path[-1], config)
        adjoints, prior_velocity = ancestral_adjoint(prior, path, terminal, config.confine)
        loss = ancestral_matching_loss
    metrics |= {
        "adjoint_max": adjoints[-1].abs().max(),
        "outside_box": (path[-1].abs() > 1).float().mean(),
    }
    return loss(torch.stack(policy.velocities), prior_velocity, adjoints)


def _target_score_loss(
    n: MeamNetworks, features: Tensor, noise: MeamNoise, config: TrainConfig, metrics: dict[str, Tensor]
) -> Tensor:
    """Regression on the target's score at the policy's own samples."""
    assert n.target_policy is not None
    assert n.policy is not None
    with torch.no_grad():
        x_1 = n.flow(n.target_policy, features, noise.sample_x_0[0])
    adjoint = _terminal_adjoint(n, features, x_1, config)
    score = _prior_score(n, features, x_1, config) - adjoint
    x_0, t = noise.match_x_0[:, 0], noise.match_t[:, 0]
    x_1, score = x_1.expand_as(x_0), score.expand_as(x_0)
    target = target_score_velocity(x_0, x_1, t, score)
    metrics["adjoint_max"] = adjoint.abs().max()
    return (n.policy.condition(features)(interpolate(x_0, x_1, t), t) - target).square().mean()


def _reweighted_loss(
    n: MeamNetworks, features: Tensor, noise: MeamNoise, config: TrainConfig, metrics: dict[str, Tensor]
) -> Tensor:
    """Flow matching on samples of policy and prior, weighted by the target's density over theirs.

    Per observation, a quarter of the samples comes from the prior and the others from the policy, so that no mode of
    the prior is lost; the densities are the flows' own likelihoods. Scalar densities know the weights of separated
    modes, which gradients do not. Samples lie in the box and weights are bounded, so the loss cannot diverge, whatever
    lambda, tau and the critics are, as long as tau Q is a number.

    References:
        Tong et al., Improving and Generalizing Flow-Based Generative Models, arXiv:2302.00482 (weighted flow matching).
    """
    assert n.target_policy is not None
    assert n.policy is not None
    count, rows, _ = noise.sample_x_0.shape
    of_prior = count // 4
    features = features[:rows]
    with torch.no_grad():
        x_1 = torch.cat(
            [
                n.flow(n.target_prior, features, noise.sample_x_0[:of_prior]),
                n.flow(n.target_policy, features, noise.sample_x_0[of_prior:]),
            ]
        ).clamp(-1, 1)
        repeated = features.expand(count, *features.shape)
        value = n.values(repeated.flatten(0, 1), x_1.flatten(0, 1)).mean(dim=0).view(count, rows)

    def log_density(field: VelocityField) -> Tensor:
        return log_likelihood(field.condition(features), x_1, noise.probes, config.likelihood_steps)

    log_prior, log_policy = log_density(n.target_prior), log_density(n.target_policy)
    weight = importance_weights(
        log_prior, log_policy, value, of_prior / count, config.entropy_coef, config.inverse_temperature
    )
    metrics["effective_samples"] = (1 / weight.square().sum(dim=0)).mean() / count
    x_0, t = noise.match_x_0, noise.match_t
    x_1 = x_1.expand_as(x_0)
    predicted = n.policy.condition(features)(interpolate(x_0, x_1, t), t)
    weight = (count * weight).expand(x_0.shape[:-1])
    return flow_matching_loss(predicted.flatten(0, 2), x_0.flatten(0, 2), x_1.flatten(0, 2), weight.flatten())


def _head_losses(
    n: MeamNetworks, features: Tensor, noise: MeamNoise, config: TrainConfig, metrics: dict[str, Tensor]
) -> Tensor:
    """The losses of the edit and the one-step policy, if there are any.

    Their values are those of the averaged critics, which stay as they are; the reference takes the critics themselves.
    """
    total = torch.zeros_like(features[0, 0])
    if n.edit_policy is None and n.one_step is None:
        return total
    with torch.no_grad():
        flowed = n.flow(n.deployed, features, noise.head_x_0).clamp(-1, 1)

    def value(actions: Tensor) -> Tensor:
        return n.values(features, actions).mean(dim=0)

    if n.edit_policy is not None:
        entropy = config.edit_target_entropy
        target = -0.5 * flowed.shape[-1] if entropy is None else entropy
        loss, logged = edit_loss(n.edit_policy, value, features, flowed, noise.edit, config.edit_scale, target)
        total = total + loss
        metrics |= logged
    if n.one_step is not None:
        loss, logged = distill_loss(n.one_step, value, features, noise.head_x_0, flowed, config.distill_coef)
        total = total + loss
        metrics |= logged
    return total


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
        value = n.values(features.detach(), x.clamp(-1, 1)).mean(dim=0).sum()
        (gradient,) = torch.autograd.grad(value, x)
    adjoint = -config.inverse_temperature * gradient
    if config.entropy_coef:
        score = _prior_score(n, features, x_1, config)
        outward = (x_1.abs() >= 1) & (score * x_1 < 0)
        adjoint = adjoint + config.entropy_coef * score.masked_fill(outward, 0.0)
    return adjoint


def _prior_score(n: MeamNetworks, features: Tensor, x_1: Tensor, config: TrainConfig) -> Tensor:
    """The averaged prior's score at t = 1 - score_eps and the clipped action, bounded by `score_limit`."""
    t, inside = 1 - config.score_eps, x_1.clamp(-1, 1)
    with torch.no_grad():
        velocity = n.target_prior(features, inside, time_like(inside, t))
    return score_from_velocity(inside, velocity, t).clamp(-config.score_limit, config.score_limit)

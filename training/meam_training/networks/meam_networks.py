"""All networks of a run, and how its policy acts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meam_policy.spec import Integration, PolicySpec
from meam_training.config import Precision, TrainConfig
from meam_training.flow.ode import integrate
from meam_training.networks.critic_ensemble import CriticEnsemble
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.edit_policy import EditPolicy, apply_edit
from meam_training.networks.encoder import ObservationEncoder
from meam_training.networks.known_prior import KnownField, KnownPrior
from meam_training.networks.one_step_policy import OneStepPolicy
from meam_training.networks.trust_region import Tilt, TrustRegion
from meam_training.networks.velocity_field import VelocityField

__all__ = ["KnownValue", "MeamNetworks", "build_networks"]

KnownValue = Callable[[Tensor, Tensor], Tensor]
"""Value of normalised chunks at raw observations: [batch, obs], [batch, act] -> [batch]; differentiable."""


class MeamNetworks(nn.Module):
    """Encoder, mixture prior, policy and critics of a run, with their target networks (Polyak averages).

    A `bc` run has neither policy nor critics: it deploys the prior itself. A policy trained on its own samples (every
    objective but `adjoint`) has a target network too, which draws the samples and is the network that acts.

    Args:
        spec: Dimensions and normalisation.
        config: Sizes and method.
        statistics: Location and scale of the data's actions and values, as far as the settings make use of them; None
            for neutral ones, which a checkpoint then replaces.

    Attributes:
        known_value: If set, used in place of the critics: the value of normalised chunks at raw observations,
            [batch, obs], [batch, act] -> [batch].
        known_prior: If set, the prior that the policy's losses tilt; the learned one is then only where the policy
            starts.
        integration: How the policy's ODE is integrated in training.
        confine: Whether denoised actions are clipped to the box.
        edit_scale: Bound on the edits of the edit policy, normalised action units.
        trust_region: The dual variables of the KL budget; None without a budget.
    """

    def __init__(self, spec: PolicySpec, config: TrainConfig, statistics: DataStatistics | None = None) -> None:
        super().__init__()
        action_dim, known = spec.chunk_dim, statistics or DataStatistics()
        self.integration, self.confine, self.edit_scale = config.integration, config.confine, config.edit_scale
        self._precision: Precision = config.precision
        self.known_value: KnownValue | None = None
        self.known_prior: KnownPrior | None = None
        self.encoder = ObservationEncoder(
            spec.observation_mean,
            spec.observation_std,
            config.fourier_features,
            config.fourier_scale,
            config.observation_limit,
        )
        features = self.encoder.output_dim

        def velocity_field() -> VelocityField:
            of_actions = known if config.precondition else None
            return VelocityField(
                features, action_dim, config.hidden_dims, config.precision, config.layer_norm, of_actions
            )

        self.prior = velocity_field()
        self.policy: VelocityField | None = None
        self.target_policy: VelocityField | None = None
        self.edit_policy: EditPolicy | None = None
        self.one_step: OneStepPolicy | None = None
        self.trust_region = TrustRegion.of(config)
        if config.trains_policy:
            self.policy = velocity_field()
            self.critic = CriticEnsemble(
                features,
                action_dim,
                config.critic_hidden_dims,
                config.num_critics,
                config.precision,
                known if config.normalise_values else None,
            )
            self.target_prior = copy.deepcopy(self.prior).requires_grad_(False)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
            if config.objective != "adjoint":
                self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
            if config.edit_scale:
                self.edit_policy = EditPolicy(features, action_dim, config.hidden_dims)
            if config.distill_coef:
                self.one_step = OneStepPolicy(features, action_dim, config.hidden_dims)

    def start_from_pretraining(self) -> None:
        """Copy the prior to the policy, since adjoint matching fine-tunes a given flow, and start all targets."""
        if self.policy is not None:
            for copied in (self.policy, self.target_prior, self.target_policy):
                if copied is not None:
                    copied.load_state_dict(self.prior.state_dict())
            self.target_critic.load_state_dict(self.critic.state_dict())

    def start_mirror_stage(self) -> None:
        """Make the current policy the prior of the mirror-descent stage that begins."""
        for copied in (self.prior, self.target_prior):
            copied.load_state_dict(self.deployed.state_dict())
        if self.trust_region is not None:
            self.trust_region.restart()

    def tilt(self, config: TrainConfig) -> Tilt:
        """Coefficients of the policy's target density: those of the settings, or those that spend the KL budget."""
        if self.trust_region is None:
            return Tilt(config.inverse_temperature, config.entropy_coef)
        return self.trust_region.tilt()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in full precision within the context, as the exported policy does."""
        parts = [part for part in self.modules() if isinstance(part, (VelocityField, CriticEnsemble))]
        for part in parts:
            part.precision = "float32"
        try:
            yield
        finally:
            for part in parts:
                part.precision = self._precision

    @property
    def tilted_prior(self) -> VelocityField | KnownField:
        """The prior that the policy tilts: the known one, or the learned one's target network."""
        return self.target_prior if self.known_prior is None else KnownField(self.known_prior, self.encoder)

    @property
    def deployed(self) -> VelocityField:
        """Velocity field that acts: the policy's target network, or else the policy, or else (`bc`) the prior."""
        return self.target_policy or self.policy or self.prior

    def flow(
        self,
        field: VelocityField | KnownField,
        features: Tensor,
        x_0: Float[Tensor, "*batch act"],
        integration: Integration | None = None,
        guide: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Integrate one of the velocity fields from noise to action; see `solvers.solve`.

        Args:
            field: The velocity field.
            features: Encoded observations.
            x_0: Noise.
            integration: How to integrate; None takes `self.integration`, as in training.
            guide: Modifies denoised actions.
        """
        return integrate(field.condition(features), x_0, integration or self.integration, self.confine, guide)

    def flow_together(self, field: VelocityField, starts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Integrate several sets of samples as one batch; see `flow`.

        Args:
            field: The velocity field.
            starts: Of each set the encoded observations [rows, features] and the noise [samples, rows, act].

        Returns:
            Of each set the ends of the flow [samples, rows, act].
        """
        features = [given.expand(len(x_0), -1, -1).flatten(0, 1) for given, x_0 in starts]
        ends = self.flow(field, torch.cat(features), torch.cat([x_0.flatten(0, 1) for _, x_0 in starts]))
        parts = ends.split([len(rows) for rows in features])
        return [part.view_as(x_0) for part, (_, x_0) in zip(parts, starts, strict=True)]

    def act(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
    ) -> Float[Tensor, "batch act"]:
        """Choose chunks as the deployed policy does: integrate the flow, edit, clip, and take the best of N samples.

        Args:
            features: Encoded observations.
            noise: Initial noise of the flow, `best_of` samples concatenated.
            edit_noise: Noise of the edit policy, likewise; None takes its mode.
        """
        return self.choose(features, noise, edit_noise)[0]

    def choose(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
        integration: Integration | None = None,
    ) -> tuple[Float[Tensor, "batch act"], Float[Tensor, "critics batch"] | None]:
        """Choose chunks as `act` does, and return their values according to each target critic.

        The values are None if `best_of` is 1.
        """
        return _best(*self.draw(features, noise, edit_noise, integration))

    def choose_among(
        self,
        features: Float[Tensor, "batch features"],
        x_1: Float[Tensor, "samples batch act"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
    ) -> Float[Tensor, "batch act"]:
        """Choose chunks as `act` does, given the `best_of` samples in which the flow ends."""
        return _best(*self._finished(features, x_1, edit_noise))[0]

    def draw(
        self,
        features: Float[Tensor, "batch features"],
        noise: Float[Tensor, "batch noise"],
        edit_noise: Float[Tensor, "batch noise"] | None = None,
        integration: Integration | None = None,
    ) -> tuple[Float[Tensor, "samples batch act"], Float[Tensor, "critics samples batch"] | None]:
        """Draw the samples from which `choose` takes the best; their values are None if `best_of` is 1."""
        integration = integration or self.integration
        x_0 = noise.unflatten(-1, (integration.best_of, -1)).movedim(1, 0)
        return self._finished(features, self.flow(self.deployed, features, x_0, integration), edit_noise)

    def _finished(
        self, features: Tensor, x_1: Tensor, edit_noise: Tensor | None
    ) -> tuple[Float[Tensor, "samples batch act"], Float[Tensor, "critics samples batch"] | None]:
        """Edit and clip samples of the flow [samples, batch, act]; their values are None if there is only one."""
        best_of = len(x_1)
        repeated = features.expand(best_of, *features.shape)
        if self.edit_policy is not None:
            x_1 = x_1.clamp(-1, 1)
            if edit_noise is None:
                edit = self.edit_policy.mode(repeated, x_1)
            else:
                drawn = edit_noise.unflatten(-1, (best_of, -1)).movedim(1, 0)
                edit, _ = self.edit_policy.sample(repeated, x_1, drawn)
            x_1 = apply_edit(x_1, edit, self.edit_scale)
        x_1 = x_1.clamp(-1, 1)
        if best_of == 1:
            return x_1, None
        values = self.values(repeated.flatten(0, 1), x_1.flatten(0, 1))
        return x_1, values.unflatten(1, (best_of, -1))

    def values(
        self, features: Float[Tensor, "batch features"], actions: Float[Tensor, "batch act"]
    ) -> Float[Tensor, "critics batch"]:
        """Values of chunks according to each target critic, or according to the known value if there is one."""
        if self.known_value is not None:
            return self.known_value(self.encoder.decode(features), actions)[None]
        return self.target_critic(features, actions)


def _best(x_1: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The samples of highest mean value [batch, act], and their values [critics, batch]."""
    if values is None:
        return x_1[0], None
    best = values.mean(dim=0).argmax(dim=0)[None, :]
    chosen = x_1.gather(0, best[:, :, None].expand(1, *x_1.shape[1:]))[0]
    return chosen, values.gather(1, best.expand(len(values), *best.shape))[:, 0]


def build_networks(spec: PolicySpec, config: TrainConfig, statistics: DataStatistics | None = None) -> MeamNetworks:
    """Build networks on the CPU, initialised from the config's seed; the global generator is left untouched.

    See `MeamNetworks` for the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MeamNetworks(spec, config, statistics)

"""The computation of an exported policy in PyTorch: it acts during training and is the reference for the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meam_policy.errors import ConfigError, ObservationError
from meam_policy.spec import PolicySpec
from meam_policy.typed import typed
from meam_training.flow.solvers import PREFIX_SOLVERS
from meam_training.networks.action_normaliser import ActionNormaliser
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["PolicyModule"]


class PolicyModule(nn.Module):
    """Policy from raw observations, less `spec.observation_offset`, to actions in environment units.

    Args:
        networks: Trained networks; each call reads their current weights.
        spec: Normalisation, bounds, chunk size and integration.
        one_step: Act with the one-step policy distilled from the flow.
        takes_prefix: Accept a prefix: given actions that the new chunk continues (real-time chunking).

    Raises:
        ConfigError: the one-step policy is asked for and there is none, best_of is above 1 for the one-step policy or
            without critics, or the policy cannot take a prefix.
    """

    action_offset: Tensor
    action_scale: Tensor
    action_low: Tensor
    action_high: Tensor

    @typed()
    def __init__(
        self, networks: MeamNetworks, spec: PolicySpec, one_step: bool = False, takes_prefix: bool = False
    ) -> None:
        super().__init__()
        best_of = spec.integration.best_of
        if one_step and networks.one_step is None:
            raise ConfigError(
                "The checkpoint has no one-step policy. Train with --distill-coef above 0, or export the flow."
            )
        if best_of > 1 and networks.policy is None:
            raise ConfigError(f"best_of is {best_of}; expected 1, because {spec.method} trains no critics.")
        if best_of > 1 and one_step:
            raise ConfigError(f"best_of is {best_of}; expected 1, because the one-step policy draws one chunk.")
        if takes_prefix:
            _check_prefix(networks, spec, one_step)
        self.networks, self.integration = networks, spec.integration
        self.one_step, self.takes_prefix = one_step, takes_prefix
        self.observation_dim = spec.observation_dim
        self.chunk_shape = (spec.chunk_size, spec.action_dim)
        for name, values in ActionNormaliser.of(spec)._asdict().items():
            self.register_buffer(f"action_{name}", torch.tensor(values, dtype=torch.float32), persistent=False)

    @property
    def normaliser(self) -> ActionNormaliser:
        """Action normaliser in this module's element type and on its device."""
        return ActionNormaliser(self.action_offset, self.action_scale, self.action_low, self.action_high)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Map raw observations [batch, obs] and noise [batch, noise_dim] to actions [batch, chunk_size, action_dim].

        The actions are in environment units and within the bounds.

        Raises:
            ObservationError: a tensor does not fit.
        """
        return self.decide(observation, noise)[0]

    def all_values(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Mean values [samples, batch] of the chunks among which the best is chosen.

        Raises:
            ObservationError: a tensor does not fit.
            ConfigError: the policy draws only one chunk.
        """
        self._require_inputs(observation, noise)
        _, values = self.networks.draw(self.networks.encoder(observation), noise, integration=self.integration)
        if values is None:
            raise ConfigError("The policy draws one chunk, of which there is no value; expected best_of above 1.")
        return values.mean(dim=0)

    def decide(
        self,
        observation: Tensor,
        noise: Tensor,
        prefix: Tensor | None = None,
        prefix_weight: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute all outputs of the graph.

        Args:
            observation: Raw observations [batch, obs].
            noise: Standard normal [batch, noise_dim].
            prefix: Given actions that the chunk continues [batch, chunk_size, action_dim], environment units.
            prefix_weight: Weight of each action of the prefix [batch, chunk_size], from 0 (free) to 1 (fixed).

        Returns:
            The actions and, if the best of several chunks is chosen, its value [batch] and the critics' disagreement
            about it [batch].

        Raises:
            ObservationError: a tensor does not fit.
        """
        self._require_inputs(observation, noise, prefix, prefix_weight)
        n = self.networks
        features = n.encoder(observation)
        values = None
        if self.one_step:
            assert n.one_step is not None
            x_1 = n.one_step(features, noise).clamp(-1, 1)
        elif prefix is not None and prefix_weight is not None:
            given = self.normaliser.normalise(prefix).flatten(1)
            weight = prefix_weight.repeat_interleave(self.chunk_shape[1], dim=1)

            def guide(x_1: Tensor) -> Tensor:
                # D' = w given + (1 - w) D, without derivatives of the network
                return (1 - weight) * x_1 + weight * given

            x_1 = n.flow(n.deployed, features, noise, self.integration, guide).clamp(-1, 1)
        else:
            x_1, values = n.choose(features, noise, integration=self.integration)
        actions = self.normaliser.to_environment(x_1.reshape(-1, *self.chunk_shape))
        if values is None:
            return (actions,)
        return actions, values.mean(dim=0), values.std(dim=0, correction=0)

    def _require_inputs(
        self, observation: Tensor, noise: Tensor, prefix: Tensor | None = None, prefix_weight: Tensor | None = None
    ) -> None:
        if torch.compiler.is_compiling():
            return  # a comparison would fix the size of the batch that is traced
        _require_tensor("observation", observation, (None, self.observation_dim))
        batch, (steps, size) = len(observation), self.chunk_shape
        _require_tensor("noise", noise, (batch, self.integration.best_of * steps * size))
        if prefix is not None:
            _require_tensor("prefix", prefix, (batch, steps, size))
        if prefix_weight is not None:
            _require_tensor("prefix_weight", prefix_weight, (batch, steps))


def _require_tensor(name: str, given: object, shape: tuple[int | None, ...]) -> None:
    """Refuse what is not a tensor of floats of this shape; None is any size."""
    expected = f"a tensor of floats [{', '.join('batch' if n is None else str(n) for n in shape)}]"
    if not isinstance(given, Tensor):
        raise ObservationError(f"{name} is a {type(given).__name__}; expected {expected}.")
    fits = given.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, given.shape, strict=True))
    if not fits or not given.is_floating_point():
        raise ObservationError(f"{name} is {given.dtype} {list(given.shape)}; expected {expected}.")


def _check_prefix(networks: MeamNetworks, spec: PolicySpec, one_step: bool) -> None:
    if one_step or spec.integration.best_of > 1 or networks.edit_policy is not None:
        raise ConfigError(
            "Only a flow that draws one chunk, without an edit policy, can take a prefix. Export it without rtc."
        )
    if spec.integration.solver not in PREFIX_SOLVERS:
        raise ConfigError(
            f"solver is {spec.integration.solver}; expected one of {', '.join(PREFIX_SOLVERS)} for a policy that takes "
            "a prefix."
        )

"""What an exported policy computes, in PyTorch: the reference for its graph."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from meam_policy.errors import ConfigError
from meam_policy.spec import PolicySpec
from meam_training.flow.solvers import PREFIX_SOLVERS
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["PolicyModule"]


class PolicyModule(nn.Module):
    """What the exported graph computes, in PyTorch.

    Args:
        networks: Trained networks.
        spec: Normalisation, bounds, chunk size, and how to integrate.
        one_step: Act by the one-step policy distilled from the flow.
        takes_prefix: Take the beginning of the chunk as given, so that it continues another one.

    Raises:
        ConfigError: there is no one-step policy, it was to be chosen from, there is no critic to choose by, or the
            policy cannot be told how its chunk begins.
    """

    action_offset: Tensor
    action_scale: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(
        self, networks: MeamNetworks, spec: PolicySpec, one_step: bool = False, takes_prefix: bool = False
    ) -> None:
        super().__init__()
        if one_step and networks.one_step is None:
            raise ConfigError(
                "The checkpoint has no one-step policy. Train with --distill-coef above 0, or export the flow."
            )
        if spec.best_of > 1 and not networks.config.trains_policy:
            raise ConfigError(f"best_of is {spec.best_of}; expected 1, for a {spec.method} policy has no critics.")
        if spec.best_of > 1 and one_step:
            raise ConfigError(f"best_of is {spec.best_of}; expected 1, for the one-step policy draws one chunk.")
        if takes_prefix:
            _check_prefix(networks, spec, one_step)
        self.networks = copy.copy(networks)  # the same parameters, integrated as the spec says
        self.networks.nfe, self.networks.solver = spec.nfe, spec.solver
        self.networks.times, self.networks.best_of = spec.time_grid, spec.best_of
        self.one_step, self.takes_prefix = one_step, takes_prefix
        self.chunk_shape = (spec.chunk_size, spec.action_dim)
        for name, values in (
            ("action_offset", spec.action_offset),
            ("action_scale", spec.action_scale),
            ("action_low", spec.action.low),
            ("action_high", spec.action.high),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Map raw observations [batch, obs] and noise [batch, noise_dim] to actions [batch, chunk_size, action_dim].

        The actions are in environment units and within the bounds.
        """
        return self.decide(observation, noise)[0]

    def all_values(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Mean values [samples, batch] of the chunks of which one is chosen."""
        _, values = self.networks.draw(self.networks.encoder(observation), noise)
        assert values is not None
        return values.mean(dim=0)

    def decide(
        self,
        observation: Tensor,
        noise: Tensor,
        prefix: Tensor | None = None,
        prefix_weight: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the graph computes.

        Args:
            observation: Raw observations [batch, obs].
            noise: Standard normal [batch, noise_dim].
            prefix: Where it takes one, the chunk that is continued [batch, chunk_size, action_dim], environment units.
            prefix_weight: How firmly each of its actions is given [batch, chunk_size], from 0, not at all, to 1.

        Returns:
            The actions and, where one chunk of several is chosen, its value [batch] and the critics' disagreement.
        """
        features = self.networks.encoder(observation)
        values = None
        if self.one_step:
            assert self.networks.one_step is not None
            x_1 = self.networks.one_step(features, noise).clamp(-1, 1)
        elif prefix is not None and prefix_weight is not None:
            given = ((prefix - self.action_offset) / self.action_scale).clamp(-1, 1).flatten(1)
            weight = prefix_weight.repeat_interleave(self.chunk_shape[1], dim=1)
            # D' = w given + (1 - w) D: inpainting, without derivatives of the network
            n = self.networks
            x_1 = n.flow(n.deployed, features, noise, lambda x_1: (1 - weight) * x_1 + weight * given).clamp(-1, 1)
        else:
            x_1, values = self.networks.choose(features, noise)
        actions = self.action_offset + self.action_scale * x_1.reshape(-1, *self.chunk_shape)
        # Clamped again: offset + scale may round past a bound.
        actions = torch.minimum(torch.maximum(actions, self.action_low), self.action_high)
        if values is None:
            return (actions,)
        return actions, values.mean(dim=0), values.std(dim=0, correction=0)


def _check_prefix(networks: MeamNetworks, spec: PolicySpec, one_step: bool) -> None:
    if one_step or spec.best_of > 1 or networks.edit_policy is not None:
        raise ConfigError(
            "Only a flow that draws one chunk, without an edit policy, can take a prefix. Export it without rtc."
        )
    if spec.solver not in PREFIX_SOLVERS:
        raise ConfigError(
            f"solver is {spec.solver}; expected one of {', '.join(PREFIX_SOLVERS)} for a policy that takes a prefix."
        )

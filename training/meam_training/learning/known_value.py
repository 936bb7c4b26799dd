"""Checks of a known value of actions and of a known prior, which replace learned ones."""

from __future__ import annotations

import torch
from torch import Tensor

from meam_policy.errors import ConfigError
from meam_training.config import TrainConfig
from meam_training.learning.chunk_source import ChunkSource
from meam_training.networks.known_prior import KnownPrior
from meam_training.networks.meam_networks import KnownValue

__all__ = ["check_known_prior", "check_known_value"]


def check_known_value(value: KnownValue, chunks: ChunkSource, config: TrainConfig, device: torch.device) -> None:
    """Check a known value by evaluating it on two chunks.

    Args:
        value: The known value; see `train`.
        chunks: Source of the chunks.
        config: Settings of the run.
        device: Device of the chunks.

    Raises:
        ConfigError: the value does not return one finite, differentiable number per row, or best_of is above 1.
    """
    if config.best_of > 1:
        raise ConfigError(f"best_of is {config.best_of}; expected 1 with a known value, which cannot be exported.")
    batch = chunks.sample(2, torch.Generator(device).manual_seed(0))
    actions = batch.actions.requires_grad_()
    _check_returned("value", value(batch.observations, actions), (2,), "actions" if config.trains_policy else None)


def check_known_prior(prior: KnownPrior, chunks: ChunkSource, config: TrainConfig, device: torch.device) -> None:
    """Check a known prior by evaluating it on three copies of two chunks.

    Args:
        prior: The known prior; see `train`.
        chunks: Source of the chunks.
        config: Settings of the run.
        device: Device of the chunks.

    Raises:
        ConfigError: the prior does not return finite, differentiable velocities, or the settings change the prior.
    """
    changing = {"method": not config.trains_policy, "mixture_weight": config.mixture_weight > 0}
    changing["mirror_stages"] = config.mirror_stages > 1
    for name in (name for name, changes in changing.items() if changes):
        raise ConfigError(
            f"{name} is {getattr(config, name)}, with which the policy does not tilt a known prior; leave out one of "
            "the two."
        )
    batch = chunks.sample(2, torch.Generator(device).manual_seed(0))
    states = batch.actions.expand(3, *batch.actions.shape).clone().requires_grad_()
    velocities = prior(batch.observations, states, torch.full_like(states[..., :1], 0.5))
    _check_returned("prior", velocities, tuple(states.shape), "states")


def _check_returned(name: str, returned: object, shape: tuple[int, ...], differentiable_in: str | None) -> None:
    """Refuse what a known function returned, unless it is a tensor of this shape, finite and differentiable."""
    seen = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
    if seen != shape:
        raise ConfigError(f"{name} returned {seen} for two rows; expected a tensor of shape {shape}.")
    assert isinstance(returned, Tensor)
    if not returned.isfinite().all():
        shown = ", ".join(f"{number:g}" for number in returned.flatten()[:4].tolist())
        raise ConfigError(f"{name} returned infinite or undefined numbers ({shown}, …); expected finite ones.")
    if differentiable_in is not None and not returned.requires_grad:
        raise ConfigError(
            f"{name} is not differentiable in the {differentiable_in}; expected PyTorch operations on them throughout."
        )

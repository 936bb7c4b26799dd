"""Checks of a known value of actions, which replaces learned critics."""

from __future__ import annotations

import torch
from torch import Tensor

from meam_policy.errors import ConfigError
from meam_training.config import TrainConfig
from meam_training.learning.chunk_source import ChunkSource
from meam_training.networks.meam_networks import KnownValue

__all__ = ["check_known_value"]


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
    values: object = value(batch.observations, actions)
    seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if seen != (2,):
        raise ConfigError(f"value returned {seen} for two rows; expected a tensor of shape (2,).")
    assert isinstance(values, Tensor)
    if not values.isfinite().all():
        raise ConfigError(f"value returned {values.tolist()}; expected finite numbers.")
    if config.trains_policy and not values.requires_grad:
        raise ConfigError("value is not differentiable in the actions; expected PyTorch operations on them throughout.")

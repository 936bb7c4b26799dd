"""Conversion of actions between the environment's units and the flow's."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np

from meam_policy.spec import PolicySpec

__all__ = ["ActionNormaliser"]

Array = TypeVar("Array", bound=Any)


class ActionNormaliser(NamedTuple):
    """Maps a policy's range of actions to [-1, 1] and back, on NumPy arrays or tensors, whichever its own fields are.

    Attributes:
        offset: Centre of the range [action_dim], environment units.
        scale: Half-width of the range [action_dim], environment units.
        low: Lower bounds of actions [action_dim], environment units.
        high: Upper bounds of actions [action_dim], environment units.
    """

    offset: Any
    scale: Any
    low: Any
    high: Any

    @classmethod
    def of(cls, spec: PolicySpec) -> ActionNormaliser:
        """Build a policy's normaliser, with float64 arrays."""
        numbers = (spec.action_offset, spec.action_scale, spec.action.low, spec.action.high)
        return cls(*(np.array(values) for values in numbers))

    def normalise(self, actions: Array) -> Array:
        """Convert actions [..., action_dim] from environment units to the flow's, clipped to [-1, 1]."""
        return ((actions - self.offset) / self.scale).clip(-1, 1)

    def to_environment(self, normalised: Array) -> Array:
        """Convert the flow's actions [..., action_dim] to environment units, within the bounds."""
        # Clipped although the flow's actions lie in [-1, 1]: offset + scale may round past a bound.
        return (self.offset + self.scale * normalised).clip(self.low, self.high)

"""A behaviour whose flow is known in closed form, in place of a learned prior."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from meam_training.flow.path import time_like
from meam_training.flow.velocity import Time, Velocity
from meam_training.networks.encoder import ObservationEncoder

__all__ = ["KnownField", "KnownPrior"]

KnownPrior = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Velocity of the behaviour's flow at raw observations [*batch, obs], states [..., *batch, act] and times
[..., *batch, 1], of the states' shape and differentiable in them; normalised action units per unit of flow time."""


class KnownField:
    """A known prior, conditioned on observations as a `VelocityField` is.

    Args:
        velocity: The known prior.
        encoder: Encoder of the observations.
    """

    def __init__(self, velocity: KnownPrior, encoder: ObservationEncoder) -> None:
        self._velocity, self._encoder = velocity, encoder

    def condition(self, features: Float[Tensor, "*batch features"]) -> Velocity:
        """Fix the observations, giving v(x, t)."""
        observations = self._encoder.decode(features)

        def velocity(x: Tensor, t: Time) -> Tensor:
            return self._velocity(observations, x, t if isinstance(t, Tensor) else time_like(x, t))

        return velocity

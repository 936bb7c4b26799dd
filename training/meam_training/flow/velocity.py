"""Velocities of a flow and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.input_gradient import input_gradient

__all__ = ["Jacobian", "RecordedVelocity", "Time", "Velocity", "linearize", "of_rows"]

Time = Tensor | float
"""Flow time in [0, 1]: of every row [..., 1]; or one for all rows, which costs less, a number or [] in a loop."""

Velocity = Callable[[Tensor, Any], Tensor]
"""v(x, t) with x [..., act] and a `Time` t; action units per unit of flow time."""


class RecordedVelocity:
    """Velocity that returns detached values and keeps the ones with gradients with respect to its weights.

    A path can thus be sampled, and a loss taken on its velocities, with one evaluation per step.

    Attributes:
        velocities: Values returned so far, with gradients, each [batch, act].
    """

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self.velocities: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "*batch act"], t: Time) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t, detached."""
        with torch.enable_grad():
            self.velocities.append(self._velocity(x.detach(), t))
        return self.velocities[-1].detach()


@runtime_checkable
class Jacobian(Protocol):
    """Jacobian of a velocity with respect to x at many points, accessed through its products with vectors."""

    def transposed_product(
        self, index: int | slice, covector: Float[Tensor, "*points act"]
    ) -> Float[Tensor, "*points act"]:
        """Product J^T c at the points [index] of the first axis, for one covector at each point or several."""
        ...

    def product(self, vectors: Float[Tensor, "vectors act"]) -> Float[Tensor, "vectors *batch act"]:
        """Product J u for each vector u at each point."""
        ...


def of_rows(t: Time) -> TypeGuard[Tensor]:
    """Whether every row has a flow time of its own."""
    return isinstance(t, Tensor) and t.dim() > 0


def linearize(
    velocity: Velocity, x: Float[Tensor, "*batch act"], t: Time
) -> tuple[Float[Tensor, "*batch act"], Jacobian]:
    """Evaluate a velocity and its Jacobian at many points at once; neither carries gradients.

    Velocities of this package implement this themselves (`ConditionedVelocity.linearize`); any other function is
    differentiated automatically, one product at a time.
    """
    if hasattr(velocity, "linearize"):
        return velocity.linearize(x, t)  # pyright: ignore[reportFunctionMemberAccess]
    with torch.no_grad():
        return velocity(x, t), _AutogradJacobian(velocity, x.detach(), t)


class _AutogradJacobian:
    def __init__(self, velocity: Velocity, x: Tensor, t: Time) -> None:
        self._velocity, self._x, self._t = velocity, x, t

    def transposed_product(self, index: int | slice, covector: Tensor) -> Tensor:
        if covector.dim() > self._x[index].dim():
            return torch.stack([self.transposed_product(index, part) for part in covector])
        t, covector = self._t[index] if of_rows(self._t) else self._t, covector.detach()
        return input_gradient(lambda x: self._velocity(x, t) * covector, self._x[index])

    def product(self, vectors: Tensor) -> Tensor:
        def along(vector: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: self._velocity(x, self._t), (self._x,), (vector.expand_as(self._x),))[1]

        return torch.stack([along(vector) for vector in vectors]).detach()

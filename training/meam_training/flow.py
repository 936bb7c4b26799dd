"""Flow matching on the linear path: flow time t = 0 is noise, t = 1 is action; it is never reversed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from meam_policy.spec import Solver
from meam_training.solvers import denoised, solve, uniform_times

__all__ = [
    "Jacobian",
    "RecordedVelocity",
    "Velocity",
    "denoise",
    "flow_matching_loss",
    "integrate",
    "interpolate",
    "linearize",
    "log_likelihood",
    "score_from_velocity",
    "time_like",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t) with x [..., act] and t [..., 1] in [0, 1]; action units per unit of flow time."""


def interpolate(
    x_0: Float[Tensor, "*batch act"], x_1: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch act"]:
    """The point x_t = (1 - t) x_0 + t x_1 between noise x_0 and action x_1."""
    return (1 - t) * x_0 + t * x_1


def time_like(x: Float[Tensor, "*batch act"], t: float) -> Float[Tensor, "*batch 1"]:
    """One flow time for every row of x."""
    return torch.full_like(x[..., :1], t)


def flow_matching_loss(
    predicted: Float[Tensor, "batch act"],
    x_0: Float[Tensor, "batch act"],
    x_1: Float[Tensor, "batch act"],
    weight: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Mean squared error against the conditional velocity x_1 - x_0.

    Args:
        predicted: Velocity at the interpolant of x_0 and x_1.
        x_0: Noise.
        x_1: Action.
        weight: Weight of every row; the mean divides by the batch, not by the weights.

    References:
        Lipman et al., Flow Matching for Generative Modeling, arXiv:2210.02747.
    """
    return ((predicted - (x_1 - x_0)).square().mean(dim=-1) * weight).mean()


def denoise(velocity: Velocity, x: Float[Tensor, "*batch act"], t: float, confine: bool) -> Float[Tensor, "*batch act"]:
    """The expected action E[x_1 | x_t = x] of a flow; see `solvers.denoised`.

    Args:
        velocity: Velocity of the flow.
        x: Points at flow time t.
        t: Flow time in [0, 1).
        confine: Clip to the box [-1, 1], in which the mean of actions of the box must lie.
    """
    return denoised(x, velocity(x, time_like(x, t)), t, confine)


def integrate(
    velocity: Velocity,
    x_0: Float[Tensor, "*batch act"],
    flow_steps: int,
    solver: Solver = "euler",
    confine: bool = False,
    times: Sequence[float] | None = None,
    inpaint: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch act"]:
    """Follow dx/dt = v(x, t) from noise to action; see `solvers.solve`.

    Args:
        velocity: Velocity of the flow.
        x_0: Noise.
        flow_steps: Evaluations of the velocity, K.
        solver: Integration scheme; K must be a multiple of its evaluations a step.
        confine: Clip denoised actions, and the result, to the box [-1, 1].
        times: Ends of the steps, from 0 to 1; None for equal steps.
        inpaint: Changes denoised actions.
    """

    def v(x: Tensor, t: float) -> Tensor:
        return velocity(x, time_like(x, t))

    return solve(v, x_0, times or uniform_times(flow_steps, solver), solver, confine, inpaint)


def log_likelihood(
    velocity: Velocity, x_1: Float[Tensor, "*batch act"], probes: Float[Tensor, "probes act"], steps: int
) -> Float[Tensor, "*batch"]:
    """Log density of a flow's actions: the ODE backwards by midpoint steps, with the divergence along the way.

    log p(x_1) = log N(x_0; 0, I) - the integral of div v along the path. The divergence is projected on the probes;
    their number being the action's dimension, it is exact.

    Args:
        velocity: Velocity of the flow.
        x_1: Actions; held constant.
        probes: Orthonormal rows, at most as many as there are action components.
        steps: Midpoint steps, two evaluations each.

    Returns:
        Log densities; nats, normalised action units. No gradient.

    References:
        Chen et al., Neural Ordinary Differential Equations, arXiv:1806.07366; Grathwohl et al., FFJORD,
        arXiv:1810.01367.
    """
    h, x = 1 / steps, x_1.detach()
    expansion = torch.zeros_like(x[..., 0])
    scale = probes.shape[1] / len(probes)
    directions = probes[(slice(None), *[None] * (x.dim() - 1))]
    for k in reversed(range(steps)):
        with torch.no_grad():
            middle = x - h / 2 * velocity(x, time_like(x, (k + 1) * h))
        v, jacobian = linearize(velocity, middle, time_like(middle, (k + 0.5) * h))
        expansion = expansion + h * scale * (jacobian.product(probes) * directions).sum(dim=(0, -1))
        x = x - h * v
    return -0.5 * (x.square().sum(dim=-1) + x.shape[-1] * math.log(2 * math.pi)) - expansion


class RecordedVelocity:
    """A velocity that remembers what it said, with gradients in its weights, and answers without gradients.

    So a path can be sampled and its velocities learned from without evaluating them twice.

    Attributes:
        velocities: Every answer so far, each [batch, act].
    """

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self.velocities: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch act"]:
        """Velocity at x and time t, detached."""
        with torch.enable_grad():
            self.velocities.append(self._velocity(x.detach(), t))
        return self.velocities[-1].detach()


@runtime_checkable
class Jacobian(Protocol):
    """Derivative of a velocity in x at many points, as products with it."""

    def transposed_product(self, index: int, covector: Float[Tensor, "batch act"]) -> Float[Tensor, "batch act"]:
        """J^T c at the points [index] of the first axis."""
        ...

    def product(self, vectors: Float[Tensor, "vectors act"]) -> Float[Tensor, "vectors *batch act"]:
        """J u for every vector u at every point."""
        ...


def linearize(
    velocity: Velocity, x: Float[Tensor, "*batch act"], t: Float[Tensor, "*batch 1"]
) -> tuple[Float[Tensor, "*batch act"], Jacobian]:
    """Velocity at many points in one evaluation, and its derivative there; nothing of it has a gradient.

    Velocities of this package do it themselves (`linearize` of `ConditionedVelocity`); of any other function the
    derivative is taken by automatic differentiation, point by point.
    """
    if hasattr(velocity, "linearize"):
        return velocity.linearize(x, t)  # pyright: ignore[reportFunctionMemberAccess]
    with torch.no_grad():
        return velocity(x, t), _AutogradJacobian(velocity, x.detach(), t)


class _AutogradJacobian:
    def __init__(self, velocity: Velocity, x: Tensor, t: Tensor) -> None:
        self._velocity, self._x, self._t = velocity, x, t

    def transposed_product(self, index: int, covector: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self._x[index].detach().requires_grad_()
            (product,) = torch.autograd.grad(self._velocity(x, self._t[index]), x, covector)
        return product

    def product(self, vectors: Tensor) -> Tensor:
        def along(vector: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: self._velocity(x, self._t), (self._x,), (vector.expand_as(self._x),))[1]

        return torch.stack([along(vector) for vector in vectors]).detach()


def score_from_velocity(
    x: Float[Tensor, "*batch act"], velocity: Float[Tensor, "*batch act"], t: float
) -> Float[Tensor, "*batch act"]:
    """Score of the flow's marginal density at time t < 1, from its velocity there.

    With v = E[x_1 - x_0 | x_t] and x_t = (1 - t) x_0 + t x_1, the mean noise is E[x_0 | x_t] = x - t v, and the score
    is -E[x_0 | x_t] / (1 - t).

    Returns:
        (t v - x) / (1 - t); 1 / action unit.
    """
    return (t * velocity - x) / (1 - t)

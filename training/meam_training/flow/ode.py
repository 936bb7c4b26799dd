"""Integrating the ODE of a flow from noise to action."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from meam_policy.spec import Integration
from meam_training.flow.solvers import denoised, solve
from meam_training.flow.stepping import repeat_step
from meam_training.flow.velocity import Velocity

__all__ = ["denoise", "integrate"]


def denoise(velocity: Velocity, x: Float[Tensor, "*batch act"], t: float, confine: bool) -> Float[Tensor, "*batch act"]:
    """Expected action E[x_1 | x_t = x] of a flow; see `solvers.denoised`.

    Args:
        velocity: Velocity of the flow.
        x: Points at flow time t.
        t: Flow time in [0, 1).
        confine: Clip to the box [-1, 1], which contains the mean of any actions in it.
    """
    return denoised(x, velocity(x, t), t, confine)


def integrate(
    velocity: Velocity,
    x_0: Float[Tensor, "*batch act"],
    integration: Integration,
    confine: bool = False,
    guide: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch act"]:
    """Integrate dx/dt = v(x, t) from noise to action; see `solvers.solve`.

    Args:
        velocity: Velocity of the flow.
        x_0: Noise.
        integration: Solver and its time grid.
        confine: Clip denoised actions, and the result, to the box [-1, 1].
        guide: Modifies denoised actions.
    """
    repeat = partial(repeat_step, looped=guide is None and hasattr(velocity, "linearize"))
    return solve(velocity, x_0, integration.times, integration.solver, confine, guide, repeat)

"""Integrating the ODE of a flow from noise to action."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from meam_policy.spec import Integration
from meam_training.flow.solvers import ONE_STEP_SOLVERS, denoised, one_step, solve, steered
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
    solver, times = integration.solver, integration.times
    if solver in ONE_STEP_SOLVERS and guide is None:
        # The same as `solve`, in a form that compiled code can loop over.
        def step(x: Tensor, t: Any, h: Any) -> tuple[Tensor]:
            return (one_step(lambda x, t: steered(velocity, x, t, confine), x, t, h, solver),)

        steps = [(t, u - t) for t, u in pairwise(times)]
        (x_1,) = repeat_step(step, (x_0,), steps, looped=hasattr(velocity, "linearize"))
        return x_1.clamp(-1, 1) if confine else x_1
    return solve(velocity, x_0, times, solver, confine, guide)

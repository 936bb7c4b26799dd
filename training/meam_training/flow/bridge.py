"""Adjoints on bridges between noise and a policy's own samples: adjoint matching without simulating an SDE.

A memoryless process leaves the bridges alone: given its end x_1, the state at flow time t is (1 - t) x_0 + t x_1 with
fresh noise x_0. So with x_1 from the policy's ODE, a policy tilted by a terminal reward r(x_1) = tau Q + entropy
satisfies

    E[x_1 | x_t] = D(x_t) + C E[grad r(x_1) | x_t],    C = ((1 - t)^2 / t) dD/dx,

where D(x) = x + (1 - t) v(x, t) is the prior's denoised action and C its posterior covariance. This is exact where the
prior's posterior of x_1 given x_t is Gaussian, as within a mode, and for every prior to first order in r if grad r is
constant. Across the decision between modes it is biased.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from meam_training.flow.path import interpolate
from meam_training.flow.velocity import Velocity, linearize

__all__ = ["bridge_adjoint", "tilted_velocity"]

_LEAST_TIME_LEFT = 1e-3
"""Bound on 1 - t where a velocity is computed from a denoised action."""


def bridge_adjoint(
    prior: Velocity,
    x: Float[Tensor, "*batch act"],
    t: Float[Tensor, "*batch 1"],
    terminal: Float[Tensor, "*parts_batch act"],
    confine: bool,
) -> tuple[Float[Tensor, "*parts_batch act"], Float[Tensor, "*batch act"]]:
    """Carry a covector at x_1 back to x along the prior's denoised action: the product (dD/dx)^T c.

    Args:
        prior: Velocity of the prior.
        x: Points on bridges, held constant.
        t: Their flow times.
        terminal: The covector c of each point, or several of them along leading axes.
        confine: Whether the denoised action is clipped to the box, so that no clipped component passes anything back.

    Returns:
        The product, and the prior's velocity at x. No gradients.
    """
    velocity, jacobian = linearize(prior, x, t)
    if confine:
        terminal = terminal * ((x + (1 - t) * velocity).abs() <= 1)
    return terminal + (1 - t) * jacobian.transposed_product(slice(None), terminal), velocity


def tilted_velocity(
    prior: Velocity,
    x_0: Float[Tensor, "*batch act"],
    x_1: Float[Tensor, "*batch act"],
    t: Float[Tensor, "*batch 1"],
    gradient: Float[Tensor, "*batch act"],
    entropy_coef: float | Float[Tensor, ""],
    confine: bool,
) -> Float[Tensor, "*batch act"]:
    """Regression target at x_t for the velocity of the density p_prior^(1 - lambda) exp(r), within a mode.

    The target is (1 - lambda) v + lambda (x_1 - x_0) + (dD/dx)^T [((1 - t) / t) grad r(x_1) + lambda x_0]. The entropy
    needs no score: where the posterior of x_1 given x_t is Gaussian with covariance C, C score(x_1) equals
    D(t x_1, t) - x_1, the denoised action at the bridge's noise-free point, and D is linear there. With a Gaussian
    prior, a linear r and lambda = 0 the target has no noise; with r = 0 and lambda = 0 it is the prior's velocity.

    Args:
        prior: Velocity of the prior.
        x_0: Noise.
        x_1: Samples of the policy itself.
        t: Flow times, above 0.
        gradient: Gradient of r at x_1; 1 / action unit.
        entropy_coef: Entropy coefficient lambda.
        confine: Clip the denoised action that the target implies to the box [-1, 1].

    Returns:
        The target; no gradients.
    """
    x_t = interpolate(x_0, x_1, t)
    adjoint, velocity = bridge_adjoint(prior, x_t, t, (1 - t) / t * gradient + entropy_coef * x_0, confine)
    target = (1 - entropy_coef) * velocity + entropy_coef * (x_1 - x_0) + adjoint
    if confine:
        denoised = x_t + (1 - t) * target
        target = target + (denoised.clamp(-1, 1) - denoised) / (1 - t).clamp_min(_LEAST_TIME_LEFT)
    return target

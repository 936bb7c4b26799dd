"""Adjoint matching by ancestral steps, `sde="ancestral"`; see `memoryless` for what adjoint matching is.

Over a step from t to u the denoised action x_1 and noise x_0 are frozen. The SDE is then linear, and its exact
transition is x_u = u x_1 + (1 - u)(rho x_0 + sqrt(1 - rho^2) noise), rho = t (1 - u) / (u (1 - t)), the ancestral step
of diffusion models; the adjoint is propagated back through that same step. For a Gaussian prior the adjoint is exact at
any number of steps, and no drift is singular.

References:
    Ho et al., Denoising Diffusion Probabilistic Models, arXiv:2006.11239. Domingo-Enrich et al., Adjoint Matching,
    arXiv:2409.08861.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.ode import denoise
from meam_training.flow.path import time_like
from meam_training.flow.velocity import Velocity, linearize

__all__ = ["ancestral_adjoint", "ancestral_matching_loss", "ancestral_scales", "sample_ancestral_path", "scale_steps"]


@torch.no_grad()
def sample_ancestral_path(
    policy: Velocity, x_0: Float[Tensor, "batch act"], noise: Float[Tensor, "noises batch act"], confine: bool
) -> Float[Tensor, "noises+2 batch act"]:
    """Simulate the policy's memoryless SDE by ancestral steps; the last one is noiseless.

    Args:
        policy: Velocity of the policy flow.
        x_0: Noise at t = 0.
        noise: Standard normal draws of the K - 1 stochastic steps.
        confine: Clip denoised actions to the box [-1, 1], so that x_1 lies in it.

    Returns:
        X_0 … X_K, K + 1 states.
    """
    steps = len(noise) + 1
    path = [x_0]
    for k in range(steps):
        _, scale = ancestral_scales(k, steps)
        mean = _ancestral_mean(policy, path[-1], k, steps, confine)
        path.append(mean + scale * noise[k] if k < steps - 1 else mean)
    return torch.stack(path)


def ancestral_adjoint(
    prior: Velocity, path: Float[Tensor, "states batch act"], terminal: Float[Tensor, "batch act"], confine: bool
) -> tuple[Float[Tensor, "states-1 batch act"], Float[Tensor, "states-1 batch act"]]:
    """Discrete adjoint of the ancestral scheme, propagated back through the Jacobians of the prior's steps.

    Args:
        prior: Velocity of the behaviour prior.
        path: X_0 … X_K, held constant.
        terminal: Gradient of the terminal cost at X_K; 1 / action unit.
        confine: As in `sample_ancestral_path`; no gradient passes through a clipped component.

    Returns:
        a(t_{k+1}) for k = 0 … K - 1, detached: the adjoint at the end of the step that starts at path[k]; and the
        prior's velocity at path[:-1], which is computed along the way.
    """
    steps = len(path) - 1
    times = torch.stack([time_like(path[0], k / steps) for k in range(steps)])
    velocity, jacobian = linearize(prior, path[:-1], times)
    adjoint, adjoints = terminal.detach(), []
    for k in reversed(range(steps)):
        adjoints.append(adjoint)
        if k:
            # The step is m = (c D + (1 - u) rho x) / (1 - t) with the denoised action D = x + (1 - t) v(x), clipped.
            t, u = k / steps, (k + 1) / steps
            gain, _ = ancestral_scales(k, steps)
            through = gain / (1 - t) * adjoint
            if confine:
                through = through * ((path[k] + (1 - t) * velocity[k]).abs() <= 1)
            adjoint = through + (1 - t) * jacobian.transposed_product(k, through) + _carried(t, u) * adjoint
    return torch.stack(adjoints[::-1]), velocity


def ancestral_matching_loss(
    policy_velocity: Float[Tensor, "steps batch act"],
    prior_velocity: Float[Tensor, "steps batch act"],
    adjoints: Float[Tensor, "steps batch act"],
) -> Float[Tensor, ""]:
    """Adjoint-matching loss: sum over the path of |(c / s)(v_policy - v_prior) + s a|^2, mean over the batch.

    A change dv of the velocity moves a step's mean by c dv, against noise of standard deviation s. The last step is
    noiseless, so it admits no control: there the policy is pulled towards the prior.

    Args:
        policy_velocity: Velocity of the policy at path[:-1]; the only argument with a gradient.
        prior_velocity: Velocity of the prior there.
        adjoints: From `ancestral_adjoint`.
    """
    steps = len(adjoints)
    gains, scales = zip(*(ancestral_scales(k, steps) for k in range(steps)), strict=True)
    ratios = [c / s for c, s in zip(gains[:-1], scales[:-1], strict=True)]
    ratios.append(ratios[-1] if ratios else 1.0)
    control = scale_steps(ratios, policy_velocity - prior_velocity)
    return (control + scale_steps(scales, adjoints)).square().sum(dim=(0, 2)).mean()


def scale_steps(factors: Sequence[float], values: Float[Tensor, "steps batch act"]) -> Float[Tensor, "steps batch act"]:
    """Multiply each step's values by its factor.

    The factors remain Python floats: a CUDA graph cannot copy a tensor of them from the host.
    """
    return torch.stack([factor * value for factor, value in zip(factors, values, strict=True)])


def _ancestral_mean(velocity: Velocity, x: Tensor, k: int, steps: int, confine: bool) -> Tensor:
    """Mean of step k, u x_1 + (1 - u) rho x_0: x_1 is denoised at x and t = k h, and x_0 = (x - t x_1) / (1 - t)."""
    t, u = k / steps, (k + 1) / steps
    gain, _ = ancestral_scales(k, steps)
    return gain / (1 - t) * denoise(velocity, x, t, confine) + _carried(t, u) * x


def _carried(t: float, u: float) -> float:
    """Weight of x in the mean of a step from t to u, which enters through x_0: (1 - u) rho / (1 - t)."""
    return t * (1 - u) ** 2 / (u * (1 - t) ** 2)


def ancestral_scales(k: int, steps: int) -> tuple[float, float]:
    """Scales of step k: gain c of the mean with respect to the velocity, and standard deviation s of the noise."""
    t, u = k / steps, (k + 1) / steps
    rho = t * (1 - u) / (u * (1 - t))
    return u * (1 - t) - (1 - u) * rho * t, (1 - u) * math.sqrt(1 - rho**2)

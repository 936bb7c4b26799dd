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
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.ode import denoise
from meam_training.flow.path import time_like
from meam_training.flow.solvers import denoised
from meam_training.flow.velocity import Velocity, linearize

__all__ = [
    "ancestral_adjoint",
    "ancestral_cost",
    "ancestral_kl_weights",
    "ancestral_matching_loss",
    "ancestral_scales",
    "denoised_difference",
    "geometric_kl",
    "sample_ancestral_path",
    "scale_steps",
]


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
    prior: Velocity, path: Float[Tensor, "states batch act"], terminal: Float[Tensor, "*parts batch act"], confine: bool
) -> tuple[Float[Tensor, "states-1 *parts batch act"], Float[Tensor, "states-1 batch act"]]:
    """Discrete adjoint of the ancestral scheme, propagated back through the Jacobians of the prior's steps.

    Args:
        prior: Velocity of the behaviour prior.
        path: X_0 … X_K, held constant.
        terminal: Gradient of the terminal cost at X_K, or of several parts of it; 1 / action unit.
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


def denoised_difference(
    path: Float[Tensor, "states batch act"],
    policy_velocity: Float[Tensor, "states-1 batch act"],
    prior_velocity: Float[Tensor, "states-1 batch act"],
    confine: bool,
) -> Float[Tensor, "states-1 batch act"]:
    """Difference dD of the policy's denoised action and the prior's along a path.

    Args:
        path: X_0 … X_K.
        policy_velocity: Velocity of the policy at path[:-1].
        prior_velocity: Velocity of the prior there.
        confine: As in `sample_ancestral_path`; each denoised action is clipped by itself.
    """
    steps = len(policy_velocity)
    rows = zip(path[:-1], policy_velocity, prior_velocity, strict=True)
    return torch.stack(
        [denoised(x, v, k / steps, confine) - denoised(x, u, k / steps, confine) for k, (x, v, u) in enumerate(rows)]
    )


def ancestral_kl_weights(steps: int) -> list[float]:
    """Weights w_k = (S_{k+1} - S_k) / 2 of the first K - 1 steps, S_k = (t_k / (1 - t_k))^2.

    The steps of two flows from the same point are Gaussians of equal covariance, and w_k |dD_k|^2 is the KL divergence
    of step k, where dD is the difference of the denoised actions: with gain c, noise s and dD = (1 - t) dv, this is
    (c dv / s)^2 / 2. The last step is noiseless and has none.
    """
    signal = [(k / (steps - k)) ** 2 for k in range(steps)]
    return [(after - before) / 2 for before, after in pairwise(signal)]


def geometric_kl(difference: Float[Tensor, "steps batch act"]) -> Float[Tensor, " batch"]:
    """Estimate of the policy's KL divergence from the prior: sum over the path of w_k <dD_k, dD_{k+1}>.

    The KL divergence of the two chains has |dD_k|^2 in place of the product of neighbours, and with few steps is far
    larger than that of the flows: a step from t to u tells the policies apart by how far the noise falls, and the
    denoised actions differ less at its end than at its start. With the product, the sum telescopes for a shift of any
    Gaussian to the KL divergence of the flows' marginals at t = 1 - h, at any number of steps.

    Args:
        difference: From `denoised_difference`.

    Returns:
        Nats, for each path; the mean over paths estimates the KL divergence, and may be slightly negative.
    """
    weights = ancestral_kl_weights(len(difference))
    return scale_steps(weights, (difference[:-1] * difference[1:]).sum(dim=-1)).sum(dim=0)


def ancestral_cost(adjoints: Float[Tensor, "steps batch act"]) -> Float[Tensor, "steps batch"]:
    """KL divergence of the steps that follow their adjoints: s_k^2 |a(t_{k+1})|^2 / 2.

    The regression's optimum moves a step's mean by -s^2 E[a | X_k]. Its KL divergence has |E[a | X_k]|^2 in place of
    |a|^2, so this is an upper bound.

    Args:
        adjoints: From `ancestral_adjoint`.

    Returns:
        Nats, for each step and path.
    """
    steps = len(adjoints)
    weights = [ancestral_scales(k, steps)[1] ** 2 / 2 for k in range(steps)]
    return scale_steps(weights, adjoints.square().sum(dim=-1))


def scale_steps(factors: Sequence[float], values: Float[Tensor, "steps *batch"]) -> Float[Tensor, "steps *batch"]:
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

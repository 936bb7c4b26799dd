"""Adjoint matching as published: tilting a flow by the exponential of a reward without differentiating its ODE.

The memoryless SDE of a flow has the flow's marginals, and its end point is independent of its starting point; tilting
it by the gradient of a terminal reward is therefore a regression. Everything is on the uniform grid t_k = k h,
h = 1 / K.

This is the scheme `sde="reference"`, Euler-Maruyama. As in the public code, the denominators are shifted by h, and the
adjoint evaluates the prior's drift at the end of each interval. The other scheme is in `ancestral`.

References:
    Domingo-Enrich et al., Adjoint Matching, arXiv:2409.08861. Li & Levine, Q-learning with Adjoint Matching,
    arXiv:2601.14234.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.flow.ancestral import scale_steps
from meam_training.flow.path import time_like
from meam_training.flow.velocity import Velocity, linearize

__all__ = [
    "adjoint_matching_loss",
    "lean_adjoint",
    "memoryless_cost",
    "memoryless_kl",
    "memoryless_noise_scale",
    "sample_memoryless_path",
]


def memoryless_noise_scale(k: int, steps: int) -> float:
    """Noise scale sigma at step k: sqrt(2 (1 - t + h) / (t + h)), the memoryless schedule kept finite at t = 0."""
    t, h = k / steps, 1 / steps
    return math.sqrt(2 * (1 - t + h) / (t + h))


@torch.no_grad()
def sample_memoryless_path(
    policy: Velocity,
    prior: Velocity,
    x_0: Float[Tensor, "batch act"],
    noise: Float[Tensor, "noises batch act"],
) -> Float[Tensor, "noises+2 batch act"]:
    """Simulate the policy's memoryless SDE by Euler-Maruyama steps; the last step is an Euler step of the prior's ODE.

    Args:
        policy: Velocity of the policy flow.
        prior: Velocity of the behaviour prior.
        x_0: Noise at t = 0.
        noise: Standard normal draws of the K - 1 stochastic steps.

    Returns:
        X_0 … X_K, K + 1 states.
    """
    steps = len(noise) + 1
    h = 1 / steps
    path = [x_0]
    for k in range(steps - 1):
        x, t = path[-1], k * h
        sigma = memoryless_noise_scale(k, steps)
        # x_{k+1} = x_k + h (2 v - x_k / (t + h)) + sqrt(h) sigma noise
        drift = 2 * policy(x, time_like(x, k / steps)) - x / (t + h)
        path.append(x + h * drift + math.sqrt(h) * sigma * noise[k])
    x = path[-1]
    path.append(x + h * prior(x, time_like(x, (steps - 1) / steps)))
    return torch.stack(path)


def lean_adjoint(
    prior: Velocity, path: Float[Tensor, "states batch act"], terminal: Float[Tensor, "*parts batch act"]
) -> Float[Tensor, "states-1 *parts batch act"]:
    """Integrate the lean adjoint backwards along a path.

    Takes Euler steps of da/dt = -(db/dx)^T a from a(1) = terminal, with the prior's drift b(x, t) = 2 v(x, t) - x / t
    evaluated at the end t_k + h of each interval, so that t = 0 is never reached. The policy does not enter.

    Args:
        prior: Velocity of the behaviour prior.
        path: X_0 … X_K, held constant.
        terminal: Gradient of the terminal cost at X_K, or of several parts of it; 1 / action unit.

    Returns:
        a(t_k) for k = 0 … K - 1, detached, aligned with path[:-1].
    """
    steps = len(path) - 1
    h = 1 / steps
    times = torch.stack([time_like(path[0], (k + 1) / steps) for k in range(steps)])
    _, jacobian = linearize(prior, path[:-1], times)
    adjoint, adjoints = terminal.detach(), []
    for k in reversed(range(steps)):
        # a_k = a_{k+1} + h (db/dx)^T a_{k+1}
        adjoint = adjoint + h * (2 * jacobian.transposed_product(k, adjoint) - adjoint / ((k + 1) * h))
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1])


def adjoint_matching_loss(
    policy_velocity: Float[Tensor, "steps batch act"],
    prior_velocity: Float[Tensor, "steps batch act"],
    adjoints: Float[Tensor, "steps batch act"],
) -> Float[Tensor, ""]:
    """Adjoint-matching loss: sum over the path of |(2 / sigma) (v_policy - v_prior) + sigma a|^2, mean over the batch.

    Args:
        policy_velocity: Velocity of the policy at path[:-1]; the only argument with a gradient.
        prior_velocity: Velocity of the prior there.
        adjoints: From `lean_adjoint`.
    """
    steps = len(adjoints)
    scales = [memoryless_noise_scale(k, steps) for k in range(steps)]
    control = scale_steps([2 / sigma for sigma in scales], policy_velocity - prior_velocity)
    return (control + scale_steps(scales, adjoints)).square().sum(dim=(0, 2)).mean()


def memoryless_kl(
    policy_velocity: Float[Tensor, "steps batch act"], prior_velocity: Float[Tensor, "steps batch act"]
) -> Float[Tensor, "steps batch"]:
    """KL divergence of the policy's steps from the prior's along a path: (2 h / sigma_k^2) |v_policy - v_prior|^2.

    The steps are Gaussians of variance h sigma^2 whose means differ by 2 h (v_policy - v_prior), so the sum over the
    steps is the KL divergence of the two chains. The term of the last step, which is noiseless and follows the prior,
    stands for what it would be if it were another such step, as in the public code.

    Args:
        policy_velocity: Velocity of the policy at path[:-1].
        prior_velocity: Velocity of the prior there.

    Returns:
        Nats, for each step and path; the mean over paths of their sum over steps is the KL divergence.

    References:
        Dong et al., Trust Region Q Adjoint Matching, arXiv:2605.27079, and its public code.
    """
    steps = len(policy_velocity)
    weights = [2 / steps / memoryless_noise_scale(k, steps) ** 2 for k in range(steps)]
    return scale_steps(weights, (policy_velocity - prior_velocity).square().sum(dim=-1))


def memoryless_cost(adjoints: Float[Tensor, "steps batch act"]) -> Float[Tensor, "steps batch"]:
    """KL divergence of the steps that follow their adjoints: (h / 2) sigma_k^2 |a_k|^2.

    The regression's optimum is v_policy - v_prior = -sigma^2 E[a_k | X_k] / 2. Its KL divergence has |E[a_k | X_k]|^2
    in place of |a_k|^2, so this is an upper bound.

    Args:
        adjoints: From `lean_adjoint`.

    Returns:
        Nats, for each step and path.
    """
    steps = len(adjoints)
    weights = [memoryless_noise_scale(k, steps) ** 2 / (2 * steps) for k in range(steps)]
    return scale_steps(weights, adjoints.square().sum(dim=-1))

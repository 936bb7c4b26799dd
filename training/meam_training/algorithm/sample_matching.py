"""Training a policy on samples, without an SDE: regression targets and weights whose fixed point is the target density.

The target density is p_prior^(1 - lambda) exp(tau Q), up to a constant.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "denoised_among",
    "gradient_cost",
    "importance_weights",
    "interpolant_kl",
    "target_score_velocity",
    "value_cost",
]


def importance_weights(
    log_prior: Float[Tensor, "samples batch"],
    log_policy: Float[Tensor, "samples batch"],
    value: Float[Tensor, "samples batch"],
    prior_share: float,
    entropy_coef: float | Float[Tensor, ""],
    inverse_temperature: float | Float[Tensor, ""],
) -> Float[Tensor, "samples batch"]:
    """Importance weights of samples from a mixture of prior and policy: the target density over the mixture's.

    The weights are self-normalised for each observation. With few samples this biases the fixed point towards the
    prior, in proportion to 1 / samples: with a quarter of the samples from the prior, two separated modes of prior
    masses 0.9 and 0.1, and a target mass of 0.411, the fixed point is 0.386, 0.400, 0.409 for 4, 8, 32 samples.

    Args:
        log_prior: Log densities of the samples under the prior, nats.
        log_policy: Log densities of the samples under the policy, nats.
        value: Q of the samples.
        prior_share: Share of the samples drawn from the prior, in (0, 1); the others come from the policy.
        entropy_coef: Entropy coefficient lambda.
        inverse_temperature: Inverse temperature tau.

    Returns:
        Weights in [0, 1] that sum to 1 over the samples of each observation.

    References:
        Veach & Guibas, Optimally Combining Sampling Techniques for Monte Carlo Rendering, 1995 (balance heuristic).
    """
    log_proposal = torch.logaddexp(log_prior + math.log(prior_share), log_policy + math.log(1 - prior_share))
    log_target = (1 - entropy_coef) * log_prior + inverse_temperature * value
    return torch.softmax(log_target - log_proposal, dim=0)


def denoised_among(
    x_1: Float[Tensor, "samples batch act"],
    weight: Float[Tensor, "samples batch"],
    x_t: Float[Tensor, "draws points batch act"],
    t: Float[Tensor, "draws points batch 1"],
) -> Float[Tensor, "draws points batch act"]:
    """Expected action E[x_1 | x_t] where x_1 is one of a few weighted samples, and x_t = (1 - t) x_0 + t x_1.

    If x_t is drawn from a sample in proportion to the weights, this is the exact conditional mean of that sample
    (Rao-Blackwell): a regression target without bias, of less variance than the sample itself.

    Args:
        x_1: Samples of each observation.
        weight: Their weights, 0 or more, not all 0.
        x_t: Points at flow time t.
        t: Flow times, below 1.
    """
    draws, points = x_t.shape[:2]
    x = x_t.permute(2, 0, 1, 3).flatten(1, 2)
    times = t.permute(2, 0, 1, 3).flatten(1, 2)
    samples = x_1.transpose(0, 1)
    # |x_t - t x_1|^2 without a term that all samples share.
    squares = times.square() * samples.square().sum(dim=-1)[:, None, :] - 2 * times * (x @ samples.transpose(1, 2))
    logits = weight.T.log()[:, None, :] - squares / (2 * (1 - times).square())
    return (torch.softmax(logits, dim=-1) @ samples).unflatten(1, (draws, points)).permute(1, 2, 0, 3)


def target_score_velocity(
    x_0: Float[Tensor, "*batch act"],
    x_1: Float[Tensor, "*batch act"],
    t: Float[Tensor, "*batch 1"],
    score: Float[Tensor, "*batch act"],
) -> Float[Tensor, "*batch act"]:
    """Regression target for the velocity at x_t, where x_1 is a sample of the policy itself.

    For independent x_0 and x_1, the score at x_t equals both E[grad log p(x_1) | x_t] / t and
    -E[x_0 | x_t] / (1 - t). Combined with weight t^2, the two give x_1 - x_0 + (1 - t) score + t x_0, whose fixed point
    has the given score. The score does not determine the weights of separated modes.

    Args:
        x_0: Noise.
        x_1: Samples of the policy.
        t: Flow time.
        score: Score of the target density at x_1.

    References:
        De Bortoli et al., Target Score Matching, arXiv:2402.08667.
    """
    return x_1 - x_0 + (1 - t) * score + t * x_0


def value_cost(value: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"]:
    """Leading order of the KL divergence that exp(Q) makes from a prior: half the variance of Q, Var_prior(Q) / 2.

    KL(p exp(tau Q) || p) is tau^2 Var_p(Q) / 2 to second order in tau, for any p.

    Args:
        value: Q of two or more independent samples of the prior for each observation.

    Returns:
        An unbiased estimate; nats, at tau = 1.
    """
    return value.var(dim=0, correction=1) / 2


def gradient_cost(gradient: Float[Tensor, "*batch act"]) -> Float[Tensor, "*batch"]:
    """Leading order of the KL divergence that a gradient of Q in the target's score makes: |grad Q|^2 / 6.

    `target_score_velocity` moves by (1 - t) grad Q, and the KL divergence of two flows whose velocities differ by dv is
    the integral of t / (1 - t) |dv|^2; that of t (1 - t) is 1 / 6. An upper bound, as the velocity follows the mean of
    the gradients at x_t.

    Args:
        gradient: Gradient of Q at samples of the policy; value per action unit.

    Returns:
        Nats, at tau = 1.
    """
    return gradient.square().sum(dim=-1) / 6


def interpolant_kl(
    policy_velocity: Float[Tensor, "*batch act"],
    prior_velocity: Float[Tensor, "*batch act"],
    t: Float[Tensor, "*batch 1"],
    last: float,
) -> Float[Tensor, "*batch"]:
    """KL divergence of a policy's memoryless SDE from the prior's, on interpolants of the policy's samples.

    It is the integral over t of E[t / (1 - t) |v_policy - v_prior|^2], and the interpolants have the SDE's marginals.

    Args:
        policy_velocity: Velocity of the policy at x_t.
        prior_velocity: Velocity of the prior there.
        t: Flow time, uniform in [0, 1].
        last: Flow time at which to end, below 1, where the weight is infinite.

    Returns:
        Nats; their mean is the KL divergence.
    """
    weight = torch.where(t < last, t / (1 - t), 0.0)
    return (weight * (policy_velocity - prior_velocity).square()).sum(dim=-1)

"""The trust region around the prior: a budget of KL divergence, and the temperature that spends it.

The policy maximises E[Q] + alpha H(policy) - mu KL(policy || prior): its density is p_prior^(1 - lambda) exp(tau Q) for

    tau = 1 / (mu + alpha),    lambda = min(alpha / (mu + alpha), entropy_coef).

The multiplier mu, in units of Q, is found while training: it rises while the policy's KL divergence from the prior
exceeds the budget, and falls otherwise (dual descent). It is held as mu = nu U with a unit of value U, and
alpha = e U with e = entropy_coef / (1 - entropy_coef), so that lambda equals `entropy_coef` at nu = 1, and every
budget above 0 can be met. Where nu is smaller, lambda stays: a policy that is late, or at the faces of its box, keeps
nu low, and would be spread over actions that the data never had. Two dual steps, both of the running mean of the KL
divergence:

    "log":        U = sqrt(A / budget),    log nu += rate (mean / budget - 1),
    "reference":  U = 3,                   nu += eta (mean - budget), between 0.01 and 100.

A is the running mean of the unit cost: what the policy's KL divergence would be at tau = 1 to leading order. With it,
the temperature follows any scale of Q, also while the critics still learn it, and nu only corrects the leading order.

References:
    Dong et al., Trust Region Q Adjoint Matching, arXiv:2605.27079 (TRQAM), whose public code has the reference's step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meam_training.config import Dual, TrainConfig

__all__ = [
    "TRUST_REGION_METRICS",
    "Tilt",
    "TrustRegion",
    "log_dual_step",
    "mean_cost",
    "mean_kl",
    "reference_dual_step",
]

TRUST_REGION_METRICS = ("inverse_temperature", "entropy_coef", "kl_average", "kl_target")
"""Names of the logged metrics: temperature and entropy coefficient that the update used, the running mean of the KL
divergence, and the unit cost times tau^2, what the policy's KL divergence should come to; nats per action."""

KL_RATE, KL_CLIP = 0.1, 2.0
"""Rate of the running mean of the KL divergence, and the largest estimate that enters it, in budgets; as published."""

COST_RATE = 0.01
"""Rate of the running mean of the unit cost; see `mean_cost`."""

LOG_RATE = 2e-3
"""Rate of the dual step in the logarithm: the loop's gain is twice this, whatever the scales of Q and the budget."""

LARGEST_CORRECTION = 1e3
"""Bound on nu and 1 / nu of the dual step in the logarithm. The leading order is never that wrong."""

MOST_ASKED, FOLLOWS = 4.0, 0.1
"""From how many budgets on, asked for to leading order, and below which share of the budget used, nu falls no further
in the dual step in the logarithm. A policy that hardly moves then has nothing that it could follow, such as critics
that are still noise. Without this bound nu would fall for as long as that lasts, and once the critics tell actions
apart the policy would leave its budget by a hundred times, for as long again. A policy that uses a little more than
this share without following still does. With an entropy of a third of the unit of value or more, tau is bounded by
that, and nu falls to its own bound."""

LEAST_COST = 1e-20
"""Unit cost up to which Q counts as constant; it must not ask for an infinite temperature."""

LARGEST_RISE = 16.0
"""Most that an update's unit cost may be above the running mean."""

REFERENCE_UNIT, REFERENCE_RATE, REFERENCE_RANGE = 3.0, 0.01, (0.01, 100.0)
"""The published constants `lam_scale`, `eta` and the bracket of `lam`."""


class Tilt(NamedTuple):
    """Coefficients of the policy's target density p_prior^(1 - entropy_coef) exp(inverse_temperature Q).

    Attributes:
        inverse_temperature: Inverse temperature tau, 1 / unit of value; a scalar tensor if there is a KL budget.
        entropy_coef: Entropy coefficient lambda in [0, 1); likewise.
    """

    inverse_temperature: float | Tensor
    entropy_coef: float | Tensor

    @property
    def temperature(self) -> float | Tensor:
        """Temperature 1 / tau, unit of value; 0 where tau is 0 and the policy stays at the prior."""
        tau = self.inverse_temperature
        if isinstance(tau, Tensor):
            return torch.where(tau > 0, 1 / tau, 0)
        return 1 / tau if tau > 0 else 0.0


class TrustRegion(nn.Module):
    """Dual variables of a KL budget; buffers, so that checkpoints hold them and captured updates change them in place.

    Before the first step of the log dual nothing is known about Q, and tau is 0: the first update measures the unit
    cost and leaves the policy at the prior. So does every update for as long as Q is constant.

    Args:
        budget: KL divergence of the policy from the prior, nats per action of a chunk.
        dual: The dual step.
        entropy_coef: Lambda at nu = 1, in [0, 1).

    Attributes:
        budget: The budget.
        unit: Unit of value U of the reference's dual step.
        nu: The multiplier mu in units of U.
        kl_average: Running mean of the KL divergence, nats per action.
        unit_cost: Running mean A of the unit cost, squared units of value; infinite before the first step.
    """

    nu: Tensor
    kl_average: Tensor
    unit_cost: Tensor

    def __init__(self, budget: float, dual: Dual, entropy_coef: float) -> None:
        super().__init__()
        self.budget, self.unit = budget, REFERENCE_UNIT
        self._dual: Dual = dual
        self._entropy = entropy_coef / (1 - entropy_coef)
        self._largest_coef = entropy_coef
        self.register_buffer("nu", torch.ones(()))
        self.register_buffer("kl_average", torch.zeros(()))
        self.register_buffer("unit_cost", torch.full((), math.inf))
        self.restart()

    @classmethod
    def of(cls, config: TrainConfig) -> TrustRegion | None:
        """Build the trust region that the settings ask for; None without a budget."""
        if config.kl_budget is None:
            return None
        return cls(config.kl_budget, config.kl_dual, config.entropy_coef)

    @property
    def mu(self) -> Float[Tensor, ""]:
        """Multiplier of the KL divergence, where lambda is not held at `entropy_coef`; units of value."""
        return self.nu * self._unit()

    def tilt(self) -> Tilt:
        """Coefficients of the policy's target density."""
        return Tilt(*self._coefficients())

    def restart(self) -> None:
        """Forget the policy's KL divergence, where policy or prior are replaced; the temperature stays.

        The mean starts at the budget, not at 0 as published: the policy is given time to move before it counts as too
        close to the prior.
        """
        self.kl_average.fill_(0.0 if self._dual == "reference" else self.budget)

    @torch.no_grad()
    def step(
        self, path_kl: Float[Tensor, ""], unit_cost: Float[Tensor, ""], moves: Bool[Tensor, ""]
    ) -> dict[str, Tensor]:
        """Perform the dual step of an update, in place and without reading anything from the device.

        Args:
            path_kl: Estimate of the policy's KL divergence from the prior in this update; nats per action. It may be
                negative, being a mean over few samples.
            unit_cost: Unit cost in this update; squared units of value.
            moves: Whether the update's gradient is finite; if not, nothing changes.

        Returns:
            The metrics `TRUST_REGION_METRICS`.
        """
        tau, coef = self._coefficients()
        moves = moves & path_kl.isfinite() & unit_cost.isfinite()
        average = mean_kl(self.kl_average, path_kl, self.budget)
        cost = torch.where(self._knows(), mean_cost(self.unit_cost, unit_cost), unit_cost)
        if self._dual == "log":
            nu = log_dual_step(self.nu, average, self.budget, self._entropy)
        else:
            nu = reference_dual_step(self.nu, average, self.budget)
        changes = ((self.nu, nu), (self.kl_average, average))
        for held, new in (*changes, (self.unit_cost, cost)):
            held.copy_(torch.where(moves, new, held))
        return {
            "inverse_temperature": tau,
            "entropy_coef": coef,
            "kl_average": self.kl_average.clone(),
            "kl_target": unit_cost * tau.square(),
        }

    def _knows(self) -> Bool[Tensor, ""]:
        """Whether anything is known about Q: there was a first step, and Q was not constant in it."""
        return self.unit_cost.isfinite() & (self.unit_cost > LEAST_COST)

    def _coefficients(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Inverse temperature tau and entropy coefficient lambda."""
        weight = self.nu + self._entropy
        return 1 / (weight * self._unit()), (self._entropy / weight).clamp(max=self._largest_coef)

    def _unit(self) -> Float[Tensor, ""]:
        """Unit of value U."""
        if self._dual == "reference":
            return torch.full_like(self.nu, self.unit)
        return torch.where(self._knows(), self.unit_cost / self.budget, math.inf).sqrt()


def mean_kl(average: Float[Tensor, "*batch"], kl: Float[Tensor, "*batch"], budget: float) -> Float[Tensor, "*batch"]:
    """Running mean of the KL divergence, (1 - r) average + r clip(kl, 0, c budget) with r = 0.1 and c = 2.

    Args:
        average: The mean so far; nats per action.
        kl: Estimate of this update; negative ones count as 0.
        budget: The budget; nats per action.
    """
    return (1 - KL_RATE) * average + KL_RATE * kl.clamp(0, KL_CLIP * budget)


def mean_cost(average: Float[Tensor, "*batch"], cost: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Running mean of the unit cost, arithmetic where it rises and geometric where it falls, at the rate 0.01.

    Critics often start with values of another magnitude than the data's. An arithmetic mean would forget a larger one
    only over hundreds of updates for each of its digits, and until then hold the policy at the prior; a geometric mean
    would follow rising values too late, and the policy would go too far. Where critics tell actions apart all at once,
    even the arithmetic one would: it is not below a sixteenth of this update's cost, whose square root is a quarter.

    Args:
        average: The mean so far.
        cost: This update's.
    """
    falling = average.clamp(min=LEAST_COST) ** (1 - COST_RATE) * cost.clamp(min=LEAST_COST) ** COST_RATE
    rising = torch.maximum(average + COST_RATE * (cost - average), cost / LARGEST_RISE)
    return torch.where(cost > average, rising, falling)


def log_dual_step(
    nu: Float[Tensor, "*batch"], average: Float[Tensor, "*batch"], budget: float, entropy: float = 0.0
) -> Float[Tensor, "*batch"]:
    """Step of the multiplier in its logarithm: log nu + rate (average / budget - 1), bounded against overflow.

    It stays where the policy does not follow what is asked of it already (anti-windup): less than a tenth of the
    budget is used, and 1 / (nu + e)^2 budgets, the leading order of what is asked for, are more than four.

    Args:
        nu: The multiplier.
        average: Running mean of the KL divergence; nats per action.
        budget: The budget; nats per action.
        entropy: The constant e of the entropy, in units of U like nu.
    """
    moved = nu * (LOG_RATE * (average / budget - 1)).exp()
    waits = ((nu + entropy).square() * MOST_ASKED < 1) & (average < FOLLOWS * budget)
    return torch.where(waits, nu, moved).clamp(1 / LARGEST_CORRECTION, LARGEST_CORRECTION)


def reference_dual_step(
    nu: Float[Tensor, "*batch"], average: Float[Tensor, "*batch"], budget: float
) -> Float[Tensor, "*batch"]:
    """Step of the multiplier as published: nu + eta (average - budget), within [0.01, 100].

    Args:
        nu: The multiplier, `lam` in the public code.
        average: Running mean of the KL divergence; nats per action.
        budget: The budget; nats per action.
    """
    return (nu + REFERENCE_RATE * (average - budget)).clamp(*REFERENCE_RANGE)

"""The fixed points of the objectives without any learning error: exact prior, tabulated policy, many samples.

    python benchmarks/accuracy/fixed_point.py

One dimension, prior 0.9 N(-0.5, 0.15^2) + 0.1 N(0.5, 0.15^2), Q = -2 (a - 0.5)^2, tau = 1. Every objective iterates its
own regression, by the functions that training uses, on a table of the policy's velocity instead of a network. Prints
normalised W1 = W1(policy, target) / W1(prior, target) against K, the velocity evaluations of the deployed ODE, which
are also the SDE's steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from meam_policy.spec import Integration, Solver
from meam_training.algorithm.sample_matching import importance_weights, target_score_velocity
from meam_training.flow.ancestral import ancestral_adjoint, ancestral_scales, sample_ancestral_path
from meam_training.flow.likelihood import log_likelihood
from meam_training.flow.memoryless import lean_adjoint, memoryless_noise_scale, sample_memoryless_path
from meam_training.flow.ode import integrate
from meam_training.flow.path import interpolate, time_like
from meam_training.flow.velocity import Velocity

WEIGHTS, MEANS, STDS = torch.tensor([0.9, 0.1]), torch.tensor([-0.5, 0.5]), torch.tensor([0.15, 0.15])
TAU = 1.0
GRID = torch.linspace(-3, 3, 6001)
CANDIDATES, LIKELIHOOD_STEPS = 8, 5
TIMES = 33
"""Nodes of the table's time axis, where the objective has no grid of its own."""
ITERATIONS, DAMPING = 60, 0.3


def value(a: Tensor) -> Tensor:
    """Q, row by row."""
    return -2 * (a[..., 0] - 0.5).square()


def log_prior(a: Tensor) -> Tensor:
    """The prior's log density."""
    squared = ((a - MEANS) / STDS).square()
    return torch.logsumexp(WEIGHTS.log() - STDS.log() - 0.5 * squared, dim=-1) - 0.5 * np.log(2 * np.pi)


def prior(x: Tensor, t: Tensor) -> Tensor:
    """The prior's exact velocity E[x_1 - x_0 | x_t = x]."""
    variance = (t * STDS).square() + (1 - t).square()
    d = x - t * MEANS
    share = torch.softmax(WEIGHTS.log() - 0.5 * variance.log() - 0.5 * d.square() / variance, dim=-1)
    # Of a component N(m, s^2): m + (t s^2 - (1 - t)) / variance d
    slope = (t * STDS.square() - (1 - t)) / variance
    return (share * (MEANS + slope * d)).sum(dim=-1, keepdim=True)


def gradient(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """Derivative of a row-wise function."""
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        return torch.autograd.grad(function(a).sum(), a)[0]


class TabulatedPolicy:
    """The prior's velocity plus a correction on a table, bilinear in time and place.

    Args:
        times: Nodes of flow time.
    """

    def __init__(self, times: Tensor, bins: int = 241, limit: float = 4.0) -> None:
        self.times, self.limit, self.bins = times, limit, bins
        self.table = torch.zeros(len(times), bins)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity."""
        if not self.table.any():
            return prior(x, t)
        i = torch.searchsorted(self.times, t[..., 0].contiguous(), right=True).sub(1).clamp(0, len(self.times) - 2)
        place = ((x[..., 0] + self.limit) / (2 * self.limit) * (self.bins - 1)).clamp(0, self.bins - 1.001)
        j, part = place.floor().long(), place - place.detach().floor()
        when = ((t[..., 0] - self.times[i]) / (self.times[i + 1] - self.times[i])).clamp(0, 1)
        early = self.table[i, j] * (1 - part) + self.table[i, j + 1] * part
        late = self.table[i + 1, j] * (1 - part) + self.table[i + 1, j + 1] * part
        return prior(x, t) + (early * (1 - when) + late * when)[..., None]

    def fit(self, node: int, x: Tensor, correction: Tensor, weight: Tensor, damping: float) -> None:
        """Move one time's row towards the weighted mean correction in every bin, smoothed over neighbours."""
        index = ((x + self.limit) / (2 * self.limit) * (self.bins - 1)).round().long().clamp(0, self.bins - 1)
        kernel = torch.exp(-0.5 * torch.arange(-3.0, 4.0).square())
        count, total = (
            np.convolve(torch.bincount(index, w, minlength=self.bins).numpy(), kernel.numpy(), "same")
            for w in (weight, weight * correction)
        )
        known = count > 3
        centres = np.arange(self.bins)
        row = np.interp(centres, centres[known], total[known] / count[known])
        self.table[node] = (1 - damping) * self.table[node] + damping * torch.from_numpy(row).to(self.table.dtype)


def train_by_sde(scheme: str, steps: int, entropy_coef: float, samples: int) -> Velocity:
    """Iterate adjoint matching on the SDE's own grid."""
    policy = TabulatedPolicy(torch.arange(steps) / steps)
    for damping in _dampings():
        x_0, noise = torch.randn(samples, 1), torch.randn(steps - 1, samples, 1)
        if scheme == "reference":
            path = sample_memoryless_path(policy, prior, x_0, noise)
        else:
            path = sample_ancestral_path(policy, x_0, noise, confine=False)
        terminal = -TAU * gradient(value, path[-1]) + entropy_coef * gradient(log_prior, path[-1])
        if scheme == "reference":
            adjoints = lean_adjoint(prior, path, terminal)
            gains = [0.5 * memoryless_noise_scale(k, steps) ** 2 for k in range(steps)]
        else:
            adjoints, _ = ancestral_adjoint(prior, path, terminal, confine=False)
            gains = [s**2 / c for c, s in (ancestral_scales(k, steps) for k in range(steps))]
        for k, gain in enumerate(gains):
            policy.fit(k, path[k, :, 0], -gain * adjoints[k, :, 0], torch.ones(samples), damping)
    return policy


def train_on_samples(
    objective: str, solver: Solver, evaluations: int, entropy_coef: float, samples: int
) -> TabulatedPolicy:
    """Iterate an objective that needs no SDE."""
    policy = TabulatedPolicy(torch.linspace(0, 1, TIMES))
    rows, of_prior = samples // CANDIDATES, CANDIDATES // 4
    for damping in _dampings():
        x_0 = torch.randn(CANDIDATES, rows, 1)
        if objective == "target_score":
            x_1 = integrate(policy, x_0, Integration(evaluations, solver))
            weight = torch.ones(CANDIDATES, rows)
        else:
            x_1 = torch.cat(
                [
                    integrate(f, x, Integration(evaluations, solver))
                    for f, x in zip((prior, policy), x_0.split([of_prior, CANDIDATES - of_prior]), strict=True)
                ]
            )
            before, now = (log_likelihood(f, x_1, torch.eye(1), LIKELIHOOD_STEPS) for f in (prior, policy))
            share = of_prior / CANDIDATES
            weight = CANDIDATES * importance_weights(before, now, value(x_1), share, entropy_coef, TAU)
        x_1, weight = x_1.flatten(0, 1), weight.flatten()
        score = (1 - entropy_coef) * gradient(log_prior, x_1) + TAU * gradient(value, x_1)
        for node, time_ in enumerate(policy.times.tolist()):
            x_0, t = torch.randn_like(x_1), time_like(x_1, time_)
            x_t = interpolate(x_0, x_1, t)
            target = target_score_velocity(x_0, x_1, t, score) if objective == "target_score" else x_1 - x_0
            policy.fit(node, x_t[:, 0], (target - prior(x_t, t))[:, 0], weight, damping)
    return policy


def normalised_error(policy: Velocity, solver: Solver, evaluations: int, entropy_coef: float) -> tuple[float, float]:
    """Normalised W1 of the deployed policy, and its mass above 0."""
    x_1 = integrate(policy, torch.randn(100_000, 1), Integration(evaluations, solver))[:, 0]
    grid = GRID[:, None]
    target = torch.softmax((1 - entropy_coef) * log_prior(grid) + TAU * value(grid), dim=0).cumsum(0)
    start = torch.softmax(log_prior(grid), dim=0).cumsum(0)
    reached = torch.searchsorted(x_1.sort().values, GRID, right=True) / len(x_1)
    return ((reached - target).abs().sum() / (start - target).abs().sum()).item(), (x_1 > 0).float().mean().item()


def _dampings() -> list[float]:
    return [DAMPING if i < ITERATIONS * 2 // 3 else DAMPING / 3 for i in range(ITERATIONS)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30_000, help="samples of an iteration")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50], help="values of K")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, Solver, Callable[[int, float], Velocity]]] = [
        ("reference, Euler", "euler", lambda k, e: train_by_sde("reference", k, e, arguments.samples)),
        ("ancestral, Euler", "euler", lambda k, e: train_by_sde("ancestral", k, e, arguments.samples)),
        ("ancestral, midpoint", "midpoint", lambda k, e: train_by_sde("ancestral", k, e, arguments.samples)),
        (
            "target score, midpoint",
            "midpoint",
            lambda k, e: train_on_samples("target_score", "midpoint", k, e, arguments.samples),
        ),
        ("reweighted, Euler", "euler", lambda k, e: train_on_samples("reweighted", "euler", k, e, arguments.samples)),
        (
            "reweighted, midpoint",
            "midpoint",
            lambda k, e: train_on_samples("reweighted", "midpoint", k, e, arguments.samples),
        ),
    ]
    settings = [(e, k) for e in (0.0, 0.5, 0.9) for k in arguments.steps]
    print("| scheme | " + " | ".join(f"lambda {e:g}, K = {k}" for e, k in settings) + " |")
    print("|---" * (len(settings) + 1) + "|", flush=True)
    start = time.perf_counter()
    for name, solver, run in rows:
        cells = []
        for entropy_coef, k in settings:
            torch.manual_seed(0)
            policy = run(k, entropy_coef)
            cells.append(f"{normalised_error(policy, solver, k, entropy_coef)[0]:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s on one thread.")


if __name__ == "__main__":
    main()

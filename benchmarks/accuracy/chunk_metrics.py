"""How far a sample of chunks is from its target: sliced W1, masses of modes, shift and width inside them."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from chunks import Chunks, Mixture
from numpy.typing import NDArray

__all__ = ["ChunkMeasures", "ChunkTarget", "effective_share", "resample"]

DIRECTIONS = 64
"""Half of them lie in the plane of the mode axis and the smooth axis, the others anywhere."""
LEAST_MASS, LEAST_SAMPLES = 0.05, 20
"""A mode of less target mass, or with fewer samples, is left out of what is measured inside modes."""
PROPOSED = 6
"""Draws of the proposal per sample of a target that needs importance sampling."""

Array = NDArray[np.float64]


class ChunkMeasures(TypedDict):
    """Distances of a sample from its target; each is averaged over the observations.

    Attributes:
        normalised_w1: Sliced W1(sample, target) / W1(prior, target).
        mass_error: Total variation between the masses of the modes.
        shift_error: Error of the mean inside a mode along the smooth axis, in standard deviations of the prior's
            modes; below zero if it is moved less than the target is. None if no mode has enough samples.
        shift_distance: The same without its sign.
        stiff_log_variance: Log ratio of the variances inside a mode, sample to target, along the stiffest axis.
        smooth_log_variance: The same along the smooth axis.
        mode_mass: Masses of the modes.
    """

    normalised_w1: float
    mass_error: float
    shift_error: float | None
    shift_distance: float | None
    stiff_log_variance: float | None
    smooth_log_variance: float | None
    mode_mass: list[float]


def resample(points: Array, log_weights: Array, count: int, generator: np.random.Generator) -> Array:
    """Draw `count` of the points [n, dim], with replacement, in proportion to their weights [n]."""
    weights = np.exp(log_weights - log_weights.max())
    return points[generator.choice(len(points), count, p=weights / weights.sum())]


def effective_share(log_weights: Array) -> float:
    """Effective sample size of weights [n], as a share of n."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / np.square(weights).sum() / len(weights))


class ChunkTarget:
    """The target of a run, by samples.

    Args:
        run: The run.
        samples: Samples of the target, divided equally among the observations.

    Attributes:
        samples: Samples of the target [observations, n, dim].
        effective: Smallest effective share of the importance sampling over the observations; 1 if there is none.
        mode_mass: The target's masses of the modes, averaged over the observations [modes].
        prior_w1: Mean sliced W1 of the prior to the target: the unit of `normalised_w1`.
    """

    def __init__(self, run: Chunks, samples: int) -> None:
        self.run, self.effective = run, 1.0
        count = samples // len(run.observations)
        generator = np.random.default_rng([run.dim, len(run.masses), 1])
        drawn = []
        for observation in run.observations:
            proposal = run.proposal(observation)
            points = proposal.sample(count if run.exact else PROPOSED * count, generator)
            if not run.exact:
                weights = run.log_correction(observation, points)
                self.effective = min(self.effective, effective_share(weights))
                points = resample(points, weights, count, generator)
            drawn.append(points)
        self.samples = np.stack(drawn)
        plane = generator.standard_normal((DIRECTIONS // 2, 2)) @ np.stack([run.mode_axis, run.smooth_axis])
        directions = np.concatenate([plane, generator.standard_normal((DIRECTIONS // 2, run.dim))])
        self._directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        self._quantiles = [self._project(points) for points in self.samples]
        self.mode_mass = np.mean([self._masses(points) for points in self.samples], axis=0)
        prior = [run.prior.sample(count, generator) for _ in self.samples]
        self.prior_w1 = self._w1(prior)

    def measure(self, samples: Array) -> ChunkMeasures:
        """Compare samples [observations, n, dim] with the target; n is that of `self.samples`."""
        inside = [
            measured
            for observation, points, target in zip(self.run.observations, samples, self.samples, strict=True)
            if (measured := self._inside(observation, points, target)) is not None
        ]
        shift, distance, stiff, smooth = np.mean(inside, axis=0).tolist() if inside else [None] * 4
        masses = [
            (self._masses(points), self._masses(target)) for points, target in zip(samples, self.samples, strict=True)
        ]
        return ChunkMeasures(
            normalised_w1=self._w1(samples) / self.prior_w1,
            mass_error=float(np.mean([np.abs(found - wanted).sum() / 2 for found, wanted in masses])),
            shift_error=shift,
            shift_distance=distance,
            stiff_log_variance=stiff,
            smooth_log_variance=smooth,
            mode_mass=np.mean([found for found, _ in masses], axis=0).tolist(),
        )

    def floor(self, evaluations: int, seed: int = 0) -> ChunkMeasures:
        """What the exact velocity reaches with midpoint steps of `evaluations` evaluations in all.

        Where the target is no mixture, the flow is its proposal's, and its samples are resampled by the exact ratio.
        """
        generator = np.random.default_rng([seed, 2])
        found = []
        for observation, target in zip(self.run.observations, self.samples, strict=True):
            count = len(target) if self.run.exact else PROPOSED * len(target)
            noise = generator.standard_normal((count, self.run.dim))
            points = _integrate(self.run.proposal(observation), noise, evaluations // 2).clip(-1, 1)
            if not self.run.exact:
                points = resample(points, self.run.log_correction(observation, points), len(target), generator)
            found.append(points)
        return self.measure(np.stack(found))

    def _project(self, points: Array) -> Array:
        return np.sort(points @ self._directions.T, axis=0)

    def _w1(self, samples: list[Array] | Array) -> float:
        pairs = zip(samples, self._quantiles, strict=True)
        return float(np.mean([np.abs(self._project(points) - quantiles).mean() for points, quantiles in pairs]))

    def _modes(self, points: Array) -> Array:
        means = self.run.prior.means
        return (np.square(means).sum(axis=1) - 2 * points @ means.T).argmin(axis=1)

    def _masses(self, points: Array) -> Array:
        return np.bincount(self._modes(points), minlength=len(self.run.prior.means)) / len(points)

    def _inside(self, observation: Array, points: Array, target: Array) -> list[float] | None:
        """Signed and unsigned shift error and the two log variance ratios, weighed by the modes' target masses."""
        found, wanted = self._modes(points), self._modes(target)
        axes = np.stack([self.run.smooth_axis, self.run.prior.axes[:, self.run.prior.variances.argmin()]], axis=1)
        rows, weights = [], []
        for mode in range(len(self.run.prior.means)):
            mine, theirs = points[found == mode] @ axes, target[wanted == mode] @ axes
            if len(theirs) < LEAST_MASS * len(target) or min(len(mine), len(theirs)) < LEAST_SAMPLES:
                continue
            error = (mine.mean(axis=0) - theirs.mean(axis=0))[0] / self.run.smooth_std
            smooth, stiff = np.log(mine.var(axis=0) / theirs.var(axis=0))
            rows.append([error * np.sign(self.run.shift_at(observation)), abs(error), stiff, smooth])
            weights.append(len(theirs))
        return np.average(rows, axis=0, weights=weights).tolist() if rows else None


def _integrate(mixture: Mixture, points: Array, steps: int) -> Array:
    """Midpoint steps of the flow from noise [n, dim] to the mixture."""
    width = 1 / steps
    for step in range(steps):
        middle = points + width / 2 * mixture.velocity(points, step * width)
        points = points + width * mixture.velocity(middle, (step + 0.5) * width)
    return points

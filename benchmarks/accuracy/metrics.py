"""How far a sample is from its target: (sliced) Wasserstein-1 distances and the masses of modes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from problems import Context, Grid, Run

__all__ = ["Target", "mode_masses", "projected_cdf", "wasserstein"]

DIRECTIONS = 64
"""Directions of the sliced distance in two dimensions, equally spaced over half a turn."""
BINS = 4000
FLOOR_SAMPLES = 8

Array = NDArray[np.float64]


def projected_cdf(points: Array, masses: Array | None = None) -> Array:
    """Distribution functions of points in the box, projected on fixed directions.

    Args:
        points: [n, dim], dim 1 or 2.
        masses: Their weights [n], summing to 1; None weighs them equally.

    Returns:
        [directions, BINS]: the mass up to each of BINS equal steps across the box, its diagonal in two dimensions.
    """
    count, dim = points.shape
    angles = np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    directions = np.ones((1, 1)) if dim == 1 else np.stack([np.cos(angles), np.sin(angles)], axis=1)
    half = np.sqrt(dim)
    cdf = np.empty((len(directions), BINS))
    for row, direction in enumerate(directions):
        bins = ((points @ direction + half) * (BINS / (2 * half))).astype(np.intp).clip(0, BINS - 1)
        cdf[row] = np.cumsum(np.bincount(bins, masses, BINS))
    return cdf if masses is not None else cdf / count


def wasserstein(first: Array, second: Array, dim: int) -> float:
    """Wasserstein-1 distance, in action units, between two distributions as `projected_cdf` gives them.

    In two dimensions it is the sliced distance: the mean over the directions.
    """
    return float(np.abs(first - second).mean() * 2 * np.sqrt(dim))


def mode_masses(context: Context, points: Array, masses: Array | None = None) -> Array:
    """Share of points [n, dim] nearest to each of the context's modes [modes]; `masses` as in `projected_cdf`."""
    distance = np.square(points[:, None] - context.modes).sum(axis=2)
    weights = np.full(len(points), 1 / len(points)) if masses is None else masses
    return np.bincount(distance.argmin(axis=1), weights, len(context.modes)).astype(np.float64)


class Target:
    """What a policy should reach in one context of a run, and how close a perfect sampler gets.

    Args:
        run: The setting.
        context: The context.
        grid: Cells on which the densities are computed.

    Attributes:
        prior_w1: Distance of the mixture prior to the target, action units: the unit of `normalised_w1`.
        mode_mass: The target's mass near each mode [modes].
        prior_mode_mass: The prior's mass near each mode [modes].
    """

    def __init__(self, run: Run, context: Context, grid: Grid) -> None:
        self._grid, self._mass, self._dim = grid, run.target(context, grid), run.dim
        prior = run.prior(context, grid)
        self._cdf = projected_cdf(grid.points, self._mass)
        self.prior_w1 = wasserstein(projected_cdf(grid.points, prior), self._cdf, run.dim)
        self.mode_mass = mode_masses(context, grid.points, self._mass)
        self.prior_mode_mass = mode_masses(context, grid.points, prior)

    def normalised_w1(self, samples: Array) -> float:
        """W1(samples, target) / W1(prior, target) of samples [n, dim]: 0 is perfect, 1 as far off as the prior."""
        return wasserstein(projected_cdf(samples), self._cdf, self._dim) / self.prior_w1

    def floor(self, count: int) -> float:
        """Expected normalised W1 of `count` independent samples of the target itself."""
        generator = np.random.default_rng(0)
        drawn = (self._grid.sample(self._mass, count, generator) for _ in range(FLOOR_SAMPLES))
        return float(np.mean([self.normalised_w1(samples) for samples in drawn]))

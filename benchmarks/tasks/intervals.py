"""Means over tasks and seeds, with 95 % stratified bootstrap intervals, and probabilities of improvement.

The figures are those of rliable. The package itself is not used: its release 1.2.0 needs an arch below 8, of which the
last, 7.2, does not load with pandas 3.1; and its intervals take NumPy's global generator, whatever seed they are given.

References:
    Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv:2108.13264.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimate", "improvement", "iqm", "mean_over_tasks"]

Array = NDArray[np.float64]
Scores = Sequence[Array]
"""Of every task the scores of its runs [..., seeds]."""

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_over_tasks(scores: Scores) -> Array:
    """Mean over the tasks of the mean over their seeds [...]."""
    return np.mean([task.mean(axis=-1) for task in scores], axis=0)


def iqm(scores: Scores) -> Array:
    """Interquartile mean over all runs of all tasks [...]: without the lowest and the highest quarter of the runs."""
    runs = np.sort(np.concatenate(list(scores), axis=-1), axis=-1)
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(axis=-1)


def improvement(ours: Scores, theirs: Scores) -> Array:
    """Mean over the tasks of the probability that one of our runs scores more than one of theirs; ties count half."""
    by_task = []
    for one, other in zip(ours, theirs, strict=True):
        difference = one[..., :, None] - other[..., None, :]
        by_task.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
    return np.mean(by_task, axis=0)


def estimate(
    figure: Callable[..., Array], *methods: Mapping[str, Array], resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A figure and its interval, by the percentile bootstrap.

    Within every task seeds are drawn, and within every drawn seed its episodes: with one seed the interval is that of
    the episodes, and with several it is at least as wide as one over the seeds alone.

    Args:
        figure: `mean_over_tasks` or `iqm` of one method, `improvement` of two.
        *methods: Of every method the episodes [seeds, episodes] by task; the same tasks for all.
        resamples: Bootstrap resamples.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    drawn = [[_resampled(method[task], resamples, generator) for task in methods[0]] for method in methods]
    low, high = np.quantile(figure(*drawn), [0.025, 0.975])
    found = [[method[task].mean(axis=1) for task in methods[0]] for method in methods]
    return Estimate(float(figure(*found)), float(low), float(high))


def _resampled(episodes: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Scores of the drawn runs [resamples, seeds]."""
    seeds, count = episodes.shape
    rows = generator.integers(seeds, size=(resamples, seeds, 1))
    return episodes[rows, generator.integers(count, size=(resamples, seeds, count))].mean(axis=-1)

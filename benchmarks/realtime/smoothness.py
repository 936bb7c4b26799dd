"""How smooth the executed actions of an episode are, within action chunks and where one chunk takes over from another.

All in half widths of the action space: 2 is the way from one bound to the other. Means are over action numbers too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Smoothness", "smoothness"]


@dataclass(frozen=True)
class Smoothness:
    """What `smoothness` measures; NaN where the episode has no such tick.

    Attributes:
        jerk: Mean of (a_t - 2 a_{t-1} + a_{t-2})^2 over all ticks.
        boundary_jump: Mean |a_t - a_{t-1}| at the first actions of new chunks.
        inner_jump: Mean |a_t - a_{t-1}| at the other actions that come from a chunk.
    """

    jerk: float
    boundary_jump: float
    inner_jump: float


def smoothness(
    actions: ArrayLike,
    begins_chunk: ArrayLike,
    held: ArrayLike,
    half_width: ArrayLike,
) -> Smoothness:
    """Measure one episode.

    Args:
        actions: What was executed [ticks, action_dim], environment units.
        begins_chunk: Whether a tick's action is the first one executed of its chunk [ticks]. The one that opens the
            episode follows nothing, and does not count.
        held: Whether a tick had no action of a chunk, and got the last one again [ticks]. Counts in the jerk alone.
        half_width: Of the action space [action_dim], above 0.
    """
    scaled = np.asarray(actions, dtype=np.float64) / np.asarray(half_width, dtype=np.float64)
    jumps = np.abs(np.diff(scaled, axis=0)).mean(axis=1)
    boundary, still = np.asarray(begins_chunk, dtype=bool)[1:], np.asarray(held, dtype=bool)[1:]
    return Smoothness(
        jerk=_mean(np.diff(scaled, n=2, axis=0) ** 2),
        boundary_jump=_mean(jumps[boundary]),
        inner_jump=_mean(jumps[~boundary & ~still]),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")

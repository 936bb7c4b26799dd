"""The range of a data set's actions that a policy is scaled by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meam_policy.spec import BoxSpec
from meam_training.data.dataset_cache import rows_per_block

__all__ = ["RANGE_MARGIN", "action_range"]

RANGE_MARGIN = 0.1
"""Margin on either side of the data's range, as a share of its width: a range estimated from data is a little short,
and the ends of [-1, 1], where the flow's actions are clipped, should hold no actions but those at the box's bounds.
Data that fill five sixths of the box are scaled by the box itself."""

TAIL = 1e-3
"""Share of the data on either side that is judged apart: an action there belongs to the range as long as it lies within
one width of the rest. That is 9 standard deviations of a normal distribution; what is farther away is a fault."""

LEAST_WIDTH = 1e-3
"""Least half width, as a share of the action's size or of 1 if that is larger: an action that never moved has none."""


def action_range(actions: NDArray[np.float32], box: BoxSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Robust range of every number of an action, with a margin, within the box.

    The least and the largest value count, except for those that lie farther from the bulk of the data (between the
    quantiles `TAIL` and 1 - `TAIL`) than the bulk is wide: these are left out, and clipped to the range in training.

    Args:
        actions: Actions of the data [n, action_dim]; evenly spaced rows count, a block of them.
        box: Box of the actions; low and high may be equal.

    Returns:
        Lower and upper ends [action_dim], environment units; the lower one is below the upper, except where the box's
        are equal.
    """
    low, high = np.array(box.low), np.array(box.high)
    some = np.asarray(actions[:: -(-len(actions) // rows_per_block(box.size))], np.float64).clip(low, high)
    # A quantile of a few rows is the least or largest of them.
    bulk = np.quantile(some, (TAIL, 1 - TAIL), axis=0, method="closest_observation")
    width = bulk[1] - bulk[0]
    reach = np.where(width > 0, width, np.inf)  # an action that rests but for rare moves has no bulk to be far from
    inside = (some >= bulk[0] - reach) & (some <= bulk[1] + reach)
    least = np.where(inside, some, np.inf).min(axis=0)
    most = np.where(inside, some, -np.inf).max(axis=0)
    margin = RANGE_MARGIN * (most - least)
    floor = LEAST_WIDTH * np.maximum(1.0, np.abs([least, most]).max(axis=0))
    short = np.maximum(0.0, floor - (most - least) / 2 - margin)
    return np.maximum(low, least - margin - short), np.minimum(high, most + margin + short)

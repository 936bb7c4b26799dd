"""Discounted Monte-Carlo returns of recorded transitions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DiscountedReturns", "discounted_returns"]


class DiscountedReturns(NamedTuple):
    """Discounted sum of the rewards from each row on, up to a termination or the end of the recorded episode.

    Attributes:
        returns: The sums [n].
        tails: gamma^k, with k the number of rewards summed, where the recording was cut off: the weight of the unknown
            value that is missing. 0 where the task ended, so that the sum is the whole return [n].
        last_rows: Row of the last reward that is summed [n].
    """

    returns: NDArray[np.float64]
    tails: NDArray[np.float64]
    last_rows: NDArray[np.int64]

    def continued(self, rewards: NDArray[np.float32], discount: float) -> NDArray[np.float64]:
        """The returns, if rewards went on at their mean where the recording was cut off [n].

        Without discount, the sum of endless rewards is not defined; nothing is added then.

        Args:
            rewards: Reward of each transition [n].
            discount: Discount per environment step.
        """
        steady = float(rewards.mean(dtype=np.float64)) / (1 - discount) if discount < 1 else 0.0
        return self.returns + self.tails * steady


def discounted_returns(
    rewards: NDArray[np.float32],
    terminations: NDArray[np.bool_],
    episode_ends: NDArray[np.bool_],
    discount: float,
) -> DiscountedReturns:
    """Sum the rewards from each row on: `G = r + gamma r' + gamma^2 r'' + …`.

    The sums double in length in each of log2(longest episode) passes over the data, without a loop over rows.

    Args:
        rewards: Reward of each transition [n].
        terminations: True where there are no further rewards [n]; may be true in the middle of a recorded episode.
        episode_ends: True at the last transition of every recorded episode [n]; the last row counts as one.
        discount: Discount gamma per environment step, in (0, 1]; with 1, `tails` is 1 wherever the task did not end.
    """
    count = len(rewards)
    rows = np.arange(count)
    ends = np.flatnonzero(terminations | episode_ends | (rows == count - 1))
    last_rows = np.repeat(ends, np.diff(ends, prepend=-1))
    remaining = last_rows - rows + 1
    returns = rewards.astype(np.float64)
    summed = 1
    while summed < remaining.max(initial=0):
        # Each row's sum of `summed` rewards, plus that of the row after them, if it is of the same segment.
        longer = np.flatnonzero(remaining > summed)
        returns[longer] += discount**summed * returns[longer + summed]
        summed *= 2
    tails = np.where(terminations[last_rows], 0.0, np.float64(discount) ** remaining)
    return DiscountedReturns(returns, tails, last_rows)

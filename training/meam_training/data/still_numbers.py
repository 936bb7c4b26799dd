"""Which numbers of recorded data stand still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["stand_still"]

STILL = 1e-4
"""Standard deviation up to which a number stands still, as a share of its size or its declared width, of which no more
than 1 counts: 0.1 mm or 0.1 mrad is the jitter of a sensor. Divided by it, a joint two milliradians elsewhere would be
a hundred standard deviations away."""

RESOLUTION = 1e-6
"""The same as a share of what is left of the number's size after its offset: some ten steps of float32, in which it is
kept."""


def stand_still(
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    low: ArrayLike,
    high: ArrayLike,
    offset: Sequence[float] = (),
) -> NDArray[np.bool_]:
    """Which numbers stand still, but for the jitter of a sensor or rounding.

    Args:
        mean: Means [n], less the offset.
        std: Standard deviations [n].
        low: Declared lower bounds [n]; -inf for none.
        high: Declared upper bounds [n]; inf for none.
        offset: What was taken off the numbers [n]; empty for nothing.
    """
    with np.errstate(over="ignore"):
        width = np.nan_to_num(np.asarray(high, np.float64) - np.asarray(low, np.float64), posinf=0.0)
    size = np.abs(mean + np.array(offset or 0.0))
    jitter = STILL * np.minimum(1.0, np.maximum(size, width))
    return std <= np.maximum(jitter, RESOLUTION * np.maximum(1.0, np.abs(mean)))

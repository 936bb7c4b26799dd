"""What is taken off observations far from zero, before float32 rounds their digits away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["common_offset", "far_offset"]

FAR = 1000.0
"""Distance from zero, in standard deviations, from which a number has an offset: three of the seven digits of float32
are then the same in all rows, and of a position in map coordinates it would keep none but these."""

LEAST_SPREAD = 0.1
"""Standard deviation that counts at least, so that a number within 100 of zero never has an offset, and one farther
away has it also where the first rows stand still."""


def far_offset(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Offset of every number of some rows [n, size]: near their mean, with few digits; 0 where none is needed."""
    mean, spread = rows.mean(axis=0), np.maximum(rows.std(axis=0), LEAST_SPREAD)
    far = np.abs(mean) > FAR * spread
    # To the power of ten of the standard deviation.
    digits = -np.ceil(np.log10(spread)).astype(int)
    rounded = [round(m, d) if f else 0.0 for m, d, f in zip(mean.tolist(), digits.tolist(), far, strict=True)]
    return np.array(rounded)


def common_offset(offsets: Sequence[tuple[float, ...]], size: int) -> tuple[float, ...]:
    """Offset of data sets that are joined: of every number that of the first in which it has one; empty without any.

    Args:
        offsets: Offsets of the data sets [size]; empty for those without.
        size: Numbers of an observation.
    """
    given = [each or (0.0,) * size for each in offsets]
    found = tuple(next((number for number in column if number), 0.0) for column in zip(*given, strict=True))
    return found if any(found) else ()

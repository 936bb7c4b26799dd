"""Mean and scale of every number of an observation, checked for plausibility."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meam_training.data.dataset import OfflineDataset
from meam_training.data.dataset_cache import rows_per_block

__all__ = ["observation_scale"]

STILL = 1e-4
"""Standard deviation below which a number stands still, as a share of its size or its declared width, of which no more
than 1 counts: 0.1 mm or 0.1 mrad is the jitter of a sensor. Divided by it, a joint two milliradians elsewhere would be
a hundred standard deviations away."""

RESOLUTION = 1e-6
"""The same as a share of the number's whole size: some ten steps of float32, in which observations are kept."""

FAMILIAR = 10.0
"""Standard deviations within which all but `RARE` of the data lie. A flag that is rarely set has a tiny standard
deviation, and would lie far beyond."""

RARE = 1e-4


def observation_scale(dataset: OfflineDataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and scale by which observations are normalised.

    The scale is the standard deviation, but 1 for numbers that stand still, and larger for rare large values.

    Args:
        dataset: The data; evenly spaced rows, a block of them, tell the rare values.

    Returns:
        Mean and scale [observation_dim], in the units of the observation.
    """
    mean, std = dataset.observation_moments
    low, high = (
        np.concatenate([getattr(box, side) for box in dataset.observation_boxes]).astype(np.float64)
        for side in ("low", "high")
    )
    with np.errstate(over="ignore"):
        width = np.nan_to_num(high - low, posinf=0.0)
    size = np.abs(mean)
    floor = np.maximum(RESOLUTION * np.maximum(1.0, size), STILL * np.minimum(1.0, np.maximum(size, width)))
    some = dataset.observations[:: -(-len(dataset) // rows_per_block(dataset.observation_dim))]
    far = np.quantile(np.abs(some - mean), 1 - RARE, axis=0, method="lower")
    return mean, np.where(std <= floor, 1.0, np.maximum(std, far / FAMILIAR))

"""Mean and scale of every number of an observation, checked for plausibility."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meam_training.data.dataset import OfflineDataset
from meam_training.data.dataset_cache import rows_per_block
from meam_training.data.still_numbers import stand_still

__all__ = ["observation_scale"]

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
        Mean, less the data's offset, and scale [observation_dim], in the units of the observation.
    """
    mean, std = dataset.observation_moments
    low, high = (np.concatenate([getattr(box, side) for box in dataset.observation_boxes]) for side in ("low", "high"))
    still = stand_still(mean, std, low, high, dataset.observation_offset)
    some = dataset.observations[:: -(-len(dataset) // rows_per_block(dataset.observation_dim))]
    far = np.quantile(np.abs(some - mean), 1 - RARE, axis=0, method="lower")
    return mean, np.where(still, 1.0, np.maximum(std, far / FAMILIAR))

"""What networks know of the data before they are trained."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DataStatistics"]


@dataclass(frozen=True)
class DataStatistics:
    """Location and scale of the data's actions and of its values.

    Attributes:
        action_mean: Mean of each component of a chunk, normalised action units; () for 0.
        action_std: Standard deviation of a component about its mean, root mean square over the components, normalised
            action units.
        value_offset: Mean of the data's discounted returns, units of reward.
        value_scale: Their standard deviation, units of reward.
    """

    action_mean: tuple[float, ...] = ()
    action_std: float = 1.0
    value_offset: float = 0.0
    value_scale: float = 1.0

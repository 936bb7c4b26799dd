"""A constant in the rewards, which is taken off before training where it decides nothing.

Where every episode terminates after the same number of steps, a constant c on every reward adds c (1 + gamma + …) to
what a state is worth, over the steps that are left: the same for all actions. It changes no policy, but critics that
are not told the time would have to make it out. So it is taken off, and its mean over the data is put back where values
are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meam_training.data.dataset import OfflineDataset
from meam_training.data.discounted_returns import discounted_returns

__all__ = ["RewardOffset", "constant_returns", "explaining_constant", "fixed_horizon"]

FEWEST = 10
"""Terminated episodes from which equal lengths say something: a few of a script's may be equal by chance."""


def fixed_horizon(dataset: OfflineDataset) -> int | None:
    """Number of steps after which episodes of the data terminate; None if there is no such number above 1.

    All that terminate do so after as many steps, at least `FEWEST` of them, and none that was cut off is longer. That
    the environment would end no episode sooner or later, whatever is done in it, the data cannot tell.
    """
    lengths, terminated = _episodes(dataset)
    at_ends = np.count_nonzero(dataset.terminations) == np.count_nonzero(terminated)
    if not at_ends or np.count_nonzero(terminated) < FEWEST or lengths.max() == 1:
        return None
    return int(lengths.max()) if (lengths[terminated] == lengths.max()).all() else None


def constant_returns(dataset: OfflineDataset, discount: float) -> NDArray[np.float64]:
    """Discounted return from each row on, if every reward were 1, also after a cut [n]."""
    ones = np.ones(len(dataset), np.float32)
    found = discounted_returns(ones, dataset.terminations, dataset.episode_ends, discount)
    return found.continued(ones, discount)


def explaining_constant(dataset: OfflineDataset, discount: float) -> float:
    """The constant in the rewards that explains most of the data's returns where the horizon is fixed; else 0.

    It is the slope of the regression of the returns on those of a reward of 1, which depend on the steps that are left
    alone, over the episodes that terminate: the mean reward where rewards do not depend on the time, and, with a
    discount near 1, nearly 0 where only the last one counts (-R (1 - gamma) / gamma for a last reward R). A constant
    that is added to all rewards is added to it. Where all rewards are the same it is 0: then only the length of an
    episode can matter.

    Args:
        dataset: The data.
        discount: Discount per environment step, in (0, 1].
    """
    if fixed_horizon(dataset) is None or np.ptp(dataset.rewards) == 0:
        return 0.0
    lengths, terminated = _episodes(dataset)
    whole = np.repeat(terminated, lengths)
    ones = constant_returns(dataset, discount)[whole]
    centred = ones - ones.mean()
    return float(centred @ dataset.discounted_returns(discount).returns[whole] / (centred @ centred))


def _episodes(dataset: OfflineDataset) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Lengths of the episodes, and whether each terminates."""
    ends = np.flatnonzero(dataset.episode_ends)
    return np.diff(ends, prepend=-1), dataset.terminations[ends]


@dataclass(frozen=True)
class RewardOffset:
    """A constant that is taken off the rewards, and its mean return, by which values are raised again.

    Where values are raised by the same number everywhere, nothing changes but a chunk's reward:
    Q + L = r + L (1 - gamma^H mask) + gamma^H mask (Q' + L).

    Attributes:
        constant: The constant c, units of reward.
        level: Its mean return L over the rows of the data, units of reward.
    """

    constant: float = 0.0
    level: float = 0.0

    @classmethod
    def of(cls, dataset: OfflineDataset, constant: float | None, discount: float) -> RewardOffset:
        """The offset by a constant; None is 0."""
        return cls(constant, constant * float(constant_returns(dataset, discount).mean())) if constant else cls()

    def off(self, dataset: OfflineDataset) -> OfflineDataset:
        """The data, with the constant taken off its rewards."""
        if not self.constant:
            return dataset
        return replace(dataset, rewards=(dataset.rewards - np.float64(self.constant)).astype(np.float32))

    def raised(self, rewards: NDArray[np.float32], masks: NDArray[np.float32], discount: float) -> NDArray[np.float32]:
        """Rewards of chunks for values that are raised by the level.

        Args:
            rewards: Discounted rewards of the chunks, without the constant [batch].
            masks: 0 where a chunk reached a termination, else 1 [batch].
            discount: Discount of a whole chunk, gamma^H.
        """
        return (rewards + self.level * (1 - discount * masks)).astype(np.float32) if self.constant else rewards

"""Bandits of known value: an observation is a direction, and one action away from it is best.

Registered with Gymnasium as "defaults/Bandit2-v0" and "defaults/Bandit8-v0", with 2 and 8 numbers in an action.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

__all__ = ["Bandit"]

GOAL_DISTANCE = 0.5
"""Root mean square of the best action's components."""
REWARD_WIDTH = 0.3
"""Root-mean-square error per component at which the reward has fallen to exp(-1/2)."""


class Bandit(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Episodes of one step; the reward is exp(-e² / (2 · 0.3²)), at most 1, where e is the action's error.

    An observation [dim] has components of root mean square 1 and a random direction. The best action is half of it,
    and e the root mean square distance from it.

    Args:
        dim: Numbers in an observation, and in an action.
    """

    def __init__(self, dim: int) -> None:
        bound = float(np.sqrt(dim))
        self.observation_space = gymnasium.spaces.Box(-bound, bound, (dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (dim,), np.float32)
        self._direction = np.zeros(dim, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a direction."""
        super().reset(seed=seed)
        drawn = self.np_random.standard_normal(self._direction.shape)
        self._direction = (drawn / np.sqrt(np.square(drawn).mean())).astype(np.float32)
        return self._direction.copy(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Pay the reward and end the episode."""
        error = np.square(action - GOAL_DISTANCE * self._direction).mean()
        return self._direction.copy(), float(np.exp(-error / (2 * REWARD_WIDTH**2))), True, False, {}


for dim in (2, 8):
    # The entry point is a name, not the class, so that a data set can store it.
    if f"defaults/Bandit{dim}-v0" not in gymnasium.registry:  # this module may be imported by several names
        gymnasium.register(f"defaults/Bandit{dim}-v0", entry_point="bandits:Bandit", kwargs={"dim": dim})

"""A demonstrator for `meam/Pockets-v0` that mostly aims at the cheaper pockets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meam_policy.environments.pockets import POCKETS
from meam_policy.errors import ConfigError

__all__ = ["DEFAULT_MODE_SHARES", "PocketsDemonstrator"]

DEFAULT_MODE_SHARES: Final[Mapping[str, float]] = {"west": 0.45, "east": 0.40, "north": 0.05, "south": 0.10}
"""Probability of aiming at each pocket; the most valuable one has the lowest."""

_STIFFNESS = 2.0  # command per metre
_DAMPING = 0.6  # command per metre per second
# Below 1, so that noise spreads the command to both sides instead of saturating it at the motors' limit.
_STRENGTH = 0.7


class PocketsDemonstrator:
    """Steers the ball to a pocket drawn at random and holds it there, with noise on the motors.

    The pocket is drawn independently of the observation, so that the same observation leads to several different
    actions: the demonstrations are multimodal, rather than merely diverse in their initial states.

    Args:
        mode_shares: Probability of aiming at each pocket, 0 for pockets left out; None takes `DEFAULT_MODE_SHARES`.
        noise: Standard deviation of the Gaussian noise on each motor command, before clipping to [-1, 1].
        seed: Seed of the generator that draws pockets and noise.

    Attributes:
        pocket: Name of the pocket that this episode aims at; the first one is drawn on construction.
        generator: Random generator; between episodes, its state is all that the next one depends on.

    Raises:
        ConfigError: a pocket does not exist, a share is negative, the shares do not sum to 1, or the noise is
            negative or not finite.

    Example:
        >>> demonstrator = PocketsDemonstrator({"north": 1.0}, noise=0.0)
        >>> demonstrator.act([0.0, 0.0, 0.0, 0.0])
        array([0. , 0.7], dtype=float32)
    """

    def __init__(self, mode_shares: Mapping[str, float] | None = None, noise: float = 0.25, seed: int = 0) -> None:
        shares = DEFAULT_MODE_SHARES if mode_shares is None else mode_shares
        _check_mode_shares(shares)
        if not 0.0 <= noise < math.inf:
            raise ConfigError(f"noise is {noise}; expected a standard deviation of 0 or more.")
        self._names = list(shares)
        # Normalised, because Generator.choice tolerates less rounding in the sum than is reasonable for callers.
        self._probabilities = np.array(list(shares.values())) / sum(shares.values())
        self._noise = noise
        self.generator = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        """Draw the pocket to aim at; call it at the start of each episode."""
        self.pocket = str(self.generator.choice(self._names, p=self._probabilities))

    def act(self, observation: ArrayLike) -> NDArray[np.float32]:
        """Push the ball towards the pocket aimed at, and brake it there.

        Args:
            observation: Position x, y (metres) and velocity (metres per second) [4].

        Returns:
            Motor commands [2] in [-1, 1].
        """
        state = np.asarray(observation, np.float64)
        command = _STIFFNESS * (np.array(POCKETS[self.pocket].centre) - state[:2]) - _DAMPING * state[2:]
        command *= min(1.0, _STRENGTH / max(float(np.hypot(*command)), 1e-9))
        command += self._noise * self.generator.standard_normal(2)
        return np.clip(command, -1.0, 1.0).astype(np.float32)


def _check_mode_shares(shares: Mapping[str, float]) -> None:
    """Check that the shares are a probability distribution over existing pockets."""
    for name, share in shares.items():
        if name not in POCKETS:
            close = difflib.get_close_matches(name, POCKETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"There is no pocket {name!r}, expected one of {', '.join(POCKETS)}.{hint}")
        if not share >= 0.0:
            raise ConfigError(f"The share of {name} is {share}, expected a probability of 0 or more.")
    total = sum(shares.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ConfigError(f"The shares sum to {total:g}, expected 1.")

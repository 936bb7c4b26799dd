"""What a robot's contract allows its actions, per tick and in the action's own numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import FormatError
from meam_policy.robot.contract import RobotContract
from meam_policy.spec import PolicySpec

__all__ = ["ActionLimits"]


class ActionLimits(NamedTuple):
    """Limits of an action; every array is float64 [action_dim].

    Attributes:
        low: Least values: the contract's, else the action box's, rounded inwards to the type of the action box.
        high: Largest values.
        max_change: Largest change from one tick to the next; inf for any. An action that is itself a change has its
            limit in `low` and `high` instead.
        home: The home pose; None if an action has no default.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    max_change: NDArray[np.float64]
    home: NDArray[np.float64] | None

    @classmethod
    def of(cls, contract: RobotContract, spec: PolicySpec) -> ActionLimits:
        """The limits of a policy's actions on a robot.

        Raises:
            FormatError: nothing lies between them.
        """
        space = spec.action_space
        if space.dtype.kind == "f":
            low, high = (np.nan_to_num(bounds).reshape(-1).astype(np.float64) for bounds in (space.low, space.high))
        else:  # the space cuts the decimals of its bounds off, towards zero
            low, high = np.ceil(spec.action.low), np.floor(spec.action.high)
        change = np.full(spec.action_dim, np.inf)
        rate = contract.rate_hz(spec)
        for index, number in enumerate(contract.action):
            step = math.inf if number.max_rate is None or rate is None else number.max_rate / rate
            least, most = low[index], high[index]
            if number.representation == "absolute":
                change[index] = step
            else:
                least, most = max(least, -step), min(most, step)
            least = least if number.lower is None else max(least, number.lower)
            most = most if number.upper is None else min(most, number.upper)
            low[index], high[index] = _inwards(least, space.dtype, -1), _inwards(most, space.dtype, 1)
            if low[index] > high[index]:
                raise FormatError(
                    f"action[{index}].max_rate is {number.max_rate}; expected a limit that leaves values between "
                    f"{number.name}'s {least:g} and {most:g}."
                )
        defaults = [number.default for number in contract.action if number.default is not None]
        home = np.clip(defaults, low, high) if defaults and len(defaults) == spec.action_dim else None
        return cls(low, high, change, home)

    def rounded(self, dtype: type[np.floating[Any]]) -> ActionLimits:
        """The same with bounds that a type of floats holds, rounded inwards, for whoever returns actions in it.

        Raises:
            FormatError: the type has no number between two of them.
        """
        kind = np.dtype(dtype)
        low, high = (
            np.array([_inwards(bound, kind, side) for bound in bounds])
            for bounds, side in ((self.low, -1), (self.high, 1))
        )
        if (low > high).any():
            index = int((low > high).argmax())
            raise FormatError(
                f"action[{index}] is from {self.low[index]!r} to {self.high[index]!r}; expected limits between which "
                f"{kind} has a number."
            )
        home = None if self.home is None else np.clip(self.home, low, high)
        return ActionLimits(low, high, self.max_change, home)


def _inwards(bound: float, dtype: np.dtype, side: int) -> float:
    """The number of a type that is nearest to a bound and does not pass it; `side` is 1 for an upper one."""
    if dtype.kind != "f":
        return float(math.floor(bound) if side > 0 else math.ceil(bound))
    near = dtype.type(bound)
    passed = (float(near) - bound) * side > 0
    return float(np.nextafter(near, dtype.type(-side * np.inf))) if passed else float(near)

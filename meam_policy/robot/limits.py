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
            least = low[index] if number.lower is None else max(low[index], number.lower)
            most = high[index] if number.upper is None else min(high[index], number.upper)
            _require_between(f"action[{index}], {number.name},", least, most, space.dtype)
            if number.max_rate is not None and rate is not None:
                step, needed = number.max_rate / rate, _half_a_step(max(abs(least), abs(most)), space.dtype)
                moves = step > needed
                if number.representation == "absolute":
                    change[index] = step
                else:
                    needed = max(needed, least, -most)
                    least, most = max(least, -step), min(most, step)
                    moves = moves and _lies_between(least, most, space.dtype)
                if not moves:
                    raise FormatError(
                        f"action[{index}].max_rate is {number.max_rate}, {step:g} a tick at {rate:g} Hz; expected more "
                        f"than {needed * rate:g}, without which {number.name} never moves, or not to its limits."
                    )
            low[index], high[index] = _inwards(least, space.dtype, -1), _inwards(most, space.dtype, 1)
        defaults = [number.default for number in contract.action if number.default is not None]
        home = np.clip(defaults, low, high) if defaults and len(defaults) == spec.action_dim else None
        return cls(low, high, change, home)

    def rounded(self, dtype: type[np.floating[Any]]) -> ActionLimits:
        """The same with bounds that a type of floats holds, rounded inwards, for whoever returns actions in it.

        Raises:
            FormatError: the type has no number between two of them.
        """
        kind = np.dtype(dtype)
        for index, (least, most) in enumerate(zip(self.low, self.high, strict=True)):
            _require_between(f"action[{index}]", least, most, kind)
        low, high = (
            np.array([_inwards(bound, kind, side) for bound in bounds])
            for bounds, side in ((self.low, -1), (self.high, 1))
        )
        home = None if self.home is None else np.clip(self.home, low, high)
        return ActionLimits(low, high, self.max_change, home)


def _lies_between(least: float, most: float, dtype: np.dtype) -> bool:
    """Whether a type has a number between two."""
    return _inwards(least, dtype, -1) <= _inwards(most, dtype, 1)


def _require_between(name: str, least: float, most: float, dtype: np.dtype) -> None:
    if not _lies_between(least, most, dtype):
        raise FormatError(
            f"{name} is limited to {float(least)!r} or more and {float(most)!r} or less; expected limits between which "
            f"{dtype} has a number."
        )


def _half_a_step(size: float, dtype: np.dtype) -> float:
    """Half the distance to the next number of a type: a smaller change is rounded away."""
    return float(np.spacing(dtype.type(size))) / 2 if dtype.kind == "f" else 0.5


def _inwards(bound: float, dtype: np.dtype, side: int) -> float:
    """The number of a type that is nearest to a bound and does not pass it; `side` is 1 for an upper one."""
    if dtype.kind != "f":
        return float(math.floor(bound) if side > 0 else math.ceil(bound))
    near = dtype.type(bound)
    passed = (float(near) - bound) * side > 0
    return float(np.nextafter(near, dtype.type(-side * np.inf))) if passed else float(near)

"""Whether the numbers of a policy's spec are ones that a machine may be moved by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.spec.json_reader import require
from meam_policy.spec.policy_spec import PolicySpec

__all__ = ["require_sound_numbers"]

LEAST, MOST = 1e-18, 1e18
"""Smallest scale, and largest number: float32 holds the squares and reciprocals of what lies between."""


def require_sound_numbers(spec: PolicySpec) -> None:
    """Refuse bounds and statistics that no policy can act within, although their types are right.

    Every number of an action needs bounds, not farther out than 1e18. They may be equal, as those of a locked joint
    are, but not all of them. Means are within 1e18, and scales from 1e-18 to 1e18.

    Raises:
        FormatError: a number is not; the message names it.
    """
    low, high = spec.action.low, spec.action.high
    for index, bounds in enumerate(zip(low, high, strict=True)):
        for side, bound in zip(("low", "high"), bounds, strict=True):
            name = f"action.{side}[{index}]"
            seen = bound if math.isfinite(bound) else "null"
            require(abs(bound) <= MOST, name, seen, f"a bound from {-MOST:g} to {MOST:g}, which every action needs")
    lows, highs = _in_type(spec)
    with np.errstate(over="ignore"):
        moves = (lows < highs) & (np.array(low, np.float32) < np.array(high, np.float32))
    require(bool(moves.any()), "action", "a box whose bounds are equal", "at least one number that may move")
    _require_within("observation_offset", spec.observation_offset, 0.0)
    _require_within("observation_mean", spec.observation_mean, 0.0)
    _require_within("observation_std", spec.observation_std, LEAST)
    _require_within("action_offset", spec.action_offset, 0.0)
    _require_within("action_scale", spec.action_scale, LEAST)


def _in_type(spec: PolicySpec) -> tuple[NDArray[Any], NDArray[Any]]:
    """The least and the largest action that the box's type can hold; refused where there is none between the bounds."""
    dtype, low, high = np.dtype(spec.action.dtype), np.array(spec.action.low), np.array(spec.action.high)
    smallest, largest = (0, 1) if dtype.kind == "b" else _range_of(dtype)
    if dtype.kind != "f":
        low, high = np.ceil(low), np.floor(high)
    for index, (least, most) in enumerate(zip(low, high, strict=True)):
        fits = smallest <= least <= most <= largest
        seen = f"{spec.action.low[index]:g} to {spec.action.high[index]:g}"
        require(bool(fits), f"action.low[{index}] to high", seen, f"bounds between which there is a number of {dtype}")
    return low.astype(dtype), high.astype(dtype)


def _range_of(dtype: np.dtype[Any]) -> tuple[float, float]:
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return float(limits.min), float(limits.max)


def _require_within(name: str, numbers: Sequence[float], least: float) -> None:
    expected = f"a number from {least:g} to {MOST:g}" if least else f"a number from {-MOST:g} to {MOST:g}"
    for index, number in enumerate(numbers):
        require(least <= abs(number) <= MOST, f"{name}[{index}]", number, expected)

"""Checks of a policy's arguments other than the observation: seeds, masks, noise and prefixes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meam_policy.acting.arrays import array_of
from meam_policy.errors import ConfigError, ObservationError
from meam_policy.spec import PolicySpec
from meam_policy.typed import shown

__all__ = ["checked_mask", "checked_noise", "checked_prefix", "checked_seeds", "checked_starts"]

MAX_SLOTS = 2**16
"""Environment slots of one policy, each of which has a stream of noise and a queue of actions."""


def checked_seeds(seeds: Any) -> int | Sequence[int] | None:
    """One seed, one for each slot, or None, with a list in place of an array.

    Raises:
        ConfigError: a seed is not an integer of 0 or more, or there is none, or there are more than `MAX_SLOTS`.
    """
    _require_few_seeds(seeds)
    listed = seeds.tolist() if isinstance(seeds, np.ndarray) else seeds
    for seed in [] if listed is None else listed if isinstance(listed, Sequence) else [listed]:
        whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        if not (whole and seed >= 0):
            raise ConfigError(f"seed is {shown(seed)}; expected a whole number of 0 or more.")
    return listed


def _require_few_seeds(seeds: Any) -> None:
    """Refuse none and too many, before they are made a list or looked at one by one."""
    try:
        count = seeds.size if isinstance(seeds, np.ndarray) else len(seeds) if isinstance(seeds, Sequence) else 1
    except OverflowError:  # of a range
        count = sys.maxsize
    if not 1 <= count <= MAX_SLOTS:
        seen = "empty" if count == 0 else f"{count:,} numbers"
        raise ConfigError(f"seed is {seen}; expected a whole number, or one for each of at most {MAX_SLOTS:,} slots.")


def checked_mask(mask: ArrayLike, counts: Mapping[str, int]) -> NDArray[np.bool_]:
    """A mask [slots].

    Args:
        mask: As it was given.
        counts: Numbers of slots that it must have, by what demands them.

    Raises:
        ConfigError: it is not of truth values, or has another length.
    """
    chosen = array_of(mask, "mask", "true or false for each slot", ConfigError)
    if chosen.dtype != bool:
        raise ConfigError(f"mask has type {chosen.dtype}; expected true or false for each slot.")
    if chosen.ndim != 1 or not chosen.size or set(counts.values()) - {chosen.size}:
        given = " and ".join(f"{count} {what}" for what, count in counts.items()) or "slots in one axis"
        raise ConfigError(f"mask has shape {chosen.shape}, for {given}; expected one entry for each slot.")
    return chosen


def checked_starts(episode_start: ArrayLike, rows: int) -> NDArray[np.bool_]:
    """A mask [rows] of the slots whose episode begins.

    Raises:
        ObservationError: it has another length.
    """
    start = np.atleast_1d(array_of(episode_start, "episode_start", "true or false for each slot").astype(bool))
    if start.shape != (rows,):
        raise ObservationError(f"episode_start has shape {start.shape}, expected ({rows},).")
    return start


def checked_noise(spec: PolicySpec, noise: ArrayLike, rows: int, batched: bool) -> NDArray[np.float32]:
    """Noise [rows, spec.noise_dim], given without the first axis unless batched.

    Raises:
        ObservationError: it has another shape, or is not finite.
    """
    draws, size = _array("Noise", noise), spec.noise_dim
    expected = (rows, size) if batched else (size,)
    if draws.shape != expected:
        raise ObservationError(f"Noise has shape {draws.shape}; expected {expected}.")
    if not np.isfinite(draws).all():
        raise ObservationError("Noise holds NaN or infinity; expected finite numbers.")
    return draws.reshape(rows, size)


def checked_prefix(
    spec: PolicySpec, prefix: ArrayLike | None, weight: ArrayLike | None, rows: int, batched: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A prefix [rows, chunk_size, action_dim] and its weights [rows, chunk_size], given as `checked_noise` has it.

    Raises:
        ObservationError: one of them is missing, has another shape, is not finite, or a weight is not from 0 to 1.
    """
    shape = (spec.chunk_size, spec.action_dim)
    found = []
    for name, value, expected in (("prefix", prefix, shape), ("prefix_weight", weight, shape[:1])):
        array, wanted = _array(name, value), (rows, *expected) if batched else expected
        low, high = (0, 1) if name == "prefix_weight" else (-np.inf, np.inf)
        fits = array.shape == wanted and bool(np.isfinite(array).all())
        if not fits or (array < low).any() or (array > high).any():
            extra = " from 0 to 1" if name == "prefix_weight" else ""
            raise ObservationError(f"{name} has shape {array.shape}; expected finite numbers{extra} {wanted}.")
        found.append(array.reshape(rows, *expected))
    return found[0], found[1]


def _array(name: str, value: ArrayLike | None) -> NDArray[np.float32]:
    array = array_of(value, name, "an array of real numbers")
    if array.dtype.kind not in "fiu":
        raise ObservationError(f"{name} has type {array.dtype}; expected an array of real numbers.")
    if array.dtype == np.float32:
        return array.astype(np.float32, "C")
    with np.errstate(all="ignore"):
        narrow = array.astype(np.float32)
    lost = np.isfinite(array) & ~np.isfinite(narrow)
    if lost.any():
        raise ObservationError(
            f"{name} has {float(array[lost].flat[0]):g}, too large for float32; expected numbers within "
            f"±{np.finfo(np.float32).max:.3g}."
        )
    return narrow

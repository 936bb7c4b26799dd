"""Checking recorded transitions against the spaces they were recorded in, and flattening them to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError
from meam_policy.spec import BoxSpec

__all__ = ["RowCheck", "action_box_spec", "flags", "numbers", "observation_box_specs", "unit_box"]

BOUND_TOLERANCE = 1e-4
"""How far beyond its space a recorded number may lie, as a share of the space's width (at most 1 unit)."""


class RowCheck:
    """Checks transitions against their boxes and flattens them, one block of consecutive rows per call.

    Attributes:
        observation_boxes: The observation's boxes in the order of flattening.
        action_box: The action's box.
    """

    def __init__(self, observation_boxes: Sequence[BoxSpec], action_box: BoxSpec) -> None:
        self.observation_boxes = observation_boxes
        self.action_box = action_box
        self._before = (0, 0, 0)

    def __call__(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminations: NDArray[np.bool_],
        episode_ends: NDArray[np.bool_],
    ) -> dict[str, NDArray[Any]]:
        """Check the next rows.

        Args:
            observations: [n, …] as in the observation space; a mapping of such arrays for a Dict space.
            actions: [n, …] as in the action space.
            rewards: [n].
            next_observations: Like `observations`.
            terminations: Where nothing more is earned [n].
            episode_ends: True at the last row of every episode [n].

        Returns:
            The arguments by name, with rows of float32 numbers [n, size]; the rewards are [n].

        Raises:
            DatasetError: a shape or type does not fit its space, or a value is not finite or out of bounds; the
                message names field, episode and step, counted from the first call on.
        """
        where = _Where(episode_ends, *self._before)
        self._before = where.after()
        return {
            "observations": _observation_rows(self.observation_boxes, observations, "observations", where),
            "actions": _rows(numbers(actions, "actions"), self.action_box, "actions", where),
            "rewards": _rows(numbers(rewards, "rewards"), _REWARD, "rewards", where)[:, 0],
            "next_observations": _observation_rows(
                self.observation_boxes, next_observations, "next_observations", where
            ),
            "terminations": terminations,
            "episode_ends": episode_ends,
        }


class _Where:
    """Turns a row number of a block into episode and step of the whole recording."""

    def __init__(self, ends: NDArray[np.bool_], rows_before: int, episode: int, step: int) -> None:
        self.rows = len(ends)
        self.rows_so_far = rows_before + self.rows
        self._last = np.flatnonzero(ends)
        self._episode, self._step = episode, step

    def __call__(self, row: int) -> str:
        return "episode {}, step {}".format(*self._find(row))

    def after(self) -> tuple[int, int, int]:
        """Rows, episode and step at which the next block begins."""
        return (self.rows_so_far, *self._find(self.rows))

    def _find(self, row: int) -> tuple[int, int]:
        episode = int(np.searchsorted(self._last, row))
        step = row + self._step if episode == 0 else row - int(self._last[episode - 1]) - 1
        return self._episode + episode, step


_REWARD = BoxSpec(shape=(1,), dtype="float32", low=(-np.inf,), high=(np.inf,))


def numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Take an array of real numbers.

    Raises:
        DatasetError: it is ragged or holds something else.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DatasetError(f"{name} is ragged; expected one array with a row per transition.") from error
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{name} has type {array.dtype}; expected real numbers.")
    return array


def flags(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    """Take an array of flags [n], as booleans or as 0 and 1.

    Raises:
        DatasetError: it is something else.
    """
    array = numbers(values, name)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise DatasetError(f"{name} has shape {array.shape} or values other than 0 and 1; expected one flag per row.")
    return array.astype(bool)


def _rows(array: NDArray[Any], box: BoxSpec, name: str, where: _Where) -> NDArray[np.float32]:
    """Check an array [n, …] against its box and flatten it to rows [n, size]."""
    shapes = [(where.rows, *box.shape)] + ([(where.rows,)] if box.shape == (1,) else [])
    if array.shape not in shapes:
        raise DatasetError(f"{name} has shape {array.shape}; expected {shapes[-1]}: a row per transition.")
    wide = array.reshape(where.rows, box.size)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(wide, dtype=np.float32)
    low, high = np.array(box.low), np.array(box.high)
    margin = BOUND_TOLERANCE * np.clip(np.nan_to_num(high - low, posinf=1.0), 0.0, 1.0)
    for bad, expected in (
        (~np.isfinite(rows), "a finite number"),
        ((wide < low - margin) | (wide > high + margin), "a value within its space"),
    ):
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DatasetError(
                f"{name} is {wide[row, column]} at {where(row)}, index {column}; expected {expected}"
                + (f" [{low[column]}, {high[column]}]" if "space" in expected else "")
                + f". {int(bad.any(axis=1).sum())} of {where.rows_so_far} rows read are affected: repair or drop them."
            )
    return rows


def _box(space: spaces.Space[Any], name: str) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise DatasetError(f"The {name} is {space}; expected a Box. Wrap the environment and record again.")
    return space


def unit_box(shape: tuple[int, ...]) -> spaces.Box:
    """[-1, 1] in every number of a row, for an array of the given shape [n, …]."""
    return spaces.Box(-1.0, 1.0, shape[1:] or (1,), np.float32)


def action_box_spec(space: spaces.Space[Any]) -> BoxSpec:
    """Describe an action space.

    Raises:
        DatasetError: it is not a Box of floats with finite bounds and some width.
    """
    box = BoxSpec.from_space(_box(space, "action space"))
    if np.dtype(box.dtype).kind != "f":
        raise DatasetError(f"The action space {space} has whole numbers; a flow policy needs a float Box.")
    if not np.isfinite([box.low, box.high]).all() or np.equal(box.low, box.high).any():
        raise DatasetError(
            f"The action space {space} is unbounded or has no width; a policy must know the box it may act "
            "in. Pass action_space= with finite bounds."
        )
    return box


def observation_box_specs(
    space: spaces.Space[Any] | None, observations: ArrayLike | Mapping[str, ArrayLike]
) -> tuple[BoxSpec, ...]:
    """Describe an observation space, a Box or a Dict of Boxes; None takes unbounded ones shaped as the observations.

    Raises:
        DatasetError: it is another space.
    """
    if space is None:

        def unbounded(values: ArrayLike) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, numbers(values, "observations").shape[1:] or (1,), np.float32)

        if isinstance(observations, Mapping):
            space = spaces.Dict([(key, unbounded(values)) for key, values in observations.items()])
        else:
            space = unbounded(observations)
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise DatasetError("The observation space is an empty Dict; expected one Box or more in it.")
        return tuple(
            BoxSpec.from_space(_box(box, f'observation space of "{key}"'), key) for key, box in space.spaces.items()
        )
    return (BoxSpec.from_space(_box(space, "observation space")),)


def _observation_rows(
    boxes: Sequence[BoxSpec], values: ArrayLike | Mapping[str, ArrayLike], name: str, where: _Where
) -> NDArray[np.float32]:
    if boxes[0].key is None:
        if isinstance(values, Mapping):
            raise DatasetError(f"{name} is a mapping, but the observation space is a Box; expected one array.")
        return _rows(numbers(values, name), boxes[0], name, where)
    keys = [str(box.key) for box in boxes]
    if not isinstance(values, Mapping) or set(values) != set(keys):
        seen = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise DatasetError(f"{name} has {seen}; expected a mapping with the keys {keys}.")
    parts = [
        _rows(numbers(values[k], f'{name} "{k}"'), b, f'{name} "{k}"', where) for k, b in zip(keys, boxes, strict=True)
    ]
    return np.concatenate(parts, axis=1)

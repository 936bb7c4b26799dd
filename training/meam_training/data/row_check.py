"""Checking recorded transitions against their spaces, and flattening them to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError
from meam_policy.spec import BoxSpec

__all__ = ["RowCheck", "action_box_spec", "flags", "numbers", "observation_box_specs", "unbounded_box", "unit_box"]

BOUND_TOLERANCE = 1e-4
"""Tolerated distance of a recorded number from its space, as a fraction of the space's width, which counts as at most
1."""


class RowCheck:
    """Checks transitions against their boxes and flattens them, one block of consecutive rows per call.

    Attributes:
        observation_boxes: Boxes of the observation, in the order of flattening.
        action_box: Box of the action.
    """

    def __init__(self, observation_boxes: Sequence[BoxSpec], action_box: BoxSpec) -> None:
        self.observation_boxes = observation_boxes
        self.action_box = action_box
        self._before = (0, 0, 0)

    def at(self, episode: int, step: int) -> RowCheck:
        """Count the next row as this episode and step in messages; for whoever checks row by row."""
        self._before = (0, episode, step)
        return self

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
            observations: Observations [n, …], shaped as in the observation space; for a Dict, a mapping of arrays.
            actions: Actions [n, …], shaped as in the action space.
            rewards: Rewards [n].
            next_observations: Observations after the actions, like `observations`.
            terminations: True where the task ended, so that there are no further rewards [n].
            episode_ends: True at the last row of every episode [n].

        Returns:
            The arguments by name, with rows of float32 numbers [n, size]; the rewards are [n].

        Raises:
            DatasetError: a shape or type does not fit its space, or a value is not finite or out of bounds; the
                message names field, episode and step, counted over all calls.
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
    """Converts a row of a block to episode and step of the whole recording."""

    def __init__(self, ends: NDArray[np.bool_], rows_before: int, episode: int, step: int) -> None:
        self.rows = len(ends)
        self.rows_so_far = rows_before + self.rows
        self._last = np.flatnonzero(ends)
        self._episode, self._step = episode, step

    def __call__(self, row: int) -> str:
        return "episode {}, step {}".format(*self._find(row))

    def after(self) -> tuple[int, int, int]:
        """Rows so far, and episode and step at which the next block starts."""
        return (self.rows_so_far, *self._find(self.rows))

    def _find(self, row: int) -> tuple[int, int]:
        episode = int(np.searchsorted(self._last, row))
        step = row + self._step if episode == 0 else row - int(self._last[episode - 1]) - 1
        return self._episode + episode, step


_REWARD = BoxSpec(shape=(1,), dtype="float32", low=(-np.inf,), high=(np.inf,))


def numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Convert to an array of real numbers.

    Raises:
        DatasetError: the values are ragged or not real numbers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DatasetError(f"{name} is ragged; expected one array with one row per transition.") from error
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{name} has type {array.dtype}; expected real numbers.")
    return array


def flags(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    """Convert booleans, or numbers 0 and 1, to an array of flags [n].

    Raises:
        DatasetError: the values are of another shape, or not flags.
    """
    array = numbers(values, name)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise DatasetError(f"{name} has shape {array.shape} or values other than 0 and 1; expected one flag per row.")
    return array.astype(bool)


def _rows(array: NDArray[Any], box: BoxSpec, name: str, where: _Where) -> NDArray[np.float32]:
    """Check an array [n, …] against its box and flatten it to rows [n, size]."""
    shapes = [(where.rows, *box.shape)] + ([(where.rows,)] if box.shape == (1,) else [])
    if array.shape not in shapes:
        raise DatasetError(f"{name} has shape {array.shape}; expected {shapes[-1]}: one row per transition.")
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


def _observation_box(space: spaces.Space[Any], name: str, key: str | None = None) -> BoxSpec:
    """Describe a Box of an observation, unless it holds images."""
    box = _box(space, name)
    if box.dtype == np.uint8 and len(box.shape) >= 3:
        raise DatasetError(
            f"The {name} has images: uint8 of shape {box.shape}. Expected a Box of numbers, such as joint positions: "
            f"in the plain networks of this package each of the {np.prod(box.shape)} values of the pixels would be an "
            "input of its own, so images are not learned from. Leave them out, or record features of them instead."
        )
    return BoxSpec.from_space(box, key)


def unit_box(shape: tuple[int, ...]) -> spaces.Box:
    """Box [-1, 1] in each component of a row, for an array of the given shape [n, …]."""
    return spaces.Box(-1.0, 1.0, shape[1:] or (1,), np.float32)


def unbounded_box(shape: tuple[int, ...], dtype: np.dtype[Any]) -> spaces.Box:
    """Box without bounds in each component of a row, for an array of the given shape [n, …]; images stay images."""
    if dtype == np.uint8 and len(shape) >= 4:
        return spaces.Box(0, 255, shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, shape[1:] or (1,), np.float32)


def action_box_spec(space: spaces.Space[Any]) -> BoxSpec:
    """Describe an action space.

    Raises:
        DatasetError: the space is not a Box of floats with finite bounds and positive width.
    """
    box = BoxSpec.from_space(_box(space, "action space"))
    if np.dtype(box.dtype).kind != "f":
        raise DatasetError(f"The action space {space} has whole numbers; a flow policy needs a float Box.")
    if not np.isfinite([box.low, box.high]).all() or np.equal(box.low, box.high).any():
        raise DatasetError(
            f"The action space {space} is unbounded or has no width; expected finite bounds, low below high, because a "
            "policy acts within a box. Pass action_space= with finite bounds."
        )
    return box


def observation_box_specs(
    space: spaces.Space[Any] | None, observations: ArrayLike | Mapping[str, ArrayLike]
) -> tuple[BoxSpec, ...]:
    """Describe an observation space, a Box or a Dict of Boxes; None takes unbounded ones shaped like the observations.

    Raises:
        DatasetError: the space is neither, or has images.
    """
    if space is None:

        def unbounded(values: ArrayLike) -> spaces.Box:
            array = numbers(values, "observations")
            return unbounded_box(array.shape, array.dtype)

        if isinstance(observations, Mapping):
            space = spaces.Dict([(key, unbounded(values)) for key, values in observations.items()])
        else:
            space = unbounded(observations)
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise DatasetError("The observation space is an empty Dict; expected one Box or more in it.")
        return tuple(_observation_box(box, f'observation space of "{key}"', key) for key, box in space.spaces.items())
    return (_observation_box(space, "observation space"),)


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

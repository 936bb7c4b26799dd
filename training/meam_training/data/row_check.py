"""Checking recorded transitions against their spaces, and flattening them to rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError
from meam_policy.spec import BoxSpec
from meam_training.data.clipped_actions import ClippedEpisode
from meam_training.data.observation_offset import far_offset

__all__ = [
    "ActionBounds",
    "RowCheck",
    "action_box_spec",
    "flags",
    "numbers",
    "observation_box_specs",
    "unbounded_box",
    "undeclared_box_spec",
    "unit_box",
]

BOUND_TOLERANCE = 1e-4
"""Tolerated distance of a recorded number from its space, as a fraction of the space's width, which counts as at most
1."""

OUTSIDE = 1.0
"""Distance of a recorded observation from its space, as a fraction of the space's width, up to which it is taken with a
warning: simulators leave the bounds that they declare. Farther away, units or order are another matter."""


LOST = 0.05
"""Share of a number's standard deviation that the type in which it was recorded may round it by without a warning."""


class ActionBounds(NamedTuple):
    """What the user says about the bounds of recorded actions.

    Attributes:
        low: Lower bounds, environment units: one number for all components, or one for each; None takes the declared.
        high: Upper bounds, likewise.
        clip: Clip recorded actions to the bounds, as many simulators do; otherwise actions beyond are refused.
    """

    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    clip: bool = False

    @property
    def key(self) -> list[str]:
        """What tells conversions of the same source apart; empty if nothing is said."""
        if self == (None, None, False):
            return []
        return [repr((np.array(self.low).tolist(), np.array(self.high).tolist(), self.clip))]


DECLARED = ActionBounds()
"""Bounds as the action space declares them; actions beyond are refused."""


class RowCheck:
    """Checks transitions against their boxes and flattens them, one block of consecutive rows per call.

    Attributes:
        observation_boxes: Boxes of the observation, in the order of flattening.
        action_box: Box of the action.
        clip_actions: Clip actions to their box, rather than refuse those beyond it.
        clipped: What was clipped so far.
    """

    def __init__(self, observation_boxes: Sequence[BoxSpec], action_box: BoxSpec, clip_actions: bool = False) -> None:
        self.observation_boxes = observation_boxes
        self.action_box = action_box
        self.clip_actions = clip_actions
        self.clipped: list[ClippedEpisode] = []
        self._told: set[str] = set()
        self._before = (0, 0, 0)
        self._offsets: dict[str | None, NDArray[np.float64]] = {}

    @property
    def observation_offset(self) -> tuple[float, ...]:
        """What is taken off every number of the observations; empty if that is nothing. The first rows decide."""
        found = np.concatenate([self._offsets.get(box.key, np.zeros(box.size)) for box in self.observation_boxes])
        return tuple(found.tolist()) if found.any() else ()

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
            The arguments by name, with rows of float32 numbers [n, size]; the rewards are [n], and the observations
            less `observation_offset`.

        Raises:
            DatasetError: a shape or type does not fit its space, or a value is not finite or out of bounds (an
                observation: far out of them); the message names field, episode and step, counted over all calls.
        """
        where = _Where(episode_ends, *self._before)
        self._before = where.after()
        return {
            "observations": self._observation_rows(observations, "observations", where),
            "actions": self._action_rows(actions, where),
            "rewards": _float_rows(numbers(rewards, "rewards"), _REWARD, "rewards", where)[1][:, 0],
            "next_observations": self._observation_rows(next_observations, "next_observations", where),
            "terminations": terminations,
            "episode_ends": episode_ends,
        }

    def _action_rows(self, values: Any, where: _Where) -> NDArray[np.float32]:
        box = self.action_box
        wide, rows = _float_rows(numbers(values, "actions"), box, "actions", where)
        low, high = np.array(box.low), np.array(box.high)
        if self.clip_actions:
            self._note_clipped(wide, np.maximum(low - wide, wide - high), where)
            return wide.clip(low, high).astype(np.float32)
        _refuse(
            _beyond(wide, box, BOUND_TOLERANCE),
            "actions",
            wide,
            where,
            box,
            "If the environment clipped them, pass clip_actions=True (--clip-actions of meam train); otherwise repair "
            "them, or declare the space in which they were recorded",
        )
        return rows

    def _note_clipped(self, wide: NDArray[Any], excess: NDArray[np.float64], where: _Where) -> None:
        rows = np.flatnonzero(_beyond(wide, self.action_box, BOUND_TOLERANCE).any(axis=1))
        episodes = where.episodes(rows)
        for episode in np.unique(episodes).tolist():
            far = excess[rows[episodes == episode]]
            number = int(far.max(axis=0).argmax())
            held = self.clipped[-1] if self.clipped and self.clipped[-1].episode == episode else None
            noted = ClippedEpisode(episode, len(far), float(far[:, number].max()), number)
            if held is not None:  # the episode began in an earlier block
                largest = max(held, noted, key=lambda each: each.excess)
                self.clipped[-1] = largest._replace(rows=held.rows + noted.rows)
            else:
                self.clipped.append(noted)

    def _observation_rows(
        self, values: ArrayLike | Mapping[str, ArrayLike], name: str, where: _Where
    ) -> NDArray[np.float32]:
        boxes = self.observation_boxes
        if boxes[0].key is None:
            if isinstance(values, Mapping):
                raise DatasetError(f"{name} is a mapping, but the observation space is a Box; expected one array.")
            return self._box_rows(values, boxes[0], name, where)
        keys = [str(box.key) for box in boxes]
        if not isinstance(values, Mapping) or set(values) != set(keys):
            seen = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise DatasetError(f"{name} has {seen}; expected a mapping with the keys {keys}.")
        parts = [self._box_rows(values[k], b, f'{name} "{k}"', where) for k, b in zip(keys, boxes, strict=True)]
        return np.concatenate(parts, axis=1)

    def _box_rows(self, values: ArrayLike, box: BoxSpec, name: str, where: _Where) -> NDArray[np.float32]:
        wide, rows = _float_rows(numbers(values, name), box, name, where)
        _refuse(
            _beyond(wide, box, OUTSIDE),
            name,
            wide,
            where,
            box,
            "That is farther out than the space is wide: check units and order, or correct the declared space",
        )
        outside, label = _beyond(wide, box, BOUND_TOLERANCE), name.removeprefix("next_")
        if label not in self._told and outside.any():
            self._told.add(label)
            row, column = (int(i) for i in np.argwhere(outside)[0])
            warnings.warn(
                f"{name} is {wide[row, column]} at {where(row)}, index {column}, outside its declared space "
                f"[{box.low[column]}, {box.high[column]}]. It is learned from as it is, as `act` takes it too.",
                stacklevel=2,
            )
        if box.key not in self._offsets:
            self._offsets[box.key] = far_offset(wide.astype(np.float64))
        offset = self._offsets[box.key]
        if not offset.any():
            return rows
        exact = wide.astype(np.float64)
        self._tell_lost_digits(exact, wide.dtype, label)
        return (exact - offset).astype(np.float32)

    def _tell_lost_digits(self, exact: NDArray[np.float64], dtype: np.dtype[Any], name: str) -> None:
        if dtype.kind != "f" or dtype.itemsize >= 8 or f"digits of {name}" in self._told:
            return
        spread, error = exact.std(axis=0), float(np.finfo(dtype).eps) / 2 * np.abs(exact).max(axis=0)
        lost = (error > LOST * spread) & (np.ptp(exact, axis=0) > 0)  # one that does not move has no digits to lose
        if lost.any():
            self._told.add(f"digits of {name}")
            column = int(lost.argmax())
            warnings.warn(
                f"{name} at index {column} are about {exact[0, column]:.9g} and move by {spread[column]:.3g}, and were "
                f"recorded as {dtype}, which rounds them by up to {error[column]:.3g}. Record them as float64 (with an "
                "observation space of that type), or relative to a point nearby; and act likewise.",
                stacklevel=2,
            )


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

    def episodes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Episodes of rows of the block."""
        return self._episode + np.searchsorted(self._last, rows)

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


def _float_rows(
    array: NDArray[Any], box: BoxSpec, name: str, where: _Where
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Flatten an array [n, …] to rows [n, size], in its own type and in float32; refuse numbers that are not finite."""
    shapes = [(where.rows, *box.shape)] + ([(where.rows,)] if box.shape == (1,) else [])
    if array.shape not in shapes:
        raise DatasetError(f"{name} has shape {array.shape}; expected {shapes[-1]}: one row per transition.")
    wide = array.reshape(where.rows, box.size)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(wide, dtype=np.float32)
    _refuse(~np.isfinite(rows), name, wide, where)
    return wide, rows


def _beyond(wide: NDArray[Any], box: BoxSpec, tolerance: float) -> NDArray[np.bool_]:
    """Numbers farther from their box than a fraction of its width, which counts as at most 1 for small fractions."""
    low, high = np.array(box.low), np.array(box.high)
    width = np.nan_to_num(high - low, posinf=1.0)
    margin = tolerance * (np.clip(width, 0.0, 1.0) if tolerance < OUTSIDE else width)
    return (wide < low - margin) | (wide > high + margin)


def _refuse(
    bad: NDArray[np.bool_],
    name: str,
    wide: NDArray[Any],
    where: _Where,
    box: BoxSpec | None = None,
    remedy: str = "Repair or drop them",
) -> None:
    """Refuse rows [n, size] with bad numbers; those are not finite, or lie outside the box."""
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        expected = "a finite number"
        if box is not None:
            expected = f"a value within its space [{box.low[column]}, {box.high[column]}]"
        raise DatasetError(
            f"{name} is {wide[row, column]} at {where(row)}, index {column}; expected {expected}. "
            f"{int(bad.any(axis=1).sum())} of {where.rows_so_far} rows read are affected. {remedy}."
        )


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


def undeclared_box_spec(box: spaces.Box, bounds: ActionBounds) -> BoxSpec:
    """Describe the actions of data that declares no space.

    Args:
        box: Bounds where the user gives none; elsewhere they give way.
        bounds: The user's bounds.

    Raises:
        DatasetError: as in `action_box_spec`.
    """
    low = box.low if bounds.low is None else np.full_like(box.low, -np.inf)
    high = box.high if bounds.high is None else np.full_like(box.high, np.inf)
    return action_box_spec(spaces.Box(low, high, dtype=np.float32), bounds)


def unbounded_box(shape: tuple[int, ...], dtype: np.dtype[Any]) -> spaces.Box:
    """Box without bounds in each component of a row, for an array of the given shape [n, …]; images stay images."""
    if dtype == np.uint8 and len(shape) >= 4:
        return spaces.Box(0, 255, shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, shape[1:] or (1,), np.float32)


def action_box_spec(space: spaces.Space[Any], bounds: ActionBounds = DECLARED) -> BoxSpec:
    """Describe an action space. A number whose bounds are equal is fixed: the policy always gives that value.

    Args:
        space: The recorded space.
        bounds: Narrower bounds, or bounds where the space has none.

    Raises:
        DatasetError: the space is not a Box of floats; a bound is missing, not finite, or so large that float32 cannot
            hold the width; or the given bounds contradict each other or the space.
    """
    box = BoxSpec.from_space(_box(space, "action space"))
    if np.dtype(box.dtype).kind != "f":
        raise DatasetError(f"The action space {space} has whole numbers; a flow policy needs a float Box.")
    low, high = (_bounds(given, side, box) for given, side in ((bounds.low, "low"), (bounds.high, "high")))
    for index, (least, most) in enumerate(zip(low, high, strict=True)):
        if not most - least <= _WIDEST:  # infinite or NaN, too
            raise DatasetError(
                f"The action space has no usable bounds at index {index}: [{least}, {most}]; expected finite ones, "
                f"at most {_WIDEST:g} apart, because a policy acts within a box. Give the limits of the actuators: in "
                "the space that is recorded or, when the data is opened, by action_low= and action_high= (--action-low "
                "and --action-high of meam train)."
            )
        if least > most:
            raise DatasetError(
                f"The bounds of the actions contradict each other at index {index}: low is {least}, high is {most}; "
                "expected low below high, or equal for a fixed number. Correct action_low and action_high."
            )
        if least < box.low[index] or most > box.high[index]:
            raise DatasetError(
                f"The bounds given for the actions are [{least}, {most}] at index {index}, beyond those of the action "
                f"space, [{box.low[index]}, {box.high[index]}]; expected bounds within. Correct action_low= and "
                "action_high= (--action-low, --action-high)."
            )
    return replace(box, low=low, high=high)


_WIDEST = 1e30
"""Largest width of an action box: nothing moves that far, and float32 ends at 3e38."""


def _bounds(given: float | Sequence[float] | None, side: str, box: BoxSpec) -> tuple[float, ...]:
    """The given lower or upper bounds, or the declared ones."""
    if given is None:
        return getattr(box, side)
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.full(box.size + 1, np.nan)
    if found.shape not in ((), (1,), (box.size,)):
        raise DatasetError(
            f"action_{side} is {given!r}; expected one number, or {box.size}: one for each number of an action."
        )
    # Rounded as the box rounds its own, so that a bound repeated is not beyond it.
    return tuple(np.broadcast_to(found.astype(box.dtype).astype(np.float64), (box.size,)).tolist())


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

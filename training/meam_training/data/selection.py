"""Episodes chosen from a data set, and data sets joined."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.acting.arrays import array_of
from meam_policy.errors import DatasetError
from meam_policy.spec import BoxSpec
from meam_training.data.dataset_cache import COLUMNS, Columns, rows_per_block

__all__ = ["chosen_rows", "common", "episode_range", "joined_blocks", "joined_boxes", "normalised_shares"]


def episode_range(text: str) -> slice:
    """Read a range of episodes such as "0:100", "100:" or ":".

    Raises:
        DatasetError: the text is no such range.
    """
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if found is None:
        raise DatasetError(f'episodes is "{text}"; expected the first and the end of a range, such as 0:100 or 100:.')
    first, end = (int(part) if part else None for part in found.groups())
    return slice(first, end)


def chosen_rows(
    episode_ends: NDArray[np.bool_], episodes: slice | Sequence[int] | NDArray[np.int_], name: str
) -> slice | NDArray[np.int64]:
    """Rows of chosen episodes: a slice where they follow each other, so that nothing is copied.

    Args:
        episode_ends: True at the last row of every episode [n].
        episodes: Their numbers, counted from 0, in any order but each once; or a slice of them without a step.
        name: Name of the data set in error messages.

    Raises:
        DatasetError: there is no such episode, one is given twice, or none is chosen.
    """
    last = np.flatnonzero(episode_ends)
    first, total = np.concatenate([[0], last[:-1] + 1]), len(last)
    if isinstance(episodes, slice):
        start, end = episodes.start or 0, total if episodes.stop is None else episodes.stop
        if episodes.step not in (None, 1) or not 0 <= start < end <= total:
            shown = f"{start}:{end}" + ("" if episodes.step in (None, 1) else f":{episodes.step}")
            raise DatasetError(
                f"Episodes {shown} are chosen, but {name} has {total}; expected a range within 0:{total} with no step."
            )
        return slice(int(first[start]), int(last[end - 1]) + 1)
    numbers = array_of(episodes, f"The choice of episodes of {name}", "their numbers, in one axis", DatasetError)
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
        raise DatasetError(
            f"The episodes of {name} to choose are {str(episodes)[:60]}; expected numbers from 0 to {total - 1}."
        )
    outside = numbers[(numbers < 0) | (numbers >= total)]
    if len(outside) or len(np.unique(numbers)) < len(numbers):
        wrong = f"{outside[0]} is not there" if len(outside) else "one is given twice"
        raise DatasetError(
            f"Of the chosen episodes of {name}, {wrong}; expected numbers from 0 to {total - 1}, each once."
        )
    if (np.diff(numbers) == 1).all():
        return slice(int(first[numbers[0]]), int(last[numbers[-1]]) + 1)
    return np.concatenate([np.arange(int(first[number]), int(last[number]) + 1) for number in numbers.tolist()])


def normalised_shares(shares: Sequence[float], parts: int) -> tuple[float, ...]:
    """Shares of a batch that sum to 1, from weights.

    Raises:
        DatasetError: there is not one positive weight for each part.
    """
    weights = [float(share) for share in shares]
    if len(weights) != parts or not all(0 < weight < math.inf for weight in weights):
        raise DatasetError(f"shares are {weights}; expected {parts} numbers above 0, one for each data set.")
    return tuple(weight / sum(weights) for weight in weights)


def joined_boxes(boxes: Mapping[str, Sequence[BoxSpec]], measured: bool) -> tuple[BoxSpec, ...]:
    """The boxes that data sets have in common: keys and shapes must be the same, observations may reach further.

    Args:
        boxes: Boxes of an observation or of an action, by the name of the data set.
        measured: Whether they are ranges of recorded actions, rather than bounds that somebody declared.

    Raises:
        DatasetError: keys, shapes or declared bounds of actions differ.
    """
    (first, mine), *others = boxes.items()
    for name, theirs in others:
        ours = [(box.key, box.shape) for box in mine]
        if [(box.key, box.shape) for box in theirs] != ours:
            raise DatasetError(
                f"{first} has {_shown(mine)} and {name} has {_shown(theirs)}; expected the same keys and shapes to "
                "join them. Choose the same keys of each, in the same order."
            )
        bounds = [(box.low, box.high) for box in mine] == [(box.low, box.high) for box in theirs]
        if not measured and not bounds:
            raise DatasetError(
                f"The actions of {first} are bounded by {_bounds(mine)} and those of {name} by {_bounds(theirs)}; "
                "expected the same bounds, because they may be of other units. Read each with the same action_space=."
            )
    return tuple(
        replace(
            box,
            low=tuple(np.min([each[i].low for each in boxes.values()], axis=0).tolist()),
            high=tuple(np.max([each[i].high for each in boxes.values()], axis=0).tolist()),
        )
        for i, box in enumerate(mine)
    )


def common(values: Mapping[str, Any], what: str, remedy: str) -> Any:
    """The value that data sets have in common, where those that have none do not count.

    Raises:
        DatasetError: two have different ones.
    """
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        shown = ", ".join(f"{value} in {name}" for name, value in known.items())
        raise DatasetError(f"The {what} differs: {shown}; expected the same to join them. {remedy}")
    return next(iter(known.values()), None)


def joined_blocks(
    parts: Sequence[Columns], offsets: Sequence[tuple[float, ...]], offset: tuple[float, ...]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Blocks of the rows of all parts, one after the other.

    Args:
        parts: Columns of each.
        offsets: What was taken off the observations of each; empty for nothing.
        offset: What is to be taken off those of all, likewise.
    """
    for part, taken in zip(parts, offsets, strict=True):
        step, rows = rows_per_block(part["observations"][:1].size), len(part["rewards"])
        moved = np.array(taken or 0.0) - np.array(offset or 0.0)
        for start in range(0, rows, step):
            block = {name: part[name][start : start + step] for name in COLUMNS}
            if moved.any():
                for name in ("observations", "next_observations"):
                    block[name] = (block[name] + moved).astype(np.float32)
            yield block


def _shown(boxes: Sequence[BoxSpec]) -> str:
    return ", ".join(f"{'' if box.key is None else box.key + ' '}{list(box.shape)}" for box in boxes)


def _bounds(boxes: Sequence[BoxSpec]) -> str:
    return "; ".join(f"{[f'{n:.4g}' for n in box.low]} to {[f'{n:.4g}' for n in box.high]}" for box in boxes)

"""Minari data sets as transitions: episodes are checked and joined into blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy.errors import DatasetError
from meam_training.data.dataset_cache import Recording, rows_per_block
from meam_training.data.minari_files import MinariSource, open_minari
from meam_training.data.recording_description import describe_recording
from meam_training.data.row_check import ActionBounds, RowCheck, action_box_spec, flags, observation_box_specs

__all__ = ["minari_recording"]


def minari_recording(folder: Path, bounds: ActionBounds) -> Recording:
    """Start reading a Minari data set.

    Args:
        folder: The folder that contains its metadata.json.
        bounds: Bounds of the actions.

    Returns:
        The recording, whose blocks are read on demand.

    Raises:
        DatasetError: the files or spaces are refused; while the blocks are read, also if an episode's arrays do not fit
            each other or the spaces.
    """
    source = open_minari(folder)
    boxes, action_box = (
        observation_box_specs(source.observation_space, ()),
        action_box_spec(source.action_space, bounds),
    )
    about = describe_recording(boxes, action_box, source.dataset_id, source.environment_id, source.control_rate_hz)
    check, rows = RowCheck(boxes, action_box, bounds.clip), rows_per_block(sum(box.size for box in boxes))
    return Recording(about, (check(*block) for block in _minari_blocks(source, rows)))


def _minari_blocks(source: MinariSource, rows: int) -> Iterator[tuple[Any, ...]]:
    """Join episodes into blocks of at least the given number of rows, in the order of `RowCheck`'s arguments."""
    pending, pending_rows, empty = [], 0, True
    for episode in source.episodes:
        length = len(episode.rewards)
        _check_lengths(source.dataset_id, episode, length)
        pending.append(episode)
        pending_rows, empty = pending_rows + length, False
        if pending_rows >= rows:
            yield _joined(pending)
            pending, pending_rows = [], 0
    if empty:
        raise DatasetError(f"{source.dataset_id} has no episodes; expected at least one.")
    if pending:
        yield _joined(pending)


def _check_lengths(dataset_id: str, episode: Any, length: int) -> None:
    if length == 0:
        raise DatasetError(f"{dataset_id}: episode {episode.id} has no steps; expected at least one.")
    for name, values, expected in (
        ("observations", episode.observations, length + 1),
        ("actions", episode.actions, length),
        ("terminations", episode.terminations, length),
        ("truncations", episode.truncations, length),
    ):
        for array in values.values() if isinstance(values, Mapping) else [values]:
            if len(array) != expected:
                raise DatasetError(
                    f"{dataset_id}: episode {episode.id} has {len(array)} {name} and {length} rewards; "
                    f"expected {expected} {name}."
                )


def _joined(episodes: Sequence[Any]) -> tuple[Any, ...]:
    return (
        _concatenate([_slice(e.observations, slice(None, -1)) for e in episodes], "observations"),
        _concatenate([e.actions for e in episodes], "actions"),
        _concatenate([e.rewards for e in episodes], "rewards"),
        _concatenate([_slice(e.observations, slice(1, None)) for e in episodes], "next_observations"),
        flags(_concatenate([e.terminations for e in episodes], "terminations"), "terminations"),
        np.concatenate([np.arange(len(e.rewards)) == len(e.rewards) - 1 for e in episodes]),
    )


def _slice(values: Any, part: slice) -> Any:
    return {k: np.asarray(v)[part] for k, v in values.items()} if isinstance(values, Mapping) else values[part]


def _concatenate(values: list[Any], name: str) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _concatenate([v[key] for v in values], f'{name} "{key}"') for key in values[0]}
    try:
        return np.concatenate(values)
    except ValueError as error:
        shapes = sorted({np.shape(v)[1:] for v in values})
        raise DatasetError(f"{name} has rows of shapes {shapes} in different episodes; expected one shape.") from error

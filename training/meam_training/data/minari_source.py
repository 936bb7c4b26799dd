"""Minari data sets as transitions: episodes are checked and joined into blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from meam_policy.errors import DatasetError
from meam_training.data.dataset_cache import Recording, rows_per_block
from meam_training.data.minari_files import MinariSource, open_minari
from meam_training.data.reading_choices import StoredEpisode
from meam_training.data.recording_description import checked_recording, describe_recording
from meam_training.data.row_check import ActionBounds, RowCheck, action_box_spec, flags, observation_box_specs

__all__ = ["episode_blocks", "minari_recording"]


def minari_recording(folder: Path, bounds: ActionBounds, observation_keys: Sequence[str] | None = None) -> Recording:
    """Start reading a Minari data set.

    Args:
        folder: The folder that contains its metadata.json.
        bounds: Bounds of the actions.
        observation_keys: Keys of a Dict observation, in the order of flattening; None takes all.

    Returns:
        The recording, whose blocks are read on demand.

    Raises:
        DatasetError: the files or spaces are refused; while the blocks are read, also if an episode's arrays do not fit
            each other or the spaces.
    """
    source = open_minari(folder)
    space = source.observation_space if observation_keys is None else _part(source, observation_keys)
    boxes, action_box = observation_box_specs(space, ()), action_box_spec(source.action_space, bounds)
    about = describe_recording(
        boxes, action_box, source.dataset_id, source.environment_id, source.control_rate_hz, source.environment
    )
    check, rows = RowCheck(boxes, action_box, bounds.clip), rows_per_block(sum(box.size for box in boxes))
    episodes = source.episodes
    if observation_keys is not None:
        episodes = (_with_keys(source.dataset_id, episode, observation_keys) for episode in source.episodes)
    return checked_recording(about, check, episode_blocks(source.dataset_id, episodes, rows))


def _part(source: MinariSource, keys: Sequence[str]) -> spaces.Space[Any]:
    """The chosen keys of the observation space."""
    held = source.observation_space.spaces if isinstance(source.observation_space, spaces.Dict) else {}
    unknown = [key for key in keys if key not in held]
    if unknown:
        seen = f"the keys {', '.join(held)}" if held else "one array, without keys"
        raise DatasetError(f"{source.dataset_id} has no observation {unknown[0]}; its observation has {seen}.")
    return spaces.Dict([(key, held[key]) for key in keys])


def _with_keys(dataset_id: str, episode: Any, keys: Sequence[str]) -> StoredEpisode:
    """An episode with the chosen keys of its observations only."""
    held = episode.observations if isinstance(episode.observations, Mapping) else {}
    if not set(keys) <= set(held):
        raise DatasetError(
            f"{dataset_id}: episode {episode.id} has the observations {sorted(held)}; expected {list(keys)} among them."
        )
    chosen = {key: held[key] for key in keys}
    flagged = episode.terminations, episode.truncations
    return StoredEpisode(episode.id, chosen, episode.actions, episode.rewards, *flagged)


def episode_blocks(dataset_id: str, episodes: Iterable[Any], rows: int) -> Iterator[tuple[Any, ...]]:
    """Join episodes into blocks of at least the given number of rows, in the order of `RowCheck`'s arguments.

    Args:
        dataset_id: Name in error messages.
        episodes: Episodes with the attributes of Minari's `EpisodeData`; see `StoredEpisode`.
        rows: Least number of rows in a block, but for the last.

    Raises:
        DatasetError: there are no episodes, or one's arrays do not fit each other.
    """
    pending, pending_rows, empty = [], 0, True
    for episode in episodes:
        length = len(episode.rewards)
        _check_lengths(dataset_id, episode, length)
        pending.append(episode)
        pending_rows, empty = pending_rows + length, False
        if pending_rows >= rows:
            yield _joined(pending)
            pending, pending_rows = [], 0
    if empty:
        raise DatasetError(f"{dataset_id} has no episodes; expected at least one.")
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

"""LeRobot data sets on this machine, of format 2.x (a file per episode) and 3.0 (files of many), as transitions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meam_policy.errors import DatasetError
from meam_policy.given_files import read_regular
from meam_training.data.dataset_cache import Recording, rows_per_block
from meam_training.data.minari_files import source_files
from meam_training.data.minari_source import episode_blocks
from meam_training.data.parquet_files import read_columns, require_pyarrow
from meam_training.data.reading_choices import MADE_REWARDS, ReadingChoices, StoredEpisode, stored_episode
from meam_training.data.recording_description import checked_recording, describe_recording
from meam_training.data.row_check import RowCheck, flags, observation_box_specs

__all__ = ["is_lerobot", "lerobot_files", "lerobot_recording"]

DATA_PATHS = {
    "v2.0": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
"""Versions of the format that are read, and where each has its rows."""

PREFIX = "observation."
STATE, ACTION, REWARD, SUCCESS = "observation.state", "action", "next.reward", "next.success"
"""Names that LeRobot gives to its columns."""

MOST_EPISODES = 10_000_000


@dataclass(frozen=True)
class _Source:
    """A data set's files and columns.

    Attributes:
        folder: Its folder.
        files: Each file of rows, with the numbers and the lengths of its episodes in order.
        shapes: Shape of a row of every column that is read, () for single numbers.
        keys: Columns of the observation, in order.
        action: Column of the actions.
        reward: Column of the rewards, or how they are made.
        termination: Column of the terminations, if there is one.
    """

    folder: Path
    files: Sequence[tuple[Path, Sequence[tuple[int, int]]]]
    shapes: dict[str, tuple[int, ...]]
    keys: tuple[str, ...]
    action: str
    reward: str
    termination: str | None


def is_lerobot(folder: Path) -> bool:
    """Whether a folder is that of a LeRobot data set."""
    return (folder / "meta" / "info.json").is_file()


def lerobot_files(folder: Path) -> list[Path]:
    """Files of a data set that are read; videos are not.

    Raises:
        DatasetError: one links to a target outside the folder.
    """
    return [file for name in ("meta", "data") for file in source_files(folder / name)]


def lerobot_recording(folder: Path, choices: ReadingChoices) -> Recording:
    """Start reading a LeRobot data set.

    Args:
        folder: Its folder, with `meta/info.json`.
        choices: What is read of it.

    Returns:
        The recording, whose blocks are read on demand.

    Raises:
        DatasetError: a file or a column is missing or broken, or the format is of another version; while the blocks are
            read, also if an episode's rows are not those that `meta` describes.
        MissingExtraError: pyarrow is not installed.
    """
    require_pyarrow()
    info = _info(folder)
    features = info["features"]
    source = _source(folder, info, features, choices)
    shapes = {key: source.shapes[key] or (1,) for key in source.keys}
    unbounded = {key: spaces.Box(-np.inf, np.inf, shape, np.float32) for key, shape in shapes.items()}
    single = source.keys == (STATE,)
    space = unbounded[STATE] if single else spaces.Dict([(k.removeprefix(PREFIX), box) for k, box in unbounded.items()])
    boxes = observation_box_specs(space, ())
    action_box = choices.action_box(_range(source))
    rate = choices.control_rate_hz or _rate(info)
    about = describe_recording(boxes, action_box, folder.name, choices.environment_id, rate)
    about["measured_bounds"] = choices.action_space is None and None in choices.bounds[:2]
    about["left_out"] = [name for name, feature in features.items() if _is_image(feature)]
    check, rows = RowCheck(boxes, action_box, choices.bounds.clip), rows_per_block(sum(box.size for box in boxes))
    episodes = (episode for episode in _episodes(source, single) if episode is not None)
    return checked_recording(about, check, episode_blocks(folder.name, episodes, rows))


def _info(folder: Path) -> dict[str, Any]:
    file = folder / "meta" / "info.json"
    try:
        info = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not JSON: {error}.") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version not in DATA_PATHS:
        raise DatasetError(
            f"{folder} is a LeRobot data set of version {version}; expected one of {', '.join(DATA_PATHS)}. Convert it "
            "with LeRobot's own script."
        )
    features, path = info.get("features"), info.get("data_path")
    if path != DATA_PATHS[version]:
        raise DatasetError(f"{file}: data_path is {path!r}; expected {DATA_PATHS[version]!r}, as LeRobot writes it.")
    if not isinstance(features, dict) or not all(isinstance(each, dict) for each in features.values()):
        raise DatasetError(f"{file} describes no features; expected the columns by name.")
    return info


def _is_image(feature: dict[str, Any]) -> bool:
    return feature.get("dtype") in ("video", "image")


def _rate(info: dict[str, Any]) -> float | None:
    rate = info.get("fps")
    return float(rate) if isinstance(rate, (int, float)) and 0 < rate < math.inf else None


def _source(folder: Path, info: dict[str, Any], features: dict[str, Any], choices: ReadingChoices) -> _Source:
    def column(name: str, role: str) -> str:
        if name not in features or _is_image(features[name]):
            what = "is an image, which policies here do not take" if name in features else "is not among its columns"
            held = ", ".join(key for key, feature in features.items() if not _is_image(feature))
            raise DatasetError(f"{folder}: {name}, chosen as {role}, {what}; expected one of {held}.")
        return name

    numeric = [name for name, feature in features.items() if not _is_image(feature)]
    keys = choices.observation_keys or tuple(name for name in numeric if name.startswith(PREFIX))
    if not keys:
        raise DatasetError(
            f"{folder} has no observation but images, which policies here do not take; it has {', '.join(features)}. "
            "Choose columns of numbers: observation_keys= (--observation-keys)."
        )
    # Short names too, as those of the policy's observation.
    keys = tuple(PREFIX + key if key not in features and PREFIX + key in features else key for key in keys)
    keys = tuple(column(key, "observation") for key in keys)
    action = column(choices.action_key or ACTION, "action")
    reward = choices.reward or next((name for name in (REWARD, SUCCESS) if name in features), None)
    if reward is None:
        raise DatasetError(
            f'{folder} has neither {REWARD} nor {SUCCESS}. Choose reward="end" (--reward end) for 1 at the end of each '
            'episode, if all of them succeed; reward="none" to clone behaviour without rewards; or a column.'
        )
    if reward not in MADE_REWARDS:
        column(reward, "reward")
    termination = choices.termination or (SUCCESS if SUCCESS in features else None)
    if termination is not None:
        column(termination, "termination")
    shapes = {name: _shape(features[name], f"{folder}: {name}") for name in (*keys, action)}
    shapes |= {name: () for name in (reward, termination) if name is not None and name not in MADE_REWARDS}
    files = _data_files(folder, info)
    return _Source(folder, files, {**shapes, "episode_index": ()}, keys, action, reward, termination)


def _shape(feature: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = feature.get("shape")
    sizes = isinstance(shape, list) and 1 <= len(shape) <= 2 and all(type(n) is int and 0 < n < 2**20 for n in shape)
    if not sizes:
        raise DatasetError(f"{name} has the shape {str(shape)[:40]}; expected one or two sizes: images are not read.")
    assert isinstance(shape, list)
    return tuple(shape)


def _data_files(folder: Path, info: dict[str, Any]) -> list[tuple[Path, list[tuple[int, int]]]]:
    """The files of rows in order, with the numbers and the lengths of their episodes."""
    version, place = info["codebase_version"], info["data_path"]
    total = info.get("total_episodes")
    if type(total) is not int or not 0 < total <= MOST_EPISODES:
        raise DatasetError(f"{folder}: total_episodes is {total!r}; expected a whole number, 1 to {MOST_EPISODES}.")
    lengths: dict[int, int] = {}
    files: dict[Path, list[tuple[int, int]]] = {}
    if version == "v3.0":
        wanted = ("episode_index", "length", "data/chunk_index", "data/file_index")
        for file in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
            rows = read_columns(file, dict.fromkeys(wanted, ()))
            for index, length, chunk, number in zip(*(rows[name].tolist() for name in wanted), strict=True):
                lengths[index] = length
                path = folder / place.format(chunk_index=chunk, file_index=number)
                files.setdefault(path, []).append((index, length))
    else:
        size = info.get("chunks_size")
        if type(size) is not int or size < 1:
            raise DatasetError(f"{folder}: chunks_size is {size!r}; expected a whole number of 1 or more.")
        lengths = _lengths(folder / "meta" / "episodes.jsonl")
        for index, length in sorted(lengths.items()):
            path = folder / place.format(episode_chunk=index // size, episode_index=index)
            files[path] = [(index, length)]
    if sorted(lengths) != list(range(total)):
        absent = next((index for index in range(total) if index not in lengths), total)
        raise DatasetError(
            f"{folder}: meta/info.json counts {total} episodes and meta/episodes describes {len(lengths)}; expected as "
            f"many, but number {absent} differs. Copy or download the whole data set again."
        )
    return sorted(((path, sorted(held)) for path, held in files.items()), key=lambda item: item[1])


def _lengths(file: Path) -> dict[int, int]:
    try:
        lines = [json.loads(line) for line in read_regular(file).decode().splitlines() if line.strip()]
        found = {line["episode_index"]: line["length"] for line in lines}
        if not all(type(number) is int and number >= 0 for pair in found.items() for number in pair):
            raise ValueError("a number is not whole")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{file} does not describe the episodes ({error!r}); expected a line with episode_index and length for "
            "each. Copy or download the whole data set again."
        ) from error
    return found


def _range(source: _Source) -> spaces.Box:
    """Box of the recorded actions: LeRobot declares none."""
    shape = source.shapes[source.action]
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for file, _ in source.files:
        actions = read_columns(file, {source.action: shape})[source.action].astype(np.float64)
        if not np.isfinite(actions).all():
            raise DatasetError(f"{file}: {source.action} has a value that is not finite. Repair or drop its episode.")
        low, high = (
            np.minimum(low, actions.min(axis=0, initial=np.inf)),
            np.maximum(high, actions.max(axis=0, initial=-np.inf)),
        )
    return spaces.Box(low.astype(np.float32), high.astype(np.float32))


def _episodes(source: _Source, single: bool) -> Iterator[StoredEpisode | None]:
    for file, held in source.files:
        rows = read_columns(file, source.shapes)
        recorded, start = rows["episode_index"], 0
        expected = np.repeat(*(np.array(numbers, np.int64) for numbers in zip(*held, strict=True)))
        if not np.array_equal(recorded, expected):
            raise DatasetError(
                f"{file} has {len(recorded)} rows of episodes {_named(recorded)}; meta/episodes describes "
                f"{len(expected)} of {_named(expected)}. Copy or download the whole data set again."
            )
        for index, length in held:
            part = slice(start, start + length)
            start += length
            yield stored_episode(
                index,
                _observations(rows, source.keys, part, single),
                rows[source.action][part],
                source.reward if source.reward in MADE_REWARDS else rows[source.reward][part],
                None if source.termination is None else flags(rows[source.termination][part], source.termination),
            )


def _observations(rows: dict[str, NDArray[Any]], keys: tuple[str, ...], part: slice, single: bool) -> Any:
    if single:
        return rows[keys[0]][part]
    return {key.removeprefix(PREFIX): rows[key][part] for key in keys}


def _named(indices: NDArray[Any]) -> str:
    return f"{indices.min()} to {indices.max()}" if len(indices) else "none"

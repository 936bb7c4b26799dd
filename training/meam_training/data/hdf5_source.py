"""HDF5 files of D4RL and of robomimic as transitions."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meam_policy.errors import DatasetError, MeamError
from meam_training.data.dataset_cache import Recording, rows_per_block
from meam_training.data.hdf5_files import check_hdf5
from meam_training.data.minari_source import episode_blocks
from meam_training.data.reading_choices import MADE_REWARDS, ReadingChoices, StoredEpisode, stored_episode
from meam_training.data.recording_description import checked_recording, describe_recording
from meam_training.data.row_check import RowCheck, flags, observation_box_specs, unit_box

__all__ = ["hdf5_recording"]

D4RL = ("observations", "actions", "rewards", "terminals")
"""Arrays that a file of D4RL has, one row per step; `timeouts` and `next_observations` are optional."""

FLAGS_AT_A_TIME = 2**20


def hdf5_recording(path: Path, choices: ReadingChoices) -> Recording:
    """Start reading a file in the layout of D4RL or of robomimic.

    Args:
        path: The file.
        choices: What is read of it.

    Returns:
        The recording, whose blocks are read on demand.

    Raises:
        DatasetError: the file refers to other files, or is of another kind, which is named; an array or a key is
            missing; while the blocks are read, also if rows do not fit the spaces.
    """
    check_hdf5(path)
    with h5py.File(path, "r") as file:
        demos = _demonstrations(file)
        layout = _robomimic(file, demos, path, choices) if demos else _d4rl(file, path, choices)
    boxes = _boxes(layout.observations)
    action_box = choices.action_box(unit_box((0, *layout.actions)))
    rate = choices.control_rate_hz or layout.rate
    about = describe_recording(boxes, action_box, path.stem, choices.environment_id, rate)
    check, rows = RowCheck(boxes, action_box, choices.bounds.clip), rows_per_block(sum(box.size for box in boxes))
    episodes = _robomimic_episodes(path, demos, layout) if demos else _d4rl_episodes(path)
    return checked_recording(about, check, episode_blocks(path.name, _reading(episodes, path), rows))


@dataclass(frozen=True)
class _Layout:
    """What the rows of a file hold.

    Attributes:
        observations: Shape of every observation by key; the key is empty where there is only one.
        actions: Shape of an action.
        action_key: Key of the actions.
        rewards: Key of the rewards, or how they are made.
        termination: Key of the flags that are true where the task ended; None if there are none.
        rate: Rate at which actions were applied, Hz, if recorded.
    """

    observations: dict[str, Sequence[int]]
    actions: Sequence[int]
    action_key: str = "actions"
    rewards: str = "rewards"
    termination: str | None = None
    rate: float | None = None


def _boxes(shapes: dict[str, Sequence[int]]) -> Any:
    def unbounded(shape: Sequence[int]) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, tuple(shape) or (1,), np.float32)

    if list(shapes) == [""]:
        return observation_box_specs(unbounded(shapes[""]), ())
    return observation_box_specs(spaces.Dict([(key, unbounded(shape)) for key, shape in shapes.items()]), ())


def _demonstrations(file: h5py.File) -> list[str]:
    """Names of the episodes of a robomimic file, by their numbers; empty in other files."""
    group = file.get("data")
    if not isinstance(group, h5py.Group):
        return []
    return sorted((name for name in map(str, group) if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))


def _d4rl(file: h5py.File, path: Path, choices: ReadingChoices) -> _Layout:
    """The layout of D4RL's file; another one is refused."""
    shapes = {name: item.shape for name, item in file.items() if isinstance(item, h5py.Dataset)}
    missing = [name for name in D4RL if name not in shapes]
    if missing:
        raise DatasetError(
            f"{path} is {_kind(file)}, which is not supported: D4RL's {', '.join(missing)} and robomimic's data/demo_0 "
            "are not in it. Convert it to one of the two, or to Minari; in Python, OfflineDataset.from_arrays takes "
            "arrays."
        )
    for chosen in ("observation_keys", "action_key", "reward", "termination"):
        if getattr(choices, chosen) is not None:
            raise DatasetError(
                f"{path} is D4RL's, with one array of each, but {chosen} is {getattr(choices, chosen)}; leave it out."
            )
    optional = [name for name in ("timeouts", "next_observations") if name in shapes]
    if not optional:
        raise DatasetError(
            f"{path} has neither timeouts nor next_observations; expected one of them, because without it nobody knows "
            "where recordings were cut off."
        )
    rows = shapes["terminals"]
    for name in (*D4RL, *optional):
        shape, axes = shapes[name], 2 if name in ("observations", "next_observations", "actions") else 1
        if shape[:1] != rows or len(shape) != axes:
            images = " (images are not supported)" if len(shape) > 2 else ""
            raise DatasetError(
                f"{path}: {name} has shape {shape}; expected {axes} axes{images}, and as many rows as terminals, whose "
                f"shape is {rows}."
            )
    return _Layout({"": shapes["observations"][1:]}, shapes["actions"][1:])


def _kind(file: h5py.File) -> str:
    """What an unknown HDF5 file is, as far as its names tell."""
    observations = file.get("observations")
    if isinstance(observations, h5py.Group) and "qpos" in observations:
        return "an episode in ALOHA's layout (observations/qpos, action)"
    if any(re.fullmatch(r"episode_\d+", name) for name in map(str, file)):
        return "the main_data.hdf5 of a Minari data set, whose folder is what is expected,"
    names = ", ".join(sorted(file)[:8]) or "nothing"
    return f"an HDF5 file of an unknown layout (it holds {names})"


def _d4rl_episodes(path: Path) -> Iterator[StoredEpisode | None]:
    with h5py.File(path, "r") as file:
        columns: dict[str, Any] = {str(name): file[name] for name in file if isinstance(file[name], h5py.Dataset)}
        after, start = columns.get("next_observations"), 0
        for number, end in enumerate(_d4rl_ends(columns)):
            rows = slice(start, end + 1)
            terminals = flags(columns["terminals"][rows], "terminals")
            yield stored_episode(
                number,
                columns["observations"][rows],
                columns["actions"][rows],
                columns["rewards"][rows],
                terminals,
                None if after is None else after[end],
            )
            start = end + 1


def _d4rl_ends(columns: dict[str, Any]) -> Iterator[int]:
    """Last rows of the episodes: where the task ended, the recording was cut off, or the next row does not follow."""
    total, last = len(columns["terminals"]), -1
    for start in range(0, total, FLAGS_AT_A_TIME):
        rows = slice(start, min(start + FLAGS_AT_A_TIME, total))
        ends = flags(columns["terminals"][rows], "terminals")
        if "timeouts" in columns:
            ends = ends | flags(columns["timeouts"][rows], "timeouts")
        else:
            after = columns["next_observations"][rows]
            following = columns["observations"][rows.start + 1 : rows.stop + 1]
            ends[: len(following)] |= (after[: len(following)] != following).any(axis=1)
        for last in (start + np.flatnonzero(ends)).tolist():
            yield last
    if last < total - 1:
        yield total - 1


def _robomimic(file: h5py.File, demos: list[str], path: Path, choices: ReadingChoices) -> _Layout:
    """The layout of robomimic's file, from its first demonstration."""
    first: Any = file[f"data/{demos[0]}"]
    where = f"{path}: data/{demos[0]}"
    held = {key: item for key, item in first.get("obs", {}).items() if isinstance(item, h5py.Dataset)}
    if not held:
        raise DatasetError(
            f"{where} has no observations (obs/…), only what it holds: {', '.join(sorted(first))}. Extract them with "
            "robomimic's dataset_states_to_obs.py."
        )
    images = sorted(key for key, item in held.items() if len(item.shape) >= 3)
    vectors = [key for key in held if key not in images]
    keys = choices.observation_keys or tuple(held)
    unknown = [key for key in keys if key not in held]
    if unknown:
        raise DatasetError(f"{where} has no observation {unknown[0]}; expected of {', '.join(held)}.")
    seen = [key for key in keys if key in images]
    if seen:
        raise DatasetError(
            f"{where}: obs/{seen[0]} is an image, {held[seen[0]].dtype} {list(held[seen[0]].shape[1:])}; policies here "
            f"take numbers. Choose the others: observation_keys={vectors} (--observation-keys {' '.join(vectors)})."
        )
    action_key = choices.action_key or "actions"
    actions = first.get(action_key)
    if not isinstance(actions, h5py.Dataset):
        raise DatasetError(f"{where} has no {action_key}; it holds {', '.join(sorted(first))}.")
    rewards = choices.reward or "rewards"
    if rewards not in MADE_REWARDS and rewards not in first:
        raise DatasetError(
            f'{where} has no {rewards}. Choose reward="end" (--reward end) for 1 at the end of every demonstration, if '
            'all of them succeed, or reward="none" to clone behaviour without rewards.'
        )
    termination = choices.termination or ("dones" if "dones" in first else None)
    if termination is not None and termination not in first:
        raise DatasetError(f"{where} has no {termination}; it holds {', '.join(sorted(first))}.")
    shapes = {key: held[key].shape[1:] for key in keys}
    return _Layout(shapes, actions.shape[1:], action_key, rewards, termination, _control_rate(file))


def _control_rate(file: h5py.File) -> float | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        rate = json.loads(str(file["data"].attrs["env_args"]))["env_kwargs"]["control_freq"]
        if type(rate) in (int, float) and 0 < rate < math.inf:
            return float(rate)
    return None


def _robomimic_episodes(path: Path, demos: list[str], layout: _Layout) -> Iterator[StoredEpisode | None]:
    with h5py.File(path, "r") as file:
        for name in demos:
            demo: Any = file[f"data/{name}"]

            def column(key: str, name: str = name, demo: Any = demo) -> NDArray[Any]:
                if not isinstance(demo.get(key), h5py.Dataset):
                    raise DatasetError(f"{path}: data/{name} has no {key}, which the first demonstration has.")
                return demo[key][()]

            keys = list(layout.observations)
            after = demo.get("next_obs")
            known = isinstance(after, h5py.Group) and all(
                key in after and len(column(f"next_obs/{key}")) for key in keys
            )
            yield stored_episode(
                name,
                {key: column(f"obs/{key}") for key in keys},
                column(layout.action_key),
                layout.rewards if layout.rewards in MADE_REWARDS else column(layout.rewards),
                None
                if layout.termination is None
                else flags(column(layout.termination), f"{name}/{layout.termination}"),
                {key: column(f"next_obs/{key}")[-1] for key in keys} if known else None,
            )


def _reading(episodes: Iterator[StoredEpisode | None], path: Path) -> Iterator[StoredEpisode]:
    """The episodes that have rows; whatever h5py raises for a broken file becomes a DatasetError."""
    try:
        for episode in episodes:
            if episode is not None:
                yield episode
    except MeamError:
        raise
    except Exception as error:
        raise DatasetError(f"{path} cannot be read: {error!r}.") from error

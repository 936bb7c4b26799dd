"""Unfinished recordings: episodes are kept in shards while they are recorded, then written as a data set.

.NAME.partial/              beside the data set NAME; hidden, so that Minari does not list it
00000000.npz, …             shards of whole episodes, named by their first one
.lock                       held while a process records
minari/                     the data set while it is being written; moved to its place when it is complete

A shard is written completely or not at all, and holds all that later episodes depend on: a process may be killed at any
time, and the next one continues from the last shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import filelock
import numpy as np
from numpy.typing import NDArray

from meam_policy.atomic_files import atomic_file, move_folder, size_of, write_failure
from meam_policy.errors import ConfigError, DatasetError, LockedError, OutputError
from meam_policy.given_files import open_regular
from meam_training.collection.demonstrators import Episode

__all__ = ["PartialRecording"]

SHARD_TRANSITIONS: Final = 5000
"""Transitions kept in memory before a shard is written; they are lost if the process is killed."""

GeneratorStates = list[dict[str, Any]]
"""The `bit_generator.state` of each generator whose state carries over between episodes."""


class Progress(NamedTuple):
    """Progress of a recording; `generators` are the generators' states after the last episode."""

    episodes: int = 0
    transitions: int = 0
    generators: GeneratorStates | None = None


class PartialRecording:
    """The unfinished recording of a data set.

    Attributes:
        folder: Folder of the recording.

    Example:
        with PartialRecording.open(folder, settings, resume=False) as partial:
            partial.add(episode, generator_states)
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], saved: Progress) -> None:
        self.folder = folder
        self._settings = dict(settings)
        # One attribute, so that an interrupt cannot leave only one of the two changed.
        self._state: tuple[Progress, list[tuple[Episode, GeneratorStates]]] = (saved, [])

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[PartialRecording]:
        """Start or continue a recording; on exit, recorded episodes are saved.

        Args:
            folder: Folder of the recording.
            settings: All settings that determine the data, as JSON data.
            resume: Continue the recording in the folder, if there is one.

        Raises:
            OutputError: there is an unfinished recording although `resume` is false, or the folder cannot be written.
            ConfigError: the unfinished recording has other settings.
            LockedError: another process is recording.
            DatasetError: a shard is broken.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise LockedError(f"Another process is recording into {folder}. Wait for it.") from error
        except OSError as error:
            raise OutputError(f"The folder {folder} cannot be created: {error.strerror}.") from error
        try:
            saved = _saved_progress(folder, settings, resume)
            recording = cls(folder, settings, saved)
            try:
                yield recording
            finally:
                recording.flush()
        finally:
            lock.release()
            if not _shards(folder):
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def progress(self) -> Progress:
        """Progress of the recording, including unsaved episodes."""
        saved, pending = self._state
        return Progress(
            episodes=saved.episodes + len(pending),
            transitions=saved.transitions + sum(len(episode.rewards) for episode, _ in pending),
            generators=pending[-1][1] if pending else saved.generators,
        )

    def add(self, episode: Episode, generators: GeneratorStates) -> None:
        """Add the next episode, with the generators' states after it."""
        saved, pending = self._state
        pending.append((episode, generators))
        if self.progress.transitions - saved.transitions >= SHARD_TRANSITIONS:
            self.flush()

    def flush(self) -> None:
        """Save the episodes that are still only in memory.

        Raises:
            OutputError: the folder cannot be written, for instance because the disk is full.
        """
        saved, pending = self._state
        if not pending:
            return
        progress = self.progress
        about = json.dumps({"settings": self._settings, **progress._asdict()})
        arrays = _to_arrays([episode for episode, _ in pending])
        try:
            # An interrupted flush is repeated under the same name.
            with atomic_file(self.folder / f"{saved.episodes:08d}.npz") as file:
                np.savez(file, about=np.array(about), **arrays)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            reason = write_failure(error, self.folder, len(about) + sum(array.nbytes for array in arrays.values()))
            raise OutputError(f"The recording {self.folder} cannot be written: {reason}.") from error
        self._state = (progress, [])

    def shards(self) -> Iterator[list[Episode]]:
        """The saved episodes, shard by shard."""
        for file in _shards(self.folder):
            yield _from_arrays(_load(file))

    def finish(self, written: Path, destination: Path) -> None:
        """Move the data set that `write_minari` wrote to its place, and delete the shards.

        Raises:
            OutputError: the data set cannot be moved.
        """
        try:
            move_folder(written, destination)
            for file in _shards(self.folder):
                file.unlink()
        except OSError as error:
            reason = write_failure(error, destination, size_of(self.folder))
            raise OutputError(f"The data set {destination} cannot be written: {reason}.") from error


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.npz"))


def _load(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with open_regular(file) as opened, np.load(opened, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise DatasetError(f"The shard {file} is broken ({error}). Delete {file.parent} and record again.") from error


def _saved_progress(folder: Path, settings: Mapping[str, Any], resume: bool) -> Progress:
    shards = _shards(folder)
    if not shards:
        return Progress()
    if not resume:
        raise OutputError(
            f"An unfinished recording is in {folder}. Continue it (--resume, or resume=True), or delete the folder."
        )
    try:
        about = json.loads(str(_load(shards[-1])["about"]))
        recorded = about.pop("settings")
        saved = Progress(**about)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"The shard {shards[-1]} is broken ({error!r}). Delete {folder} and record again."
        ) from error
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"The unfinished recording {folder} has {name} = {recorded.get(name)!r}, but now it is {value!r}. "
                "Resume with the same settings, or delete the folder."
            )
    return saved


def _to_arrays(episodes: list[Episode]) -> dict[str, NDArray[Any]]:
    """Concatenate episodes; for a Dict space, there is one array "observations/KEY" per key."""
    columns: dict[str, list[NDArray[Any]]] = {}
    for episode in episodes:
        for field, value in episode._asdict().items():
            if value is None:
                continue
            named = {f"{field}/{key}": array for key, array in value.items()} if isinstance(value, dict) else None
            for name, array in (named or {field: value}).items():
                columns.setdefault(name, []).append(array)
    lengths = np.array([len(episode.rewards) for episode in episodes])
    return {name: np.concatenate(arrays) for name, arrays in columns.items()} | {"lengths": lengths}


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> list[Episode]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    # Each episode has one more observation than it has steps.
    seen = {
        name: np.split(array, ends + np.arange(1, len(ends) + 1))
        for name, array in arrays.items()
        if name.startswith("observations")
    }
    names = [name for name in ("actions", "rewards", "terminations", "successes") if name in arrays]
    acted = [np.split(arrays[name], ends) for name in names]
    episodes = []
    for index, columns in enumerate(zip(*acted, strict=True)):
        named = {name.partition("/")[2]: parts[index] for name, parts in seen.items()}
        episodes.append(Episode(named.get("", named), **dict(zip(names, columns, strict=True))))
    return episodes

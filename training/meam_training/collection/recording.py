"""Episodes on their way into a Minari data set: kept in shards while they are recorded, then written at once.

.NAME.partial/              beside the data set NAME; hidden, so that Minari does not list it
00000000.npz, …             shards of whole episodes, named by their first one
.lock                       held while a process records
minari/                     the data set while it is being written; moved away when it is complete

A shard is written whole or not at all, and holds all that the episodes after it depend on: a process may be killed at
any time, and the next one goes on from the last shard.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import filelock
import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.atomic_files import atomic_file, flush_to_disk
from meam_policy.errors import ConfigError, DatasetError, LockedError, OutputError
from meam_training.collection.demonstrators import Episode

__all__ = ["Metadata", "PartialRecording", "write_minari"]

SHARD_TRANSITIONS: Final = 5000
"""Transitions that are kept in memory, and lost when the process is killed."""

GeneratorStates = list[dict[str, Any]]
"""`bit_generator.state` of every generator that goes on from one episode to the next."""


class Progress(NamedTuple):
    """How far a recording is: `generators` is their state after the last of `episodes`."""

    episodes: int = 0
    transitions: int = 0
    generators: GeneratorStates | None = None


class Metadata(NamedTuple):
    """What a data set says about itself."""

    algorithm: str
    description: str
    further: dict[str, Any]


class PartialRecording:
    """The unfinished recording of a data set.

    Attributes:
        folder: Where it is.

    Example:
        with PartialRecording.open(folder, settings) as partial:
            partial.add(episode, generator_states)
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], saved: Progress) -> None:
        self.folder = folder
        self._settings = dict(settings)
        # One attribute, so that an interrupt finds both or neither changed.
        self._state: tuple[Progress, list[tuple[Episode, GeneratorStates]]] = (saved, [])

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[PartialRecording]:
        """Start a recording, or go on with one; on the way out, what was recorded is saved.

        Args:
            folder: Its folder.
            settings: All that decides about the data, as JSON data.
            resume: Go on with what is there, if anything is.

        Raises:
            OutputError: there is an unfinished recording and `resume` is false, or the folder cannot be written.
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
            raise OutputError(f"The folder {folder} cannot be made: {error.strerror}.") from error
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
        """How far the recording is, unsaved episodes included."""
        saved, pending = self._state
        return Progress(
            episodes=saved.episodes + len(pending),
            transitions=saved.transitions + sum(len(episode.rewards) for episode, _ in pending),
            generators=pending[-1][1] if pending else saved.generators,
        )

    def add(self, episode: Episode, generators: GeneratorStates) -> None:
        """Take the next episode, and the states of the generators after it."""
        saved, pending = self._state
        pending.append((episode, generators))
        if self.progress.transitions - saved.transitions >= SHARD_TRANSITIONS:
            self.flush()

    def flush(self) -> None:
        """Save the episodes that are only in memory.

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
            # An interrupted flush is repeated, under the same name.
            with atomic_file(self.folder / f"{saved.episodes:08d}.npz") as file:
                np.savez(file, about=np.array(about), **arrays)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise OutputError(f"The recording {self.folder} cannot be written: {error.strerror}.") from error
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
            for file in filter(Path.is_file, written.rglob("*")):
                flush_to_disk(file)
            written.rename(destination)
            for file in _shards(self.folder):
                file.unlink()
        except OSError as error:
            raise OutputError(f"The data set {destination} cannot be written: {error}.") from error


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.npz"))


def _load(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise DatasetError(f"The shard {file} is broken ({error}). Delete {file.parent} and record again.") from error


def _saved_progress(folder: Path, settings: Mapping[str, Any], resume: bool) -> Progress:
    shards = _shards(folder)
    if not shards:
        return Progress()
    if not resume:
        raise OutputError(
            f"An unfinished recording is in {folder}. Go on with it (--resume, or resume=True), or delete the folder."
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
                f"The unfinished recording {folder} has {name} {recorded.get(name)!r}, and this one {value!r}. "
                "Resume with the same settings, or delete the folder."
            )
    return saved


def _to_arrays(episodes: list[Episode]) -> dict[str, NDArray[Any]]:
    """The episodes end to end; of a Dict space, "observations/KEY" is one array."""
    columns: dict[str, list[NDArray[Any]]] = {}
    for episode in episodes:
        for field, value in episode._asdict().items():
            named = {f"{field}/{key}": array for key, array in value.items()} if isinstance(value, dict) else None
            for name, array in (named or {field: value}).items():
                columns.setdefault(name, []).append(array)
    lengths = np.array([len(episode.rewards) for episode in episodes])
    return {name: np.concatenate(arrays) for name, arrays in columns.items()} | {"lengths": lengths}


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> list[Episode]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    # One observation more than there are steps in every episode.
    seen = {
        name: np.split(array, ends + np.arange(1, len(ends) + 1))
        for name, array in arrays.items()
        if name.startswith("observations")
    }
    acted = [np.split(arrays[name], ends) for name in ("actions", "rewards", "terminations")]
    episodes = []
    for index, (actions, rewards, terminations) in enumerate(zip(*acted, strict=True)):
        named = {name.partition("/")[2]: parts[index] for name, parts in seen.items()}
        episodes.append(Episode(named.get("", named), actions, rewards, terminations))
    return episodes


def write_minari(recording: PartialRecording, name: str, env: gymnasium.Env[Any, Any], metadata: Metadata) -> Path:
    """Write a recording as a Minari data set into its own folder, one shard in memory at a time.

    Args:
        recording: The recording.
        name: Minari id.
        env: The environment, for its specification and spaces.
        metadata: What the data set says about itself.

    Returns:
        The folder of the data set.

    Raises:
        OutputError: the folder cannot be written.
    """
    import minari

    staging, shards = recording.folder / "minari", recording.shards()
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        with _minari_root(staging), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata that a local data set does not need
            dataset = minari.create_dataset_from_buffers(
                dataset_id=name,
                buffer=_buffers(next(shards)),
                env=env.unwrapped,
                observation_space=env.observation_space,
                action_space=env.action_space,
                algorithm_name=metadata.algorithm,
                description=metadata.description,
                data_format="hdf5",
            )
        for episodes in shards:
            dataset.storage.update_episodes(_buffers(episodes))
        dataset.storage.update_metadata(metadata.further)
    except OSError as error:
        raise OutputError(f"The data set {name} cannot be written into {staging}: {error}.") from error
    return staging / name


def _buffers(episodes: list[Episode]) -> list[Any]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    return [
        EpisodeBuffer(
            observations={key: list(array) for key, array in e.observations.items()}
            if isinstance(e.observations, dict)
            else list(e.observations),
            actions=list(e.actions),
            rewards=list(e.rewards),
            terminations=list(e.terminations),
            truncations=[False] * (len(e.rewards) - 1) + [not e.terminations[-1]],
        )
        for e in episodes
    ]


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)  # minari has no other way to say where
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MINARI_DATASETS_PATH", None)
        else:
            os.environ["MINARI_DATASETS_PATH"] = before

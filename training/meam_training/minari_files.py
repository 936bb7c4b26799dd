"""Opening Minari data sets without trusting them.

Minari builds the environment named in a data set's metadata when a space is missing there, which runs the code that
the metadata names; and HDF5 files may link to other files. Both are refused before Minari sees the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
from gymnasium import spaces

from meam_policy.errors import DatasetError, MissingExtraError, NotFoundError

if TYPE_CHECKING:
    from minari.dataset.episode_data import EpisodeData

__all__ = ["MinariSource", "minari_root", "open_minari"]

MAX_COMPRESSION = 1100
"""Bytes that one stored byte may stand for; deflate, the strongest usual filter, reaches 1032."""

MAX_EPISODES = 10_000_000
"""Episodes that a data set may claim to have; Minari makes room for them before it looks."""


@dataclass(frozen=True)
class MinariSource:
    """A checked Minari data set.

    Attributes:
        episodes: Iterates over the episodes, reading them one by one.
        observation_space: Recorded observation space.
        action_space: Recorded action space.
        dataset_id: Minari id.
        environment_id: Gymnasium id of the environment, if recorded. It is only a name here; nothing is built.
        control_rate_hz: Rate of the actions, if recorded by `meam collect`.
    """

    episodes: Iterator[EpisodeData]
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    dataset_id: str
    environment_id: str | None
    control_rate_hz: float | None


def minari_root() -> Path:
    """The folder of the local Minari data sets: `MINARI_DATASETS_PATH`, or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def open_minari(id_or_path: str | os.PathLike[str]) -> MinariSource:
    """Check a Minari data set's files and open it.

    Raises:
        NotFoundError: there is no such data set on this machine.
        DatasetError: the files would run code, reach outside, or are not Minari's.
    """
    folder = _find(id_or_path)
    metadata = _read_metadata(folder / "metadata.json")
    for name in ("observation_space", "action_space", "dataset_id"):
        if not isinstance(metadata.get(name), str):
            raise DatasetError(
                f"{folder / 'metadata.json'} records no {name}. Without its spaces, opening the data set would run "
                "code that its env_spec names, so it is refused. Add it to the metadata, or record the data again."
            )
    episodes = metadata.get("total_episodes")
    if type(episodes) is not int or not 0 <= episodes <= MAX_EPISODES:
        raise DatasetError(
            f"{folder / 'metadata.json'}: total_episodes is {episodes!r}; expected a whole number up to {MAX_EPISODES}."
        )
    for file in sorted(folder.glob("**/*")):
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"{file} links to {file.resolve()}, outside the data set. Copy the file there instead.")
        if file.suffix in (".hdf5", ".h5"):
            _check_hdf5(file)
    try:
        from minari import MinariDataset
    except ImportError as error:
        raise MissingExtraError("Reading Minari data needs minari: pip install 'meam-policy[train]'.") from error
    try:
        dataset = MinariDataset(folder)
    except Exception as error:  # Minari does not say what it raises when a file is broken
        raise DatasetError(f"{folder} is not a data set that Minari can open: {error!r}.") from error
    rate, named = metadata.get("control_rate_hz"), metadata.get("meam_environment_id")
    return MinariSource(
        episodes=_episodes(dataset, folder),
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        dataset_id=dataset.id,
        environment_id=named if isinstance(named, str) else dataset.env_spec.id if dataset.env_spec else None,
        control_rate_hz=float(rate) if isinstance(rate, (int, float)) and 0 < rate < math.inf else None,
    )


def _find(id_or_path: str | os.PathLike[str]) -> Path:
    given = Path(id_or_path).expanduser()
    for folder in (given, given / "data", minari_root() / given / "data"):
        if (folder / "metadata.json").is_file():
            return folder
    raise NotFoundError(
        f"There is no Minari data set {id_or_path}, neither as a folder nor in {minari_root()}. "
        "Record one with `meam collect`, or fetch one with `minari download`."
    )


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise DatasetError(f"{file} is not JSON: {error}.") from error
    if not isinstance(metadata, dict):
        raise DatasetError(f"{file} holds a {type(metadata).__name__}; expected an object.")
    return metadata


def _check_hdf5(file: Path) -> None:
    try:
        with h5py.File(file, "r") as opened:
            # Groups may hold themselves, or each other many times over: visit each once.
            pending: list[h5py.Group] = [opened]
            visited = set()
            while pending:
                group = pending.pop()
                address = h5py.h5o.get_info(group.id).addr  # pyright: ignore[reportAttributeAccessIssue]
                if address not in visited:
                    visited.add(address)
                    pending += _subgroups(group, file)
    except DatasetError:
        raise
    except Exception as error:  # h5py raises half a dozen kinds when a file is broken
        raise DatasetError(f"{file} is not an HDF5 file: {error!r}.") from error


def _subgroups(group: h5py.Group, file: Path) -> list[h5py.Group]:
    """The groups in a group, after checking that nothing in it reaches elsewhere."""
    groups = []
    for name in group:
        where = f"{file}: {group.name.rstrip('/')}/{name}"  # pyright: ignore[reportOptionalMemberAccess]
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise DatasetError(f"{where} is a link to elsewhere, so it is refused. Record the data into the file.")
        item = group[name]
        if isinstance(item, h5py.Group):
            groups.append(item)
        elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            raise DatasetError(f"{where} is stored in another file, so it is refused. Record the data into the file.")
        elif isinstance(item, h5py.Dataset) and item.nbytes > MAX_COMPRESSION * item.id.get_storage_size():
            raise DatasetError(
                f"{where} claims {item.nbytes} bytes and stores {item.id.get_storage_size()}, so it is refused: it "
                "would fill the memory with nothing. Record the data again."
            )
    return groups


def _episodes(dataset: Any, folder: Path) -> Iterator[EpisodeData]:
    try:
        yield from dataset.iterate_episodes()
    except Exception as error:  # as above
        raise DatasetError(f"{folder}: an episode cannot be read: {error!r}.") from error

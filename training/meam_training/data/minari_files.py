"""Opening Minari data sets without trusting them.

Minari builds the environment named in a data set's metadata when a space is missing there, which runs the code that
the metadata names; HDF5 files may link to other files; files of all formats may claim to hold far more than they do.
All of this is refused before Minari sees the files. The one exception is the size of compressed Arrow buffers, which is
known only once they are opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymnasium import spaces

from meam_policy.errors import DatasetError, FormatError, NotFoundError
from meam_policy.extras import needs
from meam_policy.given_files import given_path, read_regular
from meam_policy.spec import EnvironmentSpec
from meam_training.data.hdf5_files import MAX_COMPRESSION, check_hdf5
from meam_training.data.parquet_files import require_pyarrow

if TYPE_CHECKING:
    from minari import MinariDataset
    from minari.dataset.episode_data import EpisodeData

__all__ = ["MinariSource", "find_minari", "minari_root", "open_minari", "source_files"]

MAX_ARROW_ROWS = 131_072
"""Rows of an Arrow or Parquet episode that Minari reads; it would silently drop the others."""

MAX_EPISODES = 10_000_000
"""Largest number of episodes that a data set may claim; Minari allocates memory for them before it reads any."""


@dataclass(frozen=True)
class MinariSource:
    """A checked Minari data set.

    Attributes:
        episodes: Iterator over the episodes, which reads them one by one.
        observation_space: Recorded observation space.
        action_space: Recorded action space.
        dataset_id: Minari id.
        environment_id: Gymnasium id of the environment, if recorded; only a name, no environment is created.
        control_rate_hz: Rate at which actions were applied, Hz, if recorded by `meam collect`.
        environment: How it is made, if recorded, by the name `environment_id`.
    """

    episodes: Iterator[EpisodeData]
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    dataset_id: str
    environment_id: str | None
    control_rate_hz: float | None
    environment: EnvironmentSpec | None = None


def minari_root() -> Path:
    """Folder of the local Minari data sets: `MINARI_DATASETS_PATH`, or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def open_minari(id_or_path: str | os.PathLike[str]) -> MinariSource:
    """Check a Minari data set's files and open it.

    Raises:
        NotFoundError: there is no such local data set.
        DatasetError: the files would run code, refer to files outside the data set, or are not Minari's.
    """
    folder = find_minari(id_or_path)
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
    files = source_files(folder)
    for file in files:
        if file.suffix in (".hdf5", ".h5"):
            check_hdf5(file)
    if metadata.get("data_format") in ("arrow", "parquet"):
        _check_arrow(folder, files, metadata["data_format"])
    with needs("Reading Minari data", "minari", "train"):
        from minari import MinariDataset
    try:
        dataset = MinariDataset(folder)
    except Exception as error:  # Minari does not document what it raises for a broken file
        raise DatasetError(f"{folder} is not a data set that Minari can open: {error!r}.") from error
    rate, named = metadata.get("control_rate_hz"), metadata.get("meam_environment_id")
    return MinariSource(
        episodes=_episodes(dataset, folder),
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        dataset_id=dataset.id,
        environment_id=named if isinstance(named, str) else dataset.env_spec.id if dataset.env_spec else None,
        control_rate_hz=float(rate) if isinstance(rate, (int, float)) and 0 < rate < math.inf else None,
        environment=_recorded_environment(dataset, named if isinstance(named, str) else None, folder),
    )


def _recorded_environment(dataset: MinariDataset, named: str | None, folder: Path) -> EnvironmentSpec | None:
    """What a data set records of its environment, and of another one for evaluation; nothing is executed."""
    recorded = dataset.env_spec
    if recorded is None:
        return None
    evaluation = dataset._eval_env_spec  # there is no public way
    try:
        spec = EnvironmentSpec.of(recorded, named)
        if evaluation is None or evaluation.to_json() == recorded.to_json():
            return spec
        return replace(spec, evaluation=EnvironmentSpec.of(evaluation))
    except (FormatError, AttributeError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{folder / 'metadata.json'} records its environment (env_spec, eval_env_spec) in a form that is not "
            f"followed: {error} Record the data again, or take these out of the metadata."
        ) from error


def find_minari(id_or_path: str | os.PathLike[str]) -> Path:
    """Find the folder of a Minari data set that contains its metadata.json.

    Raises:
        NotFoundError: there is no such local data set.
    """
    given = given_path("The data set", id_or_path)
    for folder in (given, given / "data", minari_root() / given / "data"):
        if (folder / "metadata.json").is_file():
            return folder.resolve()
    raise NotFoundError(
        f"There is no Minari data set {id_or_path}, neither as a folder nor in {minari_root()}. "
        "Record one with `meam collect`, or fetch one with `minari download`."
    )


def source_files(folder: Path) -> list[Path]:
    """List all files in a folder and its subfolders, sorted.

    Raises:
        DatasetError: a file or subfolder links to a target outside the folder, or is a named pipe, socket or device.
    """
    files = []
    for path in sorted(folder.glob("**/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"{path} links to {path.resolve()}, outside the data set. Copy the file there instead.")
        if path.is_file():
            files.append(path)
        elif not path.is_dir():  # a reader would wait for ever
            raise DatasetError(f"{path} is neither a file nor a folder; expected only these. Delete it.")
    return files


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(read_regular(file))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise DatasetError(f"{file} is not JSON: {error}.") from error
    if not isinstance(metadata, dict):
        raise DatasetError(f"{file} holds a {type(metadata).__name__}; expected an object.")
    return metadata


def _check_arrow(folder: Path, files: list[Path], data_format: str) -> None:
    """Check that each episode is one file with one record batch, as Minari assumes."""
    require_pyarrow()
    seen = set()
    for file in files:
        episode = file.relative_to(folder).parts[0]
        if file.parent == folder or file.name.startswith(("_", ".", "metadata.json")):
            continue  # Minari ignores these too
        if episode in seen:
            raise DatasetError(f"{folder / episode} has several data files; expected one per episode. Record it again.")
        seen.add(episode)
        try:
            rows, claimed = (_arrow_size if data_format == "arrow" else _parquet_size)(file)
        except Exception as error:  # pyarrow raises many kinds of errors for a broken file
            raise DatasetError(f"{file} is not an {data_format} file: {error!r}.") from error
        if rows > MAX_ARROW_ROWS:
            raise DatasetError(
                f"{file} has {rows} rows; expected at most {MAX_ARROW_ROWS}, all that Minari reads of an episode. "
                "Record shorter episodes, or use HDF5."
            )
        if claimed > MAX_COMPRESSION * file.stat().st_size:
            raise DatasetError(
                f"{file} claims {claimed} bytes and stores {file.stat().st_size}, so it is refused: it would fill "
                "the memory with nothing. Record the data again."
            )


def _arrow_size(file: Path) -> tuple[int, int]:
    """Rows and bytes of an Arrow file, after validating its buffers."""
    import pyarrow
    import pyarrow.ipc

    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_file(mapped) as reader:
        if reader.num_record_batches != 1:
            raise DatasetError(f"{file} has {reader.num_record_batches} record batches; expected one. Record it again.")
        batch = reader.get_batch(0)
        batch.validate(full=True)
        return batch.num_rows, batch.nbytes


def _parquet_size(file: Path) -> tuple[int, int]:
    """Rows and decoded bytes that a Parquet file claims to hold."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        return sum(group.num_rows for group in groups), sum(group.total_byte_size for group in groups)


def _episodes(dataset: Any, folder: Path) -> Iterator[EpisodeData]:
    try:
        yield from dataset.iterate_episodes()
    except Exception as error:  # as above
        raise DatasetError(f"{folder}: an episode cannot be read: {error!r}.") from error

"""Writing a recording as a Minari data set."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium

from meam_policy.errors import OutputError
from meam_training.collection.demonstrators import Episode
from meam_training.collection.partial_recording import PartialRecording

__all__ = ["Metadata", "write_minari"]


class Metadata(NamedTuple):
    """Metadata of a data set."""

    algorithm: str
    description: str
    further: dict[str, Any]


def write_minari(recording: PartialRecording, name: str, env: gymnasium.Env[Any, Any], metadata: Metadata) -> Path:
    """Write a recording as a Minari data set, within the recording's own folder and one shard at a time.

    Args:
        recording: The recording.
        name: Minari id.
        env: The environment, for its specification and spaces.
        metadata: Metadata of the data set.

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
            warnings.simplefilter("ignore", UserWarning)  # Minari warns of metadata that only published data sets need
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
            # One more than steps, as in all infos of Minari: the first belongs to the reset.
            infos=None if e.successes is None else {"success": [False, *e.successes]},
        )
        for e in episodes
    ]


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)  # the only way to set Minari's output folder
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MINARI_DATASETS_PATH", None)
        else:
            os.environ["MINARI_DATASETS_PATH"] = before

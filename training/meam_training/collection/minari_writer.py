"""Writing a recording as a Minari data set."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from meam_policy.atomic_files import size_of, write_failure
from meam_policy.environments.space_check import AnyEnv
from meam_policy.errors import OutputError
from meam_training.collection.demonstrators import Episode
from meam_training.collection.partial_recording import PartialRecording

__all__ = ["DescribedEnvironment", "Metadata", "write_minari"]


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
        env: The environment, for its specification and spaces; see `DescribedEnvironment`.
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
                env=env,
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
        shutil.rmtree(staging, ignore_errors=True)
        reason = write_failure(error, staging, size_of(recording.folder))  # the shards have as many numbers
        raise OutputError(f"The data set {name} cannot be written into {staging}: {reason}.") from error
    return staging / name


class DescribedEnvironment(gymnasium.Env[Any, Any]):
    """What Minari records of an environment, or of a robot: its spaces, and how it is made, if that is known."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], spec: EnvSpec | None
    ) -> None:
        self.observation_space, self.action_space, self.spec = observation_space, action_space, spec

    @classmethod
    def of(cls, env: AnyEnv) -> DescribedEnvironment:
        """Describe an environment, or one of a vector environment, which Minari itself does not accept."""
        spec = _plain(_made_by(env))
        if isinstance(env, gymnasium.vector.VectorEnv):
            return cls(env.single_observation_space, env.single_action_space, spec)
        return cls(env.observation_space, env.action_space, spec)


def _made_by(env: AnyEnv) -> EnvSpec | None:
    """Gymnasium's specification with all wrappers; of a vector environment, that of its first environment."""
    call = getattr(env.unwrapped, "call", None) if isinstance(env, gymnasium.vector.VectorEnv) else None
    return env.spec if call is None else call("spec")[0]


def _plain(spec: EnvSpec | None) -> EnvSpec | None:
    """The specification as JSON can hold it: None if its arguments are objects; wrappers without such arguments."""
    if spec is None or not _is_json(replace(spec, additional_wrappers=())):
        return None
    wrappers = [
        wrapper if _is_json(replace(spec, additional_wrappers=(wrapper,))) else replace(wrapper, kwargs=None)
        for wrapper in spec.additional_wrappers
    ]
    return replace(spec, additional_wrappers=tuple(wrappers))


def _is_json(spec: EnvSpec) -> bool:
    try:
        spec.to_json()
    except (TypeError, ValueError):
        return False
    return True


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

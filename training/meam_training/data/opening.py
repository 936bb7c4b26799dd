"""Data as the command line names it: one source or several, of whatever kind they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from meam_policy.commands.environment_options import environment_arguments, say_as_registered
from meam_policy.environments.make import with_arguments
from meam_policy.errors import ConfigError, DatasetError
from meam_policy.given_files import given_path
from meam_training.data.dataset import OfflineDataset
from meam_training.data.lerobot_source import is_lerobot
from meam_training.data.selection import episode_range

__all__ = ["DataArguments", "DataChoices", "absolute", "open_dataset", "recorded_arguments"]

OTHER_SUFFIXES = {
    ".bag": "a ROS 1 bag",
    ".mcap": "an MCAP recording, as of ROS 2",
    ".db3": "a ROS 2 bag",
    ".tfrecord": "a TFRecord, as of RLDS",
    ".zarr": "a Zarr archive, as of Diffusion Policy",
    ".pkl": "a pickle, which could execute anything",
    ".pickle": "a pickle, which could execute anything",
    ".pt": "a file of PyTorch, which may hold a pickle",
    ".pth": "a file of PyTorch, which may hold a pickle",
    ".npy": "a single NumPy array",
    ".csv": "a table of text",
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".parquet": "a single Parquet file (of a LeRobot data set, the folder is read)",
    ".mat": "a file of MATLAB",
    ".mp4": "a video",
    ".zip": "an archive, to be unpacked first",
    ".gz": "an archive, to be unpacked first",
}
"""Files that are not read, by their suffix: what they are."""

OTHER_FOLDERS = {
    "features.json": "a TensorFlow data set, as of RLDS",
    "dataset_dict.json": "a dictionary of Hugging Face data sets",
    "state.json": "a Hugging Face data set without LeRobot's meta/info.json",
    ".zgroup": "a Zarr archive, as of Diffusion Policy",
    "zarr.json": "a Zarr archive",
    "metadata.yaml": "a ROS 2 bag",
    "policy.onnx": "a policy folder",
    "run.json": "a training run",
    "meta_data/info.json": "an old LeRobot data set",
}
"""Folders that are not read, by a file in them: what they are."""

KINDS = "a Minari data set, an OGBench .npz, an HDF5 file of D4RL or robomimic, or the folder of a LeRobot data set"


@dataclass(frozen=True, kw_only=True)
class DataChoices:
    """What of the data is taken, and how it is read: options of every command that opens data."""

    env_id: str | None = None
    """For an .npz file: OGBench single-task name, from whose goal rewards are computed. For other data: the environment
    they were recorded in, as it is registered, or module:id; by default what the data records."""
    shares: tuple[float, ...] = ()
    """With several data sets: the share of a batch that each has. Empty gives every row the same chance."""
    episodes: tuple[str, ...] = ()
    """Range of episodes of each data set, such as 0:100, or : for all."""
    observation_keys: tuple[str, ...] = ()
    """Keys of the observation, in the order of flattening; empty takes all that hold numbers."""
    action_key: str | None = None
    """For robomimic and LeRobot: key of the actions."""
    reward: str | None = None
    """For robomimic and LeRobot: key of the rewards; or end, 1 at the end of every episode; or none."""
    termination: str | None = None
    """For robomimic and LeRobot: key of the flags that are true where the task ended."""
    action_low: tuple[float, ...] | None = None
    """Lower bounds of the actions, where the data has none: one number, or one for each number of an action."""
    action_high: tuple[float, ...] | None = None
    """Upper bounds, likewise."""
    clip_actions: bool = False
    """Clip recorded actions to the bounds, as many simulators do, rather than refuse those beyond."""


@dataclass(frozen=True)
class DataArguments(DataChoices):
    """Which data, and what of it; the arguments of `meam train` by their names."""

    data: tuple[str, ...]
    """Sources: Minari ids, folders or files."""
    env_kwargs: str | None = None
    """Arguments of the environment, a JSON object; in place of recorded ones."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut off; None as recorded or registered."""

    @property
    def absolute(self) -> DataArguments:
        """The same with absolute paths, so that a run can be resumed from any folder; names of data sets are kept."""
        return replace(self, data=tuple(absolute(name) for name in self.data))

    def to_json(self) -> dict[str, Any]:
        """As JSON data, without what is not given; a single source is a text."""
        given = {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items() if value
        }
        return {**given, "data": self.data[0] if len(self.data) == 1 else list(self.data), "env_id": self.env_id}


def recorded_arguments(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DataArguments` that the record of a run has, with tuples for JSON's lists.

    Args:
        origin: What `DataArguments.to_json` gave, and possibly more.
    """
    found = {field.name: origin[field.name] for field in fields(DataArguments) if field.name in origin}
    if isinstance(found.get("data"), str):
        found["data"] = [found["data"]]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def absolute(name: str) -> str:
    """The absolute path of what exists on this machine; other names, such as those of data sets, as they are."""
    path = given_path("data", name)
    return str(path.resolve()) if path.exists() else name


def open_dataset(arguments: DataArguments) -> OfflineDataset:
    """Open the sources, choose their episodes, and join them if there are several.

    Raises:
        NotFoundError: a source does not exist.
        DatasetError: a source is of a kind that is not read, which is named; or see `OfflineDataset`.
        MissingExtraError: what reads it is not installed.
    """
    a = arguments
    for name, values in (("episodes", a.episodes), ("shares", a.shares)):
        if values and len(values) != len(a.data):
            raise DatasetError(
                f"--{name} has {len(values)} values and --data {len(a.data)}; expected one for each data set"
                f"{', : for all of its episodes' if name == 'episodes' else ''}."
            )
    if a.shares and len(a.data) == 1:
        raise DatasetError("--shares has no effect with one data set; leave it out, or give --data several.")
    ranges = [episode_range(text) for text in a.episodes]
    opened = [_open(name, a) for name in a.data]
    if ranges:
        opened = [each.choose_episodes(chosen) for each, chosen in zip(opened, ranges, strict=True)]
    if len(opened) == 1:
        (dataset,) = opened
    else:
        dataset = OfflineDataset.joined(opened, a.shares or None, environment_id=a.env_id)
    if a.env_id is not None:  # a data set that records its environment, too
        say_as_registered(a.env_id, dataset.recorded_environment, "The data's")
        dataset = replace(dataset, environment_id=a.env_id, environment=None)
    return _with_arguments(dataset, environment_arguments(a.env_kwargs, a.max_episode_steps))


def _with_arguments(dataset: OfflineDataset, arguments: dict[str, Any]) -> OfflineDataset:
    """The data with arguments of its environment, `max_episode_steps` among them."""
    if not arguments:
        return dataset
    recorded = dataset.recorded_environment
    if recorded is None:
        raise ConfigError(
            f"--env-kwargs or --max-episode-steps is given, but {dataset.dataset_id} names no environment. Name it, "
            "--env-id, or leave them out."
        )
    evaluation = None if recorded.evaluation is None else with_arguments(recorded.evaluation, arguments)
    return replace(dataset, environment=replace(with_arguments(recorded, arguments), evaluation=evaluation))


def _open(name: str, a: DataArguments) -> OfflineDataset:
    path = given_path("data", name)
    chosen: dict[str, Any] = {"action_key": a.action_key, "reward": a.reward, "termination": a.termination}
    bounds: dict[str, Any] = {"action_low": a.action_low, "action_high": a.action_high, "clip_actions": a.clip_actions}
    keys, suffix = a.observation_keys or None, path.suffix.lower()
    if suffix == ".npz":
        _refuse({"observation_keys": keys, **chosen}, name, "OGBench's .npz files have one array of each")
        return OfflineDataset.from_ogbench(name, a.env_id, **bounds)
    if suffix in (".hdf5", ".h5") and not path.is_dir():
        return OfflineDataset.from_hdf5(path, observation_keys=keys, environment_id=a.env_id, **chosen, **bounds)
    if is_lerobot(path):
        return OfflineDataset.from_lerobot(path, observation_keys=keys, environment_id=a.env_id, **chosen, **bounds)
    other = OTHER_SUFFIXES.get(suffix) if path.exists() else None
    if path.is_dir():
        other = other or next((kind for file, kind in OTHER_FOLDERS.items() if (path / file).exists()), None)
        if any(path.glob("*.tfrecord*")):
            other = "a TensorFlow data set, as of RLDS"
        elif next(path.glob("*.hdf5"), None) and not any(
            (path / at / "metadata.json").is_file() for at in ("", "data")
        ):
            other = "a folder of HDF5 files, each of them data of its own"
    elif path.is_file() and other is None:
        other = f"a file ending in {suffix!r}"
    if other is not None:
        raise DatasetError(
            f"{name} is {other}, which is not read as data; expected {KINDS}. In Python, OfflineDataset.from_arrays "
            "takes arrays of your own."
        )
    _refuse(chosen, name, "a Minari data set has actions, rewards and terminations of its own")
    return OfflineDataset.from_minari(name, observation_keys=keys, **bounds)


def _refuse(choices: dict[str, Any], name: str, why: str) -> None:
    for choice, value in choices.items():
        if value is not None:
            raise DatasetError(
                f"--{choice.replace('_', '-')} is {value}, but has no effect on {name}: {why}. Leave it out."
            )

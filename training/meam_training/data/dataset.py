"""Offline data: recorded transitions, checked before anything is learned from them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError, NotFoundError
from meam_policy.spec import BoxSpec
from meam_training.data.action_chunk import ActionChunkSampler
from meam_training.data.dataset_cache import (
    Columns,
    Recording,
    array_blocks,
    fingerprint,
    moments,
    open_cached,
    rows_per_block,
)
from meam_training.data.minari_files import MinariSource, find_minari, open_minari, source_files
from meam_training.data.npz_files import NpzFile, NpzMember
from meam_training.data.ogbench_rewards import STATES, ogbench_rewards
from meam_training.data.row_check import RowCheck, action_box_spec, flags, numbers, observation_box_specs, unit_box

__all__ = ["OfflineDataset"]


@dataclass(frozen=True, eq=False, repr=False)
class OfflineDataset:
    """Recorded transitions, one row each, with the spaces they were recorded in.

    Make one with `from_minari`, `from_ogbench` or `from_arrays`; all three check the data. The first two convert
    them once into arrays that are memory-mapped from then on, so that data larger than the memory can be used; see
    `meam_training.data.dataset_cache`.

    Attributes:
        observations: Flattened observations [n, observation_dim].
        actions: Flattened actions in environment units [n, action_dim].
        rewards: Rewards [n].
        next_observations: Observations after the actions [n, observation_dim].
        terminations: Where the task ended, so that nothing more is earned [n]; may be true mid-episode.
        episode_ends: True at the last row of every recorded episode [n].
        observation_boxes: The observation's boxes in the order of flattening.
        action_box: The action's box; its bounds are finite.
        dataset_id: Where the data came from.
        environment_id: Environment it was recorded in, if known.
        control_rate_hz: Rate at which actions were applied, if known.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    terminations: NDArray[np.bool_]
    episode_ends: NDArray[np.bool_]
    observation_boxes: tuple[BoxSpec, ...]
    action_box: BoxSpec
    dataset_id: str | None = None
    environment_id: str | None = None
    control_rate_hz: float | None = None

    def __repr__(self) -> str:
        """One line: the arrays would fill pages."""
        episodes = np.count_nonzero(self.episode_ends)
        return (
            f"OfflineDataset({self.dataset_id!r}, transitions={len(self)}, episodes={episodes}, "
            f"observation_dim={self.observation_dim}, action_dim={self.action_dim})"
        )

    def __len__(self) -> int:
        """Number of transitions."""
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        """Numbers in one flattened observation."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """Numbers in one flattened action."""
        return self.actions.shape[1]

    @cached_property
    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of every recorded episode, as recorded [episodes]."""
        starts = np.concatenate([[0], np.flatnonzero(self.episode_ends)[:-1] + 1])
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    @cached_property
    def observation_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of every observed number [observation_dim]."""
        return moments(lambda: array_blocks(self.observations))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all recorded numbers, in hexadecimal: a resumed run must go on with the same data."""
        names = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")
        return fingerprint({name: array_blocks(getattr(self, name)) for name in names})

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike | Mapping[str, ArrayLike],
        actions: ArrayLike,
        rewards: ArrayLike,
        next_observations: ArrayLike | Mapping[str, ArrayLike],
        terminations: ArrayLike,
        truncations: ArrayLike,
        *,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        dataset_id: str | None = None,
        environment_id: str | None = None,
        control_rate_hz: float | None = None,
    ) -> OfflineDataset:
        """Take transitions from arrays, one row a transition.

        Args:
            observations: [n, …] as in the observation space; a mapping of such arrays for a Dict space.
            actions: [n, …] as in the action space.
            rewards: [n].
            next_observations: Like `observations`.
            terminations: [n]; true where the task ended.
            truncations: [n]; true where the recording was cut. An episode ends at either flag, and at the last row.
            observation_space: Box, or Dict of Boxes; None takes an unbounded Box.
            action_space: Box with finite bounds; None takes [-1, 1], and requires the actions to lie there.
            dataset_id: Name of the data, recorded in policies trained on it.
            environment_id: Environment of the data.
            control_rate_hz: Rate at which the actions were applied.

        Raises:
            DatasetError: lengths differ, a shape or type does not fit its space, or a value is not finite or out of
                bounds; the message names episode, step and field.
        """
        ended, cut = (flags(v, n) for v, n in ((terminations, "terminations"), (truncations, "truncations")))
        if ended.shape != cut.shape:
            raise DatasetError(f"terminations has {len(ended)} rows, truncations {len(cut)}; expected as many.")
        if not len(ended):
            raise DatasetError("The data has no transitions; expected at least one.")
        ends = ended | cut
        ends[-1] = True
        boxes = observation_box_specs(observation_space, observations)
        if action_space is None:
            action_space = unit_box(numbers(actions, "actions").shape)
        action_box = action_box_spec(action_space)
        return cls(
            **RowCheck(boxes, action_box)(observations, actions, rewards, next_observations, ended, ends),
            observation_boxes=boxes,
            action_box=action_box,
            dataset_id=dataset_id,
            environment_id=environment_id,
            control_rate_hz=control_rate_hz,
        )

    @classmethod
    def from_minari(cls, id_or_path: str | os.PathLike[str]) -> OfflineDataset:
        """Read a Minari data set that is on this machine.

        Terminations in the middle of a recorded episode are kept as marks where nothing more is earned; the
        episode goes on. The files are checked before Minari opens them: nothing in a data set is executed.

        Args:
            id_or_path: A Minari id such as "D4RL/door/human-v2" (under `MINARI_DATASETS_PATH`, by default
                ~/.minari/datasets), or the folder of a data set.

        Raises:
            NotFoundError: there is no such data set here.
            DatasetError: as in `from_arrays`; and the files would run code, reach outside, or are not Minari's.
        """
        folder = find_minari(id_or_path)
        return open_cached(folder, source_files(folder), [], lambda: _minari_recording(folder), cls._from_recording)

    @classmethod
    def from_ogbench(cls, npz: str | os.PathLike[str], environment_id: str | None = None) -> OfflineDataset:
        """Read a data set in OGBench's `.npz` format.

        Args:
            npz: The file; its last row of every trajectory has `terminals` set and no successor.
            environment_id: OGBench single-task name, such as "cube-single-play-singletask-task1-v0", from whose goal
                the rewards and masks are computed, as OGBench does. Needed if the file has no rewards of its own.

        Raises:
            NotFoundError: there is no such file or environment.
            DatasetError: as in `from_arrays`; or the file is not OGBench's.
            MissingExtraError: rewards are to be computed and OGBench is not installed.
        """
        path = Path(npz).expanduser()
        if not path.is_file():
            raise NotFoundError(f"There is no file {path}.")
        settings = [path.stem, environment_id, environment_id and _installed_version("ogbench")]
        source = path.resolve()
        return open_cached(
            source, [source], settings, lambda: _ogbench_recording(path, environment_id), cls._from_recording
        )

    @classmethod
    def _from_recording(cls, about: dict[str, Any], columns: Columns) -> OfflineDataset:
        boxes = [_box_spec(box) for box in (*about["observation_boxes"], about["action_box"])]
        widths = {"observations": sum(box.size for box in boxes[:-1]), "actions": boxes[-1].size}
        if any(columns[name].shape[1:] != (width,) for name, width in widths.items()):
            raise ValueError(f"Columns are not {widths} numbers wide")  # a broken cache
        names = ("dataset_id", "environment_id", "control_rate_hz")
        dataset = cls(
            **columns,
            observation_boxes=tuple(boxes[:-1]),
            action_box=boxes[-1],
            **{name: about[name] for name in names},
        )
        if "fingerprint" in about:
            # As the cached properties would find them, without a pass over the data.
            mean, std = np.array(about["moments"])
            vars(dataset).update(fingerprint=about["fingerprint"], observation_moments=(mean, std))
        return dataset

    def chunk_sampler(self, chunk_size: int, discount: float) -> ActionChunkSampler:
        """Prepare batches of action chunks.

        Args:
            chunk_size: Actions in a chunk, at least 1.
            discount: Discount per step, in (0, 1].

        Raises:
            DatasetError: no episode is as long as a chunk.
        """
        return ActionChunkSampler(
            self.observations,
            self.actions,
            self.next_observations,
            self.rewards,
            self.terminations,
            self.episode_ends,
            chunk_size,
            discount,
        )


def _minari_recording(folder: Path) -> Recording:
    source = open_minari(folder)
    boxes, action_box = observation_box_specs(source.observation_space, ()), action_box_spec(source.action_space)
    about = _about(boxes, action_box, source.dataset_id, source.environment_id, source.control_rate_hz)
    check, rows = RowCheck(boxes, action_box), rows_per_block(sum(box.size for box in boxes))
    return Recording(about, (check(*block) for block in _minari_blocks(source, rows)))


def _minari_blocks(source: MinariSource, rows: int) -> Iterator[tuple[Any, ...]]:
    """Join episodes to blocks of at least so many rows, in the order of `RowCheck`'s arguments."""
    pending, pending_rows, empty = [], 0, True
    for episode in source.episodes:
        length = len(episode.rewards)
        _check_lengths(source.dataset_id, episode, length)
        pending.append(episode)
        pending_rows, empty = pending_rows + length, False
        if pending_rows >= rows:
            yield _joined(pending)
            pending, pending_rows = [], 0
    if empty:
        raise DatasetError(f"{source.dataset_id} has no episodes; expected at least one.")
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


def _ogbench_recording(path: Path, environment_id: str | None) -> Recording:
    with NpzFile(path) as file:
        members = _ogbench_members(file, path, environment_id)
        shapes = {name: member.shape for name, member in members.items()}
    unbounded = spaces.Box(-np.inf, np.inf, shapes["observations"][1:] or (1,), np.float32)
    boxes, action_box = observation_box_specs(unbounded, ()), action_box_spec(unit_box(shapes["actions"]))
    check, rows = RowCheck(boxes, action_box), rows_per_block(boxes[0].size)
    return Recording(
        _about(boxes, action_box, path.stem, environment_id, None),
        (check(*block) for block in _ogbench_blocks(path, environment_id, rows)),
    )


def _ogbench_members(file: NpzFile, path: Path, environment_id: str | None) -> dict[str, NpzMember]:
    """Open the arrays that are needed, all of one length."""
    missing = sorted({"observations", "actions", "terminals"} - file.names)
    if missing:
        raise DatasetError(f"{path} has no {missing}; expected OGBench's observations, actions and terminals.")
    if environment_id is None and "rewards" not in file.names:
        raise DatasetError(f"{path} holds no rewards; pass environment_id= with a single-task OGBench name.")
    wanted = ("terminals", "observations", "actions", *(("rewards", "masks") if environment_id is None else STATES))
    members = {name: file.open(name) for name in wanted if name in file.names}
    terminals = members["terminals"].shape
    if len(terminals) != 1:
        raise DatasetError(f"{path}: terminals has shape {terminals}; expected one flag a row.")
    for name, member in members.items():
        if member.shape[:1] != terminals:
            raise DatasetError(
                f"{path}: {name} has shape {member.shape}; expected {terminals[0]} rows, as terminals has."
            )
    return members


def _ogbench_blocks(path: Path, environment_id: str | None, rows: int) -> Iterator[tuple[Any, ...]]:
    """Turn rows into transitions, in the order of `RowCheck`'s arguments."""
    with contextlib.ExitStack() as stack:
        members = _ogbench_members(stack.enter_context(NpzFile(path)), path, environment_id)
        label = None if environment_id is None else stack.enter_context(ogbench_rewards(environment_id))
        total, found = members["terminals"].shape[0], False
        last = {name: member.read(1) for name, member in members.items()}
        for _ in range(1, total, rows):
            # Begin with the row before, whose successor is the first one of this block.
            data = {name: np.concatenate([last[name], member.read(rows)]) for name, member in members.items()}
            last = {name: values[-1:] for name, values in data.items()}
            if label is not None:
                data |= label({name: data[name] for name in STATES if name in data})
            terminals = flags(data["terminals"], "terminals")
            kept = np.flatnonzero(~terminals[:-1])
            if len(kept):
                found = True
                masks = numbers(data["masks"][kept], "masks") if "masks" in data else np.ones(len(kept))
                yield (
                    data["observations"][kept],
                    data["actions"][kept],
                    data["rewards"][kept],
                    data["observations"][kept + 1],
                    masks == 0,
                    terminals[kept + 1],
                )
        if not total or not flags(last["terminals"], "terminals")[-1]:
            raise DatasetError(f"{path}: the last row is not terminal; expected every trajectory to end with one.")
        if not found:
            raise DatasetError(f"{path} has no transitions; expected trajectories of two or more rows.")


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _box_spec(box: dict[str, Any]) -> BoxSpec:
    tuples = {name: tuple(box[name]) for name in ("shape", "low", "high")}
    return BoxSpec(**{**box, **tuples})


def _about(
    boxes: Sequence[BoxSpec],
    action_box: BoxSpec,
    dataset_id: str | None,
    environment_id: str | None,
    control_rate_hz: float | None,
) -> dict[str, Any]:
    return {
        "observation_boxes": [asdict(box) for box in boxes],
        "action_box": asdict(action_box),
        "dataset_id": dataset_id,
        "environment_id": environment_id,
        "control_rate_hz": control_rate_hz,
    }


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

"""Offline data: recorded transitions, checked before anything is learned from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import DatasetError, NotFoundError
from meam_policy.spec import BoxSpec
from meam_training.action_chunk import ActionChunkSampler, chunk_targets
from meam_training.minari_files import open_minari
from meam_training.ogbench_rewards import ogbench_rewards

__all__ = ["OfflineDataset"]

BOUND_TOLERANCE = 1e-4
"""How far beyond its space a recorded number may lie, as a share of the space's width (at most 1 unit)."""


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Recorded transitions, one row each, with the spaces they were recorded in.

    Make one with `from_minari`, `from_ogbench` or `from_arrays`; all three check the data.

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
    def fingerprint(self) -> str:
        """SHA-256 over all recorded numbers, in hexadecimal: a resumed run must go on with the same data."""
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.next_observations):
            digest.update(np.ascontiguousarray(array, dtype="<f4").data)
        for flags in (self.terminations, self.episode_ends):
            digest.update(np.packbits(flags).data)
        return digest.hexdigest()

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
        ended, cut = (_flags(v, n) for v, n in ((terminations, "terminations"), (truncations, "truncations")))
        if ended.shape != cut.shape:
            raise DatasetError(f"terminations has {len(ended)} rows, truncations {len(cut)}; expected as many.")
        if not len(ended):
            raise DatasetError("The data has no transitions; expected at least one.")
        ends = ended | cut
        ends[-1] = True
        where = _Where(ends)
        boxes = _observation_boxes(observation_space, observations)
        current = _observation_rows(boxes, observations, "observations", where)
        following = _observation_rows(boxes, next_observations, "next_observations", where)
        acted = _numbers(actions, "actions")
        if action_space is None:
            action_space = spaces.Box(-1.0, 1.0, acted.shape[1:] or (1,), np.float32)
        action_box = BoxSpec.from_space(_box(action_space, "action space"))
        if np.dtype(action_box.dtype).kind != "f":
            raise DatasetError(f"The action space {action_space} has whole numbers; a flow policy needs a float Box.")
        if not np.isfinite([action_box.low, action_box.high]).all() or np.equal(action_box.low, action_box.high).any():
            raise DatasetError(
                f"The action space {action_space} is unbounded or has no width; a policy must know the box it may act "
                "in. Pass action_space= with finite bounds."
            )
        return cls(
            observations=current,
            actions=_rows(acted, action_box, "actions", where),
            rewards=_rows(_numbers(rewards, "rewards"), _REWARD, "rewards", where)[:, 0],
            next_observations=following,
            terminations=ended,
            episode_ends=ends,
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
        source = open_minari(id_or_path)
        _observation_boxes(source.observation_space, ())  # refuses what the loop below cannot slice
        observations, following, actions, rewards, terminations, ends = [], [], [], [], [], []
        for episode in source.episodes:
            length = len(episode.rewards)
            if length == 0:
                raise DatasetError(f"{source.dataset_id}: episode {episode.id} has no steps; expected at least one.")
            for name, values, expected in (
                ("observations", episode.observations, length + 1),
                ("actions", episode.actions, length),
                ("terminations", episode.terminations, length),
                ("truncations", episode.truncations, length),
            ):
                for array in values.values() if isinstance(values, Mapping) else [values]:
                    if len(array) != expected:
                        raise DatasetError(
                            f"{source.dataset_id}: episode {episode.id} has {len(array)} {name} and {length} rewards; "
                            f"expected {expected} {name}."
                        )
            observations.append(_slice(episode.observations, slice(None, -1)))
            following.append(_slice(episode.observations, slice(1, None)))
            actions.append(episode.actions)
            rewards.append(episode.rewards)
            terminations.append(episode.terminations)
            ends.append(np.arange(length) == length - 1)
        if not observations:
            raise DatasetError(f"{source.dataset_id} has no episodes; expected at least one.")
        return cls._recorded(
            _concatenate(observations, "observations"),
            _concatenate(actions, "actions"),
            _concatenate(rewards, "rewards"),
            _concatenate(following, "next_observations"),
            _flags(_concatenate(terminations, "terminations"), "terminations"),
            np.concatenate(ends),
            observation_space=source.observation_space,
            action_space=source.action_space,
            dataset_id=source.dataset_id,
            environment_id=source.environment_id,
            control_rate_hz=source.control_rate_hz,
        )

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
        data = _read_npz(path)
        missing = sorted({"observations", "actions", "terminals"} - set(data))
        if missing:
            raise DatasetError(f"{path} has no {missing}; expected OGBench's observations, actions and terminals.")
        if environment_id is not None:
            data |= ogbench_rewards(environment_id, data)
        elif "rewards" not in data:
            raise DatasetError(f"{path} holds no rewards; pass environment_id= with a single-task OGBench name.")
        terminals = _flags(data["terminals"], "terminals")
        for name in ("observations", "actions", "rewards", "masks"):
            if name in data and data[name].shape[:1] != terminals.shape:
                raise DatasetError(
                    f"{path}: {name} has shape {data[name].shape}; expected {len(terminals)} rows, as terminals has."
                )
        if not len(terminals) or not terminals[-1]:
            raise DatasetError(f"{path}: the last row is not terminal; expected every trajectory to end with one.")
        kept = np.flatnonzero(~terminals)
        if not len(kept):
            raise DatasetError(f"{path} has no transitions; expected trajectories of two or more rows.")
        masks = np.asarray(data.get("masks", np.ones(len(terminals))), dtype=np.float64)
        return cls._recorded(
            data["observations"][kept],
            data["actions"][kept],
            data["rewards"][kept],
            data["observations"][kept + 1],
            masks[kept] == 0,
            terminals[kept + 1],
            dataset_id=path.stem,
            environment_id=environment_id,
        )

    @classmethod
    def _recorded(
        cls,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminations: NDArray[np.bool_],
        episode_ends: NDArray[np.bool_],
        **about: Any,
    ) -> OfflineDataset:
        """Like `from_arrays`, but a termination need not end the recorded episode."""
        none = np.zeros_like(episode_ends)
        checked = cls.from_arrays(observations, actions, rewards, next_observations, none, episode_ends, **about)
        return replace(checked, terminations=terminations)

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
            chunk_targets(self.rewards, self.terminations, self.episode_ends, chunk_size, discount),
            chunk_size,
        )


class _Where:
    """Turns a row number into episode and step."""

    def __init__(self, ends: NDArray[np.bool_]) -> None:
        self.rows = len(ends)
        self._last = np.flatnonzero(ends)

    def __call__(self, row: int) -> str:
        episode = int(np.searchsorted(self._last, row))
        first = 0 if episode == 0 else int(self._last[episode - 1]) + 1
        return f"episode {episode}, step {row - first}"


_REWARD = BoxSpec(shape=(1,), dtype="float32", low=(-np.inf,), high=(np.inf,))


def _numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DatasetError(f"{name} is ragged; expected one array with a row a transition.") from error
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{name} has type {array.dtype}; expected real numbers.")
    return array


def _flags(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    array = _numbers(values, name)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise DatasetError(f"{name} has shape {array.shape} or values other than 0 and 1; expected one flag a row.")
    return array.astype(bool)


def _rows(array: NDArray[Any], box: BoxSpec, name: str, where: _Where) -> NDArray[np.float32]:
    """Check an array [n, …] against its box and flatten it to rows [n, size]."""
    shapes = [(where.rows, *box.shape)] + ([(where.rows,)] if box.shape == (1,) else [])
    if array.shape not in shapes:
        raise DatasetError(f"{name} has shape {array.shape}; expected {shapes[-1]}: a row a transition, as its space.")
    wide = array.reshape(where.rows, box.size)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(wide, dtype=np.float32)
    low, high = np.array(box.low), np.array(box.high)
    margin = BOUND_TOLERANCE * np.clip(np.nan_to_num(high - low, posinf=1.0), 0.0, 1.0)
    for bad, expected in (
        (~np.isfinite(rows), "a finite number"),
        ((wide < low - margin) | (wide > high + margin), "a value within its space"),
    ):
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DatasetError(
                f"{name} is {wide[row, column]} at {where(row)}, index {column}; expected {expected}"
                + (f" [{low[column]}, {high[column]}]" if "space" in expected else "")
                + f". {int(bad.any(axis=1).sum())} of {where.rows} rows are affected: repair or drop them."
            )
    return rows


def _box(space: spaces.Space[Any], name: str) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise DatasetError(f"The {name} is {space}; expected a Box. Wrap the environment and record again.")
    return space


def _observation_boxes(
    space: spaces.Space[Any] | None, observations: ArrayLike | Mapping[str, ArrayLike]
) -> tuple[BoxSpec, ...]:
    if space is None:

        def unbounded(values: ArrayLike) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, _numbers(values, "observations").shape[1:] or (1,), np.float32)

        if isinstance(observations, Mapping):
            space = spaces.Dict([(key, unbounded(values)) for key, values in observations.items()])
        else:
            space = unbounded(observations)
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise DatasetError("The observation space is an empty Dict; expected one Box or more in it.")
        return tuple(
            BoxSpec.from_space(_box(box, f'observation space of "{key}"'), key) for key, box in space.spaces.items()
        )
    return (BoxSpec.from_space(_box(space, "observation space")),)


def _observation_rows(
    boxes: Sequence[BoxSpec], values: ArrayLike | Mapping[str, ArrayLike], name: str, where: _Where
) -> NDArray[np.float32]:
    if boxes[0].key is None:
        if isinstance(values, Mapping):
            raise DatasetError(f"{name} is a mapping, but the observation space is a Box; expected one array.")
        return _rows(_numbers(values, name), boxes[0], name, where)
    keys = [str(box.key) for box in boxes]
    if not isinstance(values, Mapping) or set(values) != set(keys):
        seen = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise DatasetError(f"{name} has {seen}; expected a mapping with the keys {keys}.")
    parts = [
        _rows(_numbers(values[k], f'{name} "{k}"'), b, f'{name} "{k}"', where) for k, b in zip(keys, boxes, strict=True)
    ]
    return np.concatenate(parts, axis=1)


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


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {path}.") from error
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds when a file is broken
        raise DatasetError(f"{path} is not an .npz file of plain arrays: {error!r}.") from error

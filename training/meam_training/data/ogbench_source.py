"""OGBench's `.npz` files as transitions: rows are paired with their successors and, if needed, given rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy.errors import DatasetError
from meam_training.data.dataset_cache import Recording, rows_per_block
from meam_training.data.npz_files import NpzFile, NpzMember
from meam_training.data.ogbench_rewards import STATES, ogbench_rewards
from meam_training.data.recording_description import checked_recording, describe_recording
from meam_training.data.row_check import (
    ActionBounds,
    RowCheck,
    flags,
    numbers,
    observation_box_specs,
    unbounded_box,
    undeclared_box_spec,
    unit_box,
)

__all__ = ["ogbench_recording"]


def ogbench_recording(path: Path, environment_id: str | None, bounds: ActionBounds) -> Recording:
    """Start reading a file in OGBench's format.

    Args:
        path: The `.npz` file.
        environment_id: OGBench single-task name from whose goal rewards and masks are computed; None takes the file's.
        bounds: Bounds of the actions.

    Returns:
        The recording, whose blocks are read on demand.

    Raises:
        DatasetError: an array is missing or has another length; while the blocks are read, also if rows do not fit the
            spaces or the last trajectory has no end.
    """
    with NpzFile(path) as file:
        members = _ogbench_members(file, path, environment_id)
        observations, actions = members["observations"], members["actions"]
    unbounded = unbounded_box(observations.shape, observations.dtype)
    boxes, action_box = observation_box_specs(unbounded, ()), undeclared_box_spec(unit_box(actions.shape), bounds)
    check, rows = RowCheck(boxes, action_box, bounds.clip), rows_per_block(boxes[0].size)
    about = describe_recording(boxes, action_box, path.stem, environment_id, None)
    return checked_recording(about, check, _ogbench_blocks(path, environment_id, rows))


def _ogbench_members(file: NpzFile, path: Path, environment_id: str | None) -> dict[str, NpzMember]:
    """Open the required arrays, and check that they have the same length."""
    missing = sorted({"observations", "actions", "terminals"} - file.names)
    if missing:
        raise DatasetError(f"{path} has no {missing}; expected OGBench's observations, actions and terminals.")
    if environment_id is None and "rewards" not in file.names:
        raise DatasetError(f"{path} holds no rewards; pass environment_id= with a single-task OGBench name.")
    wanted = ("terminals", "observations", "actions", *(("rewards", "masks") if environment_id is None else STATES))
    members = {name: file.open(name) for name in wanted if name in file.names}
    terminals = members["terminals"].shape
    if len(terminals) != 1:
        raise DatasetError(f"{path}: terminals has shape {terminals}; expected one flag per row.")
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
            # Start with the previous block's last row, whose successor is the first one of this block.
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

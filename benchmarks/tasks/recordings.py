"""The tasks' data: recorded once for all tasks that differ in their rewards alone, or the files of OGBench."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from suite_file import Task

from meam_policy.errors import NotFoundError
from meam_training import OfflineDataset, collect
from meam_training.data.ogbench_rewards import ogbench_rewards

__all__ = ["open_data", "record_data", "summarise"]

Progress = Callable[[int, int], None]


def record_data(task: Task, root: Path, seed: int, on_progress: Progress | None = None) -> Path | None:
    """Record a task's data, unless they are there; an interrupted recording goes on.

    Args:
        task: Whose data.
        root: Folder of the data.
        seed: Seed of the recording.
        on_progress: Called with the transitions recorded so far, and their total.

    Returns:
        The folder of the Minari data set; None for a task whose data are files.

    Raises:
        NotFoundError: a file is missing.
    """
    if task.files:
        for name in task.files:
            if not (root / name).is_file():
                raise NotFoundError(f"{task.name} needs {root / name}, a file of OGBench. Download it there.")
        return None
    assert task.transitions is not None
    environment_id = _recorded_environment(task)
    made = {"environment": environment_id, "transitions": task.transitions, "seed": seed, "shares": task.mode_shares}
    mark = sha256(json.dumps(made).encode()).hexdigest()[:8]
    dataset_id = f"tasks/{environment_id.replace('/', '-').removesuffix('-v0').lower()}-{mark}-v0"
    folder = root / dataset_id
    if not folder.is_dir():
        shares: Any = task.mode_shares
        arguments: dict[str, Any] = {"seed": seed, "dataset_id": dataset_id, "root": root, "mode_shares": shares}
        collect(environment_id, task.transitions, **arguments, resume=True, on_progress=on_progress)
    return folder


def open_data(task: Task, root: Path, seed: int) -> OfflineDataset:
    """The data of a task, recorded if need be, with its rewards.

    Args:
        task: Whose data.
        root: Folder of the data.
        seed: Seed of the recording.
    """
    folder = record_data(task, root, seed)
    if folder is None:
        parts = [OfflineDataset.from_ogbench(root / name, task.environment_id) for name in task.files]
        dataset = parts[0] if len(parts) == 1 else OfflineDataset.joined(parts)
    else:
        dataset = OfflineDataset.from_minari(folder)
        if dataset.environment_id != task.environment_id:
            dataset = _relabelled(dataset, task.environment_id)
    if task.sparse:
        rewards = np.where(dataset.rewards < 0, -1.0, 0.0).astype(dataset.rewards.dtype)
        dataset = replace(dataset, rewards=rewards)
    return dataset


def summarise(dataset: OfflineDataset, success_reward: float) -> dict[str, float]:
    """Episodes of the data: how many, their mean return, that of the best tenth, and the share that ever succeeds."""
    returns = np.sort(dataset.episode_returns)
    starts = np.flatnonzero(np.concatenate([[True], dataset.episode_ends[:-1]]))
    best = np.maximum.reduceat(dataset.rewards, starts)
    return {
        "transitions": len(dataset),
        "episodes": len(returns),
        "return_mean": float(returns.mean()),
        "best_tenth": float(returns[-max(1, len(returns) // 10) :].mean()),
        "success": float((best >= success_reward - 1e-6).mean()),
    }


def _recorded_environment(task: Task) -> str:
    """The environment that is recorded: of a maze that of its first task, whose steps are those of the others."""
    if task.environment_id.startswith("pointmaze"):
        before, _, after = task.environment_id.rpartition("task")
        return f"{before}task1{after[after.index('-') :]}"
    return task.environment_id


def _relabelled(dataset: OfflineDataset, environment_id: str) -> OfflineDataset:
    """The steps of a point maze, whose observations are its states, with the rewards of another task in it."""
    with ogbench_rewards(environment_id) as rewards:
        labels = rewards({"qpos": np.asarray(dataset.observations)})
    return replace(
        dataset,
        rewards=labels["rewards"].astype(dataset.rewards.dtype),
        terminations=labels["masks"] == 0,
        environment_id=environment_id,
        environment=None,
        dataset_id=f"{dataset.dataset_id} for {environment_id}",
    )

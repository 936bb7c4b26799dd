"""Rewards of OGBench's single-task environments, computed from recorded states by OGBench itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.environments import make_environment
from meam_policy.errors import DatasetError, MissingExtraError

__all__ = ["ogbench_rewards"]


def ogbench_rewards(environment_id: str, data: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Compute the reward of every recorded state, and where the goal holds.

    Args:
        environment_id: OGBench single-task name.
        data: Recorded `qpos` [n, …] (and `button_states`, where the task has buttons).

    Returns:
        `rewards` [n], belonging to the state before the step, and `masks` [n], 0 where all goals hold.

    Raises:
        DatasetError: the environment has no fixed task, or the recorded states it needs are missing.
        NotFoundError: there is no such environment.
        MissingExtraError: OGBench is not installed.
    """
    try:
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise MissingExtraError("Rewards need OGBench: pip install 'meam-policy[mujoco]'.") from error
    env = make_environment(environment_id)
    try:
        if getattr(env.unwrapped, "_reward_task_id", None) is None:
            raise DatasetError(f'"{environment_id}" has no fixed task; expected a name with "singletask" in it.')
        labelled = dict(data)
        relabel_dataset(environment_id, env, labelled)
    except KeyError as error:
        raise DatasetError(f"The data has no {error}, which the rewards of {environment_id} need.") from error
    finally:
        env.close()
    return {name: labelled[name] for name in ("rewards", "masks")}

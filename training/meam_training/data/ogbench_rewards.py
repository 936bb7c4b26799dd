"""Rewards of OGBench's single-task environments, computed from recorded states by OGBench itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.environments.make import make_environment
from meam_policy.errors import DatasetError
from meam_policy.extras import needs

__all__ = ["STATES", "ogbench_rewards"]


STATES = ("qpos", "button_states")
"""Recorded states [n, …] from which rewards are computed; `button_states` only for tasks with buttons."""

States = Mapping[str, NDArray[Any]]


@contextlib.contextmanager
def ogbench_rewards(environment_id: str) -> Iterator[Callable[[States], dict[str, NDArray[np.float32]]]]:
    """Set up an environment's task, to compute rewards and goal masks of recorded states.

    Args:
        environment_id: OGBench single-task name.

    Yields:
        A function from `STATES` to `rewards` [n], which belong to the state before the step, and `masks` [n], 0 where
        all goals are met. It raises DatasetError if states that it needs are missing.

    Raises:
        DatasetError: the environment has no fixed task.
        NotFoundError: there is no such environment.
        MissingExtraError: OGBench is not installed.
    """
    with needs("Working out rewards", "ogbench", "mujoco"):
        from ogbench.relabel_utils import relabel_dataset
    env = make_environment(environment_id)
    try:
        if getattr(env.unwrapped, "_reward_task_id", None) is None:
            raise DatasetError(f'"{environment_id}" has no fixed task; expected a name with "singletask" in it.')
        env.reset(seed=0)
        # OGBench would reset the environment on every call; the reset above sets the task for all blocks.
        task = SimpleNamespace(unwrapped=env.unwrapped, reset=lambda: None)

        def rewards(states: States) -> dict[str, NDArray[np.float32]]:
            labelled = dict(states)
            try:
                relabel_dataset(environment_id, task, labelled)
            except KeyError as error:
                raise DatasetError(f"The data has no {error}, which the rewards of {environment_id} need.") from error
            return {name: labelled[name] for name in ("rewards", "masks")}

        yield rewards
    finally:
        env.close()

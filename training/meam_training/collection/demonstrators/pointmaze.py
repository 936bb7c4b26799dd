"""A demonstrator for OGBench's point mazes, which moves from one random goal to the next."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError
from meam_training.collection.demonstrators.episode import Episode, seeded_globally
from meam_training.data.ogbench_rewards import ogbench_rewards

__all__ = ["PointmazeDemonstrator"]

EPISODE_STEPS = 1000


class PointmazeDemonstrator:
    """Records "navigate" data as OGBench does: noisy steps towards subgoals from the maze's own oracle.

    A goal is drawn from the free cells; when it is reached, the next one is drawn and the episode continues. The
    rewards are those of the single task in the environment's name, computed by OGBench from the recorded states.

    Args:
        environment_id: OGBench single-task name, such as "pointmaze-medium-navigate-singletask-task3-v0".
        noise: Standard deviation of the Gaussian noise on every action, before clipping to [-1, 1].
        seed: Seed of goals, initial states and noise.

    Attributes:
        generator: Random generator; between episodes, its state is all that the next one depends on.

    Raises:
        NotFoundError: there is no such environment.
        ConfigError: the name does not contain "singletask", so that there is no reward, or names another kind of data.
        MissingExtraError: OGBench is not installed.

    References:
        Park et al., OGBench, arXiv:2410.20092 (the "navigate" data sets; noise 0.5 for the point mass).
    """

    def __init__(self, environment_id: str, noise: float = 0.5, seed: int = 0) -> None:
        parts = environment_id.split("-")
        if "singletask" not in parts:
            raise ConfigError(f'"{environment_id}" has no fixed task, so no reward; expected a "singletask" name.')
        self.environment_id = environment_id
        self._noise = noise
        self.generator = np.random.default_rng(seed)
        # The goal-conditioned maze of the same shape, where goals can be set.
        self._env = make_environment("-".join([*parts[:2], parts[-1]]), terminate_at_goal=False)
        self._maze: Any = self._env.unwrapped
        kind = "navigate" if environment_id in gymnasium.registry else parts[parts.index("singletask") - 1]
        if kind != "navigate":
            raise ConfigError(f'"{environment_id}" names the kind of data "{kind}"; expected "navigate".')
        free = np.argwhere(self._maze.maze_map == 0)
        self._cells = [(int(i), int(j)) for i, j in free]

    def record_episode(self) -> Episode:
        """Record 1000 steps.

        Returns:
            Observations [1001, 2], actions [1000, 2], rewards [1000] and terminations [1000]; a termination marks each
            step that starts at the task's goal, and does not end the episode.
        """
        start, goal = self._draw_cell(), self._draw_cell()
        seed = int(self.generator.integers(2**31))
        self._env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
        with seeded_globally(seed):  # decides where teleporters lead
            states, actions = self._walk()
        with ogbench_rewards(self.environment_id) as rewards:
            labels = rewards({"qpos": states[:-1]})
        return Episode(states, actions, labels["rewards"], labels["masks"] == 0)

    def _walk(self) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        observations, actions = [self._maze.get_ob()], []
        for _ in range(EPISODE_STEPS):
            position = self._maze.get_xy()
            target, _ = self._maze.get_oracle_subgoal(position, self._maze.cur_goal_xy)
            direction = (target - position) / (np.linalg.norm(target - position) + 1e-6)
            action = direction + self._noise * self.generator.standard_normal(2)
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            # Bypasses the time limit, which is meant for the maze's own episodes.
            _, _, _, _, info = self._env.unwrapped.step(actions[-1])
            observations.append(self._maze.get_ob())
            if info["success"]:
                self._maze.set_goal(goal_xy=np.array(self._maze.ij_to_xy(self._draw_cell()), dtype=np.float64))
        return np.stack(observations), np.stack(actions)

    def _draw_cell(self) -> tuple[int, int]:
        return self._cells[int(self.generator.integers(len(self._cells)))]

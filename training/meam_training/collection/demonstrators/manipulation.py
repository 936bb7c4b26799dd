"""A demonstrator for OGBench's manipulation tasks: cube, scene and puzzle."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError
from meam_training.collection.demonstrators.episode import Episode, episode_generator, seeded_globally
from meam_training.data.ogbench_rewards import STATES, ogbench_rewards

__all__ = ["MANIPULATION_FAMILIES", "ManipulationDemonstrator"]

MANIPULATION_FAMILIES: Final = ("cube", "scene", "puzzle")
"""Prefixes of the environments' names."""

EPISODE_STEPS = 1000

_STACKING = {"double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5), "octuple": (0.0, 0.35)}
"""Range from which an episode's probability of stacking targets is drawn, by the number of cubes."""

_NOISE = 0.1
_MARKOV_NOISE_SCALE = (1.0, 1.0, 1.0, 3.0, 10.0)  # x, y, z, yaw, gripper
_RANDOM_ACTIONS = {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}


class ManipulationDemonstrator:
    """Records "play" and "noisy" data as OGBench does: its oracles pursue one random subtask after another.

    The kind of data is taken from the environment's name, and is "play" if the name has none. For "play", an oracle
    follows a plan with smooth noise; for "noisy", it reacts to each observation, with Gaussian noise on the actions,
    and some actions are drawn uniformly. The rewards are those of the single task in the name, computed by OGBench from
    the recorded states: a reward belongs to the state before the step, and reaching the goal does not end the episode.

    Args:
        environment_id: OGBench single-task name, such as "cube-single-play-singletask-task1-v0".
        seed: Seed of scenes, subtasks and noise. Each episode has a generator of its own.

    Attributes:
        kind: "play" or "noisy".

    Raises:
        NotFoundError: there is no such environment.
        ConfigError: the name does not contain "singletask", so that there is no reward, or names another kind of data.
        MissingExtraError: OGBench is not installed.

    References:
        Park et al., OGBench, arXiv:2410.20092 (the "play" and "noisy" data sets).
    """

    def __init__(self, environment_id: str, seed: int = 0) -> None:
        self._family, self._variant = environment_id.split("-")[:2]
        with ExitStack() as opened:
            env = make_environment(environment_id, mode="data_collection", terminate_at_goal=False)
            opened.callback(env.close)
            self.kind = _kind_of_data(environment_id)
            self._rewards = opened.enter_context(ogbench_rewards(environment_id))
            self._opened = opened.pop_all()
        self._seed, self._env = seed, env
        self._simulation: Any = env.unwrapped
        self._oracles = _oracles(self._family, self.kind, env)

    def close(self) -> None:
        """Close the environments."""
        self._opened.close()

    def record_episode(self, episode: int) -> Episode:
        """Record 1000 steps.

        Args:
            episode: Number of the episode; the same number gives the same data.

        Returns:
            The episode, with float32 observations and actions; a termination marks each step that starts at the goal.
        """
        generator = episode_generator(self._seed, episode)
        while True:
            # From the upper half of the seeds, never those of an evaluation, which counts up from its own seed.
            seed = int(generator.integers(2**31, 2**32))
            with seeded_globally(seed):
                recorded = self._record(seed, generator)
            if recorded is not None:
                return recorded

    def _record(self, seed: int, generator: np.random.Generator) -> Episode | None:
        """Record an episode; None if a scene's block left the workspace, in which case OGBench records again too."""
        observation, info = self._env.reset(seed=seed)
        stacking = generator.uniform(*_STACKING.get(self._variant, (0.0, 0.0)))
        noise = generator.uniform(0.0, _NOISE) * np.array(_MARKOV_NOISE_SCALE)
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        observations, actions, states = [observation], [], []
        for _ in range(EPISODE_STEPS):
            actions.append(self._act(oracle, observation, info, noise, generator))
            # Bypasses the time limit, which is the task's and not this recording's.
            observation, _, _, _, info = self._simulation.step(actions[-1])
            observations.append(observation)
            states.append({name: info[f"prev_{name}"] for name in STATES if name in info})
            if oracle.done:
                _, info = self._simulation.set_new_target(p_stack=stacking)
                oracle = self._oracles[info["privileged/target_task"]]
                oracle.reset(observation, info)
        recorded = {name: np.stack([state[name] for state in states]) for name in states[0]}
        if self._family == "scene" and not _in_workspace(recorded["qpos"]):
            return None
        labels = self._rewards(recorded)
        return Episode(
            np.stack(observations).astype(np.float32), np.stack(actions), labels["rewards"], labels["masks"] == 0
        )

    def _act(
        self, oracle: Any, observation: Any, info: Any, noise: NDArray[np.float64], generator: np.random.Generator
    ) -> NDArray[np.float32]:
        if self.kind == "noisy" and generator.uniform() < _RANDOM_ACTIONS[self._family]:
            return generator.uniform(-1.0, 1.0, 5).astype(np.float32)
        action = np.asarray(oracle.select_action(observation, info), dtype=np.float64)
        if self.kind == "noisy":
            action = action + noise * generator.standard_normal(5)
        return np.clip(action, -1.0, 1.0).astype(np.float32)


def _kind_of_data(environment_id: str) -> str:
    parts = environment_id.split("-")
    if "singletask" not in parts:
        raise ConfigError(f'"{environment_id}" has no fixed task, so no reward; expected a "singletask" name.')
    kind = "play" if environment_id in gymnasium.registry else parts[parts.index("singletask") - 1]
    if kind not in ("play", "noisy"):
        raise ConfigError(f'"{environment_id}" names the kind of data "{kind}"; expected "play" or "noisy".')
    return kind


def _oracles(family: str, kind: str, env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    """Make OGBench's oracles for a family's subtasks, with the settings of OGBench's own data sets."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    makers: dict[str, tuple[Any, Any]] = {
        "cube": (CubePlanOracle, CubeMarkovOracle),
        "button": (ButtonPlanOracle, ButtonMarkovOracle),
        "drawer": (DrawerPlanOracle, DrawerMarkovOracle),
        "window": (WindowPlanOracle, WindowMarkovOracle),
    }
    subtasks = {"cube": ("cube",), "scene": tuple(makers), "puzzle": ("button",)}[family]
    settings = {"noise": _NOISE, "noise_smoothing": 0.5} if kind == "play" else {"min_norm": 0.4}
    closed = {"gripper_always_closed": True} if family == "puzzle" else {}
    return {name: makers[name][kind == "noisy"](env=env, **settings, **closed) for name in subtasks}


def _in_workspace(states: NDArray[np.float64]) -> bool:
    """Whether the scene's block stays on the table or in the drawer, given the states of all steps [steps, qpos]."""
    y, z = states[:, 15], states[:, 16]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool(np.all((y < 0.29) & ((y > -0.3) | in_drawer)))

"""The tasks on which defaults are compared: how their data are made, and the sizes that all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from behaviours import Behaviour, evolve, guess, reach, record, swing

from meam_training import OfflineDataset, collect

__all__ = ["METHODS", "TASKS", "Purpose", "Task", "summarise"]

METHODS = ("bc", "qam", "me-am")
"""The presets that are compared, in the order of the report."""

Purpose = Literal["development", "test"]

SMALL: Mapping[str, Any] = MappingProxyType(
    {"hidden_dims": (64, 64), "critic_hidden_dims": (64, 64), "batch_size": 64, "threads": 1, "device": "cpu"}
)
"""What a newcomer types for a quick run on a CPU."""

DEMO: Mapping[str, Any] = MappingProxyType(
    {
        **SMALL,
        "hidden_dims": (128, 128, 128),
        "critic_hidden_dims": (128, 128, 128),
        "num_critics": 2,
        "batch_size": 128,
        "learning_rate": 1e-3,
    }
)
"""The sizes of `meam demo`, for action chunks."""

MAZE: Mapping[str, Any] = MappingProxyType({**DEMO, "chunk_size": 10, "fourier_features": 64, "fourier_scale": 2.0})


@dataclass(frozen=True)
class Task:
    """Data, an environment, and what every method is told.

    Attributes:
        name: Name on the command line, and of the data set.
        purpose: "development", on which defaults are chosen, or "test", on which they are only checked.
        environment_id: Environment to record in and to act in.
        transitions: Transitions to record.
        about: A sentence on the behaviour in the data.
        behaviour: What acts in the data; None takes `meam collect`'s demonstrator.
        settings: Sizes, the chunk and the discount, for all methods; everything else is the method's own default.
        seconds: CPU seconds of training, for all methods.
        episodes: Evaluation episodes.
    """

    name: str
    purpose: Purpose
    environment_id: str
    transitions: int
    about: str
    behaviour: Behaviour | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    seconds: float = 30.0
    episodes: int = 50

    def dataset(self, root: Path) -> OfflineDataset:
        """The data, which are recorded if they are not in the folder yet.

        Args:
            root: Folder of the Minari data sets.
        """
        dataset_id = f"defaults/{self.name}-v0"
        folder = root / dataset_id
        if not folder.is_dir():
            if self.behaviour is None:
                collect(self.environment_id, self.transitions, dataset_id=dataset_id, root=root, resume=True)
            else:
                record(self.environment_id, self.behaviour, self.transitions, dataset_id, root)
        return OfflineDataset.from_minari(folder)


def summarise(dataset: OfflineDataset) -> dict[str, float]:
    """Mean return of a data set's episodes, and of the best tenth of them."""
    returns = np.sort(dataset.episode_returns)
    best = returns[-max(1, len(returns) // 10) :]
    return {"episodes": len(returns), "return_mean": float(returns.mean()), "best_tenth": float(best.mean())}


def _gait(name: str, purpose: Purpose, environment_id: str, about: str, *, updates: int, horizon: int) -> Task:
    behaviour = evolve(updates, step_size=0.1, horizon=horizon, noise=0.2, after=0.3)
    return Task(name, purpose, environment_id, 50_000, about, behaviour, episodes=20)


def _maze(name: str, purpose: Purpose, environment_id: str) -> Task:
    about = "the maze's oracle between random goals, with noise"
    return Task(name, purpose, environment_id, 100_000, about, settings=MAZE, seconds=60.0, episodes=20)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                "reacher",
                "development",
                "Reacher-v5",
                50_000,
                "a spring to the target, by the transposed Jacobian; stiffness and noise differ between episodes",
                reach("fingertip", "target", gain=(2.0, 30.0), damping=0.03, noise=(0.1, 0.5)),
            ),
            Task(
                "pusher",
                "development",
                "Pusher-v5",
                50_000,
                "the same spring to the object, which the hand reaches but hardly moves",
                reach("tips_arm", "object", gain=(1.0, 8.0), damping=0.1, noise=(0.1, 0.5)),
            ),
            _gait(
                "halfcheetah",
                "development",
                "HalfCheetah-v5",
                "linear gaits that a short random search went through, from bad to good, with noise",
                updates=60,
                horizon=300,
            ),
            Task(
                "pendulum",
                "development",
                "Pendulum-v1",
                20_000,
                "pumping energy and holding the pendulum upright, some of it against the right direction, with noise",
                swing(skill=(-0.3, 0.6), noise=(0.3, 1.5)),
            ),
            Task(
                "pockets",
                "development",
                "meam/Pockets-v0",
                40_000,
                "the demonstrator of `meam collect`, which seldom aims at the most valuable pocket",
                settings={**DEMO, "chunk_size": 5, "discount": 0.97},
                seconds=60.0,
            ),
            _maze("maze-3", "development", "pointmaze-medium-navigate-singletask-task3-v0"),
            _maze("maze-1", "development", "pointmaze-medium-navigate-singletask-task1-v0"),
            Task(
                "bandit-2",
                "development",
                "defaults/Bandit2-v0",
                5_000,
                "the opposite of the best action, and in a tenth of the episodes that action; the best return is 1",
                guess(good=0.1, spread=0.15),
                seconds=15.0,
            ),
            Task(
                "bandit-8",
                "development",
                "defaults/Bandit8-v0",
                5_000,
                "as in bandit-2, with eight numbers in an action",
                guess(good=0.1, spread=0.15),
                seconds=15.0,
            ),
            _gait(
                "hopper",
                "development",
                "Hopper-v5",
                "linear policies that a short random search went through, from falling to hopping, with noise",
                updates=150,
                horizon=500,
            ),
            _maze("maze-4", "development", "pointmaze-medium-navigate-singletask-task4-v0"),
            _maze("maze-large-1", "development", "pointmaze-large-navigate-singletask-task1-v0"),
            _gait(
                "walker2d",
                "test",
                "Walker2d-v5",
                "as in hopper, from falling to walking",
                updates=150,
                horizon=500,
            ),
            _gait(
                "swimmer",
                "test",
                "Swimmer-v5",
                "as in halfcheetah, from drifting to swimming",
                updates=60,
                horizon=300,
            ),
            _maze("maze-5", "test", "pointmaze-medium-navigate-singletask-task5-v0"),
            _maze("maze-large-3", "test", "pointmaze-large-navigate-singletask-task3-v0"),
            Task(
                "cube",
                "test",
                "cube-single-play-singletask-task1-v0",
                50_000,
                "OGBench's scripted oracle, which moves the cube between random places",
                settings={**DEMO, "chunk_size": 5},
                seconds=60.0,
                episodes=20,
            ),
        )
    }
)
"""All tasks by name, in the order of the report."""

"""The tasks of the demo: data, settings for two CPU cores, and the state to plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from meam_training.config import TrainConfig

__all__ = ["METHODS", "TASKS", "DemoTask"]

METHODS = ("bc", "qam", "me-am")
"""The methods that the demo compares, in the order of its table."""


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo.

    Attributes:
        name: Name on the command line.
        environment_id: Environment to record in, train for and act in.
        transitions: Environment steps to record.
        settings: Settings common to all methods; each method takes those that affect it.
        success_reward: A recorded episode is a success if any of its steps earns at least this reward.
        method_settings: Further settings by method.
        state: Observation at which the action distributions are plotted.
        episodes: Default number of evaluation episodes.
    """

    name: str
    environment_id: str
    transitions: int
    settings: Mapping[str, Any]
    success_reward: float
    method_settings: Mapping[str, Mapping[str, Any]]
    state: tuple[float, ...]
    episodes: int = 20

    def config(self, method: str, seed: int) -> TrainConfig:
        """Training settings of a method."""
        own = self.method_settings.get(method, {})
        return TrainConfig.preset(method, self.settings, seed=seed, device="cpu", **own)


_SMALL = MappingProxyType(
    {
        "hidden_dims": (128, 128, 128),
        "critic_hidden_dims": (128, 128, 128),
        "num_critics": 2,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "threads": 1,
        "checkpoint_every": 500,
        "log_every": 50,
    }
)

_STEPS = MappingProxyType(
    {
        "bc": {"steps": 8000},
        "qam": {"steps": 6000, "pretrain_steps": 4000},
        "me-am": {"steps": 6000, "pretrain_steps": 4000},
    }
)

TASKS: Mapping[str, DemoTask] = MappingProxyType(
    {
        "pointmaze": DemoTask(
            name="pointmaze",
            environment_id="pointmaze-medium-navigate-singletask-task3-v0",
            transitions=100_000,
            settings={**_SMALL, "chunk_size": 10, "fourier_features": 64, "fourier_scale": 2.0},
            method_settings=_STEPS,
            success_reward=0.0,
            state=(4.0, 8.0),
        ),
        "pockets": DemoTask(
            name="pockets",
            environment_id="meam/Pockets-v0",
            transitions=40_000,
            settings={**_SMALL, "chunk_size": 5, "discount": 0.97},
            method_settings=_STEPS,
            success_reward=1.0,
            episodes=100,
            state=(0.0, 0.0, 0.0, 0.0),
        ),
    }
)

"""The small data and settings that the tests of training share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiled") and "MEAM_WITHOUT_SHAPE_CHECKS" not in os.environ:
        pytest.skip("compiled code cannot be shape-checked: test_compilation.py runs this in a process of its own")


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def dataset() -> OfflineDataset:
    """Six episodes of twenty steps, with 3-d observations and 2-d actions; every other episode terminates."""
    generator = np.random.default_rng(0)
    rows = 120
    ends = np.arange(rows) % 20 == 19
    return OfflineDataset.from_arrays(
        observations=generator.normal(size=(rows, 3)),
        actions=generator.uniform(-1, 1, size=(rows, 2)),
        rewards=generator.normal(size=rows),
        next_observations=generator.normal(size=(rows, 3)),
        terminations=ends & (np.arange(rows) % 40 == 19),
        truncations=ends & (np.arange(rows) % 40 == 39),
        dataset_id="tests/tiny-v0",
    )


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Settings of a run that takes a fraction of a second."""

    def make(method: str = "me-am", shared: Mapping[str, Any] | None = None, /, **overrides: Any) -> TrainConfig:
        tiny: dict[str, Any] = {
            "steps": 12,
            "batch_size": 16,
            "device": "cpu",
            "hidden_dims": (8, 8),
            "critic_hidden_dims": (8, 8),
            "num_critics": 2,
            "nfe": 4,
            "candidates": 4,
            "likelihood_steps": 2,
            "chunk_size": 2,
            "checkpoint_every": 1000,
            "log_every": 1,
            "online_warmup": 0,
        }
        return TrainConfig.preset(method, {**tiny, **(shared or {})}, **overrides)

    return make


@pytest.fixture(scope="session")
def make_minari() -> Callable[..., Path]:
    """Writes a data set with Minari itself and returns its folder, the one that holds metadata.json."""

    def make(
        root: Path,
        dataset_id: str,
        episodes: list[dict[str, Any]],
        observation_space: Any,
        action_space: Any,
        data_format: str = "hdf5",
    ) -> Path:
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about missing authors etc.
            patch.setenv("MINARI_DATASETS_PATH", str(root))
            minari.create_dataset_from_buffers(
                dataset_id,
                [EpisodeBuffer(**episode) for episode in episodes],
                observation_space=observation_space,
                action_space=action_space,
                data_format=data_format,
            )
        return root / dataset_id / "data"

    return make


@pytest.fixture(scope="session")
def pointmaze_goal() -> Callable[[str], np.ndarray[Any, Any]]:
    """Where the goal of an OGBench single-task point maze is, from OGBench's own environment."""

    def goal(environment_id: str) -> np.ndarray[Any, Any]:
        ogbench = pytest.importorskip("ogbench")
        env = ogbench.make_env_and_datasets(environment_id, env_only=True)
        env.reset()
        position = np.array(env.unwrapped.cur_goal_xy)
        env.close()
        return position

    return goal

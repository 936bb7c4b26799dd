"""Make synthetic data sets of the size and shape of OGBench's cube data, with random numbers in them.

    python benchmarks/data/make.py FOLDER

writes `cube-v0.npz`, and `bench/cube-hdf5-v0` in Minari's format. With `--formats arrow` it writes
`bench/cube-arrow-v0`, for which Minari takes time that grows with the square of the episodes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gymnasium import spaces

OBSERVATION_DIM, ACTION_DIM, STATE_DIM = 28, 5, 21
EPISODE_STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=["npz", "hdf5"], choices=["npz", "hdf5", "arrow"])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    episodes = arguments.transitions // EPISODE_STEPS
    for name in arguments.formats:
        write_npz(arguments.folder, episodes) if name == "npz" else write_minari(arguments.folder, episodes, name)


def write_npz(folder: Path, episodes: int) -> None:
    """OGBench's layout: every trajectory has one row more than steps, and states from which rewards are computed."""
    rows = episodes * (EPISODE_STEPS + 1)
    generator = np.random.default_rng(0)
    np.savez(
        folder / "cube-v0.npz",
        observations=generator.random((rows, OBSERVATION_DIM), np.float32),
        actions=generator.random((rows, ACTION_DIM), np.float32),
        terminals=np.arange(rows) % (EPISODE_STEPS + 1) == EPISODE_STEPS,
        qpos=generator.random((rows, STATE_DIM), np.float32),
        rewards=-np.ones(rows, np.float32),
    )


def write_minari(folder: Path, episodes: int, data_format: str) -> None:
    """Write with Minari itself, a few episodes at a time."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    import minari

    box = {n: spaces.Box(-1, 1, (n,), np.float32) for n in (OBSERVATION_DIM, ACTION_DIM)}
    recorded = _episodes(np.random.default_rng(0), episodes)
    dataset = minari.create_dataset_from_buffers(
        f"bench/cube-{data_format}-v0",
        [next(recorded)],
        observation_space=box[OBSERVATION_DIM],
        action_space=box[ACTION_DIM],
        data_format=data_format,
        algorithm_name="random",
        author="none",
        author_email="none",
        code_permalink="none",
    )
    dataset.storage.update_episodes(recorded)


def _episodes(generator: np.random.Generator, count: int) -> Iterator[object]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    for i in range(count):
        yield EpisodeBuffer(
            id=i,
            observations=generator.random((EPISODE_STEPS + 1, OBSERVATION_DIM), np.float32),
            actions=generator.random((EPISODE_STEPS, ACTION_DIM), np.float32),
            rewards=np.full(EPISODE_STEPS, -1.0),
            terminations=np.zeros(EPISODE_STEPS, bool),
            truncations=np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1,
        )


if __name__ == "__main__":
    main()

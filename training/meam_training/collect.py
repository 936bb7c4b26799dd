"""Recording demonstrations into a Minari data set."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.environments import make_environment
from meam_policy.errors import ConfigError, MissingExtraError, OutputError
from meam_training.demonstrators import PocketsDemonstrator, PointmazeDemonstrator
from meam_training.minari_files import minari_root

__all__ = ["collect", "default_dataset_id"]

Progress = Callable[[int, int], None]
"""Called with the transitions recorded so far and in all."""


class Episode(NamedTuple):
    """One recorded episode of T steps: T + 1 observations, T of everything else; terminations may be mid-episode."""

    observations: NDArray[Any]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminations: NDArray[np.bool_]


def default_dataset_id(environment_id: str) -> str:
    """The Minari id under which `collect` records an environment; "meam/Pockets-v0" gives "meam/pockets-v0"."""
    stem, _, version = environment_id.rpartition("-v")
    namespace, _, name = stem.partition("/") if "/" in stem else stem.partition("-")
    return f"{namespace}/{name or 'demonstrations'}-v{version}".lower()


def collect(
    environment_id: str,
    transitions: int,
    *,
    seed: int = 0,
    dataset_id: str | None = None,
    root: str | os.PathLike[str] | None = None,
    mode_shares: Mapping[str, float] | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Record an environment's scripted demonstrator into a local Minari data set.

    Whole episodes are recorded until there are at least `transitions` of them. The data set appears when it is
    complete; an interrupted call leaves nothing behind.

    Args:
        environment_id: "meam/Pockets-v0", or an OGBench pointmaze with a fixed task, such as
            "pointmaze-medium-navigate-singletask-task3-v0".
        transitions: Transitions to record, at least 1.
        seed: Seed of the environment and the demonstrator; the same seed gives the same data.
        dataset_id: Minari id; None takes `default_dataset_id`.
        root: Folder of the Minari data sets; None takes Minari's own.
        mode_shares: How often the Pockets demonstrator aims at each pocket.
        on_progress: Called after every episode.

    Returns:
        The folder of the data set, which `OfflineDataset.from_minari` reads.

    Raises:
        ConfigError: there is no demonstrator for the environment, or a setting is out of range.
        NotFoundError: there is no such environment.
        OutputError: the data set exists already, or the folder cannot be written.
        MissingExtraError: minari or the simulator is not installed.
    """
    if transitions < 1 or seed < 0:
        raise ConfigError(f"transitions is {transitions} and seed is {seed}; expected transitions >= 1 and seed >= 0.")
    env = make_environment(environment_id)
    try:
        name = dataset_id or default_dataset_id(environment_id)
        base = (minari_root() if root is None else Path(root).expanduser()).absolute()
        folder = base / name
        record = _recorder(environment_id, env, seed, mode_shares)
        _check_destination(name, base)
        episodes, done = [], 0
        while done < transitions:
            episodes.append(record())
            done += len(episodes[-1].rewards)
            if on_progress is not None:
                on_progress(min(done, transitions), transitions)
        _write(folder, base, name, env, environment_id, episodes, seed)
    finally:
        env.close()
    return folder


def _check_destination(name: str, base: Path) -> None:
    """Find out before recording whether the data set can be written."""
    try:
        from minari.dataset.minari_dataset import DATASET_ID_RE
    except ImportError as error:
        raise MissingExtraError("Recording needs minari: pip install 'meam-policy[train]'.") from error
    match = DATASET_ID_RE.fullmatch(name)
    if match is None or match["version"] is None:
        raise ConfigError(f'"{name}" is not a Minari id; expected one such as "namespace/name-v0".')
    if (base / name).exists():
        raise OutputError(f"The data set {base / name} exists already. Delete it, or choose another id or folder.")
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {base} cannot be made: {error.strerror}.") from error
    if not os.access(base, os.W_OK):
        raise OutputError(f"The folder {base} is not writable. Choose another one.")


def _recorder(
    environment_id: str, env: gymnasium.Env[Any, Any], seed: int, mode_shares: Mapping[str, float] | None
) -> Callable[[], Episode]:
    if environment_id == "meam/Pockets-v0":
        demonstrator = PocketsDemonstrator(mode_shares, seed=seed)
        starts = np.random.default_rng([seed, 1])  # never the starts of an evaluation, which counts up from its seed
        return lambda: _record_steps(env, demonstrator, int(starts.integers(2**31, 2**32)))
    if mode_shares is not None:
        raise ConfigError(f"mode_shares is a setting of meam/Pockets-v0, not of {environment_id}.")
    if environment_id.startswith("pointmaze"):
        pointmaze = PointmazeDemonstrator(environment_id, seed=seed)
        return lambda: Episode(*pointmaze.record_episode())
    raise ConfigError(
        f"There is no demonstrator for {environment_id}. Known: meam/Pockets-v0, and OGBench's pointmaze tasks."
    )


def _record_steps(env: gymnasium.Env[Any, Any], demonstrator: PocketsDemonstrator, seed: int) -> Episode:
    observation, _ = env.reset(seed=seed)
    demonstrator.reset()
    observations, actions, rewards, terminations, ended = [observation], [], [], [], False
    while not ended:
        actions.append(demonstrator.act(observation))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        terminations.append(terminated)
        ended = terminated or truncated
    return Episode(
        np.stack(observations),
        np.stack(actions),
        np.array(rewards, dtype=np.float32),
        np.array(terminations, dtype=bool),
    )


def _write(
    folder: Path,
    base: Path,
    name: str,
    env: gymnasium.Env[Any, Any],
    environment_id: str,
    episodes: list[Episode],
    seed: int,
) -> None:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            observations=list(e.observations),
            actions=list(e.actions),
            rewards=list(e.rewards),
            terminations=list(e.terminations),
            truncations=[False] * (len(e.rewards) - 1) + [not e.terminations[-1]],
        )
        for e in episodes
    ]
    staging = base / f".meam-{os.getpid()}"
    before = os.environ.get("MINARI_DATASETS_PATH")
    try:
        staging.mkdir(parents=True)
        os.environ["MINARI_DATASETS_PATH"] = str(staging)  # minari has no other way to say where
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata that a local data set does not need
            dataset = minari.create_dataset_from_buffers(
                dataset_id=name,
                buffer=buffers,
                env=env.unwrapped,
                observation_space=env.observation_space,
                action_space=env.action_space,
                algorithm_name="scripted demonstrator",
                description=f"{environment_id}, recorded by meam collect with seed {seed}.",
                data_format="hdf5",
            )
        rate = _control_rate(env)
        extra = {"meam_environment_id": environment_id} | ({} if rate is None else {"control_rate_hz": rate})
        dataset.storage.update_metadata(extra)
        folder.parent.mkdir(parents=True, exist_ok=True)
        (staging / name).rename(folder)
    except OSError as error:
        raise OutputError(f"The data set {folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if before is None:
            os.environ.pop("MINARI_DATASETS_PATH", None)
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _control_rate(env: gymnasium.Env[Any, Any]) -> float | None:
    """Control steps per second of simulated time, or None if the environment does not say."""
    dt = getattr(env.unwrapped, "dt", None)
    rate = 1 / dt if isinstance(dt, float) and dt > 0 else env.metadata.get("render_fps")
    return float(rate) if rate else None

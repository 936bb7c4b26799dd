"""Recording demonstrations, or what a policy does, into a Minari data set."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from meam_policy.environments.make import make_environment
from meam_policy.environments.space_check import control_rate
from meam_policy.errors import ConfigError, MissingExtraError, OutputError
from meam_training.collection.demonstrators import (
    MANIPULATION_FAMILIES,
    Episode,
    ManipulationDemonstrator,
    PocketsDemonstrator,
    PointmazeDemonstrator,
    PolicyDemonstrator,
)
from meam_training.collection.demonstrators.episode import record_steps
from meam_training.collection.recording import Metadata, PartialRecording, write_minari
from meam_training.data.minari_files import minari_root

__all__ = ["collect", "default_dataset_id", "new_dataset_folder"]

Progress = Callable[[int, int], None]
"""Called with the transitions recorded so far and in all."""


@dataclass(frozen=True)
class Recorder:
    """Makes the episodes of a data set.

    Attributes:
        name: What acts.
        record: Records the episode of a number.
        generators: Random generators that go on from one episode to the next; none if every episode has its own.
        policy: Identity of the policy that acts, if one does.
        close: Gives back what was opened for recording.
    """

    name: str
    record: Callable[[int], Episode]
    generators: tuple[np.random.Generator, ...] = ()
    policy: str | None = None
    close: Callable[[], None] = lambda: None


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
    policy: str | os.PathLike[str] | None = None,
    dataset_id: str | None = None,
    root: str | os.PathLike[str] | None = None,
    mode_shares: Mapping[str, float] | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Record an environment's scripted demonstrator, or a policy, into a local Minari data set.

    Whole episodes are recorded until there are at least `transitions` of them. The data set appears when it is
    complete. Until then, what is recorded is in a hidden folder beside it, from which an interrupted or killed
    recording can be resumed; the result is the same, number for number, as without the interruption.

    Args:
        environment_id: For a scripted demonstrator "meam/Pockets-v0", or an OGBench pointmaze, cube, scene or puzzle
            with a fixed task, such as "pointmaze-medium-navigate-singletask-task3-v0" or
            "cube-single-play-singletask-task1-v0". For a policy any environment that ends its episodes by itself.
        transitions: Transitions to record, at least 1.
        seed: Seed of the environment and the demonstrator; the same seed gives the same data.
        policy: Policy folder, or Hub repo id, to run with sampled noise instead of the scripted demonstrator.
        dataset_id: Minari id; None takes `default_dataset_id`.
        root: Folder of the Minari data sets; None takes Minari's own.
        mode_shares: How often the Pockets demonstrator aims at each pocket.
        resume: Go on with the unfinished recording of this data set, if there is one.
        on_progress: Called after every episode.

    Returns:
        The folder of the data set, which `OfflineDataset.from_minari` reads.

    Raises:
        ConfigError: there is no demonstrator for the environment, a setting is out of range, or the unfinished
            recording has other settings.
        NotFoundError: there is no such environment or policy.
        SpaceError: the environment's spaces are not the policy's.
        OutputError: the data set exists already, there is an unfinished one and `resume` is false, or the folder
            cannot be written.
        LockedError: another process is recording the data set.
        DatasetError: the unfinished recording is broken.
        MissingExtraError: minari, the simulator or onnxruntime is not installed.
    """
    if transitions < 1 or seed < 0:
        raise ConfigError(f"transitions is {transitions} and seed is {seed}; expected transitions >= 1 and seed >= 0.")
    name = dataset_id or default_dataset_id(environment_id)
    with warnings.catch_warnings(), ExitStack() as opened:
        # OGBench's manipulation tasks make their action space anew at every step.
        warnings.filterwarnings("ignore", message=".*precision lowered by casting", category=UserWarning)
        env = make_environment(environment_id)
        opened.callback(env.close)
        recorder = _recorder(environment_id, env, seed, policy, mode_shares)
        opened.callback(recorder.close)
        folder = new_dataset_folder(name, root)
        settings = {
            "environment_id": environment_id,
            "transitions": transitions,
            "seed": seed,
            "policy": recorder.policy,
            "mode_shares": None if mode_shares is None else dict(mode_shares),
        }
        with PartialRecording.open(folder.with_name(f".{folder.name}.partial"), settings, resume=resume) as recording:
            _record(recorder, recording, transitions, on_progress)
            about = _metadata(environment_id, env, seed, recorder)
            recording.finish(write_minari(recording, name, env, about), folder)
    return folder


def _record(recorder: Recorder, recording: PartialRecording, transitions: int, on_progress: Progress | None) -> None:
    for generator, state in zip(recorder.generators, recording.progress.generators or (), strict=False):
        generator.bit_generator.state = state
    while (progress := recording.progress).transitions < transitions:
        episode = recorder.record(progress.episodes)
        recording.add(episode, [dict(generator.bit_generator.state) for generator in recorder.generators])
        if on_progress is not None:
            on_progress(min(recording.progress.transitions, transitions), transitions)
    recording.flush()


def new_dataset_folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder of a data set that is to be written; finds out before recording whether that can be done.

    Args:
        name: Minari id.
        root: Folder of the Minari data sets; None takes Minari's own.

    Raises:
        ConfigError: the name is not a Minari id.
        OutputError: the data set exists already, or the root cannot be written.
        MissingExtraError: minari is not installed.
    """
    try:
        from minari.dataset.minari_dataset import DATASET_ID_RE
    except ImportError as error:
        raise MissingExtraError("Recording needs minari: pip install 'meam-policy[train]'.") from error
    match = DATASET_ID_RE.fullmatch(name)
    if match is None or match["version"] is None:
        raise ConfigError(f'"{name}" is not a Minari id; expected one such as "namespace/name-v0".')
    base = (minari_root() if root is None else Path(root).expanduser()).absolute()
    if (base / name).exists():
        raise OutputError(f"The data set {base / name} exists already. Delete it, or choose another id or folder.")
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {base} cannot be made: {error.strerror}.") from error
    if not os.access(base, os.W_OK):
        raise OutputError(f"The folder {base} is not writable. Choose another one.")
    return base / name


def _recorder(
    environment_id: str,
    env: gymnasium.Env[Any, Any],
    seed: int,
    policy: str | os.PathLike[str] | None,
    mode_shares: Mapping[str, float] | None,
) -> Recorder:
    if mode_shares is not None and (policy is not None or environment_id != "meam/Pockets-v0"):
        what = environment_id if policy is None else "a policy"
        raise ConfigError(f"mode_shares is a setting of meam/Pockets-v0's demonstrator, not of {what}.")
    if policy is not None:
        trained = PolicyDemonstrator(policy, env, seed=seed)
        return Recorder(f"policy {trained.identity}", trained.record_episode, policy=trained.identity)
    if environment_id == "meam/Pockets-v0":
        return _pockets(env, seed, mode_shares)
    if environment_id.startswith("pointmaze"):
        pointmaze = PointmazeDemonstrator(environment_id, seed=seed)
        return Recorder("scripted demonstrator", lambda _: pointmaze.record_episode(), (pointmaze.generator,))
    if environment_id.startswith(MANIPULATION_FAMILIES):
        manipulation = ManipulationDemonstrator(environment_id, seed=seed)
        name = f"OGBench's scripted oracles ({manipulation.kind})"
        return Recorder(name, manipulation.record_episode, close=manipulation.close)
    raise ConfigError(
        f"There is no demonstrator for {environment_id}. Known: meam/Pockets-v0, and OGBench's pointmaze, "
        f"{', '.join(MANIPULATION_FAMILIES)} tasks. Or give a policy."
    )


def _pockets(env: gymnasium.Env[Any, Any], seed: int, mode_shares: Mapping[str, float] | None) -> Recorder:
    demonstrator = PocketsDemonstrator(mode_shares, seed=seed)
    starts = np.random.default_rng([seed, 1])  # never the starts of an evaluation, which counts up from its seed

    def record(_: int) -> Episode:
        start = int(starts.integers(2**31, 2**32))
        demonstrator.reset()
        return record_steps(env, demonstrator.act, start)

    return Recorder("scripted demonstrator", record, (demonstrator.generator, starts))


def _metadata(environment_id: str, env: gymnasium.Env[Any, Any], seed: int, recorder: Recorder) -> Metadata:
    rate = control_rate(env)
    return Metadata(
        algorithm=recorder.name,
        description=f"{environment_id}, recorded by meam collect with seed {seed}.",
        further={"meam_environment_id": environment_id, "meam_seed": seed}
        | ({} if rate is None else {"control_rate_hz": rate}),
    )

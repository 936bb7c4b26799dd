"""Recording demonstrations, or episodes of a policy, into a Minari data set."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium

from meam_policy.environments.make import make_environment, named_failures, with_arguments
from meam_policy.environments.space_check import control_rate
from meam_policy.errors import ConfigError
from meam_policy.folder.policy_folder import locate_policy, read_spec
from meam_policy.spec import EnvironmentSpec
from meam_policy.typed import typed
from meam_training.collection.dataset_folder import default_dataset_id, new_dataset_folder
from meam_training.collection.episode_source import EpisodeSource, episode_source
from meam_training.collection.minari_writer import DescribedEnvironment, Metadata, write_minari
from meam_training.collection.partial_recording import PartialRecording

__all__ = ["collect"]

MOST_TRANSITIONS = 10**10
"""Transitions of one recording: years of them at any rate."""

Progress = Callable[[int, int], None]
"""Called with the number of transitions recorded so far, and the total."""


@typed()
def collect(
    environment_id: str | EnvironmentSpec | None,
    transitions: int,
    *,
    seed: int = 0,
    policy: str | os.PathLike[str] | None = None,
    dataset_id: str | None = None,
    root: str | os.PathLike[str] | None = None,
    mode_shares: Mapping[str, float] | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Record an environment's scripted demonstrator, or a policy, into a local Minari data set.

    Whole episodes are recorded until there are at least `transitions` transitions. The data set appears once it is
    complete. Until then, the episodes are in a hidden folder beside it, from which an interrupted or killed recording
    can be resumed; the result is identical to that of an uninterrupted recording.

    Args:
        environment_id: For a scripted demonstrator the id "meam/Pockets-v0", or of an OGBench pointmaze, cube, scene or
            puzzle with a fixed task, such as "pointmaze-medium-navigate-singletask-task3-v0" or
            "cube-single-play-singletask-task1-v0". For a policy, any environment that ends its episodes by itself; None
            takes that in which its own data was recorded.
        transitions: Number of transitions to record, 1 to `MOST_TRANSITIONS`.
        seed: Seed of the environment and the demonstrator; the same seed gives the same data.
        policy: Policy folder, or Hub repo id, to run with sampled noise instead of the scripted demonstrator.
        dataset_id: Minari id; None takes `default_dataset_id`.
        root: Folder of the Minari data sets; None takes Minari's own.
        mode_shares: Probability with which the Pockets demonstrator aims at each pocket.
        resume: Continue the unfinished recording of this data set, if there is one.
        on_progress: Called after every episode.
        env_kwargs: For a policy: arguments of the environment, `max_episode_steps` among them; see `make_environment`.

    Returns:
        The folder of the data set, which `OfflineDataset.from_minari` reads.

    Raises:
        ConfigError: there is no demonstrator for the environment, or it cannot be made as it was recorded or with these
            arguments; a setting is out of range; or the unfinished recording has other settings.
        NotFoundError: there is no such environment or policy.
        SpaceError: the environment's spaces differ from the policy's.
        OutputError: the data set already exists, there is an unfinished recording although `resume` is false, or the
            folder cannot be written.
        LockedError: another process is recording the data set.
        DatasetError: the unfinished recording is broken.
        MissingExtraError: minari, the simulator or onnxruntime is not installed.
    """
    if not 1 <= transitions <= MOST_TRANSITIONS or seed < 0:
        raise ConfigError(
            f"transitions is {transitions} and seed is {seed}; expected transitions from 1 to {MOST_TRANSITIONS} and "
            "seed >= 0."
        )
    recorded = _environment(environment_id, policy, env_kwargs)
    name = default_dataset_id(recorded.id) if dataset_id is None else dataset_id
    with warnings.catch_warnings(), ExitStack() as opened:
        # OGBench's manipulation tasks recreate their action space at every step, which warns each time.
        warnings.filterwarnings("ignore", message=".*precision lowered by casting", category=UserWarning)
        env = make_environment(recorded, **(env_kwargs or {}))
        opened.callback(env.close)
        source = episode_source(recorded.id, env, seed, policy, mode_shares)
        opened.callback(source.close)
        folder = new_dataset_folder(name, root)
        made = str(recorded)
        settings = {
            "environment_id": recorded.id,
            **({} if made == recorded.id and not env_kwargs else {"environment": made, "env_kwargs": env_kwargs}),
            "transitions": transitions,
            "seed": seed,
            "policy": source.policy,
            "mode_shares": None if mode_shares is None else dict(mode_shares),
        }
        with PartialRecording.open(folder.with_name(f".{folder.name}.partial"), settings, resume=resume) as recording:
            with named_failures(with_arguments(recorded, env_kwargs or {})):
                _record(source, recording, transitions, on_progress)
            about = _metadata(recorded.id, env, seed, source)
            recording.finish(write_minari(recording, name, DescribedEnvironment.of(env), about), folder)
    return folder


def _environment(
    environment: str | EnvironmentSpec | None,
    policy: str | os.PathLike[str] | None,
    env_kwargs: Mapping[str, Any] | None,
) -> EnvironmentSpec:
    """The environment that is recorded."""
    if policy is None and (env_kwargs or not isinstance(environment, str)):
        raise ConfigError(
            f"The environment is {environment}, with arguments {dict(env_kwargs or {})}, and there is no policy; "
            "expected the id of an environment with a scripted demonstrator, as it is registered. "
            "Give a policy (--policy), or leave the arguments out."
        )
    if environment is None:
        assert policy is not None
        environment = read_spec(locate_policy(policy)).recorded_environment
        if environment is None:
            raise ConfigError(f"The policy {policy} does not say which environment it is for; name one.")
    return EnvironmentSpec(environment) if isinstance(environment, str) else replace(environment, evaluation=None)


def _record(source: EpisodeSource, recording: PartialRecording, transitions: int, on_progress: Progress | None) -> None:
    for generator, state in zip(source.generators, recording.progress.generators or (), strict=False):
        generator.bit_generator.state = state
    while (progress := recording.progress).transitions < transitions:
        episode = source.record(progress.episodes)
        recording.add(episode, [dict(generator.bit_generator.state) for generator in source.generators])
        if on_progress is not None:
            on_progress(min(recording.progress.transitions, transitions), transitions)
    recording.flush()


def _metadata(environment_id: str, env: gymnasium.Env[Any, Any], seed: int, source: EpisodeSource) -> Metadata:
    rate = control_rate(env)
    return Metadata(
        algorithm=source.name,
        description=f"{environment_id}, recorded by meam collect with seed {seed}.",
        further={"meam_environment_id": environment_id, "meam_seed": seed}
        | ({} if rate is None else {"control_rate_hz": rate}),
    )

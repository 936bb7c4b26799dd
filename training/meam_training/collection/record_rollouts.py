"""Recording the rollouts of an evaluated policy, to train on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from meam_policy.environments.space_check import AnyEnv, control_rate
from meam_policy.rollouts.episode_log import ActingPolicy, Trajectory
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult
from meam_training.collection.dataset_folder import new_dataset_folder
from meam_training.collection.demonstrators import Episode
from meam_training.collection.minari_writer import DescribedEnvironment, Metadata, write_minari
from meam_training.collection.partial_recording import PartialRecording

__all__ = ["record_rollouts"]


def record_rollouts(
    policy: ActingPolicy,
    env: AnyEnv,
    episodes: int,
    seed: int,
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    environment_id: str | None = None,
    on_episode: Callable[[int], None] | None = None,
) -> tuple[RolloutResult, Path]:
    """Run whole episodes as `rollout` does, and record them into a local Minari data set.

    The data set holds the episodes in the order of their seeds, however many ran in parallel. If an interrupt or an
    error ends the evaluation, it holds those before the first unfinished one. Evaluate policies trained on it with
    other seeds: they have seen these initial states.

    Args:
        policy: See `rollout`.
        env: One environment, or a vector environment.
        episodes: Number of episodes, at least 1.
        seed: Seed of the first episode, at least 0.
        dataset_id: Minari id.
        root: Folder of the Minari data sets; None takes Minari's own.
        environment_id: Name of the environment that policies trained on the data set will record; None takes the
            environment's own, or else the policy's.
        on_episode: Called after each episode, with the number of finished episodes.

    Returns:
        The result of `rollout`, and the folder of the data set, which `OfflineDataset.from_minari` reads.

    Raises:
        SpaceError: the policy cannot act in the environment.
        ConfigError: an argument is out of range, or the name is not a Minari id.
        OutputError: the data set already exists, or the folder cannot be written.
        LockedError: another process is recording the data set.
        MissingExtraError: minari is not installed.
    """
    folder = new_dataset_folder(dataset_id, root)
    name = environment_id or (env.spec.id if env.spec else policy.spec.environment_id)
    identity = hashlib.sha256(policy.spec.to_json().encode()).hexdigest()
    settings = {"environment_id": name, "policy": identity, "seed": seed, "episodes": episodes}
    # Before the rollout: an interrupt may leave a vector environment in the middle of a step.
    described, about = DescribedEnvironment.of(env), _metadata(name, env, seed, identity)
    with PartialRecording.open(folder.with_name(f".{folder.name}.partial"), settings, resume=False) as recording:
        ordered = _Ordered(recording)
        try:
            result = rollout(policy, env, episodes, seed, on_episode=on_episode, on_trajectory=ordered.add)
        finally:
            if recording.progress.episodes:
                recording.flush()
                recording.finish(write_minari(recording, dataset_id, described, about), folder)
    return result, folder


class _Ordered:
    """Passes episodes on in the order of their indices, and holds back those that finish before an earlier one."""

    def __init__(self, recording: PartialRecording) -> None:
        self._recording = recording
        self._waiting: dict[int, Episode] = {}

    def add(self, index: int, trajectory: Trajectory) -> None:
        rewards = trajectory.rewards.astype(np.float32)
        self._waiting[index] = Episode(**{**trajectory._asdict(), "rewards": rewards})
        while (due := self._recording.progress.episodes) in self._waiting:
            self._recording.add(self._waiting.pop(due), [])


def _metadata(environment_id: str | None, env: AnyEnv, seed: int, identity: str) -> Metadata:
    named = {"meam_environment_id": environment_id, "meam_seed": seed, "control_rate_hz": control_rate(env)}
    return Metadata(
        algorithm=f"policy {identity}",
        description=f"{environment_id or 'An environment'}, rollouts of a policy with seeds from {seed}.",
        further={key: value for key, value in named.items() if value is not None},
    )

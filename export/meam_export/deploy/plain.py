"""A policy as one observation in and one action out, written only with its own measured return."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_export.deploy.source import Source, write_file
from meam_export.deploy.tick_graph import build_plain, with_metadata
from meam_export.deploy.tick_player import TickPlayer
from meam_policy import MeamPolicy
from meam_policy.acting.observation import flatten_observation
from meam_policy.atomic_files import given_folder
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult

__all__ = ["write_plain"]


def write_plain(
    source: Source,
    file: str | os.PathLike[str],
    env: gymnasium.Env[Any, Any],
    environment: str,
    episodes: int,
    seed: int = 0,
) -> tuple[Path, RolloutResult]:
    """Measure the plain form of a policy, and write it with what it returned in its metadata.

    It infers in every tick and takes the first action of each chunk from zero noise: another policy than the one that
    was trained, and better or worse.

    Args:
        source: The policy.
        file: ONNX file to write.
        env: The environment to measure in.
        environment: Its name, for the metadata.
        episodes: Episodes to measure over; 1 or more.
        seed: Seed of the first.

    Returns:
        The file, and the episodes.

    Raises:
        ConfigError: the contract has a `max_rate`, which a graph without a state cannot keep.
        SpaceError: the environment does not fit the policy.
        OutputError: the file cannot be written.
    """
    target = given_folder("--plain", file).absolute()
    made = build_plain(source.graph, source.spec, source.robot)
    acting: Any = _PlainPolicy(source.acting(), TickPlayer(made, target.name))
    result = rollout(acting, env, episodes, seed)
    low, high = result.return_interval
    figures = {"return_mean": result.return_mean, "return_low": low, "return_high": high}
    about = {f"meam_{name}": repr(float(value)) for name, value in figures.items()}
    about |= {"meam_episodes": str(episodes), "meam_seed": str(seed), "meam_measured_in": environment}
    write_file(target, with_metadata(made.graph, about))
    return target, result


@dataclass(frozen=True)
class _PlainPolicy:
    """Acts by the plain graph, and is otherwise the policy."""

    policy: MeamPolicy
    player: TickPlayer

    def act(self, observation: Any) -> NDArray[Any]:
        """The action at one observation; the graph takes off the offset that flattening has taken off already."""
        spec = self.policy.spec
        row = flatten_observation(spec, observation)[0][0]
        raw = (row + np.array(spec.observation_offset or 0.0)).astype(np.float32)
        action = self.player.tick(raw)["actions"][0]
        return action.reshape(spec.action.shape).astype(spec.action_space.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

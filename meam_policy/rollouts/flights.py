"""Flights of an evaluation: one file for each episode, from which `meam replay` acts again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import OutputError
from meam_policy.extras import needs
from meam_policy.flight.flight_file import FlightFile
from meam_policy.flight.identity import identity_of
from meam_policy.folder.policy_folder import check_output_folder
from meam_policy.rollouts.episode_log import Trajectory

__all__ = ["EpisodeFlights"]


class EpisodeFlights:
    """Acts as a policy does, one environment at a time, and writes what happened when an episode has ended.

    Give it to `rollout` as the policy, and its `write` as `on_trajectory`.

    Args:
        policy: Acts; has `last_noise`.
        folder: For the files; must be empty or not exist.
        seed: Seed of the first episode.

    Attributes:
        spec: The policy's.

    Raises:
        OutputError: the folder is not empty, or cannot be made.
        MissingExtraError: mcap is not installed.
    """

    def __init__(self, policy: Any, folder: Path, seed: int) -> None:
        with needs("Recording", "mcap", "flight"):
            import mcap.writer  # noqa: F401
        check_output_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {folder} cannot be made: {error.strerror or error}.") from error
        self._policy, self._folder, self._seed = policy, folder, seed
        self.spec = policy.spec
        self._about = {**identity_of(policy), "kind": "evaluation"}
        self._calls: list[tuple[int, float, NDArray[np.float32] | None]] = []

    @property
    def inferences(self) -> int:
        """Network runs so far."""
        return self._policy.inferences

    def act(self, observation: Any) -> NDArray[Any]:
        """Act, and remember the noise."""
        before, start = self._policy.inferences, time.perf_counter()
        action = self._policy.act(observation)
        seconds = time.perf_counter() - start
        noise = self._policy.last_noise[0] if self._policy.inferences > before else None
        self._calls.append((time.time_ns(), seconds, noise))
        return action

    def reset(self, seed: int | Sequence[int] | None = None, mask: NDArray[np.bool_] | None = None) -> None:
        """Begin an episode."""
        self._policy.reset(seed=seed, mask=mask)
        self._calls = []

    def write(self, index: int, trajectory: Trajectory) -> None:
        """Write the episode that has ended.

        Raises:
            OutputError: it cannot be written; what there is of the file is deleted.
        """
        path = self._folder / f"episode-{index:05d}.mcap"
        seen = trajectory.observations

        def observation(tick: int) -> Any:
            return {key: rows[tick] for key, rows in seen.items()} if isinstance(seen, dict) else seen[tick]

        try:
            file = FlightFile(path, {**self._about, "settings": json.dumps({"seed": self._seed + index})})
            try:
                for tick, (time_ns, seconds, noise) in enumerate(self._calls):
                    message = {
                        "episode": index,
                        "tick": tick,
                        "observation": observation(tick),
                        "noise": noise,
                        "action": trajectory.actions[tick],
                        "reward": float(trajectory.rewards[tick]),
                        "terminated": bool(trajectory.terminations[tick]),
                        "latency_ms": seconds * 1e3,
                    }
                    file.add(tick, time_ns, "tick", message)
                count, now = len(self._calls), time.time_ns()
                end = {"kind": "end", "episode": index, "observation": observation(count)}
                file.add(count, now, "event", {**end, "truncated": not trajectory.terminations[-1]})
                file.finish(count + 1, now)
            except BaseException:
                file.close()
                path.unlink()
                raise
        except OSError as error:
            raise OutputError(f"The flight {path} cannot be written: {error.strerror or error}.") from error

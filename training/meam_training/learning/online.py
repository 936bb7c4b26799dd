"""Offline to online: the policy acts in its environment, and learns on from what it meets there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meam_policy.acting.observation import flatten_observation
from meam_policy.environments.space_check import check_spaces
from meam_policy.errors import CheckpointError, DatasetError
from meam_policy.policy import MeamPolicy
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch
from meam_training.config import TrainConfig
from meam_training.data.action_chunk import chunk_targets
from meam_training.learning.chunk_source import ChunkSource
from meam_training.learning.learner import Learner
from meam_training.learning.network_session import NetworkSession
from meam_training.networks.action_normaliser import ActionNormaliser
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["ONLINE_METRICS", "OnlineCollector", "OnlineLearning", "ReplayChunks"]

ONLINE_METRICS = ("online_return", "online_success")
"""Names of what is logged of every finished online episode, beside the metrics of the updates."""


class ReplayChunks:
    """The offline chunks, and those of the transitions recorded online.

    A batch is uniform over the rows of both, or holds `config.offline_share` of offline rows (RLPD). There is room
    for all of `config.online_steps`, so that nothing is ever forgotten. The transitions are kept where the
    environment runs; a batch at a time comes to the training device.

    Args:
        offline: The offline chunks.
        spec: What the policy is.
        config: Settings.

    References:
        Ball et al., Efficient Online Reinforcement Learning with Offline Data, arXiv:2302.02948 (RLPD).
    """

    def __init__(self, offline: ChunkSource, spec: PolicySpec, config: TrainConfig) -> None:
        self._offline, self._config = offline, config
        self._normaliser = ActionNormaliser.of(spec)
        rows = config.online_steps
        self._rows = {
            "observations": np.zeros((rows, spec.observation_dim), np.float32),
            "actions": np.zeros((rows, spec.action_dim), np.float32),  # normalised
            "rewards": np.zeros(rows, np.float32),
            "next_observations": np.zeros((rows, spec.observation_dim), np.float32),
            "terminations": np.zeros(rows, np.bool_),
            "episode_ends": np.zeros(rows, np.bool_),
        }
        self._transitions = 0

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        return len(self._offline) + self._online_starts

    @property
    def transitions(self) -> int:
        """Number of transitions recorded online."""
        return self._transitions

    @property
    def _online_starts(self) -> int:
        return max(0, self._transitions - self._config.chunk_size + 1)

    def add(
        self,
        observation: NDArray[np.float32],
        action: NDArray[Any],
        reward: float,
        next_observation: NDArray[np.float32],
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Record a transition.

        Args:
            observation: Flattened observation [observation_dim].
            action: Flattened action, environment units [action_dim].
            reward: Its reward.
            next_observation: Flattened observation after it; at an episode's end its last one [observation_dim].
            terminated: Whether the task ended, so that nothing more is earned.
            truncated: Whether the episode was cut.
        """
        transition = {
            "observations": observation,
            "actions": self._normaliser.normalise(action),
            "rewards": reward,
            "next_observations": next_observation,
            "terminations": terminated,
            "episode_ends": terminated or truncated,
        }
        for name, value in transition.items():
            self._rows[name][self._transitions] = value
        self._transitions += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks. Offline and online ones come in random order: learners single out a batch's first rows."""
        offline = self._offline.sample(batch_size, generator)
        if not self._online_starts:
            return offline
        device, share = offline.rewards.device, self._config.offline_share
        # Both sources are sampled in full, so that a batch's shapes never depend on chance.
        starts = torch.randint(self._online_starts, (batch_size,), generator=generator, device=device)
        online = self._batch(starts.cpu().numpy())
        if share is None:
            taken = torch.rand(batch_size, generator=generator, device=device) < len(self._offline) / len(self)
        else:
            taken = torch.randperm(batch_size, generator=generator, device=device) < round(share * batch_size)
        pairs = zip(offline, online, strict=True)
        return ChunkBatch(*(torch.where(taken[:, None] if a.dim() > 1 else taken, a, b.to(device)) for a, b in pairs))

    def state(self) -> dict[str, Tensor]:
        """What was recorded, for a checkpoint."""
        return {name: torch.from_numpy(values[: self._transitions]) for name, values in self._rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what was recorded before. The episode that was going on ends there, as if truncated.

        Raises:
            CheckpointError: it holds more transitions than there is room for.
        """
        count, room = len(state["rewards"]), len(self._rows["rewards"])
        if count > room:
            raise CheckpointError(f"The run has done {count} online steps; expected online_steps of as many or more.")
        for name, values in self._rows.items():
            values[:count] = state[name].numpy()
        self._rows["episode_ends"][max(0, count - 1) : count] = True
        self._transitions = count

    def _batch(self, starts: NDArray[np.int64]) -> ChunkBatch:
        """The online chunks that begin at the given rows, on the CPU."""
        rows, c = self._rows, self._config
        targets = chunk_targets(
            rows["rewards"], rows["terminations"], rows["episode_ends"], c.chunk_size, c.discount, starts
        )
        arrays = {
            "observations": rows["observations"][starts],
            "actions": rows["actions"][starts[:, None] + np.arange(c.chunk_size)].reshape(len(starts), -1),
            "rewards": targets.rewards,
            "next_observations": rows["next_observations"][targets.last_rows],
            "masks": targets.masks,
            "valid": targets.valid,
        }
        return ChunkBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


class OnlineCollector:
    """Acts in one environment as the exported policy would, chunk by chunk, and records every transition.

    Every episode's start and noise come from a seed of its own, made of the run's seed and the episode's number. So a
    run is reproducible wherever `env.reset(seed=…)` decides the whole episode, and nothing of a generator has to be
    stored.

    Args:
        env: The environment; not the one that evaluates, for that would break off the episode.
        networks: Networks in training; they are read at every inference.
        spec: What the policy is.
        replay: Where the transitions go.
        seed: The run's seed.

    Raises:
        SpaceError: the environment's spaces are not the policy's.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        networks: MeamNetworks,
        spec: PolicySpec,
        replay: ReplayChunks,
        seed: int,
    ) -> None:
        check_spaces(spec, env)
        self._env, self._spec, self._replay, self._seed = env, spec, replay, seed
        self._policy = MeamPolicy(spec, NetworkSession(networks, spec))
        self._observation: Any = None  # None between episodes
        self._return, self._success = 0.0, None
        self.episodes = 0

    def step(self) -> dict[str, float]:
        """Act once.

        Returns:
            What is logged of an episode, if this step finished one.

        Raises:
            ObservationError: an observation does not fit the space, or is not finite.
            DatasetError: the reward is not finite.
            ActionError: the networks produced NaN or infinity.
        """
        if self._observation is None:
            self._start_episode()
        before, action = self._observation, self._policy.act(self._observation)
        after, reward, terminated, truncated, info = self._env.step(action)
        if not math.isfinite(reward):
            raise DatasetError(
                f"The environment's reward is {reward} at online step {self._replay.transitions + 1}; expected a "
                "finite number."
            )
        first, last = (flatten_observation(self._spec, observation)[0][0] for observation in (before, after))
        self._replay.add(first, np.ravel(action), float(reward), last, bool(terminated), bool(truncated))
        self._observation = after
        self._return += float(reward)
        flag = info.get("success", info.get("is_success"))
        if flag is not None:
            self._success = bool(flag) or bool(self._success)
        return self._finish_episode() if terminated or truncated else {}

    def _start_episode(self) -> None:
        # Two seeds: with one, the noise would repeat the draws that placed the start.
        start, noise = np.random.SeedSequence((self._seed, self.episodes)).generate_state(2).tolist()
        self._policy.reset(seed=noise)
        self._observation, _ = self._env.reset(seed=start)
        self._return, self._success = 0.0, None
        self.episodes += 1

    def _finish_episode(self) -> dict[str, float]:
        self._observation = None
        logged = {"online_return": self._return}
        if self._success is not None:
            logged["online_success"] = float(self._success)
        return logged


class OnlineLearning:
    """The online part of a run: acts, records and, after the warm-up, updates.

    `state` and `restore` make it go on from a checkpoint. The episode that was going on then is dropped, its
    transitions are kept: a run resumed at the end of an episode is on the CPU bit-equal to an uninterrupted one.

    Args:
        env: The environment, for this run alone.
        learner: What learns.
        offline: The offline chunks.
        spec: What the policy is.

    Attributes:
        chunks: What the updates are drawn from.

    Raises:
        SpaceError: the environment's spaces are not the policy's.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        learner: Learner,
        offline: ChunkSource,
        spec: PolicySpec,
    ) -> None:
        self._learner, self._config = learner, learner.config
        self.chunks = ReplayChunks(offline, spec, learner.config)
        self._collector = OnlineCollector(env, learner.networks, spec, self.chunks, learner.config.seed)

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """Act once, then do the updates that are due.

        Args:
            step: Number of the run's step, counted from 1: its offline updates, then its online steps.

        Returns:
            What is logged: of every update, and of an episode that ended. Empty in the warm-up, but for the latter.

        Raises:
            ObservationError, DatasetError, ActionError: as `OnlineCollector.step`.
            DivergedError: a gradient is not finite.
        """
        finished = self._collector.step()
        logged = [{name: torch.tensor(value) for name, value in finished.items()}] if finished else []
        if self.chunks.transitions > self._config.online_warmup:
            logged += [self._learner.update(self.chunks, step) for _ in range(self._config.updates_per_step)]
        return logged

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs beside the learner."""
        return {**self.chunks.state(), "episodes": torch.tensor(self._collector.episodes)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`, in a new episode.

        Raises:
            CheckpointError: it holds more steps than `online_steps`.
        """
        self.chunks.restore(state)
        self._collector.episodes = int(state["episodes"])

"""Offline-to-online training: the policy acts in its environment, and keeps learning from the new transitions."""

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
from meam_policy.acting.safety import SafetySettings
from meam_policy.environments.space_check import check_spaces
from meam_policy.errors import CheckpointError, DatasetError
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episode_log import one_number
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch
from meam_training.config import TrainConfig
from meam_training.data.action_chunk import ActionChunkSampler
from meam_training.learning.chunk_source import ChunkSource, chunk_batch
from meam_training.learning.learner import Learner
from meam_training.learning.network_session import NetworkSession
from meam_training.networks.action_normaliser import ActionNormaliser
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["ONLINE_METRICS", "OnlineCollector", "OnlineLearning", "ReplayChunks"]

ONLINE_METRICS = ("online_return", "online_success")
"""Names of the metrics of each finished online episode, logged in addition to those of the updates."""


class ReplayChunks:
    """Replay buffer: the offline chunks, and those of the transitions recorded online.

    A batch is uniform over the rows of both, or has a share `config.offline_share` of offline rows (RLPD). The buffer
    has room for all `config.online_steps` transitions, so none is ever discarded. They are kept in host memory; only
    each batch is copied to the training device.

    Args:
        offline: The offline chunks.
        spec: Specification of the policy.
        config: Settings.

    References:
        Ball et al., Efficient Online Reinforcement Learning with Offline Data, arXiv:2302.02948 (RLPD).
    """

    def __init__(self, offline: ChunkSource, spec: PolicySpec, config: TrainConfig) -> None:
        self._offline, self._config, self.offset = offline, config, offline.offset
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
        return max(0, len(self._sampler))

    @property
    def _sampler(self) -> ActionChunkSampler:
        c, rows = self._config, {name: values[: self._transitions] for name, values in self._rows.items()}
        return ActionChunkSampler(**rows, chunk_size=c.chunk_size, discount=c.discount, pad=c.pad_chunks)

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
            reward: Reward of the action.
            next_observation: Flattened observation after the action [observation_dim]; at the end of an episode, its
                last one, not the first of the next.
            terminated: Whether the task ended, so that there are no further rewards.
            truncated: Whether the episode was cut off.
        """
        transition = {
            "observations": observation,
            "actions": self._normaliser.normalise(action),
            "rewards": reward - self.offset.constant,
            "next_observations": next_observation,
            "terminations": terminated,
            "episode_ends": terminated or truncated,
        }
        for name, value in transition.items():
            self._rows[name][self._transitions] = value
        self._transitions += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> ChunkBatch:
        """Draw chunks. Offline and online ones are in random order, since learners single out a batch's first rows."""
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
        """Recorded transitions, for a checkpoint."""
        return {name: torch.from_numpy(values[: self._transitions]) for name, values in self._rows.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore recorded transitions. The episode that was in progress ends there, as if truncated.

        Raises:
            CheckpointError: there are more transitions than the buffer has room for.
        """
        count, room = len(state["rewards"]), len(self._rows["rewards"])
        if count > room:
            raise CheckpointError(
                f"The run has done {count} online steps, but online_steps is {room}; set it to {count} or more."
            )
        for name, values in self._rows.items():
            values[:count] = state[name].numpy()
        self._rows["episode_ends"][max(0, count - 1) : count] = True
        self._transitions = count

    def _batch(self, starts: NDArray[np.int64]) -> ChunkBatch:
        """Online chunks that start at the given rows, on the CPU."""
        nothing = torch.zeros(len(starts))  # returns are of use only in pretraining, which is over
        batch, discount = self._sampler.batch(starts), self._config.discount**self._config.chunk_size
        rewards = self.offset.raised(batch.rewards, batch.masks, discount)
        return chunk_batch(batch._replace(rewards=rewards), nothing, nothing)


class OnlineCollector:
    """Acts in an environment as the exported policy would, chunk by chunk, and records every transition.

    Each episode's initial state and noise have a seed of their own, derived from the run's seed and the episode's
    number. A run is thus reproducible wherever `env.reset(seed=…)` determines the whole episode, and no generator state
    has to be stored.

    Args:
        env: The environment; not the one used for evaluation, which would interrupt the episode.
        networks: Networks in training; each inference reads their current weights.
        spec: Specification of the policy.
        replay: Buffer that receives the transitions.
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
        # Exploration leaves the data: nothing is held back.
        safety = SafetySettings(on_unfamiliar=None)
        self._policy = MeamPolicy(spec, NetworkSession(networks, spec), safety=safety)
        self._observation: Any = None  # None between episodes
        self._return, self._success, self._reports_success = 0.0, False, False
        self.episodes = 0

    def step(self) -> dict[str, float]:
        """Take one environment step.

        Returns:
            Metrics of the episode if this step finished it, else empty.

        Raises:
            ObservationError: an observation does not fit the space, or is not finite.
            SpaceError: the reward is not one number.
            DatasetError: it is not finite.
            ActionError: the networks produced NaN or infinity.
        """
        if self._observation is None:
            self._start_episode()
        before, action = self._observation, self._policy.act(self._observation)
        after, reward, terminated, truncated, info = self._env.step(action)
        reward = one_number(reward)
        if not math.isfinite(reward):
            raise DatasetError(
                f"The environment's reward is {reward} at online step {self._replay.transitions + 1}; expected a "
                "finite number. Correct the environment's reward."
            )
        first, last = (flatten_observation(self._spec, observation)[0][0] for observation in (before, after))
        self._replay.add(first, np.ravel(action), reward, last, bool(terminated), bool(truncated))
        self._observation = after
        self._return += reward
        flag = info.get("success", info.get("is_success"))
        if flag is not None:
            self._reports_success = True
            self._success = self._success or bool(flag)
        return self._finish_episode() if terminated or truncated else {}

    def _start_episode(self) -> None:
        # Two seeds: with a single one, the noise would repeat the draws that gave the initial state.
        start, noise = np.random.SeedSequence((self._seed, self.episodes)).generate_state(2).tolist()
        self._policy.reset(seed=noise)
        self._observation, _ = self._env.reset(seed=start)
        self._return, self._success = 0.0, False
        self.episodes += 1

    def _finish_episode(self) -> dict[str, float]:
        self._observation = None
        logged = {"online_return": self._return}
        if self._reports_success:  # one that reports success only where it is reached did not reach it here
            logged["online_success"] = float(self._success)
        return logged


class OnlineLearning:
    """Online part of a run: acts, records and, after the warm-up, updates.

    `state` and `restore` let it resume from a checkpoint. The episode in progress is abandoned, but its transitions are
    kept; on the CPU, a run resumed at the end of an episode is bit-identical to an uninterrupted one.

    Args:
        env: The environment, used by this run alone.
        learner: Learner that performs the updates.
        offline: The offline chunks.
        spec: Specification of the policy.

    Attributes:
        chunks: Replay buffer from which the updates draw.

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
        """Take one environment step, then perform the updates that are due.

        Args:
            step: Number of the run's step, counted from 1 over its offline updates, then its online steps.

        Returns:
            Metrics of the episode if it ended, then of each update; there are no updates during the warm-up.

        Raises:
            ObservationError, DatasetError, ActionError: as in `OnlineCollector.step`.
            DivergedError: a gradient is not finite.
        """
        finished = self._collector.step()
        logged = [{name: torch.tensor(value) for name, value in finished.items()}] if finished else []
        if self.chunks.transitions > self._config.online_warmup:
            logged += [self._learner.update(self.chunks, step) for _ in range(self._config.updates_per_step)]
        return logged

    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint needs in addition to the learner's."""
        return {**self.chunks.state(), "episodes": torch.tensor(self._collector.episodes)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state()`, with a new episode.

        Raises:
            CheckpointError: it holds more steps than `online_steps`.
        """
        self.chunks.restore(state)
        self._collector.episodes = int(state["episodes"])

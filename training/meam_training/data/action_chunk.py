"""Batches of action chunks, on which the critics and the flows are trained."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import DatasetError
from meam_training.setting_text import SettingText

__all__ = ["ActionChunkBatch", "ActionChunkSampler", "ChunkTargets", "check_chunk_size", "chunk_targets"]


class ActionChunkBatch(NamedTuple):
    """A batch of chunks of H actions.

    Attributes:
        observations: Observation at the chunk's first action [batch, observation_dim].
        actions: The chunk [batch, H, action_dim]; actions past the end of an episode are those of the next one, and
            after the last one those of the first.
        rewards: Discounted sum of the chunk's rewards, up to the end of the episode [batch].
        next_observations: Observation after the chunk, or at the end of the episode if that comes first
            [batch, observation_dim].
        masks: 0 where the chunk reached a termination, else 1 [batch].
        valid: 1 where rewards and outcome are those of the chunk, else 0 [batch]; see `ChunkTargets`.
        within: 1 for the actions that are learned from, else 0 [batch, H]; see `ChunkTargets.steps`.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    masks: NDArray[np.float32]
    valid: NDArray[np.float32]
    within: NDArray[np.float32]


class ChunkTargets(NamedTuple):
    """Rewards and outcomes of chunks, one entry for each start [starts].

    Attributes:
        rewards: Discounted sum of the chunk's rewards, up to the end of the episode.
        masks: 0 where the chunk reached a termination, else 1.
        valid: 1 where rewards and outcome are those of the chunk, else 0: the chunk lies within one episode or, if it
            is padded, the task ended in its course, so that the actions after that earn nothing whatever they are.
            Where a recording was cut off they would have mattered, so that there is no target.
        last_rows: Row of the last transition of the chunk that belongs to its episode.
        steps: Number of the chunk's first actions that are learned from: those within its episode or, if chunks are not
            padded, none of a chunk that crosses the end of its episode.
    """

    rewards: NDArray[np.float32]
    masks: NDArray[np.float32]
    valid: NDArray[np.float32]
    last_rows: NDArray[np.int64]
    steps: NDArray[np.int64]


def check_chunk_size(chunk_size: int, episode_ends: NDArray[np.bool_]) -> None:
    """Check that at least one chunk lies within an episode.

    Args:
        chunk_size: Actions in a chunk.
        episode_ends: True at the last transition of every recorded episode [n].

    Raises:
        DatasetError: the size is not positive, or no chunk lies within an episode.
    """
    if chunk_size < 1:
        raise DatasetError(SettingText("{chunk_size} is {0}; expected 1 or more.", chunk_size))
    if np.diff(np.flatnonzero(episode_ends), prepend=-1).max(initial=0) < chunk_size:
        raise DatasetError(
            SettingText(
                "No episode has {chunk_size} = {0} transitions or more; expected at least one. Use shorter chunks.",
                chunk_size,
            )
        )


def chunk_targets(
    rewards: NDArray[np.float32],
    terminations: NDArray[np.bool_],
    episode_ends: NDArray[np.bool_],
    chunk_size: int,
    discount: float,
    starts: NDArray[np.int64],
    pad: bool = False,
) -> ChunkTargets:
    """Accumulate rewards and masks over chunks of consecutive rows.

    Args:
        rewards: Reward of each transition [n].
        terminations: True where bootstrapping stops [n]; may be true in the middle of a recorded episode.
        episode_ends: True at the last transition of every recorded episode [n].
        chunk_size: Actions in a chunk, H.
        discount: Discount gamma per environment step.
        starts: Rows at which the chunks start, each in [0, n - H] or, if chunks are padded, in [0, n).
        pad: Whether chunks that cross the end of their episode count, with those of their actions that lie within it.

    Returns:
        For each start, `sum_i gamma^i r_i` over those rows of the chunk that belong to its episode, and the minimum of
        their masks.

    References:
        Li et al., Reinforcement Learning with Action Chunking, arXiv:2507.07969.
    """
    total = np.zeros(len(starts))
    mask = np.ones(len(starts), dtype=bool)
    inside = np.ones(len(starts), dtype=bool)
    last, valid = starts, inside
    for i in range(chunk_size):
        rows = (starts + i) % len(rewards)
        total += np.where(inside, discount**i * rewards[rows].astype(np.float64), 0.0)
        mask &= ~(inside & terminations[rows])
        last = np.where(inside, rows, last)
        valid = inside
        # The last row may be in the middle of an episode that is still being recorded.
        inside = inside & ~episode_ends[rows] & (rows < len(rewards) - 1)
    steps = last - starts + 1 if pad else np.where(valid, chunk_size, 0)
    if pad:
        valid = valid | terminations[last]
    return ChunkTargets(total.astype(np.float32), mask.astype(np.float32), valid.astype(np.float32), last, steps)


class ActionChunkSampler:
    """Draws batches of action chunks, their starts uniform over the rows; see `OfflineDataset.chunk_sampler`.

    Computes and stores nothing of the data's length, so that the arrays may be memory-mapped.

    Attributes:
        observations: Observation of each row [n, observation_dim].
        actions: Action of each row [n, action_dim].
        next_observations: Observation after each row's action [n, observation_dim].
        rewards: Reward of each row [n].
        terminations: True where the task ended, so that there are no further rewards [n].
        episode_ends: True at the last row of every recorded episode [n].
        chunk_size: Actions in a chunk.
        discount: Discount per environment step.
        pad: Whether chunks may start at every row, also where they cross the end of their episode.
    """

    def __init__(
        self,
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        next_observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        terminations: NDArray[np.bool_],
        episode_ends: NDArray[np.bool_],
        chunk_size: int,
        discount: float,
        pad: bool = False,
    ) -> None:
        self.observations = observations
        self.actions = actions
        self.next_observations = next_observations
        self.rewards = rewards
        self.terminations = terminations
        self.episode_ends = episode_ends
        self.chunk_size = chunk_size
        self.discount = discount
        self.pad = pad

    def __len__(self) -> int:
        """Number of rows at which a chunk may start."""
        return len(self.rewards) if self.pad else len(self.rewards) - self.chunk_size + 1

    def sample(self, batch_size: int, generator: np.random.Generator) -> ActionChunkBatch:
        """Draw a batch.

        Args:
            batch_size: Number of chunks.
            generator: Source of randomness.
        """
        return self.batch(generator.integers(len(self), size=batch_size))

    def targets(self, starts: NDArray[np.int64]) -> ChunkTargets:
        """Rewards and outcomes of the chunks that start at the given rows [starts]."""
        columns = (self.rewards, self.terminations, self.episode_ends)
        return chunk_targets(*columns, self.chunk_size, self.discount, starts, self.pad)

    def batch(self, starts: NDArray[np.int64]) -> ActionChunkBatch:
        """Batch of the chunks that start at the given rows [batch]."""
        targets, offsets = self.targets(starts), np.arange(self.chunk_size)
        return ActionChunkBatch(
            observations=self.observations[starts],
            # Past the end, what follows in the recording: actions like the data's that tell nothing of the chunk's own.
            # From copies of the last action a flow would read that action off, and miss them where it acts.
            actions=self.actions[(starts[:, None] + offsets) % len(self.actions)],
            rewards=targets.rewards,
            next_observations=self.next_observations[targets.last_rows],
            masks=targets.masks,
            valid=targets.valid,
            within=(offsets < targets.steps[:, None]).astype(np.float32),
        )

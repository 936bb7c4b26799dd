"""The schedule of a control loop: which action of which chunk a tick executes, and how the next chunk continues it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError

__all__ = ["ChunkSchedule", "Chunking", "prefix_weights"]

Chunking = Literal["realtime", "naive", "blocking"]
"""How one chunk of actions follows another; see `meam_policy.loop.control_loop.ControlLoop`."""


def prefix_weights(chunk_size: int, delay: int, execute_steps: int) -> NDArray[np.float32]:
    """How strongly a new chunk must equal the running one: the exponential soft mask of real-time chunking.

    With H = chunk_size, d = delay and s = execute_steps, the weight of action i is

        1                                 i < d, what is executed before the new chunk can arrive
        c_i (exp(c_i) - 1) / (e - 1)      d <= i < H - s, with c_i = (H - s - i) / (H - s - d + 1)
        0                                 H - s <= i, what the running chunk does not reach.

    A delay beyond the overlap H - s counts as H - s.

    Args:
        chunk_size: Actions in a chunk.
        delay: Ticks from the observation until the new chunk arrives, 0 or more.
        execute_steps: Ticks between the observation of the running chunk and that of the new one, 0 to chunk_size.

    Returns:
        Weights [chunk_size] in [0, 1], never rising; action 0 is that of the new chunk's observation.

    Raises:
        ConfigError: an argument is out of range.

    References:
        Black et al., Real-Time Execution of Action Chunking Flow Policies, arXiv:2506.07339.
    """
    if not 0 <= execute_steps <= chunk_size:
        raise ConfigError(f"execute_steps is {execute_steps}; expected 0 to chunk_size, {chunk_size}.")
    if delay < 0:
        raise ConfigError(f"delay is {delay}; expected 0 ticks or more.")
    overlap = chunk_size - execute_steps
    c = (overlap - np.arange(chunk_size)) / (overlap - min(delay, overlap) + 1)
    # The formula is 1 at c = 1 and 0 at c = 0: clipped, it is all three cases.
    c = np.clip(c, 0.0, 1.0)
    return (c * np.expm1(c) / np.expm1(1.0)).astype(np.float32)


class ChunkSchedule:
    """The running chunk, and the tick at which its first action was, or would have been, due.

    Args:
        chunking: "blocking" executes `execute_steps` actions of a chunk; the others as many as there are until the
            next chunk arrives.
        chunk_size: Actions in a chunk.
        action_dim: Numbers in an action.
        execute_steps: Ticks from the observation of one chunk until the next chunk is asked for.
    """

    def __init__(self, chunking: Chunking, chunk_size: int, action_dim: int, execute_steps: int) -> None:
        self._blocking = chunking == "blocking"
        self._chunk_size, self._action_dim, self._execute_steps = chunk_size, action_dim, execute_steps
        self._chunk: NDArray[Any] | None = None
        self._start = 0

    @property
    def start(self) -> int:
        """The tick of the observation that the running chunk was computed from."""
        return self._start

    @property
    def empty(self) -> bool:
        """Whether there has been no chunk since `clear`."""
        return self._chunk is None

    def clear(self) -> None:
        """Drop the running chunk."""
        self._chunk = None

    def begin(self, chunk: NDArray[Any], tick: int) -> None:
        """Execute a chunk [chunk_size, ...] from now on, whose first action belongs to `tick`, now or in the past."""
        self._chunk, self._start = chunk, tick

    def is_due(self, tick: int, delay: int) -> bool:
        """Whether to ask for the next chunk, which is expected `delay` ticks later, at this tick."""
        if self._blocking:
            return tick - self._start >= self._execute_steps
        # Sooner than execute_steps if otherwise the running chunk would end before the next one is there.
        return tick - self._start >= max(1, min(self._execute_steps, self._chunk_size - delay))

    def action(self, tick: int) -> NDArray[Any] | None:
        """The action of a tick; None if the chunk is used up."""
        index = tick - self._start
        if self._chunk is None or index >= (self._execute_steps if self._blocking else self._chunk_size):
            return None
        return self._chunk[index, ...]  # an array even for a scalar action

    def rest(self, tick: int) -> NDArray[Any]:
        """The actions of this tick and those after it [n, ...]; none if the chunk is used up."""
        assert self._chunk is not None
        end = self._execute_steps if self._blocking else self._chunk_size
        return self._chunk[max(tick - self._start, 0) : end]

    def repeated_action(self, tick: int) -> NDArray[Any]:
        """The action of a tick if the chunk is executed again and again, as a whole."""
        assert self._chunk is not None
        return self._chunk[(tick - self._start) % self._chunk_size, ...]

    def prefix(self, tick: int, delay: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The rest of the running chunk, for a chunk that is asked for at this tick.

        Args:
            tick: The tick of the new chunk's observation.
            delay: Ticks that the new chunk is expected to take.

        Returns:
            Actions [chunk_size, action_dim] in environment units, the first one that of this tick, and their weights
            [chunk_size]; zeros, with weight zero, where the running chunk has no action.
        """
        actions = np.zeros((self._chunk_size, self._action_dim), dtype=np.float32)
        executed = self._chunk_size
        if self._chunk is not None:
            executed = min(tick - self._start, self._chunk_size)
            actions[: self._chunk_size - executed] = self._chunk[executed:].reshape(-1, self._action_dim)
        return actions, prefix_weights(self._chunk_size, delay, executed)

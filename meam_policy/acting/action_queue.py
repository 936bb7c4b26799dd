"""Queues of actions from executing chunks, one per environment slot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ActionChunkQueue"]


class ActionChunkQueue:
    """The remaining actions of the current chunk, for every slot of a (vector) environment.

    Args:
        slots: Number of environment slots.
        chunk_size: Actions in a chunk.
        execute_steps: Actions of a chunk that are executed before the slot asks for a new one.
        action_dim: Numbers in an action.
    """

    def __init__(self, slots: int, chunk_size: int, execute_steps: int, action_dim: int) -> None:
        self.execute_steps = execute_steps
        self._chunks = np.zeros((slots, chunk_size, action_dim), dtype=np.float32)
        self._position = np.full(slots, execute_steps)
        self._all = np.arange(slots)

    @property
    def slots(self) -> int:
        """Number of environment slots."""
        return len(self._position)

    def empty_slots(self) -> NDArray[np.intp]:
        """Indices of the slots that need a new chunk before they can act."""
        return (self._position >= self.execute_steps).nonzero()[0]

    def put(self, slots: NDArray[np.intp], chunks: NDArray[np.float32]) -> None:
        """Give slots [k] new chunks [k, chunk_size, action_dim]; what they still held is dropped."""
        self._chunks[slots] = chunks
        self._position[slots] = 0

    def pop(self, slots: NDArray[np.intp] | None = None) -> NDArray[np.float32]:
        """Take the next action of every slot, or of some: a fresh array [slots, action_dim]. None of them is empty."""
        taken = self._all if slots is None else slots
        position = self._position[taken]
        self._position[taken] = position + 1
        return self._chunks[taken, position]

    def clear(self, mask: NDArray[np.bool_]) -> None:
        """Drop what the slots with a true mask [slots] still hold."""
        self._position[mask] = self.execute_steps

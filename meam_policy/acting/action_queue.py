"""Queues of actions from executing chunks, one per environment slot."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["ActionChunkQueue"]


class ActionChunkQueue:
    """The remaining actions of the current chunk, for every slot of a (vector) environment.

    Args:
        slots: Number of environment slots.
        chunk_size: Actions in a chunk.
        execute_steps: Actions of a chunk that are executed before the slot asks for a new one.
        action_dim: Numbers in an action.
        dtype: Type of the actions.
    """

    def __init__(
        self, slots: int, chunk_size: int, execute_steps: int, action_dim: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.execute_steps, self.slots = execute_steps, slots
        self._actions = np.zeros((chunk_size, slots, action_dim), dtype)
        self._all, self._none = np.arange(slots), np.arange(0)
        # The position of every slot while all have the same, as one slot has and slots that begin together, else None:
        # then each has its own.
        self._shared: int | None = execute_steps
        self._position = np.full(slots, execute_steps)

    def empty_slots(self) -> NDArray[np.intp]:
        """Indices of the slots that need a new chunk before they can act."""
        if self._shared is not None:
            return self._none if self._shared < self.execute_steps else self._all
        return (self._position >= self.execute_steps).nonzero()[0]

    def put(self, slots: NDArray[np.intp], chunks: NDArray[Any]) -> None:
        """Give slots [k] new chunks [k, chunk_size, action_dim]; what they still held is dropped."""
        if len(slots) == self.slots:
            self._actions[:, slots] = chunks.swapaxes(0, 1)
            self._shared = 0
            return
        self._each()[slots] = 0
        self._actions[:, slots] = chunks.swapaxes(0, 1)

    def pop(self, slots: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """Take the next action of every slot, or of some: a fresh array [slots, action_dim]. None of them is empty."""
        if slots is None and self._shared is not None:
            found = self._actions[self._shared].copy()
            self._shared += 1
            return found
        taken = self._all if slots is None else slots
        each = self._each()
        position = each[taken]
        each[taken] = position + 1
        return self._actions[position, taken]

    def clear(self, mask: NDArray[np.bool_]) -> None:
        """Drop what the slots with a true mask [slots] still hold."""
        if mask.all():
            self._shared = self.execute_steps
        else:
            self._each()[mask] = self.execute_steps

    def _each(self) -> NDArray[np.intp]:
        """The positions of the slots, which from now on have their own."""
        if self._shared is not None:
            self._position[:] = self._shared
            self._shared = None
        return self._position

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

    Attributes:
        slots: Number of environment slots.
        left: How often every slot can act before one of them needs a new chunk.
    """

    def __init__(
        self, slots: int, chunk_size: int, execute_steps: int, action_dim: int, dtype: DTypeLike = np.float32
    ) -> None:
        self.slots, self.left, self._execute_steps = slots, 0, execute_steps
        self._actions = np.zeros((chunk_size, slots, action_dim), dtype)
        self._all = np.arange(slots)
        # While all slots are in step, as one slot always is, `left` alone says where they are.
        self._in_step, self._position = True, np.full(slots, execute_steps)

    def empty_slots(self) -> NDArray[np.intp]:
        """Indices of the slots that need a new chunk before they can act."""
        if self._in_step:
            return self._all[: 0 if self.left else self.slots]
        return (self._position >= self._execute_steps).nonzero()[0]

    def put(self, slots: NDArray[np.intp], chunks: NDArray[Any]) -> None:
        """Give slots [k], ascending, new chunks [k, chunk_size, action_dim]; what they still held is dropped."""
        if len(slots) == self.slots:
            self._actions[...] = chunks.swapaxes(0, 1)
            self.left, self._in_step = self._execute_steps, True
            return
        self._actions[:, slots] = chunks.swapaxes(0, 1)
        self._each()[slots] = 0
        self._count()

    def pop(self, slots: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """Take the next action of every slot, or of some: a fresh array [slots, action_dim]. None of them is empty."""
        if slots is None and self._in_step:
            found = self._actions[self._execute_steps - self.left].copy()
            self.left -= 1
            return found
        taken, each = self._all if slots is None else slots, self._each()
        position = each[taken]
        each[taken] = position + 1
        self._count()
        return self._actions[position, taken]

    def clear(self, mask: NDArray[np.bool_]) -> None:
        """Drop what the slots with a true mask [slots] still hold."""
        self._each()[mask] = self._execute_steps
        self._count()

    def _each(self) -> NDArray[np.intp]:
        """The position of every slot in its chunk."""
        if self._in_step:
            self._position[:] = self._execute_steps - self.left
        return self._position

    def _count(self) -> None:
        """Look again how far the slots are, after a change of their positions."""
        farthest = int(self._position.max())
        self.left, self._in_step = self._execute_steps - farthest, bool((self._position == farthest).all())

"""Executes a policy's chunks under its safety shell, slot by slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.acting.action_queue import ActionChunkQueue
from meam_policy.acting.arguments import checked_mask
from meam_policy.acting.noise_streams import NoiseStreams
from meam_policy.acting.safety import Reaction, SafetyShell
from meam_policy.errors import ObservationError
from meam_policy.spec import PolicySpec

__all__ = ["ChunkExecution", "Infer"]

Rows = NDArray[np.float32]

Infer = Callable[[Rows, Rows], Rows]
"""Computes chunks [k, chunk_size, action_dim] from observations [k, observation_dim] and noise [k, noise_dim]."""


class ChunkExecution:
    """State of execution for every slot: its queue of actions, its noise, and the shell that limits its actions.

    Args:
        spec: Sizes of chunks and actions.
        shell: Judges observations and chunks, and limits actions.

    Attributes:
        noise: The noise of every slot.
    """

    def __init__(self, spec: PolicySpec, shell: SafetyShell) -> None:
        self.noise = NoiseStreams(spec.noise_dim)
        self._spec, self._shell = spec, shell
        self._queue: ActionChunkQueue | None = None
        self._bounded = False  # whether `shell.bound` has bounded all that is queued

    def reset(self, seeds: int | Sequence[int] | None = None, mask: NDArray[np.bool_] | None = None) -> None:
        """Begin a new episode: see `MeamPolicy.reset`.

        Raises:
            ConfigError: there is not one mask, or seed, for each slot.
        """
        several = isinstance(seeds, Sequence)
        if mask is None:
            self.noise.reseed(seeds)
            # As many slots as there are seeds: one without would go on with its old noise.
            self._queue = self._new_queue(len(seeds)) if several else None
            self._shell.reset()
            return
        counts = {"seeds": len(seeds)} if several else {}
        if self._queue is not None:
            counts["slots of this episode"] = self._queue.slots
        chosen = checked_mask(mask, counts)
        self.noise.reseed(seeds, chosen)
        if self._queue is not None:
            self._queue.clear(chosen)
            self._shell.reset(chosen)

    def act(
        self,
        rows: Rows,
        infer: Infer,
        noise: Rows | None = None,
        noise_scale: float = 1.0,
        start: NDArray[np.bool_] | None = None,
        given: Any = None,
    ) -> NDArray[Any]:
        """Take the next action of every slot.

        Args:
            rows: Observations [slots, observation_dim].
            infer: Called for the slots whose queue is empty.
            noise: Noise [slots, noise_dim] of the chunks that begin now; None draws it.
            noise_scale: What the drawn noise is multiplied by, 0 to 1.
            start: Slots [slots] whose episode begins.
            given: The observations as they were given, for messages.

        Returns:
            Actions [slots, action_dim], limited by the shell and of the action box's type; a fresh array.

        Raises:
            ObservationError: another number of slots than before, or as the shell reacts.
            ActionError: as the shell reacts.
        """
        # First of all: whatever comes of this observation, nothing of an old episode is executed.
        if start is not None and start.all():
            self.reset()
        elif start is not None and self._queue is not None and self._queue.slots == len(start):
            self.reset(mask=start)
        shell = self._shell
        stopped = shell.judge(rows, given)
        queue = self._queue_of(len(rows))
        if not queue.left:
            stopped |= self._fill(queue, rows, infer, noise, noise_scale, stopped)
        if stopped:
            return shell.limit(self._pop_around(queue, stopped))
        return shell.give(queue.pop()) if self._bounded else shell.limit(queue.pop())

    def _fill(
        self,
        queue: ActionChunkQueue,
        rows: Rows,
        infer: Infer,
        noise: Rows | None,
        noise_scale: float,
        stopped: Mapping[int, Reaction],
    ) -> dict[int, Reaction]:
        """Begin a chunk in every empty slot that is not stopped; returns what is to be done where that is no good."""
        ready = queue.empty_slots()
        if stopped:
            ready = np.setdiff1d(ready, list(stopped))
            if not ready.size:
                return {}
        draws = self.noise.draw(ready, noise_scale) if noise is None else noise[ready]
        chunks, finite = self._shell.bound_chunks(infer(rows if len(ready) == len(rows) else rows[ready], draws))
        bad = {} if finite else self._shell.check_chunks(ready, chunks)
        if bad:
            good = ~np.isin(ready, list(bad))
            ready, chunks = ready[good], chunks[good]
        self._begin(queue, ready, chunks)
        return bad

    def _begin(self, queue: ActionChunkQueue, slots: NDArray[np.intp], chunks: Rows) -> None:
        """Begin chunks [k, chunk_size, action_dim] of slots [k], limited as a whole where that changes no action."""
        bounded, held = self._shell.begin(chunks)
        if held is None or not held.any():
            self._bounded = self._bounded or len(slots) == queue.slots
            queue.put(slots, bounded)
        else:  # every change is counted when its action is executed
            self._bounded = False
            queue.put(slots, chunks)

    def _pop_around(self, queue: ActionChunkQueue, stopped: Mapping[int, Reaction]) -> NDArray[np.float64]:
        halted = np.zeros(queue.slots, dtype=bool)
        halted[list(stopped)] = True
        actions = np.empty((queue.slots, self._spec.action_dim))
        actions[list(stopped)] = self._shell.instead(stopped)
        actions[~halted] = queue.pop(np.flatnonzero(~halted))
        # What is left of a stopped slot's chunk is for a state that it has left.
        queue.clear(halted)
        return actions

    def _queue_of(self, slots: int) -> ActionChunkQueue:
        queue = self._queue
        if queue is None:
            queue = self._queue = self._new_queue(slots)
        elif queue.slots != slots:
            raise ObservationError(
                f"Observation batch is {slots}, but this episode began with {queue.slots}. Call policy.reset()."
            )
        return queue

    def _new_queue(self, slots: int) -> ActionChunkQueue:
        spec = self._spec
        self._bounded = True
        # Bounds in float64 may be between two numbers of float32, in which the chunks come.
        dtype = np.float32 if self._shell.bounds_chunks else np.float64
        return ActionChunkQueue(slots, spec.chunk_size, spec.execute_steps, spec.action_dim, dtype)

"""Computing action chunks beside a control loop: in a thread, or with a simulated delay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ActionError, MeamError
from meam_policy.loop.chunk_policy import UncheckedPolicy

__all__ = ["BackgroundInference", "CheckedPolicy", "ChunkAnswer", "ChunkRequest", "Inference", "SimulatedInference"]

Prefix = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class ChunkRequest:
    """One inference that a control loop asks for.

    Attributes:
        observation: The loop's observation; nobody else may write to it.
        tick: The tick of that observation.
        prefix: Actions to continue, and their weights; None for a policy that takes none.
        opening: Whether it is the first one of an episode, which the loop waits for.
        number: How many inferences the loop had asked for before.
        noise: What it starts from [noise_dim]; None lets the policy draw it.
    """

    observation: Any
    tick: int
    prefix: Prefix | None = None
    opening: bool = False
    number: int = 0
    noise: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class ChunkAnswer:
    """The result of a request.

    Attributes:
        request: The request.
        chunk: Actions [chunk_size, *action shape], finite, typed like the action space and within its bounds; None if
            there is an error.
        error: Why there is no chunk.
        seconds: How long the inference took; None in a simulation.
        noise: What it started from [noise_dim], of a policy with `last_noise`.
    """

    request: ChunkRequest
    chunk: NDArray[Any] | None = None
    error: MeamError | None = None
    seconds: float | None = None
    noise: NDArray[np.float32] | None = None


class Inference(Protocol):
    """Where a control loop's chunks come from: see `BackgroundInference`."""

    @property
    def pending(self) -> bool:
        """Whether something was asked for that has not been collected yet."""
        ...

    def reset(self, seed: int | None) -> None:
        """Discard what was asked for, and reset the policy before its next inference."""
        ...

    def discard(self) -> None:
        """Discard what was asked for."""
        ...

    def ask(self, request: ChunkRequest) -> None:
        """Ask for a chunk; nothing may be pending."""
        ...

    def collect(self, tick: int, wait: bool = False) -> ChunkAnswer | None:
        """Take the answer if it is there, or wait for it."""
        ...

    def close(self, timeout_s: float) -> None:
        """End it."""
        ...


class BackgroundInference:
    """A policy in a thread of its own, which computes one chunk at a time and discards what nobody waits for any more.

    The thread is a daemon: one that hangs in an inference does not keep the process from ending.

    Args:
        policy: Used by that thread alone.
        clock: Seconds, monotonic.
    """

    def __init__(self, policy: UncheckedPolicy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = CheckedPolicy(policy), clock
        self._changed = threading.Condition()
        # All of these are read and written under `_changed` only.
        self._generation = 0
        self._seeds: list[int | None] = []
        self._request: ChunkRequest | None = None
        self._answer: ChunkAnswer | None = None
        self._pending = self._closed = False
        self._thread = threading.Thread(target=self._serve, name="meam-policy-inference", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether something was asked for that has not been collected yet."""
        return self._pending

    def reset(self, seed: int | None) -> None:
        """Discard what was asked for, and reset the policy before its next inference; never waits for a running one."""
        with self._changed:
            self._seeds.append(seed)
            self._discard()

    def discard(self) -> None:
        """Discard what was asked for: its answer is never collected, not even if it comes later."""
        with self._changed:
            self._discard()

    def _discard(self) -> None:
        self._generation += 1
        self._request = self._answer = None
        self._pending = False

    def ask(self, request: ChunkRequest) -> None:
        """Ask for a chunk; nothing may be pending."""
        with self._changed:
            assert not self._pending
            self._request, self._pending = request, True
            self._changed.notify_all()

    def collect(self, tick: int, wait: bool = False) -> ChunkAnswer | None:
        """Take the answer if it is there, or wait for it.

        Raises:
            ActionError: closed while waiting.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._answer is not None or self._closed)
                if self._answer is None:
                    raise ActionError("The control loop was closed while it waited for an inference. Make a new one.")
            answer, self._answer = self._answer, None
            self._pending = self._pending and answer is None
            return answer

    def close(self, timeout_s: float) -> None:
        """End the thread.

        Args:
            timeout_s: Longest time to wait for its end, seconds.
        """
        with self._changed:
            self._closed = True
            self._discard()
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._request is not None or self._closed)
                if self._closed or self._request is None:
                    return
                # Together with the request: a later reset must not reseed the policy for an inference it discards.
                request, generation, seeds = self._request, self._generation, self._seeds
                self._request, self._seeds = None, []
            answer = self._policy.answer(request, seeds, self._clock)
            with self._changed:
                if generation == self._generation:
                    self._answer = answer
                    self._changed.notify_all()


class SimulatedInference:
    """A policy whose chunks arrive a fixed number of ticks after they were asked for; no thread and no clock.

    Args:
        policy: Called when a chunk is asked for.
        delay: Ticks until a chunk arrives; those that open an episode arrive at once.
    """

    def __init__(self, policy: UncheckedPolicy, delay: int) -> None:
        self._policy, self._delay = policy, delay
        self._checked_policy = CheckedPolicy(policy)
        self._answer: ChunkAnswer | None = None

    @property
    def pending(self) -> bool:
        """Whether something was asked for that has not been collected yet."""
        return self._answer is not None

    def reset(self, seed: int | None) -> None:
        """Discard what was asked for, and reset the policy."""
        self.discard()
        self._policy.reset(seed=seed)

    def discard(self) -> None:
        """Discard what was asked for."""
        self._answer = None

    def ask(self, request: ChunkRequest) -> None:
        """Ask for a chunk; nothing may be pending."""
        assert self._answer is None
        self._answer = self._checked_policy.answer(request)

    def collect(self, tick: int, wait: bool = False) -> ChunkAnswer | None:
        """Take the answer if it has arrived by this tick."""
        answer = self._answer
        if answer is None or tick < answer.request.tick + (0 if answer.request.opening else self._delay):
            return None
        self._answer = None
        return answer

    def close(self, timeout_s: float) -> None:
        """Discard what was asked for."""
        self.discard()


class CheckedPolicy:
    """Turns requests into answers, whatever the policy does."""

    def __init__(self, policy: UncheckedPolicy) -> None:
        self._policy = policy
        self._shape = (policy.spec.chunk_size, policy.spec.action_dim)
        space = policy.spec.action_space
        self._low, self._high = space.low, space.high

    def answer(
        self, request: ChunkRequest, seeds: Sequence[int | None] = (), clock: Callable[[], float] | None = None
    ) -> ChunkAnswer:
        """Reset the policy with every seed, and compute one chunk."""
        try:
            for seed in seeds:
                self._policy.reset(seed=seed)
            start = clock() if clock else 0.0
            actions = self._predict(request)
            seconds = clock() - start if clock else None
            return ChunkAnswer(request, chunk=self._checked(actions), seconds=seconds, noise=self._noise())
        except MeamError as error:
            return ChunkAnswer(request, error=error, noise=self._noise())
        except BaseException as error:  # whatever it is, the control loop goes on, and reports it
            failure = ActionError(f"The inference failed; no action comes of it: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return ChunkAnswer(request, error=failure, noise=self._noise())

    def _predict(self, request: ChunkRequest) -> NDArray[Any]:
        given: dict[str, Any] = {} if request.noise is None else {"noise": request.noise}
        if request.prefix is not None:
            given["prefix"], given["prefix_weight"] = request.prefix
        return self._policy.predict_action_chunk(request.observation, **given)

    def _noise(self) -> NDArray[np.float32] | None:
        """What the policy's newest inference started from, as a copy; None if it does not say so in an array."""
        try:
            noise = np.array(getattr(self._policy, "last_noise", None), dtype=np.float32)
        except Exception:  # of whatever a policy of somebody's own has under that name
            return None
        return noise[0] if noise.ndim == 2 and len(noise) == 1 else None

    def _checked(self, actions: Any) -> NDArray[Any]:
        chunk = np.asarray(actions)
        if chunk.shape != self._shape:
            raise ActionError(
                f"The policy answered with shape {chunk.shape}; expected {self._shape}. "
                "A control loop takes one observation, not a batch."
            )
        if not np.isfinite(chunk).all():
            raise ActionError(
                "The policy produced NaN or infinity; none of the chunk is executed. "
                "The observation may be far outside the training data."
            )
        # A fresh array, so that nobody can change it any more; clipped because casts round.
        shaped = chunk.reshape(len(chunk), *self._low.shape).astype(self._low.dtype)
        return np.clip(shaped, self._low, self._high, out=shaped)

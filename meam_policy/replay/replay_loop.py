"""A control loop that gets from a recording all that came from outside: observations, ages, pauses and arrivals."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ActionError
from meam_policy.loop.chunk_inference import CheckedPolicy, ChunkAnswer, ChunkRequest
from meam_policy.loop.chunk_policy import UncheckedPolicy
from meam_policy.loop.control_loop import ControlLoop
from meam_policy.replay.messages import Answered, Ticked, in_type

__all__ = ["ReplayLoop"]


class ReplayedInference:
    """Computes chunks when the recording says that they arrived, from the noise that it has.

    Args:
        policy: Computes them.
        simulated: Whether a wait ends in the same tick, as in a simulation.

    Attributes:
        answers: What was recorded, by number; one may be missing.
        arrived: Numbers of those that arrive in the present tick.
        asked: Numbers that were asked for in it.
        again: Answers given in it, with what was recorded.
    """

    def __init__(self, policy: UncheckedPolicy, simulated: bool) -> None:
        self._policy, self._checked, self._simulated = policy, CheckedPolicy(policy), simulated
        self._request: ChunkRequest | None = None
        self.answers: dict[int, Answered] = {}
        self.arrived: list[int] = []
        self.asked: list[int] = []
        self.again: list[tuple[ChunkAnswer, Answered]] = []

    @property
    def pending(self) -> bool:
        """Whether something was asked for that has not arrived."""
        return self._request is not None

    def reset(self, seed: int | None) -> None:
        """Discard what was asked for, and reset the policy; its noise is the recording's."""
        self.discard()
        self._policy.reset()

    def discard(self) -> None:
        """Discard what was asked for."""
        self._request = None

    def ask(self, request: ChunkRequest) -> None:
        """Remember a request."""
        self._request = request
        self.asked.append(request.number)

    def collect(self, tick: int, wait: bool = False) -> ChunkAnswer | None:
        """Compute the answer, if the recording says that it arrived."""
        request = self._request
        if request is None or request.number not in self.arrived or request.number not in self.answers:
            if wait and request is not None and (request.opening or not self._simulated):
                raise ActionError("The recording has no answer to the inference that the loop waits for.")
            return None
        self._request = None
        recorded = self.answers.pop(request.number)
        answer = self._checked.answer(replace(request, noise=recorded.noise))
        self.again.append((answer, recorded))
        if recorded.error is not None:  # what follows is compared too
            return ChunkAnswer(request, error=ActionError(recorded.error), seconds=recorded.seconds)
        if answer.chunk is None and recorded.chunk is not None:
            like = self._policy.spec.action_space
            chunk = in_type(recorded.chunk, like.dtype).reshape(-1, *like.shape)
            return ChunkAnswer(request, chunk=chunk, seconds=recorded.seconds)
        return replace(answer, seconds=recorded.seconds)

    def close(self, timeout_s: float) -> None:
        """Discard what was asked for."""
        self.discard()


class ReplayLoop(ControlLoop):
    """A control loop, made as the recorded one was.

    Args:
        policy: Acts again.
        settings: Of the recorded loop.
    """

    def __init__(self, policy: Any, settings: Mapping[str, Any]) -> None:
        self.inference = ReplayedInference(policy, settings.get("simulated_delay") is not None)
        super().__init__(policy, any_rate=True, clock=lambda: 0.0, **settings)
        self.events: list[str] = []
        self._recorder.heard = self.events

    def _new_inference(self, policy: UncheckedPolicy, simulated_delay: int | None) -> ReplayedInference:
        return self.inference

    @property
    def chosen(self) -> NDArray[Any]:
        """The last action before the policy's limits."""
        return self._chosen

    @property
    def blocking(self) -> bool:
        """Whether it waits for its chunks."""
        return self._chunking == "blocking"

    @property
    def blend_ticks(self) -> int:
        """Ticks of an episode that are blended in."""
        return self._blend_in.ticks

    def begin(self, reset: bool) -> None:
        """Begin an episode, as `reset` or `run` did."""
        if reset:
            self.reset()
        else:
            self._begin_episode()

    def replay(self, tick: Ticked) -> NDArray[Any]:
        """Give the action of a recorded tick."""
        inference = self.inference
        inference.arrived, inference.asked, inference.again = tick.arrived, [], []
        self.events.clear()
        if tick.pause is not None:
            self._skip_pause(tick.pause)
        self._skip(tick.skipped)
        if tick.asked is not None:
            self._asked = tick.asked
        return self._act(tick.observation, tick.age)

    def neutral(self) -> NDArray[Any]:
        """Give the neutral action, or one on the way to it."""
        self._go_to_rest()
        return self._last

    def resume(self, before: Ticked, coming: Ticked, asked: Ticked, answer: Answered) -> None:
        """Go on in the middle of an episode, at a tick in which a chunk arrives: nothing older matters but the action.

        Args:
            before: The tick before, with its action.
            coming: The tick to go on at.
            asked: The tick that asked for the chunk.
            answer: What was recorded of the chunk.
        """
        space = self._policy.spec.action_space
        assert before.action is not None
        self.reset()
        self._last = self._limit(in_type(before.action.reshape(space.shape), space.dtype))
        self._tick = before.tick + 1
        self._delays = deque(answer.delays, maxlen=self._delays.maxlen)
        self._delay = answer.expected
        self._schedule.begin(np.zeros((self._policy.spec.chunk_size, *space.shape), space.dtype), -(2**30))
        if asked is not coming:
            self.inference.ask(ChunkRequest(asked.observation, answer.tick, answer.prefix, False, answer.number))

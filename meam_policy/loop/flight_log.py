"""What a control loop tells its flight recorder: all that came from outside, and what it made of that."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import OutputError
from meam_policy.flight import FlightRecorder, Recording
from meam_policy.flight.identity import identity_of
from meam_policy.loop.chunk_inference import ChunkAnswer
from meam_policy.loop.chunk_policy import UncheckedPolicy
from meam_policy.loop.loop_health import HealthRecorder

__all__ = ["FlightLog", "copied"]


class FlightLog:
    """The record of the present tick, which is handed to the recorder when the tick is over.

    Used by the loop's thread alone, but for `dropped`, `save` and `close`.

    Args:
        recording: Where to.
        policy: Which policy acts.
        settings: How the loop was made, as JSON data; infinity is not among it.
        health: Of the loop; its events are recorded.

    Attributes:
        pause: Periods since the last action, if they are other than about one.
        skipped: Ticks whose deadlines passed before the present one.
        asked: Number of the inference that the tick asked for.
    """

    def __init__(
        self, recording: Recording, policy: UncheckedPolicy, settings: Mapping[str, Any], health: HealthRecorder
    ) -> None:
        finite = {n: None if isinstance(v, float) and math.isinf(v) else v for n, v in settings.items()}
        about = {**identity_of(policy), "kind": "loop", "settings": json.dumps(finite)}
        self._recorder = FlightRecorder(recording, about)
        self._events: list[str] = []
        health.heard = self._events
        self._episode = 0
        self._recorder.add("event", {"kind": "begin", "episode": 0})
        self._tick: dict[str, Any] = {}
        self._arrived: list[int] = []
        self._stopped_by: BaseException | None = None
        self._running = self._unsaved = False
        self.pause: float | None = None
        self.skipped = 0
        self.asked: int | None = None

    @property
    def dropped(self) -> int:
        """Records that are in no file."""
        return self._recorder.dropped

    def begin(self, observation: Any, tick: int, age: float | None) -> None:
        """Begin a tick."""
        self._tick = {
            "episode": self._episode,
            "tick": tick,
            "observation": copied(observation),
            "age_s": age,
            "pause": self.pause,
            "skipped": self.skipped or None,
        }
        self.pause, self.skipped, self.asked = None, 0, None
        self._arrived = []

    def arrive(self, answer: ChunkAnswer, expected: int, delays: Iterable[int]) -> None:
        """An inference arrived, of which such a delay was expected, after those of the newest ones before it."""
        request = answer.request
        self._arrived.append(request.number)
        prefix, weight = request.prefix or (None, None)
        message = {
            "number": request.number,
            "episode": self._episode,
            "tick": request.tick,
            "opening": request.opening,
            "noise": answer.noise,
            "prefix": prefix,
            "prefix_weight": weight,
            "chunk": answer.chunk,
            "seconds": answer.seconds,
            "delays": list(delays),
            "expected": expected,
            "error": None if answer.error is None else _shown(answer.error),
        }
        self._recorder.add("inference", message)

    def give(self, chosen: NDArray[Any], action: NDArray[Any], delay: int) -> None:
        """End a tick that gave an action; nobody changes the arrays any more."""
        self._tick["chosen"], self._tick["action"], self._tick["delay"] = chosen, action, delay
        self._end()

    def fail(self, error: BaseException) -> None:
        """End a tick that raised."""
        self._tick["error"] = _shown(error)
        self._end()
        self.stop(error)

    def _end(self) -> None:
        tick, self._tick = self._tick, {}
        tick["asked"], tick["arrived"] = self.asked, self._arrived or None
        if self._events:
            tick["events"] = self._events[:]
            self._events.clear()
        self._recorder.add("tick", tick)

    def episode(self, reset: bool) -> None:
        """An episode begins, after a reset of the policy or without one."""
        self._episode += 1
        self.pause, self.skipped = None, 0
        self._recorder.add("event", {"kind": "episode", "episode": self._episode, "reset": reset})

    def neutral(self, action: NDArray[Any]) -> None:
        """The neutral action, or one on the way to it, was sent."""
        self._recorder.add("event", {"kind": "neutral", "episode": self._episode, "action": action})

    def stop(self, error: BaseException) -> None:
        """The loop ends by an exception; a ring is written now."""
        if error is self._stopped_by:
            return
        self._stopped_by = error
        reason = str(error) or type(error).__name__
        self._recorder.add("event", {"kind": "stop", "episode": self._episode, "reason": reason})
        self._unsaved = self._recorder.is_ring
        if not self._running:
            self._save_stop()

    def begin_run(self) -> None:
        """A run begins, in which the ring is not written before the actions after a stop."""
        self._running = True

    def end_run(self) -> None:
        """A run ends, and with it what follows its stop."""
        self._running = False
        self._save_stop()

    def _save_stop(self) -> None:
        if self._unsaved:
            self._unsaved = False
            with contextlib.suppress(OutputError):  # said by a warning
                self._recorder.save()

    def save(self, timeout_s: float) -> Path:
        """Write what is kept."""
        return self._recorder.save(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is left, and end."""
        self._recorder.close(timeout_s)


def copied(observation: Any) -> Any:
    """A copy of an observation, which drivers may write over: fast for arrays, and for mappings of them."""
    if type(observation) is np.ndarray:
        return observation.copy()
    try:
        if isinstance(observation, Mapping):
            return {name: copied(part) for name, part in observation.items()}
        return copy.deepcopy(observation)
    except Exception:  # whatever it is, the policy judges it
        return None


def _shown(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}

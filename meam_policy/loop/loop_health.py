"""How a control loop is doing."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.ma  # np.percentile would import it in the loop, which takes 10 ms

from meam_policy.errors import MeamError

__all__ = ["HealthRecorder", "LoopHealth"]

_RECENT = 1000
"""Inferences whose latencies are kept."""

Event = Literal[
    "ticks", "inferences", "failed_inferences", "overruns", "missed_deadlines", "stale_observations", "over_budget"
]


@dataclass(frozen=True)
class LoopHealth:
    """How a control loop is doing, counted since it was made; `reset` sets nothing back but `stopped`.

    Attributes:
        ticks: Actions given.
        inferences: Chunks that arrived, with those that open an episode.
        failed_inferences: Inferences that ended in an error; `last_error` has the newest.
        overruns: Ticks without an action from a chunk, because none had arrived or its actions were used up.
        missed_deadlines: Deadlines that passed before their tick began: of `run`, in a pause between two calls of
            `step`, and one for a clock that has gone backwards; and simulated ticks of waiting.
        stale_observations: Ticks whose observation was too old to act on.
        over_budget: Inferences that took longer than the `latency_budget_ms` of the robot's contract.
        latency_last_ms: Duration of the newest inference; None before the first and in a simulation. The inference
            that opens an episode, which the loop waits for, does not count.
        latency_p50_ms: Median of the newest 1000 durations.
        latency_p99_ms: 99th percentile of the same.
        delay_ticks: Ticks that the next chunk is expected to take.
        dropped_records: Records of the flight recorder that are in no file, because the disk was too slow or full.
        stopped: Whether the loop gives no more actions until it is reset.
        last_error: The newest error of an inference; None if there was none. `to_json` has its text.
    """

    ticks: int
    inferences: int
    failed_inferences: int
    overruns: int
    missed_deadlines: int
    stale_observations: int
    over_budget: int
    latency_last_ms: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    delay_ticks: int
    dropped_records: int
    stopped: bool
    last_error: MeamError | None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON data; the error as its type and message, and what is not known as null."""
        error = self.last_error
        shown = None if error is None else {"error": type(error).__name__, "message": str(error)}
        return {**vars(self), "last_error": shown}


class HealthRecorder:
    """Counts what happens in a control loop; every method may be called from any thread.

    Attributes:
        heard: Where to put the name of every event but ticks and inferences, for a flight recorder; None if nobody
            listens.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._last_error: MeamError | None = None
        self.heard: list[str] | None = None

    def count(self, event: Event, times: int = 1) -> None:
        """Count an event."""
        with self._lock:
            self._counts[event] += times
            if times and self.heard is not None and event not in ("ticks", "inferences"):
                self.heard.append(event)

    def add_latency(self, seconds: float) -> None:
        """Record the duration of an inference."""
        with self._lock:
            self._seconds.append(seconds)

    def add_failure(self, error: MeamError) -> None:
        """Record a failed inference."""
        with self._lock:
            self._counts["failed_inferences"] += 1
            if self.heard is not None:
                self.heard.append("failed_inferences")
            self._last_error = error

    def read(self, *, delay_ticks: int, stopped: bool, dropped_records: int = 0) -> LoopHealth:
        """Take a snapshot."""
        with self._lock:
            counts, seconds, last_error = self._counts.copy(), list(self._seconds), self._last_error
        # Outside the lock: the loop must not wait for a percentile.
        last, p50, p99 = None, None, None
        if seconds:
            last, (p50, p99) = seconds[-1] * 1e3, (float(ms) for ms in np.percentile(seconds, (50, 99)) * 1e3)
        return LoopHealth(
            ticks=counts["ticks"],
            inferences=counts["inferences"],
            failed_inferences=counts["failed_inferences"],
            overruns=counts["overruns"],
            missed_deadlines=counts["missed_deadlines"],
            stale_observations=counts["stale_observations"],
            over_budget=counts["over_budget"],
            latency_last_ms=last,
            latency_p50_ms=p50,
            latency_p99_ms=p99,
            delay_ticks=delay_ticks,
            dropped_records=dropped_records,
            stopped=stopped,
            last_error=last_error,
        )

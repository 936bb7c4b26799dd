"""A policy at the ticks of a control loop, with and without a busy process on every core."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from act_overhead import example_observations

from meam_policy.loop.control_loop import ControlLoop
from meam_policy.policy import MeamPolicy

# Ends by itself should this process be killed before it can end it.
_BUSY = """
import os, sys
if sys.argv[1] != "any":
    os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    sum(range(10_000))
"""

_SETTLE_S = 0.5
"""Until the busy processes have started."""

_PERCENTILES = (50, 99, 99.9, 100)


@dataclass
class Ticks:
    """When the ticks of a loop were due, when they began, and when their actions were there.

    Deadlines are those of `ControlLoop.run`: the first tick is waited for, tick k is due at start + k / rate_hz, and a
    loop that is late by more than a period skips the deadlines that have passed.

    Attributes:
        rate_hz: Ticks a second.
        lateness: Milliseconds from each deadline to the reading of the observation.
        latency: Milliseconds from the reading to the action.
        missed: Deadlines that had passed when the tick before them ended.
        overruns: Ticks without an action from a chunk; a control loop's.
    """

    rate_hz: float
    lateness: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    missed: int = 0
    overruns: int = 0
    _start: float | None = None
    _slot: int = 0
    _slept: bool = False
    _read: float = 0.0

    def wait(self) -> None:
        """Sleep to the next deadline, unless it has passed."""
        if self._start is not None:
            remaining = self._start + (self._slot + 1) / self.rate_hz - time.monotonic()
            if remaining >= 0:
                self.sleep(remaining)

    def sleep(self, seconds: float) -> None:
        """Sleep, and remember that it was in time."""
        self._slept = True
        time.sleep(seconds)

    def begin(self) -> None:
        """The observation is read now."""
        self._read = time.monotonic()
        if self._start is None:
            return
        late = self._read - self._start - (self._slot + 1) / self.rate_hz
        skipped = 0 if self._slept else int(late * self.rate_hz)
        self._slot += 1 + skipped
        self.missed += 0 if self._slept else 1 + skipped
        self.lateness.append(late * 1e3)
        self._slept = False

    def end(self) -> None:
        """The action is there now."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        else:
            self.latency.append((now - self._read) * 1e3)


Run = Callable[[Ticks, int], None]


def sleep_only(ticks: Ticks, steps: int) -> None:
    """Run a loop that does nothing: what the machine itself is late."""
    for _ in range(steps):
        ticks.wait()
        ticks.begin()
        ticks.end()


def act_in_loop(folder: Path) -> Run:
    """Make a plain loop around `act`, which computes its chunks in the tick that needs them."""
    policy = MeamPolicy.from_pretrained(folder, seed=0)
    observations = example_observations(policy.spec, 1000, seed=0)

    def run(ticks: Ticks, steps: int) -> None:
        policy.reset()
        for _, observation in zip(range(steps), itertools.cycle(observations), strict=False):
            ticks.wait()
            ticks.begin()
            policy.act(observation)
            ticks.end()

    return run


def control_loop(folder: Path) -> Run:
    """Make a `ControlLoop`, which computes its chunks in another thread."""
    policy = MeamPolicy.from_pretrained(folder, seed=0)
    observations = itertools.cycle(example_observations(policy.spec, 1000, seed=0))

    def run(ticks: Ticks, steps: int) -> None:
        def read() -> Any:
            ticks.begin()
            return next(observations)

        with ControlLoop(policy, ticks.rate_hz, chunking="naive", sleep=ticks.sleep) as loop:
            health = loop.run(read, lambda _: ticks.end(), steps=steps)
        ticks.overruns += health.overruns

    return run


@contextmanager
def busy_cores() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep every core busy with a process of its own; yields them."""
    cores: list[Any] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ["any"]
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY, str(core)]) for core in cores]
    try:
        time.sleep(_SETTLE_S)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class LoopTimes:
    """What became of the ticks of every contestant, quiet and loaded.

    Attributes:
        ticks: By contestant and whether every core was busy; the parts of each are joined.
        rate_hz: Ticks a second.
    """

    ticks: dict[tuple[str, bool], Ticks]
    rate_hz: float

    def table(self) -> str:
        """A table in Markdown."""
        head = "| load | loop | ms | p50 | p99 | p99.9 | max | missed | overruns | ticks |"
        lines = [head, "|---|---|---|" + "---:|" * 7]
        for (name, loaded), ticks in sorted(self.ticks.items(), key=lambda item: item[0][1]):
            what = "a busy process a core" if loaded else "none added"
            response = np.add(ticks.lateness, ticks.latency)
            for label, values in (("late", ticks.lateness), ("latency", ticks.latency), ("both", response)):
                cells = " | ".join(f"{value:.3f}" for value in np.percentile(values, _PERCENTILES))
                counts = f"{ticks.missed} | {ticks.overruns} | {len(values):,}" if label == "late" else " | | "
                first = f"{what} | {name}" if label == "late" else " | "
                lines.append(f"| {first} | {label} | {cells} | {counts} |")
        return "\n".join([*lines, "", f"The period is {1e3 / self.rate_hz:g} ms."])


def measure_loops(folder: Path, rate_hz: float, seconds: float, rounds: int, seed: int = 0) -> LoopTimes:
    """Run every loop for the given time, in parts: each has its turn in every round, in a new random order."""
    runs = {"sleep only": sleep_only, "`act`": act_in_loop(folder), "`ControlLoop`, naive": control_loop(folder)}
    steps = max(2, round(rate_hz * seconds / rounds))
    found = {(name, loaded): Ticks(rate_hz) for loaded in (False, True) for name in runs}
    generator, keys = np.random.default_rng(seed), list(found)
    for _ in range(rounds):
        for index in generator.permutation(len(keys)).tolist():
            name, loaded = keys[index]
            part = Ticks(rate_hz)
            with busy_cores() if loaded else nullcontext():
                runs[name](part, steps)
            whole = found[keys[index]]
            whole.lateness += part.lateness
            whole.latency += part.latency
            whole.missed += part.missed
            whole.overruns += part.overruns
    return LoopTimes(found, rate_hz)

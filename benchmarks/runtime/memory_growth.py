"""Whether memory grows while a policy acts. Linux only."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from act_overhead import example_observations

from meam_policy.policy import MeamPolicy

GOAL_MB = 20.0
WARM_UP = 1000
EPISODE = 1000
"""Calls between two resets."""


@dataclass(frozen=True)
class MemoryGrowth:
    """Resident memory of the process while it acts.

    Attributes:
        calls: `act` calls that had been made [samples].
        megabytes: Resident memory then [samples].
        seconds: How long all of them took.
    """

    calls: list[int]
    megabytes: list[float]
    seconds: float

    @property
    def growth(self) -> float:
        """What the most was above the first, megabytes."""
        return max(self.megabytes) - self.megabytes[0]

    def table(self) -> str:
        """A table in Markdown."""
        rows = zip(self.calls, self.megabytes, strict=True)
        verdict = "met" if self.growth < GOAL_MB else "**missed**"
        return "\n".join(
            [
                "| calls of `act` | resident, MB |",
                "|---:|---:|",
                *(f"| {calls:,} | {megabytes:.1f} |" for calls, megabytes in rows),
                "",
                f"- {self.calls[-1]:,} calls, each with the network, in {self.seconds:.0f} s: at most "
                f"{self.growth:.1f} MB above the first figure. Goal below {GOAL_MB:g} MB: {verdict}.",
            ]
        )


def measure_memory(folder: Path, calls: int, samples: int = 10) -> MemoryGrowth:
    """Act, with the network in every call, and look at the resident memory between the calls."""
    loaded = MeamPolicy.from_pretrained(folder)
    policy = MeamPolicy(replace(loaded.spec, execute_steps=1), loaded.session, seed=0)
    observations = example_observations(policy.spec, EPISODE, seed=0)
    for observation in (observations * WARM_UP)[:WARM_UP]:
        policy.act(observation)
    marks, megabytes, start = [0], [resident_megabytes()], time.perf_counter()
    for part in range(samples):
        end = calls * (part + 1) // samples
        for call in range(marks[-1], end):
            if call % EPISODE == 0:
                policy.reset(seed=call)
            policy.act(observations[call % EPISODE])
        marks.append(end)
        megabytes.append(resident_megabytes())
    return MemoryGrowth(marks, megabytes, time.perf_counter() - start)


def resident_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

"""What recording costs on a control loop's thread: microseconds a tick, beside the same loop without it."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy import ControlLoop, MeamPolicy, PolicySpec, Recording
from meam_policy.loop.flight_log import FlightLog
from meam_policy.spec import BoxSpec, Integration

GOAL_US = 20.0
RATE_HZ = 1000.0


class Constant:
    """A policy whose chunks cost nothing."""

    takes_prefix = False

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        seen, acted = (1e3,) * observation_dim, (1.0,) * action_dim
        self.spec = PolicySpec(
            integration=Integration(nfe=1),
            observation=(BoxSpec((observation_dim,), "float32", tuple(-x for x in seen), seen),),
            action=BoxSpec((action_dim,), "float32", tuple(-x for x in acted), acted),
            chunk_size=16,
            execute_steps=8,
            observation_mean=(0.0,) * observation_dim,
            observation_std=(1.0,) * observation_dim,
            action_offset=(0.0,) * action_dim,
            action_scale=(1.0,) * action_dim,
            method="constant",
        )
        self.last_noise = np.zeros((1, 16 * action_dim), np.float32)
        self._chunk = np.zeros((16, action_dim), np.float32)

    def predict_action_chunk(self, observation: Any, **_: Any) -> Any:
        """Zeros."""
        return self._chunk

    def reset(self, seed: int | None = None) -> None:
        """Nothing."""

    def accepts(self, observation: Any) -> bool:
        """Anything."""
        return True

    def limit_action(self, action: Any) -> Any:
        """As it is."""
        return action


def tick_times(policy: Any, row: Any, record: Recording | None, ticks: int, pace: bool) -> tuple[Any, int]:
    """Microseconds of every step, and the records dropped."""
    options: dict[str, Any] = {"chunking": "naive", "any_rate": True, "unchecked": True}
    found = np.zeros(ticks)
    with ControlLoop(policy, RATE_HZ, record=record, **options) as loop:
        for tick in range(ticks):
            start = time.perf_counter()
            loop.step(row)
            found[tick] = (time.perf_counter() - start) * 1e6
            if pace:
                time.sleep(1 / RATE_HZ)
        return found, loop.health().dropped_records


def hook_times(policy: Any, row: Any, record: Recording, ticks: int) -> Any:
    """Microseconds of what a recorded tick calls beyond a bare one, by itself."""
    from meam_policy.loop.loop_health import HealthRecorder

    log, action, found = FlightLog(record, policy, {}, HealthRecorder()), np.zeros(6, np.float32), np.zeros(ticks)
    for tick in range(ticks):
        start = time.perf_counter()
        log.begin(row, tick, None)
        log.give(action, action, 1)
        found[tick] = (time.perf_counter() - start) * 1e6
        time.sleep(1 / RATE_HZ)
    log.close(10)
    return found


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, help="policy folder; by default one whose chunks cost nothing")
    parser.add_argument("--ticks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    policy = MeamPolicy.from_pretrained(arguments.policy, seed=0) if arguments.policy else Constant(40, 6)
    row = np.zeros(policy.spec.observation_dim, np.float32)
    times: dict[str, list[Any]] = {
        "bare": [],
        "recorded to a file": [],
        "recorded to a ring": [],
        "the hooks alone": [],
    }
    dropped = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            file, ring, hooks = (Path(folder) / f"{name}-{number}.mcap" for name in ("file", "ring", "hooks"))
            for name, record in (
                ("bare", None),
                ("recorded to a file", Recording(file)),
                ("recorded to a ring", Recording(ring, ring_seconds=60)),
            ):
                found, lost = tick_times(policy, row, record, arguments.ticks, pace=True)
                times[name].append(found)
                dropped += lost
            times["the hooks alone"].append(hook_times(policy, row, Recording(hooks), arguments.ticks))
        size = file.stat().st_size / arguments.ticks
    bare = np.median([np.median(found) for found in times["bare"]])
    print("| µs a tick | p50 | over bare | p99 |\n|---|---:|---:|---:|")
    for name, rounds in times.items():
        p50, p99 = (np.median([np.percentile(found, q) for found in rounds]) for q in (50, 99))
        print(
            f"| {name} | {p50:.1f} | {'' if name in ('bare', 'the hooks alone') else f'{p50 - bare:.1f}'} | {p99:.1f} |"
        )
    print(f"\n{size:.0f} bytes a tick on the disk; {dropped} records dropped. Goal: below {GOAL_US:g} µs at p50.")


if __name__ == "__main__":
    main()

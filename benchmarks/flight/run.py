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
LABELS = {
    "bare": "not recorded",
    "file": "recorded to a file",
    "ring": "recorded to a ring",
    "hooks": "the recorder's calls of a tick alone",
}


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


def tick_times(policy: Any, row: Any, record: Recording | None, ticks: int) -> tuple[Any, int]:
    """Microseconds of every step, and the records dropped."""
    options: dict[str, Any] = {"chunking": "naive", "any_rate": True, "unchecked": True}
    found = np.zeros(ticks)
    with ControlLoop(policy, RATE_HZ, record=record, **options) as loop:
        for tick in range(ticks):
            start = time.perf_counter()
            loop.step(row)
            found[tick] = (time.perf_counter() - start) * 1e6
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
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    policy = MeamPolicy.from_pretrained(arguments.policy, seed=0) if arguments.policy else Constant(40, 6)
    row = np.zeros(policy.spec.observation_dim, np.float32)
    found: dict[str, list[Any]] = {name: [] for name in ("bare", "file", "ring", "hooks")}
    dropped = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            file, ring, hooks = (Path(folder) / f"{name}-{number}.mcap" for name in ("file", "ring", "hooks"))
            turns = {"bare": None, "file": Recording(file), "ring": Recording(ring, ring_seconds=60)}
            for name, record in turns.items():
                times, lost = tick_times(policy, row, record, arguments.ticks)
                found[name].append(times)
                dropped += lost
            found["hooks"].append(hook_times(policy, row, Recording(hooks), arguments.ticks))
        size = file.stat().st_size / arguments.ticks
    over = {name: np.median(np.median(found[name], 1) - np.median(found["bare"], 1)) for name in ("file", "ring")}
    print("| µs a tick | p50 | over bare, same round | p99 |\n|---|---:|---:|---:|")
    for name, words in LABELS.items():
        p50, p99 = np.median(np.percentile(found[name], (50, 99), axis=1), axis=1)
        print(f"| {words} | {p50:.1f} | {f'{over[name]:.1f}' if name in over else ''} | {p99:.1f} |")
    print(f"\n{size:.0f} bytes a tick on the disk; {dropped} records dropped. Goal: below {GOAL_US:g} µs at p50.")


if __name__ == "__main__":
    main()

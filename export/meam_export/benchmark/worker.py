"""Times one contestant of `meam bench infer`: `python worker.py TASK_JSON`, in that contestant's own Python.

It acts on recorded inputs, compares the actions with the recorded ones, warms up, and prints one line of JSON. Then it
answers every line on its standard input, `steady N` or `paced N`, with a JSON list of the durations of N calls in
seconds. It needs NumPy, and imports nothing from this project but what the contestant runs: the runtime is timed in a
process that has never loaded PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["errors", "load_actor", "paced", "steady"]

Act = Callable[[Any, Any], Any]
Inputs = Iterator[tuple[Any, Any]]

WARM_CALLS = 10
"""Untimed calls at the start of every turn: other processes have evicted this one's data from the caches."""

WARM_SECONDS = 0.3
"""Minimum duration of the warm-up before the first turn, seconds."""


def steady(act: Act, inputs: Inputs, calls: int) -> list[float]:
    """Duration of each of `calls` back-to-back calls, seconds."""
    for observation, noise in itertools.islice(inputs, WARM_CALLS):
        act(observation, noise)
    return [_timed(act, inputs) for _ in range(calls)]


def paced(act: Act, inputs: Inputs, calls: int, rate: float) -> list[float]:
    """Duration of each call at the ticks of a control loop, which sleeps between them, seconds.

    Args:
        act: Function to time.
        inputs: Endless inputs for it.
        calls: Number of timed calls; a discarded call precedes them.
        rate: Ticks per second. After a call that overruns its tick, the next call waits for the next tick.
    """
    period, seconds = 1 / rate, []
    tick = time.monotonic()
    for _ in range(calls + 1):
        tick += period * max(1, -(-(time.monotonic() - tick) // period))
        time.sleep(max(0.0, tick - time.monotonic()))
        seconds.append(_timed(act, inputs))
    return seconds[1:]


def errors(act: Act, recorded: Mapping[str, Any]) -> dict[str, float]:
    """Largest and root mean square error of a contestant's answers, as shares of the recorded scale.

    Args:
        act: Function to check.
        recorded: `observation` and `noise` [n, batch, ...], the `expected` answers [n, ...] in float64, and `scale`,
            broadcast over them from the last axis.
    """
    import numpy as np

    pairs = zip(recorded["observation"], recorded["noise"], strict=True)
    found = np.array([np.array(act(observation, noise), np.float64) for observation, noise in pairs])
    off = np.abs(found.reshape(recorded["expected"].shape) - recorded["expected"]) / recorded["scale"]
    return {"max_error": float(off.max()), "rms_error": float(np.sqrt(np.square(off).mean()))}


def load_actor(name: str) -> ModuleType:
    """Load a module of this folder without its package, which would load PyTorch."""
    path = Path(__file__).with_name(f"{name}_actor.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timed(act: Act, inputs: Inputs) -> float:
    observation, noise = next(inputs)
    start = time.perf_counter()
    act(observation, noise)
    return time.perf_counter() - start


def _pin_to_cores(cores: int | None) -> None:
    """Restrict this process to the first cores: XLA's threads cannot be limited in any other way."""
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _versions() -> dict[str, str]:
    """Versions of the libraries that this process has loaded."""
    names = ("numpy", "torch", "onnxruntime", "jax")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}


def main() -> None:
    """Answer the benchmark's requests until standard input ends."""
    task = json.loads(sys.argv[1])
    _pin_to_cores(task["cores"])
    sys.path.pop(0)  # this folder, whose modules would shadow others of the same name
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    import numpy as np

    folder = Path(task["folder"])
    with np.load(folder / task["inputs"]) as file:
        recorded = dict(file)
    act = load_actor(task["actor"]).make(folder, task)
    inputs = itertools.cycle(list(zip(recorded["observation"], recorded["noise"], strict=True)))
    first = _timed(act, inputs)
    about: dict[str, Any] = {**errors(act, recorded), "first_seconds": first}
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        _timed(act, inputs)
    print(json.dumps({**about, **_versions()}), file=answers, flush=True)
    for line in sys.stdin:
        form, calls = line.split()
        timing = steady if form == "steady" else functools.partial(paced, rate=task["rate"])
        seconds = timing(act, inputs, int(calls))
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()

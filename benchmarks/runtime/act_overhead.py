"""What `MeamPolicy.act` costs beyond the network: microseconds, beside onnxruntime alone in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meam_policy.acting.observation import unflatten_observation
from meam_policy.folder.policy_folder import read_graph, read_spec
from meam_policy.loop.control_loop import ControlLoop
from meam_policy.policy import MeamPolicy
from meam_policy.spec import PolicySpec

BARE = "onnxruntime alone"
SESSION = "`PolicySession.run`"
EVERY = "`act`, network in every call"
QUEUED = "`act`, queued action"
SELECTED = "`select_action`, queued action"
STEP = "`ControlLoop.step`, nothing asked for"

GOAL_US = 15.0
QUEUED_GOAL_US = 3.0
WARM_UP = 10
"""Calls before the timed ones of every turn, which fill the caches again."""

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Overhead:
    """Microseconds of every call, by contestant: [rounds, calls]."""

    times: dict[str, Times]

    def over_bare(self, percentile: float) -> Times:
        """What the percentile of `act` is above that of onnxruntime alone, in every round [rounds]."""
        act, bare = (np.percentile(self.times[name], percentile, axis=1) for name in (EVERY, BARE))
        return act - bare

    def table(self) -> str:
        """A table in Markdown."""
        lines = ["| µs | p50 | p99 | max |", "|---|---:|---:|---:|"]
        for name, times in self.times.items():
            # Medians of the rounds: a round in which something else had the core says little.
            p50, p99 = np.median(np.percentile(times, (50, 99), axis=1), axis=1)
            lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {times.max():.0f} |")
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        middle, tail = self.over_bare(50), self.over_bare(99)
        quartiles = " to ".join(f"{value:.1f}" for value in np.percentile(middle, (25, 75)))
        over = float(np.median(middle))
        notes = [
            f"- `act` over onnxruntime alone, within the same round: {over:.1f} µs at p50 (quartiles of the rounds "
            f"{quartiles}), {np.median(tail):.1f} µs at p99. Goal at p50 at most {GOAL_US:g} µs: "
            f"{_verdict(over, GOAL_US)}."
        ]
        if QUEUED in self.times:
            queued = float(np.median(np.median(self.times[QUEUED], axis=1)))
            verdict = _verdict(queued, QUEUED_GOAL_US)
            notes.append(f"- A queued action: {queued:.1f} µs. Goal at most {QUEUED_GOAL_US:g} µs: {verdict}.")
        return notes


def measure_overhead(folder: Path, rounds: int, calls: int, seed: int = 0) -> Overhead:
    """Time all of them at batch 1: each has its turn in every round, in a new random order."""
    loaded = MeamPolicy.from_pretrained(folder)
    spec, session = loaded.spec, loaded.session
    every = MeamPolicy(replace(spec, execute_steps=1), session, seed)
    queued = MeamPolicy(replace(spec, execute_steps=spec.chunk_size), session, seed)
    rows, bare = example_observations(spec, calls, seed), bare_run(folder)
    turns: dict[str, Callable[[], Times]] = {
        BARE: lambda: _time_calls(bare, [()] * calls),
        SESSION: lambda: _time_calls(session.run, _session_inputs(spec, calls)),
        EVERY: lambda: _time_calls(every.act, [(row,) for row in rows]),
    }
    if spec.chunk_size > 1:
        loop = ControlLoop(loaded, 200.0, chunking="naive", simulated_delay=1, any_rate=True)
        turns[QUEUED] = lambda: _time_queued(queued, queued.act, rows)
        turns[SELECTED] = lambda: _time_queued(queued, queued.select_action, rows)
        turns[STEP] = lambda: _time_queued(loaded, loop.step, rows)
    generator, found = np.random.default_rng(seed), {name: np.zeros((rounds, calls)) for name in turns}
    for number in range(rounds):
        for name in generator.permutation(list(turns)).tolist():
            found[name][number] = turns[name]()
    return Overhead(found)


def example_observations(spec: PolicySpec, count: int, seed: int) -> list[Any]:
    """Observations as an environment gives them, around the mean of the training data."""
    generator = np.random.default_rng(seed)
    mean, std = np.array(spec.observation_mean), np.array(spec.observation_std)
    found = []
    for row in mean + std * generator.standard_normal((count, spec.observation_dim)):
        parts = unflatten_observation(spec, row)
        types = {box.key: box.dtype for box in spec.observation}
        keyed = isinstance(parts, dict)
        found.append({k: part.astype(types[k]) for k, part in parts.items()} if keyed else parts.astype(types[None]))
    return found


def bare_run(folder: Path) -> Callable[[], None]:
    """`run_with_iobinding` at batch 1, on buffers that stay as they are."""
    spec = read_spec(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(read_graph(folder, spec), options, providers=providers)
    binding, generator = session.io_binding(), np.random.default_rng(0)
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in node.shape]
        if node.name == "noise" and spec.integration.best_of > 1:
            shape[1] = spec.integration.best_of
        array = generator.standard_normal(shape).astype(np.float32)
        binding.bind_ortvalue_input(node.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for node in session.get_outputs():
        array = np.zeros([size if isinstance(size, int) else 1 for size in node.shape], np.float32)
        binding.bind_ortvalue_output(node.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return lambda: session.run_with_iobinding(binding)


def _session_inputs(spec: PolicySpec, calls: int) -> list[tuple[Any, ...]]:
    generator = np.random.default_rng(0)
    shapes = (1, spec.observation_dim), (1, spec.noise_dim)
    return [tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes) for _ in range(calls)]


def _time_calls(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Times:
    clock, times = time.perf_counter_ns, np.zeros(len(arguments))
    for each in (arguments * WARM_UP)[:WARM_UP]:
        function(*each)
    for number, each in enumerate(arguments):
        start = clock()
        function(*each)
        times[number] = clock() - start
    return times / 1e3


def _time_queued(policy: MeamPolicy, act: Callable[[Any], Any], observations: list[Any]) -> Times:
    """Time the calls that run no network, among those that do."""
    clock, times = time.perf_counter_ns, []
    while len(times) < len(observations):
        for observation in observations:
            before, start = policy.inferences, clock()
            act(observation)
            stop = clock()
            if policy.inferences == before:
                times.append(stop - start)
    return np.array(times[: len(observations)]) / 1e3


def _verdict(microseconds: float, goal: float) -> str:
    return "met" if microseconds <= goal else "**missed**"

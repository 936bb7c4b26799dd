"""Runs a tick graph as a robot's runtime would, and checks that it acts like the policy it was made from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meam_export.deploy.source import Source, write_file
from meam_export.deploy.tick_graph import TickGraph, TickSettings, build_tick, noise_table, zero_state
from meam_policy import MeamPolicy
from meam_policy.acting.observation import unflatten_observation
from meam_policy.atomic_files import given_folder
from meam_policy.errors import ParityError
from meam_policy.graph.graph_check import check_graph
from meam_policy.inference.providers import import_onnxruntime
from meam_policy.inference.session import session_options
from meam_policy.robot import RobotContract
from meam_policy.robot.limits import ActionLimits
from meam_policy.spec import PolicySpec

__all__ = [
    "TickCheck",
    "TickPlayer",
    "check_tick",
    "drawn_observations",
    "noise_by_tick",
    "policy_actions",
    "require_equal",
    "write_tick",
]

EPISODES, CHUNKS = 3, 8
"""What is compared: episodes, and chunks begun in each."""

MOST_TICKS = 400
"""Of an episode that is compared."""


class TickCheck(NamedTuple):
    """What the check of a tick graph found.

    Attributes:
        ticks: Ticks that were compared.
        p50_ms: Median milliseconds of a tick here, one thread.
        p99_ms: 99th percentile.
    """

    ticks: int
    p50_ms: float
    p99_ms: float


class TickPlayer:
    """Plays a tick graph: feeds its state back from tick to tick, and knows nothing of chunks.

    Args:
        tick: The graph.
        name: Name of its file in error messages.

    Raises:
        FormatError: the graph holds what no policy needs.
    """

    def __init__(self, tick: TickGraph, name: str = "The tick graph") -> None:
        check_graph(tick.graph, name, conditional=True)
        providers = ["CPUExecutionProvider"]
        self._session = import_onnxruntime().InferenceSession(tick.graph, session_options(), providers=providers)
        self._tick = tick
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Begin an episode: all zeros."""
        self._state = zero_state(self._tick.recurrent)

    def tick(self, observation: NDArray[np.float32], noise: NDArray[np.float32] | None = None) -> Mapping[str, Any]:
        """Take one control tick.

        Args:
            observation: Flat raw observation [observation_dim].
            noise: Noise [noise_dim], where the graph has that input.

        Returns:
            Every output [1, ...] by its name.
        """
        feed = {part.name: observation[None, list(part.indices)] for part in self._tick.observation}
        if self._tick.noise_dim:
            feed["noise"] = np.zeros((1, self._tick.noise_dim), np.float32) if noise is None else noise[None]
        found = dict(zip(self._outputs, self._session.run(None, {**feed, **self._state}), strict=True))
        self._state = {into: found[out] for out, (into, _) in self._tick.recurrent.items()}
        return found

    def latency_ms(self, rows: NDArray[np.float32]) -> tuple[float, float]:
        """Median and 99th percentile of the milliseconds of a tick, over an episode of these observations [n, dim]."""
        self.reset()
        seconds = []
        for row in rows:
            start = time.perf_counter()
            self.tick(row)
            seconds.append(time.perf_counter() - start)
        p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
        return float(p50), float(p99)


def check_tick(
    tick: TickGraph,
    policy: MeamPolicy,
    settings: TickSettings,
    name: str = "The tick graph",
    action: Callable[[Mapping[str, Any]], NDArray[np.float32]] | None = None,
) -> TickCheck:
    """Compare a tick graph with `MeamPolicy.select_action` under the same noise, bit for bit, and time it.

    Args:
        tick: The graph.
        policy: The policy that it was made from, with its contract, and without reactions that replace actions.
        settings: How it was made.
        name: Name of its file in error messages.
        action: The flat action [action_dim] in its outputs; None takes `action`.

    Raises:
        ParityError: an action differs.
    """
    spec = policy.spec
    player = TickPlayer(tick, name)
    read = action or (lambda found: found["action"][0])
    ticks = min(CHUNKS * spec.execute_steps + 1, MOST_TICKS)
    generator, source = np.random.default_rng(7), settings.noise_of(spec)
    for episode in range(EPISODES):
        player.reset()
        drawn = generator.standard_normal((CHUNKS + 1, spec.noise_dim), np.float32) * np.float32(source == "input")
        noise = noise_by_tick(spec, noise_table(spec, settings) if source == "table" else drawn, ticks)
        rows = drawn_observations(spec, ticks, episode)
        found = np.stack([read(player.tick(*each)) for each in zip(rows, noise, strict=True)])
        require_equal(name, found, policy_actions(policy, rows, noise), f"of episode {episode}")
    return TickCheck(EPISODES * ticks, *player.latency_ms(drawn_observations(spec, ticks, EPISODES)))


def noise_by_tick(spec: PolicySpec, noises: NDArray[np.float32], ticks: int) -> NDArray[np.float32]:
    """The noise of every tick [ticks, noise_dim], where each chunk takes the next row of a table [rows, noise_dim]."""
    return noises[np.arange(ticks) // spec.execute_steps % len(noises)]


def policy_actions(policy: MeamPolicy, rows: NDArray[Any], noises: NDArray[Any]) -> NDArray[np.float32]:
    """The actions [ticks, action_dim] of an episode of `MeamPolicy.select_action`, within its bounds in float32 too.

    Args:
        policy: The policy, which is reset.
        rows: Flat raw observations [ticks, observation_dim].
        noises: Noise [ticks, noise_dim], of which the ticks that begin a chunk read theirs.
    """
    policy.reset()
    observations = (unflatten_observation(policy.spec, row) for row in rows.astype(np.float64))
    actions = [policy.select_action(*each) for each in zip(observations, noises, strict=True)]
    limits = ActionLimits.of(policy.robot or RobotContract(), policy.spec).rounded(np.float32)
    flat = np.stack(actions).reshape(len(rows), -1).astype(np.float32)
    return np.clip(flat, limits.low, limits.high).astype(np.float32)


def require_equal(name: str, found: NDArray[np.float32], wanted: NDArray[np.float32], of: str) -> None:
    """Refuse a graph whose actions [ticks, action_dim] are not the policy's, bit for bit.

    Args:
        name: Name of the graph's file.
        found: Its actions.
        wanted: The policy's.
        of: What the ticks are of, such as an episode.

    Raises:
        ParityError: one differs; the message names its tick.
    """
    differing = np.flatnonzero((found != wanted).any(axis=1))
    if differing.size:
        tick = int(differing[0])
        raise ParityError(
            f"{name} differs from the policy by {np.abs(found[tick] - wanted[tick]).max():.2g} at tick {tick} {of}; "
            "expected the same number. It was not written. Please report this with the version of onnxruntime."
        )


def write_tick(
    source: Source, file: str | os.PathLike[str], settings: TickSettings | None = None
) -> tuple[Path, TickCheck]:
    """Write the tick graph of a policy, once it has acted like the policy.

    Args:
        source: The policy.
        file: ONNX file to write.
        settings: How it is made; None takes the defaults.

    Returns:
        The file, and what the check found.

    Raises:
        ConfigError: as `build_tick`.
        ParityError: it does not act like the policy; nothing is written.
        OutputError: the file cannot be written.
    """
    made, target = settings or TickSettings(), given_folder("--tick", file).absolute()
    tick = build_tick(source.graph, source.spec, source.robot, made)
    found = check_tick(tick, source.acting(), made, target.name)
    write_file(target, tick.graph)
    return target, found


def drawn_observations(spec: PolicySpec, count: int, seed: int) -> NDArray[np.float32]:
    """Raw observations [count, observation_dim] within three standard deviations of the training data's mean."""
    drawn = np.clip(np.random.default_rng((seed, 3)).standard_normal((count, spec.observation_dim)), -3, 3)
    rows = np.array(spec.observation_mean) + np.array(spec.observation_std) * drawn
    return (rows + np.array(spec.observation_offset or 0.0)).astype(np.float32)

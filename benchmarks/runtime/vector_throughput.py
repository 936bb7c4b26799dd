"""One policy for all slots of a vector environment, beside one policy a slot that act one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from meam_policy.environments.make import make_environment
from meam_policy.policy import MeamPolicy

SAME = 1e-5
"""How far the actions of the two may be apart: float32 rounding depends on the batch."""

_SHORT = 10
"""Steps compared before anything is timed."""

Act = Callable[[Any], NDArray[Any]]
Reset = Callable[[NDArray[np.bool_]], None]


@dataclass(frozen=True)
class Throughput:
    """Seconds of both contestants in every round [rounds].

    Attributes:
        slots: Environments.
        steps: Steps of the vector environment in a round.
        policy: Seconds in the policy, by contestant.
        whole: Seconds in policy and environment.
    """

    slots: int
    steps: int
    policy: dict[str, NDArray[np.float64]]
    whole: dict[str, NDArray[np.float64]]

    def table(self) -> str:
        """A table in Markdown."""
        count = self.slots * self.steps
        lines = [
            "| | environment steps/s | in the policy, µs a step | share of time in the policy |",
            "|---|---:|---:|---:|",
        ]
        for name, seconds in self.policy.items():
            whole = self.whole[name]
            cells = f"{np.median(count / whole):,.0f} | {np.median(seconds) / count * 1e6:.2f}"
            lines.append(f"| {name} | {cells} | {np.median(seconds / whole):.0%} |")
        one, many = self.policy
        faster = np.median(self.policy[many] / self.policy[one])
        sooner = np.median(self.whole[many] / self.whole[one])
        note = (
            f"- Within the same round, {one} takes 1/{faster:.1f} of the time of {many}; with the environment, which "
            f"is the same for both, there are {sooner:.2f} times as many steps a second."
        )
        return "\n".join([*lines, "", note])


def measure_throughput(folder: Path, slots: int, rounds: int, steps: int, seed: int = 0) -> Throughput:
    """Step a vector environment with both; each has its turn in every round, in a new random order.

    The single policies share one session, so that the network's weights are not read from many places.

    Raises:
        AssertionError: the two do not act alike.
    """
    batched = MeamPolicy.from_pretrained(folder)
    assert batched.spec.environment_id is not None
    make = partial(make_environment, batched.spec.environment_id)
    singles = [MeamPolicy(batched.spec, batched.session) for _ in range(slots)]

    def act_one_by_one(observation: Any) -> NDArray[Any]:
        return np.stack([policy.act(_row(observation, slot)) for slot, policy in enumerate(singles)])

    def reset_one_by_one(mask: NDArray[np.bool_]) -> None:
        for slot in np.flatnonzero(mask).tolist():
            singles[slot].reset()

    contestants: dict[str, tuple[Act, Reset]] = {
        f"one policy with {slots} slots": (batched.act, lambda mask: batched.reset(mask=mask)),
        f"{slots} policies one by one": (act_one_by_one, reset_one_by_one),
    }
    seconds = {name: np.zeros((2, rounds)) for name in contestants}
    generator = np.random.default_rng(seed)
    env = gymnasium.vector.SyncVectorEnv([make] * slots, autoreset_mode="SameStep")
    try:
        _require_same_actions(batched, singles, env)
        for number in range(rounds):
            for name in generator.permutation(list(contestants)).tolist():
                seconds[name][:, number] = _run(*contestants[name], env, steps, seed + number)
    finally:
        env.close()
    policy, whole = ({name: pair[i] for name, pair in seconds.items()} for i in (0, 1))
    return Throughput(slots, steps, policy, whole)


def _run(
    act: Act, reset: Reset, env: gymnasium.vector.VectorEnv[Any, Any, Any], steps: int, seed: int
) -> tuple[float, float]:
    """Seconds in the policy, and of all, for the steps of one turn."""
    observation, _ = env.reset(seed=seed)
    reset(np.ones(env.num_envs, dtype=bool))
    in_policy, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        actions = act(observation)
        in_policy += time.perf_counter() - start
        observation, _, terminated, truncated, _ = env.step(actions)
        ended = np.logical_or(terminated, truncated)
        if ended.any():
            start = time.perf_counter()
            reset(ended)
            in_policy += time.perf_counter() - start
    return in_policy, time.perf_counter() - begin


def _require_same_actions(
    batched: MeamPolicy, singles: list[MeamPolicy], env: gymnasium.vector.VectorEnv[Any, Any, Any]
) -> None:
    observation, _ = env.reset(seed=0)
    batched.reset(seed=list(range(len(singles))))
    for slot, policy in enumerate(singles):
        policy.reset(seed=slot)
    for step in range(_SHORT):
        actions = batched.act(observation)
        expected = np.stack([policy.act(_row(observation, slot)) for slot, policy in enumerate(singles)])
        error = float(np.abs(actions - expected).max())
        assert error <= SAME, f"Step {step}: actions differ by {error}, expected at most {SAME}."
        observation = env.step(actions)[0]


def _row(observation: Any, slot: int) -> Any:
    if isinstance(observation, dict):
        return {key: value[slot] for key, value in observation.items()}
    return observation[slot]

"""Episodes of a policy whose chunks arrive late, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from smoothness import smoothness

from meam_policy import ControlLoop, MeamPolicy
from meam_policy.loop.chunk_schedule import Chunking

__all__ = ["EpisodeFigures", "delayed_episodes"]


@dataclass(frozen=True)
class EpisodeFigures:
    """One episode.

    Attributes:
        chunking: How chunks followed each other.
        delay: Ticks that every inference took.
        episode: Its number; its seed is the first seed plus that.
        success: Whether the environment reported success at any step; NaN if it never says.
        episode_return: Undiscounted return.
        length: Ticks.
        jerk: As the next two, see `smoothness.Smoothness`.
        boundary_jump: As above.
        inner_jump: As above.
        inferences: Chunks that arrived.
        waiting: Ticks that "blocking" waited for a chunk, with the last action held.
        overruns: Ticks of the others for which no chunk had an action, with the last one held.
    """

    chunking: Chunking
    delay: int
    episode: int
    success: float
    episode_return: float
    length: int
    jerk: float
    boundary_jump: float
    inner_jump: float
    inferences: int
    waiting: int
    overruns: int

    @property
    def missed(self) -> float:
        """Share of the ticks without an action of a chunk: waiting and overruns."""
        return (self.waiting + self.overruns) / self.length


def delayed_episodes(
    policy: MeamPolicy,
    env: gymnasium.Env[Any, Any],
    chunking: Chunking,
    delay: int,
    *,
    episodes: int,
    seed: int,
    execute_steps: int,
) -> Iterator[EpisodeFigures]:
    """Run whole episodes; episode i resets environment and policy with seed + i, whatever came before.

    The environment goes on while "blocking" waits, as a real robot does.

    Args:
        policy: Acts in the environment.
        env: Must end its episodes by itself.
        chunking: How chunks follow each other; "realtime" needs a policy that takes a prefix.
        delay: Ticks that every inference takes but the first of an episode.
        episodes: Number of episodes.
        seed: Seed of the first one.
        execute_steps: Ticks from one inference to the next.

    Raises:
        ConfigError: the chunks are too short for the delay, or `execute_steps` is out of range.
    """
    # Simulated delays count ticks, so the rate changes nothing.
    rate_hz = policy.spec.control_rate_hz or 1.0
    for episode in range(episodes):
        with ControlLoop(
            policy, rate_hz, chunking=chunking, overrun="hold", execute_steps=execute_steps, simulated_delay=delay
        ) as loop:
            yield _run(policy, env, loop, chunking, delay, episode, seed)


def _run(
    policy: MeamPolicy,
    env: gymnasium.Env[Any, Any],
    loop: ControlLoop,
    chunking: Chunking,
    delay: int,
    episode: int,
    seed: int,
) -> EpisodeFigures:
    loop.reset(seed=seed + episode)
    observation, _ = env.reset(seed=seed + episode)
    actions, begins, held = [], [], []
    total, success, done, before = 0.0, float("nan"), False, loop.health()
    while not done:
        actions.append(loop.step(observation))
        after = loop.health()
        begins.append(after.inferences > before.inferences)
        held.append(after.overruns + after.missed_deadlines > before.overruns + before.missed_deadlines)
        before = after
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        total += float(reward)
        flag = info.get("success", info.get("is_success"))
        success = success if flag is None else float(flag or success == 1)
        done = terminated or truncated
    space = policy.spec.action_space
    flat = np.reshape(actions, (len(actions), -1))
    measured = smoothness(flat, begins, held, np.ravel(space.high - space.low).astype(np.float64) / 2)
    return EpisodeFigures(
        chunking=chunking,
        delay=delay,
        episode=episode,
        success=success,
        episode_return=total,
        length=len(actions),
        jerk=measured.jerk,
        boundary_jump=measured.boundary_jump,
        inner_jump=measured.inner_jump,
        inferences=before.inferences,
        waiting=before.missed_deadlines,
        overruns=before.overruns,
    )

"""Scripted and briefly trained behaviours, and recording them. Each is a mixture of better and worse, with noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np
from bandits import GOAL_DISTANCE
from numpy.typing import NDArray

from meam_policy.environments.make import make_environment
from meam_training.collection.dataset_folder import new_dataset_folder
from meam_training.collection.demonstrators import Episode
from meam_training.collection.demonstrators.episode import episode_generator, record_steps
from meam_training.collection.minari_writer import Metadata, write_minari
from meam_training.collection.partial_recording import PartialRecording

__all__ = ["Behaviour", "evolve", "guess", "reach", "record", "swing"]

Array = NDArray[np.float64]
Env = gymnasium.Env[Any, Any]
Act = Callable[[Any], NDArray[np.float32]]
"""Maps an observation to an action."""
Behaviour = Callable[[Env, np.random.Generator], Callable[[np.random.Generator], Act]]
"""Prepares to act in an environment, with a generator for the preparation; returns what draws an episode's controller
from that episode's generator."""


def record(
    environment_id: str, behaviour: Behaviour, transitions: int, dataset_id: str, root: Path, seed: int = 0
) -> Path:
    """Record whole episodes into a local Minari data set, until there are at least `transitions` transitions.

    Args:
        environment_id: Environment to act in.
        behaviour: What acts.
        transitions: Transitions to record.
        dataset_id: Minari id.
        root: Folder of the Minari data sets.
        seed: Seed of the behaviour and of the initial states; the same seed gives the same data.

    Returns:
        The folder of the data set.
    """
    folder = new_dataset_folder(dataset_id, root)
    settings = {"environment_id": environment_id, "transitions": transitions, "seed": seed}
    partial = folder.with_name(f".{folder.name}.partial")
    with (
        closing(make_environment(environment_id)) as env,
        PartialRecording.open(partial, settings, resume=True) as made,
    ):
        draw = behaviour(env, np.random.default_rng(seed))
        while made.progress.transitions < transitions:
            generator = episode_generator(seed, made.progress.episodes)
            made.add(_record_episode(env, draw(generator), generator), [])
        made.flush()
        about = Metadata("scripted", f"{environment_id}, seed {seed}.", {"meam_environment_id": environment_id})
        made.finish(write_minari(made, dataset_id, env, about), folder)
    return folder


def reach(
    hand: str, target: str, *, gain: tuple[float, float], damping: float, noise: tuple[float, float]
) -> Behaviour:
    """A spring from an arm's hand to a target, through the transposed Jacobian, and damped joints.

    Each episode draws a gain, so that some reach the target late and some overshoot, and a level of noise.

    Args:
        hand: The hand's body in a MuJoCo model in which all motors move the arm, whose joints come first.
        target: The target's body.
        gain: Range of the spring's stiffness, torque units per metre squared; drawn uniformly in the logarithm.
        damping: Torque units per radian per second.
        noise: Range of the standard deviation of the noise on each torque.
    """

    def prepare(env: Env, _: np.random.Generator) -> Callable[[np.random.Generator], Act]:
        simulator: Any = env.unwrapped
        model, data, joints = simulator.model, simulator.data, simulator.model.nu
        hand_id = model.body(hand).id

        def draw(generator: np.random.Generator) -> Act:
            stiffness, spread = math.exp(generator.uniform(*np.log(gain))), generator.uniform(*noise)

            def act(_: Any) -> NDArray[np.float32]:
                jacobian = np.zeros((3, model.nv))
                mujoco.mj_jacBody(model, data, jacobian, None, hand_id)  # pyright: ignore[reportAttributeAccessIssue]
                offset = data.body(target).xpos - data.body(hand).xpos
                torque = stiffness * jacobian[:, :joints].T @ offset - damping * data.qvel[:joints]
                return _clipped(env, torque + spread * generator.standard_normal(joints))

            return act

        return draw

    return prepare


def evolve(updates: int, *, step_size: float, horizon: int, noise: float, after: float) -> Behaviour:
    """Linear policies found by a short random search; each episode draws one that the search went through.

    Args:
        updates: Updates of the search; each tries 16 policies.
        step_size: Length of an update.
        horizon: Steps of a trial.
        noise: Standard deviation of the noise on every action, in the search and in the data.
        after: Share of the updates after which policies are used; earlier ones hardly move.

    References:
        Mania et al., Simple random search provides a competitive approach to reinforcement learning,
        arXiv:1803.07055 (version V2-t).
    """

    def prepare(env: Env, generator: np.random.Generator) -> Callable[[np.random.Generator], Act]:
        found = _random_search(env, updates, step_size, horizon, noise, generator)[int(after * updates) :]

        def draw(generator: np.random.Generator) -> Act:
            return found[generator.integers(len(found))].controller(env, noise, generator)

        return draw

    return prepare


def guess(good: float, spread: float) -> Behaviour:
    """What acts in a bandit: mostly the opposite of the best action, and seldom that action.

    Args:
        good: Probability of the best action.
        spread: Standard deviation of the noise on every component.
    """

    def prepare(env: Env, _: np.random.Generator) -> Callable[[np.random.Generator], Act]:
        def draw(generator: np.random.Generator) -> Act:
            side = GOAL_DISTANCE if generator.random() < good else -GOAL_DISTANCE
            return lambda seen: _clipped(env, side * seen + spread * generator.standard_normal(len(seen)))

        return draw

    return prepare


def swing(skill: tuple[float, float], noise: tuple[float, float]) -> Behaviour:
    """Swing a pendulum up: pump energy, and hold it where it stands upright.

    Each episode draws how much of the torque asked for it gives, and a level of noise.

    Args:
        skill: Range of the share of the torque; a negative one brakes.
        noise: Range of the standard deviation of the noise on the torque.
    """

    def prepare(env: Env, _: np.random.Generator) -> Callable[[np.random.Generator], Act]:
        def draw(generator: np.random.Generator) -> Act:
            share, spread = generator.uniform(*skill), generator.uniform(*noise)

            def act(observation: Any) -> NDArray[np.float32]:
                cosine, sine, speed = observation
                upright = cosine > 0.95
                # The energy is speed^2 / 2 + 15 cosine, and 15 upright at rest.
                lacking = 15 - speed**2 / 2 - 15 * cosine
                torque = -15 * sine - 3 * speed if upright else np.sign(speed) * lacking
                return _clipped(env, np.clip(share * torque, -2, 2) + spread * generator.standard_normal(1))

            return act

        return draw

    return prepare


class _LinearPolicy(NamedTuple):
    """Actions `weights` [act, obs] times the observation, which is normalised by `mean` and `std` [obs]."""

    weights: Array
    mean: Array
    std: Array

    def controller(self, env: Env, noise: float, generator: np.random.Generator) -> Act:
        """Act with noise of that standard deviation."""

        def act(observation: Any) -> NDArray[np.float32]:
            action = self.weights @ ((observation - self.mean) / self.std)
            return _clipped(env, action + noise * generator.standard_normal(len(action)))

        return act


def _random_search(
    env: Env, updates: int, step_size: float, horizon: int, noise: float, generator: np.random.Generator
) -> list[_LinearPolicy]:
    """The policies of a random search, one per update."""
    directions, kept, spread, remembered = 8, 4, 0.1, 20_000
    trial = gymnasium.wrappers.TimeLimit(env, horizon)
    observed, acted = env.observation_space.shape, env.action_space.shape
    assert observed is not None
    assert acted is not None
    policy = _LinearPolicy(np.zeros(acted + observed), np.zeros(observed), np.ones(observed))
    seen, found = np.empty((0, *observed)), []
    for _ in range(updates):
        steps = generator.standard_normal((directions, *policy.weights.shape))
        returns = np.zeros((directions, 2))
        for (index, side), sign in zip(np.ndindex(returns.shape), directions * [1, -1], strict=True):
            tried = policy._replace(weights=policy.weights + sign * spread * steps[index])
            episode = _record_episode(trial, tried.controller(env, noise, generator), generator)
            returns[index, side] = episode.rewards.sum()
            seen = np.concatenate([seen, np.asarray(episode.observations)])[-remembered:]
        best = np.argsort(-returns.max(axis=1))[:kept]
        ascent = np.tensordot(returns[best, 0] - returns[best, 1], steps[best], axes=1)
        weights = policy.weights + step_size / (kept * returns[best].std() + 1e-8) * ascent
        policy = _LinearPolicy(weights, seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-2))
        found.append(policy)
    return found


def _record_episode(env: Env, act: Act, generator: np.random.Generator) -> Episode:
    # From the upper half of the seeds, never those of an evaluation.
    return record_steps(env, act, int(generator.integers(2**31, 2**32)))


def _clipped(env: Env, action: Array) -> NDArray[np.float32]:
    box: Any = env.action_space
    return np.clip(action, box.low, box.high).astype(np.float32)

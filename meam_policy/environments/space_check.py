"""Checks that an environment fits a policy: spaces, control rate, length of its episodes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from meam_policy.errors import SpaceError
from meam_policy.spec import RATE_TOLERANCE, PolicySpec

__all__ = ["AnyEnv", "check_env", "check_spaces", "control_rate", "episode_limit"]

AnyEnv = gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]
"""One environment, or a vector environment."""


def check_env(spec: PolicySpec, env: AnyEnv, rate_hz: float | None = None) -> None:
    """Check that a policy can act in an environment.

    Beyond `check_spaces`: if the policy recorded a control rate, the environment's may differ by 1 %; and a chunk must
    not be longer than an episode, if the environment states the limit. A rate that follows from a time step (`dt` or
    `control_timestep()` of the environment or a wrapper) must match; if there is only the frame rate
    (`metadata["render_fps"]`), a mismatch is a warning.

    Args:
        spec: The policy's spec.
        env: One environment, or a vector environment.
        rate_hz: Actions per second, if the robot's contract says them; None takes the recorded control rate.

    Raises:
        SpaceError: something differs; the message names the first thing that does, with both values.

    Warns:
        UserWarning: the frame rate is not the policy's control rate.
    """
    check_spaces(spec, env)
    _check_rate(env, *((spec.control_rate_hz, "control_rate_hz") if rate_hz is None else (rate_hz, "robot.json")))
    limit = episode_limit(env)
    if limit is not None and spec.chunk_size > limit:
        raise SpaceError(
            f"The policy's chunk_size is {spec.chunk_size} actions, and the environment ends its episodes after "
            f"{limit} steps (max_episode_steps); expected chunks no longer than an episode. Check the environment's id."
        )


def check_spaces(spec: PolicySpec, env: AnyEnv) -> None:
    """Check that an environment has the policy's observation and action spaces.

    Observations: the kind of space, the keys of a Dict by name (their order is free, since values are taken by name),
    and of every box the shape, the kind of number (floats, integers or booleans, of any width), and the bounds where
    both have some. Actions: the same, and the bounds are always compared.

    Args:
        spec: The policy's spec.
        env: One environment; of a vector environment its `single_observation_space` and `single_action_space` count.

    Raises:
        SpaceError: something differs; the message names the first thing that does, with both values. Or it is no
            environment of Gymnasium.
    """
    _require_gymnasium(env)
    vector = isinstance(env, gymnasium.vector.VectorEnv)
    ours, theirs = spec.observation_space, env.single_observation_space if vector else env.observation_space
    if isinstance(ours, spaces.Dict):
        if not isinstance(theirs, spaces.Dict) or set(theirs.spaces) != set(ours.spaces):
            raise SpaceError(f"The environment's observation space is {theirs}; the policy expects {ours}.")
        for key, box in ours.spaces.items():
            _check_observation(f'observation "{key}"', box, theirs[key])
    else:
        _check_observation("observation", ours, theirs)
    ours, theirs = spec.action_space, env.single_action_space if vector else env.action_space
    if not isinstance(theirs, spaces.Box):
        raise SpaceError(f"The environment's action space is {theirs}; the policy acts in {ours}.")
    _check_box("action", ours, theirs)
    _check_bounds("action", ours, theirs, everywhere=True)


def control_rate(env: AnyEnv) -> float | None:
    """Control steps per second of simulated time, or None if the environment does not say.

    From the time step that it states (`dt`, or `control_timestep()`), or else from `metadata["render_fps"]`.
    """
    rates = _stated_rates(env)
    rate = rates[0] if rates else env.metadata.get("render_fps")
    return float(rate) if rate else None


def _require_gymnasium(env: object) -> None:
    if isinstance(env, (gymnasium.Env, gymnasium.vector.VectorEnv)):
        return
    kind = f"{type(env).__module__}.{type(env).__qualname__}"
    remedy = "Wrap it in a class that derives from gymnasium.Env."
    if hasattr(env, "step_async") and hasattr(env, "num_envs"):
        kind += ", as stable-baselines3's VecEnv"
        remedy = (
            "Make a gymnasium.vector.SyncVectorEnv of the functions that made its environments, since a VecEnv resets "
            "them by itself, without seeds; or use stable-baselines3's evaluate_policy(policy, env), which takes both."
        )
    raise SpaceError(f"The environment is a {kind}; expected a gymnasium.Env or gymnasium.vector.VectorEnv. {remedy}")


def _check_observation(name: str, ours: spaces.Space[Any], theirs: spaces.Space[Any]) -> None:
    if not isinstance(ours, spaces.Box) or not isinstance(theirs, spaces.Box):
        raise SpaceError(f"The environment's {name} is {theirs}; the policy was trained with {ours}.")
    _check_box(name, ours, theirs)
    _check_bounds(name, ours, theirs, everywhere=False)


def _check_box(name: str, ours: spaces.Box, theirs: spaces.Box) -> None:
    if ours.shape != theirs.shape:
        raise SpaceError(
            f"The environment's {name} has shape {theirs.shape}; the policy was trained with {ours.shape}."
        )
    if _kind(ours) != _kind(theirs):
        raise SpaceError(
            f"The environment's {name} has dtype {theirs.dtype}, and the policy's {ours.dtype}; expected the same kind "
            "of number. Another kind usually means other units: check the environment's id and wrappers."
        )


def _kind(box: spaces.Box) -> str:
    kind = np.dtype(box.dtype).kind
    return "i" if kind == "u" else kind


def _check_bounds(name: str, ours: spaces.Box, theirs: spaces.Box, *, everywhere: bool) -> None:
    for side in ("low", "high"):
        mine, other = (np.ravel(getattr(box, side)).astype(np.float64) for box in (ours, theirs))
        # An environment without bounds takes every action.
        compared = np.isfinite(other) & (everywhere | np.isfinite(mine))
        if not np.allclose(mine[compared], other[compared]):
            raise SpaceError(
                f"The environment's {name} bounds differ: {side} is {other.tolist()}, the policy has {mine.tolist()}."
            )


def _check_rate(env: AnyEnv, rate: float | None, said_by: str) -> None:
    if rate is None:
        return
    for stated in _stated_rates(env):
        if abs(stated - rate) > RATE_TOLERANCE * rate:
            raise SpaceError(
                f"The environment takes {stated:g} steps a second; the policy acts {rate:g} times "
                f"({said_by}). Act at the same rate, or give a wrapper that changes it a `dt` in seconds."
            )
    pictures = None if _stated_rates(env) else env.metadata.get("render_fps")
    if pictures and abs(pictures - rate) > RATE_TOLERANCE * rate:
        warnings.warn(
            f"The environment draws {pictures:g} pictures a second, and does not say how many steps it takes; the "
            f"policy acts {rate:g} times a second ({said_by}). Check that they are the same.",
            stacklevel=3,
        )


def _stated_rates(env: AnyEnv) -> list[float]:
    """One over the time step of every environment that states one."""
    return [1 / step for name in ("dt", "control_timestep") for step in _values(env, name) if _is_time(step)]


def _is_time(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and bool(value > 0)


def _values(env: AnyEnv, name: str) -> Sequence[Any]:
    """An attribute, or what a method of that name returns, of an environment or of all in a vector environment."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        call = getattr(env.unwrapped, "call", None)
        # Asked for first: a subprocess that lacks the attribute would end.
        return call(name) if call is not None and all(call("has_wrapper_attr", name)) else ()
    if not env.has_wrapper_attr(name):
        return ()
    value = env.get_wrapper_attr(name)
    return (value() if callable(value) else value,)


def episode_limit(env: AnyEnv) -> int | None:
    """Steps after which an episode is over at the latest, as far as the environment says."""
    # A vector environment's own spec does not know of the arguments that its environments were made with.
    said = [each.spec.max_episode_steps for each in getattr(env.unwrapped, "envs", (env,)) if each.spec is not None]
    return min((limit for limit in said if limit is not None), default=None)

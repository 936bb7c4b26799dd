"""Makes vector environments from the names that `make_environment` accepts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError

__all__ = ["open_vector_environment"]


@contextmanager
def open_vector_environment(
    environment_id: str, num_envs: int, *, asynchronous: bool = False
) -> Iterator[gymnasium.vector.VectorEnv[Any, Any, Any]]:
    """Make several environments that are stepped together, and close them on exit.

    They are not reset automatically after an episode (autoreset mode DISABLED).

    Args:
        environment_id: See `make_environment`.
        num_envs: Number of environments, at least 1.
        asynchronous: Run each in a separate process. The processes are spawned, not forked, so a policy may be
            loaded already; they leave Ctrl-C to this one.

    Raises:
        ConfigError: num_envs is out of range.
        NotFoundError: there is no such environment.
        MissingExtraError: its simulator is not installed.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs is {num_envs}; expected 1 or more.")
    makers = [partial(_make, environment_id, os.getpid())] * num_envs
    if asynchronous:
        env = gymnasium.vector.AsyncVectorEnv(makers, context="spawn", autoreset_mode="Disabled")
    else:
        env = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode="Disabled")
    try:
        yield env
    except BaseException:
        if isinstance(env, gymnasium.vector.AsyncVectorEnv):
            _abandon(env)
        raise
    finally:
        env.close()


def _abandon(env: gymnasium.vector.AsyncVectorEnv[Any, Any]) -> None:
    """End the processes: after an interrupt in the middle of a step, `close` would wait for answers it has had."""
    for process in env.processes:
        process.terminate()
        process.join()
    for pipe in env.parent_pipes:
        if pipe is not None:
            pipe.close()
    env.closed = True


def _make(environment_id: str, parent: int) -> gymnasium.Env[Any, Any]:
    if os.getpid() != parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make_environment(environment_id)

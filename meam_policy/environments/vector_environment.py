"""Makes vector environments from the names that `make_environment` accepts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium

from meam_policy.environments.make import import_packages, make_environment
from meam_policy.errors import ConfigError
from meam_policy.spec import EnvironmentSpec

__all__ = ["open_vector_environment"]


@contextmanager
def open_vector_environment(
    environment: str | EnvironmentSpec,
    num_envs: int,
    *,
    asynchronous: bool = False,
    packages: Sequence[str] = (),
    **kwargs: Any,
) -> Iterator[gymnasium.vector.VectorEnv[Any, Any, Any]]:
    """Make several environments that are stepped together, and close them on exit.

    They are not reset automatically after an episode (autoreset mode DISABLED).

    Args:
        environment: See `make_environment`.
        num_envs: Number of environments, at least 1.
        asynchronous: Run each in a separate process. The processes are spawned, not forked, so a policy may be
            loaded already; they leave Ctrl-C to this one.
        packages: Packages that are imported in those processes first; the caller has imported them in this one.
        **kwargs: See `make_environment`.

    Raises:
        NotFoundError: there is no such environment.
        MissingExtraError: its simulator is not installed.
        ConfigError: num_envs is out of range, or see `make_environment`.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs is {num_envs}; expected 1 or more.")
    makers = [partial(_make, environment, kwargs, tuple(packages), os.getpid())] * num_envs
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


def _make(
    environment: str | EnvironmentSpec, kwargs: dict[str, Any], packages: tuple[str, ...], parent: int
) -> gymnasium.Env[Any, Any]:
    if os.getpid() != parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        import_packages(packages)
    return make_environment(environment, **kwargs)

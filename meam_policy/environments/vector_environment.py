"""Makes vector environments from the names that `make_environment` accepts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium

from meam_policy.environments.make import import_packages, make_environment
from meam_policy.errors import ConfigError, WorkerError
from meam_policy.spec import EnvironmentSpec

__all__ = ["named_workers", "open_vector_environment"]

MAX_ENVS = 65_536
"""As many as a policy takes seeds for."""

REPORT_S = 5.0
"""Longest wait for what a worker says of its end, and for that end, seconds."""


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
        num_envs: Number of environments, 1 to `MAX_ENVS`.
        asynchronous: Run each in a separate process. The processes are spawned, not forked, so a policy may be
            loaded already; they leave Ctrl-C to this one.
        packages: Packages that are imported in those processes first; the caller has imported them in this one.
        **kwargs: See `make_environment`.

    Raises:
        NotFoundError: there is no such environment.
        MissingExtraError: its simulator is not installed.
        ConfigError: num_envs is out of range, or see `make_environment`.
        WorkerError: a process died while it made its environment.
    """
    if not 1 <= num_envs <= MAX_ENVS:
        raise ConfigError(f"num_envs is {num_envs}; expected 1 to {MAX_ENVS}.")
    makers = [partial(_make, environment, kwargs, tuple(packages), os.getpid())] * num_envs
    if asynchronous:
        try:
            env = gymnasium.vector.AsyncVectorEnv(makers, context="spawn", autoreset_mode="Disabled")
        except (EOFError, ConnectionError) as error:
            raise WorkerError(
                f"A worker of the vector environment died while it made {environment}; what it said is above. Expected "
                "it to be made there as it was here. Make the environments in one process (leave out --async-envs), "
                "or run fewer of them (--num-envs)."
            ) from error
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


@contextmanager
def named_workers(env: gymnasium.vector.VectorEnv[Any, Any, Any]) -> Iterator[None]:
    """Turn the death of a worker of an `AsyncVectorEnv` into an error that names it; other environments have none.

    Its other processes are ended too, and it is closed: Gymnasium cannot go on without one of them.

    Raises:
        WorkerError: a worker died.
    """
    workers = env.unwrapped
    if not isinstance(workers, gymnasium.vector.AsyncVectorEnv):
        yield
        return
    plain = workers.error_queue
    reports = _Reports(plain)
    workers.error_queue = reports  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    except Exception as error:  # of the environment, of a pipe to a worker that is gone, or of something else
        dead = _dead(workers, wait=reports.asked or isinstance(error, (EOFError, ConnectionError)))
        if not reports.seen and not dead:
            raise
        index, said = reports.seen[0] if reports.seen else (dead[0], _ending(workers.processes[dead[0]].exitcode))
        _abandon(workers)
        raise WorkerError(
            f"Worker {index} of the {workers.num_envs} of the vector environment {said}. Expected it to run until the "
            "end. Run the environment by itself to see why (one environment, --num-envs 1); if memory is short, run "
            "fewer of them (--num-envs).",
            index,
        ) from error
    finally:
        workers.error_queue = plain


class _Reports:
    """Notes what dying workers say; stands in for Gymnasium's queue of errors, in which it waits without end.

    A worker whose exception cannot be pickled, or that is killed meanwhile, never writes into it.
    """

    def __init__(self, errors: Any) -> None:
        self._errors = errors
        self.asked = False
        self.seen: list[tuple[int, str]] = []

    def get(self) -> tuple[int, type[BaseException], Any, str]:
        """Take the next report.

        Raises:
            queue.Empty: there is none in time.
        """
        self.asked = True
        index, kind, value, trace = self._errors.get(timeout=REPORT_S)
        if issubclass(kind, Exception):  # Ctrl-C reaches the workers too
            self.seen.append((index, f"failed: {kind.__name__}: {str(value)[:200]}"))
        return index, kind, value, trace


def _dead(workers: gymnasium.vector.AsyncVectorEnv[Any, Any], wait: bool) -> list[int]:
    """The workers whose process has ended; if `wait`, after waiting for the first."""
    end = time.monotonic() + REPORT_S
    while True:
        dead = [index for index, process in enumerate(workers.processes) if not process.is_alive()]
        if dead or not wait or time.monotonic() > end:
            return dead
        time.sleep(0.01)


def _ending(code: int | None) -> str:
    """How a process ended that left no report."""
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}, without a report that could be read"


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

"""Makes environments by Gymnasium id or by the name of their data set."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import gymnasium
import numpy as np

from meam_policy.environments.headless import disable_dm_control_drawing
from meam_policy.errors import ConfigError, MeamError, MissingExtraError, NotFoundError
from meam_policy.extras import needs, raise_interrupt
from meam_policy.spec import EnvironmentSpec
from meam_policy.typed import typed

__all__ = ["beyond_id", "import_packages", "make_environment", "named_failures", "with_arguments"]

_OGBENCH_FAMILIES = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
_DM_CONTROL_FAMILIES = ("cube", "scene", "puzzle")


@typed()
def make_environment(environment: str | EnvironmentSpec, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment from a Gymnasium id, an OGBench data-set name, or what a policy or data set records.

    OGBench names its data sets like its environments with the kind of data in between
    ("pointmaze-medium-navigate-singletask-task3-v0"); both forms are accepted. Ids of the form "module:id", which
    would import a module, are refused: an id may come from a downloaded policy. So may an `EnvironmentSpec`: only
    wrappers of Gymnasium that do what their arguments say are applied, and text among its arguments that could name a
    file or a module is refused.

    Args:
        environment: Gymnasium id or OGBench name, e.g. "meam/Pockets-v0" or "HalfCheetah-v5"; or an `EnvironmentSpec`.
        **kwargs: Passed on to the environment, in place of those of the `EnvironmentSpec`; and `max_episode_steps`.

    Raises:
        NotFoundError: there is no such environment.
        MissingExtraError: its simulator is not installed.
        ConfigError: the environment refuses its arguments, or the `EnvironmentSpec` has what is not followed.
    """
    spec = EnvironmentSpec(environment) if isinstance(environment, str) else environment
    if ":" in spec.id:
        raise NotFoundError(f'The environment id "{spec.id}" names a module to import; give the plain id.')
    ogbench_name = spec.id.startswith(_OGBENCH_FAMILIES)
    if ogbench_name:
        _import_ogbench(spec.id)
    if spec.id.startswith(_DM_CONTROL_FAMILIES):
        disable_dm_control_drawing()
    recorded = beyond_id(replace(spec, kwargs={k: v for k, v in spec.kwargs.items() if k not in kwargs}))
    if recorded.refused:
        raise ConfigError(
            f"{spec.id} was recorded with {'; and '.join(recorded.refused)}. So it is not made. To have it as it is "
            f"registered, name it: --env-id {spec.id} (meam collect {spec.id}); without its wrappers it gives other "
            "observations or rewards than the policy was trained with. Or record the data again without them. Of "
            "arguments, give others: --env-kwargs. In Python, make it yourself and give it: rollout(policy, env), "
            "train(env=...)."
        )
    arguments = {**recorded.kwargs, **kwargs}
    if recorded.max_episode_steps is not None:
        arguments.setdefault("max_episode_steps", recorded.max_episode_steps)
    env = _made(spec.id, arguments)
    if ogbench_name:
        env = _SeededGlobally(env)
    for wrapper in recorded.wrappers:
        # JSON has no tuples, which some of them insist on.
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in wrapper.kwargs.items()}
        try:
            env = getattr(gymnasium.wrappers, wrapper.name)(env, **given)
        except Exception as error:  # whatever a wrapper raises for arguments that do not fit
            env.close()
            raise ConfigError(
                f"{spec.id} was recorded with the wrapper {wrapper.name}, which cannot be applied with its arguments "
                f"{dict(wrapper.kwargs)}: {error}. Record the data again, or give the environment in Python."
            ) from error
    return env


def with_arguments(environment: EnvironmentSpec, arguments: Mapping[str, Any]) -> EnvironmentSpec:
    """The environment that `make_environment(environment, **arguments)` makes, for what is said of it."""
    steps = arguments.get("max_episode_steps", environment.max_episode_steps)
    given = {name: value for name, value in arguments.items() if name != "max_episode_steps"}
    return replace(environment, kwargs={**environment.kwargs, **given}, max_episode_steps=steps)


@contextlib.contextmanager
def named_failures(environment: EnvironmentSpec | None) -> Iterator[None]:
    """Name an environment with arguments of its own that fails while it runs: some refuse them only then.

    Args:
        environment: What runs; None for an environment that was made by hand, whose errors pass as they are.

    Raises:
        ConfigError: it failed.
    """
    try:
        yield
    except MeamError:
        raise
    except Exception as error:  # whatever an environment raises
        if environment is None or not environment.kwargs:
            raise
        raise ConfigError(
            f"{environment} failed while it ran: {type(error).__name__}: {str(error)[:200]}. Check its arguments "
            "(--env-kwargs), or the environment itself."
        ) from error


def beyond_id(spec: EnvironmentSpec) -> EnvironmentSpec:
    """An environment without those arguments, and without a time limit, that its id gives it anyway.

    Of an id that is not registered, nothing is known to be so. OGBench's are registered if it is installed.
    """
    if spec.id.startswith(_OGBENCH_FAMILIES):
        with contextlib.suppress(MissingExtraError):
            _import_ogbench(spec.id)
    evaluation = None if spec.evaluation is None else beyond_id(spec.evaluation)
    registered = gymnasium.registry.get(_gymnasium_id(spec.id))
    if registered is None:
        return replace(spec, evaluation=evaluation)
    plain = {name: json.dumps(value, default=repr) for name, value in registered.kwargs.items()}
    kwargs = {name: value for name, value in spec.kwargs.items() if plain.get(name) != json.dumps(value)}
    limit = spec.max_episode_steps
    limit = None if limit == registered.max_episode_steps else limit
    spec = replace(spec, kwargs=kwargs, max_episode_steps=limit, evaluation=None)
    return spec if evaluation == spec else replace(spec, evaluation=evaluation)


def _made(environment_id: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """The environment of a registered id."""
    name = _gymnasium_id(environment_id)
    try:
        return gymnasium.make(name, **arguments)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise_interrupt(error)
        reason = str(error).partition("\n")[0]
        raise MissingExtraError(
            f"{environment_id} needs something that is not installed, or cannot be imported: {reason} "
            "(MuJoCo's environments of version 4 and later come with pip install 'meam-policy[mujoco]'.)"
        ) from error
    except Exception as error:  # whatever an environment raises for arguments that do not fit
        if isinstance(error, gymnasium.error.UnregisteredEnv) or name not in gymnasium.registry:
            close = get_close_matches(name, list(gymnasium.registry), n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise NotFoundError(
                f'There is no environment "{environment_id}".{hint} Some exist only once their package is imported, '
                "such as those of gymnasium-robotics: import it first (--import PACKAGE on the command line)."
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"
        raise ConfigError(
            f"{environment_id} cannot be made with these arguments: {given}. It says: {error}. Give others: in Python "
            "make_environment(id, name=value), on the command line --env-kwargs and --max-episode-steps."
        ) from error


def import_packages(names: Sequence[str]) -> None:
    """Import packages that register their environments when they are imported.

    Args:
        names: Their names, as the user gives them; never names out of a policy or a data set.

    Raises:
        MissingExtraError: a package cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a stranger's package raises
            raise_interrupt(error)
            raise MissingExtraError(
                f"The package {name!r}, which is to be imported for its environments, cannot be: {error!r}. Install "
                "it, or correct its name."
            ) from error


def _gymnasium_id(name: str) -> str:
    """Drop the kind of data from an OGBench data-set name, as ogbench.make_env_and_datasets does."""
    parts = name.split("-")
    if name in gymnasium.registry or not name.startswith(_OGBENCH_FAMILIES):
        return name
    if "singletask" in parts:
        position = parts.index("singletask")
        return "-".join(parts[: position - 1] + parts[position:])
    return "-".join(parts[:-2] + parts[-1:])


def _import_ogbench(environment_id: str) -> None:
    with needs(environment_id, "ogbench", "mujoco"):
        import ogbench  # noqa: F401  # registers its environments


class _SeededGlobally(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Makes `reset(seed=)` decide all of a reset: OGBench's mazes draw from NumPy's global generator."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is None:
            return self.env.reset(options=options)
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            self.env.unwrapped.action_space.seed(seed)
            return self.env.reset(seed=seed, options=options)
        finally:
            np.random.set_state(before)  # noqa: NPY002

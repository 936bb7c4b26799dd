"""The options of commands that make environments: --env-id, --env-kwargs, --max-episode-steps and --import."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from meam_policy.console import say
from meam_policy.environments.make import import_packages
from meam_policy.errors import ConfigError
from meam_policy.spec import EnvironmentSpec, PolicySpec
from meam_policy.spec.environment_spec import MAX_STEPS, unfit_argument

__all__ = ["chosen_environment", "environment_arguments", "say_as_registered", "typed_environment"]


def typed_environment(env_id: str | None, packages: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """Import packages, and the module of an id of the form "module:id": only ever one that the user has typed.

    Args:
        env_id: --env-id.
        packages: --import.

    Returns:
        The plain id, and all that was imported.

    Raises:
        MissingExtraError: a package cannot be imported.
    """
    module, colon, plain = (env_id or "").partition(":")
    if colon:
        packages, env_id = (*packages, *([] if module in packages else [module])), plain
    import_packages(packages)
    return env_id, tuple(packages)


def chosen_environment(env_id: str | None, spec: PolicySpec) -> EnvironmentSpec:
    """The environment to act in: as it is registered if the user names it, else that of the policy's evaluations.

    Args:
        env_id: --env-id, without a module.
        spec: The policy's spec.

    Raises:
        ConfigError: neither names one.
    """
    recorded = spec.recorded_environment
    if env_id is None and recorded is None:
        raise ConfigError("The policy does not say which environment it is for; pass --env-id.")
    if env_id is None:
        assert recorded is not None
        return recorded.for_evaluation
    say_as_registered(env_id, None if recorded is None else recorded.for_evaluation, "The policy's")
    return EnvironmentSpec(env_id)


def say_as_registered(env_id: str, recorded: EnvironmentSpec | None, whose: str) -> None:
    """Say that the name of an environment is all that is taken of it, where more is recorded.

    Args:
        env_id: --env-id, without a module.
        recorded: The recorded environment; None if there is none.
        whose: Whose it is: "The policy's" or "The data's".
    """
    if recorded is not None and env_id == recorded.id != str(recorded):
        say(
            f"{env_id} is named, so it is made as it is registered. {whose} is {recorded}: leave the name out to have "
            "that."
        )


def environment_arguments(env_kwargs: str | None, max_episode_steps: int | None) -> dict[str, Any]:
    """Arguments for `make_environment`.

    Args:
        env_kwargs: --env-kwargs, a JSON object.
        max_episode_steps: --max-episode-steps.

    Raises:
        ConfigError: the text is no JSON object of arguments, or the number is out of range.
    """
    arguments: dict[str, Any] = {}
    if env_kwargs is not None:
        wanted = """expected a JSON object of the environment's arguments, such as '{"g": 2}'"""
        try:
            arguments = json.loads(env_kwargs)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--env-kwargs is {env_kwargs}, which is not JSON ({error}); {wanted}.") from error
        if not isinstance(arguments, dict):
            raise ConfigError(f"--env-kwargs is {env_kwargs}; {wanted}.")
        unfit = unfit_argument(arguments)
        if unfit is not None:
            raise ConfigError(
                f"--env-kwargs is {unfit[0]}; expected {unfit[1]}. The time limit is --max-episode-steps."
            )
    if max_episode_steps is not None:
        if not 1 <= max_episode_steps <= MAX_STEPS:
            raise ConfigError(f"--max-episode-steps is {max_episode_steps}; expected 1 to {MAX_STEPS}.")
        arguments["max_episode_steps"] = max_episode_steps
    return arguments

"""Makes environments by Gymnasium id or by the name of their data set."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import gymnasium
import numpy as np

from meam_policy.environments.headless import disable_dm_control_drawing
from meam_policy.errors import MissingExtraError, NotFoundError

__all__ = ["import_packages", "make_environment"]

_OGBENCH_FAMILIES = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
_DM_CONTROL_FAMILIES = ("cube", "scene", "puzzle")


def make_environment(environment_id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment from a Gymnasium id or an OGBench data-set name.

    OGBench names its data sets like its environments with the kind of data in between
    ("pointmaze-medium-navigate-singletask-task3-v0"); both forms are accepted. Ids of the form "module:id", which
    would import a module, are refused: an id may come from a downloaded policy.

    Args:
        environment_id: Gymnasium id or OGBench name, e.g. "meam/Pockets-v0" or "HalfCheetah-v5".
        **kwargs: Passed on to the environment.

    Raises:
        NotFoundError: there is no such environment.
        MissingExtraError: its simulator is not installed.
    """
    if ":" in environment_id:
        raise NotFoundError(f'The environment id "{environment_id}" names a module to import; give the plain id.')
    ogbench_name = environment_id.startswith(_OGBENCH_FAMILIES)
    if ogbench_name:
        _import_ogbench(environment_id)
    if environment_id.startswith(_DM_CONTROL_FAMILIES):
        disable_dm_control_drawing()
    name = _gymnasium_id(environment_id) if ogbench_name else environment_id
    try:
        env = gymnasium.make(name, **kwargs)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        if isinstance(error, MissingExtraError):
            raise
        reason = str(error).splitlines()[0]
        raise MissingExtraError(
            f"{environment_id} needs something that is not installed: {reason} "
            "(MuJoCo's environments of version 4 and later come with pip install 'meam-policy[mujoco]'.)"
        ) from error
    except gymnasium.error.Error as error:
        close = get_close_matches(name, list(gymnasium.registry), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise NotFoundError(
            f'There is no environment "{environment_id}".{hint} Some exist only once their package is imported, '
            "such as those of gymnasium-robotics: import it first (--import PACKAGE on the command line)."
        ) from error
    return _SeededGlobally(env) if ogbench_name else env


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
            raise MissingExtraError(
                f"The package {name!r}, which is to be imported for its environments, cannot be: {error!r}. Install "
                "it, or correct its name."
            ) from error


def _gymnasium_id(name: str) -> str:
    """Drop the kind of data from an OGBench data-set name, as ogbench.make_env_and_datasets does."""
    parts = name.split("-")
    if name in gymnasium.registry:
        return name
    if "singletask" in parts:
        position = parts.index("singletask")
        return "-".join(parts[: position - 1] + parts[position:])
    return "-".join(parts[:-2] + parts[-1:])


def _import_ogbench(environment_id: str) -> None:
    try:
        import ogbench  # noqa: F401  # registers its environments
    except ImportError as error:
        raise MissingExtraError(f"{environment_id} needs OGBench: pip install 'meam-policy[mujoco]'.") from error


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

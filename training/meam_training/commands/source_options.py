"""The options that say what data is and what of it is taken: of every command that opens a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from meam_policy.commands.environment_options import typed_environment
from meam_training.data.opening import DataArguments

__all__ = ["SourceOptions"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of what is opened; see `DataArguments`."""

    env_id: str | None = None
    """For an .npz file: OGBench single-task name, from whose goal rewards are computed. For other data: the environment
    they were recorded in, as it is registered, or module:id; by default what the data records."""
    shares: tuple[float, ...] = ()
    """With several data sets: the share of a batch that each has. Empty gives every row the same chance."""
    episodes: tuple[str, ...] = ()
    """Range of episodes of each data set, such as 0:100, or : for all."""
    observation_keys: tuple[str, ...] = ()
    """Keys of the observation, in the order of flattening; empty takes all that hold numbers."""
    action_key: str | None = None
    """For robomimic and LeRobot: key of the actions."""
    reward: str | None = None
    """For robomimic and LeRobot: key of the rewards; or end, 1 at the end of every episode; or none."""
    termination: str | None = None
    """For robomimic and LeRobot: key of the flags that are true where the task ended."""
    action_low: tuple[float, ...] | None = None
    """Lower bounds of the actions, where the data has none: one number, or one for each number of an action."""
    action_high: tuple[float, ...] | None = None
    """Upper bounds, likewise."""
    clip_actions: bool = False
    """Clip recorded actions to the bounds, as many simulators do, rather than refuse those beyond."""
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Packages to import first, such as gymnasium_robotics, whose environments exist only then."""

    def named(self, data: tuple[str, ...], **more: Any) -> tuple[DataArguments, tuple[str, ...]]:
        """What to open, and the packages that were imported for it.

        Args:
            data: The sources.
            **more: Further fields of `DataArguments`.

        Raises:
            MissingExtraError: a package cannot be imported.
        """
        env_id, packages = typed_environment(self.env_id, self.packages)
        options = {name: value for name, value in vars(self).items() if name in _OPTIONS}
        return DataArguments(**{**options, **more, "data": data, "env_id": env_id}), packages


_OPTIONS = frozenset(SourceOptions.__dataclass_fields__) & frozenset(DataArguments.__dataclass_fields__)

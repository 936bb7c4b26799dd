"""The options that say what data is and what of it is taken: of every command that opens a data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from meam_policy.commands.environment_options import typed_environment
from meam_training.data.opening import DataArguments, DataChoices

__all__ = ["SourceOptions"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DataChoices):
    """`DataChoices`, and the packages to import for them."""

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
        choices = {field.name: getattr(self, field.name) for field in fields(DataChoices)}
        return DataArguments(data, **{**choices, **more, "env_id": env_id}), packages

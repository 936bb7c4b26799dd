"""Where a control loop's recording goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from meam_policy.errors import ConfigError, OutputError
from meam_policy.extras import needs
from meam_policy.given_files import given_path
from meam_policy.typed import typed_fields

__all__ = ["Recording"]

_LONGEST_RING_S = 86400.0


@dataclass(frozen=True)
class Recording:
    """Settings of a flight recorder.

    Attributes:
        path: The file to write, *.mcap, which must not exist; its folder must.
        ring_seconds: Keep only the newest so many seconds, in memory, and write them when the loop stops, ends by an
            exception or is closed, or by `ControlLoop.save_recording`: the first time to `path`, then to PATH-2 and so
            on. None writes everything as it comes.
        queue: Records that may wait for the disk; more are dropped, and counted. Of no effect on a ring.

    Example:
        >>> Recording("stop.mcap", ring_seconds=60).ring_seconds
        60
    """

    path: str | os.PathLike[str]
    ring_seconds: float | None = None
    queue: int = 10_000

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has another type, or is out of range.
        """
        typed_fields(self)
        if not os.fspath(self.path).strip():
            raise ConfigError(f"path is {self.path!r}; expected the path of a file, such as flight.mcap.")
        given_path("path", self.path)
        seconds = self.ring_seconds
        if seconds is not None and not 0 < seconds <= _LONGEST_RING_S:
            raise ConfigError(f"ring_seconds is {seconds:g}; expected seconds above 0, up to {_LONGEST_RING_S:g}.")
        if self.queue < 1:
            raise ConfigError(f"queue is {self.queue}; expected 1 record or more.")

    def checked_path(self) -> Path:
        """The path, at which a file can be written now, as far as that can be known.

        Raises:
            OutputError: there is something, or its folder does not exist.
            MissingExtraError: mcap is not installed.
        """
        with needs("Recording", "mcap", "flight"):
            import mcap.writer  # noqa: F401
        path = given_path("path", self.path).absolute()
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path} exists already. Choose another file for the recording, or delete it first.")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is not a folder; expected the folder of the recording. Make it first.")
        return path

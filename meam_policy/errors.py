"""The errors this package raises on purpose.

Every message states what was wrong (the value seen), what was expected, and what to do, on one line of visible
characters. All errors derive from `MeamError`, and each also from the builtin a caller would naturally catch:

    MeamError
    ├── FormatError(ValueError)             a file of a policy folder does not have the expected format
    │   ├── VersionError                    written by a newer, or unsupported, version
    │   └── IntegrityError                  a file's hash differs from the one recorded
    ├── NotFoundError(FileNotFoundError)    a file, folder, data set or environment does not exist
    ├── HubError(OSError)                   the Hugging Face Hub did not do what was asked; see `.kind`
    ├── SpaceError(ValueError)              an environment's spaces are not the policy's
    ├── ObservationError(ValueError)        an observation does not fit the policy
    ├── ActionError(RuntimeError)           the policy produced an action that must not be executed
    ├── DeviceError(RuntimeError)           the requested execution provider is not usable here
    ├── ForkError(RuntimeError)             a policy was loaded before the process was forked
    ├── WorkerError(RuntimeError)           a worker of a vector environment died; see `.worker` and `.partial`
    ├── DatasetError(ValueError)            training data is broken
    ├── ConfigError(ValueError)             a setting is unknown or out of range
    ├── OutputError(OSError)                an output folder cannot be used
    ├── DivergedError(RuntimeError)         training produced NaN or infinity
    ├── CheckpointError(RuntimeError)       a checkpoint is missing, broken or of another run
    ├── LockedError(RuntimeError)           another process is writing to the folder
    ├── ParityError(RuntimeError)           an exported graph does not compute what the checkpoint does
    └── MissingExtraError(ImportError)      an optional dependency is not installed, or cannot be imported
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from meam_policy.terminal_text import printable

__all__ = [
    "ActionError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DeviceError",
    "DivergedError",
    "ForkError",
    "FormatError",
    "HubError",
    "IntegrityError",
    "LockedError",
    "MeamError",
    "MissingExtraError",
    "NotFoundError",
    "ObservationError",
    "OutputError",
    "ParityError",
    "SpaceError",
    "VersionError",
    "WorkerError",
]


HubErrorKind: TypeAlias = Literal["offline", "timeout", "access", "incomplete", "conflict", "server"]


class MeamError(Exception):
    """Base of every error raised on purpose by meam_policy, meam_training and meam_export."""

    def __str__(self) -> str:
        """The message on one line; what it names may hold control characters, which a terminal or a log would obey."""
        return printable(super().__str__())


class FormatError(MeamError, ValueError):
    """A file of a policy folder does not have the expected format."""


class VersionError(FormatError):
    """A file is of a format version that this package does not read, or a graph needs a newer onnxruntime."""


class IntegrityError(FormatError):
    """A file's SHA-256 differs from the one recorded in config.json."""


class NotFoundError(MeamError, FileNotFoundError):
    """A file, folder, data set or environment does not exist."""


class HubError(MeamError, OSError):
    """The Hugging Face Hub could not deliver a policy, or did not take one.

    Attributes:
        kind: "offline", "timeout", "access", "incomplete", "conflict" or "server".
    """

    def __init__(self, message: str, kind: HubErrorKind) -> None:
        super().__init__(message)
        self.kind: HubErrorKind = kind

    def __reduce__(self) -> tuple[type[HubError], tuple[str, str]]:
        """Pickle with the kind, so that worker processes can report it."""
        return HubError, (str(self), self.kind)


class SpaceError(MeamError, ValueError):
    """An environment's observation or action space is not the policy's."""


class ObservationError(MeamError, ValueError):
    """An observation has the wrong keys, shape, type or a value that is not finite."""


class ActionError(MeamError, RuntimeError):
    """The policy produced an action that must not be executed."""


class DeviceError(MeamError, RuntimeError):
    """The requested execution provider is not usable on this machine."""


class ForkError(MeamError, RuntimeError):
    """A policy that was loaded before a fork is used in the child process.

    The parent may go on with it. The child must leave by `os._exit`, as those of `multiprocessing` do: its normal exit
    would hang in onnxruntime.
    """


class WorkerError(MeamError, RuntimeError):
    """A worker process of a vector environment died, by a signal or by what its environment raised.

    Attributes:
        worker: Its index; None if that is not known.
        partial: The `RolloutResult` of the episodes that were finished, with `partial` true; None if there are none.
    """

    def __init__(self, message: str, worker: int | None = None, partial: Any = None) -> None:
        super().__init__(message)
        self.worker, self.partial = worker, partial

    def __reduce__(self) -> tuple[type[WorkerError], tuple[str, int | None, Any]]:
        """Pickle with the attributes, so that worker processes can report it."""
        return WorkerError, (str(self), self.worker, self.partial)


class DatasetError(MeamError, ValueError):
    """Training data is broken: not finite, wrong shape, wrong type, out of bounds, or unsafe to open."""


class ConfigError(MeamError, ValueError):
    """A setting is unknown or out of range."""


class OutputError(MeamError, OSError):
    """An output folder cannot be written, or already holds something that would be overwritten."""


class DivergedError(MeamError, RuntimeError):
    """Training produced NaN or infinity; the last checkpoint is intact."""


class CheckpointError(MeamError, RuntimeError):
    """A checkpoint is missing, broken, or belongs to another run."""


class LockedError(MeamError, RuntimeError):
    """Another process is writing to the folder."""


class ParityError(MeamError, RuntimeError):
    """An exported graph does not compute what its checkpoint computes."""


class MissingExtraError(MeamError, ImportError):
    """An optional dependency is not installed, or cannot be imported; the message has the command that installs it."""

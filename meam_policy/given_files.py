"""Paths and files that somebody gave: refused where no file can be, and where reading would never end."""

from __future__ import annotations

import os
import stat
from errno import EINVAL, EISDIR
from pathlib import Path
from typing import BinaryIO

from meam_policy.errors import ConfigError

__all__ = ["NotRegularError", "given_path", "open_regular", "read_regular", "require_regular"]

MAX_PART_BYTES = 255
"""Of a file's or folder's name, as the common file systems have it."""

MAX_PATH_BYTES = 3800
"""Of a whole path: 4096 is the system's limit, which leaves room for the names of the files in a folder."""

_SHOWN = 60

_KINDS = (
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


class NotRegularError(OSError):
    """What was to be read is a named pipe, a socket or a device; `strerror` says which."""


def given_path(name: str, path: str | os.PathLike[str]) -> Path:
    """A path that a caller gave, with `~` expanded; nothing need be there.

    Args:
        name: Name of the argument, for the error.
        path: What was given.

    Raises:
        ConfigError: no file system has such a path: a part of it or the whole is too long, it holds a NUL or an
            unpaired surrogate; or there is no such user.
    """
    try:
        text = os.fspath(path)
    except TypeError as error:
        raise ConfigError(f"{name} is a {type(path).__name__}; expected a path, as text or a Path.") from error
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {text!r}, a path of {type(text).__name__}; expected text or a Path.")
    fault = _fault(text)
    if fault is not None:
        shown = repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"
        raise ConfigError(
            f"{name} is {shown}, a path with {fault}; expected one that a file system can hold: at most "
            f"{MAX_PART_BYTES} bytes between two slashes, and {MAX_PATH_BYTES} in all."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{name} is {text!r}, and no home folder is known for that user; expected a whole path."
        ) from error


def _fault(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character"
    try:
        parts = [len(os.fsencode(part)) for part in text.split("/")]
    except UnicodeEncodeError:
        return "an unpaired surrogate, which is no character"
    if max(parts) > MAX_PART_BYTES:
        return f"a part of {max(parts)} bytes"
    whole = sum(parts) + len(parts) - 1
    return f"{whole} bytes" if whole > MAX_PATH_BYTES else None


def require_regular(path: Path) -> None:
    """Refuse what is no regular file; a link to one is taken.

    Raises:
        NotRegularError: it is a named pipe, a socket or a device.
        OSError: it is a folder, or nothing is there.
    """
    _require_regular(path.stat().st_mode, path)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never waits for somebody to write.

    Raises:
        NotRegularError: it is a named pipe, a socket or a device.
        OSError: it is a folder, or cannot be opened.
    """
    # Before it is opened, since opening a device may do something; and after, since it may have been replaced.
    require_regular(path)
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  # the caller's
    try:
        _require_regular(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path) -> bytes:
    """The contents of a regular file, with the errors of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")
    raise NotRegularError(EINVAL, f"it is a {kind}, not a regular file", str(path))

"""Atomic writes: files and folders that are always either complete or absent, and survive a power failure."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from meam_policy.errors import ConfigError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "delete_folder",
    "flush_to_disk",
    "given_folder",
    "move_folder",
    "write_atomically",
]


def given_folder(name: str, folder: str | os.PathLike[str]) -> Path:
    """Path of a folder that a caller gave, with `~` expanded.

    Args:
        name: Name of the argument, for the error.
        folder: What was given; the folder need not exist.

    Raises:
        ConfigError: it is empty text, which would be the current folder, or neither text nor a path.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder).strip():
        raise ConfigError(
            f'{name} is {folder!r}; expected the path of a folder, as text or a Path. The current folder is ".".'
        )
    return Path(folder).expanduser()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that always has either its old or its new content.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path`, which takes its place when the block ends without an exception.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, replace: bool = False, last: str = "") -> Iterator[Path]:
    """Make a hidden folder beside `folder`, which takes its place when the block ends without an exception.

    If `folder` exists and is empty (it may be a working directory), the contents are moved into it one by one.

    Args:
        folder: Folder to create, with its parents.
        replace: Delete a folder there that is not empty; otherwise it is refused.
        last: Name of the entry that is moved last into an empty folder, to mark the contents as complete.

    Yields:
        The hidden folder, to be filled with files and folders.

    Raises:
        OSError: something cannot be written, or the place is taken.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _flush_all(temporary)  # before anything is deleted for it
        if folder.is_dir() and not any(folder.iterdir()):
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                path.rename(folder / path.name)
            flush_to_disk(folder)
        else:
            if replace and folder.is_dir():
                delete_folder(folder)
            temporary.rename(folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(folder: Path, destination: Path) -> None:
    """Move a folder to its place once all of it is on the disk.

    Raises:
        OSError: it cannot be moved, or the place is taken.
    """
    _flush_all(folder)
    folder.rename(destination)
    flush_to_disk(destination.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that it is never seen in part.

    Raises:
        OSError: it cannot be deleted.
    """
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def flush_to_disk(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, survives a power failure.

    Raises:
        OSError: the disk is full.
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows flushes no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)

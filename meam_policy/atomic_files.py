"""Atomic writes: files and folders that are always either complete or absent, and survive a power failure."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from meam_policy.errors import ConfigError, MeamError, OutputError
from meam_policy.given_files import given_path

__all__ = [
    "atomic_file",
    "atomic_folder",
    "delete_folder",
    "flush_to_disk",
    "given_folder",
    "move_folder",
    "size_of",
    "write_atomically",
    "write_failure",
    "write_folder",
]


def given_folder(name: str, folder: str | os.PathLike[str]) -> Path:
    """Path of a folder that a caller gave, with `~` expanded.

    Args:
        name: Name of the argument, for the error.
        folder: What was given; the folder need not exist.

    Raises:
        ConfigError: it is empty text, which would be the current folder, neither text nor a path, or a path that no
            file system can hold.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder).strip():
        raise ConfigError(
            f'{name} is {folder!r}; expected the path of a folder, as text or a Path. The current folder is ".".'
        )
    return given_path(name, folder)


def write_failure(error: Exception, folder: Path, needed: int) -> str:
    """Why something could not be written; of a full disk also how many bytes it needs.

    Args:
        error: What the system said, or a library that repeats it in its own words.
        folder: Where it was to be written; need not exist.
        needed: Size of what was to be written, bytes.
    """
    said, code = str(error), getattr(error, "errno", None)
    full = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT) if code == n or os.strerror(n) in said]
    if not full:
        return str(getattr(error, "strerror", None) or error)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"{full[0]}: {needed} bytes are needed, and {shutil.disk_usage(there).free} are free"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder and in those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, replace: bool = False, last: str = "") -> Iterator[Path]:
    """Make a hidden folder beside `folder`, which takes its place when the block ends without an exception.

    If `folder` exists and is empty (it may be a working directory), the contents are moved into it one by one.

    Whatever fails, at whatever step, `folder` is afterwards what it was: absent, empty, or with its old contents. Only
    a process that is killed while it moves contents into an empty folder leaves some of them there, without `last`.

    Args:
        folder: Folder to create, with its parents.
        replace: Delete a folder there that is not empty; otherwise it is refused.
        last: Name of the entry that is moved last into an empty folder, to mark the contents as complete.

    Yields:
        The hidden folder, to be filled with files and folders.

    Raises:
        OSError: something cannot be written, or the place is taken.
    """
    # "." and what ends with ".." have no name beside which there could be another.
    folder = folder.resolve() if ".." in folder.parts else folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    new_parents = [parent for parent in folder.absolute().parents if not parent.exists()]
    with contextlib.ExitStack() as undo:
        for parent in reversed(new_parents):
            undo.callback(_attempt, parent.rmdir)
        shutil.rmtree(temporary, ignore_errors=True)
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _flush_all(temporary)  # before anything is moved away for it
        if folder.is_dir() and not any(folder.iterdir()):
            _fill(folder, temporary, last, undo)
        else:
            _put_in_place(folder, temporary, replace, undo)
        flush_to_disk(folder.parent)
        undo.pop_all()
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    failure: str,
    *,
    last: str = "",
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder of files, whole or not at all.

    Args:
        folder: Folder to write; must be empty or not exist.
        files: Contents, by name.
        failure: What the message says before the reason, such as "The policy folder arm cannot be written".
        last: As in `atomic_folder`.
        check: Called with the folder before it is in its place; what it raises keeps it from being written.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with atomic_folder(folder, last=last) as hidden:
            for name, data in files.items():
                (hidden / name).write_bytes(data)
            if check is not None:
                check(hidden)
    except MeamError:  # of the check, among them some that are OSErrors too
        raise
    except OSError as error:
        reason = write_failure(error, folder, sum(map(len, files.values())))
        raise OutputError(f"{failure}: {reason}.") from error


def _fill(folder: Path, temporary: Path, last: str, undo: contextlib.ExitStack) -> None:
    """Move the contents of one folder into another one, which is empty."""
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
        path.rename(folder / path.name)
        undo.callback(_attempt, _delete, folder / path.name)  # only now: it is not somebody else's
    flush_to_disk(folder)


def _put_in_place(folder: Path, temporary: Path, replace: bool, undo: contextlib.ExitStack) -> None:
    """Rename a folder, where there is none or in place of one that is kept beside it."""
    if replace and folder.is_dir():
        aside = _aside(folder)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        undo.callback(_attempt, aside.rename, folder)
    temporary.rename(folder)
    undo.callback(_attempt, folder.rename, temporary)


def _attempt(action: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(OSError):
        action(*arguments)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _aside(folder: Path) -> Path:
    """Where a folder is renamed to before it is deleted."""
    return folder.with_name(f".{folder.name}.deleted")


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
    hidden = _aside(folder)
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

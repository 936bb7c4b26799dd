"""Recorded transitions, converted once into memory-mapped arrays beside their source.

A cache is a folder `.meam-cache/<source>/<key>/` next to the source or, if that location is not writable, in the user's
cache folder (`XDG_CACHE_HOME`, by default ~/.cache). It holds a plain .npy file per column and `metadata.json`. The key
is a hash of everything that determines the result: the version of this format, the settings of the conversion, and each
source file's name, size, modification time (mtime) and change time (ctime).

The contents are not hashed: for 20 GB that takes minutes, the very time that the cache is meant to save. Only the
system can set the ctime, so an edit is noticed even if a tool restored the mtime, and an archive cannot bring along a
cache that passes for ours. The price is a new conversion after a copy or a chmod.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
import numpy as np
from numpy.typing import NDArray

from meam_policy.atomic_files import atomic_folder
from meam_policy.errors import DatasetError, MeamError

__all__ = [
    "COLUMNS",
    "Columns",
    "Recording",
    "array_blocks",
    "cache_place",
    "fingerprint",
    "in_memory",
    "moments",
    "open_cached",
    "rows_per_block",
]

FORMAT_VERSION = 5
"""Version of the cache's file format, and of the checks that data pass before they are cached."""

COLUMNS = {
    "observations": "<f4",
    "actions": "<f4",
    "rewards": "<f4",
    "next_observations": "<f4",
    "terminations": "|b1",
    "episode_ends": "|b1",
}
"""Columns of a recording, one row per transition, and their element types, in the order of the fingerprint.

Observations are stored twice, before and after the action: this doubles the size, but each array can be indexed
directly.
"""

BLOCK_NUMBERS = 2**21
"""Numbers of each column that are held in memory at a time."""

T = TypeVar("T")
Columns = Mapping[str, NDArray[Any]]


class Recording(NamedTuple):
    """Checked transitions, read from a source.

    Attributes:
        about: Their spaces and origin, as JSON data.
        blocks: Blocks of consecutive rows of all `COLUMNS`, in order; can be iterated once.
    """

    about: dict[str, Any]
    blocks: Iterable[Columns]


def rows_per_block(numbers_per_row: int) -> int:
    """Rows per block; a multiple of eight, so that flags packed block by block equal those packed as a whole."""
    return max(8, BLOCK_NUMBERS // max(numbers_per_row, 1) // 8 * 8)


def array_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut an array [n, …] into blocks of rows."""
    step = rows_per_block(array[:1].size)
    return (array[start : start + step] for start in range(0, len(array), step))


def fingerprint(columns: Mapping[str, Iterable[NDArray[Any]]]) -> str:
    """SHA-256 of all recorded numbers, in hexadecimal.

    Args:
        columns: Blocks of rows of all `COLUMNS`, divided as by `array_blocks`.
    """
    digest = hashlib.sha256()
    for name, dtype in COLUMNS.items():
        for block in columns[name]:
            flags = np.dtype(dtype).kind == "b"
            digest.update((np.packbits(block) if flags else np.ascontiguousarray(block, dtype=dtype)).data)
    return digest.hexdigest()


def moments(blocks: Callable[[], Iterable[NDArray[np.float32]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each column [columns], computed in float64.

    Args:
        blocks: Starts a pass over the rows [n, columns]; called several times.
    """
    rows = sum(len(block) for block in blocks())
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks()) / rows
    variance = sum(np.square(block - mean).sum(axis=0) for block in blocks()) / rows
    return np.asarray(mean), np.sqrt(variance)


def open_cached(
    source: Path,
    files: Sequence[Path],
    settings: Sequence[str | None],
    read: Callable[[], Recording],
    make: Callable[[dict[str, Any], Columns], T],
) -> T:
    """Open a source's cache; write it first if it is missing, outdated or broken.

    If no cache can be written, a warning is issued and the data are held in memory.

    Args:
        source: Absolute path of the file or folder that is converted.
        files: All files that it consists of.
        settings: Everything else that determines the result.
        read: Starts the conversion.
        make: Makes the result from `Recording.about` and the memory-mapped columns. For columns from a cache, `about`
            also has their "fingerprint" and the observations' "moments".

    Raises:
        DatasetError: the source changed while it was read.
    """
    stamps = _stamps(source, files)
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, list(settings), stamps]).encode()).hexdigest()
    places = _places(source)
    for place in places:
        found = _load(place / key, make)
        if found is not None:
            return found
    refusals = []
    for place in places:
        try:
            with _locked(place):
                found = _load(place / key, make)  # another process may have written it while this one waited
                if found is None:
                    _remove_old(place, stamps)
                    _write(place / key, stamps, read, lambda: _stamps(source, files))
                    found = _load(place / key, make)
        except MeamError:
            raise
        except (OSError, NotImplementedError) as error:  # filelock raises the latter where a file system has no locks
            refusals.append(f"{place.parent} ({getattr(error, 'strerror', None) or error})")
        else:
            assert found is not None
            return found
    warnings.warn(
        f"{source} is held in memory and converted again each time: its arrays can be cached neither in "
        f"{' nor in '.join(refusals)}. Free space there, or set XDG_CACHE_HOME to a folder with space.",
        stacklevel=4,
    )
    recording = read()
    columns = in_memory(recording.blocks)  # only then the description is complete
    return make(recording.about, columns)


def cache_place(array: NDArray[Any]) -> Path | None:
    """Folder that has the cache of a column or of a part of it, beside its source; None if it is in memory."""
    file = getattr(array, "filename", None) if isinstance(array, np.memmap) else None
    return None if file is None else Path(file).parents[3]


def _stamps(source: Path, files: Sequence[Path]) -> list[list[Any]]:
    stamps = []
    for file in sorted(files):
        stat = file.stat()
        stamps.append([file.relative_to(source.parent).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return stamps


def _places(source: Path) -> list[Path]:
    """Folders in which the source's caches may be, the preferred one first."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().resolve()
    name = f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    return [source.parent / ".meam-cache" / source.name, user / "meam-policy" / name]


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Create a folder for caches, and lock it against other processes."""
    place.mkdir(parents=True, exist_ok=True)
    if place.resolve() != place:
        raise OSError(f"it links to {place.resolve()}")  # old caches are deleted here, but never through a link
    with filelock.FileLock(place / ".lock"):
        yield


def _load(folder: Path, make: Callable[[dict[str, Any], Columns], T]) -> T | None:
    """Memory-map a cache's columns; None if the cache is missing or damaged."""
    if not folder.is_dir():
        return None
    try:
        if any(path.is_symlink() for path in (folder, *folder.iterdir())):
            return None
        metadata = json.loads((folder / "metadata.json").read_bytes())
        columns = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in COLUMNS}
        seen = {name: [array.dtype.str, list(array.shape)] for name, array in columns.items()}
        return make(metadata["about"], columns) if seen == metadata["columns"] else None
    except Exception:  # json, mmap and NumPy raise many kinds of errors for a broken file, which is then rewritten
        return None


def _remove_old(place: Path, stamps: list[list[Any]]) -> None:
    """Delete remnants of interrupted conversions, and caches of earlier versions of the source."""
    for folder in place.iterdir():
        if folder.name.endswith((".tmp", ".deleted")) or (
            re.fullmatch("[0-9a-f]{64}", folder.name) and _recorded_stamps(folder) != stamps
        ):
            shutil.rmtree(folder, ignore_errors=True)  # Windows cannot delete files that are mapped


def _recorded_stamps(folder: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return json.loads((folder / "metadata.json").read_bytes())["files"]
    return None


def _write(
    folder: Path, stamps: list[list[Any]], read: Callable[[], Recording], stamps_now: Callable[[], list[list[Any]]]
) -> None:
    """Convert a source; the cache appears complete or not at all."""
    with atomic_folder(folder, replace=True) as partial:  # an existing one is broken
        about, blocks = read()
        with contextlib.ExitStack() as stack:
            columns = {
                name: stack.enter_context(_ColumnFile(partial / f"{name}.npy", dtype))
                for name, dtype in COLUMNS.items()
            }
            for block in blocks:
                for name, column in columns.items():
                    column.append(block[name])
        if stamps_now() != stamps:
            raise DatasetError(
                f"{folder.parent.name} changed while it was read; expected complete files. Open it again when they are."
            )
        mean, std = moments(lambda: _file_blocks(partial / "observations.npy"))
        numbers = fingerprint({name: _file_blocks(partial / f"{name}.npy") for name in COLUMNS})
        metadata = {
            "files": stamps,
            "columns": {name: [column.dtype.str, list(column.shape)] for name, column in columns.items()},
            "about": {**about, "fingerprint": numbers, "moments": [mean.tolist(), std.tolist()]},
        }
        (partial / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")


class _ColumnFile:
    """An .npy file to which blocks of rows are appended."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.shape: tuple[int, ...] = (0,)
        self._file = path.open("wb")

    def __enter__(self) -> _ColumnFile:
        return self

    def __exit__(self, *failure: object) -> None:
        with self._file:
            if failure[0] is None:
                self._write_header()

    def append(self, block: NDArray[Any]) -> None:
        """Append rows [rows, …]; the shape of a row is the same in all calls."""
        rows = self.shape[0]
        self.shape = (rows + len(block), *block.shape[1:])
        if rows == 0:
            self._write_header()
        self._file.write(np.ascontiguousarray(block, dtype=self.dtype).data)

    def _write_header(self) -> None:
        # NumPy pads the header so that its length does not change when the first axis grows.
        self._file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _file_blocks(path: Path) -> Iterator[NDArray[Any]]:
    """Blocks of a column's rows, divided as by `array_blocks`."""
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    step, rows = rows_per_block(whole[:1].size), len(whole)
    del whole
    for start in range(0, rows, step):
        # Mapped afresh for each block: pages that were read count towards this process's memory until unmapped.
        yield np.load(path, mmap_mode="r", allow_pickle=False)[start : start + step]


def in_memory(blocks: Iterable[Columns]) -> Columns:
    """Join blocks of rows of all `COLUMNS` in memory."""
    parts = list(blocks)
    return {
        name: np.concatenate([np.asarray(part[name], dtype=dtype) for part in parts]) for name, dtype in COLUMNS.items()
    }

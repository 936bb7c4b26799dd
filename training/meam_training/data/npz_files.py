"""Reading `.npz` files block by block without trusting them: nothing is unpickled, and claimed sizes are checked."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import DatasetError, MeamError

__all__ = ["NpzFile", "NpzMember"]

MAX_COMPRESSION = 1100
"""Largest compression ratio accepted; deflate, the strongest filter of `.npz` files, reaches 1032."""


class NpzFile:
    """An open `.npz` file; a context manager.

    Attributes:
        names: Names of its arrays.

    Raises:
        DatasetError: it is not an `.npz` file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._opened = path, contextlib.ExitStack()
        with _reading(path):
            self._archive = self._opened.enter_context(zipfile.ZipFile(path))
            self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *failure: object) -> None:
        self._opened.close()

    def open(self, name: str) -> NpzMember:
        """Start reading an array; several may be read at the same time.

        Raises:
            DatasetError: the member is missing, not a plain array, or claims more bytes than it can hold.
        """
        with _reading(self._path):
            entry = self._archive.getinfo(f"{name}.npy")
            return NpzMember(self._opened.enter_context(self._archive.open(entry)), entry, self._path)


class NpzMember:
    """An array of an `.npz` file, read sequentially by rows.

    Attributes:
        shape: Shape of the array.
        dtype: Element type of the array.
    """

    def __init__(self, file: IO[bytes], entry: zipfile.ZipInfo, path: Path) -> None:
        if entry.file_size > MAX_COMPRESSION * entry.compress_size:
            raise DatasetError(
                f"{path}: {entry.filename} claims {entry.file_size} bytes and stores {entry.compress_size}, so it is "
                "refused: it would fill the disk with nothing. Record the data again."
            )
        self._path, self._file = path, file
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        self.shape, column_major, self.dtype = readers[np.lib.format.read_magic(self._file)](self._file)
        size = self.dtype.itemsize * math.prod(self.shape)
        if self.dtype.hasobject or self._file.tell() + size != entry.file_size:
            raise ValueError(f"{entry.filename} has type {self.dtype}, shape {self.shape} and {entry.file_size} bytes")
        self._whole: NDArray[Any] | None = None
        if column_major and len(self.shape) > 1:  # rows are not contiguous
            self._whole = np.frombuffer(self._file.read(size), self.dtype).reshape(self.shape[::-1]).T

    def read(self, rows: int) -> NDArray[Any]:
        """Read the next rows [rows, …], or as many as are left.

        Raises:
            DatasetError: the file is broken.
        """
        with _reading(self._path):
            if self._whole is not None:
                block, self._whole = self._whole[:rows], self._whole[rows:]
                return block
            content = self._file.read(rows * self.dtype.itemsize * math.prod(self.shape[1:]))
            return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except MeamError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds of errors for a broken file
        raise DatasetError(f"{path} is not an .npz file of plain arrays: {error!r}.") from error

"""Parquet files from elsewhere, of which single columns are read as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import DatasetError, MeamError
from meam_policy.extras import needs
from meam_policy.given_files import open_regular
from meam_training.data.hdf5_files import MAX_COMPRESSION

__all__ = ["read_columns", "require_pyarrow"]


def require_pyarrow() -> None:
    """Check that Arrow and Parquet files can be read.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    with needs("Reading Arrow and Parquet files", "pyarrow", "arrow"):
        import pyarrow.parquet  # noqa: F401


def read_columns(file: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[Any]]:
    """Read columns of numbers; no other column is decoded.

    Args:
        file: The file.
        shapes: Shape of a row of every column by name; () for single numbers.

    Returns:
        Arrays [rows, *shape] by name.

    Raises:
        DatasetError: the file is missing, no Parquet file, or claims far more rows than it can hold; or a column is
            missing, has gaps, or rows of another shape.
    """
    import pyarrow.parquet

    if not file.is_file():
        raise DatasetError(f"{file} is missing; expected every file of the data set. Copy or download it again.")
    with open_regular(file) as opened:
        if opened.read(23) == b"version https://git-lfs":
            raise DatasetError(f"{file} is a git-lfs pointer, not the file. Run `git lfs pull`.")
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            missing = [name for name in shapes if name not in parquet.schema_arrow.names]
            if missing:
                held = ", ".join(parquet.schema_arrow.names)
                raise DatasetError(f"{file} has no column {missing[0]}; it has {held}.")
            rows = parquet.metadata.num_rows
            claimed = 8 * rows * sum(int(np.prod(shape)) for shape in shapes.values())
            if claimed > MAX_COMPRESSION * file.stat().st_size:
                raise DatasetError(
                    f"{file} claims {claimed} bytes and stores {file.stat().st_size}, so it is refused: it would fill "
                    "the memory with nothing. Record the data again."
                )
            table = parquet.read(columns=list(shapes))
            return {name: _array(table.column(name), tuple(shape), f"{file}: {name}") for name, shape in shapes.items()}
    except MeamError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for a broken file
        raise DatasetError(f"{file} is not a Parquet file: {error!r}. Copy or download it again.") from error


def _array(column: Any, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    import pyarrow

    values, rows = column.combine_chunks(), len(column)
    values = values.combine_chunks() if isinstance(values, pyarrow.ChunkedArray) else values
    while (
        pyarrow.types.is_list(values.type)
        or pyarrow.types.is_fixed_size_list(values.type)
        or (pyarrow.types.is_large_list(values.type))
    ):
        if values.null_count:
            raise DatasetError(f"{name} has gaps; expected numbers in every row. Record the data again.")
        values = values.flatten()
    if values.null_count:
        raise DatasetError(f"{name} has gaps; expected numbers in every row. Record the data again.")
    kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    if not any(is_kind(values.type) for is_kind in kinds):
        raise DatasetError(f"{name} holds {values.type}; expected numbers.")
    flat = values.to_numpy(zero_copy_only=False)
    size = int(np.prod(shape))
    if len(flat) != rows * size:
        raise DatasetError(f"{name} has {len(flat)} numbers in {rows} rows; expected {size} in every row.")
    return flat.reshape(rows, *shape)

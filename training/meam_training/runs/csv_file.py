"""A CSV file with one row per step."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from meam_policy.atomic_files import flush_to_disk, write_atomically
from meam_policy.given_files import read_regular

__all__ = ["CsvFile", "read_rows"]


class CsvFile:
    """A CSV file with one row per step, created with its first row."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self._path, self._columns = path, ("step", *columns)
        if path.is_file():
            kept = [row for row in whole_rows(path) if int(row["step"]) <= step]
            # By name: a newer version may have more columns.
            lines = [self._columns, *([row.get(name, "") for name in self._columns] for row in kept)]
            write_atomically(path, "".join(",".join(line) + "\n" for line in lines))

    def has(self, step: int) -> bool:
        """Whether there is a row for the step."""
        return self._path.is_file() and any(int(row["step"]) == step for row in whole_rows(self._path))

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row; the cells of missing columns stay empty."""
        lines = [] if self._path.is_file() else [self._columns]
        lines.append((str(step), *(f"{row[name]:.9g}" if name in row else "" for name in self._columns[1:])))
        with self._path.open("a", newline="", encoding="utf-8") as file:
            file.write("".join(",".join(line) + "\n" for line in lines))

    def flush(self) -> None:
        """Flush the rows to disk."""
        if self._path.is_file():
            flush_to_disk(self._path)


def whole_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file, without a last one that was only partly written."""
    lines = read_regular(path).decode().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [row for row in csv.DictReader(lines) if None not in row.values() and (row.get("step") or "").isdigit()]


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read the numbers of a file's rows, each with its `step`; empty cells are left out. A missing file has none."""
    rows = whole_rows(path) if path.is_file() else []
    return [{name: float(value) for name, value in row.items() if value} for row in rows]

"""The format of a benchmark's report, shared by training and inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Section", "markdown_report", "three_digits"]


class Section(NamedTuple):
    """Measurements in one setting.

    Attributes:
        name: Name of the setting.
        sizes: Line that describes the setting and how it was measured.
        columns: Column headings of the table.
        rows: Cells of the table, one row per contestant.
        notes: Lines below the table.
    """

    name: str
    sizes: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def markdown_report(about: Mapping[str, Any], sections: Iterable[Section]) -> str:
    """Format the tables as Markdown, below a line that describes the machine and the date."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    for section in sections:
        lines += [f"## {section.name}", "", section.sizes, ""]
        lines += [_row(section.columns), "|---|" + "---:|" * (len(section.columns) - 1)]
        lines += [*map(_row, section.rows), ""]
        lines += [*(f"- {note}" for note in section.notes), ""]
    return "\n".join(lines)


def three_digits(value: float) -> str:
    """Format a number with three significant digits, but with all digits before the decimal point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

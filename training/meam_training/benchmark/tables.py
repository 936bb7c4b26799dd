"""The form of a benchmark's report, the same for training and inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Section", "markdown_report", "three_digits"]


class Section(NamedTuple):
    """What was measured in one setting.

    Attributes:
        name: The setting.
        sizes: One line on it, and on how it was measured.
        columns: Heads of the table.
        rows: Its cells, a row per contestant.
        notes: Lines below the table.
    """

    name: str
    sizes: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def markdown_report(about: Mapping[str, Any], sections: Iterable[Section]) -> str:
    """The tables as Markdown, under a line on the machine and the day that they belong to."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    for section in sections:
        lines += [f"## {section.name}", "", section.sizes, ""]
        lines += [_row(section.columns), "|---|" + "---:|" * (len(section.columns) - 1)]
        lines += [*map(_row, section.rows), ""]
        lines += [*(f"- {note}" for note in section.notes), ""]
    return "\n".join(lines)


def three_digits(value: float) -> str:
    """A number with three significant digits, and with all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

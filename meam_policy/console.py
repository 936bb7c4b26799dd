"""What the commands print: progress and errors to stderr, results to stdout.

All text is made `printable` here, as one line. What has several gives a list of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from meam_policy.terminal_text import printable

SILENCE = 600.0
"""Longest silence on a stderr that is no terminal, seconds."""
SHORT = 32
"""Longest cell that a table never folds, characters."""

__all__ = [
    "duration",
    "print_json",
    "print_lines",
    "print_mapping",
    "print_table",
    "progress_bar",
    "readable",
    "say",
    "say_mapping",
    "terminal_width",
]


def readable(value: object) -> Text:
    """A value as plain text: rich takes what stands in square brackets for its markup. A list is one of lines."""
    return Text("\n".join(map(printable, value if isinstance(value, list) else [value])))


def say(*lines: str) -> None:
    """Print lines to stderr: a progress message."""
    _say_drawn(map(printable, lines))


def _say_drawn(lines: Iterable[str]) -> None:
    # Not by a console of its own, which would write into the line of a progress bar that is being shown.
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def print_lines(*lines: str) -> None:
    """Print lines to stdout."""
    sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
    sys.stdout.flush()


def say_mapping(rows: Mapping[str, object]) -> None:
    """Print names and values to stderr, long values in lines below each other."""
    console = Console(stderr=True, highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(readable(name), readable(value))
    with console.capture() as captured:
        console.print(table)
    _say_drawn(line.rstrip() for line in captured.get().splitlines())


def duration(seconds: float) -> str:
    """A time in words, rounded: 40 s, 4 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_json(data: Mapping[str, Any]) -> None:
    """Print one line of JSON to stdout, for programs."""
    sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_mapping(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values to stdout."""
    print_table(title, ["", ""], [[name, value] for name, value in rows.items()])


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, folded: Collection[str] = ()
) -> None:
    """Print a table to stdout; columns after the first are right-aligned if they hold numbers.

    Columns of short cells keep them whole: a table of such columns only gets closer set, then wider than the terminal.

    Args:
        title: Title; empty for none.
        columns: Names of the columns.
        rows: Their cells.
        folded: Columns whose cells are folded, between words if possible, where the table is wider than the terminal.
    """
    console = Console(highlight=False)
    table = Table(
        title=readable(title), title_justify="left", show_header=any(columns), show_edge=False, pad_edge=False
    )
    cells = [[readable(cell) for cell in row] for row in rows]
    folds = False
    for index, column in enumerate(columns):
        numeric = all(row[index].plain[:1] in "-0123456789" for row in cells)
        short = column not in folded and all(cell_len(row[index].plain) <= SHORT for row in cells)
        folds |= not short
        table.add_column(column, justify="right" if index and numeric else "left", overflow="fold", no_wrap=short)
    for row in cells:
        table.add_row(*row)
    if (folded or not folds) and _unfolded(table) > console.width:
        table.padding = 0
        if not folds:
            console.width = max(console.width, _unfolded(table))
    console.print(table)


def terminal_width() -> int:
    """Width of the terminal, characters; 80 where there is none."""
    return Console().width


def _unfolded(table: Table) -> int:
    """Width at which no cell is folded, characters."""
    return Console(width=100_000).measure(table).maximum


@contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; a few lines if it is no terminal.

    Args:
        description: Description of the work.
        total: Units of work.
        done: Units done before; the remaining time is estimated without them.
        quiet: Show nothing.

    Yields:
        A function to call with the units done so far, and optionally a `note` of one line to show and the seconds
        `left`, where the caller knows better than that all units take the same time.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with _NotedProgress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(escape(printable(description)), total=total, completed=done, note="", left=None)
        tenths, reported = 10 * done // max(total, 1), time.monotonic()

        def advance(done: int, note: str = "", left: float | None = None) -> None:
            nonlocal tenths, reported
            progress.update(task, completed=done, note=printable(note), left=left)
            due = 10 * done // total > tenths or time.monotonic() - reported > SILENCE
            if progress.disable and not quiet and due:
                tenths, reported = 10 * done // total, time.monotonic()
                remaining = f"about {duration(left)} left" if left and done < total else ""
                say(", ".join(filter(None, (f"{description}: {done} of {total}", remaining, note))))

        yield advance


class _TimeLeft(TimeRemainingColumn):
    """Time left, as the caller knows it or as the speed up to now suggests."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        if left is None or task.finished:
            return super().render(task)
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.remaining")


class _NotedProgress(Progress):
    """Progress bars with the first one's note on a line of its own: beside the bar it would not fit."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.tasks and self.tasks[0].fields["note"]:
            yield Text(self.tasks[0].fields["note"], style="dim", no_wrap=True, overflow="ellipsis")

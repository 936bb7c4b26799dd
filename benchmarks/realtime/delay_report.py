"""The table and the picture of a comparison: every figure against the delay, a line for each kind of chunking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from episodes import EpisodeFigures
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meam_policy.loop.chunk_schedule import Chunking
from meam_policy.rollouts.result import mean_interval

__all__ = [
    "CHUNKINGS",
    "MEASURES",
    "CellFigures",
    "Mean",
    "cell_figures",
    "draw_delays",
    "gain_table",
    "markdown_table",
]

CHUNKINGS: tuple[Chunking, ...] = ("naive", "blocking", "realtime")
MEASURES = ("success", "episode_return", "length", "jerk", "boundary_jump", "inner_jump", "missed")

# Told apart without colour too; "blocking" and "naive" are one policy at delay 0, so their markers must not hide.
_STYLES: dict[Chunking, dict[str, Any]] = {
    "naive": {"color": "#b45309", "marker": "s", "linestyle": "--"},
    "blocking": {"color": "#6b7280", "marker": "^", "linestyle": ":"},
    "realtime": {"color": "#2563eb", "marker": "o", "linestyle": "-"},
}
_PANELS = {
    "jerk": "jerk: mean squared second difference\n(holding still lowers it)",
    "boundary_jump": "jump where a new chunk begins\n(thin grey: between other actions)",
    "episode_return": "return",
    "missed": "ticks without an action of a chunk",
}


class Mean(NamedTuple):
    """A mean over episodes, and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CellFigures:
    """All episodes of one chunking at one delay.

    Attributes:
        chunking: How chunks followed each other.
        delay: Ticks that every inference took.
        means: By measure, over the episodes that have it; measures that none has are missing.
        waiting: Ticks of all episodes that "blocking" waited.
        overruns: Ticks of all episodes for which no chunk had an action.
    """

    chunking: Chunking
    delay: int
    means: dict[str, Mean]
    waiting: int
    overruns: int


def cell_figures(runs: Sequence[EpisodeFigures]) -> CellFigures:
    """Summarise the episodes of one cell, at least one."""
    means = {}
    for name in MEASURES:
        values = np.array([attrgetter(name)(run) for run in runs], dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            means[name] = Mean(float(values.mean()), *mean_interval(values))
    waiting, overruns = sum(run.waiting for run in runs), sum(run.overruns for run in runs)
    return CellFigures(runs[0].chunking, runs[0].delay, means, waiting, overruns)


def markdown_table(cells: Sequence[CellFigures]) -> str:
    """Write a row for each cell; "none" for a measure that no episode has."""
    header = "delay | chunking | success | return | length | jerk | boundary jump | other jumps | waiting | overruns"
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    for cell in cells:
        shown = [
            _shown(cell, "success", "{:.0%}", interval=False),
            _shown(cell, "episode_return", "{:.1f}"),
            _shown(cell, "length", "{:.0f}", interval=False),
            _shown(cell, "jerk", "{:.3f}"),
            _shown(cell, "boundary_jump", "{:.3f}"),
            _shown(cell, "inner_jump", "{:.3f}", interval=False),
        ]
        row = [str(cell.delay), cell.chunking, *shown, str(cell.waiting), str(cell.overruns)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def gain_table(runs: Sequence[EpisodeFigures]) -> str:
    """Write by how much the return of "realtime" is higher, a row for each delay at which all three were run.

    Episodes of one number begin in one state: the intervals are of the mean of their differences.
    """
    returns = {(run.chunking, run.delay, run.episode): run.episode_return for run in runs}
    count = 1 + max(run.episode for run in runs)
    lines = ["| delay | realtime - naive | realtime - blocking |", "|---|---|---|"]
    for delay in sorted({run.delay for run in runs}):
        if any((chunking, delay, 0) not in returns for chunking in CHUNKINGS):
            continue
        gains = []
        for other in ("naive", "blocking"):
            pairs = [(returns["realtime", delay, i], returns[other, delay, i]) for i in range(count)]
            gain = np.array([realtime - reference for realtime, reference in pairs])
            low, high = mean_interval(gain)
            gains.append(f"{gain.mean():.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {delay} | {' | '.join(gains)} |")
    return "\n".join(lines)


def _shown(cell: CellFigures, name: str, form: str, interval: bool = True) -> str:
    if name not in cell.means:
        return "none"
    mean, low, high = (form.format(value) for value in cell.means[name])
    return f"{mean} [{low}, {high}]" if interval else mean


def draw_delays(cells: Sequence[CellFigures], title: str, file: Path) -> None:
    """Draw the panels into a PNG, with 95 % intervals."""
    figure = Figure(figsize=(13.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for axes, (name, label) in zip(panels, _PANELS.items(), strict=True):
        for shift, chunking in enumerate(CHUNKINGS):
            _draw_line(axes, [cell for cell in cells if cell.chunking == chunking], name, (shift - 1) * 0.07)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("inference latency, control steps")
        axes.set_xticks(sorted({cell.delay for cell in cells}))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "episode_return":
            axes.set_ylim(bottom=0)
    panels[-1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110)


def _draw_line(axes: Axes, cells: Sequence[CellFigures], name: str, shift: float) -> None:
    found = [(cell.delay, *cell.means[name]) for cell in cells if name in cell.means]
    if not found:
        return
    delays, means, lows, highs = np.array(found).T
    style = _STYLES[cells[0].chunking]
    axes.errorbar(
        delays + shift,
        means,
        yerr=np.maximum(0.0, [means - lows, highs - means]),
        markersize=5,
        linewidth=1.3,
        elinewidth=0.8,
        label=cells[0].chunking,
        **style,
    )
    inner = [(cell.delay, cell.means["inner_jump"].mean) for cell in cells if "inner_jump" in cell.means]
    if name == "boundary_jump" and inner:
        axes.plot(*np.array(inner).T, linestyle=style["linestyle"], color="#9ca3af", linewidth=0.8)

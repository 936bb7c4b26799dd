"""The picture of a data report: lengths, returns, and the ranges of actions and observations."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from meam_policy.extras import needs
from meam_training.data.data_report import DataReport, NumberRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["data_figure", "draw_report"]

BLUE, RED = "#2563eb", "#b91c1c"
MOST_BINS = 40
MOST_LABELS = 24


def draw_report(report: DataReport) -> bytes:
    """Draw a report as a PNG; see `data_figure`."""
    image = io.BytesIO()
    data_figure(report).savefig(image, format="png", dpi=110)
    return image.getvalue()


def data_figure(report: DataReport) -> Figure:
    """Draw a report: two histograms of the episodes, and the values of every number within its box.

    Args:
        report: The report; a quick one has no panel of observations.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs("A picture of the data", "matplotlib", "viz"):
        from matplotlib.figure import Figure
    panels = 3 if report.observations is None else 4
    figure = Figure(figsize=(4.2 * panels, 4.4), layout="constrained")
    lengths, returns, actions, *rest = figure.subplots(1, panels)
    _histogram(lengths, report.lengths, "steps of an episode")
    lengths.axvline(report.chunks.chunk_size, color=RED, linestyle="--", label=f"chunk of {report.chunks.chunk_size}")
    lengths.legend(frameon=False, fontsize=8)
    _histogram(returns, report.returns, "return of an episode")
    _within_boxes(actions, report.actions)
    for axes in rest:
        _spans(axes, report.observations or ())
    name = report.dataset_id or "data"
    figure.suptitle(f"{name}: {report.rows} rows in {report.episodes} episodes", fontsize=11)
    return figure


def _histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    least, greatest = float(values.min()), float(values.max())
    # Lengths are whole numbers, and so are the widths of their bins.
    width = max(1.0, np.ceil((greatest - least) / MOST_BINS)) if values.dtype.kind == "i" else 0.0
    edges = np.arange(least - 0.5, greatest + width, width).tolist() if width else MOST_BINS
    axes.hist(values, bins=edges, color=BLUE)
    axes.set_xlabel(label)
    axes.set_ylabel("episodes")
    axes.spines[["top", "right"]].set_visible(False)


def _within_boxes(axes: Axes, numbers: tuple[NumberRange, ...]) -> None:
    """One row for each number, over its box from the lower to the upper bound; darker where there are more values."""
    shares = np.array([np.array(n.counts or [0]) / max(1, sum(n.counts)) for n in numbers if n.counts])
    if len(shares):
        # By the root, or a number that stands still would leave all others white.
        axes.imshow(np.sqrt(shares), aspect="auto", cmap="Blues", extent=(0, 1, len(shares) - 0.5, -0.5), vmin=0)
    _names(axes, [n.name for n in numbers if n.counts])
    axes.set_xticks([0, 0.5, 1], ["low", "middle", "high"])
    axes.set_xlabel("within the box")
    axes.set_title("actions", fontsize=10)


def _spans(axes: Axes, numbers: tuple[NumberRange, ...]) -> None:
    """The range of each number on a symmetric logarithmic axis, as units differ."""
    for row, number in enumerate(numbers):
        if number.still:
            axes.plot(number.least, row, "D", color=RED, markersize=4)
        else:
            axes.plot([number.least, number.greatest], [row, row], color=BLUE, linewidth=3, solid_capstyle="butt")
    sizes = [max(abs(number.least), abs(number.greatest)) for number in numbers]
    sizes = [size for size in sizes if size > 0] or [1.0]
    smallest, largest = (int(np.ceil(np.log10(size))) for size in (max(min(sizes), 1e-6), max(max(sizes), 1e-6)))
    axes.set_xscale("symlog", linthresh=10.0**smallest)
    powers = [10.0**power for power in sorted({smallest, (smallest + largest) // 2, largest})]
    ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    _names(axes, [number.name for number in numbers])
    axes.set_xlabel("least to greatest value; red: stands still")
    axes.set_title("observations", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axes: Axes, names: list[str]) -> None:
    step = -(-len(names) // MOST_LABELS) or 1
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)

"""Figures as pictures in a page: sober, legible on a telephone, and without anything that is loaded."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meam_policy.extras import needs
from meam_policy.terminal_text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FAINT",
    "INK",
    "RULE",
    "SMALL",
    "Picture",
    "data_url",
    "new_axes",
    "new_figure",
    "png",
    "shortened",
    "svg",
    "titled",
]

INK, FAINT, RULE = "#374151", "#9ca3af", "#e5e7eb"

SMALL = 3.1
"""Width of a panel of which three stand in a row, inches; the others have `new_axes`' own."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "svg.hashsalt": "meam",  # the same figure has the same bytes
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        url: Data URL of the image.
        alt: What it shows, for those who cannot see it.
        caption: How to read it, in a sentence.
        kind: "panel" and "small" beside others, two or three in a row; "wide" alone.
    """

    url: str
    alt: str
    caption: str
    kind: str = "panel"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: Width, inches.
        height: Height, inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs("The report", "matplotlib", "viz"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(height: float = 2.45, width: float = 3.6) -> Axes:
    """The axes of a figure of one panel, as wide as a telephone shows it legibly."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        axes = new_figure(width, height).add_subplot()
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def titled(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Write a title and the names of the axes, those that are given, in the sizes of the page."""
    if title:
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    if x:
        axes.set_xlabel(x, fontsize=8, color=INK)
    if y:
        axes.set_ylabel(y, fontsize=8, color=INK)


def svg(drawn: Figure | Axes) -> str:
    """A figure, or that of these axes, as a data URL of an SVG, whose letters are paths."""
    import matplotlib as mpl
    from matplotlib.axes import Axes

    figure: Any = drawn.figure if isinstance(drawn, Axes) else drawn
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    return data_url(buffer.getvalue(), "svg+xml")


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def data_url(data: bytes, kind: str) -> str:
    """An image as a data URL.

    Args:
        data: The file.
        kind: What follows "image/" in its media type.
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shortened(text: str, most: int) -> str:
    """Text of a file as a figure shows it: in one line of at most so many characters, and no formula."""
    shown = printable(text)
    return (shown if len(shown) <= most else f"{shown[: most - 1]}…").replace("$", r"\$")

"""The figure of a ladder: error, return and latency against the NFE."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from meam_policy.extras import needs
from meam_policy.spec import VariantSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["PANELS", "draw_ladder", "ladder_figure"]

_COLOURS = {"fp32": "#2563eb", "int8": "#b45309", "fp16": "#7c3aed"}
_MARKERS = {
    "euler": "o",
    "midpoint": "^",
    "heun": "v",
    "ab2": "<",
    "rk4": ">",
    "rtc": "o",
    "grid": "D",
    "one-step": "*",
    "best-of": "s",
}
_OPEN = ("rtc", "grid")
_LINES = {"midpoint": "--", "grid": ":", "rtc": "", "one-step": "", "best-of": ""}
_TOUCHING = 6.0
"""Markers closer than this cover each other, pixels."""
PANELS = {
    "action_error": "difference from policy.onnx\n(rms, share of the half width)",
    "return_mean": "return (95 % interval)",
    "latency_p50_ms": "latency p50, ms (bar to p99)",
}
"""Figures that are drawn, each in a panel of its own, and their titles."""


def draw_ladder(variants: Mapping[str, VariantSpec]) -> bytes:
    """Draw measured variants as a PNG; see `ladder_figure`."""
    image = io.BytesIO()
    ladder_figure(variants).savefig(image, format="png", dpi=110)
    return image.getvalue()


def ladder_figure(variants: Mapping[str, VariantSpec], names: Collection[str] = tuple(PANELS)) -> Figure:
    """Draw measured variants. Where several coincide, each further marker is drawn open around the others.

    Args:
        variants: Measured variants by name; panels for figures that none of them has are left out.
        names: Which of `PANELS` to draw.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs("The ladder", "matplotlib", "export"):
        from matplotlib.figure import Figure
    panels = {
        name: label
        for name, label in PANELS.items()
        if name in names and any(name in v.measured for v in variants.values())
    }
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    legend: dict[str, Line2D] = {}
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        legend |= _draw(axes, name, variants)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("NFE (evaluations of the velocity)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=min(4, 2 + len(panels)),
        fontsize=8,
        frameon=False,
    )
    return figure


@dataclass
class _Point:
    """A variant's marker in a panel."""

    title: str
    kind: str
    precision: str
    nfe: int
    value: float
    low: float
    high: float

    @property
    def filled(self) -> str:
        return "white" if self.kind in _OPEN else _COLOURS[self.precision]


def _points(name: str, variants: Mapping[str, VariantSpec]) -> list[_Point]:
    return [
        _Point(title, _kind(v), v.precision, v.integration.nfe, v.measured[name], *_range(name, v))
        for title, v in variants.items()
        if name in v.measured
    ]


def _draw(axes: Axes, name: str, variants: Mapping[str, VariantSpec]) -> dict[str, Line2D]:
    """Draw a panel; returns its legend, the line style and marker of every label."""
    from matplotlib.lines import Line2D

    points = _points(name, variants)
    _scale(axes, name, variants, points)
    groups: dict[tuple[str, str], list[_Point]] = {}
    for point in sorted(points, key=lambda point: (point.nfe, point.value)):
        groups.setdefault((point.kind, point.precision), []).append(point)
    legend = {}
    for (kind, precision), group in groups.items():
        steps, values = [point.nfe for point in group], [point.value for point in group]
        bars = [[max(0.0, p.value - p.low) for p in group], [max(0.0, p.high - p.value) for p in group]]
        style: dict[str, Any] = {"color": _COLOURS[precision], "linestyle": _LINES.get(kind, "-"), "linewidth": 1}
        axes.errorbar(steps, values, yerr=bars, elinewidth=0.7, **style)
        mark: dict[str, Any] = {"marker": _MARKERS[kind], "markersize": 5, "markerfacecolor": group[0].filled}
        legend[f"{kind}, {precision}"] = Line2D([], [], **style, **mark)
    for point, under in _covered(axes, points):
        axes.plot(
            point.nfe,
            point.value,
            marker=_MARKERS[point.kind],
            markersize=5 + 5 * under,
            clip_on=False,
            markerfacecolor="none" if under else point.filled,
            color=_COLOURS[point.precision],
            linestyle="",
            zorder=4 - 0.1 * under,
        )
        if point.kind == "best-of" and point.precision == "fp32":
            axes.annotate(point.title, (point.nfe, point.value), textcoords="offset points", xytext=(6, 3), fontsize=7)
    return legend


def _scale(axes: Axes, name: str, variants: Mapping[str, VariantSpec], points: Sequence[_Point]) -> None:
    axes.set_xscale("log")
    ticks = sorted({variant.integration.nfe for variant in variants.values()})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] * 0.8, ticks[-1] * 1.6)
    if name == "action_error":
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(0, 2 * max(point.value for point in points) + 1e-4)
    elif name == "latency_p50_ms":
        axes.set_yscale("log")


def _covered(axes: Axes, points: Sequence[_Point]) -> list[tuple[_Point, int]]:
    """Every point with the number of earlier points that it covers."""
    axes.autoscale_view()
    places = [axes.transData.transform((point.nfe, point.value)) for point in points]
    found: list[tuple[_Point, int]] = []
    for index, point in enumerate(points):
        close = [np.hypot(*(places[index] - place)) < _TOUCHING for place in places[:index]]
        found.append((point, sum(close)))
    return found


def _kind(variant: VariantSpec) -> str:
    if variant.one_step:
        return "one-step"
    if variant.takes_prefix:
        return "rtc"
    if "action_error" not in variant.measured:  # its best_of differs from the policy's
        return "best-of"
    return variant.integration.solver if variant.integration.time_grid is None else "grid"


def _range(name: str, variant: VariantSpec) -> tuple[float, float]:
    value = variant.measured[name]
    if name == "return_mean":
        return variant.measured.get("return_low", value), variant.measured.get("return_high", value)
    return (value, variant.measured.get("latency_p99_ms", value)) if name == "latency_p50_ms" else (value, value)

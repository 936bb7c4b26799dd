"""The picture of a ladder: error, return and latency against the number of evaluations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meam_policy.errors import MissingExtraError
from meam_policy.spec import VariantSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_ladder"]

_COLOURS = {"fp32": "#2563eb", "int8": "#b45309", "fp16": "#7c3aed"}
_MARKERS = {"midpoint": "^", "grid": "D", "one-step": "*", "best-of": "s"}
_LINES = {"midpoint": "--", "grid": ":"}
_PANELS = {
    "action_error": "difference from policy.onnx\n(rms, share of the half width)",
    "return_mean": "return (95 % interval)",
    "latency_p50_ms": "latency p50, ms (bar to p99)",
}


def draw_ladder(variants: Mapping[str, VariantSpec]) -> bytes:
    """Draw measured variants as a PNG.

    Args:
        variants: By name, with their figures; panels of which there are none are left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("The ladder needs matplotlib: pip install 'meam-policy[export]'.") from error
    panels = {name: label for name, label in _PANELS.items() if any(name in v.measured for v in variants.values())}
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    legend: dict[str, Any] = {}
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, name, variants)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("evaluations of the velocity")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _draw(axes: Axes, name: str, variants: Mapping[str, VariantSpec]) -> None:
    points: dict[tuple[str, str], list[tuple[int, float, tuple[float, float]]]] = {}
    for title, variant in variants.items():
        if name not in variant.measured:
            continue
        value = variant.measured[name]
        low, high = _range(name, variant)
        group = _kind(variant) if _kind(variant) != "steps" else variant.integration.solver
        points.setdefault((group, variant.precision), []).append((variant.integration.nfe, value, (low, high)))
        if _kind(variant) == "best-of" and variant.precision == "fp32":
            axes.annotate(
                title, (variant.integration.nfe, value), textcoords="offset points", xytext=(6, 3), fontsize=7
            )
    for (kind, precision), group in points.items():
        steps, values, ranges = zip(*sorted(group), strict=True)
        lower = [max(0.0, value - low) for value, (low, _) in zip(values, ranges, strict=True)]
        upper = [max(0.0, high - value) for value, (_, high) in zip(values, ranges, strict=True)]
        line = "" if kind in ("one-step", "best-of") else _LINES.get(kind, "-")
        axes.errorbar(
            steps,
            values,
            yerr=[lower, upper],
            linestyle=line,
            marker=_MARKERS.get(kind, "o"),
            markersize=5,
            linewidth=1,
            elinewidth=0.7,
            color=_COLOURS[precision],
            markerfacecolor="white" if kind == "grid" else _COLOURS[precision],
            label=f"{kind}, {precision}",
        )
    axes.set_xscale("log")
    ticks = sorted({variant.integration.nfe for variant in variants.values()})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] * 0.8, ticks[-1] * 1.6)
    if name == "action_error":
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(0, 2 * max(variant.measured.get(name, 0.0) for variant in variants.values()) + 1e-4)
    elif name == "latency_p50_ms":
        axes.set_yscale("log")


def _kind(variant: VariantSpec) -> str:
    if variant.one_step:
        return "one-step"
    if "action_error" not in variant.measured:  # it chooses among another number of chunks than the policy
        return "best-of"
    return "steps" if variant.integration.time_grid is None else "grid"


def _range(name: str, variant: VariantSpec) -> tuple[float, float]:
    value = variant.measured[name]
    if name == "return_mean":
        return variant.measured.get("return_low", value), variant.measured.get("return_high", value)
    return (value, variant.measured.get("latency_p99_ms", value)) if name == "latency_p50_ms" else (value, value)

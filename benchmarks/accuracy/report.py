"""Tables and pictures of an accuracy suite: `python benchmarks/accuracy/report.py DIR`.

For every critic that was used it writes DIR/CRITIC.md, DIR/CRITIC-overview.png, DIR/CRITIC-chunks.png, and
DIR/CRITIC-METHOD.png per method.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
from chunk_report import chunk_tables, draw_chunks, ratio_table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from metrics import Target
from numpy.typing import NDArray
from problems import CONTEXTS, RUNS, Context, Run, make_grid
from reading import BASELINE, COLOURS, INK, PRIOR, TARGET, Result, grouped, number, read_results, table
from run import ALL_RUNS, SAMPLES

__all__ = ["draw_method", "draw_overview", "main", "tables"]

GOOD, FAIR = 0.15, 0.30
"""Normalised W1 up to which a cell is drawn as good, and as fair."""
ENCLOSED = (0.95, 0.75, 0.4)
"""Shares of the mass that the contours in two dimensions enclose."""
DRAWN_POINTS = 1000

MARKERS = {"1-D": "o", "2-D": "D", "5-D to 50-D": "^"}
FAINT = "#9ca3af"
PRIOR_DASHES = (0, (3, 2))
TARGET_SHADES = ("#e8ecf1", "#d5dce5", "#bcc7d4")
VERDICTS = {GOOD: "#15803d", FAIR: "#a16207", math.inf: "#b91c1c"}
DPI = 130

Array = NDArray[np.float64]


def tables(results: Sequence[Result]) -> str:
    """Markdown tables of the results of one critic: the methods, the normalised W1 and a mode's mass in every cell."""
    methods = grouped(results, "method")
    seeds = len(grouped(results, "seed"))
    of_seeds = f", mean of {seeds} seeds" if seeds > 1 else ""
    summary = [["method", "median", "worst", f"at most {GOOD}", "at the bound", "diverged", "training, s"]]
    for method, found in methods.items():
        errors = [error for result in found for error in result.errors]
        solved = sum(error <= GOOD for error in errors)
        # Where data are on the faces, so should the policy be.
        off_faces = [result for result in found if not RUNS[result.data["run"]].faces]
        bounds = [cell["at_bound"] for result in off_faces for cell in result.data["cells"]]
        diverged = sum(result.data["diverged"] for result in found)
        seconds = mean(result.data["train_seconds"] for result in found)
        summary.append([method, number(median(errors)), number(max(errors)), f"{solved} of {len(errors)}"])
        summary[-1] += [f"{max(bounds):.1%}" if bounds else "-", f"{diverged} of {len(found)}", f"{seconds:.0f}"]
    distances = [["run", "context", "floor", *methods]]
    masses = [["run", "context", "prior", "target", *methods]]
    for name, found in grouped(results, "run").items():
        for context in CONTEXTS[RUNS[name].dim]:
            target = Target(RUNS[name], context, make_grid(RUNS[name].dim))
            cells = {method: [r for r in found if r.data["method"] == method] for method in methods}
            distances.append([name, context.name, number(target.floor(SAMPLES))])
            distances[-1] += [_distance(cell, context.name) for cell in cells.values()]
            masses.append([name, context.name, f"{target.prior_mode_mass[-1]:.2f}", f"{target.mode_mass[-1]:.2f}"])
            masses[-1] += [_mass(cell, context.name) for cell in cells.values()]
    lost = [result.data for result in results if result.data["diverged"]]
    reasons = [f"- {data['method']}, {data['run']}, seed {data['seed']}: {data['error']}" for data in lost]
    worst = " (worst seed)" if seeds > 1 else ""
    parts = [table(summary), *(["\n".join(reasons)] if reasons else [])]
    parts += [f"Normalised W1{of_seeds}{worst}:", table(distances)]
    parts += [f"Mass of the rewarding mode{of_seeds}:", table(masses)]
    return "\n\n".join(parts) + "\n"


def draw_overview(results: Sequence[Result]) -> Figure:
    """Normalised W1 of every cell, a strip per method, and one for its chunks; the bar is the median."""
    strips = {
        (method, kind): some
        for kind in ("", ", chunks")
        for method, found in grouped(results, "method").items()
        if (some := [result for result in found if (result.data["run"] not in RUNS) == bool(kind)])
    }
    figure = Figure(figsize=(9, 1.2 + 0.85 * len(strips)), layout="constrained")
    axes = figure.subplots()
    finite = [error for result in results for error in result.errors if math.isfinite(error)]
    low, high = min([0.02, *finite]) / 1.2, max([2.0, *finite]) * 1.3
    beyond = high * 1.25
    diverged = not all(math.isfinite(error) for result in results for error in result.errors)
    axes.set(xscale="log", xlim=(low, beyond * 1.3 if diverged else high), ylim=(len(strips) - 0.45, -0.6))
    for limit in (GOOD, FAIR):
        axes.axvline(limit, color=VERDICTS[limit], lw=1, ls=(0, (4, 3)), zorder=1)
    axes.axvline(1, color=FAINT, lw=1, zorder=1)
    generator = np.random.default_rng(0)
    for row, ((method, _), found) in enumerate(strips.items()):
        errors = [error for result in found for error in result.errors]
        colour = COLOURS[method]
        for dim, marker in MARKERS.items():
            some = [e for r in found if _size(r) == dim for e in r.errors if math.isfinite(e)]
            heights = row + generator.uniform(-0.25, 0.25, len(some))
            face = to_rgba(colour, 0.5) if dim == "1-D" else "white"
            axes.scatter(some, heights, s=24, marker=marker, facecolor=face, edgecolor=colour, lw=0.9, zorder=3)
        if lost := sum(not math.isfinite(error) for error in errors):
            text = {"ha": "center", "va": "center", "color": VERDICTS[math.inf], "fontsize": 10, "fontweight": "bold"}
            axes.annotate(f"{lost} cells", (beyond, row), **text)
        if math.isfinite(middle := median(errors)):
            axes.plot([middle, middle], [row - 0.34, row + 0.34], color=INK, lw=2.2, zorder=4)
            text = {"ha": "center", "va": "bottom", "color": INK, "fontsize": 9, "fontweight": "bold"}
            axes.annotate(f"{middle:.2g}", (middle, row - 0.35), **text)
    axes.set_yticks(range(len(strips)), ["".join(strip) for strip in strips], color=INK, fontsize=10)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, GOOD, FAIR, 0.5, 1, 2, 5, 10) if low <= tick <= high]
    names = [f"{tick:g}" for tick in ticks] + ["diverged"] * diverged
    axes.set_xticks(ticks + [beyond] * diverged, names, fontsize=9, color=INK)
    axes.set_xticks([], minor=True)
    axes.tick_params(length=0)
    axes.set_xlabel("W1(policy, target) / W1(prior, target)", color=INK, fontsize=10)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    handles = [
        Line2D([], [], ls="", marker=marker, markersize=5, color=INK, markerfacecolor=INK if dim == "1-D" else "white")
        for dim, marker in MARKERS.items()
    ]
    labels = [f"a cell in {dim}" for dim in MARKERS]
    handles.append(Line2D([], [], ls="", marker="|", markersize=12, markeredgewidth=2.2, color=INK))
    figure.legend(handles, [*labels, "median"], loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_method(results: Sequence[Result]) -> Figure:
    """Every cell of one method: target, prior and policy. Of several seeds the first one is drawn."""
    first = {result.data["run"]: result for result in reversed(results)}
    method = results[0].data["method"]
    figure = Figure(figsize=(16, 8.9))
    for dim, (left, right) in {1: (0.045, 0.466), 2: (0.52, 0.994)}.items():
        runs = [run for run in RUNS.values() if run.dim == dim]
        layout = {"left": left, "right": right, "bottom": 0.03, "top": 0.9, "wspace": 0.05, "hspace": 0.05}
        grid = figure.add_gridspec(len(runs), len(CONTEXTS[dim]), **layout)
        for row, run in enumerate(runs):
            for column, context in enumerate(CONTEXTS[dim]):
                axes = figure.add_subplot(grid[row, column])
                _draw_cell(axes, run, context, first.get(run.name))
                if row == 0:
                    axes.set_title(context.name, color=INK, fontsize=12, pad=5)
                if row < len(runs) - 1:
                    axes.tick_params(labelbottom=False)
                if column == 0:
                    label = f"λ = {run.entropy_coef:g}\nτ = {run.inverse_temperature:g}\nw = {run.mixture_weight:g}"
                    label += "\nfaces" * (run.faces > 0) + "\n2 stages" * (run.mirror_stages == 2)
                    label += "\nadaptive" * run.adaptive
                    text = {"rotation": 0, "ha": "right", "va": "center", "multialignment": "left", "color": INK}
                    axes.set_ylabel(label, labelpad=5, fontsize=10, **text)
    colour = COLOURS[method]
    handles = [
        Patch(facecolor=TARGET, edgecolor=INK),
        Line2D([], [], color=PRIOR, lw=1.3, ls=PRIOR_DASHES),
        Line2D([], [], color=colour, lw=1.6),
        Line2D([], [], color=colour, ls="", marker="o", markersize=4),
        Line2D([], [], color=INK, ls="", marker=7, markersize=6),
    ]
    labels = ["target", "prior", "policy, 1-D", "policy, 2-D", "reward's maximum"]
    figure.legend(
        handles, labels, loc="upper right", bbox_to_anchor=(0.996, 0.998), ncols=5, frameon=False, fontsize=11
    )
    critic = {"true": "true reward", "learned": "learned critic", "exact": "true reward and behaviour"}[
        results[0].data["critic"]
    ]
    figure.text(0.012, 0.962, f"{method}, {critic}", fontsize=16, fontweight="bold", color=INK)
    figure.text(0.25, 0.962, "number in a panel: normalised W1", fontsize=11, color=INK)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --output of run.py")
    folder = parser.parse_args(arguments).folder.expanduser()
    results = read_results(folder)
    if not results:
        print(f"{folder} holds no finished jobs; run benchmarks/accuracy/run.py --output {folder}.", file=sys.stderr)
        return 1
    for critic, found in grouped(results, "critic").items():
        plane = [result for result in found if result.data["run"] in RUNS]
        chunks = [result for result in found if result.data["run"] not in RUNS]
        parts = [tables(plane)] if plane else []
        parts += [f"Chunks, means of the seeds:\n\n{chunk_tables(chunks)}\n"] if chunks else []
        if ratios := ratio_table(found):
            parts.append(
                f"W1 (median of a run's contexts), and CPU time, as shares of those of {BASELINE}:\n\n{ratios}\n"
            )
        text = "\n".join(parts)
        (folder / f"{critic}.md").write_text(text, encoding="utf-8")
        print(f"{critic} critic\n\n{text if not plane else text.split(chr(10) * 2)[0]}\n")
        _save(draw_overview(found), folder / f"{critic}-overview.png")
        if chunks:
            _save(draw_chunks(chunks), folder / f"{critic}-chunks.png")
        for method, of_method in grouped(plane, "method").items():
            _save(draw_method(of_method), folder / f"{critic}-{method}.png")
    print(f"Tables and pictures are in {folder}.")
    return 0


def _draw_cell(axes: Axes, run: Run, context: Context, result: Result | None) -> None:
    grid = make_grid(run.dim)
    target, prior = run.target(context, grid), run.prior(context, grid)
    axes.set(xlim=(-1, 1), xticks=[-0.5, 0, 0.5], yticks=[])
    axes.tick_params(length=2, labelsize=8, colors=INK)
    axes.spines[:].set(color=FAINT, linewidth=0.7)
    samples = np.empty((0, run.dim))
    if result is not None:
        samples = result.samples.get(context.name, samples).astype(np.float64)
        error = result.error(context.name)
        verdict = next(colour for limit, colour in VERDICTS.items() if error <= limit)
        text = {"ha": "left", "va": "top", "color": verdict, "fontsize": 10, "fontweight": "bold", "zorder": 9}
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        shown = f"{error:.2f}" if math.isfinite(error) else "diverged"
        axes.text(0.03, 0.95, shown, transform=axes.transAxes, bbox=box, **text)
    colour = COLOURS[result.data["method"]] if result else INK
    if run.dim == 1:
        _draw_densities(axes, target, prior, samples[:, 0], colour)
        axes.plot(context.goal[0], 0.035, marker=7, color=INK, ms=5, transform=axes.get_xaxis_transform(), zorder=8)
    else:
        _draw_contours(axes, target, prior, samples, colour)
        axes.plot(*context.goal, marker=7, color=INK, ms=6, zorder=8)


def _draw_densities(axes: Axes, target: Array, prior: Array, samples: Array, colour: str) -> None:
    shown = 400
    x = (np.arange(shown) + 0.5) * 2 / shown - 1
    target, prior = (mass.reshape(shown, -1).sum(axis=1) * shown / 2 for mass in (target, prior))
    axes.fill_between(x, target, color=TARGET, lw=0, zorder=1)
    axes.plot(x, target, color=INK, lw=0.9, zorder=2)
    axes.plot(x, prior, color=PRIOR, lw=1.1, ls=PRIOR_DASHES, zorder=3)
    if len(samples):
        counts, edges = np.histogram(samples, bins=50, range=(-1, 1), density=True)
        axes.stairs(counts, edges, color=colour, lw=1.3, zorder=4)
    # What piles up somewhere, or lies on the box's faces, runs out of its panel rather than flatten the rest.
    axes.set_ylim(0, 1.45 * max(target[1:-1].max(), prior[1:-1].max()))


def _draw_contours(axes: Axes, target: Array, prior: Array, samples: Array, colour: str) -> None:
    cells = round(len(target) ** 0.5)
    axis = (np.arange(cells) + 0.5) * 2 / cells - 1
    axes.set(ylim=(-1, 1), aspect="equal")
    levels = [*_levels(target), np.inf]
    for level, shade in zip(levels, TARGET_SHADES, strict=False):
        axes.contourf(axis, axis, target.reshape(cells, cells).T, [level, np.inf], colors=[shade], zorder=1)
    axes.contour(axis, axis, target.reshape(cells, cells).T, levels[:1], colors=[INK], linewidths=0.9, zorder=5)
    dashes = [PRIOR_DASHES]
    axes.contour(
        axis, axis, prior.reshape(cells, cells).T, _levels(prior)[:1], colors=[PRIOR], linewidths=1.1, linestyles=dashes
    )
    points = samples[:DRAWN_POINTS]
    axes.scatter(points[:, 0], points[:, 1], s=3.5, color=colour, alpha=0.4, lw=0, zorder=4)


def _levels(mass: Array) -> list[float]:
    """Cell masses above which lie the shares `ENCLOSED` of all mass, from the lowest up."""
    falling = np.sort(mass)[::-1]
    return [float(falling[np.searchsorted(np.cumsum(falling), share)]) for share in ENCLOSED]


def _distance(results: Sequence[Result], context: str) -> str:
    """Mean normalised W1 over the seeds, and the worst one if there are several."""
    errors = [result.error(context) for result in results]
    if len(errors) < 2:
        return number(errors[0]) if errors else ""
    return f"{number(mean(errors))} ({number(max(errors))})"


def _mass(results: Sequence[Result], context: str) -> str:
    """Mean mass of the rewarding mode over the seeds that did not diverge."""
    found = [cell["mode_mass"][-1] for result in results if (cell := result.cell(context))]
    return f"{mean(found):.2f}" if found else "diverged" if results else ""


def _size(result: Result) -> str:
    """The key of `MARKERS` that a result is drawn with."""
    dim = ALL_RUNS[result.data["run"]].dim
    return f"{dim}-D" if dim < 3 else "5-D to 50-D"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, facecolor="white")


if __name__ == "__main__":
    sys.exit(main())

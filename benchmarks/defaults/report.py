"""Tables and a picture of a comparison of defaults: `python benchmarks/defaults/report.py DIR` writes them into DIR."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from tasks import METHODS, TASKS

__all__ = ["ahead", "bootstrap", "draw", "main", "read_results", "tables"]

RESAMPLES = 4000
COLOURS = ("#6b7280", "#6d28d9", "#be123c", "#2563eb", "#c2410c", "#15803d", "#0e7490", "#a16207")
INK, FAINT = "#1f2937", "#9ca3af"
COLUMNS = 3

Array = NDArray[np.float64]
Result = Mapping[str, Any]
"""A job's JSON file, as `run.run_job` returns it."""
Acting = Literal["sampled", "zero_noise"]
Returns = Mapping[str, Array]
"""Returns [seeds, episodes] by variant."""


def read_results(folder: Path) -> list[Result]:
    """All finished jobs of a suite that did not fail."""
    files = sorted((folder / "jobs").glob("[!.]*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for failed in (result for result in results if result["error"]):
        print(f"Left out: {failed['task']}, {failed['variant']}, seed {failed['seed']}: {failed['error']}")
    return [result for result in results if not result["error"]]


def bootstrap(returns: Array) -> Array:
    """Resampled means [RESAMPLES] of returns [seeds, episodes]: seeds are drawn, then episodes within them."""
    generator, (seeds, episodes) = np.random.default_rng(0), returns.shape
    rows = generator.integers(seeds, size=(RESAMPLES, seeds, 1))
    return returns[rows, generator.integers(episodes, size=(RESAMPLES, seeds, episodes))].mean(axis=(1, 2))


def ahead(returns: Returns) -> list[str]:
    """The variant of the highest mean, and those from which the 95 % interval of the difference cannot tell it."""
    best = max(returns, key=lambda variant: returns[variant].mean())
    # The same draws for all, since all meet the same episodes.
    drawn = {variant: bootstrap(found) for variant, found in returns.items()}
    level = [v for v in returns if v != best and np.quantile(drawn[best] - drawn[v], 0.025) <= 0]
    return [best, *level]


def tables(results: Sequence[Result]) -> str:
    """Markdown: the tasks with sampled actions and with zero noise, changed rewards, and the CPU time used."""
    variants = _variants(results)
    plain = [result for result in results if _rewards(result) == "r"]
    changed = {result["task"] for result in results if _rewards(result) != "r"}
    scaled = [result for result in results if result["task"] in changed]
    titles: Mapping[Acting, str] = {"sampled": "Sampled actions", "zero_noise": "Zero noise"}
    parts = []
    for acting, title in titles.items():
        rows = [["task", "data, best tenth", *variants, "ahead"]]
        for task, found in _tasks(plain).items():
            data = found[0]["data"]
            name = f"{task} ({TASKS[task].purpose})"
            rows.append(
                [name, f"{data['return_mean']:.4g}, {data['best_tenth']:.4g}", *_cells(found, variants, acting)]
            )
        parts += [f"{title}:", _table(rows)]
    if scaled:
        rows = [["task", "rewards", *variants, "ahead"]]
        for task, found in _tasks(scaled).items():
            for rewards, some in _grouped(found, _rewards).items():
                rows.append([task, rewards, *_cells(some, variants, "sampled")])
        parts += ["Changed rewards in the data; sampled actions, returns in the environment's own units:", _table(rows)]
    rows = [["task", *variants]]
    for task, found in _tasks(plain).items():
        by_variant = _grouped(found, lambda result: result["variant"])
        rows.append([task, *(_cost(by_variant[v]) if v in by_variant else "" for v in variants)])
    return "\n\n".join([*parts, "Updates, and CPU seconds of training:", _table(rows)]) + "\n"


def draw(results: Sequence[Result]) -> Figure:
    """A panel per task: mean returns and 95 % intervals of every variant, sampled (filled) and at zero noise (hollow).

    The vertical lines are the data's mean return (solid) and that of their best tenth (dashed).
    """
    tasks, variants = _tasks([r for r in results if _rewards(r) == "r"]), _variants(results)
    rows = -(-len(tasks) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 0.6 + rows * (0.8 + 0.36 * len(variants))), layout="constrained")
    panels = np.ravel(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes, (task, found) in zip(panels, tasks.items(), strict=False):
        _draw_task(axes, found, variants)
        axes.set_title(f"{task} ({TASKS[task].purpose})", color=INK, fontsize=11, loc="left")
    marks: list[Mapping[str, Any]] = [
        {"label": "sampled actions", "ls": "", "marker": "o"},
        {"label": "zero noise", "ls": "", "marker": "o", "markerfacecolor": "white"},
        {"label": "data, mean", "lw": 1.4},
        {"label": "data, best tenth", "lw": 1.4, "ls": (0, (3, 2))},
    ]
    handles = [Line2D([], [], color=INK, **mark) for mark in marks]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --output of run.py")
    folder = parser.parse_args(arguments).folder.expanduser()
    results = read_results(folder)
    if not any(_rewards(result) == "r" for result in results):
        print(
            f"{folder} holds no finished jobs with the rewards as recorded; run run.py --output {folder}.",
            file=sys.stderr,
        )
        return 1
    text, figure = tables(results), draw(results)
    (folder / "defaults.md").write_text(text, encoding="utf-8")
    FigureCanvasAgg(figure)
    figure.savefig(folder / "defaults.png", dpi=130, facecolor="white")
    print(f"{text}\nThis is {folder / 'defaults.md'}; the picture is defaults.png.")
    return 0


def _draw_task(axes: Axes, results: Sequence[Result], variants: Sequence[str]) -> None:
    data = results[0]["data"]
    axes.axvline(data["return_mean"], color=FAINT, lw=1.4, zorder=1)
    axes.axvline(data["best_tenth"], color=FAINT, lw=1.4, ls=(0, (3, 2)), zorder=1)
    shifts: Mapping[Acting, float] = {"sampled": -0.13, "zero_noise": 0.13}
    for acting, shift in shifts.items():
        for variant, returns in _returns(results, variants, acting).items():
            row, colour = variants.index(variant), COLOURS[variants.index(variant) % len(COLOURS)]
            axes.plot(_interval(returns), [row + shift] * 2, color=colour, lw=1.8, zorder=2)
            face = colour if acting == "sampled" else "white"
            axes.plot(returns.mean(), row + shift, "o", color=colour, markerfacecolor=face, ms=6, zorder=3)
    axes.set_yticks(range(len(variants)), variants, fontsize=9, color=INK)
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _cells(results: Sequence[Result], variants: Sequence[str], acting: Acting) -> list[str]:
    """A cell per variant, and which of them are ahead."""
    returns = _returns(results, variants, acting)
    return [*(_cell(returns[v]) if v in returns else "" for v in variants), " ≈ ".join(ahead(returns))]


def _cell(returns: Array) -> str:
    low, high = _interval(returns)
    return f"{returns.mean():.4g} [{low:.4g}, {high:.4g}]"


def _interval(returns: Array) -> tuple[float, float]:
    low, high = np.quantile(bootstrap(returns), [0.025, 0.975])
    return float(low), float(high)


def _cost(results: Sequence[Result]) -> str:
    updates = np.mean([result["updates"] for result in results])
    return f"{updates:.0f}, {np.mean([result['train_cpu_seconds'] for result in results]):.0f} s"


def _returns(results: Sequence[Result], variants: Sequence[str], acting: Acting) -> Returns:
    by_variant = _grouped(results, lambda result: result["variant"])
    return {v: np.array([r[acting]["returns"] for r in by_variant[v]]) for v in variants if v in by_variant}


def _variants(results: Sequence[Result]) -> list[str]:
    """All variants, in the order of `METHODS`, and plain ones before changed ones."""
    variants = {result["variant"]: METHODS.index(result["method"]) for result in results}
    return sorted(variants, key=lambda variant: (variants[variant], variant))


def _tasks(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {task: found for task in TASKS if (found := [result for result in results if result["task"] == task])}


def _rewards(result: Result) -> str:
    """What the data's rewards r were changed to, such as "100 r + 5"."""
    scale, offset = result["reward_scale"], result["reward_offset"]
    return (f"{scale:g} r" if scale != 1 else "r") + (f" + {offset:g}" if offset else "")


def _grouped(results: Sequence[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())

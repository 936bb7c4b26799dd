"""Tables and pictures of the runs on chunks; `report.py` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from chunk_metrics import ChunkTarget
from chunks import CHUNKS
from matplotlib.figure import Figure
from reading import BASELINE, COLOURS, INK, PRIOR, TARGET, Result, number, table
from run import COMMON, SAMPLES

__all__ = ["chunk_tables", "draw_chunks", "ratio_table"]

DRAWN = 700
COLUMNS: Mapping[str, str] = {
    "normalised_w1": "W1",
    "mass_error": "mass error",
    "shift_error": "shift error, std",
    "stiff_log_variance": "log variance, stiff",
    "smooth_log_variance": "smooth",
}


def chunk_tables(results: Sequence[Result]) -> str:
    """Markdown: for every run its measures by method, means of the seeds, under the floor and the tilted prior."""
    rows = [["run", "method", *COLUMNS.values(), "training, s"]]
    for name in _runs(results):
        target = ChunkTarget(CHUNKS[name], SAMPLES)
        effective = f", ESS {target.effective:.2f}" if not CHUNKS[name].exact else ""
        rows.append([f"{name}{effective}", "floor", *_measures([target.floor(COMMON["nfe"])]), ""])
        found = [result for result in results if result.data["run"] == name]
        tilted = [cell["tilted_prior"]["measures"] for result in found for cell in result.data["cells"]]
        rows.append(["", "tilted prior", *_measures([measures for measures in tilted if measures]), ""])
        for method in dict.fromkeys(result.data["method"] for result in found):
            mine = [result.data for result in found if result.data["method"] == method]
            cells = [cell for data in mine for cell in data["cells"]]
            lost = sum(data["diverged"] for data in mine)
            shown = f"{method} ({lost} of {len(mine)} diverged)" if lost else method
            rows.append(["", shown, *_measures(cells), f"{mean(data['train_seconds'] for data in mine):.0f}"])
    return table(rows)


def ratio_table(results: Sequence[Result]) -> str:
    """Markdown: W1 per run as a share of the default method's, of the same critic, run and seeds; medians last.

    One and two dimensions and chunks have a median each. Training is in CPU seconds, as a share of the default's.
    """
    methods = [m for m in dict.fromkeys(r.data["method"] for r in results) if m != BASELINE]
    rows = [["run", BASELINE, *methods]]
    medians: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
    for name in dict.fromkeys(result.data["run"] for result in results):
        base = _of(results, name, BASELINE)
        if not base:
            continue
        row = [name, f"{number(_error(base))}, {_seconds(base):.0f} s"]
        for method in methods:
            seeds = {result.data["seed"] for result in base} & {r.data["seed"] for r in _of(results, name, method)}
            mine, theirs = ([r for r in _of(results, name, m) if r.data["seed"] in seeds] for m in (method, BASELINE))
            if not seeds:
                row.append("")
                continue
            ratio = _error(mine) / _error(theirs)
            medians[name in CHUNKS].setdefault(method, []).append(ratio)
            row.append(f"{ratio:.2f}, time {_seconds(mine) / _seconds(theirs):.2f}")
        rows.append(row)
    for high, label in ((False, "median, 1-D and 2-D"), (True, "median, chunks")):
        if medians[high]:
            rows.append(
                [label, "", *(f"{median(medians[high][m]):.2f}" if m in medians[high] else "" for m in methods)]
            )
    return table(rows) if len(rows) > 1 else ""


def draw_chunks(results: Sequence[Result]) -> Figure:
    """Projections on the mode axis and the smooth axis: target (grey) against every method, a row per run."""
    runs, methods = _runs(results), list(dict.fromkeys(result.data["method"] for result in results))
    figure = Figure(figsize=(2.2 * len(methods) + 1.6, 1.9 * len(runs) + 0.5), layout="constrained")
    panels = figure.subplots(len(runs), len(methods), squeeze=False, sharex="row", sharey="row")
    for row, name in enumerate(runs):
        run = CHUNKS[name]
        axes = np.stack([run.mode_axis / np.linalg.norm(run.pattern), run.smooth_axis / run.smooth_std], axis=1)
        wanted = ChunkTarget(run, SAMPLES).samples.reshape(-1, run.dim)[:: SAMPLES // DRAWN] @ axes
        prior = run.prior.means @ axes
        for column, method in enumerate(methods):
            panel, found = panels[row, column], _of(results, name, method)
            panel.scatter(*wanted.T, s=9, color=TARGET, lw=0)
            panel.plot(*prior.T, "+", color=PRIOR, ms=9, mew=1.5)
            if found and not found[0].data["diverged"]:
                points = found[0].samples[run.cells[0]].astype(np.float64)[:DRAWN] @ axes
                panel.scatter(*points.T, s=4, color=COLOURS[method], alpha=0.45, lw=0)
            shown = number(_error(found)) if found else "not run"
            panel.set_title(f"{method}\n{shown}" if row == 0 else shown, color=INK, fontsize=9)
            panel.tick_params(labelsize=7, length=2, colors=INK)
        panels[row, 0].set_ylabel(f"{name}\nsmooth axis, std", fontsize=7, color=INK)
    figure.supxlabel("mode axis; grey: target; +: prior's modes; number: W1", fontsize=8)
    return figure


def _runs(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.data["run"] for result in results))


def _of(results: Sequence[Result], run: str, method: str) -> list[Result]:
    return [result for result in results if (result.data["run"], result.data["method"]) == (run, method)]


def _error(results: Sequence[Result]) -> float:
    """Median over the contexts, mean over the seeds; infinite if a run diverged."""
    return mean(median(result.errors) for result in results)


def _seconds(results: Sequence[Result]) -> float:
    return mean(result.data["train_seconds"] for result in results)


def _measures(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means of what was measured; a dash where there is nothing."""
    columns = [[cell[key] for cell in cells if cell[key] is not None] for key in COLUMNS]
    return [f"{mean(found):.3f}" if found else "-" for found in columns]

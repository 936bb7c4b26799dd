"""Tables and pictures of an evidence suite: `python benchmarks/tasks/report.py DIR` writes them into DIR."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from intervals import Estimate, estimate, improvement, iqm, mean_over_tasks
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["draw", "draw_curves", "main", "read_results", "tables"]

COLOURS = ("#2563eb", "#7c3aed", "#0e7490", "#15803d", "#be123c", "#c2410c", "#a16207", "#6b7280")
INK, FAINT = "#1f2937", "#9ca3af"
COLUMNS = 3

Array = NDArray[np.float64]
Result = Mapping[str, Any]
"""A job's JSON file, as `run.run_job` returns it."""
Acting = Literal["sampled", "zero_noise"]
Kind = Literal["successes", "returns"]
Episodes = Mapping[str, Array]
"""Episodes [seeds, episodes] by task."""
TITLES: Mapping[Acting, str] = {"sampled": "Sampled actions", "zero_noise": "Zero noise"}


def read_results(folder: Path) -> list[Result]:
    """All finished jobs of a suite, in the order of its tasks and methods as they were begun."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "jobs").glob("[!.]*.json")]
    finished = [result for result in results if result["finished"]]
    if len(finished) < len(results):
        print(f"Left out: {len(results) - len(finished)} jobs that are not finished.")
    return sorted(finished, key=lambda result: (_task(result), result["seed"], result["method"]))


def tables(results: Sequence[Result]) -> str:
    """Markdown: what was run, success and return by task, means over the tasks, improvement, data and cost."""
    methods, domains = _methods(results), _domains(results)
    parts = [_about(results)]
    for acting, title in TITLES.items():
        if any(_has(result, acting, "successes") for result in results):
            parts += [f"## {title}: success, %", _by_task(results, methods, acting, "successes")]
            parts += [
                "Mean and interquartile mean (IQM) over the tasks, of the runs that all methods have:",
                _aggregates(results, methods, domains, acting),
            ]
        parts += [f"## {title}: return", _by_task(results, methods, acting, "returns")]
        parts += [_improvements(results, methods, acting)]
    parts += ["## Data and cost", _data(results), _cost(results, methods)]
    failed = [f"- {_task(r)}, {r['method']}, seed {r['seed']}: {r['error']}" for r in results if r["error"]]
    if failed:
        parts += ["Runs that failed; they count as no success, and have no return:", "\n".join(failed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(results: Sequence[Result], acting: Acting = "sampled") -> Figure:
    """A panel for all tasks together and one for each: success of every method, or its return, and 95 % intervals."""
    methods, tasks = _methods(results), _tasks(results)
    everywhere = _common(results, methods, acting)
    panels: list[tuple[str, Mapping[str, Estimate]]] = []
    if everywhere:
        found = {method: estimate(mean_over_tasks, episodes) for method, episodes in everywhere.items()}
        panels.append((f"mean of {len(next(iter(everywhere.values())))} tasks, success %", found))
    for task in tasks:
        for kind, unit in (("successes", "success %"), ("returns", "return")):
            cells = {m: e for m in methods if (e := _estimate(results, task, m, acting, kind)) is not None}
            if cells:
                panels.append((f"{task}, {unit}", cells))
                break
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 0.6 + rows * (0.8 + 0.3 * len(methods))), layout="constrained")
    grid = np.ravel(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, cells) in zip(grid, panels, strict=False):
        percent = title.endswith("%")
        _draw_cells(axes, cells, methods, 100 if percent else 1)
        if percent:
            axes.set_xlim(-3, 103)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
    return figure


def draw_curves(results: Sequence[Result]) -> Figure | None:
    """A panel for each task that was evaluated while training: mean over the seeds, and their range; None without."""
    methods = _methods(results)
    tasks = [t for t in _tasks(results) if any(r["curve"] for r in results if _task(r) == t)]
    if not tasks:
        return None
    rows = -(-len(tasks) // COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 0.6 + 2.6 * rows), layout="constrained")
    grid = np.ravel(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid, tasks, strict=False):
        found = [result for result in results if _task(result) == task and result["curve"]]
        succeeds = all("success" in row for result in found for row in result["curve"])
        column, factor = ("success", 100) if succeeds else ("return_mean", 1)
        for method in methods:
            curves = [{row["step"]: factor * row[column] for row in r["curve"]} for r in found if r["method"] == method]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            values = np.array([[curve[step] for step in steps] for curve in curves])
            if steps:
                colour = COLOURS[methods.index(method) % len(COLOURS)]
                axes.plot(steps, values.mean(axis=0), color=colour, lw=1.6, label=method)
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)
        axes.set_title(f"{task}, {'success %' if factor == 100 else 'return'}", color=INK, fontsize=10, loc="left")
        _style(axes)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(methods), frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --output of run.py")
    folder = parser.parse_args(arguments).folder.expanduser()
    results = read_results(folder)
    if not results:
        print(f"{folder} holds no finished jobs; run run.py SUITE --output {folder}.", file=sys.stderr)
        return 1
    text = tables(results)
    (folder / "report.md").write_text(text, encoding="utf-8")
    written = ["report.md"]
    for name, figure in (("tasks.png", draw(results)), ("curves.png", draw_curves(results))):
        if figure is not None:
            FigureCanvasAgg(figure)
            figure.savefig(folder / name, dpi=130, facecolor="white")
            written.append(name)
    print(f"{text}\nWritten into {folder}: {', '.join(written)}.")
    return 0


def _about(results: Sequence[Result]) -> str:
    updates = sorted({result["updates"] for result in results})
    seeds, episodes = sorted({r["seed"] for r in results}), sorted({r["episodes"] for r in results})
    return (
        f"{len(results)} runs: seeds {_listed(seeds)}; {_listed(updates)} updates each; "
        f"{_listed(episodes)} episodes of each exported policy, the same for all. Brackets: 95 % stratified bootstrap "
        "over seeds and, within them, episodes."
    )


def _by_task(results: Sequence[Result], methods: Sequence[str], acting: Acting, kind: Kind) -> str:
    rows = [["task", "seeds", "data", *methods]]
    for task in _tasks(results):
        found = [result for result in results if _task(result) == task]
        data = found[0]["data"]
        shown = f"{100 * data['success']:.3g}" if kind == "successes" else f"{data['return_mean']:.4g}"
        most = max(len({r["seed"] for r in found if r["method"] == m}) for m in methods)
        cells = []
        for method in methods:
            seeds = len({r["seed"] for r in found if r["method"] == method})
            cell = _cell(_estimate(results, task, method, acting, kind), 100 if kind == "successes" else 1)
            cells.append(cell if seeds in (0, most) else f"{cell} ({seeds} seeds)")
        rows.append([task, str(most), shown, *cells])
    return _table(rows)


def _aggregates(results: Sequence[Result], methods: Sequence[str], domains: Sequence[str], acting: Acting) -> str:
    common = _common(results, methods, acting)
    if not common:
        return "There is no run that all methods have."
    tasks = list(next(iter(common.values())))
    groups = {d: [t for t in tasks if _domain_of(results, t) == d] for d in domains} | {"all": tasks}
    rows = [["tasks", "figure", *common]]
    for name, members in groups.items():
        if members and (name != "all" or len(groups) > 2):
            for title, figure in (("mean", mean_over_tasks), ("IQM", iqm)):
                cells = [_cell(estimate(figure, {t: found[t] for t in members}), 100) for found in common.values()]
                rows.append([f"{name} ({len(members)} tasks)", title, *cells])
    return _table(rows)


def _improvements(results: Sequence[Result], methods: Sequence[str], acting: Acting) -> str:
    """How probable it is that a run of a variant of ME-AM returns more than one of another method."""
    common = _common(results, methods, acting, "returns")
    ours = [method for method in common if _preset(results, method) == "me-am"]
    if not ours or len(common) < 2:
        return ""
    rows = [["more return than", *(method for method in common)]]
    for one in ours:
        cells = ["" if one == m else _cell(estimate(improvement, common[one], common[m])) for m in common]
        rows.append([one, *cells])
    return f"Probability of improvement, mean over {len(common[ours[0]])} tasks, by the return:\n\n{_table(rows)}"


def _data(results: Sequence[Result]) -> str:
    rows = [["task", "transitions", "episodes", "return, best tenth", "success, %", "rewards"]]
    for task in _tasks(results):
        first = next(result for result in results if _task(result) == task)
        data, declared = first["data"], first["task"]
        rows.append(
            [
                task,
                f"{data['transitions']:,}",
                f"{data['episodes']:,}",
                f"{data['return_mean']:.4g}, {data['best_tenth']:.4g}",
                f"{100 * data['success']:.3g}",
                "sparse" if declared["sparse"] else "as recorded",
            ]
        )
    return _table(rows)


def _cost(results: Sequence[Result], methods: Sequence[str]) -> str:
    rows = [["updates, wall seconds, CPU seconds", *methods]]
    for domain in _domains(results):
        cells = []
        for method in methods:
            found = [r for r in results if r["method"] == method and r["task"]["domain"] == domain]
            cpu = [r["train_cpu_seconds"] for r in found if r["train_cpu_seconds"] is not None]
            wall = f"{np.mean([r['train_seconds'] for r in found]):.0f}" if found else ""
            updates = _listed(sorted({r["updates"] for r in found}))
            cells.append(f"{updates}, {wall}, {f'{np.mean(cpu):.0f}' if cpu else '?'}" if found else "")
        rows.append([domain, *cells])
    said = "Mean over the runs; evaluations are not counted, and the CPU seconds of resumed runs are not known (?):"
    return f"{said}\n\n{_table(rows)}"


def _common(
    results: Sequence[Result], methods: Sequence[str], acting: Acting, kind: Kind = "successes"
) -> dict[str, dict[str, Array]]:
    """Episodes by method and task, of the seeds that all methods have; tasks without such seeds are left out."""
    found: dict[str, dict[str, Array]] = {method: {} for method in methods}
    for task in _tasks(results):
        by_method = {method: _episodes(results, task, method, acting, kind) for method in methods}
        seeds = sorted(set.intersection(*(set(episodes) for episodes in by_method.values())))
        if seeds:
            for method, episodes in by_method.items():
                found[method][task] = np.stack([episodes[seed] for seed in seeds])
    return found if any(found.values()) else {}


def _estimate(results: Sequence[Result], task: str, method: str, acting: Acting, kind: Kind) -> Estimate | None:
    episodes = _episodes(results, task, method, acting, kind)
    if not episodes:
        return None
    return estimate(mean_over_tasks, {task: np.stack([episodes[seed] for seed in sorted(episodes)])})


def _episodes(results: Sequence[Result], task: str, method: str, acting: Acting, kind: Kind) -> dict[int, Array]:
    """Episodes by seed. A failed run counts as no success in any episode; returns it has none."""
    found = {}
    for result in results:
        if _task(result) == task and result["method"] == method:
            if _has(result, acting, kind):
                found[result["seed"]] = np.array(result[acting][kind], np.float64)
            elif result["error"] and kind == "successes":
                found[result["seed"]] = np.zeros(result["episodes"])
    return found


def _has(result: Result, acting: Acting, kind: Kind) -> bool:
    return acting in result and result[acting][kind] is not None


def _draw_cells(axes: Axes, cells: Mapping[str, Estimate], methods: Sequence[str], factor: float) -> None:
    for method, cell in cells.items():
        row, colour = methods.index(method), COLOURS[methods.index(method) % len(COLOURS)]
        axes.plot([factor * cell.low, factor * cell.high], [row, row], color=colour, lw=1.8)
        axes.plot(factor * cell.value, row, "o", color=colour, ms=6)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _cell(found: Estimate | None, factor: float = 1.0) -> str:
    if found is None:
        return ""
    digits: Callable[[float], str] = (lambda x: f"{factor * x:.0f}") if factor == 100 else (lambda x: f"{x:.4g}")
    return f"{digits(found.value)} [{digits(found.low)}, {digits(found.high)}]"


def _methods(results: Sequence[Result]) -> list[str]:
    """Methods in the order of their presets, plain ones before changed ones."""
    order = ("bc", "qam", "qam-edit", "trqam", "me-am")
    found = {result["method"]: order.index(result["preset"]) for result in results}
    return sorted(found, key=lambda method: (found[method], len(method), method))


def _preset(results: Sequence[Result], method: str) -> str:
    return next(result["preset"] for result in results if result["method"] == method)


def _tasks(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(_task(result) for result in results))


def _domains(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result["task"]["domain"] for result in results))


def _domain_of(results: Sequence[Result], task: str) -> str:
    return next(result["task"]["domain"] for result in results if _task(result) == task)


def _task(result: Result) -> str:
    return f"{result['task']['domain']}-{result['task']['label']}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())

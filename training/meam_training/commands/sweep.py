"""`meam sweep`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, print_table, say, terminal_width
from meam_training.runs.csv_file import read_rows
from meam_training.runs.run_log import EVALUATIONS_FILE, METRICS_FILE
from meam_training.runs.sweep import Outcome, SweepRun, read_sweep, run_sweep
from meam_training.runs.watch import warnings_of

__all__ = ["run", "sweep_command"]

FAILED = 1
TAIL_LINES = 15
SHOWN = {
    "return": "return_mean",
    "success": "success",
    "difference": "action_difference",
    "TD error": "td_error",
    "value": "value_mean",
    "prior": "prior_loss",
    "policy": "policy_loss",
}
"""Metrics in the table, by their headings, the most telling first: the last ones are left out where it is narrow."""

NAME_WIDTH = 24
"""Least width of the names of runs, characters; longer ones are folded."""


def sweep_command(
    spec: Annotated[Path, tyro.conf.Positional],
    output_dir: Path | None = None,
    workers: int = 1,
    print_: Annotated[bool, tyro.conf.arg(name="print")] = False,
    json: bool = False,
) -> None:
    """Train every combination of the tasks and settings in a TOML file.

    The file has three kinds of tables: [settings] for all runs (a run ignores those without effect on it), [grid] with
    a list of values for each varied setting, and [tasks.NAME] with a task's data, env_id, env_kwargs,
    max_episode_steps, import and settings. `preset` counts
    as a setting; paths are relative to the folder in which the command runs:

        [settings]
        preset = "me-am"
        steps = 100_000

        [grid]
        seed = [0, 1, 2]
        inverse_temperature = [1, 3]

        [tasks.pockets]
        data = "meam/pockets-v0"

    When started again, it skips finished runs and resumes the others. On Ctrl-C, the runs save and stop. The CPU cores
    are divided among the workers, unless OMP_NUM_THREADS is set.

    With Slurm: meam sweep sweep.toml --print > runs.txt, then
    sbatch --requeue --array=1-$(wc -l < runs.txt) --wrap 'eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" runs.txt)"'

    Args:
        spec: The TOML file.
        output_dir: Folder of the sweep, with one subfolder per run; by default runs/ and the file's name.
        workers: Number of runs executed at a time.
        print_: Print one `meam train` command per line, for a scheduler, and run nothing.
        json: Print one line of JSON to stdout at the end: each run with its state and its last metrics or, with
            --print, its command.
    """
    runs = read_sweep(spec, output_dir or Path("runs", spec.stem))
    if print_ and json:
        print_json({"runs": [{**_named(run), "command": run.command} for run in runs]})
        return
    if print_:
        print_lines(*(run.command for run in runs))
        return
    outcomes = run_sweep(runs, workers, say)
    if json:
        print_json({"runs": [{**_named(run), "state": state, "metrics": _numbers(run)} for run, state in outcomes]})
    else:
        _show_table(outcomes)
    _show_failures(outcomes)
    states = {outcome.state for outcome in outcomes}
    if states & {"interrupted", "not started"}:
        raise KeyboardInterrupt
    if "failed" in states:
        raise SystemExit(FAILED)


def _show_table(outcomes: Sequence[Outcome]) -> None:
    """Print each run with the last metrics that there is room for, and name those that there is none for."""
    parts = [run.name.split(",") for run, _ in outcomes]
    common = [part for part in parts[0] if len(parts) > 1 and all(part in other for other in parts)]
    rows = []
    for (run, state), own in zip(outcomes, parts, strict=True):
        row = {"run": ", ".join(part for part in own if part not in common), "state": state}
        numbers = _numbers(run)
        if "step" in numbers:
            row["step"] = f"{numbers['step']:.0f}"
        row |= {heading: _cell(numbers, metric) for heading, metric in SHOWN.items() if metric in numbers}
        row["warnings"] = str(_warnings(run))
        rows.append(row)
    columns = [name for name in ("run", "state", "step", *SHOWN, "warnings") if any(name in row for row in rows)]
    widths = {name: 1 + max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns}
    widths["run"] = NAME_WIDTH
    left_out = []
    for name in [name for name in reversed(SHOWN) if name in columns]:
        if sum(widths[name] for name in columns) > terminal_width():
            columns.remove(name)
            left_out.append(name)
    title = f"All runs: {', '.join(common)}" if common else ""
    print_table(title, columns, [[row.get(name, "") for name in columns] for row in rows], folded=["run"])
    if left_out:
        say(f"No room for {', '.join(reversed(left_out))}: see --json, or metrics.csv in the runs' folders.")
    if any(row["warnings"] != "0" for row in rows):
        say("Warnings are explained by `meam info` with a run's folder.")


def _cell(numbers: Mapping[str, float | None], metric: str) -> str:
    """A metric with four digits; a return with its spread over the episodes."""
    value, spread = numbers[metric], numbers.get("return_std")
    if value is None:
        return "not finite"
    if metric == "return_mean" and spread is not None:
        return f"{value:.4g} ± {spread:.2g}"
    return f"{value:.0%}" if metric == "success" else f"{value:.4g}"


def _warnings(run: SweepRun) -> int:
    return len(warnings_of(run.config, read_rows(run.output_dir / METRICS_FILE)))


def _named(run: SweepRun) -> dict[str, str]:
    return {"name": run.name, "output_dir": str(run.output_dir)}


def _numbers(run: SweepRun) -> dict[str, float | None]:
    """Last metrics in metrics.csv and evaluations.csv; None for those that are not finite."""
    numbers: dict[str, float] = {}
    for file in (METRICS_FILE, EVALUATIONS_FILE):
        numbers |= max(read_rows(run.output_dir / file), key=lambda row: row["step"], default={})
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _show_failures(outcomes: Sequence[Outcome]) -> None:
    for run, state in outcomes:
        if state == "failed":
            tail = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            say("", f"Failed: {run.name}; the end of {run.log}:", *(f"  {line}" for line in tail))


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and run the sweep."""
    parse(sweep_command, arguments, prog)

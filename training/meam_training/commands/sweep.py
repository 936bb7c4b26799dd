"""`meam sweep`."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, print_table, say
from meam_training.runs.run_log import EVALUATIONS_FILE, METRICS_FILE
from meam_training.runs.sweep import Outcome, SweepRun, read_sweep, run_sweep

__all__ = ["run", "sweep_command"]

FAILED = 1
TAIL_LINES = 15
SHOWN = ("step", "prior_loss", "policy_loss", "value_mean")
"""Columns of metrics.csv in the table."""


def sweep_command(
    spec: Annotated[Path, tyro.conf.Positional],
    output_dir: Path | None = None,
    workers: int = 1,
    print_: Annotated[bool, tyro.conf.arg(name="print")] = False,
    json: bool = False,
) -> None:
    """Train every combination of the tasks and settings in a TOML file.

    The file has three kinds of tables: [settings] for all runs (a run ignores those without effect on it), [grid] with
    a list of values for each varied setting, and [tasks.NAME] with a task's data, env_id and settings. `preset` counts
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
        sys.stdout.writelines(f"{run.command}\n" for run in runs)
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
    """Print each run with its last metrics."""
    rows = [
        {"run": run.name, "state": state, **_last_row(run, METRICS_FILE, SHOWN), **_last_row(run, EVALUATIONS_FILE)}
        for run, state in outcomes
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_table("", columns, [[row.get(name, "") for name in columns] for row in rows])


def _named(run: SweepRun) -> dict[str, str]:
    return {"name": run.name, "output_dir": str(run.output_dir)}


def _numbers(run: SweepRun) -> dict[str, float | None]:
    """Last metrics in metrics.csv and evaluations.csv; None for those that are not finite."""
    row = {**_last_row(run, METRICS_FILE), **_last_row(run, EVALUATIONS_FILE)}
    numbers = {name: float(value) for name, value in row.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _last_row(run: SweepRun, file: str, shown: Sequence[str] | None = None) -> dict[str, str]:
    path = run.output_dir / file
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as lines:
        last = max(csv.DictReader(lines), key=lambda row: int(row["step"]), default={})
    return {name: value for name, value in last.items() if value and (shown is None or name in shown)}


def _show_failures(outcomes: Sequence[Outcome]) -> None:
    for run, state in outcomes:
        if state == "failed":
            tail = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            say("\n".join([f"\nFailed: {run.name}; the end of {run.log}:", *(f"  {line}" for line in tail)]))


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and run the sweep."""
    parse(sweep_command, arguments, prog)

"""What `meam info` shows of a training run."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, print_mapping
from meam_policy.errors import NotFoundError
from meam_policy.given_files import given_path
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.csv_file import read_rows
from meam_training.runs.options import as_flag
from meam_training.runs.run_folder import RunRecord, load_settings
from meam_training.runs.run_log import METRICS_FILE
from meam_training.runs.run_report import own_options, run_facts, start_fact
from meam_training.runs.watch import warnings_of

__all__ = ["run", "run_info"]


def run_info(run: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
    """Show a training run: settings, the numbers that mean something, and all warnings, from its files.

    Example: meam info runs/pockets

    Args:
        run: Folder of the run.
        json: Print settings, last metrics and warnings as one line of JSON to stdout.
    """
    run = given_path("run", run)
    config, last = load_settings(run), Checkpoint.latest(run)
    if config is None:
        raise NotFoundError(f"{run} holds no settings of a run, which was stopped before it began. Start it again.")
    if json:
        rows = read_rows(run / METRICS_FILE)
        metrics = {name: value for name, value in (rows[-1] if rows else {}).items() if math.isfinite(value)}
        warnings = [{"step": each.step, "warning": each.text(as_flag)} for each in warnings_of(config, rows)]
        step = 0 if last is None else last.step
        print_json({"step": step, "settings": vars(config), "metrics": metrics, "warnings": warnings})
        return
    record, best = RunRecord.load(run), Checkpoint.best(run)
    facts = {"method": own_options(config)}
    if record is not None and record.origin.get("data"):
        named = record.origin["data"]
        facts["data"] = named if isinstance(named, str) else ", ".join(map(str, named))
    facts |= {} if last is None else start_fact(last.spec.started_from)
    facts |= run_facts(run, config)
    facts["checkpoint"] = "none yet" if last is None else str(last.path)
    if best is not None and best.score is not None:
        facts["best"] = f"{best.path}, return {best.score:.4g}"
    finished = last is not None and last.step >= config.steps + config.online_steps
    folder = quote(str(run))
    facts["next"] = f"meam export {folder} --output-dir policies/first"
    if not finished:
        facts["next"] = f"meam train --resume --output-dir {folder}"
    print_mapping(str(run), facts)


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and show."""
    parse(run_info, arguments, prog)

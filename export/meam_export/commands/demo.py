"""`meam demo`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from meam_export.demo.report import write_report, write_runs
from meam_export.demo.run import run_demo
from meam_export.demo.tasks import TASKS
from meam_policy.commands import parse
from meam_policy.console import print_json, print_table, progress_bar, say

__all__ = ["COLUMNS", "cells", "demo", "run"]

COLUMNS = ("method", "return", "95 % interval", "success", "p50", "p99")
"""Columns of the printed table; latencies in milliseconds."""


def demo(
    task: Literal["pointmaze", "pockets"] = "pointmaze",
    output_dir: Path = Path("demo-output"),
    seed: int = 0,
    episodes: int | None = None,
    no_video: bool = False,
    json: bool = False,
) -> None:
    """Run the whole pipeline on real data: record, train BC, QAM and ME-AM, export, and act with the exported files.

    No network connection is needed. It takes a few minutes on two cores, prints one table, and writes report.html
    and runs.html, the page that `meam report` writes.
    Ctrl-C at any time is safe: the same command resumes where it stopped.

    pointmaze is OGBench's published task pointmaze-medium-navigate-singletask-task3-v0. pockets is a small task of
    this package, in which demonstrations seldom reach the highest reward.

    Args:
        task: Task to solve.
        output_dir: Folder for data, runs, policies and report.
        seed: Seed of data, training and evaluation.
        episodes: Evaluation episodes; by default 20 in pointmaze, 100 in pockets.
        no_video: Render no rollout. By default one is rendered if the machine can render off-screen.
        json: Print one line of JSON to stdout instead of a table.
    """
    result = run_demo(TASKS[task], output_dir, seed=seed, episodes=episodes, progress=partial(progress_bar, quiet=json))
    with progress_bar("Writing the report", 2, quiet=json) as advance:
        report = write_report(result, output_dir / "report.html", video=not no_video)
        advance(1)
        runs = write_runs(result, output_dir / "runs.html")
        advance(2)
    if json:
        print_json(result.to_json())
        return
    print_table(
        f"{result.task.environment_id}, seed {seed}; latency in ms",
        COLUMNS,
        [cells(result.labels[row["method"]], row) for row in result.table],
    )
    say(result.about_returns)
    say("", f"Report: {report}", f"Runs:   {runs}", f"Policy: {result.policy}")
    say(f"Try:    meam eval {quote(str(result.policy))} --episodes 50")


def cells(label: str, row: dict[str, Any]) -> list[Any]:
    """The cells of a row of the printed table, in the order of `COLUMNS`.

    Args:
        label: Label of the row.
        row: Its figures; see `DemoResult.table`.
    """

    def number(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    return [
        # With the settings on a line of their own, the table is 80 characters wide.
        label.replace(" (", "\n(").split("\n"),
        number("return_mean", ".2f"),
        f"{row['ci_low']:.2f} … {row['ci_high']:.2f}",
        number("success", ".0%"),
        number("latency_p50_ms", ".3f"),
        number("latency_p99_ms", ".3f"),
    ]


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and run the demo."""
    parse(demo, arguments, prog)

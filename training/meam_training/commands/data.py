"""`meam data`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.atomic_files import write_atomically
from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, print_mapping, print_table, say
from meam_policy.errors import ConfigError
from meam_policy.given_files import given_path
from meam_training.commands.source_options import SourceOptions
from meam_training.data.data_figure import draw_report
from meam_training.data.data_report import NumberRange, data_report
from meam_training.data.opening import open_dataset
from meam_training.runs.options import as_flag
from meam_training.setting_text import said

__all__ = ["DataCommandArguments", "run"]

MOST_ROWS = 40
"""Numbers of the observation that the table shows; the picture and --json have all of them."""


DESCRIPTION = """Look through a data set before learning from it.

Shows what is in it, how many of its rows chunks of actions can be learned from, what the numbers of the actions and
the observations do, and in plain words what may be wrong. It takes what `meam train --data` takes, with its options.

Example: meam data data/meam/pockets-v0 --chunk-size 5 --output pockets.png"""


@dataclass(frozen=True, kw_only=True)
class DataCommandArguments(SourceOptions):
    """Arguments of `meam data`."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Minari id or folder, OGBench .npz, HDF5 file of D4RL or robomimic, or folder of a LeRobot data set; or several,
    which are joined."""
    chunk_size: int = 1
    """Actions in a chunk, as it will be in training."""
    pad_chunks: bool = True
    """Whether chunks that cross the end of their episode will be learned from (not with the presets qam, qam-edit and
    trqam)."""
    output: Path | None = None
    """Picture to write, a .png file."""
    json: bool = False
    """Print one line of JSON to stdout."""


def run(arguments: list[str], prog: str = "meam data") -> None:
    """Run the command with command-line arguments; see `--help`."""
    parsed = parse(DataCommandArguments, arguments, prog, description=DESCRIPTION)
    if not parsed.data:
        raise ConfigError("There is no data set to look through; expected meam data DATA.")
    if parsed.chunk_size < 1:
        raise ConfigError(f"--chunk-size is {parsed.chunk_size}; expected 1 or more.")
    if parsed.output is not None and given_path("--output", parsed.output).suffix != ".png":
        raise ConfigError(f"--output is {parsed.output}; expected a file that ends in .png.")
    named, _ = parsed.named(parsed.data)
    report = data_report(open_dataset(named), parsed.chunk_size, parsed.pad_chunks)
    if parsed.output is not None:
        write_atomically(parsed.output, draw_report(report))
    if parsed.json:
        print_json(report.to_dict())
        return
    print_mapping(report.dataset_id or " + ".join(parsed.data), report.facts)
    assert report.observations is not None  # this report is not a quick one
    columns = ["", "least", "greatest", "low", "high", "at low", "at high"]
    print_lines("")
    print_table("Actions", columns, [_row(number) for number in report.actions])
    shown = report.observations[:MOST_ROWS]
    print_lines("")
    print_table("Observations", columns[:5], [_row(number)[:5] for number in shown])
    if len(report.observations) > len(shown):
        print_lines(f"and {len(report.observations) - len(shown)} more")
    for warning in report.warnings:
        say(f"Warning: {said(warning, as_flag)}")
    if parsed.output is not None:
        say(f"Wrote {parsed.output}")


def _row(number: NumberRange) -> list[str]:
    bounds = ["none" if bound is None else f"{bound:.4g}" for bound in (number.low, number.high)]
    # Four digits of what moves: of a position in map coordinates, those behind the first six.
    size, width = max(abs(number.least), abs(number.greatest)), number.greatest - number.least
    digits = 4 + (min(12, max(0, math.floor(math.log10(size / width)))) if 0 < width < size else 0)
    return [
        number.name,
        f"{number.least:.{digits}g}",
        f"{number.greatest:.{digits}g}",
        *bounds,
        f"{number.at_low:.1%}",
        f"{number.at_high:.1%}",
    ]

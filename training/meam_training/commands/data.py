"""`meam data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.atomic_files import write_atomically
from meam_policy.commands import parse
from meam_policy.console import print_json, print_mapping, print_table, say
from meam_policy.errors import ConfigError
from meam_training.data.data_figure import draw_report
from meam_training.data.data_report import NumberRange, data_report
from meam_training.data.opening import DataArguments, open_dataset

__all__ = ["data_command", "run"]

MOST_ROWS = 40
"""Numbers of the observation that the table shows; the picture and --json have all of them."""


def data_command(
    data: Annotated[str, tyro.conf.Positional],
    env_id: str | None = None,
    chunk_size: int = 1,
    pad_chunks: bool = True,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Look through a data set before learning from it.

    Shows what is in it, how many of its rows chunks of actions can be learned from, what the numbers of the actions and
    the observations do, and in plain words what may be wrong.

    Example: meam data data/meam/pockets-v0 --chunk-size 5 --output pockets.png

    Args:
        data: What `meam train --data` takes: a Minari id or folder, OGBench .npz, HDF5 file of D4RL or robomimic, or
            folder of a LeRobot data set.
        env_id: For an .npz file: OGBench single-task name, from whose goal rewards are computed. For HDF5 and LeRobot:
            the environment they were recorded in.
        chunk_size: Actions in a chunk, as it will be in training.
        pad_chunks: Whether chunks that cross the end of their episode will be learned from (not with the presets qam,
            qam-edit and trqam).
        output: Picture to write, a .png file.
        json: Print one line of JSON to stdout.
    """
    if chunk_size < 1:
        raise ConfigError(f"--chunk-size is {chunk_size}; expected 1 or more.")
    if output is not None and output.suffix != ".png":
        raise ConfigError(f"--output is {output}; expected a file that ends in .png.")
    report = data_report(open_dataset(DataArguments((data,), env_id=env_id)), chunk_size, pad_chunks)
    if output is not None:
        write_atomically(output, draw_report(report))
    if json:
        print_json(report.to_dict())
        return
    print_mapping(report.dataset_id or data, report.facts)
    assert report.observations is not None  # this report is not a quick one
    columns = ["", "least", "greatest", "low", "high", "at low", "at high"]
    print_table("\nActions", columns, [_row(number) for number in report.actions])
    shown = report.observations[:MOST_ROWS]
    print_table("\nObservations", columns[:5], [_row(number)[:5] for number in shown])
    if len(report.observations) > len(shown):
        print(f"and {len(report.observations) - len(shown)} more")
    for warning in report.warnings:
        say(f"Warning: {warning}")
    if output is not None:
        say(f"Wrote {output}")


def run(arguments: list[str], prog: str = "meam data") -> None:
    """Run the command with command-line arguments; see `--help`."""
    parse(data_command, arguments, prog)


def _row(number: NumberRange) -> list[str]:
    bounds = ["none" if bound is None else f"{bound:.4g}" for bound in (number.low, number.high)]
    return [
        number.name,
        f"{number.least:.4g}",
        f"{number.greatest:.4g}",
        *bounds,
        f"{number.at_low:.1%}",
        f"{number.at_high:.1%}",
    ]

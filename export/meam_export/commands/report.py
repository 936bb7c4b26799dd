"""`meam report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from meam_export.report.gathering import ReportOptions
from meam_export.report.page import write_report
from meam_policy.commands import parse
from meam_policy.console import print_json, say

__all__ = ["report", "run"]


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path = Path("report.html"),
    reference: Path | None = None,
    data: tuple[str, ...] = (),
    episodes: int = 0,
    seed: int = 0,
    film: bool = False,
    compare: bool = False,
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = (),
    json: bool = False,
) -> None:
    """Write one HTML page about runs and policies: what they return, how they learned, what they do, what to mind.

    The page loads nothing, and can be sent as it is. Runs that differ in their seed alone are shown as one, with a band
    over the seeds; a policy folder beside its run is shown with it.

    Examples:
      meam report runs/pockets policies/pockets
      meam report runs/me-am-0 runs/me-am-1 runs/qam-0 runs/qam-1 --compare --output compared.html

    Args:
        runs: Folders of training runs, of checkpoints, or of policies.
        output: Page to write. One that this command wrote before is replaced, any other file is refused.
        reference: TOML file of named returns to draw beside those of the runs, such as "random policy" = 0.1, or
            expert = [12.0, 11.5, 12.5] with the ends of an interval.
        data: The data, where they are no longer where the runs have them from.
        episodes: Episodes to run with every run in its environment, for its return; 0 takes what was logged.
        seed: Seed of the first of them, and of the film.
        film: Show a rollout, if the environment can be drawn on this machine.
        compare: Draw the runs in common figures and side by side, rather than one after the other.
        packages: Packages to import first, such as gymnasium_robotics, whose environments exist only then.
        json: Print one line of JSON to stdout.
    """
    options = ReportOptions(
        reference=reference,
        data=data,
        episodes=episodes,
        seed=seed,
        film=film,
        compare=compare,
        packages=packages,
    )
    written = write_report(runs, output, options, lambda part: None if json else say(f"Looking at {part}"))
    if json:
        print_json({"report": str(written.path), "groups": written.groups, "notes": written.notes})
        return
    for note in written.notes:
        say(f"Not shown: {note}")
    say(f"Wrote {written.path}, {written.path.stat().st_size / 1e6:.1f} MB.")


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and write the page."""
    parse(report, arguments, prog)

"""`meam collect`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, progress_bar, say
from meam_policy.errors import ConfigError
from meam_training.collection.collect import collect

__all__ = ["collect_command", "run"]


def collect_command(
    env_id: Annotated[str, tyro.conf.Positional] = "meam/Pockets-v0",
    transitions: int = 100_000,
    seed: int = 0,
    policy: str | None = None,
    dataset_id: str | None = None,
    root: Path | None = None,
    mode_shares: tuple[str, ...] = (),
    resume: bool = False,
    json: bool = False,
) -> None:
    """Record an environment's scripted demonstrator, or a policy, into a local Minari data set.

    There are demonstrators for meam/Pockets-v0, and for OGBench's single-task pointmaze, cube, scene and puzzle
    environments. The same seed gives the same data. The data set appears once it is complete; transitions recorded
    before Ctrl-C are kept, and --resume continues from there.

    Example: meam collect cube-single-play-singletask-task1-v0 --transitions 1000000

    Args:
        env_id: Environment to record.
        transitions: Number of transitions to record; the last episode is completed.
        seed: Seed of environment and demonstrator.
        policy: Policy folder, or Hub repo id, to run instead of the scripted demonstrator.
        dataset_id: Minari id, such as pockets/rare-north-v0; by default made from the environment's name.
        root: Folder of the Minari data sets; by default MINARI_DATASETS_PATH, or ~/.minari/datasets.
        mode_shares: Pockets only: probability of aiming at each pocket, as in west=0.5 east=0.45 north=0.05.
        resume: Continue the unfinished recording of this data set, if there is one.
        json: Print one line of JSON to stdout.
    """
    try:
        with progress_bar(f"Recording {env_id}", transitions, quiet=json) as advance:
            folder = collect(
                env_id,
                transitions,
                seed=seed,
                policy=policy,
                dataset_id=dataset_id,
                root=root,
                mode_shares=_shares(mode_shares) if mode_shares else None,
                resume=resume,
                on_progress=_with_rate(advance),
            )
    except KeyboardInterrupt:
        say("Repeat the command with --resume to continue.")
        raise
    if json:
        print_json({"dataset": str(folder)})
    else:
        say(f"Recorded {folder}\nTrain with: meam train me-am --data {quote(str(folder))} --output-dir runs/first")


def _with_rate(advance: Callable[..., None]) -> Callable[[int, int], None]:
    """Show the recording rate since the first call; a resumed recording does not start at zero."""
    first: tuple[int, float] | None = None

    def on_progress(done: int, total: int) -> None:
        nonlocal first
        first = first or (done, time.perf_counter())
        seconds = time.perf_counter() - first[1]
        advance(done, f"{(done - first[0]) / seconds:.0f} transitions/s" if done > first[0] else "")

    return on_progress


def _shares(texts: tuple[str, ...]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            shares[name] = float(number)
        except ValueError as error:
            raise ConfigError(f'A mode share is "{text}"; expected name=number, such as north=0.05.') from error
    return shares


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and record."""
    parse(collect_command, arguments, prog)

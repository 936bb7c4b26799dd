"""`meam collect`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.commands.environment_options import environment_arguments, typed_environment
from meam_policy.console import print_json, progress_bar, say
from meam_policy.errors import ConfigError
from meam_training.collection.collect import collect

__all__ = ["collect_command", "run"]


def collect_command(
    env_id: Annotated[str | None, tyro.conf.Positional] = None,
    transitions: int = 100_000,
    seed: int = 0,
    policy: str | None = None,
    env_kwargs: str | None = None,
    max_episode_steps: int | None = None,
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = (),
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
        env_id: Environment to record, as it is registered, or module:id; by default meam/Pockets-v0, or with --policy
            the one its data was recorded in, with the recorded arguments, time limit and wrappers.
        transitions: Number of transitions to record; the last episode is completed.
        seed: Seed of environment and demonstrator.
        policy: Policy folder, or Hub repo id, to run instead of the scripted demonstrator.
        env_kwargs: With --policy: arguments of the environment, as in '{"g": 2}', in place of recorded ones.
        max_episode_steps: With --policy: time limit of the environment, steps; by default as recorded or registered.
        packages: Packages to import first, such as gymnasium_robotics, whose environments exist only then.
        dataset_id: Minari id, such as pockets/rare-north-v0; by default made from the environment's name.
        root: Folder of the Minari data sets; by default MINARI_DATASETS_PATH, or ~/.minari/datasets.
        mode_shares: Pockets only: probability of aiming at each pocket, as in west=0.5 east=0.45 north=0.05.
        resume: Continue the unfinished recording of this data set, if there is one.
        json: Print one line of JSON to stdout.
    """
    env_id, _ = typed_environment(env_id, packages)
    if env_id is None and policy is None:
        env_id = "meam/Pockets-v0"
    try:
        with progress_bar(f"Recording {env_id or policy}", transitions, quiet=json) as advance:
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
                env_kwargs=environment_arguments(env_kwargs, max_episode_steps),
            )
    except KeyboardInterrupt:
        say("Repeat the command with --resume to continue.")
        raise
    if json:
        print_json({"dataset": str(folder)})
    else:
        say(f"Recorded {folder}", f"Train with: meam train me-am --data {quote(str(folder))} --output-dir runs/first")


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

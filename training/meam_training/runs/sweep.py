"""Sweeps: a training run for every combination of the tasks and settings in a TOML file.

    [settings]                      # for all runs; ignored by those on which a setting has no effect
    preset = "me-am"                # the default
    steps = 100_000
    hidden_dims = [256, 256]

    [grid]                          # one run for each combination of these values
    seed = [0, 1, 2]
    inverse_temperature = [1, 3]

    [tasks.cube-1]                  # the data of a task, and its own settings
    data = "cube-single-play-v0.npz"
    env_id = "cube-single-play-singletask-task1-v0"

Each run is a plain `meam train` command, so any scheduler can execute it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from meam_policy.atomic_files import given_folder
from meam_policy.errors import CheckpointError, ConfigError, OutputError
from meam_policy.given_files import given_path
from meam_policy.toml_file import read_toml
from meam_policy.typed import typed
from meam_training.config import PRESETS, TrainConfig
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.options import option
from meam_training.runs.run_folder import load_settings

__all__ = ["Outcome", "SweepRun", "read_sweep", "run_sweep"]

INTERRUPTED = 130
"""Exit code of a run that saved and stopped after an interrupt."""


_TASK = {
    "data": (str, "a text"),
    "env_id": (str, "a text"),
    "env_kwargs": (dict, "a table, such as {g = 2}"),
    "max_episode_steps": (int, "a whole number"),
    "import": (list, "a list of packages"),
}
"""What a task may have beside settings, as in `meam train`."""


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep.

    Attributes:
        name: Task and grid values, such as "task=cube-1,seed=0,inverse_temperature=3".
        output_dir: Folder of the run.
        config: Settings of the run.
        arguments: Arguments after `meam` on its command line.
        given: Settings that the command line sets.
    """

    name: str
    output_dir: Path
    config: TrainConfig
    arguments: tuple[str, ...]
    given: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Command line for a POSIX shell; a run that has begun resumes from its newest checkpoint."""
        return shlex.join(("meam", *self.arguments))

    @property
    def log(self) -> Path:
        """File for the run's output, written by `run_sweep`; beside the run's folder, which must be empty at first."""
        return self.output_dir.with_name(self.output_dir.name + ".log")

    @property
    def finished(self) -> bool:
        """Whether the run has completed all of its steps with these settings, as far as they determine the weights."""
        try:
            last = Checkpoint.latest(self.output_dir)
        except CheckpointError:
            return False  # the run itself will report the error
        if last is None:
            return False
        same = last.config.deciding() == self.config.resolved(last.config).deciding()
        return same and last.step >= self.config.steps + self.config.online_steps


class Outcome(NamedTuple):
    """Outcome of a run: finished, failed, interrupted (it saved, and can be resumed), or not started."""

    run: SweepRun
    state: Literal["finished", "failed", "interrupted", "not started"]


@typed()
def read_sweep(path: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> list[SweepRun]:
    """Read the runs of a sweep, and check all of their settings.

    Args:
        path: TOML file, in the format shown at the top of this module. A task has `data`, optionally `env_id`,
            `env_kwargs`, `max_episode_steps` and `import`, as in `meam train`, and settings. Settings are the fields of
            `TrainConfig` and `preset`. A run ignores entries of [settings] that have no effect on it; in [grid] and
            [tasks.NAME] these are errors.
        output_dir: Folder of the sweep, with one subfolder per run.

    Returns:
        The runs, task by task, in the order of the grid with its last setting varying fastest.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: the file is malformed, a setting is unknown (the message suggests the nearest known one), out of
            range, given twice or without effect, or two runs are the same.
    """
    settings, grid, tasks = _tables(given_path("path", path))
    folder = given_folder("output_dir", output_dir)
    runs: dict[str, SweepRun] = {}
    idle = settings.keys() - {"preset"}
    for task, own in tasks.items():
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            name = ",".join(f"{key}={_readable(value)}" for key, value in {"task": task, **point}.items())
            if name in runs:
                raise ConfigError(f"{path}: two runs are {name}; expected different values in every list of [grid].")
            run = _run(name, folder / name, settings, {**own, **point})
            idle = {key for key in idle if key not in own and getattr(run.config, key) != _setting(settings[key])}
            runs[name] = run
    for key in sorted(idle):  # settings without effect on any run, which raises
        next(iter(runs.values())).config.changed(**{key: _setting(settings[key])})
    return list(runs.values())


@typed()
def run_sweep(
    runs: Sequence[SweepRun], workers: int = 1, report: Callable[[str], None] = lambda text: None
) -> list[Outcome]:
    """Run `meam train` for each run that is not finished, several at a time, each with its own log file.

    A run that fails does not stop the others. SIGINT and SIGTERM are forwarded to the runs, which finish their update
    and save; no further runs are started. Each run may use an equal share of this process's CPU cores, unless
    OMP_NUM_THREADS sets their number.

    Args:
        runs: Runs of the sweep.
        workers: Number of runs executed at a time, at least 1.
        report: Called with a line of text whenever a run starts or ends.

    Returns:
        The outcome of each run, in their order. After an interrupt, some are "interrupted" or "not started".

    Raises:
        ConfigError: workers is less than 1, or a run was begun with settings that the sweep no longer contains.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected 1 or more.")
    for run in runs:
        _check_begun(run)
    codes = {run: 0 for run in runs if run.finished}
    waiting = [run for run in runs if run not in codes]
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // workers)), **os.environ}
    running: dict[SweepRun, subprocess.Popen[bytes]] = {}
    with _stop_on_error(running), _collect_signals() as received:
        forwarded = 0
        while running or (waiting and not received):
            while waiting and len(running) < workers and not received:
                run = waiting.pop(0)
                running[run] = _start(run, environment)
                report(f"Started {run.name}; its log is {run.log}")
            for number in received[forwarded:]:
                forwarded += 1
                for process in running.values():
                    process.send_signal(number)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                codes[run] = running.pop(run).returncode
                report(f"[{len(codes)} of {len(runs)}] {_state(codes[run], received)}: {run.name}")
            time.sleep(0.1)
    return [Outcome(run, _state(codes.get(run), received)) for run in runs]


def _tables(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, dict[str, Any]]]:
    """Read the three tables of a sweep file, and check them against each other."""
    data = read_toml(path, "sweep file")
    known = ("settings", "grid", "tasks")
    for name, table in data.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"Did you mean [{close[0]}]?" if close else "Expected the tables [settings], [grid], [tasks.NAME]."
            raise ConfigError(f'{path}: there is no table "{name}" in a sweep. {hint}')
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is {table!r}; expected a table, [{name}].")
    settings, grid, tasks = (data.get(name, {}) for name in known)
    if not tasks:
        raise ConfigError(f"{path} has no task; expected at least one table [tasks.NAME] with its data.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: {name} in [grid] is {values!r}; expected a list of values.")
    for task, own in tasks.items():
        if not re.fullmatch(r"[\w.-]+", task):
            raise ConfigError(f'{path}: a task is called "{task}"; expected letters, digits, ".", "_" and "-".')
        if not isinstance(own, dict) or not isinstance(own.get("data"), str):
            raise ConfigError(f'{path}: the task {task} has no data; expected data = "…" as in `meam train --data`.')
        for name, (kind, expected) in _TASK.items():
            if name in own and not isinstance(own[name], kind):
                raise ConfigError(f"{path}: {name} of the task {task} is {own[name]!r}; expected {expected}.")
    for where, others in (("[settings]", settings), *((f"[tasks.{task}]", own) for task, own in tasks.items())):
        for name in grid.keys() & others.keys():
            raise ConfigError(f"{path}: {name} is both in [grid] and in {where}; expected it in one of them.")
    for name in _TASK.keys() & {*settings, *grid}:
        raise ConfigError(f"{path}: {name} is not a setting; give it in [tasks.NAME].")
    return settings, grid, tasks


def _run(name: str, output_dir: Path, shared: Mapping[str, Any], own: Mapping[str, Any]) -> SweepRun:
    settings = {key: _setting(value) for key, value in {**shared, **own}.items()}
    preset, given = settings.pop("preset", "me-am"), {key: settings.pop(key) for key in _TASK if key in settings}
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
    config = TrainConfig.preset(preset, settings, **{key: settings[key] for key in own if key in settings})
    default = TrainConfig.preset(preset)
    settings = {key: value for key, value in settings.items() if getattr(config, key) == value}  # with an effect
    arguments = ["train", preset]
    for key, value in given.items():
        arguments += option(key, json.dumps(value) if isinstance(value, dict) else value, None)
    arguments += ["--output-dir", str(output_dir), "--resume"]
    options = {key: option(key, value, getattr(default, key)) for key, value in settings.items()}
    arguments += itertools.chain(*options.values())
    return SweepRun(name, output_dir, config, tuple(arguments), tuple(key for key, option in options.items() if option))


def _setting(value: Any) -> Any:
    """Convert a TOML value to a setting."""
    return tuple(value) if isinstance(value, list) else value


def _readable(value: object) -> str:
    """Convert a value to a part of a folder's name."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)


def _check_begun(run: SweepRun) -> None:
    """Check that a resumed run will have the sweep's settings: `meam train --resume` keeps those not given anew."""
    try:
        begun = load_settings(run.output_dir)
    except (CheckpointError, OutputError):
        return  # the run itself will report the error
    if begun is None or begun.method != run.config.method:
        return
    for name, value in {**asdict(run.config), "learning_rate": run.config.adam_rate}.items():
        if name in ("pretrain_steps", "polyak", "reward_offset") and value is None:
            continue  # a resumed run keeps its own
        if name not in run.given and getattr(begun, name) != value:
            raise ConfigError(
                f"{run.output_dir} was begun with {name} = {getattr(begun, name)!r}, but in the sweep it has its "
                f"default {value!r}. Restore the setting in the sweep file, or choose another output folder."
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(run: SweepRun, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "meam_policy", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # else Ctrl-C would reach the run twice, and the second would stop it unsaved
        )


def _state(code: int | None, received: Sequence[int]) -> Literal["finished", "failed", "interrupted", "not started"]:
    if code is None:
        return "not started"
    if code == 0:
        return "finished"
    return "interrupted" if code == INTERRUPTED or -code in received else "failed"


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stop_on_error(running: Mapping[SweepRun, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind: on exit, send SIGTERM to those still running, and wait for them to save."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()

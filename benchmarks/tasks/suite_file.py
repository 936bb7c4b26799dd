"""A suite's TOML file: domains of tasks, methods, and what all of them share.

    [suite]
    updates = 3000                  # gradient steps of every run
    seeds = [0, 1, 2]               # of training
    episodes = 50                   # of every evaluation
    data_seed = 0

    [settings]                      # of every run; ignored by methods on which a setting has no effect
    hidden_dims = [128, 128, 128]

    [methods.me-am]                 # a preset and the settings that make this a variant of it
    preset = "me-am"
    mixture_weight = 0.1

    [domains.pointmaze-medium]      # tasks on the same data, or with data of their own (mode_shares)
    environment = "pointmaze-medium-navigate-singletask-task{task}-v0"
    tasks = [1, 2, 3, 4, 5]
    transitions = 100_000
    chunk_size = 10
    discount = 0.99

A domain may set the chunk and the discount, which belong to the task. All other settings are those of the table.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from meam_policy.errors import ConfigError
from meam_policy.toml_file import read_toml
from meam_training import PRESETS, TrainConfig

__all__ = ["Job", "Suite", "Task", "read_suite"]


@dataclass(frozen=True)
class Task:
    """A task, and what its data are.

    Attributes:
        domain: Tasks of a domain are averaged in the report.
        label: The task's name within its domain.
        environment_id: Environment to act in.
        transitions: Transitions to record; None where the data are files.
        chunk_size: Actions in a chunk.
        discount: Discount per environment step.
        sparse: Whether the data's rewards become -1 unless they are 0, as QAM trains scene and the puzzles.
        success_reward: Reward of a step in the data that counts as success, or more.
        mode_shares: Pockets only: how often the demonstrator aims at each pocket.
        files: OGBench files to read in place of a recording, in the folder of the data.
        note: A word that the report adds to the domain's name.
    """

    domain: str
    label: str
    environment_id: str
    transitions: int | None = None
    chunk_size: int = 1
    discount: float = 0.99
    sparse: bool = False
    success_reward: float = 0.0
    mode_shares: Mapping[str, float] | None = None
    files: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """Name on the command line and in files."""
        return f"{self.domain}-{self.label}"


@dataclass(frozen=True)
class Job:
    """One training run and its evaluation.

    Attributes:
        suite: What it is a part of.
        task: What is learned.
        method: A key of the suite's methods.
        seed: Seed of weights, batches and noise in training.
    """

    suite: Suite
    task: Task
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Stem of the job's files."""
        return f"{self.task.name}-{self.method}-seed{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """Settings: those of the suite, the task's chunk and discount, the method's own, and its preset's."""
        own = dict(self.suite.methods[self.method])
        preset = own.pop("preset")
        shared = {**self.suite.settings, "chunk_size": self.task.chunk_size, "discount": self.task.discount}
        return TrainConfig.preset(preset, shared, **own, steps=self.suite.updates, seed=self.seed)

    def header(self) -> dict[str, Any]:
        """What a result is of, as JSON reads it back."""
        about = {
            "task": asdict(self.task),
            "method": self.method,
            "preset": self.suite.methods[self.method]["preset"],
            "seed": self.seed,
            "data_seed": self.suite.data_seed,
            "episodes": self.suite.episodes,
            "updates": self.suite.updates,
        }
        return {**json.loads(json.dumps(about)), "settings": json.loads(self.config.to_json())}


@dataclass(frozen=True)
class Suite:
    """A table of runs.

    Attributes:
        updates: Gradient steps of every run, with those of pretraining.
        tasks: Tasks by name, cheapest first.
        methods: Settings of every method by its name; `preset` is one of them.
        settings: Settings of all runs.
        seeds: Seeds of training.
        episodes: Episodes of every evaluation.
        data_seed: Seed of the recordings.
    """

    updates: int
    tasks: Mapping[str, Task]
    methods: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    episodes: int = 50
    data_seed: int = 0

    def jobs(self) -> list[Job]:
        """All runs; methods vary fastest, then tasks, so that what is done at any time compares all methods."""
        choices = itertools.product(self.seeds, self.tasks.values(), self.methods)
        return [Job(self, task, method, seed) for seed, task, method in choices]


_TABLES = ("suite", "settings", "methods", "domains")
_SUITE = tuple(f.name for f in fields(Suite) if f.name not in ("tasks", "methods", "settings"))
_SHARED = tuple(f.name for f in fields(Task) if f.name not in ("domain", "label", "environment_id"))
_DOMAIN = ("environment", "tasks", *_SHARED)


def read_suite(path: Path) -> Suite:
    """Read and check a suite's file.

    Args:
        path: TOML file, in the format shown at the top of this module.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: a table, key or setting is unknown or missing, or a setting is out of range or without effect.
    """
    data = read_toml(path, "suite file")
    _check_keys(data, _TABLES, str(path), required=("suite", "methods", "domains"))
    about, settings = data["suite"], {key: _setting(value) for key, value in data.get("settings", {}).items()}
    _check_keys(about, _SUITE, f"{path}: [suite]", required=("updates",))
    for name in settings.keys() & {"steps", "seed", "chunk_size", "discount"}:
        raise ConfigError(
            f"{path}: {name} is in [settings]; expected updates and seeds in [suite], and the chunk and the discount "
            "in [domains.NAME]."
        )
    methods = {}
    for name, own in data["methods"].items():
        if own.get("preset") not in PRESETS:
            expected = ", ".join(PRESETS)
            raise ConfigError(f"{path}: the preset of [methods.{name}] is {own.get('preset')!r}; expected {expected}.")
        methods[name] = {key: _setting(value) for key, value in own.items()}
    tasks = {task.name: task for name, own in data["domains"].items() for task in _tasks(name, own, path)}
    suite = Suite(tasks=tasks, methods=methods, settings=settings, **{k: _setting(v) for k, v in about.items()})
    for job in replace(suite, seeds=(0,)).jobs():
        _ = job.config  # raises what is wrong with it
    return suite


def _tasks(domain: str, own: Mapping[str, Any], path: Path) -> Iterator[Task]:
    where = f"{path}: [domains.{domain}]"
    _check_keys(own, _DOMAIN, where, required=("environment", "tasks"))
    if ("transitions" in own) == ("files" in own):
        raise ConfigError(f"{where} has {sorted(own)}; expected either transitions to record, or files to read.")
    shared = {key: _setting(own[key]) for key in _SHARED if key in own}
    shares = shared.pop("mode_shares", None)
    labels = [str(label) for label in own["tasks"]]
    if shares is not None and set(shares) != set(labels):
        raise ConfigError(f"{where}: mode_shares are of {sorted(shares)}; expected one for each of {sorted(labels)}.")
    for label in labels:
        environment_id = own["environment"].replace("{task}", label)
        yield Task(domain, label, environment_id, mode_shares=None if shares is None else shares[label], **shared)


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str, required: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f'Did you mean "{close[0]}"?' if close else f"Expected {', '.join(known)}."
            raise ConfigError(f'{where} has the unknown entry "{key}". {hint}')
    for key in required:
        if key not in table:
            raise ConfigError(f'{where} lacks "{key}".')


def _setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

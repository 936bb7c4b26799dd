"""The stages of the demo. Each keeps its result on disk, so that an interrupted demo resumes where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meam_export.demo.tasks import METHODS, DemoTask
from meam_export.export import export_policy
from meam_export.report.labels import method_labels
from meam_policy.atomic_files import given_folder
from meam_policy.console import say
from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, OutputError
from meam_policy.folder.policy_folder import CONFIG_FILE
from meam_policy.given_files import read_regular
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult, mean_interval
from meam_training.collection.collect import collect
from meam_training.collection.dataset_folder import default_dataset_id
from meam_training.data.dataset import OfflineDataset
from meam_training.runs.checkpoint import Checkpoint
from meam_training.setting_text import as_argument
from meam_training.trainer import train

__all__ = ["DemoResult", "run_demo"]

SETTINGS_FILE = "demo.json"
TABLE_FILE = "table.json"

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""Opens a progress bar with a description and a total; see `meam_policy.console.progress_bar`."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo produced.

    Attributes:
        policy: Folder of the ME-AM policy.
        task: The task.
        seed: Seed of the demo.
        episodes: Evaluation episodes.
        table: One row for the data and one for every method; figures as in `RolloutResult.summary`, and the rule by
            which the policy acted.
        dataset: The recorded data.
        checkpoints: Last checkpoint of every method.
        rollouts: Evaluation episodes of every method.
    """

    policy: Path
    task: DemoTask
    seed: int
    episodes: int
    table: list[dict[str, Any]]
    dataset: OfflineDataset
    checkpoints: dict[str, Checkpoint]
    rollouts: dict[str, RolloutResult]

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the table's rows: "data", and the methods' by `method_labels`."""
        return {"data": "data"} | method_labels({method: saved.config for method, saved in self.checkpoints.items()})

    @property
    def about_returns(self) -> str:
        """What the table's returns are averaged over, and how the policies acted."""
        ends = self.dataset.episode_ends
        rules = {self.labels[row["method"]]: row["acting"] for row in self.table if row["acting"]}
        same = len(set(rules.values())) == 1
        acting = next(iter(rules.values())) if same else ", ".join(f"{name} {rule}" for name, rule in rules.items())
        past_the_goal = bool((self.dataset.terminations & ~ends).any())
        return (
            f"Returns are means over {_count(self.episodes, 'episode')} of every policy, and over the "
            f"{_count(int(ends.sum()), 'recorded episode')} of the data"
            + (", which go on past the goal where the policies' episodes end." if past_the_goal else ".")
            + f" Every policy acted by its rule: {acting}."
        )

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {"policy": str(self.policy), "env_id": self.task.environment_id, "table": self.table}


def run_demo(
    task: DemoTask, output_dir: str | os.PathLike[str], *, seed: int, episodes: int | None, progress: ProgressBar
) -> DemoResult:
    """Record data, train every method, export, and act with the exported files.

    Args:
        task: One of `TASKS`.
        output_dir: Folder for all results; an earlier demo there with the same task and seed is resumed.
        seed: Seed of data, training and evaluation.
        episodes: Evaluation episodes; None takes the task's.
        progress: Opens progress bars.

    Raises:
        ConfigError: `episodes` or `seed` is out of range.
        OutputError: the folder holds something else, or cannot be written.
    """
    folder = given_folder("output_dir", output_dir)
    count = task.episodes if episodes is None else episodes
    if count < 1 or seed < 0:
        raise ConfigError(f"episodes is {count} and seed is {seed}; expected episodes >= 1 and seed >= 0.")
    _claim(folder, {"task": task.name, "seed": seed})
    dataset = _dataset(task, folder, seed, progress)
    env = make_environment(task.environment_id)
    table = [_data_row(dataset, task.success_reward)]
    checkpoints, rollouts = {}, {}
    try:
        for method in METHODS:
            checkpoints[method] = _train(task, method, seed, dataset, folder, progress)
            policy_folder = _export(checkpoints[method], folder / "policies" / method, progress)
            policy = MeamPolicy.from_pretrained(policy_folder)
            with progress(f"Acting with {method}", count) as advance:
                rollouts[method] = rollout(policy, env, count, seed, record=True, on_episode=advance)
            table.append(_row(method, policy.spec.acting_name, rollouts[method]))
    finally:
        env.close()
    (folder / TABLE_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return DemoResult(folder / "policies" / "me-am", task, seed, count, table, dataset, checkpoints, rollouts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Claim the output folder for this demo, or check that it already belongs to it.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    file = folder / SETTINGS_FILE
    if file.is_file():
        try:
            there = json.loads(read_regular(file))
        except ValueError as error:
            raise OutputError(f"{file} is damaged. Choose another --output-dir, or delete {folder}.") from error
        if there != settings:
            raise OutputError(f"{folder} holds a demo with other settings, {there}. Choose another --output-dir.")
        return
    if (folder / CONFIG_FILE).is_file() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        what = "a policy" if (folder / CONFIG_FILE).is_file() else "something else"
        raise OutputError(f"{folder} already holds {what}. Choose another --output-dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be written: {error.strerror}.") from error


def _dataset(task: DemoTask, folder: Path, seed: int, progress: ProgressBar) -> OfflineDataset:
    root, name = folder / "data", default_dataset_id(task.environment_id)
    if not (root / name).is_dir():
        with progress(f"Recording {task.environment_id}", task.transitions) as advance:
            collect(
                task.environment_id,
                task.transitions,
                seed=seed,
                root=root,
                resume=True,
                on_progress=lambda done, _: advance(done),
            )
    return OfflineDataset.from_minari(root / name)


def _train(
    task: DemoTask, method: str, seed: int, dataset: OfflineDataset, folder: Path, progress: ProgressBar
) -> Checkpoint:
    config, run = task.config(method, seed), folder / "runs" / method
    last = Checkpoint.latest(run)
    if last is not None and last.step == config.steps and last.config == config.resolved(last.config):
        return last
    with progress(f"Training {method}", config.steps) as advance:
        return train(
            config,
            dataset,
            run,
            resume=True,
            on_progress=lambda step, metrics: advance(step, f"{metrics['updates_per_second']:.0f} updates/s"),
            on_warning=lambda warning: say(f"Warning about {method} at {warning.step}: {warning.text(as_argument)}"),
        )


def _export(checkpoint: Checkpoint, folder: Path, progress: ProgressBar) -> Path:
    if (folder / CONFIG_FILE).is_file():
        return folder
    with progress(f"Exporting {checkpoint.config.method}", 1) as advance:
        export_policy(checkpoint, folder)
        advance(1)
    return folder


def _row(method: str, acting: str, result: RolloutResult) -> dict[str, Any]:
    kept = ("return_mean", "ci_low", "ci_high", "success", "latency_p50_ms", "latency_p99_ms")
    summary = result.summary()
    return {"method": method, "acting": acting, **{name: summary[name] for name in kept}}


def _data_row(dataset: OfflineDataset, success_reward: float) -> dict[str, Any]:
    """The recorded episodes under the task's reward. Unlike the policies' episodes, they do not end at the goal."""
    low, high = mean_interval(dataset.episode_returns)
    starts = np.concatenate([[0], np.flatnonzero(dataset.episode_ends)[:-1] + 1])
    best = np.maximum.reduceat(dataset.rewards, starts)
    return {
        "method": "data",
        "acting": None,
        "return_mean": float(dataset.episode_returns.mean()),
        "ci_low": low,
        "ci_high": high,
        "success": float((best >= success_reward).mean()),
        "latency_p50_ms": None,
        "latency_p99_ms": None,
    }

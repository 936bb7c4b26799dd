"""The defaults of every method on the same tasks, for the same CPU time of training.

    python benchmarks/defaults/run.py --output out/defaults
    python benchmarks/defaults/report.py out/defaults

Every (task, variant, reward transform, seed) is one job: it trains, exports, acts with the exported policy, and leaves
one JSON file under OUTPUT/jobs. A job whose file is there is not done again, so an interrupted suite resumes where it
stopped. Data are recorded once, and the time of an update is measured once per task and variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import METHODS, TASKS, Task, summarise

from meam_export import export_policy
from meam_policy import ActionError, DivergedError, MeamPolicy, ParityError
from meam_policy.environments.make import make_environment
from meam_policy.rollouts.episodes import rollout
from meam_training import OfflineDataset, TrainConfig, train
from meam_training.runs.csv_file import read_rows

__all__ = ["Job", "main", "run_job", "run_jobs", "steps_within"]

EVALUATION_SEED = 1_000_000
"""Seed of the first evaluation episode; those of the recorded ones are far above."""
FEWEST_UPDATES = 20
TIMED_SECONDS = 1.5
"""An update is timed in a run of at least so many CPU seconds."""
FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One training run and its evaluation.

    Attributes:
        task: A key of `TASKS`.
        method: A preset's name.
        overrides: Settings that make this a variant of the method.
        reward_scale: Factor on the data's rewards; the evaluation counts the environment's own.
        reward_offset: Added to the data's rewards after that.
        seed: Seed of weights, batches and noise in training.
        seconds: CPU seconds of training; None takes the task's.
    """

    task: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reward_scale: float = 1.0
    reward_offset: float = 0.0
    seed: int = 0
    seconds: float | None = None

    @property
    def variant(self) -> str:
        """The method, with its overrides: "me-am objective=adjoint"."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.overrides.items())])

    @property
    def name(self) -> str:
        """Stem of the job's file."""
        rewards = f"x{self.reward_scale:g}{self.reward_offset:+g}"
        return f"{self.task}-{self.variant.replace(' ', '-')}-{rewards}-seed{self.seed}".replace("/", "-")

    @property
    def budget(self) -> float:
        """CPU seconds of training."""
        return TASKS[self.task].seconds if self.seconds is None else self.seconds

    def config(self, steps: int) -> TrainConfig:
        """Settings for that many updates: the task's sizes, the variant's overrides, and the method's defaults.

        An override of `pretrain_steps` is a share of the steps, whose number follows from the CPU time.
        """
        own = dict(self.overrides)
        if "pretrain_steps" in own:
            own["pretrain_steps"] = int(own["pretrain_steps"] * steps)
        return TrainConfig.preset(self.method, TASKS[self.task].settings, **own, steps=steps, seed=self.seed)

    def rewarded(self, dataset: OfflineDataset) -> OfflineDataset:
        """The data with the job's rewards."""
        rewards = dataset.rewards * self.reward_scale + self.reward_offset
        return dataclasses.replace(dataset, rewards=rewards.astype(dataset.rewards.dtype))


def run_job(job: Job, output: Path) -> dict[str, Any]:
    """Train, export and act; write OUTPUT/jobs/NAME.json.

    Args:
        job: What to do.
        output: Folder of the suite, with the job's data and the time of its updates.

    Returns:
        What is in the file. A run that failed by its numbers has the error, and no evaluations.
    """
    task, config = TASKS[job.task], job.config(steps_within(job, output))
    dataset = task.dataset(output / "data")
    result = _header(job, config) | {"data": summarise(dataset), "error": None}
    scratch = _file(job, output).with_name(f".{job.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    start = time.process_time()
    try:
        checkpoint = train(config, job.rewarded(dataset), scratch / "run")
        result["train_cpu_seconds"] = time.process_time() - start
        result["metrics"] = read_rows(scratch / "run" / "metrics.csv")[-1]
        exported = export_policy(checkpoint, scratch / "policy")
        result["sampled"] = _evaluate(task, MeamPolicy.from_pretrained(exported))
        result["zero_noise"] = _evaluate(task, MeamPolicy.from_pretrained(exported, noise_scale=0.0))
    except (DivergedError, ActionError, ParityError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result.setdefault("train_cpu_seconds", time.process_time() - start)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _write(_file(job, output), result)
    return result


def steps_within(job: Job, output: Path) -> int:
    """Updates that take the job's CPU seconds; the time of an update is measured once and kept in OUTPUT/timing."""
    file = output / "timing" / f"{job.task}-{job.variant.replace(' ', '-')}.json"
    settings = _settings(dataclasses.replace(job, seed=0).config(FEWEST_UPDATES))
    timing = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if timing.get("settings") != settings:
        timing = {"ms_per_update": _ms_per_update(job, output), "settings": settings}
        _write(file, timing)
    return max(FEWEST_UPDATES, round(1000 * job.budget / timing["ms_per_update"]))


def read_result(job: Job, output: Path) -> dict[str, Any] | None:
    """The result of a job done before, or None.

    Raises:
        SystemExit: it was done with other settings, or is of another version.
    """
    file = _file(job, output)
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    header = _header(job, job.config(steps_within(job, output)))
    if changed := [key for key in header if result.get(key) != header[key]]:
        raise SystemExit(f"{file} differs in {', '.join(changed)} from what is asked for. Choose another --output.")
    return result


def run_jobs(jobs: Sequence[Job], output: Path, workers: int) -> None:
    """Do the jobs that have no result yet, each in a process of its own.

    Args:
        jobs: What to do.
        output: Folder of the suite.
        workers: Processes at a time; 0 works in this one.
    """
    for task in {job.task: TASKS[job.task] for job in jobs}.values():
        data = summarise(task.dataset(output / "data"))
        print(f"{task.name}: data {data['return_mean']:.2f}, best tenth {data['best_tenth']:.2f}", flush=True)
    waiting = [job for job in jobs if read_result(job, output) is None]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before.", flush=True)
    # Before the first job, so that no timing is disturbed by one.
    for job in waiting:
        steps_within(job, output)
    if workers == 0:
        for job in waiting:
            _report(job, run_job(job, output))
        return
    own_process: Any = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(workers, **own_process) as pool:
        running = {pool.submit(run_job, job, output): job for job in waiting}
        try:
            for future in as_completed(running):
                _report(running[future], future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="settings that make a variant of the methods: objective=adjoint, hidden_dims=[64,64]; pretrain_steps=0.4 "
        "is a share of the steps",
    )
    parser.add_argument("--reward-scale", nargs="+", type=float, default=[1.0], help="factors on the data's rewards")
    parser.add_argument("--reward-offset", nargs="+", type=float, default=[0.0], help="added to the data's rewards")
    parser.add_argument("--seconds", type=float, help="CPU seconds of training; default: the task's")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 0 works in this one; default: 1")
    options = parser.parse_args(arguments)
    overrides = dict(options.set)
    if not 0 <= overrides.get("pretrain_steps", 0) < 1 or {"steps", "seed"} & overrides.keys():
        parser.error(
            "in --set, pretrain_steps is a share of the steps; steps follow from --seconds, seeds from --seed."
        )
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the jobs' processes when they load PyTorch
    # Methods vary fastest, so that an interrupted suite has compared all of them on what it has done.
    choices = itertools.product(options.seed, options.task, options.reward_scale, options.reward_offset, options.method)
    jobs = [
        Job(task, method, overrides, scale, offset, seed, options.seconds)
        for seed, task, scale, offset, method in choices
    ]
    try:
        run_jobs(jobs, options.output.expanduser(), options.jobs)
    except KeyboardInterrupt:
        print("Interrupted; finished jobs are kept. Run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def _evaluate(task: Task, policy: MeamPolicy) -> dict[str, Any]:
    with closing(make_environment(task.environment_id)) as env:
        result = rollout(policy, env, task.episodes, EVALUATION_SEED)
    figures = {name: value for name, value in result.summary().items() if "latency" not in name}
    return figures | {"returns": result.returns.tolist()}


def _ms_per_update(job: Job, output: Path) -> float:
    """CPU milliseconds of an update, with the method's share of pretraining and without a run's start and end."""
    dataset = TASKS[job.task].dataset(output / "data")

    def seconds(updates: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            train(job.config(updates), dataset, folder)
            return time.process_time() - start

    seconds(FEWEST_UPDATES)  # the first run loads libraries
    least, updates = seconds(FEWEST_UPDATES), 4 * FEWEST_UPDATES
    while (taken := seconds(updates)) < TIMED_SECONDS:
        updates *= 4
    # The lesser of two: whatever disturbs a run makes it longer.
    return 1000 * (min(taken, seconds(updates)) - least) / (updates - FEWEST_UPDATES)


def _header(job: Job, config: TrainConfig) -> dict[str, Any]:
    """What a result is of, as JSON reads it back."""
    about = dataclasses.asdict(job) | {"variant": job.variant, "seconds": job.budget}
    return {"format": FORMAT, **json.loads(json.dumps(about)), "updates": config.steps, "settings": _settings(config)}


def _settings(config: TrainConfig) -> dict[str, Any]:
    return json.loads(config.to_json())


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name.replace("-", "_"), tuple(parsed) if isinstance(parsed, list) else parsed


def _report(job: Job, result: Mapping[str, Any]) -> None:
    used = f"{result['updates']} updates in {result['train_cpu_seconds']:.0f} CPU seconds"
    outcome = result["error"] or " and ".join(
        f"{name.replace('_', ' ')} {result[name]['return_mean']:.2f}" for name in ("sampled", "zero_noise")
    )
    print(f"{job.name}: {outcome} ({used})", flush=True)


def _file(job: Job, output: Path) -> Path:
    return output / "jobs" / f"{job.name}.json"


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())

"""The evidence suite: methods side by side on tasks that the field knows, trained, exported and evaluated.

    python benchmarks/tasks/run.py benchmarks/tasks/minutes.toml --output out/minutes
    python benchmarks/tasks/report.py out/minutes

Every (seed, task, method) is one job: it trains, exports, acts with the exported policy, and leaves one JSON file under
OUTPUT/jobs. Finished jobs are not done again; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from recordings import open_data, record_data, summarise
from suite_file import Job, Suite, read_suite

from meam_export import export_policy
from meam_policy import ActionError, DivergedError, MeamPolicy, ParityError
from meam_policy.environments.make import make_environment
from meam_policy.errors import MeamError
from meam_policy.rollouts.episodes import rollout
from meam_training import train
from meam_training.runs.csv_file import read_rows
from meam_training.trainer import EVALUATION_SECONDS

__all__ = ["main", "read_result", "run_job", "run_jobs"]

EVALUATION_SEED = 2_000_000
"""Seed of the first evaluation episode; others than those of evaluations while training, and of recordings."""
FORMAT = 1


def run_job(job: Job, output: Path, root: Path) -> dict[str, Any]:
    """Train, export and act; write OUTPUT/jobs/NAME.json.

    Args:
        job: What to do.
        output: Folder of the suite.
        root: Folder of the data.

    Returns:
        What is in the file. A run that failed by its numbers has the error, and no evaluations.
    """
    dataset, run, policy = open_data(job.task, root, job.suite.data_seed), *_folders(job, output)
    resumed = read_result(job, output) is not None
    result = {"format": FORMAT, "finished": False, **job.header(), "evaluation_seed": EVALUATION_SEED}
    _write(_file(job, output), result)
    result |= {"data": summarise(dataset, job.task.success_reward), "error": None, "resumed": resumed}
    shutil.rmtree(policy, ignore_errors=True)
    start, evaluating = time.process_time(), 0.0

    def note(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal evaluating
        evaluating += metrics[EVALUATION_SECONDS]

    try:
        checkpoint = train(job.config, dataset, run, resume=True, on_evaluation=note)
        result["train_cpu_seconds"] = None if resumed else time.process_time() - start - evaluating
        export_policy(checkpoint, policy)
        result["sampled"] = _evaluate(job, MeamPolicy.from_pretrained(policy))
        result["zero_noise"] = _evaluate(job, MeamPolicy.from_pretrained(policy, noise_scale=0.0))
    except (DivergedError, ActionError, ParityError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result.setdefault("train_cpu_seconds", None if resumed else time.process_time() - start - evaluating)
    rows = read_rows(run / "metrics.csv")
    result["train_seconds"] = _logged_seconds(rows)
    result["metrics"] = {name: value for name, value in (rows[-1] if rows else {}).items() if np.isfinite(value)}
    result["curve"] = read_rows(run / "evaluations.csv")
    result["finished"] = True
    _write(_file(job, output), result)
    # The policy's folder has the networks; optimiser and older states are of use to nobody.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def read_result(job: Job, output: Path) -> dict[str, Any] | None:
    """What a job has left, finished or not; None if it was not begun.

    Raises:
        SystemExit: it was begun with other settings, or by another version.
    """
    file = _file(job, output)
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    header = {"format": FORMAT, **job.header(), "evaluation_seed": EVALUATION_SEED}
    if changed := [key for key in header if result.get(key) != header[key]]:
        settings = result.get("settings", {})
        names = [key for key in header["settings"] if settings.get(key) != header["settings"][key]]
        what = ", ".join(changed) + (f" ({', '.join(names)})" if names else "")
        raise SystemExit(f"{file} differs in {what} from what is asked for. Choose another --output.")
    return result


def run_jobs(jobs: Sequence[Job], output: Path, root: Path, workers: int) -> None:
    """Do the jobs that are not finished, each in a process of its own; data are recorded when the first job needs them.

    Args:
        jobs: What to do, in this order.
        output: Folder of the suite.
        root: Folder of the data.
        workers: Processes at a time; 0 works in this one.
    """
    found = {job.name: read_result(job, output) for job in jobs}
    waiting = [job for job in jobs if not (found[job.name] or {}).get("finished")]
    progress = _Progress(jobs, [result for result in found.values() if result and result["finished"]], workers)
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before.", flush=True)
    if workers == 0:
        for job in waiting:
            _record(job, root)
            progress.report(job, run_job(job, output, root))
        return
    own_process: Any = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(workers, **own_process) as pool:
        try:
            for job in [*waiting, None]:
                if job is not None:
                    _record(job, root)
                # The last turn waits for all that run.
                while running and (job is None or len(running) >= workers):
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        progress.report(running.pop(future), future.result())
                if job is not None:
                    running[pool.submit(run_job, job, output, root)] = job
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path, help="TOML file of the suite, such as benchmarks/tasks/minutes.toml")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="tasks or domains; default: all")
    parser.add_argument("--method", nargs="+", help="default: all")
    parser.add_argument("--seed", nargs="+", type=int, help="default: those of the file")
    parser.add_argument("--updates", type=int, help="gradient steps of every run; default: those of the file")
    parser.add_argument("--episodes", type=int, help="episodes of every evaluation; default: those of the file")
    parser.add_argument("--transitions", type=int, help="transitions of every recording; default: those of the file")
    parser.add_argument("--data", type=Path, help="folder of the data; default: data in the output's folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 0 works in this one; default: 1")
    parser.add_argument("--list", action="store_true", help="print the jobs and what is done, and run nothing")
    options = parser.parse_args(arguments)
    try:
        suite = _chosen(read_suite(options.suite), options)
    except MeamError as error:
        parser.error(str(error))
    output = options.output.expanduser()
    root = output / "data" if options.data is None else options.data.expanduser()
    if options.list:
        for job in suite.jobs():
            state = read_result(job, output)
            print(f"{job.name}: {'not begun' if state is None else 'finished' if state['finished'] else 'begun'}")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the jobs' processes when they load PyTorch
    try:
        run_jobs(suite.jobs(), output, root, options.jobs)
    except KeyboardInterrupt:
        print("Interrupted; finished jobs are kept. Run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def _chosen(suite: Suite, options: argparse.Namespace) -> Suite:
    """The part of the suite that the command line asks for."""
    tasks, methods = dict(suite.tasks), dict(suite.methods)
    if options.only is not None:
        domains = {task.domain for task in tasks.values()}
        _check_names(options.only, {*tasks, *domains}, "task or domain")
        tasks = {name: task for name, task in tasks.items() if {name, task.domain} & set(options.only)}
    if options.method is not None:
        _check_names(options.method, set(methods), "method")
        methods = {name: own for name, own in methods.items() if name in options.method}
    if options.transitions is not None:
        recorded = {name: task for name, task in tasks.items() if not task.files}
        tasks |= {name: replace(task, transitions=options.transitions) for name, task in recorded.items()}
    return replace(
        suite,
        tasks=tasks,
        methods=methods,
        seeds=suite.seeds if options.seed is None else tuple(options.seed),
        updates=suite.updates if options.updates is None else options.updates,
        episodes=suite.episodes if options.episodes is None else options.episodes,
    )


def _check_names(given: Sequence[str], known: set[str], kind: str) -> None:
    for name in given:
        if name not in known:
            raise SystemExit(f'There is no {kind} "{name}" in the suite; expected one of {", ".join(sorted(known))}.')


class _Progress:
    """Says what came of every job, and how long the others may take, by what those like them took."""

    def __init__(self, jobs: Sequence[Job], finished: Sequence[Mapping[str, Any]], workers: int) -> None:
        self._left = {job.name: job for job in jobs}
        self._total, self._workers = len(jobs), max(1, workers)
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for result in finished:
            task, method, seed = result["task"], result["method"], result["seed"]
            self._left.pop(f"{task['domain']}-{task['label']}-{method}-seed{seed}", None)
            self._note(task["domain"], method, result)

    def report(self, job: Job, result: Mapping[str, Any]) -> None:
        self._left.pop(job.name)
        self._note(job.task.domain, job.method, result)
        outcome = result["error"] or "; ".join(
            f"{name.replace('_', ' ')} {_success(result[name])}return {result[name]['return_mean']:.4g}"
            for name in ("sampled", "zero_noise")
        )
        done = f"[{self._total - len(self._left)} of {self._total}]"
        spent = f"{result['updates']} updates in {_duration(result['train_seconds'])}"
        left = f"; about {_duration(self._time_left())} left" if self._left else ""
        print(f"{done} {job.name}: {outcome} ({spent}{left})", flush=True)

    def _note(self, domain: str, method: str, result: Mapping[str, Any]) -> None:
        evaluated = sum(result[name]["seconds"] for name in ("sampled", "zero_noise") if name in result)
        self._seconds[domain, method].append(result["train_seconds"] + evaluated)

    def _time_left(self) -> float:
        means = {key: float(np.mean(values)) for key, values in self._seconds.items()}
        usual = float(np.mean(list(means.values())))
        return sum(means.get((job.task.domain, job.method), usual) for job in self._left.values()) / self._workers


def _record(job: Job, root: Path) -> None:
    """Record a job's data in this process, so that two jobs never record the same."""
    shown = -1

    def say(done: int, total: int) -> None:
        nonlocal shown
        if total >= 200_000 and (tenth := 10 * done // total) > shown:
            shown = tenth
            print(f"{job.task.name}: recorded {done} of {total} transitions.", flush=True)

    record_data(job.task, root, job.suite.data_seed, say)


def _evaluate(job: Job, policy: MeamPolicy) -> dict[str, Any]:
    start = time.perf_counter()
    with closing(make_environment(job.task.environment_id)) as env:
        result = rollout(policy, env, job.suite.episodes, EVALUATION_SEED)
    successes = None if result.successes is None else result.successes.tolist()
    return {
        **result.summary(),
        "returns": result.returns.tolist(),
        "successes": successes,
        "seconds": time.perf_counter() - start,
    }


def _logged_seconds(rows: Sequence[Mapping[str, float]]) -> float:
    """Seconds of training without evaluations and checkpoints, also where the run was interrupted."""
    steps = np.diff([0.0, *(row["step"] for row in rows)])
    return float(sum(n / row["updates_per_second"] for n, row in zip(steps, rows, strict=True)))


def _success(evaluation: Mapping[str, Any]) -> str:
    return "" if evaluation["success"] is None else f"{evaluation['success']:.0%}, "


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _folders(job: Job, output: Path) -> tuple[Path, Path]:
    return output / "runs" / job.name, output / "policies" / job.name


def _file(job: Job, output: Path) -> Path:
    return output / "jobs" / f"{job.name}.json"


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())

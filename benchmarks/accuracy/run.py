"""The accuracy suite: train on bandits with known optimal policies and measure how far the exported policies are.

    python benchmarks/accuracy/run.py --output out/accuracy
    python benchmarks/accuracy/report.py out/accuracy

Every (method, critic, run, seed) is one job: it trains, exports, samples, and leaves one JSON file and one .npz under
OUTPUT/jobs. A job whose file is there is not done again, so an interrupted suite resumes where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from chunk_metrics import ChunkTarget, effective_share, resample
from chunks import CHUNKS, Chunks
from metrics import Target, mode_masses
from problems import BANDWIDTH, CONTEXTS, RUNS, Run, make_grid

from meam_export import export_policy
from meam_policy import ActionError, DivergedError, MeamPolicy, ParityError
from meam_training import Checkpoint, TrainConfig, train
from meam_training.networks.action_normaliser import ActionNormaliser

_PLAIN: Mapping[str, Any] = {"solver": "midpoint", "confine": True, "precondition": False}

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "reference": {
            "objective": "adjoint",
            "sde": "reference",
            "solver": "euler",
            "confine": False,
            "joint_clip": True,
            "precondition": False,
        },
        "ancestral": {"objective": "adjoint", "sde": "ancestral", **_PLAIN},
        "target-score": {"objective": "target_score", **_PLAIN},
        "reweighted": {"objective": "reweighted", **_PLAIN},
        "reweighted-preconditioned": {"objective": "reweighted", **_PLAIN, "precondition": True},
        "two-scale": {"objective": "two_scale", **_PLAIN, "precondition": True},
        "bridge": {"objective": "bridge", **_PLAIN, "precondition": True},
        "scalar": {"objective": "bridge", "bridge_adjoint": "scalar", **_PLAIN, "precondition": True},
    }
)
"""What is compared, as changes to `COMMON`. "reference" is the published form, "reweighted" the earlier default of
me-am, "two-scale" the present one; the later four have preconditioned velocity fields, the earlier four plain ones."""

COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 4000,
        "pretrain_steps": 1500,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "hidden_dims": (64, 64, 64),
        "critic_hidden_dims": (64, 64),
        "num_critics": 2,
        "nfe": 10,
        "chunk_size": 1,
        "value_penalty": 0.0,
        "mixture_bandwidth": BANDWIDTH,
        # So far that the search reaches the maximiser from anywhere: 20 shrinking steps make up 1.5 in every component.
        "ascent_steps": 20,
        "ascent_step_size": 0.15,
        "trust_radius": 2.0,
        "device": "cpu",
        "threads": 1,
        "log_every": 500,
    }
)
"""Settings of every job that they have an effect on; `nfe` counts evaluations of the velocity, whatever the solver."""

Critic = Literal["true", "learned", "exact"]
CRITICS: tuple[Critic, ...] = ("true", "learned", "exact")
SAMPLES = 20_000
"""Actions drawn from the exported policy in every context; in the contextual cell of all observations together."""
PRIOR_SAMPLES = 100_000
"""Samples of the learned prior that are resampled by the tilt."""
LEAST_EFFECTIVE = 100
"""Effective samples below which the tilted learned prior is not reported."""
ALL_RUNS: Mapping[str, Run | Chunks] = MappingProxyType({**RUNS, **CHUNKS})
"""The whole suite, by name: one and two dimensions, then chunks."""
KEPT_SAMPLES = 2000
"""Of these, what is kept for the pictures."""
AT_BOUND = 0.999
FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One training run and its measurement.

    Attributes:
        method: A key of `METHODS`.
        critic: "true" gives training the reward function; "learned" has it learn critics; "exact" gives it the
            behaviour's flow too, which is known for chunks.
        run: A key of `ALL_RUNS`.
        seed: Seed of weights, batches and noise in training, and of the samples.
        overrides: Changes to `COMMON`.
    """

    method: str
    critic: Critic
    run: str
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Stem of the job's files."""
        return f"{self.method}-{self.critic}-{self.run}-seed{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """The settings it trains with."""
        settings = {**ALL_RUNS[self.run].settings, **METHODS[self.method], **self.overrides}
        return TrainConfig.preset("me-am", COMMON, **settings, seed=self.seed)


def run_job(job: Job, output: Path) -> dict[str, Any]:
    """Train, export, sample and measure; write OUTPUT/jobs/NAME.npz, then NAME.json.

    Args:
        job: What to do.
        output: Folder of the suite.

    Returns:
        What is in the JSON file. A run that diverged has `diverged` true, the error, and no cells.
    """
    folder = output / "jobs"
    scratch = folder / f".{job.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    result = _header(job) | {"diverged": False, "error": None, "cells": []}
    samples: dict[str, Any] = {}
    run = ALL_RUNS[job.run]
    start = time.process_time()
    try:
        dataset, value = run.make_dataset(), None if job.critic == "learned" else run.make_value()
        prior = run.make_prior() if job.critic == "exact" and isinstance(run, Chunks) else None
        start = time.process_time()
        checkpoint = train(job.config, dataset, scratch / "training", value=value, prior=prior)
        result["train_seconds"] = time.process_time() - start
        policy = MeamPolicy.from_pretrained(export_policy(checkpoint, scratch / "policy"))
        if isinstance(run, Chunks):
            samples = _sample_chunks(policy, run, job.seed)
            tilted = _tilted_prior(checkpoint, run, job.seed)
            result["cells"] = [_measure_chunks(run, actions, tilted) for actions in samples.values()]
        else:
            samples = _sample(policy, run.dim, job.seed)
            result["cells"] = [_measure(run, name, actions) for name, actions in samples.items()]
    except (DivergedError, ActionError, ParityError) as error:
        result |= {"diverged": True, "error": f"{type(error).__name__}: {error}"}
        result.setdefault("train_seconds", time.process_time() - start)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kept = {name: actions[:KEPT_SAMPLES].astype(np.float16) for name, actions in samples.items()}
    temporary = folder / f".{job.name}.npz"
    np.savez_compressed(temporary, **kept)
    temporary.replace(folder / f"{job.name}.npz")
    temporary = folder / f".{job.name}.json"
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{job.name}.json")
    return result


def read_result(job: Job, output: Path) -> dict[str, Any] | None:
    """The result of a job done before, or None.

    Raises:
        SystemExit: it was done with other settings, or is of another version.
    """
    path = output / "jobs" / f"{job.name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    header = _header(job)
    if changed := [key for key in header if result.get(key) != header[key]]:
        raise SystemExit(f"{path} differs in {', '.join(changed)} from what is asked for. Choose another --output.")
    return result


def run_jobs(jobs: Sequence[Job], output: Path, workers: int) -> int:
    """Do the jobs that have no result yet, each in a process of its own.

    Args:
        jobs: What to do.
        output: Folder of the suite.
        workers: Processes at a time; 0 works in this one.

    Returns:
        How many failed, for reasons other than divergence.
    """
    waiting = [job for job in jobs if read_result(job, output) is None]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before.", flush=True)
    start, failed = time.monotonic(), 0
    with closing(_finished(waiting, output, workers)) as finished:
        for done, job in enumerate(finished, start=1):
            result = read_result(job, output)
            failed += result is None
            outcome = f"failed, see {_log(job, output)}" if result is None else _outcome(result)
            elapsed = time.monotonic() - start
            left = elapsed / done * (len(waiting) - done)
            progress = f"[{done:{len(str(len(waiting)))}}/{len(waiting)}]"
            print(f"{progress} {job.name}: {outcome} ({_clock(elapsed)} elapsed, {_clock(left)} left)", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--critic", nargs="+", choices=CRITICS, default=["true"], help="default: true")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument(
        "--run",
        nargs="+",
        choices=list(ALL_RUNS),
        default=list(ALL_RUNS),
        metavar="RUN",
        help="default: all, which are " + ", ".join(ALL_RUNS),
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; 0 works in this one; default: 2")
    parser.add_argument("--steps", type=int, default=COMMON["steps"], help="default: %(default)s")
    parser.add_argument("--pretrain-steps", type=int, default=COMMON["pretrain_steps"], help="default: %(default)s")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.jobs < 0 or options.pretrain_steps >= options.steps:
        parser.error("expected --jobs of 0 or more, and --pretrain-steps fewer than --steps.")
    overrides = {"steps": options.steps, "pretrain_steps": options.pretrain_steps, "precision": options.precision}
    # Runs vary slowest, so that an interrupted suite has compared all methods on what it has done.
    choices = itertools.product(options.seed, options.run, options.critic, options.method)
    jobs = [
        Job(method, critic, run, seed, overrides)
        for seed, run, critic, method in choices
        # Only critics that are learned disagree.
        if not (critic != "learned" and ALL_RUNS[run].settings.get("adaptive_mixture"))
        if not (critic == "exact" and run not in CHUNKS)
    ]
    if not jobs:
        parser.error(
            "Nothing is left to do: the adaptive mixture needs --critic learned, and --critic exact is for chunks, "
            f"which are {', '.join(CHUNKS)}."
        )
    try:
        return 1 if run_jobs(jobs, options.output.expanduser(), options.jobs) else 0
    except KeyboardInterrupt:
        print("Interrupted; finished jobs are kept. Run the same command to go on.", file=sys.stderr)
        return 130


def _header(job: Job) -> dict[str, Any]:
    """What a result file is of, as JSON reads it back."""
    # What a run's name says already is left out.
    own = {key: value for key, value in ALL_RUNS[job.run].settings.items() if key in COMMON}
    settings = {**COMMON, **own, **METHODS[job.method], **job.overrides}
    header = {key: value for key, value in asdict(job).items() if key != "overrides"}
    return json.loads(json.dumps({"format": FORMAT, **header, "settings": settings}))


def _sample(policy: MeamPolicy, dim: int, seed: int) -> dict[str, Any]:
    """Actions [SAMPLES, dim] in every context, by its name."""
    observations = np.eye(len(CONTEXTS[dim]), dtype=np.float32)
    return {
        context.name: policy.sample(np.tile(observation, (SAMPLES, 1)), seed=seed)[:, 0]
        for context, observation in zip(CONTEXTS[dim], observations, strict=True)
    }


def _sample_chunks(policy: MeamPolicy, run: Chunks, seed: int) -> dict[str, Any]:
    """Actions [n, dim] under the name of the only cell, the observations one after the other."""
    repeated = _repeated(run, SAMPLES)
    return {run.cells[0]: policy.sample(repeated, seed=seed)[:, 0]}


def _tilted_prior(checkpoint: Checkpoint, run: Chunks, seed: int) -> dict[str, Any]:
    """The learned prior's samples resampled by the exact tilt: what the prior's error alone leaves."""
    networks = checkpoint.load_networks()
    generator = torch.Generator().manual_seed(seed)
    observations = torch.from_numpy(_repeated(run, PRIOR_SAMPLES))
    chunks = []
    with torch.no_grad():
        for rows in observations.split(10_000):
            noise = torch.randn(len(rows), run.dim, generator=generator)
            chunks.append(networks.flow(networks.target_prior, networks.encoder(rows), noise).clamp(-1, 1))
    actions = ActionNormaliser.of(checkpoint.spec).to_environment(torch.cat(chunks).double().numpy())
    drawn = actions.reshape(len(run.observations), -1, run.dim)
    tilts = [run.log_tilt(*pair) for pair in zip(run.observations, drawn, strict=True)]
    effective = min(effective_share(tilt) * len(tilt) for tilt in tilts)
    if effective < LEAST_EFFECTIVE:
        return {"effective": effective, "measures": None}
    count, numpy_generator = SAMPLES // len(drawn), np.random.default_rng(seed)
    tilted = [resample(points, tilt, count, numpy_generator) for points, tilt in zip(drawn, tilts, strict=True)]
    return {"effective": effective, "measures": ChunkTarget(run, SAMPLES).measure(np.stack(tilted))}


def _repeated(run: Chunks, samples: int) -> Any:
    """The observations of a run, each as often as gives about `samples` rows [n, features]."""
    return np.repeat(run.observations.astype(np.float32), samples // len(run.observations), axis=0)


def _measure_chunks(run: Chunks, actions: Any, tilted: Mapping[str, Any]) -> dict[str, Any]:
    actions = actions.astype(np.float64)
    found = ChunkTarget(run, SAMPLES).measure(actions.reshape(len(run.observations), -1, run.dim))
    return {"context": run.cells[0], **found, "tilted_prior": dict(tilted), **_extent(actions)}


def _measure(run: Run, name: str, actions: Any) -> dict[str, Any]:
    context = next(context for context in CONTEXTS[run.dim] if context.name == name)
    actions = actions.astype(np.float64)
    return {
        "context": name,
        "normalised_w1": Target(run, context, make_grid(run.dim)).normalised_w1(actions),
        "mode_mass": mode_masses(context, actions).tolist(),
        **_extent(actions),
    }


def _extent(actions: Any) -> dict[str, float]:
    largest = np.abs(actions).max(axis=1)
    return {"max_action": float(largest.max()), "at_bound": float((largest > AT_BOUND).mean())}


def _finished(jobs: Sequence[Job], output: Path, workers: int) -> Generator[Job]:
    """Do the jobs; yields each when it is over, in whatever order."""
    if workers == 0:
        for job in jobs:
            run_job(job, output)
            yield job
        return
    queue, running = iter(jobs), dict[subprocess.Popen[bytes], Job]()
    try:
        while True:
            for job in itertools.islice(queue, workers - len(running)):
                running[_start(job, output)] = job
            if not running:
                return
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                if process.returncode == 0:
                    _log(running[process], output).unlink()
                yield running.pop(process)
    finally:
        for process in running:
            process.terminate()
        for process, job in running.items():
            process.wait()
            _log(job, output).unlink()


def _start(job: Job, output: Path) -> subprocess.Popen[bytes]:
    """This script on one job, out of reach of the terminal's Ctrl-C."""
    command = [sys.executable, __file__, "--output", str(output), "--jobs", "0", "--method", job.method]
    command += ["--critic", job.critic, "--run", job.run, "--seed", str(job.seed)]
    for name, value in job.overrides.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log = _log(job, output)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _log(job: Job, output: Path) -> Path:
    return output / "jobs" / f"{job.name}.log"


def _outcome(result: Mapping[str, Any]) -> str:
    if result["diverged"]:
        return "diverged"
    errors = [cell["normalised_w1"] for cell in result["cells"]]
    return f"W1 median {median(errors):.3f}, worst {max(errors):.3f}, {result['train_seconds']:.0f} s of training"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    # A shell starts its background jobs with SIGINT ignored; and being terminated must end the processes below, too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())

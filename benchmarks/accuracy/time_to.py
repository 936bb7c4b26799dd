"""How soon is a policy accurate? The error along a training run, by CPU seconds, for every method.

    python benchmarks/accuracy/time_to.py --output out/time-to

One cell of chunks with the true reward and seed 0. Every method trains once, with the suite's settings, and leaves
OUTPUT/METHOD.json; one that is there is not trained again. The acting networks of every checkpoint are measured as the
suite measures exported policies. Writes time-to.md and time-to.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chunk_metrics import ChunkTarget
from chunks import CHUNKS, Chunks
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reading import COLOURS, INK, table
from run import METHODS, SAMPLES, Job

from meam_policy import DivergedError
from meam_training import Checkpoint, train
from meam_training.networks.action_normaliser import ActionNormaliser

__all__ = ["Curve", "draw", "main", "measure", "seconds_to"]

CELL = "25d-lin-0-2m-2-1"
EVERY = 250
GOALS = (0.6, 0.4, 0.2)

Curve = Sequence[Sequence[float]]
"""Rows of CPU seconds of training, W1 of the acting policy as a share of the prior's, and updates."""


def measure(method: str, name: str, output: Path, every: int, overrides: Mapping[str, Any]) -> Curve:
    """Train a method on a cell, or read its curve if it was trained before.

    Args:
        method: A key of `METHODS`.
        name: A key of `CHUNKS`.
        output: Folder of the curves.
        every: Updates between two measurements.
        overrides: Changes to the suite's settings.
    """
    file = output / f"{method}.json"
    about = {"method": method, "run": name, "every": every, "overrides": dict(overrides)}
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["about"] != about:
            raise SystemExit(f"{file} is of {kept['about']}; expected {about}. Choose another --output.")
        return kept["curve"]
    run, scratch = CHUNKS[name], output / f".{method}"
    shutil.rmtree(scratch, ignore_errors=True)
    intervals = {"log_every": every, "checkpoint_every": every, "keep_checkpoints": 1000}
    config = Job(method, "true", name, 0, {**overrides, **intervals}).config
    seconds: dict[int, float] = {}
    start = time.process_time()

    def note(step: int, _: Mapping[str, float]) -> None:
        seconds[step] = time.process_time() - start

    try:
        train(config, run.make_dataset(), scratch, value=run.make_value(), on_progress=note)
    except DivergedError as error:
        print(f"{method}: {error}", file=sys.stderr)
    target, curve = ChunkTarget(run, SAMPLES), []
    for step in sorted(step for step in seconds if step >= config.pretraining):
        folder = scratch / "checkpoints" / f"step_{step:08d}"
        if folder.is_dir():
            found = target.measure(_actions(Checkpoint.load(folder), run))
            curve.append([seconds[step], found["normalised_w1"], step])
    shutil.rmtree(scratch)
    file.write_text(json.dumps({"about": about, "curve": curve}) + "\n", encoding="utf-8")
    return curve


def seconds_to(curve: Curve, goal: float) -> float | None:
    """CPU seconds after which the error first is at most the goal, between two checkpoints in proportion; else None."""
    before: Sequence[float] | None = None
    for now in curve:
        if now[1] <= goal:
            if before is None:
                return now[0]
            share = (before[1] - goal) / (before[1] - now[1])
            return before[0] + share * (now[0] - before[0])
        before = now
    return None


def draw(curves: Mapping[str, Curve]) -> Figure:
    """The error of every method by the CPU seconds of its training."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, curve in curves.items():
        if curve:
            seconds, errors, _ = np.transpose(curve)
            axes.plot(seconds, errors, color=COLOURS[method], lw=1.6, marker="o", ms=3, label=method)
    axes.set_xlabel("CPU seconds of training", color=INK)
    axes.set_ylabel("W1, share of the prior's", color=INK)
    axes.set_ylim(0, 1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the curves")
    parser.add_argument("--run", choices=list(CHUNKS), default=CELL, metavar="RUN", help="default: %(default)s")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--steps", type=int, help="default: the suite's")
    parser.add_argument("--pretrain-steps", type=int, help="default: the suite's")
    parser.add_argument("--every", type=int, default=EVERY, help="updates between checkpoints; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    output = options.output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    given = {"steps": options.steps, "pretrain_steps": options.pretrain_steps}
    overrides = {name: value for name, value in given.items() if value is not None}
    curves: dict[str, Curve] = {}
    for method in options.method:
        curves[method] = measure(method, options.run, output, options.every, overrides)
        print(f"{method}: {_last(curves[method])}", flush=True)
    rows = [["method", *(f"s to {goal}" for goal in GOALS), "least W1", "at the end", "s of training"]]
    for method, curve in curves.items():
        reached = [seconds_to(curve, goal) for goal in GOALS]
        least = f"{min(row[1] for row in curve):.3f}" if curve else ""
        ends = [f"{curve[-1][1]:.3f}", f"{curve[-1][0]:.0f}"] if curve else ["", ""]
        rows.append([method, *("" if s is None else f"{s:.0f}" for s in reached), least, *ends])
    text = table(rows)
    (output / "time-to.md").write_text(text + "\n", encoding="utf-8")
    figure = draw(curves)
    FigureCanvasAgg(figure)
    figure.savefig(output / "time-to.png", dpi=130, facecolor="white")
    print(text)
    return 0


def _actions(checkpoint: Checkpoint, run: Chunks) -> Any:
    """Actions [observations, n, dim] of the networks that act."""
    networks, generator = checkpoint.load_networks(), torch.Generator().manual_seed(0)
    count = SAMPLES // len(run.observations)
    observations = torch.from_numpy(np.repeat(run.observations.astype(np.float32), count, axis=0))
    with torch.no_grad():
        noise = torch.randn(len(observations), run.dim, generator=generator)
        normalised = networks.flow(networks.deployed, networks.encoder(observations), noise).clamp(-1, 1)
    actions = ActionNormaliser.of(checkpoint.spec).to_environment(normalised.double().numpy())
    return actions.reshape(len(run.observations), count, run.dim)


def _last(curve: Curve) -> str:
    return f"W1 {curve[-1][1]:.3f} after {curve[-1][0]:.0f} s" if curve else "no checkpoint"


if __name__ == "__main__":
    sys.exit(main())

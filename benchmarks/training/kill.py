"""Kill `meam train` at random, resume it every time, and check that nothing was lost.

python benchmarks/training/kill.py --kills 50

Two runs with the same settings: one is killed (SIGKILL) again and again and resumed, the other is left alone. After
every kill the newest checkpoint is at least as far as the one before, the best score is at least as high, and every
checkpoint that is listed loads; in the end both runs have the same weights, optimiser state and evaluations, bit for
bit. Checkpoints are written every other update, so that many kills meet one that is being written; one kill in five
comes while the process starts.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from meam_policy.cli import run
from meam_training import Checkpoint

PRETRAINING = 40
SETTINGS = (
    f"--pretrain-steps {PRETRAINING} "
    "--hidden-dims 8 8 --critic-hidden-dims 8 8 --num-critics 2 --batch-size 16 --nfe 2 --candidates 4 "
    "--likelihood-steps 1 --chunk-size 2 --threads 1 --device cpu --polyak 0.05 --no-compile "
    "--checkpoint-every 2 --keep-checkpoints 2 --log-every 5 --evaluate-every 100 --evaluate-episodes 1"
)
ENDLESS = 10_000_000


@dataclass
class Report:
    """What the killed run went through."""

    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        """A table in Markdown."""
        rows = {
            "kills": len(self.steps),
            "before the run's first checkpoint": sum(step == 0 for step in self.steps),
            "while a checkpoint was being written": self.found[".tmp"],
            "while an old one was being deleted": self.found[".deleted"],
            "checkpoints loaded after kills": self.found["loaded"],
            "checkpoints lost or broken (the first one stops this script)": 0,
            "kills before which the run had gone forward": len(set(self.steps) - {0}),
            "updates after which the killed and the undisturbed run are bit-equal": self.found["updates"],
            "seconds": round(self.seconds),
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kill `meam train` at random, resume it every time, and check that nothing was lost."
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(stress(Path(folder), arguments.kills, arguments.seed).table())


def stress(folder: Path, kills: int, seed: int) -> Report:
    """Kill a run and resume it; raises AssertionError if anything was lost."""
    start, generator, report = time.perf_counter(), random.Random(seed), Report()
    meam("collect", "meam/Pockets-v0", "--transitions", "1000", "--root", str(folder / "data"))
    data = next((folder / "data").rglob("metadata.json")).parent.parent
    killed, whole = folder / "killed", folder / "whole"
    first = ["me-am", "--data", str(data), "--steps", str(ENDLESS), *SETTINGS.split()]
    before = best = None
    while len(report.steps) < kills:
        # Where there is no run yet, there is nothing from which the settings could be read.
        known = (killed / "config.json").is_file()
        left = leftovers(killed)
        kill_at_random(killed, [*([] if known else first), "--resume", "--output-dir", str(killed)], generator)
        newest = check(killed, report)
        for suffix in {path.suffix for path in leftovers(killed) - left}:
            report.found[suffix] += 1
        assert before is None or (newest is not None and newest.step >= before)
        before = None if newest is None else newest.step
        score = newest and Checkpoint.best(killed)
        assert best is None or (score and score.score is not None and score.score >= best)
        best = score.score if score else None
        report.steps.append(before or 0)
        print(f"kill {len(report.steps)}: update {before}, best return {best}", file=sys.stderr)
    steps = str(max(before or 0, PRETRAINING) + 7)
    meam("train", *([] if before else first), "--resume", "--output-dir", str(killed), "--steps", steps)
    meam("train", *first, "--steps", steps, "--output-dir", str(whole))
    check_equal(killed, whole)
    report.found["updates"] = int(steps)
    report.seconds = time.perf_counter() - start
    return report


def kill_at_random(run: Path, arguments: list[str], generator: random.Random) -> None:
    """Start `meam train`, and kill it within two seconds of its start or, mostly, of its first checkpoint."""
    while_starting, seconds = generator.random() < 0.2, generator.uniform(0, 2)
    before = newest_name(run)
    process = subprocess.Popen([sys.executable, "-m", "meam_policy", "train", *arguments], stderr=subprocess.PIPE)
    while not while_starting and process.poll() is None and newest_name(run) == before:
        time.sleep(0.005)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


def newest_name(run: Path) -> str:
    return max((path.name for path in (run / "checkpoints").glob("step_*")), default="")


def leftovers(run: Path) -> set[Path]:
    """What was being written or deleted when a process was killed, as inode and kind."""
    return {path.with_name(f"{path.stat().st_ino}{path.suffix}") for path in (run / "checkpoints").glob(".step_*")}


def check(run: Path, report: Report) -> Checkpoint | None:
    """Load everything in every checkpoint; returns the newest."""
    for path in (run / "checkpoints").glob("step_*"):
        checkpoint = Checkpoint.load(path)
        tensors = {**checkpoint.load_networks().state_dict(), **load_file(path / "trainer.safetensors")}
        tensors.pop("trust_region.unit_cost")  # infinite before the policy's first update
        assert all(tensor.isfinite().all() for tensor in tensors.values()), path
        assert json.loads((path / "trainer.json").read_bytes())["step"] == int(path.name[5:])
        report.found["loaded"] += 1
    return Checkpoint.latest(run)


def check_equal(one: Path, other: Path) -> None:
    ends = [Checkpoint.load(run) for run in (one, other)]
    assert ends[0].step == ends[1].step
    for name in ("model.safetensors", "trainer.safetensors"):
        here, there = (load_file(end.path / name) for end in ends)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here), name
    assert (one / "evaluations.csv").read_text() == (other / "evaluations.csv").read_text()
    bests = [Checkpoint.best(run) for run in (one, other)]
    assert [best and best.step for best in bests] == [bests[0] and bests[0].step] * 2


def meam(*arguments: str) -> None:
    code = run(list(arguments))
    assert code == 0, f"meam {' '.join(arguments)}: exit status {code}"


if __name__ == "__main__":
    main()

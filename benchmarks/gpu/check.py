"""Runs everything that needs a CUDA GPU, and times it: see README.md in this folder."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEAM = (sys.executable, "-m", "meam_policy")


@dataclass(frozen=True)
class Step:
    """One part of the check: a command, and how long it may take in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


def plan(output: Path, reference: Path | None) -> list[Step]:
    """The steps, the most telling first, since the time may run out."""

    def table(name: str) -> tuple[str, str]:
        return "--markdown", str(output / f"{name}.md")

    tests = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_gpu.py"))]
    # Other versions of the libraries than the pinned ones may warn of other things.
    pytest = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=", *tests)
    training = (*MEAM, "bench", "train", "--device", "cuda")
    opponent = () if reference is None else ("--reference", str(reference))
    programs = ("eager", "compiled", "compiled-bf16", "me-am", "me-am-bf16")
    acting = (*MEAM, "bench", "infer", "--device", "cuda", "--rounds", "3")
    return [
        Step("doctor", (*MEAM, "doctor", "--device", "cuda"), 60),
        Step("tests", (sys.executable, *pytest), 300),
        Step(
            "training",
            (*training, *opponent, "--shapes", "cube", "--rounds", "5", "--contestants", *programs, *table("training")),
            300,
        ),
        Step("acting", (*acting, "--markdown", str(output / "acting.md")), 150),
        Step(
            "acting, 1024 at once",
            (
                *acting,
                "--batch",
                "1024",
                "--hz",
                "0",
                "--shapes",
                "small",
                "--markdown",
                str(output / "acting-1024.md"),
            ),
            100,
        ),
    ]


def run(step: Step, output: Path, left: float) -> str:
    """Run a step, its output going to a log; return what came of it."""
    if left < 15:
        return "not run: no time was left"
    paths = [str(ROOT), str(ROOT / "training"), str(ROOT / "export"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MEAM_WITHOUT_SHAPE_CHECKS": "1"}
    log = output / f"{step.name}.log"
    started = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(step.limit, left),
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {time.monotonic() - started:.0f} s"
    return f"{'done' if code == 0 else f'FAILED with exit status {code}'} in {time.monotonic() - started:.0f} s"


def main() -> None:
    """Run the steps, and say what came of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out/gpu", help="folder for tables and logs")
    parser.add_argument("--reference", type=Path, help="checkout of QAM's public JAX code, to be timed beside ours")
    parser.add_argument("--steps", nargs="+", help="only these: doctor, tests, training, acting, ...")
    parser.add_argument("--seconds", type=float, default=600, help="time for all of it")
    parsed = parser.parse_args()
    output = parsed.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + parsed.seconds, {}
    for step in plan(output, parsed.reference and parsed.reference.resolve()):
        if not parsed.steps or step.name in parsed.steps:
            results[step.name] = run(step, output, end - time.monotonic())
            print(f"{step.name}: {results[step.name]}", flush=True)
    sys.exit(any("done" not in result for result in results.values()))


if __name__ == "__main__":
    main()

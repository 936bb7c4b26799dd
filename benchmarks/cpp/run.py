"""Times `act` from C++ and from Python, and onnxruntime's bare `Session::Run`, in turn in one run.

    python benchmarks/cpp/run.py                       # the policy of model_cards/pockets, 20,000 calls each
    python benchmarks/cpp/run.py --policy FOLDER --markdown FILE

It compiles contestants.cpp with g++ -O2 against the headers that tests/runtime/cpp/headers.py finds or downloads, and
the library of the installed onnxruntime wheel.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from meam_policy import MeamPolicy, SafetySettings
from meam_policy.cpp.project import wheel_library
from meam_policy.diagnosis.machine import cpu_model

ROOT = Path(__file__).parents[2]
NAMES = ("C++ `act`", "Python `act`", "`Session::Run` alone")


def build(folder: Path) -> Path:
    """Compile the contestants into a folder."""
    found = [sys.executable, ROOT / "tests" / "runtime" / "cpp" / "headers.py"]
    include = Path(subprocess.run(found, check=True, capture_output=True, text=True).stdout.strip()) / "usr" / "include"
    library = wheel_library()
    if library is None:
        sys.exit("The installed onnxruntime has no libonnxruntime.so; pip install onnxruntime, of 1.26 or newer.")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        ROOT / "meam_policy" / "cpp",
        "-isystem",
        include,
    ]
    source, program = Path(__file__).with_name("contestants.cpp"), folder / "contestants"
    subprocess.run(["g++", *flags, source, library, f"-Wl,-rpath,{folder}", "-o", program], check=True)
    return program


def python_block(policy: MeamPolicy, observations: Any, position: int, calls: int) -> list[float]:
    """Microseconds of each call of `act`, with a minus for one that ran the network."""
    taken = []
    for number in range(position, position + calls):
        observation, before = observations[number % len(observations)], policy.inferences
        start = time.perf_counter_ns()
        policy.act(observation)
        passed = (time.perf_counter_ns() - start) / 1e3
        taken.append(passed if policy.inferences == before else -passed)
    return taken


def measure(folder: Path, calls: int, block: int) -> dict[str, Any]:
    """Microseconds [blocks, block] of each contestant."""
    policy = MeamPolicy.from_pretrained(folder, seed=0, safety=SafetySettings(on_unfamiliar=None))
    spec, random = policy.spec, np.random.default_rng(0)
    drawn = np.array(spec.observation_mean) + random.standard_normal((997, spec.observation_dim)) * spec.observation_std
    observations = drawn.astype(np.float32)
    with tempfile.TemporaryDirectory() as work:
        program = build(Path(work))
        (Path(work) / "observations").write_bytes(observations.tobytes())
        words = [program, folder, Path(work) / "observations"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            inlet, outlet = child.stdin, child.stdout

            def ask(what: str) -> list[float]:
                inlet.write(f"{what} {block}\n")
                inlet.flush()
                return [float(outlet.readline()) for _ in range(block)]

            taken: dict[str, list[list[float]]] = {name: [] for name in NAMES}
            turns: dict[str, Callable[[int], list[float]]] = {
                NAMES[0]: lambda _position: ask("act"),
                NAMES[1]: lambda position: python_block(policy, observations, position, block),
                NAMES[2]: lambda _position: ask("bare"),
            }
            for number in range(-1, calls // block):
                for name in random.permutation(NAMES):
                    times = turns[name](max(number, 0) * block)
                    if number >= 0:  # the first round warms up
                        taken[name].append(times)
            inlet.close()
    return {name: np.array(times) for name, times in taken.items()}


def split(times: Any, network: bool) -> list[Any]:
    """Of each block the calls that ran the network, or those that took a queued action."""
    return [np.abs(block[block < 0]) if network else block[block > 0] for block in times]


def row(name: str, kind: str, blocks: list[Any]) -> str:
    p50, p99, largest = np.percentile(np.concatenate(blocks), (50, 99, 100))
    return f"| {name} | {kind} | {p50:.2f} | {p99:.2f} | {largest:.0f} |"


def table(taken: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    cpp, python, bare = (taken[name] for name in NAMES)
    lines = ["| µs | | p50 | p99 | max |", "|---|---|---:|---:|---:|"]
    for name, times in ((NAMES[0], cpp), (NAMES[1], python)):
        lines += [row(name, "queued action", split(times, False)), row(name, "with the network", split(times, True))]
    lines += [row(NAMES[2], "", split(bare, True)), ""]
    medians = [np.array([np.median(each) for each in split(times, True)]) for times in (cpp, python, bare)]
    queued = np.median(np.concatenate(split(cpp, False)))
    over, beside = np.median(medians[0] / medians[2]), np.median(medians[1] / medians[2])
    quartiles = np.percentile(medians[0] / medians[2], (25, 75))
    lines += [
        f"- A queued action from C++: {queued:.2f} µs at p50. Goal below 1 µs: {'met' if queued < 1 else 'missed'}.",
        f"- With the network over `Session::Run` alone, medians of the blocks of one round: C++ {over:.3f} (quartiles "
        f"{quartiles[0]:.3f} to {quartiles[1]:.3f}), Python {beside:.2f}. Goal for C++ at most 1.1: "
        f"{'met' if over <= 1.1 else 'missed'}.",
        "",
        f"{cpu_model()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, onnxruntime "
        f"{onnxruntime.__version__}, g++ -O2, {date.today()}; load average when it ended "
        f"{', '.join(f'{load:.2f}' for load in os.getloadavg())}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", type=Path, default=ROOT / "model_cards" / "pockets", help="policy folder")
    parser.add_argument("--calls", type=int, default=20_000, help="calls of each contestant")
    parser.add_argument("--block", type=int, default=500, help="calls in a turn")
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
    given = parser.parse_args()
    text = "\n".join(table(measure(given.policy.absolute(), given.calls, given.block)))
    print(text)
    if given.markdown is not None:
        given.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

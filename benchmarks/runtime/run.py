"""The runtime's figures: what acting costs beyond the network, in time, memory and punctuality.

python benchmarks/runtime/run.py overhead|memory|loop|vector [--policy FOLDER] [--markdown FILE]

Without --policy, a policy for meam/Pockets-v0 with random weights acts; it is written by another process, so that
PyTorch is not loaded where time and memory are measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from act_overhead import measure_overhead
from memory_growth import measure_memory
from tick_loop import measure_loops
from vector_throughput import measure_throughput

from meam_policy.diagnosis.machine import cpu_model, usable_cores


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = make_parser().parse_args(arguments)
    conditions = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.policy
        if folder is None:
            folder = make_policy(Path(scratch) / "policy", tiny=chosen.figure == "memory")
        text = f"{measure(chosen, folder)}\n\n{conditions}\n"
    print(text, end="")
    if chosen.markdown is not None:
        chosen.markdown.write_text(text, encoding="utf-8")


def measure(chosen: argparse.Namespace, folder: Path) -> str:
    """The figure's table, in Markdown."""
    if chosen.figure == "overhead":
        return measure_overhead(folder, chosen.rounds, chosen.calls).table()
    if chosen.figure == "memory":
        return measure_memory(folder, chosen.calls).table()
    if chosen.figure == "loop":
        return measure_loops(folder, chosen.rate_hz, chosen.seconds, chosen.rounds).table()
    return measure_throughput(folder, chosen.slots, chosen.rounds, chosen.steps).table()


def make_policy(folder: Path, tiny: bool) -> Path:
    """Have an untrained policy written by a process of its own: two layers of 256 and ten steps, or of 8 and two."""
    sizes = ["--hidden-dims", "8", "8", "--nfe", "2"] if tiny else []
    script = Path(__file__).with_name("untrained_policy.py")
    subprocess.run([sys.executable, str(script), str(folder), *sizes], check=True, stdout=subprocess.DEVNULL)
    return folder


def describe_machine() -> str:
    """Processor, cores, versions, date, and how busy the machine is."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "onnxruntime"))
    return (
        f"{cpu_model()}, {usable_cores()} cores, Python {platform.python_version()}, {versions}, "
        f"{datetime.date.today()}; load average before it began {load}."
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--policy", type=Path, help="a policy folder; an untrained one is made without it")
    common.add_argument("--markdown", type=Path, help="write the table into this file, too")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    overhead = figures.add_parser("overhead", parents=[common], help="`act` beside onnxruntime alone")
    overhead.add_argument("--rounds", type=int, default=50)
    overhead.add_argument("--calls", type=int, default=1000, help="of each contestant in a round")
    memory = figures.add_parser("memory", parents=[common], help="resident memory while a policy acts")
    memory.add_argument("--calls", type=int, default=1_000_000)
    loop = figures.add_parser("loop", parents=[common], help="a control loop, with and without busy cores")
    loop.add_argument("--rate-hz", type=float, default=200.0)
    loop.add_argument("--seconds", type=float, default=30.0, help="of each contestant, with and without load")
    loop.add_argument("--rounds", type=int, default=3)
    vector = figures.add_parser("vector", parents=[common], help="one policy for many environments")
    vector.add_argument("--slots", type=int, default=64)
    vector.add_argument("--rounds", type=int, default=20)
    vector.add_argument("--steps", type=int, default=100, help="of the vector environment in a round")
    return parser


if __name__ == "__main__":
    main()

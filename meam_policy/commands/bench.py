"""`meam bench`: lists the benchmarks, each a separate command."""

from __future__ import annotations

import sys

from meam_policy.cli import Command, load_command
from meam_policy.errors import ConfigError

__all__ = ["BENCHMARKS", "run"]

BENCHMARKS = {
    "train": Command(
        "meam_training.commands.bench_train",
        "Time updates of training, against QAM's JAX code and the machine's limit.",
        "train",
    ),
    "infer": Command(
        "meam_export.commands.bench_infer",
        "Time an exported policy, against other ways to act and the machine's limit.",
        "cpu,train,export",
    ),
}


def run(arguments: list[str], prog: str) -> None:
    """Run the benchmark that the first argument names."""
    if arguments[:1] in (["-h"], ["--help"]):
        rows = "\n".join(f"  {name}  {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
        sys.stdout.write(f"usage: {prog} BENCHMARK [options]\n\nbenchmarks:\n{rows}\n\n")
        sys.stdout.write(f"`{prog} BENCHMARK --help` explains one.\n")
        sys.exit(0)
    if not arguments or arguments[0] not in BENCHMARKS:
        seen = f'There is no benchmark "{arguments[0]}"' if arguments else "No benchmark is named"
        raise ConfigError(f"{seen}; expected {prog} {' or '.join(BENCHMARKS)}.")
    name = f"{prog} {arguments[0]}"
    load_command(BENCHMARKS[arguments[0]], name).run(arguments[1:], prog=name)

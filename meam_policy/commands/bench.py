"""`meam bench`: lists the benchmarks, each a separate command."""

from __future__ import annotations

from meam_policy.cli import Command, load_command
from meam_policy.commands import named_first

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
    summaries = {name: benchmark.summary for name, benchmark in BENCHMARKS.items()}
    benchmark = named_first(arguments, prog, "benchmark", summaries)
    name = f"{prog} {benchmark}"
    load_command(BENCHMARKS[benchmark], name).run(arguments[1:], prog=name)

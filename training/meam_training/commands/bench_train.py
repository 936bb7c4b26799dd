"""`meam bench train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, print_table, progress_bar
from meam_policy.errors import ConfigError, OutputError
from meam_policy.given_files import given_path
from meam_training.benchmark.contestants import Device, check_reference, make_contestants, worker_environment
from meam_training.benchmark.race import Outcome, race
from meam_training.benchmark.report import COLUMNS, cells, machine, markdown, notes, summarise, to_json
from meam_training.benchmark.settings import SCANNED, make_setting

__all__ = ["BenchTrainArguments", "run"]

ShapeName = Literal["cube", "antmaze"]
ScaleName = Literal["paper", "small"]
ProgramName = Literal[
    "eager",
    "compiled",
    "eager-bf16",
    "compiled-bf16",
    "me-am",
    "me-am-eager",
    "me-am-bf16",
    "me-am-reweighted",
    "me-am-bridge",
    "me-am-adjoint",
    "me-am-target-score",
]

DESCRIPTION = """Time training updates, in turn with those of QAM's public JAX code.

Each contestant is a process of its own, which idles while the others work; the ratio to the reference is taken within
each round, so that other load on the machine slows both alike. The limit is the update rate at which an update would
take only the time of its matrix products, at the rate measured for the dominant product alone.

Example: meam bench train --reference ~/qam --reference-python ~/qam/.venv/bin/python --markdown table.md"""


@dataclass(frozen=True)
class BenchTrainArguments:
    """Arguments of `meam bench train`."""

    shapes: tuple[ShapeName, ...] = get_args(ShapeName)
    """Tasks whose observation and action dimensions to use."""
    scales: tuple[ScaleName, ...] = get_args(ScaleName)
    """Sizes of the networks: paper (4 x 512, 10 critics), small (2 x 256, 2 critics)."""
    contestants: tuple[ProgramName, ...] = ("eager", "compiled", "eager-bf16", "compiled-bf16")
    """Variants of the update: those of the qam preset, or me-am (compiled; the reference has no counterpart), also
    with other objectives than its default."""
    reference: Path | None = None
    """Checkout of https://github.com/ColinQiyangLi/qam to compare with."""
    reference_python: Path | None = None
    """Python interpreter with its dependencies (jax, flax, optax, distrax, ml_collections); by default this one."""
    rounds: int = 10
    """Turns of each contestant."""
    updates: int | None = None
    """Updates per turn, a multiple of 8; by default chosen by scale and device."""
    threads: int = 2
    """CPU threads of each contestant; on the CPU, contestants are also confined to the same number of cores."""
    device: Device = "cpu"
    """Device to train on."""
    tf32: bool = False
    """On CUDA, let the float32 products of all contestants round their inputs to TF32."""
    markdown: Path | None = None
    """Also write the tables to this file."""
    json: bool = False
    """Print one line of JSON to stdout instead of the tables."""

    def __post_init__(self) -> None:
        """Check the constraints that types do not express.

        Raises:
            ConfigError: a number is out of range, or a list is empty.
            NotFoundError: the reference does not exist.
            OutputError: the file cannot be written.
        """
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a whole number of 1 or more.")
        if self.updates is not None and (self.updates < 1 or self.updates % SCANNED):
            raise ConfigError(f"updates is {self.updates}; expected a multiple of {SCANNED}.")
        for name in ("shapes", "scales", "contestants"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; expected one or more.")
        if self.reference is not None:
            check_reference(self.reference, self.reference_python)
        if self.markdown is not None and not given_path("--markdown", self.markdown).absolute().parent.is_dir():
            raise OutputError(f"{self.markdown} cannot be written: its folder does not exist.")


def run(arguments: list[str], prog: str) -> None:
    """Time updates; Ctrl-C stops and shows the measurements so far."""
    parsed = parse(BenchTrainArguments, arguments, prog, description=DESCRIPTION)
    outcomes: list[Outcome] = []
    try:
        _measure(parsed, outcomes)
    finally:
        _show(parsed, outcomes)


def _measure(parsed: BenchTrainArguments, outcomes: list[Outcome]) -> None:
    environment = worker_environment(parsed.device, parsed.threads, tf32=parsed.tf32)
    planned = [_plan(parsed, shape, scale) for scale in parsed.scales for shape in parsed.shapes]
    total = sum(len(outcome.contestants) * (1 + parsed.rounds) for outcome in planned)
    done = 0
    with progress_bar("Timing updates", total) as advance:
        for outcome in planned:
            outcomes.append(outcome)

            def on_turn(what: str, setting: str = outcome.setting.name) -> None:
                nonlocal done
                advance(done, f"{setting}: {what}")
                done += 1

            cores = parsed.threads if parsed.device == "cpu" else None
            race(outcome, parsed.rounds, environment, cores=cores, on_turn=on_turn)


def _plan(parsed: BenchTrainArguments, shape: str, scale: str) -> Outcome:
    setting = make_setting(shape, scale, parsed.device, parsed.updates)
    contestants = make_contestants(
        setting,
        parsed.contestants,
        parsed.device,
        parsed.threads,
        tf32=parsed.tf32,
        reference=parsed.reference,
        reference_python=parsed.reference_python,
    )
    return Outcome(setting, contestants)


def _show(parsed: BenchTrainArguments, outcomes: Sequence[Outcome]) -> None:
    about = machine(outcomes, parsed.threads, tf32=parsed.tf32)
    if parsed.markdown is not None:
        parsed.markdown.write_text(markdown(outcomes, about), encoding="utf-8")
    if parsed.json:
        print_json(to_json(outcomes, about))
        return
    for outcome in outcomes:
        print_table(outcome.setting.name, COLUMNS, [cells(row) for row in summarise(outcome)])
        print_lines(*notes(outcome), "")

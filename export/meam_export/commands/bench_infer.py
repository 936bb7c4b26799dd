"""`meam bench infer`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meam_export.benchmark import (
    Conditions,
    Outcome,
    Problem,
    check_device,
    checkpoint_problem,
    entrants,
    environment,
    make_setting,
    prepare,
    race,
    random_problem,
    weight_bytes,
)
from meam_export.benchmark.report import BRIEF, COLUMNS, cells, markdown, notes, paced_calls, sizes, summarise, to_json
from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, print_table, progress_bar, say
from meam_policy.errors import ConfigError, MeamError, NotFoundError, OutputError
from meam_policy.given_files import given_path

__all__ = ["BenchInferArguments", "run"]

ShapeName = Literal["large", "small"]
DeviceName = Literal["cpu", "cuda", "tensorrt"]
ContestantName = Literal[
    "torch-eager",
    "torch-compile",
    "jax",
    "numpy",
    "traced",
    "lean",
    "lean-bare",
    "lean-fixed",
    "lean-fp16",
    "lean-fp16-fixed",
    "lean-int8",
    "lean-k3",
    "lean-k3-int8",
    "lean-best-of-4",
    "floor-numpy",
    "floor-torch",
    "floor-sum",
    "floor-c",
]

DESCRIPTION = """Time how fast a policy acts: exported, in PyTorch, in JAX, in NumPy, and against the machine's floor.

Every contestant is a separate process, which idles while another one acts, and is compared with the policy in float64
before anything is timed. Ratios are taken within each round, so that a busy machine slows both sides alike. The floor
is the time it takes to read the weights, once per solver step.

Example: meam bench infer --jax-python ~/jax/bin/python --markdown table.md"""


@dataclass(frozen=True)
class BenchInferArguments:
    """Arguments of `meam bench infer`."""

    shapes: tuple[ShapeName, ...] = ("large", "small")
    """Policies with random weights: large (4 x 512, observation 46, 25 actions of 5), small (2 x 256, 29, 5 of 2)."""
    checkpoint: Path | None = None
    """Time this trained policy instead: a checkpoint or a training folder."""
    contestants: tuple[ContestantName, ...] = ()
    """Contestants; by default all that can act on the device."""
    rounds: int = 10
    """Turns per contestant."""
    calls: int = 200
    """Back-to-back timed calls per turn."""
    hz: float = 50.0
    """Rate of a control loop, at whose ticks a quarter as many calls are timed, sleeping in between; 0 for none."""
    threads: int = 1
    """CPU threads of every contestant; on the CPU also the number of cores it is restricted to."""
    batch: int = 1
    """Decisions per call."""
    device: DeviceName = "cpu"
    """Device to act on. With tensorrt, PyTorch and JAX act on CUDA."""
    jax_python: Path | None = None
    """Python interpreter that has JAX; this one by default."""
    markdown: Path | None = None
    """Also write the tables to this file."""
    json: bool = False
    """Print one line of JSON to stdout instead of the tables."""

    def __post_init__(self) -> None:
        """Check what the types do not.

        Raises:
            ConfigError: a number is out of range, or a contestant cannot act on the device.
            NotFoundError: `jax_python` is not an executable file.
            OutputError: the Markdown file cannot be written.
        """
        for name in ("rounds", "calls", "threads", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a whole number of 1 or more.")
        if not (math.isfinite(self.hz) and self.hz >= 0):
            raise ConfigError(f"hz is {self.hz}; expected a rate above 0, or 0 for no control loop.")
        if not self.shapes:
            raise ConfigError("shapes is empty; expected one or more.")
        known = entrants(self.device)
        for name in self.contestants:
            if name not in known:
                raise ConfigError(f"{name} does not act on {self.device}; expected some of {', '.join(known)}.")
        if self.jax_python is not None and not (self.jax_python.is_file() and os.access(self.jax_python, os.X_OK)):
            raise NotFoundError(f"{self.jax_python} is no program; expected a Python that has jax.")
        markdown = None if self.markdown is None else given_path("--markdown", self.markdown)
        if markdown is not None and (markdown.is_dir() or not markdown.absolute().parent.is_dir()):
            raise OutputError(f"{markdown} cannot be written: expected a file in a folder that exists.")

    @property
    def conditions(self) -> Conditions:
        """Conditions that all contestants share."""
        return Conditions(self.device, self.threads, self.calls, self.hz, self.jax_python)


def run(arguments: list[str], prog: str) -> None:
    """Time policies; Ctrl-C stops and shows the results so far."""
    parsed = parse(BenchInferArguments, arguments, prog, description=DESCRIPTION)
    check_device(parsed.device)
    outcomes: list[Outcome] = []
    try:
        _measure(parsed, outcomes)
    except (KeyboardInterrupt, MeamError):
        _show(parsed, outcomes)
        raise
    _show(parsed, outcomes)


def _measure(parsed: BenchInferArguments, outcomes: list[Outcome]) -> None:
    with _planned(parsed) as planned:
        total = sum(len(outcome.contestants) * (1 + parsed.rounds) for outcome in planned)
        done = 0
        with progress_bar("Timing policies", total) as advance:
            for outcome in planned:
                outcomes.append(outcome)

                def on_turn(what: str, setting: str = outcome.setting.name) -> None:
                    nonlocal done
                    advance(done, f"{setting}: {what}")
                    done += 1

                race(
                    outcome,
                    parsed.rounds,
                    environment(parsed.conditions),
                    calls=parsed.calls,
                    paced_calls=paced_calls(parsed.conditions),
                    on_turn=on_turn,
                )


@contextmanager
def _planned(parsed: BenchInferArguments) -> Iterator[list[Outcome]]:
    """Prepare the races; their files are deleted on exit."""
    with ExitStack() as stack:
        planned = []
        for problem in _problems(parsed):
            say(f"Writing {problem.setting.name}")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meam-bench-")))
            known = entrants(parsed.device)
            taking_part = {name: known[name] for name in parsed.contestants or known}
            contestants, skipped = prepare(problem, list(taking_part), parsed.conditions, folder)
            planned.append(Outcome(problem.setting, weight_bytes(problem), taking_part, contestants, skipped))
        yield planned


def _problems(parsed: BenchInferArguments) -> Iterator[Problem]:
    if parsed.checkpoint is not None:
        yield checkpoint_problem(parsed.checkpoint, parsed.batch)
        return
    for shape in parsed.shapes:
        yield random_problem(make_setting(shape, parsed.batch))


def _show(parsed: BenchInferArguments, outcomes: Sequence[Outcome]) -> None:
    conditions = parsed.conditions
    if parsed.markdown is not None:
        parsed.markdown.write_text(markdown(outcomes, conditions), encoding="utf-8")
    if parsed.json:
        print_json(to_json(outcomes, conditions))
        return
    for outcome in outcomes:
        columns, *rows = [[line[i] for i in BRIEF] for line in (COLUMNS, *map(cells, summarise(outcome)))]
        print_table(outcome.setting.name, columns, rows)
        print_lines(sizes(outcome, conditions), *notes(outcome, conditions), "")

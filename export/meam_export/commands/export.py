"""`meam export`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_export.export import LADDER, Exported, export_policy
from meam_export.graph.parity import ParityReport
from meam_export.triton import TritonDevice, write_triton_repository
from meam_export.variants.build import BuiltVariant
from meam_export.variants.ladder import LadderTask
from meam_policy.atomic_files import given_folder
from meam_policy.commands import parse
from meam_policy.commands.environment_options import (
    chosen_environment,
    environment_arguments,
    typed_environment,
)
from meam_policy.commands.numbers import numbers_as_json, print_numbers
from meam_policy.console import print_json, print_table, say
from meam_policy.environments.make import make_environment, with_arguments
from meam_policy.errors import ConfigError, MeamError, OutputError
from meam_policy.spec import PolicySpec, Solver, VariantSpec
from meam_policy.spec.names import read_names
from meam_training.runs.checkpoint import Checkpoint

__all__ = ["ExportArguments", "run"]

DESCRIPTION = """Export a checkpoint as a policy folder that acts without PyTorch.

Before the folder is written, every graph is run in onnxruntime and compared with PyTorch in float64, on random
observations and on those that the training run kept from its data.

Examples:
  meam export runs/pockets --output-dir policies/pockets
  meam export runs/pockets --output-dir policies/pockets --ladder --episodes 100
  meam export runs/pockets --output-dir policies/pockets --variants k3-grid int8 best-of-4
  meam export runs/pockets --output-dir policies/pockets --acting auto --episodes 50

A variant's name describes it: k5 (NFE 5, with the policy's own solver if 5 is a multiple of its evaluations per step,
else Euler's), k4-midpoint (with another solver), k3-grid (solver and unequal steps optimised on the policy's own
actions), one-step (the distilled policy), best-of-4 (the chunk with the highest value of 4), rtc (for real-time
chunking). -int8 or -fp16 may end any name."""


@dataclass(frozen=True)
class ExportArguments:
    """Arguments of `meam export`."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder, or a training folder, whose newest checkpoint is taken."""
    output_dir: Path
    """Policy folder to write; must be empty or not exist."""
    nfe: int | None = None
    """Evaluations of the velocity; as in training by default. Another number changes the actions."""
    solver: Solver | None = None
    """ODE solver; as in training by default."""
    time_grid: tuple[float, ...] = ()
    """Boundaries of the solver steps, from 0 to 1; equal steps by default."""
    best_of: int | None = None
    """Samples per decision, of which the chunk with the highest value is executed; as in training by default."""
    acting: str | None = None
    """How the policy acts: sample (the default), zero (zero noise) or a noise scale from 0 to 1. auto compares them,
    and best-of-N with --best-of N, over --episodes (50 by default), and records what clearly beats sampling."""
    variants: tuple[str, ...] = ()
    """Further graphs to export into the same folder."""
    ladder: bool = False
    """Add the usual variants: NFE 1, 2, 3, 5 and 10, and optimised time grids."""
    episodes: int = 0
    """Episodes in the policy's environment to measure the return of each variant, and of --acting, over; 0 for none."""
    env_id: str | None = None
    """With --episodes: environment as it is registered, or module:id; by default the policy's, as it was recorded."""
    env_kwargs: str | None = None
    """With --episodes: arguments of the environment, as in '{"g": 2}', in place of recorded ones."""
    max_episode_steps: int | None = None
    """With --episodes: time limit of the environment, steps; by default as recorded or registered."""
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Packages to import first, such as gymnasium_robotics, whose environments exist only then."""
    tolerance: float | None = None
    """Accepted error of int8 and fp16 variants: root mean square, as a share of the action's half width."""
    action_names: tuple[str, ...] = ()
    """Name of every number of an action, e.g. of its joint. A name may end with a unit: elbow[rad]."""
    observation_names: tuple[str, ...] = ()
    """Name of every number of an observation: name name … for a Box, key=name,name … for every key of a Dict."""
    robot: Path | None = None
    """The robot's contract, robot.toml: units, joints, limits, rates. `meam robot init` writes one to fill in."""
    license: str | None = None
    """SPDX identifier of the policy's licence."""
    triton: Path | None = None
    """Also write the policy into this NVIDIA Triton model repository."""
    triton_device: TritonDevice = "cpu"
    """Device on which Triton runs it."""
    json: bool = False
    """Print one line of JSON to stdout instead of the tables."""


def export(arguments: ExportArguments) -> None:
    """Export a checkpoint with the command's arguments."""
    a = arguments

    def show(stage: str, built: BuiltVariant | None) -> None:
        if built is None and not a.json:
            doing = {
                "policy": "Writing policy.onnx",
                "acting": "Measuring how it acts",
                "ladder": "Measuring the variants",
            }.get(stage, f"Writing {stage}")
            say(f"{doing} …")

    given_folder("--output-dir", a.output_dir)
    env_id, _ = typed_environment(a.env_id, a.packages)
    environment_kwargs = environment_arguments(a.env_kwargs, a.max_episode_steps)
    checkpoint = Checkpoint.load(a.checkpoint)
    variants = (*(_ladder(checkpoint) if a.ladder else ()), *a.variants)
    if variants and a.nfe is None:  # adds the policy itself, for comparison
        variants = (f"k{checkpoint.spec.integration.nfe}", *variants)
    _refuse_idle(a, variants)
    boxes = checkpoint.spec.observation
    names = read_names(boxes, a.observation_names, "--observation-names") if a.observation_names else None
    with contextlib.ExitStack() as stack:
        task = None
        if a.episodes < 0:
            raise ConfigError(f"episodes is {a.episodes}; expected 0 or more.")
        if a.episodes:
            idle = not variants and a.acting is None
            if idle:
                raise ConfigError(
                    f"episodes is {a.episodes}; expected 0, since there are no variants, and no --acting."
                )
            environment = chosen_environment(env_id, checkpoint.spec)
            env = stack.enter_context(contextlib.closing(make_environment(environment, **environment_kwargs)))
            task = LadderTask(env, a.episodes, 0, with_arguments(environment, environment_kwargs))
        elif env_id is not None or environment_kwargs:
            raise ConfigError(
                "--env-id, --env-kwargs and --max-episode-steps have no effect without --episodes: they are those of "
                "the environment in which is measured. Leave them out, or give --episodes."
            )
        exported = export_policy(
            checkpoint,
            a.output_dir,
            nfe=a.nfe,
            solver=a.solver,
            time_grid=a.time_grid or None,
            best_of=a.best_of,
            acting=a.acting,
            variants=variants,
            task=task,
            tolerance=a.tolerance,
            action_names=a.action_names or None,
            observation_names=names,
            robot=a.robot,
            license=a.license,
            on_stage=show,
        )
    served, problem = None, None
    if a.triton is not None:
        try:
            served = write_triton_repository(exported, a.triton, device=a.triton_device)
        except MeamError as error:
            problem = error
    _report(a, exported, served)
    if problem is not None:
        raise OutputError(f"The policy is in {exported}, but not in the Triton repository: {problem}") from problem


def _refuse_idle(arguments: ExportArguments, variants: tuple[str, ...]) -> None:
    """Refuse settings that have no effect on what is exported.

    Raises:
        ConfigError: there is one; the message says how it would have an effect.
    """
    if arguments.triton_device != "cpu" and arguments.triton is None:
        raise ConfigError(
            f"--triton-device {arguments.triton_device} is given without --triton; leave it out, or give --triton with "
            "the folder of a model repository."
        )
    if arguments.tolerance is not None and not any(name.endswith(("int8", "fp16")) for name in variants):
        raise ConfigError(
            f"--tolerance {arguments.tolerance:g} has no effect without an int8 or fp16 variant; leave it out, or add "
            "one, as in --variants int8."
        )


def _report(arguments: ExportArguments, exported: Exported, served: Path | None) -> None:
    variants = exported.spec.variants
    reports = {"policy": exported.parity, **exported.variants}
    if arguments.json:
        parity = {name: {row.kind: asdict(row) for row in report.rows} for name, report in reports.items()}
        measured = {name: variant.to_json() for name, variant in variants.items()}
        triton = None if served is None else str(served)
        acting = {"rule": exported.spec.acting_name, **exported.spec.acting.to_json()}
        found = {"policy": str(exported), "parity": parity, "acting": acting, "variants": measured, "triton": triton}
        print_json({**found, "numbers": numbers_as_json(exported.spec)})
        return
    _print_parity(reports)
    _print_acting(exported.spec)
    print_numbers(exported.spec)
    if variants:
        _print_ladder(variants)
    say("", f"Exported {exported}", f"Try it with: meam eval {quote(str(arguments.output_dir))}")
    if served is not None:
        say(f"Serve it with: tritonserver --model-repository {quote(str(served.parent))}")


def _print_acting(spec: PolicySpec) -> None:
    measured = spec.acting.measured
    if measured is None:
        return
    rows = []
    for rule, f in measured.returns.items():
        gain = f"{f['gain_low']:.4g} … {f['gain_high']:.4g}" if "gain_low" in f else ""
        success = f"{f['success']:.0%}" if "success" in f else ""
        interval = f"{f['return_low']:.4g} … {f['return_high']:.4g}"
        recorded = "recorded" if rule == spec.acting_name else ""
        rows.append([rule, f"{f['return_mean']:.4g}", interval, gain, success, recorded])
    print_table(
        f"How it acts in {measured.environment_id}, {measured.episodes} episodes from seed {measured.seed}; gain over "
        "sample, episode by episode",
        ["acting", "return", "95 % interval", "gain, 95 %", "success", ""],
        rows,
    )


def _ladder(checkpoint: Checkpoint) -> tuple[str, ...]:
    return (*LADDER, "one-step") if checkpoint.config.distill_coef else LADDER


def _print_parity(reports: dict[str, ParityReport]) -> None:
    print_table(
        "onnxruntime against PyTorch in float64, as shares of the action's half width",
        ["graph", "weights", "inputs", "max error", "rms error", "PyTorch"],
        [
            [
                name,
                report.precision,
                f"{row.inputs} {row.kind}" + (f", {row.near_ties} tied" if row.near_ties else ""),
                f"{row.max_error:.1e}",
                f"{row.rms_error:.1e}",
                f"{row.torch_error:.1e}",
            ]
            for name, report in reports.items()
            for row in report.rows
        ],
    )


def _print_ladder(variants: Mapping[str, VariantSpec]) -> None:
    columns = {
        "error": "action_error",
        "W1": "sliced_w1",
        "return": "return_mean",
        "success": "success",
        "p50 ms": "latency_p50_ms",
        "p99 ms": "latency_p99_ms",
    }
    rows = []
    for name, v in variants.items():
        figures = [f"{v.measured[key]:.3g}" if key in v.measured else "" for key in columns.values()]
        rows.append([name, str(v.integration.nfe), v.integration.solver, *figures])
    print_table("Variants, against policy.onnx", ["variant", "K", "solver", *columns], rows)


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and export."""
    export(parse(ExportArguments, arguments, prog, description=DESCRIPTION))

"""`meam export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from meam_export.export import export_policy
from meam_policy.commands import parse
from meam_policy.console import print_json, say
from meam_policy.spec import Solver

__all__ = ["export_command", "run"]


def export_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    output_dir: Path,
    flow_steps: int | None = None,
    solver: Solver | None = None,
    json: bool = False,
) -> None:
    """Export a checkpoint as a policy folder that acts without PyTorch.

    The graph is run in onnxruntime against PyTorch on random inputs before the folder is written.

    Example: meam export runs/pockets --output-dir policies/pockets

    Args:
        checkpoint: Checkpoint folder, or training folder, of which the newest checkpoint is taken.
        output_dir: Policy folder to write; must not exist, or be empty.
        flow_steps: Velocity evaluations; by default those of training. Another number changes the actions.
        solver: Integration scheme, euler or midpoint; that of training by default.
        json: Print one line of JSON to stdout.
    """
    folder = export_policy(checkpoint, output_dir, flow_steps=flow_steps, solver=solver)
    if json:
        print_json({"policy": str(folder)})
    else:
        say(f"Exported {folder}\nTry it with: meam eval {folder}")


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and export."""
    parse(export_command, arguments, prog)

"""`meam train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, progress_bar, say
from meam_policy.errors import DatasetError
from meam_training.config import PRESETS, TrainConfig
from meam_training.dataset import OfflineDataset
from meam_training.trainer import train

__all__ = ["TrainArguments", "run"]

DESCRIPTION = f"""Train a policy from a data set: meam train PRESET --data DATA --output-dir DIR [settings].

PRESET is one of {", ".join(PRESETS)}; without one it is me-am. Checkpoints and metrics.csv go to the output folder.
Ctrl-C finishes the update and saves; --resume goes on from there.

Example: meam train me-am --data meam/pockets-v0 --output-dir runs/pockets --steps 2000 --chunk-size 5"""


@dataclass(frozen=True)
class TrainArguments:
    """Arguments of `meam train`, after the preset."""

    data: str
    """Minari id, folder of a Minari data set, or OGBench .npz file."""
    output_dir: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    env_id: str | None = None
    """For an .npz file: OGBench single-task name from which the rewards are computed."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    json: bool = False
    """Print one line of JSON to stdout at the end."""


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and train."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = arguments[0] if named else "me-am"
    config = TrainConfig.preset(preset)
    parsed = parse(
        TrainArguments,
        arguments[1:] if named else arguments,
        f"{prog} {preset}" if named else prog,
        description=DESCRIPTION,
        default=TrainArguments(data=tyro.MISSING, output_dir=tyro.MISSING, config=config),
    )
    dataset = _load(parsed.data, parsed.env_id)
    config = parsed.config
    with progress_bar(f"Training {config.method}", config.steps, quiet=parsed.json) as advance:

        def on_progress(step: int, metrics: dict[str, float]) -> None:
            # In later stages of mirror descent the prior is at rest.
            name = "prior" if "prior_loss" in metrics else "policy"
            loss = metrics[f"{name}_loss"]
            advance(step, f"{name} loss {loss:.3f}, {metrics['updates_per_second']:.0f} updates/s")

        checkpoint = train(config, dataset, parsed.output_dir, resume=parsed.resume, on_progress=on_progress)
    if parsed.json:
        print_json({"checkpoint": str(checkpoint.path), "step": checkpoint.step})
    else:
        say(f"Trained {checkpoint.path}\nExport with: meam export {parsed.output_dir} --output-dir policies/first")


def _load(data: str, env_id: str | None) -> OfflineDataset:
    if data.endswith(".npz"):
        return OfflineDataset.from_ogbench(data, env_id)
    if env_id is not None:
        raise DatasetError(f"--env-id is for OGBench .npz files; {data} is a Minari data set with rewards of its own.")
    return OfflineDataset.from_minari(data)

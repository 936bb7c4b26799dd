"""`meam train`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from meam_policy.atomic_files import given_folder
from meam_policy.commands import parse, refuse_empty
from meam_policy.errors import ConfigError, DatasetError, NotFoundError
from meam_policy.extras import needs
from meam_training.commands.train_arguments import Draft, TrainArguments
from meam_training.config import PRESETS, TrainConfig
from meam_training.data.opening import recorded_arguments
from meam_training.runs.options import as_flag
from meam_training.setting_text import in_notation

__all__ = ["run"]

DESCRIPTION = f"""Train a policy from a data set: meam train PRESET --data DATA --output-dir DIR [settings].

PRESET is one of {", ".join(PRESETS)}; by default me-am, or that of the resumed run. Checkpoints and metrics.csv go to
the output folder. Ctrl-C finishes the update and saves; meam train --resume --output-dir DIR continues from there.

Example: meam train me-am --data data/meam/pockets-v0 --output-dir runs/pockets --steps 5000 --pretrain-steps 4000
--chunk-size 5 --learning-rate 1e-3 --batch-size 128 --hidden-dims 128 128 --critic-hidden-dims 128 128
--num-critics 2"""


_pytorch = partial(needs, "`meam train`", None, "train")
"""Around imports of what needs PyTorch, which `--help` does without."""


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and train."""
    with in_notation(as_flag):
        parsed = _parse(arguments, prog)

        with _pytorch():
            from meam_training.commands.train_run import run_training

        run_training(parsed)


def _parse(arguments: list[str], prog: str) -> TrainArguments:
    """Parse the arguments, with the data and settings of a resumed run as defaults."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = arguments[0] if named else None
    refuse_empty(arguments, prog)
    known = _known(arguments)
    output_dir = None if known.output_dir is None else given_folder("--output-dir", known.output_dir)
    folder = output_dir if known.resume else None
    begun, origin, unused = (None, {}, True) if folder is None else _begun(folder)
    settings = begun
    if settings is None or preset not in (None, settings.method):
        settings = TrainConfig.preset(preset or "me-am")
        if begun is None and known.start_from is not None:
            with _pytorch():
                from meam_training.runs.starting_point import StartingPoint

            settings = StartingPoint.load(known.start_from, "kept").settings(preset)
    parsed = parse(
        TrainArguments,
        arguments[1:] if named else arguments,
        f"{prog} {preset}" if named else prog,
        description=DESCRIPTION,
        paired_flags=True,  # a flag that the resumed run has set can be given again, or negated and then refused
        default=TrainArguments(
            **{"data": tyro.MISSING if folder is None else None, **recorded_arguments(origin)},
            output_dir=tyro.MISSING,
            config=Draft(**vars(settings)),
            packages=tuple(origin.get("import", ())),
            start_from=None if unused else origin.get("from"),
            statistics="renewed" if not unused and origin.get("statistics") == "renewed" else "kept",
        ),
    )
    if parsed.data is None and folder is None:  # the word None, which tyro reads as Python's
        raise DatasetError("--data is None; expected a Minari id, or a file or folder of data.")
    if parsed.data is None and begun is None:
        raise NotFoundError(f"{folder} holds no run to resume. Give the folder of one, or --data to begin one there.")
    if parsed.data is None:
        raise DatasetError(
            f"The run in {folder} was begun in Python, from arrays or without `origin`, so its data is not known here. "
            "Resume it in Python with train(..., resume=True), or give its --data."
        )
    if parsed.statistics == "renewed" and parsed.start_from is None:
        raise ConfigError(
            "--statistics is renewed, but has no effect without --from: a run from random weights takes those of the "
            "data. Leave it out, or give --from."
        )
    flags = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in arguments if flag.startswith("--")}
    # What is given counts as given even where it is the default: a temperature is then to stay, beside no budget.
    given = {name: value for name, value in vars(parsed.config).items() if value != getattr(settings, name)}
    given |= {name: value for name, value in vars(parsed.config).items() if flags & {name, f"no_{name}"}}
    chooses = begun is None and not flags & {"compile", "no_compile"}
    return replace(parsed, config=settings.changed(**given), chooses_to_compile=chooses)


def _begun(folder: Path) -> tuple[TrainConfig | None, Mapping[str, Any], bool]:
    """Settings and origin of a run, as far as it has begun, and whether it needs no more the policy it started from.

    Once there is a checkpoint, that holds what the run took from the policy, which may be gone.
    """
    with _pytorch():
        from meam_training.runs.checkpoint import Checkpoint
        from meam_training.runs.run_folder import RunRecord, load_settings

    settings, record = load_settings(folder), RunRecord.load(folder)
    return settings, {} if record is None else record.origin, Checkpoint.latest(folder) is not None


def _known(arguments: list[str]) -> argparse.Namespace:
    """Those arguments that choose the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-dir", "--output_dir", nargs="?", type=Path)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--from", dest="start_from", nargs="?")
    return parser.parse_known_args(arguments)[0]

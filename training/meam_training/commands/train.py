"""`meam train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import tyro

from meam_policy.atomic_files import given_folder
from meam_policy.commands import parse, refuse_empty
from meam_policy.console import print_json, progress_bar, say, say_mapping
from meam_policy.environments.make import make_environment
from meam_policy.environments.space_check import check_spaces
from meam_policy.errors import ConfigError, DatasetError, MissingExtraError, NotFoundError
from meam_training.commands.source_options import SourceOptions
from meam_training.config import PRESETS, Method, TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.data.opening import DataArguments, absolute, open_dataset
from meam_training.learning.update_cost import RunStart, UpdateCost
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.options import flag
from meam_training.runs.run_folder import RunRecord, load_settings
from meam_training.runs.run_report import opening, run_facts
from meam_training.runs.starting_point import StartingPoint, Statistics
from meam_training.trainer import EVALUATION_SECONDS, make_spec, train

__all__ = ["TrainArguments", "run"]

DESCRIPTION = f"""Train a policy from a data set: meam train PRESET --data DATA --output-dir DIR [settings].

PRESET is one of {", ".join(PRESETS)}; by default me-am, or that of the resumed run. Checkpoints and metrics.csv go to
the output folder. Ctrl-C finishes the update and saves; meam train --resume --output-dir DIR continues from there.

Example: meam train me-am --data data/meam/pockets-v0 --output-dir runs/pockets --steps 5000 --pretrain-steps 4000
--chunk-size 5 --learning-rate 1e-3 --batch-size 128 --hidden-dims 128 128 --critic-hidden-dims 128 128
--num-critics 2"""


_DATA = tuple(field.name for field in fields(DataArguments))


@dataclass(frozen=True)
class _Draft(TrainConfig):
    """Settings as built by the parser, unchecked; they are checked once it is known which of them were given."""

    # The preset chooses the method, and with it the settings of its scheme, which a flag would leave behind.
    method: tyro.conf.Suppress[Method] = "me-am"

    def __post_init__(self) -> None:
        """Check nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(SourceOptions):
    """Arguments of `meam train`, after the preset."""

    data: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TEXT...")]
    """Minari id or folder, OGBench .npz, HDF5 file of D4RL or robomimic, or folder of a LeRobot data set; or several,
    which are joined."""
    output_dir: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="", constructor=_Draft)]
    env_kwargs: str | None = None
    """Arguments of the environment, as in '{"g": 2}', in place of recorded ones; kept in the policy."""
    max_episode_steps: int | None = None
    """Time limit of the environment, steps, likewise; by default as recorded or registered."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from", metavar="TEXT")] = None
    """Start from the weights of a policy folder, a Hub repo id, a run or a checkpoint, and with its settings unless
    others are given."""
    statistics: Statistics = "kept"
    """With --from: normalisation kept from the policy, or renewed from the data."""
    resume: bool = False
    """Resume from the newest checkpoint in the output folder, with the run's data and settings unless others are
    given."""
    json: bool = False
    """Print one line of JSON to stdout at the end."""


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and train."""
    parsed = _parse(arguments, prog)
    assert parsed.data is not None  # otherwise _parse refuses
    environment = {"env_kwargs": parsed.env_kwargs, "max_episode_steps": parsed.max_episode_steps}
    named, packages = parsed.named(parsed.data, **environment)
    dataset = open_dataset(named)
    typed = any(value is not None for value in (named.env_id, *environment.values()))
    if typed and not parsed.resume and not parsed.config.evaluate_every:  # evaluations make it before the run begins
        _check_environment(parsed.config, dataset)
    origin = named.absolute.to_json() | ({"import": list(packages)} if packages else {})
    if parsed.start_from is not None:
        origin |= {"from": absolute(parsed.start_from), "statistics": parsed.statistics}
    last = Checkpoint.latest(parsed.output_dir) if parsed.resume else None
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun started
    progress = _Progress(parsed.config)
    quiet = parsed.json or not first

    def begin(start: RunStart) -> None:
        progress.cost = start.cost
        say_mapping(opening(parsed.config, dataset, start))

    with progress_bar(
        f"Training {parsed.config.method}",
        parsed.config.steps + parsed.config.online_steps,
        done=0 if last is None else last.step,
        quiet=quiet,
    ) as advance:
        try:
            checkpoint = train(
                parsed.config,
                dataset,
                parsed.output_dir,
                resume=parsed.resume,
                on_progress=lambda step, metrics: advance(step, progress.note(metrics), progress.left(step, metrics)),
                on_evaluation=progress.evaluated,
                on_warning=lambda warning: say(f"Warning at {warning.step}: {warning.text(flag)}"),
                on_start=None if quiet else begin,
                origin=origin,
                start_from=parsed.start_from,
                statistics=parsed.statistics,
            )
        except KeyboardInterrupt:
            if first and RunRecord.load(parsed.output_dir) is not None:  # otherwise the run had not begun
                kept = Checkpoint.latest(parsed.output_dir)
                done = "before its first checkpoint" if kept is None else f"after update {kept.step}, which is kept"
                say(f"Stopped {done}. Resume with: meam train --resume --output-dir {quote(str(parsed.output_dir))}")
            raise
    if not first:
        return
    best = Checkpoint.best(parsed.output_dir)
    if parsed.json:
        found = {} if best is None else {"best": str(best.path), "score": best.score}
        print_json({"checkpoint": str(checkpoint.path), "step": checkpoint.step, **found})
        return
    say_mapping({"": "", **run_facts(parsed.output_dir, parsed.config)})
    say(f"Trained {checkpoint.path}{progress.evaluation}")
    say(f"Export with: meam export {quote(str(parsed.output_dir))} --output-dir policies/first")
    if best is not None and best.step != checkpoint.step:
        say(
            f"The best return, {best.score:.4g}, was that of update {best.step}: "
            f"meam export {quote(str(parsed.output_dir / 'checkpoints' / 'best'))} --output-dir policies/best"
        )


def _check_environment(config: TrainConfig, dataset: OfflineDataset) -> None:
    """Refuse an environment that was typed and cannot be made, or is not the data's, before anything is written.

    Where it needs something that is not installed, as on a machine that only trains, that is only said.

    Raises:
        NotFoundError: there is no such environment.
        ConfigError: it refuses its arguments.
        SpaceError: its spaces are not the data's.
    """
    environment = dataset.recorded_environment
    if environment is None:
        return
    try:
        with closing(make_environment(environment.for_evaluation)) as env:
            check_spaces(make_spec(config, dataset), env)
    except MissingExtraError as error:
        say(f"Whether the policy fits {environment} is not known here: {error}")


class _Progress:
    """Formats the metrics that show whether training is going well as one line, and estimates the time left."""

    def __init__(self, config: TrainConfig) -> None:
        self.cost: UpdateCost | None = None
        self.evaluation = ""
        self._config, self._evaluation_seconds = config, 0.0
        self._rates: dict[bool, float] = {}

    def left(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Seconds left, evaluations and all; None while the speed of what is still to come is unknown."""
        c, rate = self._config, metrics["updates_per_second"]
        alone = c.pretraining if c.trains_policy else c.steps
        measured = {True: self.cost.pretraining, False: self.cost.joint} if self.cost else {}
        if rate:
            kind = step <= alone
            before = self._rates.get(kind, 1 / measured[kind] if measured.get(kind) else rate)
            self._rates[kind] = (before + rate) / 2  # the first updates are slow
        if c.online_steps:
            return None  # the environment's share is unknown
        seconds = 0.0
        for kind, updates in ((True, max(0, alone - step)), (False, c.steps - max(step, alone))):
            each = 1 / self._rates[kind] if kind in self._rates else measured.get(kind)
            if updates and each is None:
                return None
            seconds += updates * (each or 0.0)
        every = c.evaluate_every
        evaluations = c.steps // every - step // every + bool(c.steps % every) if every and step < c.steps else 0
        return seconds + evaluations * self._evaluation_seconds

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluation_seconds = metrics[EVALUATION_SECONDS]
        name = "return_mean" if "return_mean" in metrics else "action_difference"
        label = "return" if name == "return_mean" else "action difference"
        self.evaluation = f", {label} {metrics[name]:.3g} at {step}"

    def note(self, metrics: Mapping[str, float]) -> str:
        labels = {
            "critic_loss": "critic loss",
            "prior_loss": "prior loss",
            "policy_loss": "policy loss",
            "value_mean": "value",
            "gradient_norm": "gradient",
        }
        shown = [f"{label} {metrics[name]:.3g}" for name, label in labels.items() if name in metrics]
        return ", ".join([f"{metrics['updates_per_second']:.3g} updates/s", *shown]) + self.evaluation


def _parse(arguments: list[str], prog: str) -> TrainArguments:
    """Parse the arguments, with the data and settings of a resumed run as defaults."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = arguments[0] if named else None
    refuse_empty(arguments, prog)
    known = _known(arguments)
    output_dir = None if known.output_dir is None else given_folder("--output-dir", known.output_dir)
    folder = output_dir if known.resume else None
    begun = None if folder is None else load_settings(folder)
    record = None if folder is None else RunRecord.load(folder)
    origin = {} if record is None else record.origin
    settings = begun
    if settings is None or preset not in (None, settings.method):
        settings = TrainConfig.preset(preset or "me-am")
        if begun is None and known.start_from is not None:
            settings = StartingPoint.load(known.start_from, "kept").settings(preset)
    # Once there is a checkpoint, it holds what the run took from the policy, which may be gone.
    unused = folder is None or Checkpoint.latest(folder) is not None
    parsed = parse(
        TrainArguments,
        arguments[1:] if named else arguments,
        f"{prog} {preset}" if named else prog,
        description=DESCRIPTION,
        paired_flags=True,  # a flag that the resumed run has set can be given again, or negated and then refused
        default=TrainArguments(
            **{"data": tyro.MISSING if folder is None else None, **_recorded(origin)},
            output_dir=tyro.MISSING,
            config=_Draft(**vars(settings)),
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
    given |= {name: value for name, value in vars(parsed.config).items() if name in flags}
    return replace(parsed, config=settings.changed(**given))


def _known(arguments: list[str]) -> argparse.Namespace:
    """Those arguments that choose the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output-dir", "--output_dir", nargs="?", type=Path)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    parser.add_argument("--from", dest="start_from", nargs="?")
    return parser.parse_known_args(arguments)[0]


def _recorded(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that name the data of a run, from its record."""
    found = {name: origin[name] for name in _DATA if name in origin}
    if isinstance(found.get("data"), str):
        found["data"] = [found["data"]]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}

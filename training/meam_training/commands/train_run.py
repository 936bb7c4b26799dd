"""The training of `meam train`, with its progress on the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from shlex import quote

from meam_policy.console import print_json, progress_bar, say, say_mapping
from meam_policy.environments.make import make_environment
from meam_policy.environments.space_check import check_spaces
from meam_policy.errors import MissingExtraError
from meam_training.commands.train_arguments import TrainArguments
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.data.opening import absolute, open_dataset
from meam_training.learning.compiler import missing_for_compiling, pays_to_compile
from meam_training.learning.device import training_device
from meam_training.learning.update_cost import RunStart, UpdateCost
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.options import as_flag
from meam_training.runs.run_folder import RunRecord
from meam_training.runs.run_report import opening, run_facts
from meam_training.trainer import EVALUATION_SECONDS, make_spec, train

__all__ = ["run_training"]


def run_training(parsed: TrainArguments) -> None:
    """Train as the arguments say.

    Args:
        parsed: Arguments with data.
    """
    lacking = None
    if parsed.chooses_to_compile and pays_to_compile(parsed.config):
        lacking = missing_for_compiling(training_device(parsed.config.device))
        parsed = replace(parsed, config=parsed.config.changed(compile=lacking is None))
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
        progress.cost = None if parsed.config.compile else start.cost
        say_mapping(opening(parsed.config, dataset, start, lacking))

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
                on_warning=lambda warning: say(f"Warning at {warning.step}: {warning.text(as_flag)}"),
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

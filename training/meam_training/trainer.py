"""The training loop of a run."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from meam_policy.atomic_files import given_folder
from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError
from meam_policy.spec import EnvironmentSpec, PolicySpec
from meam_policy.typed import typed
from meam_training.config import Statistics, TrainConfig
from meam_training.data.action_range import action_range
from meam_training.data.data_report import ChunkCoverage, endless_warning, indifferent_warning
from meam_training.data.dataset import OfflineDataset
from meam_training.data.dataset_cache import array_blocks, moments
from meam_training.data.observation_scale import observation_scale
from meam_training.data.reward_offset import RewardOffset, explaining_constant
from meam_training.learning.calibration import Calibration
from meam_training.learning.chunk_source import ChunkSource, DeviceChunks, make_chunk_source
from meam_training.learning.device import cpu_threads, training_device
from meam_training.learning.distributed import ProcessGroup, process_group
from meam_training.learning.evaluation import DataEvaluator, EnvironmentEvaluator, Evaluation, Evaluator
from meam_training.learning.interrupts import collected_interrupts
from meam_training.learning.known_value import check_known_prior, check_known_value
from meam_training.learning.learner import Learner
from meam_training.learning.online import OnlineLearning
from meam_training.learning.update_cost import RunStart, measure_smaller, measure_update_cost
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.known_prior import KnownPrior
from meam_training.networks.meam_networks import KnownValue
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.csv_file import read_rows
from meam_training.runs.run_folder import Run, open_run
from meam_training.runs.run_log import METRICS_FILE
from meam_training.runs.starting_point import StartingPoint, started_spec
from meam_training.runs.watch import RunWarning, Watch
from meam_training.setting_text import SettingText, as_argument

__all__ = ["EVALUATION_SECONDS", "data_statistics", "make_spec", "train"]

_KEPT_OBSERVATIONS = 1000

_LEAST_ACTION_STD = 1e-3
"""Least standard deviation by which velocity fields are preconditioned: actions may all be equal."""

_NARROW = 0.9
"""Share of the action box below which it is warned that online training explores no farther."""

EVALUATION_SECONDS = "seconds"
"""Name of the time that an evaluation took, which is reported and not logged."""

Progress = Callable[[int, dict[str, float]], None]
"""Called with the number of steps completed and the latest metrics."""


@typed("output_dir")
def train(
    config: TrainConfig,
    dataset: OfflineDataset,
    output_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    on_progress: Progress | None = None,
    on_evaluation: Progress | None = None,
    on_warning: Callable[[RunWarning], None] | None = None,
    on_start: Callable[[RunStart], None] | None = None,
    value: KnownValue | None = None,
    prior: KnownPrior | None = None,
    env: gymnasium.Env[Any, Any] | None = None,
    online_env: gymnasium.Env[Any, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    start_from: str | os.PathLike[str] | None = None,
    statistics: Statistics = "kept",
) -> Checkpoint:
    """Train a policy. Ctrl-C finishes the update, writes a checkpoint and raises KeyboardInterrupt.

    Processes started by torchrun divide each batch among them; only the first one writes, evaluates and reports.

    Args:
        config: Settings.
        dataset: Training data.
        output_dir: Folder of the run, created if necessary, for settings, metrics and checkpoints; see
            `meam_training.runs.run_folder`.
        resume: Resume from the newest checkpoint, if there is one; on the CPU, the result is bit-identical to that of
            an uninterrupted run. Only settings that do not affect the weights may differ: `steps`, intervals,
            `loggers`, `device`, `threads`, `compile`.
        on_progress: Called after every `log_every` updates, and at the end.
        on_evaluation: Called after every evaluation; its metrics then have `EVALUATION_SECONDS` too, the time it took.
        on_warning: Called with what the metrics warn of, see `meam_training.runs.watch`; None issues Python warnings.
        on_start: Called before the first update. Then a few updates of other networks are timed first, which takes a
            second or two. None issues a Python warning where chunks leave many rows out.
        value: Known value of actions, in place of learned critics: maps raw observations [batch, obs] (less the data's
            `observation_offset`) and normalised, flattened chunks [batch, act] to [batch], differentiably. To resume,
            pass the same one again.
        prior: Known velocity of the behaviour's flow, for the policy to tilt in place of the learned prior, which is
            trained all the same and is where the policy starts: maps raw observations [*batch, obs], states
            [..., *batch, act] and times [..., *batch, 1] to velocities of the states' shape, differentiably. To resume,
            pass the same one again.
        env: Environment for evaluation; None makes the data set's environment. If there is neither, evaluations use the
            data.
        online_env: Environment for online training, not the same object as `env`; None makes the data set's
            environment.
        origin: Origin of the data, stored in `run.json` for `meam train --resume`.
        start_from: Policy from whose weights a new run starts: a policy folder or its Hub repo id, a run or a
            checkpoint. Its spaces must be the data's, and the sizes of its networks those of `config`. None starts
            from random weights.
        statistics: Normalisation of such a run: "kept" from the policy, or "renewed" from the data, at which the
            policy's weights then see other numbers.

    Returns:
        The last checkpoint; its `path` is a folder that `meam_export.export_policy` accepts. The checkpoint with the
        highest return in the environment is `Checkpoint.best(output_dir)`.

    Raises:
        ConfigError: the known value does not return one differentiable value per row, or the known prior a velocity,
            or they cannot be combined with the settings; the output folder's name is empty; Weights & Biases does
            not start; or memory is not enough for the sizes of networks and batches.
        OutputError: the folder cannot be written, or holds a run although `resume` is false; or the disk is full.
        LockedError: another process is training into the folder.
        CheckpointError: the run in the folder has other settings, or is broken.
        DatasetError: no episode is as long as a chunk.
        DeviceError: the device is not usable here.
        NotFoundError: the data set's environment does not exist.
        SpaceError: the environment's spaces differ from the data's, or those of `start_from` do.
        FormatError, HubError: the policy of `start_from` is broken, or cannot be had from the Hub.
        MissingExtraError: the environment's simulator or a logger is not installed.
        DivergedError: a gradient is not finite; the last checkpoint is intact.
    """
    folder = given_folder("output_dir", output_dir)
    begun = Checkpoint.latest(folder) if resume else None
    start = None if start_from is None else StartingPoint.load(start_from, statistics)
    if start is not None and begun is None:
        config = start.without_pretraining(config)
    config = config.resolved(None if begun is None else begun.config)
    if config.trains_policy and config.reward_offset is None:
        found = explaining_constant(dataset, config.discount) if config.normalise_values else 0.0
        config = config.changed(reward_offset=found or None)
    device = training_device(config.device)
    spec = started_spec(make_spec(config, dataset), config, start, begun, dataset.measured_bounds)
    data = dataset.fingerprint + ("" if value is None else " with a known value")
    data += "" if prior is None else " with a known prior"
    chunks = make_chunk_source(config, dataset, spec, device)
    if value is not None:
        check_known_value(value, chunks, config, device)
    if prior is not None:
        check_known_prior(prior, chunks, config, device)
    steps = config.steps + config.online_steps
    with (
        _memory_is_enough(config),
        process_group(config, device) as group,
        _evaluator(config, spec, chunks, device, env, group) as evaluator,
        _online_env(config, spec, online_env) as online_env,
        cpu_threads(config.threads),
        open_run(folder, config, spec, data, resume=resume, origin=origin, group=group) as run,
        collected_interrupts() as interrupts,
    ):
        if on_start is None and group.is_first:
            for text in _unsaid(config, dataset, spec, value is not None):
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        learner = Learner(spec, config, device, value, group, data_statistics(config, dataset, spec), prior)
        if start is not None:
            start.initialise(learner.networks)  # a checkpoint then replaces them
        online = None if online_env is None else OnlineLearning(online_env, learner, chunks, spec)
        run.restore(learner, online)
        run.keep_observations(_some_observations(chunks, device))
        group.check_same_step(run.step)
        if on_start is not None and group.is_first:
            on_start(_start(config, spec, chunks, device, value, group, run.step))
        watch = Watch(config, read_rows(folder / METRICS_FILE)) if group.is_first else None
        calibration = None
        if group.is_first and config.trains_policy and value is None:
            calibration = Calibration(dataset, config, spec, device)
            if begun is None:  # at once: where they are equal, there is nothing to warn about
                run.log.add({name: torch.tensor(limit) for name, limit in calibration.limits.items()})
        if run.lacks_evaluation():  # the run was interrupted before it
            evaluation = _evaluate(evaluator, run, learner, run.step, interrupts, on_evaluation)
            if run.is_best(evaluation):
                run.save(run.step, learner, evaluation, online)
        for step in range(run.step + 1, steps + 1):
            last = step == steps
            if online is None or step <= config.steps:
                run.log.add(learner.update(chunks, step))
            else:
                for metrics in online.step(step):
                    run.log.add(metrics)
            if calibration is not None and run.is_calibrated(step):
                with run.log.paused():
                    run.log.add(calibration(learner.networks))
            if watch is not None and (last or step % config.log_every == 0):
                row = run.log.write(step)
                _report(on_progress, step, row)
                for warning in watch.see(step, row):
                    (on_warning or _warn)(warning)
            with run.log.paused():
                evaluation = None
                if run.is_due(step):
                    evaluation = _evaluate(evaluator, run, learner, step, interrupts, on_evaluation)
                stop = group.agree(bool(interrupts))
                if last or stop or step % config.checkpoint_every == 0 or run.is_best(evaluation):
                    learner.prepare_to_act(step)
                    run.save(step, learner, evaluation, online)
            if stop:
                raise KeyboardInterrupt
        group.wait()
    finished = Checkpoint.latest(folder)
    assert finished is not None  # there is at least one step, and the last one saves a checkpoint
    return finished


@contextlib.contextmanager
def _memory_is_enough(config: TrainConfig) -> Iterator[None]:
    """Say which settings ask for more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a type of its own for GPUs only.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            sizes = ("batch_size", "chunk_size", "candidates", "hidden_dims", "critic_hidden_dims", "num_critics")
            given = ", ".join(f"{{{name}}} = {getattr(config, name)}" for name in sizes)
            reason = str(error).splitlines()[0][:200]
            text = SettingText(f"Memory is not enough for {given} ({{0}}). Make one of them smaller.", reason)
            raise ConfigError(text) from error
        raise


def make_spec(config: TrainConfig, dataset: OfflineDataset) -> PolicySpec:
    """Specification of a policy trained with these settings on this data; its file hashes are still empty."""
    mean, scale = observation_scale(dataset)
    low, high = np.array(dataset.action_box.low), np.array(dataset.action_box.high)
    if config.action_scaling == "data":
        low, high = action_range(dataset.actions, dataset.action_box)
    # A number whose bounds are equal is given by them; any scale serves.
    half = np.where(high > low, (high - low) / 2, 1.0)
    recorded = dataset.recorded_environment
    return PolicySpec(
        observation=dataset.observation_boxes,
        action=dataset.action_box,
        chunk_size=config.chunk_size,
        execute_steps=config.execute_steps or config.chunk_size,
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(scale.tolist()),
        observation_offset=dataset.observation_offset,
        action_offset=tuple(((high + low) / 2).tolist()),
        action_scale=tuple(half.tolist()),
        integration=config.integration,
        method=config.method,
        hyperparameters={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
        training_data=dataset.dataset_id,
        environment_id=dataset.environment_id,
        environment=recorded if recorded is not None and recorded != EnvironmentSpec(recorded.id) else None,
        control_rate_hz=dataset.control_rate_hz,
    )


def data_statistics(config: TrainConfig, dataset: OfflineDataset, spec: PolicySpec) -> DataStatistics:
    """Location and scale of the data's actions and discounted returns.

    Where a recording was cut off, the return goes on at the data's mean reward. Returns that are all equal have no
    scale; then the rewards' is taken, or else 1.
    """
    offset, scale = np.array(spec.action_offset), np.array(spec.action_scale)
    ends = (offset - scale, offset + scale)  # as the flow sees the actions
    mean, std = moments(lambda: (block.clip(*ends) for block in array_blocks(dataset.actions)))
    centre = (mean - offset) / scale
    reward_offset = RewardOffset.of(dataset, config.reward_offset, config.discount)
    dataset = reward_offset.off(dataset)
    rewards = dataset.rewards.astype(np.float64)
    returns = dataset.discounted_returns(config.discount).continued(dataset.rewards, config.discount)
    # Deviations that are rounding errors are none.
    least = 1e-6 * np.abs(returns).max()
    spread = next((s for s in (returns.std(), rewards.std(), np.abs(rewards).mean()) if s > least), 1.0)
    return DataStatistics(
        action_mean=tuple(np.tile(centre, config.chunk_size).tolist()),
        action_std=max(_LEAST_ACTION_STD, float(np.sqrt(np.square(std / scale).mean()))),
        value_offset=float(returns.mean()) + reward_offset.level,
        value_scale=float(spread),
    )


def _some_observations(chunks: ChunkSource, device: torch.device) -> Tensor:
    return chunks.sample(min(_KEPT_OBSERVATIONS, len(chunks)), torch.Generator(device).manual_seed(0)).observations


@contextlib.contextmanager
def _evaluator(
    config: TrainConfig,
    spec: PolicySpec,
    chunks: ChunkSource,
    device: torch.device,
    env: gymnasium.Env[Any, Any] | None,
    group: ProcessGroup,
) -> Iterator[Evaluator | None]:
    """Make the evaluator, if there are evaluations; an environment made here is closed on exit."""
    if not config.evaluate_every or not group.is_first:
        yield None
    elif env is not None:
        yield EnvironmentEvaluator(env, spec, config.evaluate_episodes)
    elif spec.recorded_environment is None:
        yield DataEvaluator(chunks, config, device)
    else:
        environment = spec.recorded_environment.for_evaluation
        with contextlib.closing(make_environment(environment)) as made:
            yield EnvironmentEvaluator(made, spec, config.evaluate_episodes, environment)


@contextlib.contextmanager
def _online_env(
    config: TrainConfig, spec: PolicySpec, env: gymnasium.Env[Any, Any] | None
) -> Iterator[gymnasium.Env[Any, Any] | None]:
    """Provide the environment for online training, if there is any; one made here is closed on exit."""
    if not config.online_steps:
        yield None
    elif env is not None:
        yield env
    elif spec.recorded_environment is None:
        raise ConfigError(
            SettingText(
                "{online_steps} is {0}, but the data does not name its environment; expected online_env= in Python or "
                "--env-id on the command line, or {online_steps:0}.",
                config.online_steps,
            )
        )
    else:
        with contextlib.closing(make_environment(spec.recorded_environment)) as made:
            yield made


def _evaluate(
    evaluator: Evaluator | None,
    run: Run,
    learner: Learner,
    step: int,
    interrupts: list[int],
    on_evaluation: Progress | None,
) -> Evaluation | None:
    """Evaluate and log, if this process evaluates; an interrupt abandons it, since saving is more urgent."""
    if evaluator is None:
        return None
    learner.prepare_to_act(step)
    began = time.perf_counter()
    evaluation = evaluator(learner.networks, stop=lambda: interrupts)
    if evaluation is not None:
        seconds = time.perf_counter() - began
        row = run.log.write_evaluation(step, evaluation.metrics)
        _report(on_evaluation, step, {**row, EVALUATION_SECONDS: seconds})
    return evaluation


def _unsaid(config: TrainConfig, dataset: OfflineDataset, spec: PolicySpec, known: bool) -> list[str]:
    """What nobody is told of who does not see how the run begins, and would want to know."""
    found = [] if config.pad_chunks else [ChunkCoverage.of(dataset, config.chunk_size, padded=False).warning]
    if config.trains_policy and not known:  # where the value is known, nothing depends on the data's rewards
        found.append(endless_warning(dataset))
        if not config.online_steps:  # others may be met there
            found.append(indifferent_warning(dataset))
    if config.online_steps and _reach(spec) < _NARROW:
        found.append(
            SettingText(
                "Online training explores {0:.2g} of the action box, the range of the data's actions and a tenth on "
                'either side, and no farther. Set {action_scaling:"box"} (in a new run) for all of it.',
                _reach(spec),
            )
        )
    return [text for text in found if text is not None]


def _start(
    config: TrainConfig,
    spec: PolicySpec,
    chunks: ChunkSource,
    device: torch.device,
    value: KnownValue | None,
    group: ProcessGroup,
    step: int,
) -> RunStart:
    """Describe the run that begins; divided among processes, its updates cost something else."""
    cost = measure_update_cost(config, spec, chunks, device, value) if group.size == 1 else None
    smaller = None
    if cost is not None and step == 0 and not spec.started_from:
        smaller = measure_smaller(config, spec, chunks, device, cost.left(config, step), value)
    resident = isinstance(chunks, DeviceChunks)
    threads, reach = torch.get_num_threads(), _reach(spec)
    constant = config.reward_offset or 0.0
    return RunStart(device, threads, group.size, resident, step, cost, smaller, spec.started_from, reach, constant)


def _reach(spec: PolicySpec) -> float:
    """Least share of the action box, over the numbers that move, within which the policy acts."""
    width = np.subtract(spec.action.high, spec.action.low)
    shares = 2 * np.array(spec.action_scale)[width > 0] / width[width > 0]
    return float(shares.min(initial=1.0))


def _warn(warning: RunWarning) -> None:
    warnings.warn(warning.text(as_argument), RuntimeWarning, stacklevel=4)


def _report(callback: Progress | None, step: int, row: dict[str, float]) -> None:
    if callback is not None:
        callback(step, row)

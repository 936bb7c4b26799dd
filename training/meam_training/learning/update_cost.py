"""What an update costs and which part of it, measured before a run begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from meam_policy.errors import ConfigError
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.critic_loss import critic_loss
from meam_training.algorithm.head_losses import head_losses
from meam_training.algorithm.policy_samples import draw_policy_samples
from meam_training.algorithm.prior_loss import mixture_prior_loss
from meam_training.algorithm.update import OBJECTIVES
from meam_training.config import TrainConfig
from meam_training.learning.chunk_source import ChunkSource
from meam_training.learning.learner import Learner
from meam_training.networks.meam_networks import KnownValue

__all__ = ["RunStart", "Smaller", "UpdateCost", "measure_smaller", "measure_update_cost"]

_REPEATS = 5
_LONGEST = 1.0
"""Seconds after which a measurement is not repeated."""
_LONG = 1800.0
"""Seconds of training from which smaller sizes are suggested."""
_SMALL_DATA = 200_000
_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 10_000,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "hidden_dims": (128, 128, 128),
        "critic_hidden_dims": (128, 128, 128),
        "num_critics": 2,
    }
)
"""Sizes that do for up to `_SMALL_DATA` transitions in `benchmarks/defaults`, there with a third of these steps."""
_OF_CRITICS = ("critic_hidden_dims", "num_critics")


@dataclass(frozen=True)
class UpdateCost:
    """Time that updates take, seconds.

    Attributes:
        pretraining: An update of pretraining, or of `bc`.
        joint: An update of all networks; 0 for `bc`, which has none.
        parts: Of it: drawing batch and noise ("data"), drawing samples of the policy ("samples"), loss and gradient of
            each part ("critic", "prior", "policy", "heads"), and all else ("optimiser"); empty for `bc`.
    """

    pretraining: float
    joint: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def left(self, config: TrainConfig, step: int) -> float:
        """Time of the offline updates that a run has left after a step, seconds."""
        alone = config.pretraining if config.trains_policy else config.steps
        return max(0, alone - step) * self.pretraining + max(0, config.steps - max(step, alone)) * self.joint


@dataclass(frozen=True)
class Smaller:
    """Sizes that do for the data at hand, where those of a run take long.

    Attributes:
        changes: Settings to change, by name.
        seconds: Time that all updates then take.
    """

    changes: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class RunStart:
    """Where and how a run begins.

    Attributes:
        device: Training device.
        threads: CPU threads of PyTorch.
        processes: Processes that train together.
        resident: Whether the data is on the training device, rather than read batch by batch.
        step: Steps completed before.
        cost: Cost of an uncompiled update; None where it is not known beforehand, because updates are divided among
            processes.
        smaller: Sizes that would do; None where the run is short, or nothing smaller has been measured.
        started_from: Policy from whose weights it started; see `PolicySpec.started_from`.
        reach: Least share of the action box, over the numbers that move, within which the policy acts.
        reward_offset: What is taken off every reward.
    """

    device: torch.device
    threads: int
    processes: int
    resident: bool
    step: int
    cost: UpdateCost | None
    smaller: Smaller | None = None
    started_from: Mapping[str, str] = field(default_factory=dict)
    reach: float = 1.0
    reward_offset: float = 0.0


def measure_update_cost(
    config: TrainConfig,
    spec: PolicySpec,
    chunks: ChunkSource,
    device: torch.device,
    value: KnownValue | None = None,
) -> UpdateCost:
    """Time a few uncompiled updates of networks of their own, which takes a second or two.

    Args:
        config: Settings of the run.
        spec: Specification of the policy.
        chunks: Source of the batches.
        device: Training device.
        value: Known value of actions, in place of learned critics.
    """
    learner = Learner(spec, config.changed(compile=False), device, value)
    n, generator = learner.networks, learner.generator

    def draw() -> tuple[ChunkBatch, MeamNoise]:
        batch = chunks.sample(config.batch_size, generator)
        return batch, draw_noise(config.batch_size, batch.actions.shape[1], config, generator, device)

    def seconds(work: Callable[[], object]) -> float:
        return _median_seconds(work, device)

    if not config.trains_policy:
        return UpdateCost(seconds(lambda: learner.update(chunks, 1)), 0.0)
    alone = seconds(lambda: learner.update(chunks, 1)) if config.pretraining else 0.0
    whole = seconds(lambda: learner.update(chunks, config.pretraining + 1))
    batch, noise = draw()
    features = n.encoder(batch.observations)
    samples = draw_policy_samples(n, features, batch, noise, config)
    losses: dict[str, Callable[[], tuple[Tensor, object]]] = {
        "prior": lambda: mixture_prior_loss(n, features, batch, noise, config),
        "policy": lambda: OBJECTIVES[config.objective](n, features, samples, noise, config),
    }
    if value is None:
        losses["critic"] = lambda: critic_loss(n, features, batch, samples, noise, config)
    if n.edit_policy is not None or n.one_step is not None:
        losses["heads"] = lambda: head_losses(n, features, samples, noise, config)
    trained = [parameter for parameter in n.parameters() if parameter.requires_grad]
    parts = {
        "data": seconds(draw),
        "samples": seconds(lambda: draw_policy_samples(n, features, batch, noise, config)),
    }
    for name, loss in losses.items():
        parts[name] = seconds(lambda loss=loss: torch.autograd.grad(loss()[0], trained, allow_unused=True))
    parts["optimiser"] = max(0.0, whole - sum(parts.values()))
    return UpdateCost(alone, whole, parts)


def measure_smaller(
    config: TrainConfig,
    spec: PolicySpec,
    chunks: ChunkSource,
    device: torch.device,
    left: float,
    value: KnownValue | None = None,
) -> Smaller | None:
    """Sizes that do for small data, with the time that they would take, where a run on a CPU takes long.

    Args:
        config: Settings of the run.
        spec: Specification of the policy.
        chunks: Source of the batches.
        device: Training device.
        left: Time that the run's updates take, seconds.
        value: Known value of actions, in place of learned critics.

    Returns:
        The sizes; None for runs on another device, on more data, or that are short or as small already.
    """
    if device.type != "cpu" or left < _LONG or len(chunks) > _SMALL_DATA or config.online_steps:
        return None
    sizes = {name: size for name, size in _SIZES.items() if config.trains_policy or name not in _OF_CRITICS}
    changes = {name: size for name, size in sizes.items() if getattr(config, name) != size}
    larger = [name for name in ("hidden_dims", "critic_hidden_dims") if sum(getattr(config, name)) > sum(_SIZES[name])]
    if not larger or config.steps < _SIZES["steps"]:
        return None
    free = config.changed(pretrain_steps=None)
    if free.pretraining != config.pretraining:
        return None  # a pretraining of one's own choice
    try:
        small = free.changed(**changes)
    except ConfigError:  # settings that only fit the larger sizes, such as many candidates
        return None
    seconds = measure_update_cost(small, spec, chunks, device, value).left(small, 0)
    return Smaller(changes, seconds) if seconds < left / 2 else None


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a few runs, after one that is not counted."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= _REPEATS and (len(times) < 2 or time.perf_counter() - began < _LONGEST):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])

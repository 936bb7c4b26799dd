"""A run's networks, optimiser and random generator, and their gradient update."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from meam_policy.errors import DivergedError
from meam_policy.spec import PolicySpec
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.update import compute_losses, pretraining_losses, update_targets
from meam_training.config import TrainConfig
from meam_training.learning.chunk_source import ChunkSource, DeviceChunks
from meam_training.learning.compilation import CapturedUpdate, compiled
from meam_training.learning.distributed import ProcessGroup
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.known_prior import KnownPrior
from meam_training.networks.meam_networks import KnownValue, build_networks
from meam_training.setting_text import SettingText

__all__ = ["Learner", "clip_gradients"]


Stage = Literal["pretraining", "prior", "first", "later"]
"""Stage of training: "pretraining" trains prior and critics on the data alone, "prior" only the prior; "first" trains
all networks; "later" (mirror-descent stages after the first) trains all but the prior, which is an earlier policy."""

_ON_DATA_ALONE = ("pretraining", "prior")

RETURN_PASSES = 5
"""How often critics may see the data in pretraining. A return is that of one trajectory, so that critics which see it
again and again learn it by heart, and prefer actions for the luck that followed them."""


class Learner:
    """Networks, optimiser and random generator of a run; `update` takes one gradient step.

    `config` holds the run's settings for the losses, the noise and all users of the learner. The networks keep only the
    settings they need to be built and to act.

    Args:
        spec: Specification of the policy.
        config: Settings; its `seed` determines the initial weights and all noise.
        device: Device of the networks and the generator.
        value: Known value of actions, in place of learned critics; see `train`.
        group: The processes that train together.
        statistics: Location and scale of the data's actions and values; None for neutral ones.
        prior: Known prior, to be tilted in place of the learned one; see `train`.

    Attributes:
        config: Settings.
        group: The processes that train together.
        networks: All networks.
        optimizer: Adam over all trained parameters.
        generator: Source of all randomness of the updates, batches included.
    """

    def __init__(
        self,
        spec: PolicySpec,
        config: TrainConfig,
        device: torch.device,
        value: KnownValue | None = None,
        group: ProcessGroup | None = None,
        statistics: DataStatistics | None = None,
        prior: KnownPrior | None = None,
    ) -> None:
        self.config, self.group = config, group or ProcessGroup()
        self.networks = build_networks(spec, config, statistics).to(device)
        if value is not None:
            # A lambda, because a module would be registered and become part of the checkpoint.
            self.networks.known_value = lambda *args: value(*args)
        if prior is not None:
            self.networks.known_prior = lambda *args: prior(*args)
        # Capturing NCCL operations should work as well, but is untested.
        self._captures = config.compile and device.type == "cuda" and self.group.size == 1
        self._trained = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self._trained, lr=config.adam_rate, fused=True, capturable=self._captures)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self._stage_starts = _stage_starts(config)
        stages: tuple[Stage, ...] = get_args(Stage)
        self._gradients = {stage: partial(self._eager_gradients, stage) for stage in stages}
        if config.compile:
            self._gradients = {stage: compiled(function) for stage, function in self._gradients.items()}
        self._captured: dict[Stage, CapturedUpdate] = {}

    def update(self, chunks: ChunkSource, step: int) -> dict[str, Tensor]:
        """Perform update number `step`, counted from 1.

        Returns:
            The update's metrics, scalars on the device.

        Raises:
            DivergedError: the gradient is not finite. The trained weights are as before the update.
        """
        n, c = self.networks, self.config
        if step in self._stage_starts:
            n.start_mirror_stage()
        stage = self._stage(step, len(chunks))
        if self._captures and isinstance(chunks, DeviceChunks):
            if stage not in self._captured:
                self._captured[stage] = CapturedUpdate(partial(self._step, chunks, stage), self.generator)
            metrics = self._captured[stage]()
        else:
            metrics = self._step(chunks, stage)
        if not math.isfinite(metrics["gradient_norm"].item()):
            strength = "inverse_temperature" if c.kl_budget is None else "kl_budget"
            shown = ", ".join(f"{name} {value.item():.3g}" for name, value in metrics.items())
            raise DivergedError(
                SettingText(
                    "The gradient of update {0} is not finite ({1}); expected finite numbers. Earlier checkpoints are "
                    f"intact; try a smaller {{learning_rate}}, {{{strength}}} or {{entropy_coef}}.",
                    step,
                    shown,
                )
            )
        if c.trains_policy and step == c.pretraining:
            n.start_from_pretraining()
            # Adam's moments are of gradients of another scale; keeping them would stall the prior for a long time.
            self.optimizer.state.clear()
        return metrics

    def prepare_to_act(self, step: int) -> None:
        """Prepare to act after update `step`: during pretraining, the policy becomes a copy of the prior."""
        if step < self.config.pretraining:
            self.networks.start_from_pretraining()

    def _step(self, chunks: ChunkSource, stage: Stage) -> dict[str, Tensor]:
        """Perform one update; if its gradient is not finite, weights and dual variables stay as they are."""
        n, c = self.networks, self.config
        batch = chunks.sample(c.batch_size, self.generator)
        noise = draw_noise(c.batch_size, batch.actions.shape[1], c, self.generator, batch.actions.device)
        batch, noise = self.group.rows_of(batch, noise)
        gradients, metrics = self._gradients[stage](batch, noise)
        gradients, metrics = self.group.average(gradients), self.group.average_metrics(metrics)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        norm = clip_gradients(n, c.gradient_clip or math.inf, c.joint_clip)
        if stage not in _ON_DATA_ALONE:
            update_targets(n, c.target_rate)
        # The flag that a GradScaler would set, so that Adam skips a step whose gradient is not finite.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        if n.trust_region is not None and stage not in _ON_DATA_ALONE:
            # After the losses, which took the temperature from before this update.
            metrics |= n.trust_region.step(metrics["path_kl"], metrics["unit_cost"], norm.isfinite())
        return {**metrics, "gradient_norm": norm}

    def _stage(self, step: int, rows: int) -> Stage:
        c = self.config
        if step <= c.pretraining:
            return "pretraining" if c.pretrains_critics and step * c.batch_size <= RETURN_PASSES * rows else "prior"
        return "later" if self._stage_starts and step >= self._stage_starts[0] else "first"

    def _eager_gradients(
        self, stage: Stage, batch: ChunkBatch, noise: MeamNoise
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Gradients of the losses for all trained parameters, None for those not involved, and the metrics."""
        if stage in _ON_DATA_ALONE:
            losses = pretraining_losses(self.networks, batch, noise, critics=stage == "pretraining")
        else:
            losses = compute_losses(self.networks, batch, noise, self.config, stage == "later")
        gradients = torch.autograd.grad(losses.total, self._trained, allow_unused=True)
        return list(gradients), {name: value.detach() for name, value in losses.metrics.items()}


def _stage_starts(config: TrainConfig) -> list[int]:
    """First update of each mirror-descent stage after the first; the stages are equally long."""
    stages = config.mirror_stages if config.trains_policy else 1
    joint = config.steps - config.pretraining
    return [config.pretraining + 1 + joint * stage // stages for stage in range(1, stages)]


def clip_gradients(networks: nn.Module, limit: float, joint: bool) -> Tensor:
    """Clip gradients to a largest norm.

    Args:
        networks: Module whose children are the networks; its gradients are changed in place.
        limit: Largest norm; infinity for no clipping.
        joint: Clip the joint norm of all gradients, rather than each network's norm on its own.

    Returns:
        The joint norm before clipping.
    """
    if joint:
        return torch.nn.utils.clip_grad_norm_(networks.parameters(), limit)
    parts = [[p for p in part.parameters() if p.grad is not None] for part in networks.children()]
    norms = [torch.nn.utils.clip_grad_norm_(part, limit) for part in parts if part]
    return torch.stack(norms).norm()

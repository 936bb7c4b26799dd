"""A run's networks, optimiser and randomness, and one update of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meam_policy.errors import DivergedError
from meam_policy.spec import PolicySpec
from meam_training.algorithm import (
    KnownValue,
    MeamNetworks,
    compute_losses,
    draw_noise,
    pretraining_losses,
    update_targets,
)
from meam_training.checkpoint import build_networks
from meam_training.chunk_source import ChunkSource
from meam_training.config import TrainConfig

__all__ = ["Learner", "clip_gradients"]


class Learner:
    """Networks, optimiser and random generator of one run; `update` moves them by one gradient step.

    Args:
        spec: What the policy is.
        config: Settings; its `seed` decides the first weights and all noise.
        device: Where everything lives.
        value: Known value of actions, instead of learned critics; see `train`.

    Attributes:
        networks: All networks.
        optimizer: Adam over everything that is trained.
        generator: Source of all randomness of the updates, batches included.
    """

    def __init__(
        self, spec: PolicySpec, config: TrainConfig, device: torch.device, value: KnownValue | None = None
    ) -> None:
        self.config = config
        self.networks = build_networks(spec, config).to(device)
        if value is not None:
            self.networks.known_value = lambda *args: value(*args)  # a module would become a part of the checkpoint
        trained = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self._mirror_starts = _mirror_starts(config)

    def update(self, chunks: ChunkSource, step: int) -> dict[str, Tensor]:
        """Do update number `step`, counted from 1.

        Returns:
            What is logged of it; scalars on the device.

        Raises:
            DivergedError: the gradient is not finite. The weights are those before the update.
        """
        n, c = self.networks, self.config
        batch = chunks.sample(c.batch_size, self.generator)
        noise = draw_noise(c.batch_size, batch.actions.shape[1], c, self.generator, batch.actions.device)
        pretraining = step <= c.pretrain_steps
        starts = self._mirror_starts
        if step in starts:
            n.start_mirror_stage()
        if pretraining:
            losses = pretraining_losses(n, batch, noise)
        else:
            losses = compute_losses(n, batch, noise, c, later_stage=bool(starts) and step >= starts[0])
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = clip_gradients(n, c)
        if not math.isfinite(norm.item()):
            shown = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.metrics.items())
            raise DivergedError(
                f"The gradient of update {step} is not finite ({shown}). The last checkpoint is intact; "
                "try a smaller learning_rate, inverse_temperature or entropy_coef."
            )
        if not pretraining:
            update_targets(n, c.polyak)
        self.optimizer.step()
        if step == c.pretrain_steps:
            n.start_policy_from_prior()
            # The moments belong to gradients of another size: kept, they would hold the prior still for long.
            self.optimizer.state.clear()
        return {**losses.metrics, "gradient_norm": norm}


def _mirror_starts(config: TrainConfig) -> list[int]:
    """First updates of the stages of mirror descent after the first; the stages are equally long."""
    stages = config.mirror_steps if config.trains_policy else 1
    joint = config.steps - config.pretrain_steps
    return [config.pretrain_steps + 1 + joint * stage // stages for stage in range(1, stages)]


def clip_gradients(networks: MeamNetworks, config: TrainConfig) -> Tensor:
    """Bound the gradients' norm, jointly or of every network on its own; returns their joint norm before."""
    limit = config.gradient_clip or math.inf
    if config.joint_clip:
        return torch.nn.utils.clip_grad_norm_(networks.parameters(), limit)
    parts = [[p for p in part.parameters() if p.grad is not None] for part in networks.children()]
    norms = [torch.nn.utils.clip_grad_norm_(part, limit) for part in parts if part]
    return torch.stack(norms).norm()

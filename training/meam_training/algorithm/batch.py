"""The inputs of an update: a batch of action chunks, and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.config import TrainConfig

__all__ = ["ROW_AXES", "ChunkBatch", "MeamNoise", "RowAxis", "draw_noise", "mixed_rows", "orthonormal", "row_axes"]


class ChunkBatch(NamedTuple):
    """A batch of action chunks on the training device.

    Attributes:
        observations: Raw observations [batch, obs].
        actions: Normalised, flattened chunks [batch, act], act = chunk_size * action_dim, in [-1, 1].
        rewards: Discounted chunk rewards [batch].
        next_observations: Raw observations after the chunks [batch, obs].
        masks: 0 if the chunk reached a termination, else 1 [batch].
        valid: 1 where rewards and outcome are those of the chunk, else 0 [batch].
        within: 1 for the components of the chunk's actions that are learned from, else 0 [batch, act].
        returns: Discounted return of the data from the chunk's first action on [batch].
        known: Share of the return that was recorded, from 0 to 1 [batch].
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    masks: Tensor
    valid: Tensor
    within: Tensor
    returns: Tensor
    known: Tensor


@dataclass(frozen=True)
class RowAxis:
    """The axis of a field that runs over the rows of the batch, along which processes divide it.

    Attributes:
        index: The axis; None if the field is common to all rows, so that every process needs all of it.
    """

    index: int | None


def row_axes(fields: type) -> dict[str, int | None]:
    """Row axis of each field of a class, as declared by `Annotated[Tensor, RowAxis(…)]`.

    Raises:
        TypeError: a field declares no row axis, or several.
    """
    axes: dict[str, int | None] = {}
    for name, hint in get_type_hints(fields, include_extras=True).items():
        declared = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, RowAxis)]
        if len(declared) != 1:
            raise TypeError(
                f"{fields.__name__}.{name} declares {len(declared)} row axes; expected one, along which processes "
                "divide it: Annotated[Tensor, RowAxis(0)], or RowAxis(None) if it is common to all rows."
            )
        axes[name] = declared[0].index
    return axes


class MeamNoise(NamedTuple):
    """All randomness of one update: standard normal, except times and `accept`, uniform in [0, 1], and `probes`.

    Fields that the settings do not use have no rows. Each field declares which of its axes runs over rows; see
    `row_axes`.

    Attributes:
        next_x_0: Initial noise of the policy's ODE for the TD target [batch, best_of * act].
        next_edit: Noise of the edit policy for the TD target [batch, best_of * act].
        acted_x_0: Initial noise of the policy's ODE at the batch's observations, for the values to penalise
            [batch, best_of * act]; the first samples are those to which bridges lead, or the only ones [batch, act].
        acted_edit: Noise of the edit policy for them [batch, best_of * act].
        flow_x_0: Noise end points of the prior's interpolants [batch, act].
        flow_t: Times of the prior's interpolants [batch, 1].
        sde_x_0: Initial noise of the memoryless SDE [batch, act].
        sde: Noise of its stochastic steps [sde_steps - 1, batch, act].
        sample_x_0: Initial noise of the samples that train a policy without an SDE [candidates, rows, act].
        match_x_0: Noise end points of these samples' interpolants [draws, candidates, rows, act].
        match_t: Times of these interpolants [draws, candidates, rows, 1].
        bridge_x_0: Noise end points of these bridges [points, batch, act].
        bridge_t: Times of the points on them, where they are random [points, batch, 1].
        probes: Orthonormal directions of the divergence [probes, act].
        ascent_x_0: Noise of the starts of the gradient ascent, except the first [ascent_starts - 1, mixed, act].
        bandwidth: Noise added to the Q-maximised actions [mixed, act].
        accept: Uniform numbers that decide which Q-maximised actions are kept [mixed].
        head_x_0: Initial noise of the flow for the edit and one-step policies [batch, act].
        edit: Noise of the edit policy [batch, act].
    """

    next_x_0: Annotated[Tensor, RowAxis(0)]
    next_edit: Annotated[Tensor, RowAxis(0)]
    acted_x_0: Annotated[Tensor, RowAxis(0)]
    acted_edit: Annotated[Tensor, RowAxis(0)]
    flow_x_0: Annotated[Tensor, RowAxis(0)]
    flow_t: Annotated[Tensor, RowAxis(0)]
    sde_x_0: Annotated[Tensor, RowAxis(0)]
    sde: Annotated[Tensor, RowAxis(1)]
    sample_x_0: Annotated[Tensor, RowAxis(1)]
    match_x_0: Annotated[Tensor, RowAxis(2)]
    match_t: Annotated[Tensor, RowAxis(2)]
    bridge_x_0: Annotated[Tensor, RowAxis(1)]
    bridge_t: Annotated[Tensor, RowAxis(1)]
    probes: Annotated[Tensor, RowAxis(None)]
    ascent_x_0: Annotated[Tensor, RowAxis(1)]
    bandwidth: Annotated[Tensor, RowAxis(0)]
    accept: Annotated[Tensor, RowAxis(0)]
    head_x_0: Annotated[Tensor, RowAxis(0)]
    edit: Annotated[Tensor, RowAxis(0)]


ROW_AXES = row_axes(MeamNoise)
"""Row axis of each field of `MeamNoise`."""


def draw_noise(
    batch_size: int, action_dim: int, config: TrainConfig, generator: torch.Generator, device: torch.device
) -> MeamNoise:
    """Draw the randomness of one update."""
    mixed = mixed_rows(batch_size, config)
    along_sde = batch_size if config.objective == "adjoint" else 0
    draws, candidates, rows = _drawn_samples(batch_size, config)
    weighs = config.objective in ("reweighted", "two_scale")
    probes = min(config.divergence_probes, action_dim) if weighs else 0
    points = {"two_scale": 1, "bridge": config.nfe}.get(config.objective, 0)
    bridges = batch_size if points else 0
    heads = batch_size if config.edit_scale or config.distill_coef else 0
    edits = batch_size if config.edit_scale else 0
    penalised = batch_size if config.value_penalty else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    return MeamNoise(
        next_x_0=normal(batch_size, config.best_of * action_dim),
        next_edit=normal(edits, config.best_of * action_dim),
        acted_x_0=normal(max(penalised, bridges), (config.best_of if penalised else 1) * action_dim),
        acted_edit=normal(min(penalised, edits), config.best_of * action_dim),
        flow_x_0=normal(batch_size, action_dim),
        flow_t=uniform(batch_size, 1),
        sde_x_0=normal(along_sde, action_dim),
        sde=normal((config.sde_steps or config.nfe) - 1, along_sde, action_dim),
        sample_x_0=normal(candidates, rows, action_dim),
        match_x_0=normal(draws, candidates, rows, action_dim),
        match_t=uniform(draws, candidates, rows, 1),
        bridge_x_0=normal(points, bridges, action_dim),
        bridge_t=uniform(points, bridges, 1),
        probes=orthonormal(normal(action_dim, probes).T),
        ascent_x_0=normal(config.ascent_starts - 1, mixed, action_dim),
        bandwidth=normal(mixed, action_dim),
        accept=uniform(mixed if config.adaptive_mixture else 0),
        head_x_0=normal(heads, action_dim),
        edit=normal(edits, action_dim),
    )


def _drawn_samples(batch_size: int, config: TrainConfig) -> tuple[int, int, int]:
    """Draws of (x_0, t) per sample, samples per observation, and observations, of the objectives that draw samples.

    A row of the regression is cheap compared with a sample and its density, hence several draws. With two_scale, half
    of the update's rows are left for its late part, which sees every observation.
    """
    candidates = config.candidates
    return {
        "target_score": (4, 1, batch_size),
        "reweighted": (4, candidates, batch_size // candidates),
        "two_scale": (2, candidates, max(1, batch_size // (2 * candidates))),
    }.get(config.objective, (0, 1, 0))


def mixed_rows(batch_size: int, config: TrainConfig) -> int:
    """Number of rows of a batch whose chunk is Q-maximised; a fixed number will do, as the rows are drawn at random."""
    return max(1, round(config.mixture_weight * batch_size)) if config.mixture_weight else 0


def orthonormal(vectors: Float[Tensor, "probes act"]) -> Float[Tensor, "probes act"]:
    """Orthonormalise rows by Gram-Schmidt, which a CUDA graph can capture, unlike a QR decomposition."""
    rows: list[Tensor] = []
    for vector in vectors:
        for row in rows:
            vector = vector - (vector @ row) * row
        rows.append(vector / vector.norm())
    return torch.stack(rows) if rows else vectors

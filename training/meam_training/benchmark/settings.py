"""Sizes of the problems and networks that are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from meam_training.config import Objective, Precision

__all__ = ["PROGRAMS", "SCALES", "SCANNED", "SHAPES", "Program", "Setting", "make_setting"]

SHAPES: Mapping[str, tuple[int, int, int]] = MappingProxyType({"cube": (46, 5, 5), "antmaze": (29, 8, 1)})
"""Observation dimension, action dimension and chunk size, for tasks of OGBench."""

SCALES: Mapping[str, tuple[tuple[int, ...], int]] = MappingProxyType(
    {"paper": ((512, 512, 512, 512), 10), "small": ((256, 256), 2)}
)
"""Widths of the hidden layers of every network, and number of critics."""

SCANNED = 8
"""Updates in one call of the reference's `batch_update`."""


class Program(NamedTuple):
    """A variant of this project's update: a preset, and settings of `TrainConfig`."""

    method: str
    precision: Precision
    compile: bool
    objective: Objective | None = None

    @property
    def update(self) -> dict[str, str]:
        """What determines an update's operations: the preset, and the objective if it is not the preset's."""
        return {"method": self.method} | ({} if self.objective is None else {"objective": self.objective})

    @property
    def label(self) -> str:
        """Name of such an update, whatever its precision."""
        return " ".join(self.update.values())


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "eager": Program("qam", "float32", False),
        "compiled": Program("qam", "float32", True),
        "eager-bf16": Program("qam", "bf16", False),
        "compiled-bf16": Program("qam", "bf16", True),
        "me-am": Program("me-am", "float32", True),
        "me-am-eager": Program("me-am", "float32", False),
        "me-am-bf16": Program("me-am", "bf16", True),
        "me-am-reweighted": Program("me-am", "float32", True, "reweighted"),
        "me-am-bridge": Program("me-am", "float32", True, "bridge"),
        "me-am-adjoint": Program("me-am", "float32", True, "adjoint"),
        "me-am-target-score": Program("me-am", "float32", True, "target_score"),
    }
)
"""Contestants of this project. `qam` is the reference's method; `me-am`, the default, has no counterpart there.

The later ones are `me-am` with another objective than its default, `two_scale`.
"""

_UPDATES = {("cpu", "paper"): 8, ("cpu", "small"): 40, ("cuda", "paper"): 200, ("cuda", "small"): 400}


@dataclass(frozen=True)
class Setting:
    """Sizes of a timed problem and its networks.

    Attributes:
        name: Name in the tables.
        observation_dim: Dimension of an observation.
        action_dim: Dimension of an action.
        chunk_size: Actions in a chunk.
        hidden_dims: Widths of the hidden layers of every network.
        num_critics: Number of critics in the ensemble.
        updates: Updates per turn, a multiple of `SCANNED`.
        batch_size: Chunks in a batch.
        nfe: Number of function evaluations of the velocity from noise to action.
    """

    name: str
    observation_dim: int
    action_dim: int
    chunk_size: int
    hidden_dims: tuple[int, ...]
    num_critics: int
    updates: int
    batch_size: int = 256
    nfe: int = 10

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Setting:
        """Read a setting whose fields were written as JSON."""
        return cls(**{**data, "hidden_dims": tuple(data["hidden_dims"])})

    @property
    def product(self) -> tuple[int, int, int]:
        """Dimensions (rows, width, width) of the product that dominates an update, [rows, width] x [width, width]."""
        return self.batch_size * self.nfe, self.hidden_dims[0], self.hidden_dims[0]


def make_setting(shape: str, scale: str, device: str, updates: int | None = None) -> Setting:
    """Combine a shape and a scale to a setting.

    Args:
        shape: Key of `SHAPES`.
        scale: Key of `SCALES`.
        device: "cpu" or "cuda", which determines the number of updates per turn: about a second's worth.
        updates: Updates per turn; None takes the device's number.
    """
    hidden_dims, num_critics = SCALES[scale]
    turn = _UPDATES[device, scale] if updates is None else updates
    return Setting(f"{shape}, {scale} scale", *SHAPES[shape], hidden_dims, num_critics, turn)

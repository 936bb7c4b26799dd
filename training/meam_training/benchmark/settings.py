"""The sizes of the problems and networks that are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from meam_training.config import Precision

__all__ = ["PROGRAMS", "SCALES", "SCANNED", "SHAPES", "Program", "Setting", "make_setting"]

SHAPES: Mapping[str, tuple[int, int, int]] = MappingProxyType({"cube": (46, 5, 5), "antmaze": (29, 8, 1)})
"""Numbers in an observation and in an action, and actions in a chunk, of OGBench's tasks."""

SCALES: Mapping[str, tuple[tuple[int, ...], int]] = MappingProxyType(
    {"paper": ((512, 512, 512, 512), 10), "small": ((256, 256), 2)}
)
"""Hidden layers of every network, and critics."""

SCANNED = 8
"""Updates in one call of the reference's `batch_update`."""


class Program(NamedTuple):
    """One way in which this project does an update; the fields are those of `TrainConfig`."""

    method: str
    precision: Precision
    compile: bool


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "eager": Program("qam", "float32", False),
        "compiled": Program("qam", "float32", True),
        "eager-bf16": Program("qam", "bf16", False),
        "compiled-bf16": Program("qam", "bf16", True),
        "me-am": Program("me-am", "float32", True),
        "me-am-bf16": Program("me-am", "bf16", True),
    }
)
"""Contestants of this project. `qam` is the scheme of the reference; `me-am`, the default, has no opponent."""

_UPDATES = {("cpu", "paper"): 8, ("cpu", "small"): 40, ("cuda", "paper"): 200, ("cuda", "small"): 400}


@dataclass(frozen=True)
class Setting:
    """What one update works on.

    Attributes:
        name: What the tables call it.
        observation_dim: Numbers in an observation.
        action_dim: Numbers in an action.
        chunk_size: Actions in a chunk.
        hidden_dims: Hidden layers of every network.
        num_critics: Members of the critic ensemble.
        updates: Updates of one turn; a multiple of `SCANNED`.
        batch_size: Chunks in a batch.
        nfe: Evaluations of the velocity from noise to action.
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
        """The setting whose fields were written as JSON."""
        return cls(**{**data, "hidden_dims": tuple(data["hidden_dims"])})

    @property
    def product(self) -> tuple[int, int, int]:
        """The matrix product that dominates an update, [rows, width] times [width, width]: rows, width, width."""
        return self.batch_size * self.nfe, self.hidden_dims[0], self.hidden_dims[0]


def make_setting(shape: str, scale: str, device: str, updates: int | None = None) -> Setting:
    """One of the settings of `SHAPES` and `SCALES`.

    Args:
        shape: Key of `SHAPES`.
        scale: Key of `SCALES`.
        device: "cpu" or "cuda", which decides how many updates a turn has: about a second's worth.
        updates: Another number of them.
    """
    hidden_dims, num_critics = SCALES[scale]
    turn = _UPDATES[device, scale] if updates is None else updates
    return Setting(f"{shape}, {scale} scale", *SHAPES[shape], hidden_dims, num_critics, turn)

"""How a policy's flow is integrated from noise to action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, get_args

from meam_policy.spec.json_reader import JsonReader, require

__all__ = ["EVALUATIONS", "MAX_STEPS", "Integration", "Solver"]

Solver = Literal["euler", "ab2", "midpoint", "heun", "rk4"]
"""Solver of the probability-flow ODE, with fixed steps from t = 0 (noise) to t = 1 (action)."""

EVALUATIONS: Mapping[str, int] = MappingProxyType({"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4})
"""Evaluations of the velocity per solver step."""

MAX_STEPS = 10_000


@dataclass(frozen=True)
class Integration:
    """How a flow is integrated from noise to action, and how many samples are drawn per decision.

    Attributes:
        nfe: Number of function evaluations of the velocity from noise to action; 1 for a one-step policy.
        solver: ODE solver; "euler" and "ab2" evaluate the velocity once per step, "midpoint" and "heun" twice, "rk4"
            four times.
        time_grid: Boundaries of the solver steps, from 0 to 1; None for equal steps.
        best_of: Samples per decision, of which the chunk with the highest value is kept (best-of-N).
    """

    nfe: int
    solver: Solver = "euler"
    time_grid: tuple[float, ...] | None = None
    best_of: int = 1

    @property
    def times(self) -> tuple[float, ...]:
        """Boundaries of the solver steps, from 0 to 1."""
        if self.time_grid is not None:
            return self.time_grid
        steps = self.nfe // EVALUATIONS[self.solver]
        return tuple(k / steps for k in range(steps + 1))

    def check(self, prefix: str = "") -> None:
        """Check that the fields are in range and consistent.

        Args:
            prefix: Put before the fields' names in error messages.

        Raises:
            FormatError: a field is out of range, or contradicts another.
        """
        require(1 <= self.nfe <= MAX_STEPS, f"{prefix}nfe", self.nfe, f"1 to {MAX_STEPS}")
        known = get_args(Solver)
        require(self.solver in known, f"{prefix}solver", repr(self.solver), f"one of {', '.join(known)}")
        per_step = EVALUATIONS[self.solver]
        expected = f"a multiple of {per_step}, the evaluations per step of {self.solver}"
        require(self.nfe % per_step == 0, f"{prefix}nfe", self.nfe, expected)
        require(1 <= self.best_of <= MAX_STEPS, f"{prefix}best_of", self.best_of, f"1 to {MAX_STEPS}")
        grid, steps, name = self.time_grid, self.nfe // per_step, f"{prefix}time_grid"
        if grid is None:
            return
        require(len(grid) == steps + 1, name, f"{len(grid)} times", f"{steps + 1}, the boundaries of {steps} steps")
        ends = grid[0] == 0 and grid[-1] == 1 and all(t < u for t, u in pairwise(grid))
        require(ends, name, list(grid), "increasing times from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, merged into the policy's or variant's own fields."""
        return {"nfe": self.nfe, "solver": self.solver, "time_grid": self.time_grid, "best_of": self.best_of}

    @classmethod
    def read(cls, read: JsonReader) -> Integration:
        """Read the fields that `to_json` wrote.

        Raises:
            FormatError: a field is missing or of the wrong type.
        """
        return cls(
            nfe=read.integer("nfe"),
            solver=read.get("solver", str, "text"),
            time_grid=read.optional_numbers("time_grid"),
            best_of=read.integer("best_of"),
        )

"""How a policy's flow is integrated from noise to action."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

from meam_policy.spec.json_reader import require

__all__ = ["EVALUATIONS", "MAX_STEPS", "Solver", "check_integration"]

Solver = Literal["euler", "ab2", "midpoint", "heun", "rk4"]
"""How the probability-flow ODE is integrated; fixed steps from t = 0 (noise) to t = 1 (action)."""

EVALUATIONS: Mapping[str, int] = MappingProxyType({"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4})
"""Evaluations of the velocity in one step."""

MAX_STEPS = 10_000


def check_integration(prefix: str, nfe: int, solver: str, time_grid: tuple[float, ...] | None) -> None:
    """Check that steps, scheme and grid fit together.

    Args:
        prefix: Of the fields' names in messages.
        nfe: Evaluations of the velocity.
        solver: Integration scheme.
        time_grid: Ends of the steps; None for equal ones.

    Raises:
        FormatError: they do not.
    """
    require(1 <= nfe <= MAX_STEPS, f"{prefix}nfe", nfe, f"1 to {MAX_STEPS}")
    require(solver in get_args(Solver), f"{prefix}solver", repr(solver), f"one of {', '.join(get_args(Solver))}")
    together = EVALUATIONS[solver]
    expected = f"a multiple of {together}, as {solver} takes so many at a time"
    require(nfe % together == 0, f"{prefix}nfe", nfe, expected)
    if time_grid is None:
        return
    steps = nfe // together
    name = f"{prefix}time_grid"
    require(len(time_grid) == steps + 1, name, f"{len(time_grid)} times", f"{steps + 1}, the ends of {steps} steps")
    ends = time_grid[0] == 0 and time_grid[-1] == 1 and all(t < u for t, u in pairwise(time_grid))
    require(ends, name, list(time_grid), "increasing times from 0 to 1")

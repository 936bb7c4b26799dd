"""Fixed-step solvers of the flow's ODE dx/dt = v(x, t), from t = 0 (noise) to t = 1 (action).

The solvers only add, scale and clip their state, which is a tensor in training and a symbol when a graph is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar, runtime_checkable

from meam_policy.spec import Solver

__all__ = ["ONE_STEP_SOLVERS", "PREFIX_SOLVERS", "Vector", "denoised", "solve", "unrolled"]


PREFIX_SOLVERS: tuple[Solver, ...] = ("euler", "ab2", "midpoint")
"""Solvers that never evaluate the velocity at t = 1, so that a `guide` can hold them to a prefix."""

ONE_STEP_SOLVERS: tuple[Solver, ...] = ("euler", "midpoint")
"""Those of them that remember nothing of the step before."""


@runtime_checkable
class Vector(Protocol):
    """State that a solver can integrate."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __rmul__(self, scale: float, /) -> Any: ...
    def __truediv__(self, scale: float, /) -> Any: ...
    @property
    def clamp(self) -> Callable[[float, float], Any]:
        """Clip every component to the given bounds."""
        ...


X = TypeVar("X", bound=Vector)
State = TypeVar("State", bound=tuple[Any, ...])


def denoised(x: X, velocity: X, t: Any, confine: bool) -> X:
    """Expected action E[x_1 | x_t = x] = x + (1 - t) v(x, t) of a flow, clipped to [-1, 1] if `confine` is set."""
    x_1 = x + (1 - t) * velocity
    return x_1.clamp(-1, 1) if confine else x_1


def _one_step(velocity: Callable[[X, Any], X], x: X, t: Any, h: Any, solver: Solver) -> X:
    """Step of one of the `ONE_STEP_SOLVERS` from x at flow time t to t + h."""
    if solver == "euler":
        # x + h v. Divides by 1/h, which in float32 is exactly K on a uniform grid, as the reference does.
        return x + velocity(x, t) / (1 / h)
    return x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)


def unrolled(step: Callable[..., State], state: State, numbers: Sequence[tuple[float, ...]]) -> State:
    """Apply a step once for every row of numbers, each time to the state that the last one left."""
    for row in numbers:
        state = step(*state, *row)
    return state


def solve(
    velocity: Callable[[X, float], X],
    x_0: X,
    times: Sequence[float],
    solver: Solver = "euler",
    confine: bool = False,
    guide: Callable[[X], X] | None = None,
    repeat: Callable[[Callable[..., tuple[X]], tuple[X], Sequence[tuple[float, float]]], tuple[X]] = unrolled,
) -> X:
    """Integrate the flow from noise to action.

    Args:
        velocity: v(x, t).
        x_0: Noise.
        times: Grid of flow times, from 0 to 1; one step between each pair of neighbours.
        solver: "euler"; "ab2", two-step Adams-Bashforth started by an Euler step; "midpoint"; "heun"; "rk4".
        confine: Clip the denoised action at each evaluation, and the result, to the box [-1, 1]. Whatever the network
            outputs, the result lies in the box, and with "euler" and "midpoint" no intermediate component exceeds
            max(|x_0|, 3): with a = h / (2 (1 - t)) <= 1/2, a midpoint step ends at
            (1 - 2a) x + 2 (D' - a D) / (1 - a), where the denoised actions D, D' lie in the box.
        guide: Modifies the denoised action at each evaluation, to steer the flow towards the part of the result that
            is already known ("inpainting" in the literature). Not for solvers that evaluate the velocity at t = 1,
            where nothing is left to denoise.
        repeat: How the steps of the `ONE_STEP_SOLVERS` are repeated: as `unrolled` does, or to the same end.

    References:
        Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, 1993, sections II.1 and III.1, III.5.
    """

    def steered(x: X, t: Any) -> X:
        free = velocity(x, t)
        if not (confine or guide):
            return free
        x_1 = denoised(x, free, t, confine)
        return ((guide(x_1) if guide else x_1) - x) / (1 - t)

    def v(x: X, t: float) -> X:
        # At t = 1 the denoised action is x itself and does not determine the velocity.
        return velocity(x, t) if t >= 1 else steered(x, t)

    if solver in ONE_STEP_SOLVERS:  # they never reach t = 1

        def step(x: X, t: Any, h: Any) -> tuple[X]:
            return (_one_step(steered, x, t, h, solver),)

        (x,) = repeat(step, (x_0,), [(t, u - t) for t, u in pairwise(times)])
        return x.clamp(-1, 1) if confine else x
    x, last = x_0, None
    for t, u in pairwise(times):
        h = u - t
        if solver == "ab2":
            # x + h ((1 + r/2) v - r/2 v'), with v' from the previous step, whose length is h / r
            now = v(x, t)
            r = 0.0 if last is None else h / last[0]
            x = x + h * (now if last is None else (1 + r / 2) * now - (r / 2) * last[1])
            last = h, now
        elif solver == "heun":
            k_1 = v(x, t)
            k_2 = v(x + h * k_1, u)
            x = x + h / 2 * (k_1 + k_2)
        else:
            k_1 = v(x, t)
            k_2 = v(x + h / 2 * k_1, t + h / 2)
            k_3 = v(x + h / 2 * k_2, t + h / 2)
            k_4 = v(x + h * k_3, u)
            x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x.clamp(-1, 1) if confine else x

"""Solver steps of unequal length, chosen so that a few of them come close to the policy as trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from meam_export.graph.parity import Rows, draw_noise, random_observations
from meam_policy.spec import EVALUATIONS, Integration, PolicySpec, Solver
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.policy_module import PolicyModule

__all__ = ["search_integration"]

_SAMPLES = 256
_EVALUATIONS = 60
"""Evaluations of the objective per free step length."""

_MOST_EVALUATIONS = 300
_SLOPES = (0.0, -3.0, 3.0)
"""Slopes of the log step lengths at the starts of the search: equal steps, short last ones, short first ones."""


def search_integration(
    networks: MeamNetworks, policy: PolicySpec, nfe: int, solvers: Sequence[Solver], observations: Rows | None
) -> Integration:
    """Find the solver and time grid whose actions have the smallest mean square difference from the policy as trained.

    The target is the map that the policy's own solver steps make, not the exact ODE: that map is what was trained.

    Args:
        networks: Trained networks.
        policy: The policy itself.
        nfe: Evaluations of the velocity on the new grid.
        solvers: Solvers to try; `nfe` is a multiple of each one's evaluations per step.
        observations: Raw observations [n, obs] from the data or the policy; None takes random ones.

    Returns:
        The solver and its time grid; equal steps if the search finds nothing better.

    References:
        Nelder & Mead, A Simplex Method for Function Minimization, 1965.
    """
    single = replace(policy, integration=replace(policy.integration, best_of=1))
    rows = random_observations(single, _SAMPLES, seed=2) if observations is None else observations[:_SAMPLES]
    inputs = torch.from_numpy(rows), torch.from_numpy(draw_noise(single, len(rows), seed=2))
    scale = torch.tensor(policy.action_scale)
    target = _actions(PolicyModule(networks, single), *inputs)

    def error(logarithms: NDArray[np.float64], solver: Solver) -> float:
        spec = replace(single, integration=Integration(nfe, solver, _grid(logarithms)))
        found = _actions(PolicyModule(networks, spec), *inputs)
        return float(((found - target) / scale).square().mean())

    tried = []
    for solver in solvers:
        steps = nfe // EVALUATIONS[solver]
        # Seen from equal steps alone, a flow that bends only near one end looks straight.
        equal, *others = (slope * np.arange(1, steps) / steps for slope in _SLOPES)
        start = min((equal, *others), key=lambda logarithms, solver=solver: error(logarithms, solver))
        found = _minimum(lambda logarithms, solver=solver: error(logarithms, solver), start)
        tried += [(error(point, solver), -order, solver, _grid(point)) for order, point in enumerate((found, equal))]
    _, _, solver, grid = min(tried, key=lambda row: row[:2])
    return Integration(nfe, solver, grid)


def _minimum(error: Callable[[NDArray[np.float64]], float], start: NDArray[np.float64]) -> NDArray[np.float64]:
    if not start.size:
        return start
    simplex = np.concatenate([start[None], 0.5 * np.eye(start.size)])
    options = {
        "maxfev": min(_EVALUATIONS * start.size, _MOST_EVALUATIONS),
        "xatol": 1e-2,
        "fatol": 1e-9,
        "initial_simplex": simplex,
    }
    return minimize(error, start, method="Nelder-Mead", options=options).x


@torch.no_grad()
def _actions(module: PolicyModule, observations: Tensor, noise: Tensor) -> Tensor:
    return module(observations, noise)


def _grid(logarithms: NDArray[np.float64]) -> tuple[float, ...]:
    """Time grid of steps with these log lengths, relative to the first step's."""
    lengths = np.exp(np.clip(np.concatenate([[0.0], logarithms]), -6, 6))
    ends = [float(round(end, 9)) for end in accumulate(lengths / lengths.sum(), initial=0.0)]
    return (*ends[:-1], 1.0)

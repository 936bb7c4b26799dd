"""Steps of unequal length: never worse than equal ones, and better where the flow bends in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from meam_export.graph.parity import draw_noise
from meam_export.variants.time_grid import _grid, search_integration
from meam_policy import BoxSpec, PolicySpec
from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks, build_networks
from meam_training.networks.policy_module import PolicyModule

CONFIG = TrainConfig.preset("bc", hidden_dims=(16,), solver="euler", confine=False, precondition=False)
ROWS = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)


def make_spec(nfe: int = 20, solver: Solver = "euler") -> PolicySpec:
    return PolicySpec(
        integration=Integration(nfe=nfe, solver=solver),
        observation=(BoxSpec((2,), "float32", (-9.0,) * 2, (9.0,) * 2),),
        action=BoxSpec((1,), "float32", (-2.0,), (2.0,)),
        chunk_size=1,
        execute_steps=1,
        observation_mean=(0.0, 0.0),
        observation_std=(1.0, 1.0),
        action_offset=(0.0,),
        action_scale=(2.0,),
        method="bc",
    )


def random_networks(seed: int = 0) -> MeamNetworks:
    networks = build_networks(make_spec(), CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return networks


def ramp(at_the_end: bool) -> MeamNetworks:
    """v(x, t) = 0.6 max(0, (t - 0.8) / 0.2), or the same in 1 - t: straight but in the last, or first, fifth."""
    networks = build_networks(make_spec(), CONFIG)
    first, last = networks.deployed.layers
    assert isinstance(first, torch.nn.Linear)
    assert isinstance(last, torch.nn.Linear)
    steep, sign = 1000.0, 1 if at_the_end else -1  # a GELU so steep is max(0, .)
    with torch.no_grad():
        for parameter in networks.deployed.parameters():
            parameter.zero_()
        first.weight[0, -1] = sign * steep
        first.bias[0] = -sign * steep * (0.8 if at_the_end else 0.2)
        last.weight[0, 0] = 0.6 / 0.2 / steep
    return networks


def error(
    networks: MeamNetworks, policy: PolicySpec, steps: int, solver: Solver, grid: Sequence[float] | None
) -> float:
    """Mean square difference from the policy, share of the half width, at the inputs of the search."""
    rows, noise = torch.from_numpy(ROWS), torch.from_numpy(draw_noise(policy, len(ROWS), seed=2))
    other = replace(
        policy,
        integration=replace(
            policy.integration, nfe=steps, solver=solver, time_grid=None if grid is None else tuple(grid)
        ),
    )
    with torch.no_grad():
        difference = PolicyModule(networks, other)(rows, noise) - PolicyModule(networks, policy)(rows, noise)
    return float((difference / 2).square().mean())


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.sampled_from([2, 3, 4]))
def test_what_is_found_is_never_worse_than_equal_steps_by_any_solver_tried(seed: int, steps: int) -> None:
    networks, policy = random_networks(seed), make_spec(8, "midpoint")
    tried: list[Solver] = [s for s in ("euler", "ab2", "midpoint", "heun", "rk4") if steps % EVALUATIONS[s] == 0]
    found = search_integration(networks, policy, steps, tried, ROWS)
    solver, grid = found.solver, found.time_grid
    assert grid is not None
    assert solver in tried
    assert len(grid) == steps // EVALUATIONS[solver] + 1
    assert (grid[0], grid[-1]) == (0, 1)
    assert all(t < u for t, u in pairwise(grid))
    equal = min(error(networks, policy, steps, s, None) for s in tried)
    assert error(networks, policy, steps, solver, grid) <= equal * (1 + 1e-5) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("at_the_end", [True, False])
def test_steps_gather_where_the_flow_bends(at_the_end: bool) -> None:
    # By twenty Euler steps the ramp moves x by 0.6 (0.25 + 0.5 + 0.75) / 20 at the end, and by 0.6 / 20 more at the
    # start. Three equal steps see nothing of the one at the end, and the one at the start at its height for a third.
    networks, policy = ramp(at_the_end), make_spec()
    moved = 0.6 * (0.075 if at_the_end else 0.125)
    in_three = 0.0 if at_the_end else 0.2
    noise = draw_noise(policy, len(ROWS), seed=2)
    equal = error(networks, policy, 3, "euler", None)
    assert equal == pytest.approx(_clipped_mean_square(noise, moved, in_three), rel=1e-3)
    found = search_integration(networks, policy, 3, ["euler"], ROWS)
    solver, grid = found.solver, found.time_grid
    assert grid is not None
    assert solver == "euler"
    # With two ends of steps in the ramp's fifth, at the best places, eight times closer.
    assert error(networks, policy, 3, solver, grid) < equal / 8**2
    assert min(grid[1:-1]) > 0.8 if at_the_end else grid[1] < 0.2


def _clipped_mean_square(noise: np.ndarray, one: float, other: float) -> float:
    """Of actions noise + one and noise + other, clipped to [-1, 1]: the flow's own units, so in half widths."""
    return float(np.mean(((noise + one).clip(-1, 1) - (noise + other).clip(-1, 1)) ** 2))


def test_one_step_has_nothing_to_search_for() -> None:
    assert search_integration(random_networks(), make_spec(), 1, ["euler"], ROWS) == Integration(1, "euler", (0.0, 1.0))
    assert search_integration(random_networks(), make_spec(), 4, ["rk4"], ROWS) == Integration(4, "rk4", (0.0, 1.0))


def test_steps_stay_equal_where_the_flow_is_straight() -> None:
    networks = build_networks(make_spec(), CONFIG)
    with torch.no_grad():
        for parameter in networks.deployed.parameters():
            parameter.zero_()
    assert search_integration(networks, make_spec(), 4, ["euler"], ROWS).time_grid == (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS, None])
def test_the_search_is_deterministic(rows: np.ndarray | None) -> None:
    first, second = (search_integration(random_networks(), make_spec(), 3, ["euler", "ab2"], rows) for _ in range(2))
    assert first == second


def test_of_a_policy_that_chooses_the_flow_itself_is_approached() -> None:
    config = TrainConfig.preset("me-am", hidden_dims=(16,), critic_hidden_dims=(8,), num_critics=2)
    policy = make_spec(4, "midpoint")
    networks = build_networks(replace(policy, method="me-am"), config)
    single, several = (
        search_integration(
            networks,
            replace(policy, integration=replace(policy.integration, best_of=n), method="me-am"),
            2,
            ["euler"],
            ROWS,
        )
        for n in (1, 4)
    )
    assert single == several


@given(arrays(np.float64, st.integers(0, 998), elements=st.floats(-1e3, 1e3)))
def test_however_far_the_search_goes_times_increase_from_0_to_1(logarithms: np.ndarray) -> None:
    grid = _grid(logarithms)
    assert len(grid) == len(logarithms) + 2
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert all(t < u for t, u in pairwise(grid))
    replace(make_spec(len(grid) - 1), integration=replace(make_spec(len(grid) - 1).integration, time_grid=grid))

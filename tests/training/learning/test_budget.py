"""Training within a KL budget: when the temperature moves, where it ends, and that no scale of the values matters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meam_policy.errors import DivergedError
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import ChunkSource, make_chunk_source
from meam_training.learning.learner import Learner
from meam_training.networks import trust_region
from meam_training.networks.trust_region import TRUST_REGION_METRICS
from meam_training.trainer import make_spec

CPU = torch.device("cpu")
SPREAD = 0.3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "two scale": {},
    "reweighted": {"objective": "reweighted"},
    "bridge": {"objective": "bridge"},
    "scalar bridge": {"objective": "bridge", "bridge_adjoint": "scalar"},
    "target score": {"objective": "target_score"},
    "ancestral": {"objective": "adjoint"},
    "reference": {"objective": "adjoint", "sde": "reference"},
}


@pytest.fixture(scope="module")
def bandit() -> OfflineDataset:
    """One state, one action, N(0, 0.3²)."""
    actions = (SPREAD * np.random.default_rng(0).normal(size=(2000, 1))).clip(-1, 1)
    nothing, ends = np.zeros((2000, 1)), np.ones(2000, bool)
    return OfflineDataset.from_arrays(nothing, actions, np.zeros(2000), nothing, ends, ~ends)


def learner_of(bandit: OfflineDataset, slope: float, **changes: Any) -> tuple[Learner, ChunkSource]:
    """A learner whose known value is slope · a."""
    small: dict[str, Any] = {
        "hidden_dims": (16, 16),
        "critic_hidden_dims": (4,),
        "num_critics": 1,
        "batch_size": 64,
        "learning_rate": 5e-3,
        "polyak": 0.05,
        "entropy_coef": 0.0,
        "mixture_weight": 0.0,
        "pretrain_steps": 0,
        "device": "cpu",
    }
    config = TrainConfig.preset("me-am", small, **changes)
    spec = make_spec(config, bandit)
    learner = Learner(spec, config, CPU, lambda observations, actions: slope * actions[:, 0])
    return learner, make_chunk_source(config, bandit, spec, CPU)


def dual_state(learner: Learner) -> dict[str, Tensor]:
    region = learner.networks.trust_region
    assert region is not None
    return {name: value.clone() for name, value in region.state_dict().items()}


def test_the_temperature_moves_after_pretraining_and_each_update_takes_the_one_before(bandit):
    learner, chunks = learner_of(bandit, 2.0, steps=6, pretrain_steps=2, kl_budget=0.5)
    start = dual_state(learner)
    for step in (1, 2):
        assert not set(TRUST_REGION_METRICS) & set(learner.update(chunks, step))
    assert dual_state(learner) == start
    region = learner.networks.trust_region
    assert region is not None
    for step in (3, 4, 5, 6):
        used = region.tilt().inverse_temperature
        metrics = learner.update(chunks, step)
        assert metrics["inverse_temperature"] == used
        assert (step == 3) == (used == 0)
        assert region.tilt().inverse_temperature != used


def test_a_bc_run_and_one_without_a_budget_hold_no_dual_variables(make_config, dataset):
    for method in ("bc", "me-am", "qam"):
        config = make_config(method, {"kl_budget": None})
        learner = Learner(make_spec(config, dataset), config, CPU)
        assert not any("trust_region" in name for name in learner.networks.state_dict())


def test_an_update_that_diverges_leaves_the_dual_variables_as_they_were(bandit):
    learner, chunks = learner_of(bandit, 2.0, steps=6, kl_budget=0.5)
    learner.update(chunks, 1)
    with torch.no_grad():
        next(learner.networks.policy.parameters()).fill_(math.inf)  # pyright: ignore[reportOptionalMemberAccess]
    before = dual_state(learner)
    with pytest.raises(DivergedError, match="update 2 "):
        learner.update(chunks, 2)
    assert dual_state(learner) == before


def test_a_mirror_stage_begins_with_a_budget_unspent(bandit):
    learner, chunks = learner_of(bandit, 2.0, steps=4, mirror_stages=2, kl_budget=0.5)
    for step in (1, 2):
        learner.update(chunks, step)
    assert dual_state(learner)["kl_average"] != 0.5
    used = dual_state(learner)
    learner.networks.start_mirror_stage()
    assert dual_state(learner) == {**used, "kl_average": torch.tensor(0.5)}


@pytest.mark.parametrize("dual", ["log", "reference"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_with_the_log_step_the_scale_of_the_values_changes_nothing(bandit, kind, dual):
    """Weights after the same updates, with values × 0.01, × 1 and × 100; with the reference's step they differ."""
    weights = []
    for scale in (0.01, 1.0, 100.0):
        learner, chunks = learner_of(bandit, scale, steps=12, kl_budget=0.5, kl_dual=dual, **OBJECTIVES[kind])
        for step in range(1, 13):
            learner.update(chunks, step)
        weights.append(torch.cat([p.detach().flatten() for p in learner.networks.deployed.parameters()]))
    small, plain, large = weights
    # Seen with seeds 0 to 2: 4e-8 at most of rounding, and at least 1e-3 by another step.
    tolerance = 1e-5 * plain.norm()
    if dual == "log":
        assert (small - plain).norm() < tolerance
        assert (large - plain).norm() < tolerance
    else:
        assert (small - plain).norm() > tolerance
        assert (large - plain).norm() > tolerance


@pytest.mark.slow
def test_the_temperature_of_a_linear_value_is_the_closed_form(bandit, monkeypatch):
    """The tilt of N(0, s²) by exp(tau q a) is a shift by tau q s², and costs (tau q s)² / 2.

    While the policy learns, its divergence is not yet that of its target, and the temperature is off by up to 40 %.
    Where it ends depends on no rate: so it is made to end there soon, by quick dual steps and little learning noise.
    """
    budget, slope, learned, steps = 0.3, 100.0, 300, 450
    changes = {"batch_size": 256, "candidates": 32, "nfe": 6, "likelihood_steps": 3, "pretrain_steps": 150}
    learner, chunks = learner_of(bandit, slope, steps=steps, kl_budget=budget, **changes)
    taus = []
    for step in range(1, steps + 1):
        if step == learned + 1:
            monkeypatch.setattr(trust_region, "LOG_RATE", 10 * trust_region.LOG_RATE)
            learner.optimizer.param_groups[0]["lr"] /= 5
        metrics = learner.update(chunks, step)
        if step > steps - 100:
            taus.append(metrics["inverse_temperature"].item())
    networks, noise = learner.networks, torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spread = networks.flow(networks.target_prior, networks.encoder(torch.zeros(20_000, 1)), noise).std().item()
    assert spread == pytest.approx(SPREAD, rel=0.1)
    # 0.98 to 1.05 of it with seeds 0 to 5.
    assert np.mean(taus) == pytest.approx(math.sqrt(2 * budget) / (slope * spread), rel=0.1)

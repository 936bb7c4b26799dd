"""What every objective does and measures with a KL budget."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from meam_policy.spec import BoxSpec, PolicySpec
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.update import BUDGET_METRICS, compute_losses
from meam_training.config import TrainConfig
from meam_training.networks.meam_networks import MeamNetworks

OBJECTIVES: dict[str, dict[str, Any]] = {
    "two scale": {},
    "reweighted": {"objective": "reweighted"},
    "bridge": {"objective": "bridge"},
    "scalar bridge": {"objective": "bridge", "bridge_adjoint": "scalar"},
    "target score": {"objective": "target_score"},
    "ancestral": {"objective": "adjoint"},
    "reference": {"objective": "adjoint", "sde": "reference", "confine": False},
}
OBS, ACT = 3, 2


def make_config(kind: str, **changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "batch_size": 16,
        "hidden_dims": (6, 6),
        "critic_hidden_dims": (6,),
        "num_critics": 2,
        "nfe": 4,
        "mixture_weight": 0.0,
        "chunk_size": 2,
        "layer_norm": True,
    }
    return TrainConfig.preset("me-am", {**small, **OBJECTIVES[kind]}, **changes)


def make_networks(config: TrainConfig) -> MeamNetworks:
    spec = PolicySpec(
        integration=config.integration,
        observation=(BoxSpec((OBS,), "float32", (-math.inf,) * OBS, (math.inf,) * OBS),),
        action=BoxSpec((ACT // 2 or 1,), "float32", (-1.0,), (1.0,)),
        chunk_size=2,
        execute_steps=2,
        observation_mean=(0.0,) * OBS,
        observation_std=(1.0,) * OBS,
        action_offset=(0.0,),
        action_scale=(1.0,),
        method=config.method,
    )
    generator = torch.Generator().manual_seed(0)
    networks = MeamNetworks(spec, config).double()
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return networks


def metrics_of(networks: MeamNetworks, config: TrainConfig, rows: int = 16, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ones = torch.ones(rows, dtype=torch.float64)
    inputs = (normal(rows, OBS), normal(rows, ACT).clamp(-1, 1), normal(rows), normal(rows, OBS))
    batch = ChunkBatch(*inputs, ones, ones, torch.ones_like(inputs[1]), ones, ones)
    drawn = draw_noise(rows, ACT, config, generator, torch.device("cpu"))
    noise = MeamNoise(*(values.double() for values in drawn))
    return compute_losses(networks, batch, noise, config).metrics


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("dual", ["log", "reference"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_loss_is_that_of_the_temperature_that_the_budget_gives(kind: str, dual: str, entropy_coef: float) -> None:
    held = make_config(kind, kl_budget=0.7, kl_dual=dual, entropy_coef=entropy_coef)
    with_budget = make_networks(held)
    region = with_budget.trust_region
    assert region is not None
    region.nu.fill_(1.2)
    region.unit_cost.fill_(2.5)
    tau, coef = (float(value) for value in region.tilt())
    assert tau > 0.1
    assert (coef < entropy_coef) == (entropy_coef > 0)
    fixed = make_config(kind, inverse_temperature=tau, entropy_coef=coef)
    plain = make_networks(fixed)
    found, expected = metrics_of(with_budget, held), metrics_of(plain, fixed)
    factor = float(region.mu) if dual == "reference" and fixed.objective == "adjoint" else 1.0
    assert found["policy_loss"].item() == pytest.approx(factor * expected["policy_loss"].item(), rel=1e-9)
    for name in ("critic_loss", "adjoint_max", "effective_samples", "outside_box"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name])
    drift = {"last_step_drift"} if fixed.objective == "adjoint" else set()
    assert found.keys() - expected.keys() == {"path_kl", "unit_cost"} | drift <= set(BUDGET_METRICS)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_policy_that_is_the_prior_spends_nothing(kind: str) -> None:
    config = make_config(kind, kl_budget=1.0)
    networks = make_networks(config)
    assert abs(metrics_of(networks, config)["path_kl"]) > 0.01
    for field in (networks.policy, networks.target_policy):
        if field is not None:
            field.load_state_dict(networks.target_prior.state_dict())
    assert metrics_of(networks, config)["path_kl"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_chunks_length_only_divides(kind: str) -> None:
    config = make_config(kind, kl_budget=1.0)
    networks = make_networks(config)
    found = metrics_of(networks, config)
    longer = metrics_of(networks, dataclasses.replace(config, chunk_size=6))
    for name in BUDGET_METRICS:
        if name in found:
            assert found[name].item() == pytest.approx(3 * longer[name].item())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_unit_cost_knows_no_temperature_and_grows_with_the_square_of_the_values(kind: str) -> None:
    config = make_config(kind, kl_budget=1.0, entropy_coef=0.2)
    networks = make_networks(config)
    cost = metrics_of(networks, config)["unit_cost"]
    assert cost > 0
    assert networks.trust_region is not None
    networks.trust_region.unit_cost.fill_(9.0)
    torch.testing.assert_close(metrics_of(networks, config)["unit_cost"], cost)
    with torch.no_grad():
        networks.target_critic.weights[-1].mul_(5)
        networks.target_critic.biases[-1].mul_(5)
    torch.testing.assert_close(metrics_of(networks, config)["unit_cost"], 25 * cost)


@pytest.mark.parametrize("candidates", [4, 8, 16])
@pytest.mark.parametrize("kind", ["two scale", "reweighted"])
def test_the_unit_cost_of_weights_is_half_the_values_variance_under_the_prior(kind: str, candidates: int) -> None:
    """Where one candidate comes from the prior, another is drawn for the variance."""
    config = make_config(kind, kl_budget=1.0, candidates=candidates, batch_size=8000)
    networks = make_networks(config)
    networks.known_value = lambda observations, actions: 3 * actions[:, 0]
    with torch.no_grad():
        features = networks.encoder(torch.zeros(8000, OBS, dtype=torch.float64))
        x_0 = torch.randn(8000, ACT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        for layer in networks.target_prior.layers:  # the same prior at every observation
            layer.weight[:, :OBS].mul_(0.0 if layer is networks.target_prior.layers[0] else 1.0)  # pyright: ignore[reportIndexIssue]
        x_1 = networks.flow(networks.target_prior, features, x_0).clamp(-1, 1)
    expected = 9 * x_1[:, 0].var().item() / 2 / 2
    assert metrics_of(networks, config, 8000)["unit_cost"].item() == pytest.approx(expected, rel=0.1)

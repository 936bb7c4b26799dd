"""A whole training against a closed form: one state, two modes, a known value."""

import numpy as np
import pytest
import torch

from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.trainer import train

MODES, SHARES, SPREAD, GOAL = np.array([-0.5, 0.5]), np.array([0.9, 0.1]), 0.15, 0.5


def value(observations, actions):
    return -2 * (actions[:, 0] - GOAL).square()


def target_mass(entropy_coef):
    """Mass above zero of p^(1 - lambda) exp(Q) on the box."""
    x = np.linspace(-1, 1, 20_001)
    prior = (SHARES * np.exp(-0.5 * ((x[:, None] - MODES) / SPREAD) ** 2)).sum(axis=1)
    density = prior ** (1 - entropy_coef) * np.exp(-2 * (x - GOAL) ** 2)
    return density[x > 0].sum() / density.sum()


@pytest.mark.slow
def test_the_rare_mode_gets_its_mass(tmp_path):
    generator = np.random.default_rng(0)
    modes = MODES[(np.arange(4000) % 10 == 0).astype(int)]
    actions = (modes + SPREAD * generator.normal(size=4000)).clip(-1, 1)[:, None]
    nothing, ends = np.zeros((4000, 1)), np.ones(4000, bool)
    dataset = OfflineDataset.from_arrays(nothing, actions, np.zeros(4000), nothing, ends, ~ends)
    config = TrainConfig.preset(
        "me-am",
        inverse_temperature=1.0,
        steps=450,
        pretrain_steps=150,
        batch_size=128,
        nfe=6,
        likelihood_steps=4,
        device="cpu",
        hidden_dims=(32, 32),
        critic_hidden_dims=(4,),
        num_critics=1,
        entropy_coef=0.5,
        mixture_weight=0.0,
        learning_rate=5e-3,
        polyak=0.05,
    )
    networks = train(config, dataset, tmp_path, value=value).load_networks()
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = networks.encoder(torch.zeros(20_000, 1))
        acted = networks.act(features, noise)[:, 0].numpy()
        behaviour = networks.flow(networks.prior, features, noise)[:, 0].numpy()
    assert (behaviour > 0).mean() == pytest.approx(0.1, abs=0.04)
    # The closed form is 0.65 with entropy, and 0.41 without.
    assert target_mass(0.5) == pytest.approx(0.653, abs=1e-3)
    assert target_mass(0.0) == pytest.approx(0.411, abs=1e-3)
    assert (acted > 0).mean() == pytest.approx(target_mass(0.5), abs=0.08)  # 0.60 to 0.61 with seeds 0 to 2
    assert np.abs(acted).max() <= 1

"""Location and scale of the data's actions and returns, and what is learned from rewards in other units."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from meam_training.trainer import data_statistics, make_spec, train


def statistics_of(config, dataset):
    return data_statistics(config, dataset, make_spec(config, dataset))


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_the_statistics_are_those_of_a_loop_over_the_data(dataset, make_config, discount):
    config = make_config(discount=discount)
    found = statistics_of(config, dataset)
    rewards, returns = dataset.rewards.astype(np.float64), np.zeros(len(dataset))
    # Where a recording was cut off, the return goes on at the mean reward; a termination ends it.
    steady = rewards.mean() / (1 - discount) if discount < 1 else 0.0
    following = 0.0
    for i in reversed(range(len(dataset))):
        if dataset.episode_ends[i]:
            following = 0.0 if dataset.terminations[i] else steady
        following = returns[i] = rewards[i] + discount * following
    assert found.value_offset == pytest.approx(returns.mean(), rel=1e-6)
    assert found.value_scale == pytest.approx(returns.std(), rel=1e-6)
    spec = make_spec(config, dataset)
    actions = (dataset.actions - np.array(spec.action_offset)) / np.array(spec.action_scale)
    np.testing.assert_allclose(found.action_mean, np.tile(actions.mean(axis=0), config.chunk_size), rtol=1e-5)
    assert found.action_std == pytest.approx(np.sqrt(actions.var(axis=0).mean()), rel=1e-5)


def test_returns_that_are_all_equal_are_measured_by_the_rewards(dataset, make_config):
    one = replace(dataset, rewards=np.full(len(dataset), -2.0, np.float32), terminations=0 * dataset.terminations)
    found = statistics_of(make_config(discount=0.5), one)
    assert (found.value_offset, found.value_scale) == (pytest.approx(-4, rel=1e-6), 2)
    nothing = replace(dataset, rewards=np.zeros(len(dataset), np.float32))
    found = statistics_of(make_config(), nothing)
    assert (found.value_offset, found.value_scale) == (0, 1)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_rewards_in_other_units_give_the_same_policy_and_values_in_those_units(dataset, make_config, tmp_path, factor):
    config, found = make_config(steps=12), []
    for scale in (1.0, factor):
        data = replace(dataset, rewards=np.float32(scale) * dataset.rewards)
        networks = train(config, data, tmp_path / str(scale)).load_networks()
        with torch.no_grad():
            features = networks.encoder(torch.from_numpy(np.array(dataset.observations[:50], np.float32)))
            noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
            actions = networks.act(features, noise)
            found.append((actions, networks.values(features, actions) / scale))
    # Adam turns rounding errors of small gradients into steps; twelve of 3e-4 each bound what they can do.
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

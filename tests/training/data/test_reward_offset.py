"""The constant in the rewards that is taken off, against sums over the time that is left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_training.data.dataset import OfflineDataset
from meam_training.data.reward_offset import RewardOffset, constant_returns, explaining_constant, fixed_horizon

GAMMA = 0.9


def episodes(lengths, rewards=None, cut=()):
    """Episodes that terminate, but for those that are cut off."""
    rows, generator = sum(lengths), np.random.default_rng(0)
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    cut_off = ends & np.isin(np.repeat(np.arange(len(lengths)), lengths), cut)
    observations, next_observations = generator.normal(size=(2, rows, 2))
    rewards = generator.normal(size=rows) if rewards is None else rewards
    actions = generator.uniform(-1, 1, (rows, 1))
    return OfflineDataset.from_arrays(observations, actions, rewards, next_observations, ends & ~cut_off, cut_off)


def test_the_horizon_is_fixed_where_all_episodes_that_terminate_do_so_after_as_many_steps():
    ten = [5] * 10
    assert fixed_horizon(episodes(ten)) == 5
    assert fixed_horizon(episodes([*ten, 3, 5], cut=[10, 11])) == 5  # a recording that was stopped
    others = [[*ten, 6], [1] * 10, [5] * 9]
    for other in (*map(episodes, others), episodes([*ten, 7], cut=[10]), episodes(ten, cut=range(10))):
        assert fixed_horizon(other) is None
        assert explaining_constant(other, GAMMA) == 0
    midway = episodes(ten)
    midway.terminations[2] = True
    assert fixed_horizon(midway) is None


def test_episodes_that_were_cut_off_do_not_change_the_constant():
    rewards = np.random.default_rng(3).normal(size=64) + 5
    whole = episodes([6] * 10, rewards[:60])
    with_a_cut_one = episodes([6] * 10 + [4], np.concatenate([rewards[:60], np.full(4, 99.0)]), cut=[10])
    assert explaining_constant(with_a_cut_one, GAMMA) == pytest.approx(explaining_constant(whole, GAMMA), rel=1e-5)


@given(st.floats(-1e3, 1e3), st.integers(2, 9), st.integers(10, 30), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_constant_added_to_all_rewards_is_found_and_taken_off(constant, length, count, discount):
    plain = episodes([length] * count)
    raised = episodes([length] * count, plain.rewards.astype(np.float64) + constant)
    found = explaining_constant(raised, discount)
    scale = 1e-5 * (1 + abs(constant))
    assert found - explaining_constant(plain, discount) == pytest.approx(constant, abs=scale)
    offsets = [RewardOffset.of(each, explaining_constant(each, discount), discount) for each in (plain, raised)]
    rewards = [offset.off(each).rewards for offset, each in zip(offsets, (plain, raised), strict=True)]
    np.testing.assert_allclose(rewards[0], rewards[1], atol=scale)


@pytest.mark.parametrize("discount", [1.0, 0.99, 0.9])
def test_rewards_that_count_at_the_end_alone_have_hardly_a_constant(discount):
    rewards = np.where(np.arange(60) % 6 == 5, 7.0, 0.0)
    found = explaining_constant(episodes([6] * 10, rewards), discount)
    assert found == pytest.approx(-7 * (1 - discount) / discount, rel=1e-5, abs=1e-9)


def test_where_all_rewards_are_the_same_the_length_of_an_episode_is_what_matters():
    assert explaining_constant(episodes([6] * 10, np.full(60, -1.0)), GAMMA) == 0


def test_a_reward_of_one_returns_the_discounted_steps_that_are_left():
    left = np.array([3, 2, 1])
    np.testing.assert_allclose(constant_returns(episodes([3]), GAMMA), (1 - GAMMA**left) / (1 - GAMMA))
    np.testing.assert_allclose(constant_returns(episodes([3], cut=[0]), GAMMA), 1 / (1 - GAMMA))


def test_values_raised_by_the_level_solve_the_bellman_equation_of_the_raised_rewards():
    """Of a chain of chunks: values without the constant, plus its mean return."""
    data = episodes([6] * 4)
    offset = RewardOffset.of(data, 5.0, GAMMA)
    ones = constant_returns(data, GAMMA)
    assert offset.level == pytest.approx(5 * ones.mean())
    plain = offset.off(data)
    values = plain.discounted_returns(GAMMA).returns + offset.level
    np.testing.assert_allclose(values.mean(), data.discounted_returns(GAMMA).returns.mean(), rtol=1e-6)
    sampler = plain.chunk_sampler(2, GAMMA, False)
    starts = np.array([0, 2, 4, 6, 10])
    batch = sampler.batch(starts)
    rewards = offset.raised(batch.rewards, batch.masks, GAMMA**2)
    after = values[(starts + 2) % 24]
    np.testing.assert_allclose(rewards + GAMMA**2 * batch.masks * after, values[starts], rtol=1e-6)


def test_without_a_constant_nothing_is_changed():
    data = episodes([5, 6])
    for offset in (RewardOffset.of(data, None, GAMMA), RewardOffset.of(data, 0.0, GAMMA)):
        assert offset.off(data) is data
        assert offset.raised(data.rewards, data.rewards, GAMMA) is data.rewards

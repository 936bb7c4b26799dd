import numpy as np
import pytest

from meam_training.data.discounted_returns import discounted_returns


def one_by_one(rewards, terminations, ends, discount):
    """The recursion from the back, row by row."""
    returns, tails, last = np.zeros(len(rewards)), np.zeros(len(rewards)), np.zeros(len(rewards), int)
    for row in reversed(range(len(rewards))):
        if terminations[row] or ends[row] or row == len(rewards) - 1:
            returns[row], tails[row], last[row] = rewards[row], 0.0 if terminations[row] else discount, row
        else:
            returns[row] = rewards[row] + discount * returns[row + 1]
            tails[row], last[row] = discount * tails[row + 1], last[row + 1]
    return returns, tails, last


@pytest.mark.parametrize("discount", [0.9, 0.999, 1.0])
def test_returns_of_segments_of_any_length_are_those_of_the_recursion(discount):
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=500).astype(np.float32)
    terminations, ends = generator.random((2, 500)) < [[0.01], [0.02]]
    found = discounted_returns(rewards, terminations, ends, discount)
    for ours, expected in zip(found, one_by_one(rewards, terminations, ends, discount), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_reward_at_the_end_is_discounted_by_the_steps_before_it():
    rewards = np.array([0, 0, 1, 0, 0], np.float32)
    terminations = np.array([False, False, True, False, False])
    found = discounted_returns(rewards, terminations, np.zeros(5, bool), 0.5)
    assert found.returns.tolist() == [0.25, 0.5, 1, 0, 0]
    assert found.tails.tolist() == [0, 0, 0, 0.25, 0.5]  # the last two rows are cut off by the end of the data
    assert found.last_rows.tolist() == [2, 2, 2, 4, 4]


def test_sums_of_large_and_small_rewards_lose_nothing_of_the_small_ones():
    """A cumulative sum over all rows, divided by powers of the discount, would."""
    rewards = np.array([1e8, *[1e-3] * 1000], np.float32)
    ends = np.zeros(1001, bool)
    ends[0] = True
    found = discounted_returns(rewards, np.zeros(1001, bool), ends, 0.99)
    assert found.returns[1] == pytest.approx(float(np.float32(1e-3)) * (1 - 0.99**1000) / 0.01, rel=1e-12)


def test_a_data_set_has_returns(dataset):
    found = dataset.discounted_returns(1.0)
    starts = np.flatnonzero(np.roll(dataset.episode_ends, 1))
    np.testing.assert_allclose(found.returns[starts], dataset.episode_returns, rtol=1e-12)


def test_a_return_goes_on_at_the_mean_reward_where_the_recording_was_cut_off():
    rewards = np.array([1, 2, 3, 4, 5], np.float32)
    terminations = np.array([0, 1, 0, 0, 0], bool)
    found = discounted_returns(rewards, terminations, np.array([0, 0, 0, 1, 1], bool), 0.5)
    # The mean reward 3 for ever is worth 6.
    expected = [1 + 0.5 * 2, 2, 3 + 0.5 * 4 + 0.25 * 6, 4 + 0.5 * 6, 5 + 0.5 * 6]
    np.testing.assert_allclose(found.continued(rewards, 0.5), expected, rtol=1e-12)
    undiscounted = discounted_returns(rewards, terminations, np.array([0, 0, 0, 1, 1], bool), 1.0)
    np.testing.assert_array_equal(undiscounted.continued(rewards, 1.0), undiscounted.returns)

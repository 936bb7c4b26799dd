import math

import numpy as np
import pytest
import torch

from meam_training.data.dataset import OfflineDataset
from meam_training.learning import calibration
from meam_training.learning.calibration import CALIBRATION_METRICS, Calibration, value_limits
from meam_training.networks.meam_networks import build_networks
from meam_training.trainer import make_spec

CPU = torch.device("cpu")
ROWS, LENGTH = 400, 20


@pytest.fixture(scope="module")
def make_data():
    """Episodes of twenty steps, the observation of a row telling its discounted return."""

    def make(rewards, terminates, discount=0.9):
        ends = np.arange(ROWS) % LENGTH == LENGTH - 1
        generator = np.random.default_rng(0)
        rewards = np.broadcast_to(rewards, ROWS)
        columns = {"actions": generator.uniform(-1, 1, (ROWS, 2)), "rewards": rewards}
        ended, cut = (ends, ends & False) if terminates else (ends & False, ends)

        def dataset(returns):
            return OfflineDataset.from_arrays(
                observations=returns[:, None],
                next_observations=returns[:, None],
                terminations=ended,
                truncations=cut,
                **columns,
            )

        return dataset(dataset(np.zeros(ROWS)).discounted_returns(discount).returns)

    return make


@pytest.fixture
def calibrate(make_config):
    """Compares values of given observations and chunks, in place of the critics', with the returns of the data."""

    def calibrated(dataset, value, **settings):
        config = make_config(discount=0.9, chunk_size=1, **settings)
        spec = make_spec(config, dataset)
        networks = build_networks(spec, config)
        networks.known_value = value
        found = Calibration(dataset, config, spec, CPU)(networks)
        assert found.keys() <= set(CALIBRATION_METRICS)
        return {name: float(number) for name, number in found.items()}

    return calibrated


def test_values_that_are_the_returns_are_calibrated(make_data, calibrate):
    dataset = make_data(np.random.default_rng(1).normal(size=ROWS), terminates=True)
    found = calibrate(dataset, lambda observations, chunks: observations[:, 0])
    assert found["calibration_correlation"] == pytest.approx(1, abs=1e-5)
    assert found["calibration_slope"] == pytest.approx(1, abs=1e-5)
    assert found["calibration_bias"] == pytest.approx(0, abs=1e-5)
    assert found["calibration_tail"] == 0
    assert found["value_gain"] == found["value_spread"] == pytest.approx(0, abs=1e-6)


def test_values_a_quarter_as_steep_and_three_too_high_have_slope_four_and_bias_three(make_data, calibrate):
    rewards = np.random.default_rng(1).normal(size=ROWS)
    dataset = make_data(rewards, terminates=True)
    mean = dataset.discounted_returns(0.9).returns.mean()
    found = calibrate(dataset, lambda observations, chunks: (observations[:, 0] - mean) / 4 + mean + 3)
    assert found["calibration_slope"] == pytest.approx(4, rel=1e-4)
    assert found["calibration_bias"] == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("error", [-5.0, 0.0, 5.0])
def test_a_constant_error_is_found_although_the_tails_of_returns_are_the_values_own(make_data, calibrate, error):
    found = calibrate(make_data(1.0, terminates=False), lambda observations, chunks: 0 * chunks[:, 0] + 10 + error)
    assert found["calibration_bias"] == pytest.approx(error, abs=1e-5)
    assert 0.1 < found["calibration_tail"] < 1


def test_the_gain_is_that_of_the_policys_chunks(make_data, calibrate):
    dataset = make_data(1.0, terminates=True)
    found = calibrate(dataset, lambda observations, chunks: chunks[:, 0])
    assert found["policy_value"] - found["value_gain"] == pytest.approx(dataset.actions[:, 0].mean(), abs=1e-5)
    assert found["policy_value"] == pytest.approx(0, abs=0.2)  # of an untrained flow
    assert found["value_spread"] > 0.2


def test_known_returns_are_those_near_enough_to_nothing(make_data, calibrate):
    """Twenty steps at 0.9 leave 0.12 of a return unknown; a termination leaves nothing."""
    assert "return_largest" not in calibrate(make_data(1.0, False), lambda observations, chunks: chunks[:, 0])
    found = calibrate(make_data(1.0, True), lambda observations, chunks: chunks[:, 0])
    assert found["return_largest"] == pytest.approx((1 - 0.9**20) / 0.1)
    assert found["return_smallest"] == pytest.approx(1)


def test_rewards_bound_the_returns_whose_tail_is_unknown(make_data, calibrate):
    found = calibrate(make_data(np.tile([0.0, 1.0], ROWS // 2), False), lambda observations, chunks: chunks[:, 0])
    assert found["return_ceiling"] - found["return_floor"] == pytest.approx(10 * found["calibration_tail"], rel=1e-5)


@pytest.mark.parametrize(
    ("goes_on", "ends", "discount", "expected"),
    [
        ([0, 1], [], 0.9, (0, 10)),
        ([-1, -0.5], [], 0.9, (-10, -5)),  # it never ends, as far as the data knows
        ([-1], [0], 0.9, (-10, 0)),
        ([0], [1], 0.99, (0, 1)),  # a goal, reached once
        ([0.5], [2], 0.9, (2, 5)),
        ([0.5], [20], 0.9, (5, 20)),
        ([-1], [0], 1.0, (-math.inf, 0)),
        ([0], [1], 1.0, (0, 1)),
        ([1], [], 1.0, (math.inf, math.inf)),
    ],
)
def test_values_are_bounded_by_what_rewards_allow(goes_on, ends, discount, expected):
    rewards, count = np.array([*goes_on, *ends], float), len(goes_on) + len(ends)
    dataset = OfflineDataset.from_arrays(
        observations=np.zeros((count, 1)),
        actions=np.zeros((count, 1)),
        rewards=rewards,
        next_observations=np.zeros((count, 1)),
        terminations=np.arange(count) >= len(goes_on),
        truncations=np.zeros(count, bool),
    )
    assert value_limits(dataset, discount) == pytest.approx(expected)


def test_no_policy_of_a_chain_of_choices_passes_the_limits():
    """The limits against every policy of up to six steps that takes any reward and ends or goes on."""
    goes_on, ends, discount = np.array([-1.0, 0.5]), np.array([-4.0, 3.0]), 0.8
    low, high = value_limits(
        OfflineDataset.from_arrays(
            observations=np.zeros((4, 1)),
            actions=np.zeros((4, 1)),
            rewards=[*goes_on, *ends],
            next_observations=np.zeros((4, 1)),
            terminations=[False, False, True, True],
            truncations=np.zeros(4, bool),
        ),
        discount,
    )
    reachable = np.array(ends)
    for _ in range(6):
        reachable = np.concatenate([ends, (goes_on[:, None] + discount * reachable).ravel()])
    assert low <= reachable.min()
    assert reachable.max() <= high


@pytest.mark.parametrize("error", [0.0, 5.0])
def test_of_large_data_some_blocks_are_compared_whose_ends_cut_returns(make_data, calibrate, monkeypatch, error):
    whole = make_data(1.0, terminates=False)
    monkeypatch.setattr(calibration, "_MOST_ROWS", 160)
    found = calibrate(whole, lambda observations, chunks: 0 * chunks[:, 0] + 10 + error)
    assert found["calibration_bias"] == pytest.approx(error, abs=1e-5)
    assert found["calibration_tail"] > 0.9**10  # blocks of ten rows


def test_a_comparison_draws_no_random_number_of_others_and_is_the_same_each_time(dataset, make_config):
    config = make_config()
    spec = make_spec(config, dataset)
    networks = build_networks(spec, config)
    before = torch.random.get_rng_state()
    first, second = (Calibration(dataset, config, spec, CPU)(networks) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == second
    assert all(parameter.grad is None for parameter in networks.parameters())

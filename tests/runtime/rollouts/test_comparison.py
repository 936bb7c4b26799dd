import numpy as np
import pytest

from meam_policy.rollouts.comparison import best_rule, gain_interval, measurement
from meam_policy.rollouts.result import RolloutResult, mean_interval

LUCK = np.random.default_rng(0).normal(0, 10, 40)
"""What an episode's initial state is worth, whatever the rule."""


def result(returns, successes=None):
    returns = np.asarray(returns, np.float64)
    given = None if successes is None else np.asarray(successes, bool)
    return RolloutResult(returns, np.ones(len(returns), np.int64), given, np.ones(1))


def test_a_gain_is_that_of_the_same_episodes():
    one, other = result(LUCK + 1), result(LUCK)
    assert gain_interval(one, other) == pytest.approx((1, 1))
    # Without pairing, nobody could tell.
    assert mean_interval(one.returns)[0] < other.return_mean < one.return_mean < mean_interval(other.returns)[1]


@pytest.mark.parametrize(
    ("gains", "rule"),
    [
        ({"zero": 1.0}, "zero"),
        ({"zero": -1.0}, "sample"),
        ({"zero": 0.0}, "sample"),
        ({"0.5": 1.0, "zero": 2.0}, "zero"),
        ({"0.5": 2.0, "zero": 1.0}, "0.5"),
        ({"0.5": -2.0, "zero": -1.0, "best-of-4": 0.5}, "best-of-4"),
    ],
)
def test_the_rule_that_returned_most_is_taken_if_it_is_clearly_better(gains, rule):
    results = {"sample": result(LUCK), **{name: result(LUCK + gain) for name, gain in gains.items()}}
    assert best_rule(results) == rule


def test_a_gain_that_may_be_chance_leaves_the_policy_sampling():
    noise = np.random.default_rng(1).normal(0, 10, 40)
    noise += 1.0 - noise.mean()
    results = {"sample": result(LUCK), "0.5": result(LUCK + 0.5), "zero": result(LUCK + noise)}
    assert results["zero"].return_mean > results["0.5"].return_mean > results["sample"].return_mean
    assert best_rule(results) == "0.5"  # the highest mean is not clearly better, the second is
    del results["0.5"]
    assert best_rule(results) == "sample"


def test_a_measurement_has_the_figures_of_every_rule_and_the_gains_over_sampling():
    found = measurement(
        {"sample": result(LUCK), "zero": result(LUCK + 1, [True] * 10 + [False] * 30)}, "Line-v0", seed=3
    )
    assert (found.environment_id, found.episodes, found.seed) == ("Line-v0", 40, 3)
    low, high = mean_interval(LUCK)
    assert found.returns["sample"] == {"return_mean": LUCK.mean(), "return_low": low, "return_high": high}
    assert found.returns["zero"] == pytest.approx(
        {
            "return_mean": LUCK.mean() + 1,
            "return_low": low + 1,
            "return_high": high + 1,
            "gain_low": 1,
            "gain_high": 1,
            "success": 0.25,
        }
    )
    alone = measurement({"zero": result(LUCK)}, "Line-v0", seed=3)
    assert set(alone.returns["zero"]) == {"return_mean", "return_low", "return_high"}

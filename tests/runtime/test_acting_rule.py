"""How a policy acts is part of it: the recorded noise scale, and what overrides it."""

import json
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meam_policy import ConfigError, ControlLoop, rollout
from meam_policy.acting.noise_streams import NoiseStreams
from meam_policy.spec import ActingMeasurement, ActingRule

ROWS = np.random.default_rng(3).integers(-8, 9, (3, 3)) / 8
FIGURES = {"return_mean": 1.0, "return_low": 0.5, "return_high": 1.5}


def draws(seed, scale, slots=3, size=8):
    """The noise of the slots' first chunks, as a policy with this seed draws it, in float32."""
    streams = NoiseStreams(size)
    streams.reseed(seed)
    return np.float32(scale) * streams.draw(np.arange(slots))


@pytest.fixture
def recorded(make_policy):
    """Makes a policy whose folder records a noise scale. Noise enters by powers of two: its sums are exact."""

    def make(scale, **fields):
        return make_policy(acting=ActingRule(scale), noise_weight=np.eye(8) / 8, **fields)

    return make


class Line(gymnasium.Env):
    """Ends after `length` steps and rewards the first number of the action, so that its return tells the noise."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, length=4):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(3, np.float32), float(action[0]), self.steps == self.length, False, {}


def first_actions(policy, call, rows):
    policy.reset(seed=5)
    if call == "predict":
        return policy.predict(rows)[0]
    if call == "predict_action_chunk":
        return policy.predict_action_chunk(rows)[..., 0, :]
    return getattr(policy, call)(rows)


@pytest.mark.parametrize("call", ["act", "select_action", "predict"])
@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 1.0])
def test_the_recorded_scale_times_the_same_draws_is_the_noise_of_every_slot(recorded, call, scale):
    linear = recorded(scale)
    found = first_actions(linear.load(), call, ROWS)
    expected = linear.chunks(ROWS, draws(5, scale))[:, 0].astype(np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_predicted_chunks_follow_the_rule_too(recorded, scale):
    linear = recorded(scale)
    found = first_actions(linear.load(), "predict_action_chunk", ROWS)
    # Chunks of a batch are drawn from the first slot's stream, as `sample` draws them.
    noise = np.float32(scale) * linear.load(seed=5)._execution.noise.draw_rows(3)
    np.testing.assert_array_equal(found, linear.chunks(ROWS, noise)[:, 0].astype(np.float32))


@pytest.mark.parametrize("call", ["act", "select_action", "predict", "predict_action_chunk"])
def test_a_folder_from_before_the_rule_samples_to_the_bit(recorded, call):
    linear = recorded(1.0)
    new = first_actions(linear.load(), call, ROWS)
    config = json.loads((linear.folder / "config.json").read_text())
    del config["acting"]
    (linear.folder / "config.json").write_text(json.dumps(config))
    policy = linear.load()
    np.testing.assert_array_equal(first_actions(policy, call, ROWS), new)
    policy.reset(seed=5)
    np.testing.assert_array_equal(policy.act(ROWS, deterministic=False), first_actions(policy, "act", ROWS))


@pytest.mark.parametrize("best_of", [1, 3])
def test_zero_noise_is_the_deterministic_policy(make_policy, best_of):
    linear = make_policy(best_of=best_of, acting=ActingRule(0.0))
    plain = make_policy(best_of=best_of)
    for row in ROWS:
        zero, deterministic = linear.load(), plain.load()
        np.testing.assert_array_equal(zero.act(row), deterministic.act(row, deterministic=True))
        np.testing.assert_array_equal(
            zero.predict_action_chunk(row), deterministic.predict_action_chunk(row, deterministic=True)
        )


def test_a_call_overrides_the_argument_of_loading_and_that_the_recorded_rule(recorded):
    linear = recorded(0.25)
    scales = {
        (None, None): 0.25,
        (None, True): 0.0,
        (None, False): 1.0,
        (0.5, None): 0.5,
        (0.5, True): 0.0,
        (0.5, False): 1.0,
        (0, None): 0.0,
        (0, False): 1.0,
        (1, None): 1.0,
    }
    for (given, deterministic), scale in scales.items():
        policy = linear.load(noise_scale=given, seed=5)
        expected = linear.chunks(ROWS, draws(5, scale))[:, 0].astype(np.float32)
        np.testing.assert_array_equal(policy.act(ROWS, deterministic=deterministic), expected)
        policy.reset(seed=5)
        chunk = policy.predict_action_chunk(ROWS[0], deterministic=deterministic)
        np.testing.assert_array_equal(chunk, linear.chunks(ROWS[:1], draws(5, scale, 1))[0].astype(np.float32))


def test_samples_are_samples_and_given_noise_is_taken_as_it_is_whatever_the_rule(recorded):
    zero, one = recorded(0.0).load(), recorded(1.0).load()
    np.testing.assert_array_equal(zero.sample(ROWS, seed=2), one.sample(ROWS, seed=2))
    for policy in (zero, one):
        policy.reset(seed=5)
    np.testing.assert_array_equal(zero.sample(ROWS), one.sample(ROWS))
    noise = draws(7, 1)
    np.testing.assert_array_equal(zero.select_action(ROWS, noise), one.select_action(ROWS, noise))
    np.testing.assert_array_equal(
        zero.predict_action_chunk(ROWS, noise=noise), one.predict_action_chunk(ROWS, noise=noise)
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_rollouts_follow_the_rule_in_single_and_vector_environments_alike(recorded, scale):
    linear = recorded(scale)
    alone = rollout(linear.load(), Line(), 5, 2)
    together = rollout(linear.load(), gymnasium.vector.SyncVectorEnv([Line] * 2), 5, 2)
    np.testing.assert_array_equal(alone.returns, together.returns)
    assert len(set(alone.returns)) == (1 if scale == 0 else 5)
    overridden = rollout(recorded(1.0).load(noise_scale=scale), Line(), 5, 2)
    np.testing.assert_array_equal(alone.returns, overridden.returns)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_control_loop_follows_the_rule(recorded, scale):
    linear = recorded(scale)
    with ControlLoop(linear.load(seed=5), 50, chunking="blocking", simulated_delay=0) as loop:
        found = loop.step(ROWS[0])
    np.testing.assert_array_equal(found, linear.chunks(ROWS[:1], draws(5, scale, 1))[0, 0].astype(np.float32))


def test_a_pickled_policy_acts_by_the_same_scale(recorded):
    policy = recorded(1.0).load(noise_scale=0.5, seed=5)
    copy = pickle.loads(pickle.dumps(policy))
    assert copy.spec.acting == ActingRule(0.5)
    np.testing.assert_array_equal(copy.act(ROWS), policy.act(ROWS))


@pytest.mark.parametrize("scale", [-0.1, 1.01, float("nan"), "zero", True])
def test_a_noise_scale_out_of_range_is_refused(recorded, scale):
    with pytest.raises(ConfigError, match=r"noise_scale is .*; expected a number from 0 \(zero noise\) to 1"):
        recorded(1.0).load(noise_scale=scale)


def test_another_scale_or_number_of_samples_was_not_measured(make_policy):
    returns = {"best-of-3": FIGURES, "sample": FIGURES}
    linear = make_policy(best_of=3, acting=ActingRule(1.0, ActingMeasurement("Line-v0", 20, 0, returns)))
    assert linear.load(noise_scale=1, best_of=3).spec.acting == linear.spec.acting
    assert linear.load(noise_scale=0.5).spec.acting == ActingRule(0.5)
    assert linear.load(best_of=4).spec.acting == ActingRule(1.0)


def test_a_variant_follows_the_rule_unless_it_chooses_among_samples(make_policy):
    linear = make_policy(acting=ActingRule(0.0))
    linear.add_variant("k3", linear.graph)
    linear.add_variant("best-of-3", make_policy(best_of=3).graph, best_of=3)
    assert linear.load(variant="k3").spec.acting_name == "zero"
    assert linear.load(variant="best-of-3").spec.acting_name == "best-of-3"
    row = ROWS[0]
    np.testing.assert_array_equal(linear.load(variant="k3").act(row), linear.chunks([row])[0, 0])


# stable-baselines3's convention


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_what_stable_baselines3_asks_for_by_default_is_how_the_policy_acts_and_not_silent(recorded, scale):
    linear = recorded(scale)
    policy = linear.load(seed=5)
    with pytest.warns(
        RuntimeWarning, match="Pass deterministic=False to sample, or load the policy with noise_scale=0"
    ):
        found, _ = policy.predict(ROWS, deterministic=True)
    np.testing.assert_array_equal(found, linear.chunks(ROWS, draws(5, scale))[:, 0].astype(np.float32))


def test_nothing_is_said_where_the_convention_is_met(recorded):
    zero, half = recorded(0.0), recorded(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = zero.load().predict(ROWS, deterministic=True)
        sampled, _ = half.load(seed=5).predict(ROWS, deterministic=False)
    np.testing.assert_array_equal(found, zero.chunks(ROWS)[:, 0])
    np.testing.assert_array_equal(sampled, half.chunks(ROWS, draws(5, 1))[:, 0].astype(np.float32))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_evaluate_policy_reports_the_policy_that_acts(recorded, scale):
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")

    def evaluated(policy, **arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            env = monitor.Monitor(Line())
            returns, _ = evaluation.evaluate_policy(
                policy, env, n_eval_episodes=4, return_episode_rewards=True, **arguments
            )
        return returns, {str(warning.message) for warning in caught}

    linear = recorded(scale)
    found, said = evaluated(linear.load(seed=5))
    expected, nothing = evaluated(recorded(1.0).load(seed=5, noise_scale=scale), deterministic=scale == 0)
    if scale in (0.0, 1.0):
        assert found == expected
        assert nothing == set()
    assert len(set(found)) == (1 if scale == 0 else 4)
    assert len(said) == (scale > 0)
    sampled, quiet = evaluated(linear.load(seed=5), deterministic=False)
    assert quiet == set()
    assert (sampled == found) == (scale == 1)

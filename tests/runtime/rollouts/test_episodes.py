import math

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy import BoxSpec, ConfigError, SpaceError, rollout
from meam_policy.rollouts.result import RolloutResult, mean_interval

PENDULUM = BoxSpec.from_space(spaces.Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32)))
TORQUE = BoxSpec((1,), "float32", (-2.0,), (2.0,))


@pytest.fixture
def pendulum():
    with gymnasium.make("Pendulum-v1") as env:
        yield env


@pytest.fixture
def pockets():
    pytest.importorskip("mujoco")
    with gymnasium.make("meam/Pockets-v0") as env:
        yield env


@pytest.fixture
def swinger(make_policy):
    """A policy for the pendulum, executing 3 of 4 actions a chunk."""
    return make_policy(observation=[PENDULUM], action=TORQUE, execute_steps=3)


class Corridor(gymnasium.Env):
    """Counts its steps and ends after `length` of them; tells success as `info` says."""

    def __init__(self, length=5, info=lambda step: {}, terminates=True):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.length, self.info, self.terminates = length, info, terminates
        self.seeds = []

    def observe(self):
        return np.array([self.steps, 0, 0], np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        done = self.steps == self.length
        return (
            self.observe(),
            float(self.steps),
            done and self.terminates,
            done and not self.terminates,
            self.info(self.steps),
        )


def test_same_seed_gives_the_same_returns(swinger, pendulum):
    first, second, other = (rollout(swinger.load(), pendulum, 2, seed) for seed in (0, 0, 50))
    np.testing.assert_array_equal(first.returns, second.returns)
    assert not np.array_equal(first.returns, other.returns)


def test_episode_depends_on_its_own_seed_only(swinger, pendulum):
    three = rollout(swinger.load(), pendulum, 3, 10)
    last = rollout(swinger.load(), pendulum, 1, 12)
    assert three.returns[2] == last.returns[0]


def test_return_is_the_sum_of_the_rewards_of_a_hand_written_loop(swinger, pendulum):
    policy = swinger.load()
    result = rollout(policy, pendulum, 1, 4)
    policy.reset(seed=4)
    observation, _ = pendulum.reset(seed=4)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = pendulum.step(policy.act(observation))
        total += float(reward)
        done = terminated or truncated
    assert result.returns[0] == total


def test_pendulum_rollout_counts_episodes_steps_and_inferences(swinger, pendulum):
    policy = swinger.load()
    done = []
    result = rollout(policy, pendulum, 3, 0, on_episode=done.append)
    assert done == [1, 2, 3]
    assert result.returns.shape == (3,)
    assert result.lengths.tolist() == [200, 200, 200]
    # 200 steps, 3 executed an inference.
    assert len(result.latencies) == policy.inferences == 3 * 67
    assert (result.latencies > 0).all()
    assert result.successes is None
    assert result.success_rate is None
    assert result.observations == []


def test_success_is_false_in_episodes_that_report_it_only_where_it_is_reached(make_policy):
    class Every(Corridor):
        """Reaches its goal in every third episode, and says nothing otherwise."""

        def step(self, action):
            observation, reward, terminated, truncated, _ = super().step(action)
            reached = terminated and len(self.seeds) % 3 == 0
            return observation, reward, terminated, truncated, {"success": True} if reached else {}

    result = rollout(make_policy().load(), Every(), 6, 0)
    assert result.successes is not None
    assert result.successes.tolist() == [False, False, True] * 2
    vectors = gymnasium.vector.SyncVectorEnv([Every], autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
    assert rollout(make_policy().load(), vectors, 6, 0).success_rate == 1 / 3


@pytest.mark.parametrize("wrap", [np.float32, np.array, lambda r: np.array([r]), lambda r: [r]])
def test_a_reward_is_a_number_or_an_array_of_one(make_policy, wrap):
    class Wrapped(Corridor):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, wrap(reward), terminated, truncated, info

    assert rollout(make_policy().load(), Wrapped(length=4), 2, 0).returns.tolist() == [10, 10]


@pytest.mark.parametrize(
    ("reward", "seen"), [(np.ones(2), r"an array of shape \(2,\)"), (None, "None"), ("much", "'much'"), ([], r"\[\]")]
)
def test_a_reward_that_is_not_one_number_is_named(make_policy, reward, seen):
    class Odd(Corridor):
        def step(self, action):
            observation, _, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, info

    with pytest.raises(SpaceError, match=rf"reward is {seen}; expected one number"):
        rollout(make_policy().load(), Odd(), 1, 0)


def test_recorded_observations_are_those_of_the_environment(swinger, pendulum):
    result = rollout(swinger.load(), pendulum, 2, 7, record=True)
    assert [path.shape for path in result.observations] == [(201, 3), (201, 3)]
    for episode, path in enumerate(result.observations):
        assert path.dtype == np.float32
        np.testing.assert_array_equal(path[0], pendulum.reset(seed=7 + episode)[0])
        assert pendulum.observation_space.contains(path[-1])


def test_pockets_rollout_reports_success_by_the_environments_info(make_policy, pockets):
    # Pushing away from the middle, the ball rolls through the north pocket (success) or the south one.
    push = np.zeros((4, 2))
    push[1, 1] = 20
    linear = make_policy(
        observation=[BoxSpec.from_space(pockets.observation_space)],
        action=BoxSpec.from_space(pockets.action_space),
        chunk_size=1,
        execute_steps=1,
        weight=push,
        noise_weight=np.zeros((2, 2)),
    )
    result = rollout(linear.load(), pockets, 6, 0, record=True)
    assert result.lengths.tolist() == [20] * 6
    assert [path.shape for path in result.observations] == [(21, 4)] * 6
    starts_north = [path[0, 1] > 0 for path in result.observations]
    assert result.successes is not None
    assert result.successes.tolist() == starts_north
    assert set(starts_north) == {True, False}
    assert (result.returns > 0).all()


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize("at", [1, 3, 5, None])
def test_success_at_any_step_is_a_success(make_policy, key, at):
    env = Corridor(info=lambda step: {key: np.bool_(step == at)})
    result = rollout(make_policy().load(), env, 2, 0)
    assert result.success_rate == (0 if at is None else 1)


def test_success_reported_at_the_last_step_only_counts(make_policy):
    env = Corridor(info=lambda step: {"is_success": True} if step == 5 else {})
    assert rollout(make_policy().load(), env, 1, 0).success_rate == 1


@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_termination_and_truncation_both_end_an_episode(make_policy, terminates, length):
    env = Corridor(length=length, terminates=terminates)
    policy = make_policy(execute_steps=2).load()
    result = rollout(policy, env, 3, 0, record=True)
    assert result.lengths.tolist() == [length] * 3
    assert result.returns.tolist() == [length * (length + 1) / 2] * 3
    # Every episode starts with an inference: nothing queued survives the end of the one before.
    assert len(result.latencies) == 3 * math.ceil(length / 2)
    assert [path[:, 0].tolist() for path in result.observations] == [list(range(length + 1))] * 3


def test_episode_i_is_seeded_with_seed_plus_i(make_policy):
    env = Corridor()
    rollout(make_policy().load(), env, 3, 40)
    assert env.seeds == [40, 41, 42]


@pytest.mark.parametrize(("episodes", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_episodes_and_seed_out_of_range_are_refused(make_policy, episodes, seed):
    with pytest.raises(ConfigError, match=f"episodes is {episodes} and seed is {seed}"):
        rollout(make_policy().load(), Corridor(), episodes, seed)


def test_summary_is_the_figures_as_json_data(make_policy):
    result = rollout(make_policy().load(), Corridor(length=4, info=lambda step: {"success": step > 3}), 3, 0)
    summary = result.summary()
    assert summary["episodes"] == 3
    assert summary["return_mean"] == summary["ci_low"] == summary["ci_high"] == 10
    assert summary["success"] == 1
    assert summary["length_mean"] == 4
    assert 0 < summary["latency_p50_ms"] <= summary["latency_p99_ms"] == result.latency_ms(99)


def test_repr_of_a_result_is_one_line_of_means():
    result = RolloutResult(np.array([1.0, 2.5]), np.array([3, 5]), np.array([True, False]), np.zeros(2))
    assert repr(result) == "RolloutResult(episodes=2, return_mean=1.75, success_rate=0.5, length_mean=4)"
    silent = RolloutResult(np.ones(900), np.ones(900, int), None, np.zeros(9), [np.zeros((2, 3), np.float32)] * 900)
    assert repr(silent) == "RolloutResult(episodes=900, return_mean=1, success_rate=None, length_mean=1)"


def test_rollout_checks_the_spaces_before_the_first_step(make_policy):
    env = Corridor()
    env.action_space = spaces.Discrete(4)
    with pytest.raises(SpaceError):
        rollout(make_policy().load(), env, 1, 0)
    assert env.seeds == []


def test_interval_agrees_with_normal_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = mean_interval(values)
    half = 1.959964 * values.std() / math.sqrt(400)
    # The bootstrap's own noise is about 1 % of the width with 10 000 resamples.
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.slow
def test_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(2)
    intervals = [mean_interval(random.exponential(1.0, 50), resamples=1000) for _ in range(300)]
    covered = np.mean([low <= 1 <= high for low, high in intervals])
    # The percentile bootstrap is a little short on skewed data; 0.95 - three binomial standard errors is 0.91.
    assert 0.88 <= covered <= 0.99


def test_wider_level_gives_a_wider_interval():
    values = np.random.default_rng(3).normal(size=30)
    narrow, wide = mean_interval(values, level=0.5), mean_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("values", [[2.5], [2.5] * 40])
def test_interval_of_equal_values_is_a_point(values):
    assert mean_interval(np.array(values)) == (2.5, 2.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=30))
def test_interval_lies_within_the_values_and_is_reproducible(values):
    low, high = mean_interval(np.array(values), resamples=200)
    assert min(values) <= low <= high <= max(values)
    assert mean_interval(np.array(values), resamples=200) == (low, high)


@pytest.fixture(scope="module")
def sb3():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common import evaluation, monitor, vec_env

    return evaluation.evaluate_policy, monitor.Monitor, vec_env.DummyVecEnv


def test_evaluate_policy_of_stable_baselines3_accepts_a_policy(sb3, swinger):
    evaluate_policy, Monitor, _ = sb3
    returns = []
    for _ in range(2):
        env = Monitor(gymnasium.make("Pendulum-v1"))
        env.reset(seed=3)
        policy = swinger.load(seed=3)
        mean, _ = evaluate_policy(policy, env, n_eval_episodes=2, deterministic=False)
        returns.append(mean)
    assert returns[0] == returns[1]
    assert -2000 < returns[0] < 0


def test_evaluate_policy_of_stable_baselines3_accepts_vector_environments(sb3, swinger):
    evaluate_policy, Monitor, DummyVecEnv = sb3
    runs = []
    for _ in range(2):
        env = DummyVecEnv([lambda: Monitor(gymnasium.make("Pendulum-v1"))] * 3)
        env.seed(5)
        policy = swinger.load(seed=5)
        runs.append(evaluate_policy(policy, env, n_eval_episodes=6, deterministic=False, return_episode_rewards=True))
    assert runs[0] == runs[1]
    rewards, lengths = runs[0]
    assert len(rewards) == 6
    assert len(set(rewards)) == 6
    assert lengths == [200] * 6


@pytest.mark.parametrize("slots", [None, 2])
def test_an_endless_episode_is_cut_off_with_a_warning(make_policy, slots):
    def endless():
        return Corridor(length=-1)

    env = endless() if slots is None else gymnasium.vector.SyncVectorEnv([endless] * slots, autoreset_mode="Disabled")
    with pytest.warns(UserWarning, match=r"3 of 3 episodes were cut off after 7 steps.*--max-episode-steps"):
        result = rollout(make_policy().load(), env, 3, 0, max_episode_steps=7)
    assert result.lengths.tolist() == [7] * 3
    assert result.returns.tolist() == [28] * 3


def test_the_longest_episode_is_that_of_the_environment_if_it_says_so(make_policy, monkeypatch):
    monkeypatch.setattr("meam_policy.rollouts.episodes.LONGEST_EPISODE", 4)
    limited = gymnasium.wrappers.TimeLimit(Corridor(length=-1), 6)
    limited.unwrapped.spec = EnvSpec("tests/Corridor-v0", max_episode_steps=6)
    assert rollout(make_policy().load(), limited, 1, 0).lengths.tolist() == [6]
    with pytest.warns(UserWarning, match="1 of 1 episodes were cut off after 4 steps"):
        assert rollout(make_policy().load(), Corridor(length=-1), 1, 0).lengths.tolist() == [4]


def test_an_episode_that_ends_at_the_limit_is_not_cut_off(make_policy):
    assert rollout(make_policy().load(), Corridor(length=5), 2, 0, max_episode_steps=5).lengths.tolist() == [5, 5]


def test_a_longest_episode_out_of_range_is_refused(make_policy):
    with pytest.raises(ConfigError, match="max_episode_steps is 0; expected 1 or more"):
        rollout(make_policy().load(), Corridor(), 1, 0, max_episode_steps=0)

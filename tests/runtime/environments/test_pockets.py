import doctest
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy.environments import pockets
from meam_policy.environments.pockets import (
    ARENA_HALF_WIDTH,
    BALL_RADIUS,
    POCKET_RADIUS,
    POCKETS,
    POST_RADIUS,
    POSTS,
    PocketsEnv,
)
from meam_policy.errors import ActionError, ConfigError, MissingExtraError

STAY = np.zeros(2, np.float32)
# MuJoCo's contacts give way a little under force.
CONTACT_SOFTNESS = 0.01


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("mujoco")
    env = gymnasium.make("meam/Pockets-v0")
    yield env
    env.close()


def rollout(env, seed, actions):
    observations, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


def test_gymnasium_checker_passes(env):
    check_env(env.unwrapped, skip_render_check=True)


def test_docstring_example_runs(env):
    assert doctest.testmod(pockets).failed == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_seed_gives_same_trajectory(env, seed):
    actions = np.random.default_rng(seed).uniform(-1, 1, (20, 2)).astype(np.float32)
    first, second, other = (rollout(env, s, actions) for s in (seed, seed, seed + 1))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[0][0], other[0][0])


def test_control_steps_last_as_long_as_the_metadata_says(env):
    env.reset(seed=0)
    env.step(STAY)
    assert env.unwrapped._data.time == pytest.approx(1 / env.metadata["render_fps"])


def test_ball_starts_at_rest_near_the_centre(env):
    starts = np.array([env.reset(seed=seed)[0] for seed in range(50)])
    assert np.abs(starts[:, :2]).max() <= 0.05
    assert np.all(starts[:, :2].std(axis=0) > 0.02)
    assert not starts[:, 2:].any()


@pytest.mark.parametrize("name", POCKETS)
def test_a_pocket_pays_its_value_inside_and_nothing_outside(env, name):
    centre = np.array(POCKETS[name].centre)
    inwards = -centre / np.linalg.norm(centre)
    for distance, inside in [(0.0, True), (0.99, True), (1.01, False)]:
        env.reset(options={"position": centre + distance * POCKET_RADIUS * inwards})
        _, reward, _, _, info = env.step(STAY)
        assert reward == (POCKETS[name].value if inside else 0.0)
        assert info == {"pocket": name if inside else "none", "success": inside and name == "north"}


def test_the_start_earns_nothing(env):
    _, info = env.reset(seed=0)
    assert info == {"pocket": "none", "success": False}
    assert env.step(STAY)[1] == 0.0


@pytest.mark.parametrize("name", POCKETS)
def test_a_constant_full_push_passes_through_the_pocket(env, name):
    env.reset(seed=0)
    push = np.sign(POCKETS[name].centre).astype(np.float32)
    held = [env.step(push)[-1]["pocket"] for _ in range(20)]
    assert name in held
    assert held[-1] == "none"


@pytest.mark.parametrize("post", POSTS)
def test_posts_stop_the_ball(env, post):
    env.reset(options={"position": (0.0, 0.0)})
    push = np.sign(post).astype(np.float32)
    place = [env.step(push)[0][:2] for _ in range(20)][-1]
    assert np.linalg.norm(place) < np.linalg.norm(post)
    assert np.linalg.norm(place - post) == pytest.approx(POST_RADIUS + BALL_RADIUS, abs=CONTACT_SOFTNESS)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    actions=st.lists(st.tuples(*[st.floats(-1, 1, width=32)] * 2), min_size=20, max_size=20),
)
def test_observations_stay_in_the_space_and_out_of_the_posts(env, seed, actions):
    observations, rewards = rollout(env, seed, np.array(actions, np.float32))
    assert all(env.observation_space.contains(observation) for observation in observations)
    assert np.abs(observations[:, :2]).max() < ARENA_HALF_WIDTH - BALL_RADIUS + CONTACT_SOFTNESS
    gaps = np.linalg.norm(observations[:, None, :2] - np.array(POSTS), axis=-1)
    assert gaps.min() > POST_RADIUS + BALL_RADIUS - CONTACT_SOFTNESS
    assert set(rewards) <= {0.0} | {pocket.value for pocket in POCKETS.values()}


def test_the_time_limit_truncates_after_20_steps_and_nothing_terminates(env):
    env.reset(options={"position": POCKETS["north"].centre})
    ends = [env.step(STAY)[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_commands_beyond_the_limits_saturate(env):
    full, beyond = (rollout(env.unwrapped, 0, [np.array([0.0, push])] * 5)[0] for push in (1.0, 7.0))
    np.testing.assert_array_equal(full, beyond)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [np.inf, 0.0], [0.0], [[0.0, 0.0]]])
def test_broken_actions_are_rejected(env, action):
    env.reset(seed=0)
    with pytest.raises(ActionError, match="two finite numbers"):
        env.unwrapped.step(action)


@pytest.mark.parametrize("position", [(0.95, 0.0), (0.0,), (np.nan, 0.0), POSTS[0]])
def test_positions_where_the_ball_does_not_fit_are_rejected(env, position):
    with pytest.raises(ConfigError, match="position is"):
        env.reset(options={"position": position})


@pytest.mark.parametrize("settings", [{"render_mode": "human"}, {"size": 0}, {"size": 1025}])
def test_unknown_settings_are_rejected(settings):
    with pytest.raises(ConfigError, match="expected"):
        PocketsEnv(**settings)


def test_without_mujoco_the_error_has_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'meam-policy\[mujoco\]'") as caught:
        PocketsEnv()
    assert isinstance(caught.value.__cause__, ImportError)


def test_importing_the_constants_leaves_mujoco_alone():
    code = "import sys; from meam_policy.environments.pockets import POCKETS; assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


RENDER = """
import gymnasium, numpy as np, meam_policy
from gymnasium.utils.env_checker import check_env

env = gymnasium.make("meam/Pockets-v0", render_mode="rgb_array")
check_env(env.unwrapped)
env.reset(options={"position": (-0.65, 0.0)})
before = env.render()
assert before.shape == (240, 240, 3) and before.dtype == np.uint8

# The view spans 2.22 m: north is up, x to the right.
red, green, blue = (before[:, :, channel].astype(int) for channel in range(3))
rows, columns = np.nonzero((red > 200) & (green < 120))
assert abs(rows.mean() - 50) < 3 and abs(columns.mean() - 120) < 3
rows, columns = np.nonzero((blue > 100) & (red < 60))
assert abs(rows.mean() - 120) < 3 and abs(columns.mean() - 50) < 3

env.step(np.array([1.0, 0.0], np.float32))
assert (env.render() != before).any()
env.close()
env.close()
"""


@pytest.mark.slow
def test_rendering_shows_the_ball_and_the_north_pocket_where_they_are():
    pytest.importorskip("mujoco")
    # MuJoCo reads MUJOCO_GL once, on import: hence another process.
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    probe = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).close()"
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode:
        pytest.skip("EGL does not work here: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri")
    drawn = subprocess.run([sys.executable, "-c", RENDER], env=environment, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr


def test_render_without_a_render_mode_warns_and_draws_nothing():
    pytest.importorskip("mujoco")
    with pytest.warns(UserWarning, match="rgb_array"):
        assert PocketsEnv().render() is None

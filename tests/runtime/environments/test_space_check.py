import dataclasses

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from meam_policy import BoxSpec, SpaceError
from meam_policy.environments.space_check import check_env, check_spaces, control_rate

FREE3 = BoxSpec((3,), "float32", (-np.inf,) * 3, (np.inf,) * 3)


class Corridor(gymnasium.Env):
    """An environment that is only looked at."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Box(-1.0, 1.0, (2,))


def spaces_error(spec, env):
    with pytest.raises(SpaceError) as caught:
        check_spaces(spec, env)
    return str(caught.value)


def corridor_with(observation_space=None, action_space=None):
    env = Corridor()
    env.observation_space = observation_space or env.observation_space
    env.action_space = action_space or env.action_space
    return env


def test_environment_of_the_policy_is_accepted(make_spec):
    check_spaces(make_spec(), Corridor())


def test_observation_of_another_dimension_is_refused_with_both(make_spec):
    message = spaces_error(make_spec(), corridor_with(spaces.Box(-1.0, 1.0, (4,))))
    assert "observation" in message
    assert "(4,)" in message
    assert "(3,)" in message


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.Dict({"arm": spaces.Box(-1.0, 1.0, (3,))})])
def test_observation_of_another_kind_is_refused_with_both(make_spec, space):
    message = spaces_error(make_spec(), corridor_with(space))
    assert str(space) in message
    assert "(3,)" in message


def test_action_of_another_dimension_is_refused_with_both(make_spec):
    message = spaces_error(make_spec(), corridor_with(action_space=spaces.Box(-1.0, 1.0, (3,))))
    assert "action" in message
    assert "(3,)" in message
    assert "(2,)" in message


def test_discrete_actions_are_refused_with_both_spaces(make_spec):
    message = spaces_error(make_spec(), corridor_with(action_space=spaces.Discrete(4)))
    assert "Discrete(4)" in message
    assert str(make_spec().action_space) in message


@pytest.mark.parametrize(("side", "low", "high"), [("low", -2.0, 1.0), ("high", -1.0, 0.5)])
def test_other_action_bounds_are_refused_with_both(make_spec, side, low, high):
    message = spaces_error(make_spec(), corridor_with(action_space=spaces.Box(low, high, (2,))))
    assert f"{side} is {[low if side == 'low' else high] * 2}" in message
    assert f"the policy has {[-1.0 if side == 'low' else 1.0] * 2}" in message


def test_an_environment_without_action_bounds_takes_those_of_the_policy(make_spec):
    check_spaces(make_spec(), corridor_with(action_space=spaces.Box(-np.inf, np.inf, (2,))))
    assert "low is [-2.0" in spaces_error(make_spec(), corridor_with(action_space=spaces.Box(-2.0, np.inf, (2,))))


def test_float64_action_bounds_match_their_float32_form(make_spec):
    spec = make_spec(action=BoxSpec((2,), "float64", (-0.1, -0.1), (0.1, 0.1)))
    check_spaces(spec, corridor_with(action_space=spaces.Box(-0.1, 0.1, (2,), np.float32)))


def dict_spec(make_spec):
    return make_spec([dataclasses.replace(FREE3, key="wrist"), dataclasses.replace(FREE3, key="arm")])


def test_dict_observation_may_have_another_key_order(make_spec):
    box = spaces.Box(-np.inf, np.inf, (3,))
    check_spaces(dict_spec(make_spec), corridor_with(spaces.Dict({"arm": box, "wrist": box})))


@pytest.mark.parametrize("keys", [["arm"], ["arm", "wrist", "base"], ["Arm", "wrist"]])
def test_dict_observation_with_other_keys_is_refused_with_both(make_spec, keys):
    theirs = spaces.Dict({key: spaces.Box(-np.inf, np.inf, (3,)) for key in keys})
    message = spaces_error(dict_spec(make_spec), corridor_with(theirs))
    assert str(theirs) in message
    assert str(dict_spec(make_spec).observation_space) in message


def test_dict_observation_with_another_shape_names_the_key(make_spec):
    theirs = spaces.Dict({"arm": spaces.Box(-1.0, 1.0, (3,)), "wrist": spaces.Box(-1.0, 1.0, (2, 2))})
    message = spaces_error(dict_spec(make_spec), corridor_with(theirs))
    for fragment in ('"wrist"', "(2, 2)", "(3,)"):
        assert fragment in message


@pytest.mark.parametrize("inner", [spaces.Discrete(3), spaces.Dict({"x": spaces.Box(-1.0, 1.0, (3,))})])
def test_dict_observation_with_a_part_that_is_no_box_is_refused(make_spec, inner):
    theirs = spaces.Dict({"arm": spaces.Box(-1.0, 1.0, (3,)), "wrist": inner})
    assert '"wrist"' in spaces_error(dict_spec(make_spec), corridor_with(theirs))


def test_box_is_refused_for_a_dict_policy(make_spec):
    assert "Box" in spaces_error(dict_spec(make_spec), Corridor())


@pytest.mark.parametrize(("ours", "theirs"), [("float32", np.int32), ("uint8", np.float32), ("bool", np.uint8)])
def test_observation_of_another_kind_of_number_is_refused_with_both(make_spec, ours, theirs):
    spec = make_spec([BoxSpec((3,), ours, (0.0,) * 3, (1.0,) * 3)])
    message = spaces_error(spec, corridor_with(spaces.Box(0, 1, (3,), theirs)))
    assert f"observation has dtype {np.dtype(theirs)}" in message
    assert ours in message


@pytest.mark.parametrize(
    ("ours", "theirs"), [("float32", np.float64), ("float64", np.float32), ("int64", np.uint8), ("bool", np.bool_)]
)
def test_observation_of_another_width_is_accepted(make_spec, ours, theirs):
    check_spaces(
        make_spec([BoxSpec((3,), ours, (0.0,) * 3, (1.0,) * 3)]), corridor_with(spaces.Box(0, 1, (3,), theirs))
    )


def test_integer_actions_are_refused(make_spec):
    assert "action has dtype int64" in spaces_error(
        make_spec(), corridor_with(action_space=spaces.Box(-1, 1, (2,), np.int64))
    )


def test_other_finite_observation_bounds_are_refused_with_both(make_spec):
    spec = make_spec([BoxSpec((3,), "float32", (0.0,) * 3, (1.0, 1.0, np.inf))])
    check_spaces(spec, corridor_with(spaces.Box(0.0, np.array([1, np.inf, 255], np.float32))))
    message = spaces_error(spec, corridor_with(spaces.Box(0.0, np.array([255, 1, 1], np.float32))))
    assert "observation bounds differ: high is [255.0, 1.0, 1.0]" in message
    assert "[1.0, 1.0, inf]" in message


def test_bounds_of_a_part_of_a_dict_name_the_key(make_spec):
    box = BoxSpec((1,), "float32", (0.0,), (1.0,), key="wrist")
    theirs = spaces.Dict({"wrist": spaces.Box(0.0, 255.0, (1,))})
    assert 'observation "wrist" bounds differ' in spaces_error(make_spec([box]), corridor_with(theirs))


def vector_of(env):
    return SyncVectorEnv([lambda: env] * 2)


def test_vector_environment_counts_by_its_single_spaces(make_spec):
    check_env(make_spec(), vector_of(Corridor()))
    message = spaces_error(make_spec(), vector_of(corridor_with(spaces.Box(-1.0, 1.0, (4,)))))
    assert "(4,)" in message
    message = spaces_error(make_spec(), vector_of(corridor_with(action_space=spaces.Box(-2.0, 1.0, (2,)))))
    assert "low is [-2.0, -2.0]" in message


@pytest.fixture
def pendulum():
    with gymnasium.make("Pendulum-v1") as env:
        yield env


@pytest.fixture
def pendulum_spec(make_spec, pendulum):
    def make(**changes):
        boxes = BoxSpec.from_space(pendulum.observation_space), BoxSpec.from_space(pendulum.action_space)
        return make_spec([boxes[0]], boxes[1], **changes)

    return make


def env_error(spec, env):
    with pytest.raises(SpaceError) as caught:
        check_env(spec, env)
    return str(caught.value)


def test_environment_with_other_spaces_is_refused(pendulum_spec):
    with gymnasium.make("MountainCarContinuous-v0") as env:
        assert "observation has shape (2,); the policy was trained with (3,)" in env_error(pendulum_spec(), env)


# Pendulum's time step is 0.05 s; it draws 30 pictures a second.
@pytest.mark.parametrize("rate", [None, 20.0, 20.19, 19.81])
@pytest.mark.parametrize("wrap", [lambda env: env, vector_of])
def test_rate_within_one_percent_is_accepted(pendulum, pendulum_spec, rate, wrap):
    check_env(pendulum_spec(control_rate_hz=rate), wrap(pendulum))


@pytest.mark.parametrize("rate", [30.0, 20.3, 19.7, 200.0])
@pytest.mark.parametrize("wrap", [lambda env: env, vector_of])
def test_another_rate_is_refused_with_both(pendulum, pendulum_spec, rate, wrap):
    message = env_error(pendulum_spec(control_rate_hz=rate), wrap(pendulum))
    assert "takes 20 steps a second" in message
    assert f"acts {rate:g} times (control_rate_hz)" in message


def test_every_environment_of_a_vector_is_held_to_the_rate(pendulum_spec):
    slow = gymnasium.make("Pendulum-v1")
    slow.unwrapped.dt = 0.1  # pyright: ignore[reportAttributeAccessIssue]
    env = SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1"), lambda: slow])
    assert "takes 10 steps a second" in env_error(pendulum_spec(control_rate_hz=20.0), env)


def test_rate_of_a_subprocess_is_checked_and_asking_for_it_harms_none(pendulum_spec):
    with_dt = gymnasium.make_vec("Pendulum-v1", 2, "async", vector_kwargs={"context": "spawn"})
    try:
        check_env(pendulum_spec(control_rate_hz=20.0), with_dt)
        assert "takes 20 steps" in env_error(pendulum_spec(control_rate_hz=50.0), with_dt)
        with_dt.reset(seed=0)
    finally:
        with_dt.close()


def test_subprocess_without_a_time_step_goes_on(make_spec):
    env = gymnasium.make_vec("MountainCarContinuous-v0", 2, "async", vector_kwargs={"context": "spawn"})
    boxes = BoxSpec.from_space(env.single_observation_space), BoxSpec.from_space(env.single_action_space)  # pyright: ignore[reportArgumentType]
    try:
        check_env(make_spec([boxes[0]], boxes[1], control_rate_hz=30.0), env)
        env.reset(seed=0)
    finally:
        env.close()


class Slowed(gymnasium.Wrapper):
    """Repeats actions, and says how long a step of its takes."""

    dt = 0.1


def test_wrapper_may_say_another_time_step(pendulum, pendulum_spec):
    assert control_rate(Slowed(pendulum)) == 10
    check_env(pendulum_spec(control_rate_hz=10.0), Slowed(pendulum))


def test_control_timestep_of_a_method_counts():
    env = Corridor()
    env.control_timestep = lambda: 0.02  # pyright: ignore[reportAttributeAccessIssue]
    assert control_rate(env) == pytest.approx(50)


def test_rate_of_the_pictures_is_warned_about_and_the_time_step_goes_first(make_spec, pendulum, recwarn):
    env = Corridor()
    assert control_rate(env) is None
    check_env(make_spec(control_rate_hz=10.0), env)
    env.metadata = {"render_fps": 10}
    assert (control_rate(env), control_rate(pendulum)) == (10, 20)
    check_env(make_spec(control_rate_hz=10.0), env)
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match="draws 10 pictures a second.* acts 25 times"):
        check_env(make_spec(control_rate_hz=25.0), env)


@pytest.mark.parametrize("vector", [False, "sync"])
def test_chunk_longer_than_an_episode_is_refused_with_both(pendulum_spec, vector):
    make = gymnasium.make if not vector else lambda name, **k: gymnasium.make_vec(name, 2, vector, **k)
    env = make("Pendulum-v1", max_episode_steps=6)
    check_env(pendulum_spec(chunk_size=6), env)
    message = env_error(pendulum_spec(chunk_size=7), env)
    assert "chunk_size is 7" in message
    assert "after 6 steps" in message


def test_hand_made_vector_environment_is_held_to_its_shortest_episode(pendulum_spec):
    env = SyncVectorEnv([lambda n=n: gymnasium.make("Pendulum-v1", max_episode_steps=n) for n in (50, 5)])
    assert "after 5 steps" in env_error(pendulum_spec(chunk_size=6), env)

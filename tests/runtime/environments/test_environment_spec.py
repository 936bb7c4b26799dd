"""Environments made as a policy or a data set records them."""

import json
import sys
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from meam_policy import ConfigError, FormatError, NotFoundError, make_environment
from meam_policy.environments.make import beyond_id
from meam_policy.environments.vector_environment import open_vector_environment
from meam_policy.spec import EnvironmentSpec, EnvironmentWrapper

SWING = EnvironmentSpec("Pendulum-v1", {"g": 2.0}, 50)


def length_of(env):
    env.reset(seed=0)
    for step in range(1, 1000):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            return step
    return None


def spec_of(env):
    assert env.spec is not None
    return env.spec


def test_recorded_arguments_and_time_limit_are_followed():
    env: Any = make_environment(SWING)
    assert env.unwrapped.g == 2.0
    assert length_of(env) == 50


def test_given_arguments_take_the_place_of_recorded_ones():
    env: Any = make_environment(SWING, g=3.0, max_episode_steps=7)
    assert env.unwrapped.g == 3.0
    assert length_of(env) == 7


MINUS_ONE_TO_ONE: Any = (-1.0, 1.0)  # Gymnasium takes numbers, and declares arrays


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (gymnasium.wrappers.ClipAction, "ClipAction"),
        (lambda env: gymnasium.wrappers.RescaleAction(env, *MINUS_ONE_TO_ONE), "RescaleAction"),
        (gymnasium.wrappers.TimeAwareObservation, "TimeAwareObservation"),
        (lambda env: gymnasium.wrappers.FrameStackObservation(env, 3), "FrameStackObservation"),
        (lambda env: gymnasium.wrappers.DelayObservation(env, 2), "DelayObservation"),
        (gymnasium.wrappers.FlattenObservation, "FlattenObservation"),
        (lambda env: gymnasium.wrappers.StickyAction(env, 0.5), "StickyAction"),
        (lambda env: gymnasium.wrappers.MaxAndSkipObservation(env, 2), "MaxAndSkipObservation"),
        (lambda env: gymnasium.wrappers.ReshapeObservation(env, (3, 1)), "ReshapeObservation"),
        (lambda env: gymnasium.wrappers.ClipReward(env, -1.0, 0.0), "ClipReward"),
    ],
)
def test_a_wrapper_of_gymnasium_is_recorded_and_made_again(wrap, name):
    recorded = wrap(gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50))
    text = json.dumps(EnvironmentSpec.of(EnvSpec.from_json(spec_of(recorded).to_json())).to_json())
    spec = EnvironmentSpec.from_json(json.loads(text))
    assert [wrapper.name for wrapper in spec.wrappers] == [name]
    made = make_environment(spec)
    assert made.observation_space == recorded.observation_space
    assert made.action_space == recorded.action_space
    ours, theirs = (env.reset(seed=3)[0] for env in (made, recorded))
    np.testing.assert_array_equal(ours, theirs)
    action = np.full(made.action_space.shape or (), 0.3, np.float32)
    if name != "StickyAction":
        (ours, our_reward, *_), (theirs, their_reward, *_) = made.step(action), recorded.step(action)
        np.testing.assert_array_equal(ours, theirs)
        assert our_reward == their_reward


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (gymnasium.wrappers.NormalizeObservation, "NormalizeObservation, whose running statistics are not recorded"),
        (gymnasium.wrappers.NormalizeReward, "NormalizeReward, whose running statistics are not recorded"),
        (gymnasium.wrappers.Autoreset, "Autoreset, which is not one of those that are followed"),
    ],
)
def test_a_wrapper_that_cannot_be_made_again_is_refused_with_a_remedy(wrap, said):
    spec = EnvironmentSpec.of(spec_of(wrap(gymnasium.make("Pendulum-v1"))))
    with pytest.raises(ConfigError, match=rf"Pendulum-v1 was recorded with the wrapper {said}.*--env-id Pendulum-v1"):
        make_environment(spec)


@pytest.mark.parametrize("entry_point", ["meam_trap:ClipAction", "gymnasium.wrapperstrap:ClipAction", "os:system", "x"])
def test_a_wrapper_from_elsewhere_is_not_imported_and_is_named(tmp_path, monkeypatch, entry_point):
    (tmp_path / "meam_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    recorded = EnvSpec("Pendulum-v1", additional_wrappers=(WrapperSpec("ClipAction", entry_point, {}),))
    spec = EnvironmentSpec.of(recorded)
    with pytest.raises(ConfigError, match=entry_point):
        make_environment(spec)
    assert "meam_trap" not in sys.modules


def test_the_recorded_entry_point_is_never_used():
    recorded = EnvSpec("Pendulum-v1", entry_point="meam_trap:Env", max_episode_steps=50)
    assert type(make_environment(EnvironmentSpec.of(recorded)).unwrapped).__module__.startswith("gymnasium.")


@pytest.mark.parametrize("name", ["meam_trap:Env-v0", "os:system"])
def test_a_recorded_id_that_would_import_a_module_is_refused(name):
    with pytest.raises(NotFoundError, match="names a module to import"):
        make_environment(EnvironmentSpec(name))


@pytest.mark.parametrize("value", ["/etc/passwd", "..\\x.xml", r"\\server\x.xml", "module:id", {"a": ["b/c"]}])
def test_a_recorded_argument_that_could_name_a_file_or_module_is_refused_and_may_be_given(value):
    spec = EnvironmentSpec("Pendulum-v1", {"g": value})
    with pytest.raises(ConfigError, match="the argument g=.*could name a file or a module.*--env-kwargs"):
        make_environment(spec)
    env: Any = make_environment(spec, g=1.0)
    assert env.unwrapped.g == 1.0


@pytest.mark.parametrize("kwargs", [{"gg": 2}, {"g": 2, "max_episode_steps": 0}])
def test_arguments_that_the_environment_refuses_are_our_error(kwargs):
    with pytest.raises(ConfigError, match=r"Pendulum-v1 cannot be made with these arguments: .*--env-kwargs"):
        make_environment("Pendulum-v1", **kwargs)


def test_arguments_that_a_wrapper_refuses_are_our_error():
    spec = EnvironmentSpec("Pendulum-v1", wrappers=(EnvironmentWrapper("ClipAction", {"nonsense": 1}),))
    with pytest.raises(ConfigError, match="the wrapper ClipAction, which cannot be applied"):
        make_environment(spec)


def test_wrappers_that_change_nothing_are_not_recorded():
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array")
    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.TimeLimit(env, 50))
    assert EnvironmentSpec.of(spec_of(env)) == EnvironmentSpec("Pendulum-v1", {}, 50)


def test_a_wrapper_whose_arguments_are_not_recorded_is_refused():
    wrapper = WrapperSpec("RescaleAction", "gymnasium.wrappers.transform_action:RescaleAction", None)
    spec = EnvironmentSpec.of(EnvSpec("Pendulum-v1", additional_wrappers=(wrapper,)))
    with pytest.raises(ConfigError, match=r"RescaleAction \(its arguments are not recorded\)"):
        make_environment(spec)


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (EnvironmentSpec("Pendulum-v1", {}, 200), EnvironmentSpec("Pendulum-v1")),
        (SWING, SWING),
        (replace(SWING, evaluation=SWING), SWING),
        (replace(SWING, evaluation=EnvironmentSpec("Pendulum-v1", {}, 200)), None),
        (EnvironmentSpec("HalfCheetah-v5", {}, 1000), EnvironmentSpec("HalfCheetah-v5")),
        (EnvironmentSpec("Nowhere-v0", {"a": 1}, 7), EnvironmentSpec("Nowhere-v0", {"a": 1}, 7)),
    ],
)
def test_what_an_id_gives_an_environment_anyway_is_left_out(spec, left):
    assert beyond_id(spec) == (left or replace(SWING, evaluation=EnvironmentSpec("Pendulum-v1")))


def nested(depth):
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"id": 3},
        {"id": "x" * 201},
        {"kwargs": []},
        {"kwargs": {"id": "x"}},
        {"kwargs": {"max_episode_steps": 3}},
        {"kwargs": {"render_mode": "human"}},
        {"kwargs": {"not a name": 1}},
        {"kwargs": {"g": float("nan")}},
        {"kwargs": {"g": float("inf")}},
        {"kwargs": {"g": "x" * 70_000}},
        {"kwargs": {"g": nested(17)}},
        {"kwargs": {"g": nested(900)}},
        {"max_episode_steps": 0},
        {"max_episode_steps": -1},
        {"max_episode_steps": True},
        {"max_episode_steps": 2.0},
        {"max_episode_steps": 2**40},
        {"wrappers": {}},
        {"wrappers": [3]},
        {"wrappers": [{"name": "ClipAction"}]},
        {"wrappers": [{"name": "ClipAction", "kwargs": {}, "entry_point": "os:system"}]},
        {"wrappers": [{"name": 3, "kwargs": {}}]},
        {"wrappers": [{"name": "ClipAction", "kwargs": {}}] * 17},
        {"wrappers": [{"name": "FrameStackObservation", "kwargs": {"stack_size": 10**9}}]},
        {"evaluation": []},
        {"evaluation": {**SWING.to_json(), "evaluation": SWING.to_json()}},
        {"entry_point": "os:system"},
    ],
)
def test_anything_but_plain_bounded_data_is_refused_by_name(change):
    with pytest.raises(FormatError, match=r"config\.json: environment\."):
        EnvironmentSpec.from_json({**SWING.to_json(), **change})


def test_processes_of_a_vector_environment_make_the_recorded_one_after_their_imports(tmp_path, monkeypatch):
    (tmp_path / "meam_swing.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('MeamSwing-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=40)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import meam_swing  # noqa: F401  # pyright: ignore[reportMissingImports]

    spec = EnvironmentSpec("MeamSwing-v0", {"g": 2.0}, 3)
    try:
        with open_vector_environment(spec, 2, asynchronous=True, packages=("meam_swing",)) as env:
            env.reset(seed=[0, 1])  # pyright: ignore[reportArgumentType]
            assert env.unwrapped.get_attr("g") == (2.0, 2.0)  # pyright: ignore[reportAttributeAccessIssue]
            steps = [env.step(env.action_space.sample())[3].tolist() for _ in range(3)]
        assert steps == [[False, False]] * 2 + [[True, True]]
    finally:
        gymnasium.registry.pop("MeamSwing-v0", None)


@pytest.mark.parametrize(
    "wrappers",
    [
        [EnvironmentWrapper("FrameStackObservation", {"stack_size": 100})] * 2,
        [EnvironmentWrapper("StickyAction", {"repeat_action_probability": 0.5, "repeat_action_duration": [1, 10**12]})],
        [EnvironmentWrapper("DelayObservation", {"delay": "9" * 20})],
    ],
)
def test_wrappers_multiply_memory_and_time_by_no_more_than_a_thousand(wrappers):
    with pytest.raises(FormatError, match="expected (0 to|at most) 1000"):
        EnvironmentSpec("Pendulum-v1", wrappers=tuple(wrappers))


def test_an_environment_does_not_skip_frames_without_end():
    with pytest.raises(FormatError, match="frame_skip is 10000000; expected 0 to 1000"):
        EnvironmentSpec("Hopper-v5", {"frame_skip": 10**7})

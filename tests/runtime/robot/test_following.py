"""Policies and control loops that follow the robot's contract in their folder."""

import dataclasses
import json
import warnings

import gymnasium
import numpy as np
import pytest

from meam_policy import (
    ActionError,
    ConfigError,
    ControlLoop,
    FormatError,
    IntegrityError,
    MeamPolicy,
    NotFoundError,
    ObservationError,
    PolicySpec,
    SafetySettings,
    SpaceError,
)
from meam_policy.folder.policy_folder import sha256
from meam_policy.robot import RobotContract
from meam_policy.robot.contract_file import contract_text

JOINTS = ("elbow", "wrist")
ROWS = np.random.default_rng(3).integers(-8, 9, (40, 3)).astype(np.float32) / 4


def contract(elbow=None, wrist=None, observation=(), **timing):
    common = {"kind": "target/joint/position", "unit": "rad"}
    action = [{"name": n, "joint": n, **common, **(more or {})} for n, more in zip(JOINTS, (elbow, wrist), strict=True)]
    return RobotContract.from_object({"observation": list(observation), "action": action, "timing": timing})


def measured(**more):
    """Three observation numbers, of which the second measures the elbow."""
    kinds = ("extra/x", "state/joint/position", "state/joint/velocity")
    units = ("1", "rad", "rad/s")
    return [
        {"name": f"o{i}", "kind": kind, "unit": unit, "joint": "elbow" if i else None, **more}
        for i, (kind, unit) in enumerate(zip(kinds, units, strict=True))
    ]


@pytest.fixture
def make_robot(make_policy):
    """Make a folder with a contract in it."""

    def make(robot, **spec):
        linear = make_policy(**{"control_rate_hz": 10.0, **spec})
        text = contract_text(robot).encode()
        (linear.folder / "robot.json").write_bytes(text)
        whole = PolicySpec.from_json((linear.folder / "config.json").read_bytes())
        whole = dataclasses.replace(whole, files={**whole.files, "robot.json": sha256(text)})
        (linear.folder / "config.json").write_text(whole.to_json())
        return linear

    return make


def test_a_folder_without_a_contract_acts_as_before(make_policy):
    policy = make_policy().load(seed=0)
    assert policy.robot is None
    plain = MeamPolicy(policy.spec, policy.session, seed=0, robot=RobotContract())
    for row in ROWS:
        np.testing.assert_array_equal(policy.act(row), plain.act(row))
    assert policy.health() == plain.health()


def test_max_rate_is_obeyed_with_no_argument_given(make_robot):
    policy = make_robot(contract({"max_rate": 0.5}, rate_hz=10)).load(seed=0)
    actions = np.stack([policy.act(row) for row in ROWS])
    change = np.abs(np.diff(actions, axis=0)).max(axis=0)
    assert change[0] == pytest.approx(0.05, rel=1e-6)
    assert change[1] > 0.2
    assert policy.health().rate_limited > 10
    free = make_robot(contract({"max_rate": 0.5}, rate_hz=10)).load(seed=0, safety=SafetySettings(rate_limit=np.inf))
    assert np.abs(np.diff([free.act(row)[0] for row in ROWS])).max() > 0.2


def test_limits_narrower_than_the_box_hold_and_are_counted(make_robot):
    linear = make_robot(contract({"lower": -0.125, "upper": 0.25}))
    policy = linear.load(seed=0)
    actions = np.stack([policy.act(row) for row in ROWS])
    free = np.stack(list(map(MeamPolicy(policy.spec, policy.session, seed=0).act, ROWS)))
    np.testing.assert_array_equal(actions, np.clip(free, [-0.125, -1], [0.25, 1]).astype(np.float32))
    assert policy.health().limited == (free[:, 0] != actions[:, 0]).sum() > 5


@pytest.mark.parametrize(
    ("reaction", "expected"), [("neutral", [0.0, 0.0]), ("home", [0.25, -0.5]), ("hold", None), ("disable", None)]
)
def test_on_failure_is_the_reaction_to_what_is_not_finite(make_robot, reaction, expected):
    robot = contract({"default": 0.25}, {"default": -0.5}, on_failure=reaction)
    policy = make_robot(robot).load(seed=0)
    last = policy.act(ROWS[0])
    if reaction == "disable":
        with pytest.raises(ObservationError):
            policy.act([np.nan, 0, 0])
    else:
        np.testing.assert_array_equal(policy.act([np.nan, 0, 0]), last if expected is None else expected)


def test_an_argument_overrides_the_contract(make_robot):
    policy = make_robot(contract(on_failure="hold")).load(safety=SafetySettings(on_bad_observation="raise"))
    with pytest.raises(ObservationError):
        policy.act([np.nan, 0, 0])


def test_what_is_unfamiliar_is_held_only_where_that_stands_still(make_robot):
    moving = {"representation": "delta_to_last"}
    for robot, still in ((contract(), True), (contract(moving, moving), False)):
        policy = make_robot(robot).load(seed=0)
        last = policy.act(ROWS[0])
        np.testing.assert_array_equal(policy.act([1e4, 0, 0]), last if still else [0, 0])


def test_home_needs_a_home(make_robot):
    linear = make_robot(contract({"default": 0.25}))
    with pytest.raises(ConfigError, match=r'on_bad_action is "home"; expected another reaction, since no robot\.json'):
        linear.load(safety=SafetySettings(on_bad_action="home"))
    with pytest.raises(ConfigError, match=r'overrun is "home"; expected another one, since no robot\.json'):
        ControlLoop(linear.load(), overrun="home", chunking="naive")


def test_a_contract_is_what_config_json_vouches_for(make_robot):
    linear = make_robot(contract())
    file = linear.folder / "robot.json"
    text = file.read_bytes()
    file.write_bytes(text.replace(b"elbow", b"elbos"))
    with pytest.raises(IntegrityError, match=r"robot\.json has SHA-256"):
        linear.load()
    file.unlink()
    with pytest.raises(NotFoundError, match=r"has no robot\.json, which its config\.json names"):
        linear.load()


def test_a_contract_that_nobody_recorded_is_not_followed(make_policy):
    linear = make_policy()
    (linear.folder / "robot.json").write_text(contract_text(contract()))
    with pytest.raises(IntegrityError, match=r"config\.json records no hash of robot\.json"):
        linear.load()


def test_a_contract_of_another_policy_is_refused(make_robot):
    with pytest.raises(FormatError, match=r"robot\.json: timing\.rate_hz is 20; expected 10"):
        make_robot(contract(rate_hz=20)).load()


def test_check_env_reads_the_rate(make_robot):
    class Slow(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        dt = 0.2

    with pytest.raises(SpaceError, match=r"takes 5 steps a second; the policy acts 10 times \(robot\.json\)"):
        make_robot(contract(rate_hz=10), control_rate_hz=None).load().check_env(Slow())


def test_a_loop_takes_rate_age_and_failure_from_the_contract(make_robot):
    robot = contract(rate_hz=10, max_observation_age_s=0.5, on_failure="neutral")
    policy = make_robot(robot, control_rate_hz=None).load(seed=0)
    with ControlLoop(policy, chunking="naive", simulated_delay=0) as loop:
        assert (loop.step(ROWS[0], timestamp=0.0) != 0).any()
        np.testing.assert_array_equal(loop.step(ROWS[1], timestamp=-0.5), [0, 0])
        assert loop.health().stale_observations == 1
    with ControlLoop(policy, 10, chunking="naive", simulated_delay=0, overrun="stop") as loop:
        loop.step(ROWS[0], timestamp=0.0)
        with pytest.raises(ActionError, match="older than"):
            loop.step(ROWS[1], timestamp=-0.5)
    with ControlLoop(policy, chunking="naive", simulated_delay=0, max_observation_age_s=np.inf) as loop:
        loop.step(ROWS[0], timestamp=-100.0)


def test_a_loop_goes_home(make_robot):
    robot = contract({"default": 0.25}, {"default": -0.5}, on_failure="home", max_observation_age_s=0.1)
    with ControlLoop(make_robot(robot).load(seed=0), chunking="naive", simulated_delay=0) as loop:
        loop.step(ROWS[0])
        np.testing.assert_array_equal(loop.step(ROWS[1], timestamp=-9.0), [0.25, -0.5])


@pytest.mark.parametrize(
    ("overrun", "expected"), [("zero", [0.25, -0.5]), ("home", [0.5, -0.75]), ("hold", [0.25, -0.5])]
)
def test_the_last_action_of_a_run_is_within_the_contract(make_robot, overrun, expected):
    robot = contract({"lower": 0.25, "default": 0.5}, {"upper": -0.5, "default": -0.75, "max_rate": 0.5})
    loop = ControlLoop(make_robot(robot).load(seed=0), chunking="naive", overrun=overrun, simulated_delay=0)
    sent = []
    loop.run(lambda: ROWS[0], sent.append, steps=3, send_neutral_on_exit=True)
    np.testing.assert_array_equal(sent[-1], expected)
    assert len(sent) < 14  # and no tick longer there
    assert np.abs(np.diff(np.array(sent)[:, 1])).max() <= 0.05 + 1e-6


def test_a_loop_without_any_rate_is_refused(make_policy):
    with pytest.raises(ConfigError, match=r"rate_hz is None; expected ticks a second, since neither"):
        ControlLoop(make_policy().load(), chunking="naive")


def test_a_loop_faster_than_the_contract_is_refused_where_rates_are_limited(make_robot):
    linear = make_robot(contract({"max_rate": 1.0}, rate_hz=10))
    policy, limited = linear.load(), SafetySettings(rate_limit=0.05)
    message = (
        r"rate_hz is 20; expected at most 10, that of robot\.json: .* whatever rate_limit is given\. Put a robot\.toml"
    )
    for each in (policy, linear.load(safety=limited)):
        with pytest.raises(ConfigError, match=message):
            ControlLoop(each, 20, any_rate=True, chunking="naive")
    ControlLoop(policy, 5, any_rate=True, chunking="naive").close()
    # The remedy.
    remedied = make_robot(contract(rate_hz=10)).load(safety=limited)
    ControlLoop(remedied, 20, any_rate=True, chunking="naive").close()


def test_first_actions_are_blended_in_from_where_the_robot_is(make_robot):
    robot = contract(wrist={"default": -0.5}, observation=measured(), blend_in_s=0.3)
    policy = make_robot(robot).load(seed=0)
    plain = MeamPolicy(policy.spec, policy.session, seed=0)
    blended, free = (ControlLoop(p, 10, chunking="naive", simulated_delay=0) for p in (policy, plain))
    start = np.array([ROWS[0, 1], -0.5])  # the measured elbow, and the wrist's home
    for episode in range(2):
        for tick, weight in enumerate([0.25, 0.5, 0.75, 1.0, 1.0]):
            action, expected = blended.step(ROWS[tick]), free.step(ROWS[tick])
            expected = np.clip(start + weight * (expected - start), -1, 1)
            np.testing.assert_allclose(action, expected, rtol=1e-6, atol=1e-7, err_msg=f"{episode}, {tick}")
        for loop in (blended, free):
            loop.reset(seed=1)
    for loop in (blended, free):
        loop.close()


def test_a_time_to_blend_in_needs_places_to_begin_from(make_robot, make_policy):
    with pytest.raises(ConfigError, match=r"^blend_in_s is 1\.0; expected this only where every action has a default"):
        ControlLoop(make_robot(contract({"default": 0.0})).load(), blend_in_s=1.0, chunking="naive")
    with pytest.raises(ConfigError, match=r"no action is described"):
        ControlLoop(make_policy().load(), 10, blend_in_s=1.0, chunking="naive")


def test_inferences_over_the_budget_are_counted(make_robot):
    policy = make_robot(contract(latency_budget_ms=1e-6)).load(seed=0)
    with ControlLoop(policy, chunking="blocking") as loop:
        for row in ROWS[:5]:
            loop.step(row)
        assert loop.health().over_budget == loop.health().inferences - 1 > 0  # the first is waited for


def test_a_contract_travels_with_the_policy(make_robot, tmp_path):
    policy = make_robot(contract({"max_rate": 1.0})).load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = policy.save_pretrained(tmp_path / "saved")
    assert MeamPolicy.from_pretrained(saved).robot == policy.robot
    assert json.loads((saved / "robot.json").read_text())["action"][0]["max_rate"] == 1


def test_a_preview_is_what_limit_action_then_does_and_counts_nothing(make_robot):
    policy = make_robot(contract({"max_rate": 0.5, "upper": 0.25}, rate_hz=10)).load(seed=0)
    policy.act(ROWS[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32)
    before = policy.health()
    preview = policy.preview_actions(actions)
    np.testing.assert_array_equal(preview, policy.preview_actions(actions))
    assert policy.health() == before
    np.testing.assert_array_equal(preview, [policy.limit_action(action) for action in actions])
    assert policy.health().rate_limited > before.rate_limited
    assert policy.preview_actions(np.zeros((0, 2))).shape == (0, 2)
    for wrong in (np.zeros((3, 3)), np.full((3, 2), np.nan)):
        with pytest.raises(ActionError, match="expected finite numbers"):
            policy.preview_actions(wrong)


def test_the_loops_plan_is_limited_as_its_ticks_are(make_robot):
    policy = make_robot(contract({"max_rate": 0.5}, rate_hz=10)).load(seed=0)
    loop = ControlLoop(policy, chunking="blocking", execute_steps=4, simulated_delay=0)
    expected = np.empty((0, 2))
    for row in ROWS[:24]:
        loop.step(row)
        plan = loop.plan()
        expected = plan.actions if plan.begun else expected
        np.testing.assert_array_equal(plan.actions, expected[-len(plan.actions) :])


def test_limits_that_leave_nothing_are_refused_when_the_contract_is_given(make_robot):
    with pytest.raises(FormatError, match=r"action\[0\]\.max_rate is 1\.0, 0\.1 a tick at 10 Hz; expected more than 5"):
        make_robot(contract({"representation": "delta_to_last", "lower": 0.5, "max_rate": 1.0}, rate_hz=10)).load()

import dataclasses
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meam_policy import (
    ActionError,
    BoxSpec,
    ConfigError,
    Health,
    MeamPolicy,
    ObservationError,
    PolicySpec,
    SafetySettings,
)
from meam_policy.acting.health import note_values
from meam_policy.acting.safety import SafetyShell
from meam_policy.spec import Integration

OBSERVATIONS = np.random.default_rng(3).integers(-8, 9, (40, 3, 3)).astype(np.float32) / 4
# For the property tests, which cannot take a fixture per example.
BOX, UNIT = (BoxSpec((n,), "float32", (-b,) * n, (b,) * n) for n, b in ((3, np.inf), (1, 1.0)))
PLAIN_SPEC = PolicySpec(
    (BOX,), UNIT, 1, 1, (0.0,) * 3, (1.0,) * 3, (0.0,), (1.0,), integration=Integration(1), method="by hand"
)
HOLD = SafetySettings(on_bad_observation="hold")
NEUTRAL = SafetySettings(on_bad_observation="neutral")
REACTIONS = ("raise", "hold", "neutral")


@pytest.fixture
def linear(make_policy):
    """3 observation numbers, chunks of 4 actions of 2 numbers, of which 2 are executed."""
    return make_policy()


def act_along(policy, observations, **arguments):
    return np.stack([policy.act(observation, **arguments) for observation in observations])


def with_nan(observations, *where):
    """Observations [steps, slots, 3] with one number that is not finite at each (step, slot)."""
    broken = observations.copy()
    for number, (step, slot) in enumerate(where):
        broken[step, slot, number % 3] = (np.nan, np.inf, -np.inf)[number % 3]
    return broken


@pytest.mark.parametrize("name", ["on_bad_observation", "on_bad_action", "on_unfamiliar"])
@pytest.mark.parametrize("value", ["stop", "", 1, ["hold"]])
def test_unknown_reaction_is_refused(name, value):
    seen = re.escape(f"{name} is {value!r}")
    with pytest.raises(ConfigError, match=rf"{seen}( \(\w+\))?; expected one of raise, hold, neutral"):
        SafetySettings(**{name: value})


def test_only_an_unfamiliar_observation_may_have_no_reaction():
    assert SafetySettings(on_unfamiliar=None).on_unfamiliar is None
    for name in ("on_bad_observation", "on_bad_action"):
        with pytest.raises(ConfigError, match=f"{name} is None"):
            replace(SafetySettings(), **{name: None})


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, "far", None])
def test_unfamiliarity_limit_that_is_not_above_zero_is_refused(limit):
    with pytest.raises(ConfigError, match="unfamiliarity_limit is"):
        SafetySettings(unfamiliarity_limit=limit)


@pytest.mark.parametrize(
    "limit",
    [
        *(0, -0.1, -1, math.nan, "slow", "2", True, np.True_, {}),
        *([], [0.1, 0.0], [0.1, math.nan], ["2"], [True], [None], [[0.1, 0.1]], [[0.1], 0.1], np.ones((2, 2))),
    ],
)
def test_rate_limit_that_is_no_number_above_0_is_refused_when_the_settings_are_made(limit):
    with pytest.raises(ConfigError, match="rate_limit is .*; expected a number"):
        SafetySettings(rate_limit=limit)


def test_rate_limit_beyond_all_numbers_is_refused_by_its_size():
    with pytest.raises(ConfigError, match="rate_limit is about 1e5000 .*; expected a number"):
        SafetySettings(rate_limit=10**5000)


@pytest.mark.parametrize("limit", [1, 0.5, np.float32(0.5), [0.5, 1], (1, 2), np.array([0.5, 1.0]), math.inf, None])
def test_rate_limits_above_0_are_taken(linear, limit):
    linear.load(safety=SafetySettings(rate_limit=limit))


@pytest.mark.parametrize("limit", [[0.1], [0.1, 0.1, 0.1]])
def test_rate_limit_that_does_not_fit_the_action_is_refused(linear, limit):
    with pytest.raises(ConfigError, match=r"rate_limit is .* expected one number above 0, or 2 of them"):
        linear.load(safety=SafetySettings(rate_limit=limit))


def test_bad_observation_raises_by_default_and_is_counted(make_policy):
    boxes = [BoxSpec((2,), "float32", (-np.inf,) * 2, (np.inf,) * 2, key) for key in ("arm", "wrist")]
    policy = make_policy(observation=boxes).load()
    good = {"arm": np.zeros((3, 2)), "wrist": np.zeros((3, 2))}
    first = policy.act(good, deterministic=True)
    bad = {"arm": np.zeros((3, 2)), "wrist": np.array([[0, 0], [0, -np.inf], [np.nan, 0]])}
    with pytest.raises(ObservationError, match=re.escape('"wrist" is -inf at index [1] of batch row 1; expected')):
        policy.act(bad)
    assert (policy.health().bad_observations, policy.health().steps) == (2, 3)
    # What was queued is still there.
    np.testing.assert_array_equal(policy.act(good, deterministic=True), first)
    assert policy.inferences == 1


def test_hold_repeats_the_last_action_of_the_slot(linear):
    broken = with_nan(OBSERVATIONS[:9], (3, 1), (4, 1), (6, 2))
    actions = act_along(linear.load(safety=HOLD, seed=0), broken)
    np.testing.assert_array_equal(actions[3, 1], actions[2, 1])
    np.testing.assert_array_equal(actions[4, 1], actions[2, 1])
    np.testing.assert_array_equal(actions[6, 2], actions[5, 2])
    assert len(np.unique(actions[:, 0], axis=0)) == 9


@pytest.mark.parametrize("reaction", ["hold", "neutral"])
def test_neutral_action_is_zero_clipped_into_the_bounds(make_policy, reaction):
    action = BoxSpec((3,), "float64", (-1.0, 0.25, -0.75), (1.0, 0.5, -0.1))
    policy = make_policy(action=action).load(safety=SafetySettings(on_bad_observation=reaction))
    # In place of a first action, "hold" has nothing to repeat.
    np.testing.assert_array_equal(policy.act([np.nan, 0, 0]), [0, 0.25, -0.1])


def test_neutral_action_is_taken_in_the_middle_of_an_episode(linear):
    actions = act_along(linear.load(safety=NEUTRAL, seed=0), with_nan(OBSERVATIONS[:5], (3, 1)))
    np.testing.assert_array_equal(actions[3, 1], [0, 0])
    assert (actions[3, [0, 2]] != 0).any(axis=1).all()


@pytest.mark.parametrize("safety", [HOLD, NEUTRAL])
@pytest.mark.parametrize("execute_steps", [1, 2, 4])
def test_other_slots_of_the_batch_are_bit_equal_to_an_undisturbed_run(make_policy, safety, execute_steps):
    random = np.random.default_rng(0)
    linear = make_policy(
        weight=random.normal(size=(3, 8)) / 3, noise_weight=random.normal(size=(8, 8)) / 9, execute_steps=execute_steps
    )
    plain = act_along(linear.load(seed=0), OBSERVATIONS)
    broken = with_nan(OBSERVATIONS, (0, 1), (5, 1), (6, 1), (7, 1), (20, 1), (21, 1))
    disturbed = act_along(linear.load(seed=0, safety=safety), broken)
    np.testing.assert_array_equal(disturbed[:, [0, 2]], plain[:, [0, 2]])
    assert not np.array_equal(disturbed[:, 1], plain[:, 1])


def test_after_recovery_the_slot_starts_a_chunk_from_the_new_observation(linear):
    policy = linear.load(safety=HOLD)
    rows = with_nan(OBSERVATIONS[:6], (1, 1), (2, 1))
    actions = act_along(policy, rows, deterministic=True)
    chunk = linear.chunks([OBSERVATIONS[3, 1]])[0]
    np.testing.assert_array_equal(actions[3:5, 1], chunk[:2])
    np.testing.assert_array_equal(actions[5, 1], linear.chunks([OBSERVATIONS[5, 1]])[0, 0])


def test_hold_does_not_outlive_its_episode(linear):
    policy = linear.load(safety=HOLD)
    act_along(policy, OBSERVATIONS[:3])
    broken = with_nan(OBSERVATIONS[:1], (0, 1), (0, 2))[0]
    last = policy.act(OBSERVATIONS[3])
    actions, _ = policy.predict(broken, episode_start=np.array([False, True, False]))
    np.testing.assert_array_equal(actions[1], [0, 0])
    np.testing.assert_array_equal(actions[2], last[2])
    policy.reset(mask=np.array([False, False, True]))
    np.testing.assert_array_equal(policy.act(broken)[2], [0, 0])
    policy.reset()
    np.testing.assert_array_equal(policy.act(broken)[1:], np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_held_action_is_not_the_callers_array(make_policy, dtype):
    policy = make_policy(action=BoxSpec((2,), dtype, (-1.0,) * 2, (1.0,) * 2)).load(safety=HOLD)
    first = policy.act(np.ones(3))
    kept = first.copy()
    first[:] = 77
    np.testing.assert_array_equal(policy.act(np.full(3, np.nan)), kept)


def test_each_slot_reacts_to_what_is_wrong_with_it(make_policy):
    # Slot 0 sees NaN, 1 is far away, 2 makes the network fail, 3 is well.
    linear = make_policy(weight=np.eye(3, 8) / 8, noise_weight=np.zeros((8, 8)), through="Sqrt", execute_steps=1)
    policy = linear.load(safety=SafetySettings("hold", "hold", "neutral", unfamiliarity_limit=9))
    first = policy.act([[2, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]])
    actions = policy.act([[np.nan, 0, 0], [10, 0, 0], [-2, 0, 0], [8, 0, 0]])
    np.testing.assert_array_equal(first, [[0.5, 0]] * 4)
    np.testing.assert_array_equal(actions, [[0.5, 0], [0, 0], [0.5, 0], [1, 0]])
    seen = policy.health()
    assert (seen.bad_observations, seen.unfamiliar, seen.bad_actions, seen.replaced) == (1, 1, 1, 3)
    policy = linear.load(safety=SafetySettings("neutral", "neutral", "hold", unfamiliarity_limit=9))
    policy.act([[2, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]])
    actions = policy.act([[np.nan, 0, 0], [10, 0, 0], [-2, 0, 0], [8, 0, 0]])
    np.testing.assert_array_equal(actions, [[0, 0], [0.5, 0], [0, 0], [1, 0]])


@pytest.mark.parametrize("through", ["Sqrt", "Log"])
def test_chunk_that_is_not_finite_stops_only_its_slot(make_policy, through):
    linear = make_policy(weight=np.eye(3, 8) / 8, noise_weight=np.zeros((8, 8)), through=through)
    rows = np.abs(OBSERVATIONS) + 1
    plain = act_along(linear.load(), rows[:8, :, [0, 0, 0]])
    broken = rows[:8, :, [0, 0, 0]].copy()
    broken[2:4, 1] *= -1
    chosen = SafetySettings(on_bad_action="hold"), SafetySettings(on_bad_action="neutral")
    for safety, expected in zip(chosen, ([plain[1, 1]] * 2, [[0, 0]] * 2), strict=True):
        policy = linear.load(safety=safety)
        actions = act_along(policy, broken)
        np.testing.assert_array_equal(actions[:, [0, 2]], plain[:, [0, 2]])
        np.testing.assert_array_equal(actions[2:4, 1], expected)
        np.testing.assert_array_equal(actions[4:, 1], plain[4:, 1])
        assert (policy.health().bad_actions, policy.health().replaced) == (2, 2)
    policy = linear.load()
    act_along(policy, broken[:2])
    with pytest.raises(ActionError, match="NaN or infinity"):
        policy.act(broken[2])
    assert (policy.health().bad_actions, policy.health().replaced) == (1, 0)


def test_sums_that_overflow_are_not_taken_for_infinite_actions(make_policy):
    action = BoxSpec((2,), "float32", (-np.inf,) * 2, (np.inf,) * 2)
    policy = make_policy(action=action, weight=np.full((3, 8), 1e38), noise_weight=np.zeros((8, 8))).unchecked()
    np.testing.assert_allclose(policy.act([1, 1, 1]), [3e38, 3e38], rtol=1e-6)
    # Infinities of both signs.
    mixed = make_policy(action=action, weight=[[3e38, -3e38] * 4] * 3, noise_weight=np.zeros((8, 8))).unchecked()
    with pytest.raises(ActionError):
        mixed.act([1, 1, 1])


def bits(dtype):
    """Arrays of one observation batch, of any bits: signalling NaN, infinity and denormal numbers among them."""
    whole = {"float32": np.uint32, "float64": np.uint64}[dtype]
    return hnp.arrays(whole, (3, 3)).map(lambda array: array.view(dtype))


ROWS = st.one_of(
    bits("float32"),
    bits("float64"),
    hnp.arrays(np.float64, (3, 3), elements=st.sampled_from([0, 1, -2, np.nan, np.inf, -np.inf, 1e300])),
)


@pytest.mark.parametrize("through", ["Identity", "Sqrt"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_nothing_but_finite_actions_within_the_bounds_leaves_a_policy(make_policy, through, dtype):
    action = BoxSpec((2,), dtype, (-0.3, -np.inf), (0.1, np.inf))
    linear = make_policy(action=action, weight=np.full((3, 8), 3.0), noise_weight=np.eye(8), through=through)
    policies: dict[SafetySettings, MeamPolicy] = {}

    @settings(max_examples=60, deadline=None)
    @given(
        batches=st.lists(ROWS, min_size=1, max_size=5),
        reactions=st.tuples(*[st.sampled_from(REACTIONS)] * 2, st.sampled_from([*REACTIONS, None])),
        limit=st.sampled_from([2.0, 1e6, math.inf]),
        rate=st.sampled_from([None, 0.1]),
    )
    def check(batches, reactions, limit, rate):
        chosen = SafetySettings(*reactions, unfamiliarity_limit=limit, rate_limit=rate)
        if chosen not in policies:
            policies[chosen] = linear.unchecked(safety=chosen, seed=0)
        policy = policies[chosen]
        policy.reset()
        for rows in batches:
            try:
                actions = policy.act(rows)
            except (ObservationError, ActionError):
                assert "raise" in reactions
                continue
            assert actions.dtype == dtype
            assert np.isfinite(actions).all()
            assert all(policy.spec.action_space.contains(row) for row in actions)
            with np.errstate(all="ignore"):
                bad = ~np.isfinite(rows.astype(np.float32)).all(axis=1)
            if reactions[0] == "neutral" and rate is None:
                assert (actions[bad] == 0).all()

    check()


def test_judging_warns_of_nothing(make_policy):
    policy = make_policy(observation_std=(1e-300, 1.0, 1.0)).unchecked(safety=HOLD)
    signalling = np.array([0, 0x7FA00000, 0], np.uint32).view(np.float32)
    np.testing.assert_array_equal(policy.act(signalling), [0, 0])
    policy.act([1e30, 0, 0])
    assert (policy.health().bad_observations, policy.health().unfamiliar) == (1, 1)
    assert policy.health().max_unfamiliarity == np.finfo(np.float64).max


@pytest.mark.parametrize("limit", [10.0, math.inf])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_unfamiliarity_limit_lets_a_bad_observation_pass(linear, limit, value):
    policy = linear.load(safety=SafetySettings(unfamiliarity_limit=limit))
    with pytest.raises(ObservationError, match="expected a finite number"):
        policy.act([0, value, 0])
    policy = linear.load(safety=SafetySettings(on_bad_observation="hold", unfamiliarity_limit=limit))
    np.testing.assert_array_equal(policy.act([0, value, 0]), [0, 0])
    assert policy.health().bad_observations == 1


def widest(dtype):
    return BoxSpec((2,), dtype, (-np.inf,) * 2, (np.inf,) * 2)


def test_large_action_stays_finite_in_a_float16_box_without_bounds(make_policy):
    weights = {"weight": np.full((3, 8), 1e6), "noise_weight": np.zeros((8, 8))}
    policy = make_policy(action=widest("float16"), **weights).unchecked()
    largest = np.finfo(np.float16).max
    np.testing.assert_array_equal(policy.act([1, 1, 1]), [largest, largest])
    policy.reset()
    np.testing.assert_array_equal(policy.act([-1, -1, -1]), [-largest, -largest])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_actions_of_an_integer_box_are_rounded_within_its_bounds(make_policy, dtype):
    low, high = (0.0, 1.0) if dtype in ("uint8", "bool") else (-3.0, 2.0)
    action = BoxSpec((2,), dtype, (low, low), (high, high))
    policy = make_policy(
        action=action, weight=[[0.75] * 8, [0.25] * 8, [9.0] * 8], noise_weight=np.zeros((8, 8)), execute_steps=1
    ).load()
    for row, expected in (([1, 0, 0], 1), ([0, 1, 0], 0), ([0, 0, 1], high), ([0, 0, -1], low)):
        action = policy.act(row)
        assert action.dtype == dtype
        np.testing.assert_array_equal(action, [expected, expected])


def shell_of(make_spec, dtype="float32", low=-1.0, high=1.0, slots=2, **fields):
    health = Health()
    spec = make_spec(action=BoxSpec((slots,), dtype, (low,) * slots, (high,) * slots))
    return SafetyShell(spec, SafetySettings(**fields), health), health


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rate", [1e-4, 0.03, 0.7, (0.05, 0.5)])
def test_action_never_changes_by_more_than_the_rate_limit(make_spec, dtype, rate):
    shell, health = shell_of(make_spec, dtype, -0.3, 0.7, rate_limit=rate)
    random = np.random.default_rng(0)
    wanted = (random.uniform(-1, 1, (300, 5, 2)) * random.choice([0.01, 1], (300, 5, 2))).astype(np.float32)
    actions = np.stack([shell.limit(batch) for batch in wanted])
    assert actions.dtype == dtype
    clipped = np.clip(wanted.astype(np.float64), np.array(-0.3, dtype), np.array(0.7, dtype))
    np.testing.assert_array_equal(actions[0], clipped[0].astype(dtype))
    rounding = np.finfo(dtype).eps / 2  # of numbers below 1
    change = np.abs(np.diff(actions.astype(np.float64), axis=0))
    assert (change <= np.asarray(rate) + rounding).all()
    # The nearest one to what the policy wants, and counted where it is another.
    before, wished = actions[:-1].astype(np.float64), clipped[1:]
    expected = before + np.clip(wished - before, -np.asarray(rate), rate)
    np.testing.assert_allclose(actions[1:], expected, rtol=0, atol=rounding)
    excess = (np.abs(wished - before) - rate).max(axis=-1)
    assert 0 < (excess > 2 * rounding).sum() <= health.rate_limited <= (excess > -2 * rounding).sum()
    assert health.steps == 1500


def test_rate_limit_of_many_small_steps_does_not_drift(make_spec):
    shell, _ = shell_of(make_spec, "float16", -100.0, 100.0, rate_limit=0.01)
    actions = [shell.limit(np.array([[0.0, 60.0]], np.float32))[0]]
    actions += [shell.limit(np.array([[0.1, 61.0]], np.float32))[0] for _ in range(40)]
    change = np.abs(np.diff(np.array(actions, np.float64), axis=0))
    # The rate is less than half a step of float16 at 60, where nothing may move at all.
    assert change[:, 1].max() == 0
    assert change[:, 0].max() <= 0.01 + np.finfo(np.float16).eps * 0.1
    assert actions[-1][0] == np.float16(0.1)


def test_rate_limit_holds_across_chunks_and_starts_anew_with_the_episode(linear):
    plain = linear.load(seed=0)
    policy = linear.load(seed=0, safety=SafetySettings(rate_limit=0.05))
    wanted, actions = act_along(plain, OBSERVATIONS), act_along(policy, OBSERVATIONS)
    np.testing.assert_array_equal(actions[0], wanted[0])
    assert np.abs(np.diff(wanted, axis=0)).max() > 0.5
    assert np.abs(np.diff(actions, axis=0)).max() <= 0.05 + 1e-7
    policy.reset(seed=1)
    plain.reset(seed=1)
    np.testing.assert_array_equal(policy.act(OBSERVATIONS[0]), plain.act(OBSERVATIONS[0]))
    assert np.abs(wanted[0] - actions[-1]).max() > 0.05


def test_reset_of_a_slot_frees_only_its_first_action(linear):
    policy = linear.load(seed=0, safety=SafetySettings(rate_limit=0.01))
    last = act_along(policy, OBSERVATIONS[:4])[-1]
    far = -4 * np.sign(last)[:, [0, 1, 0]]
    policy.reset(mask=np.array([True, False, False]))
    actions = policy.act(far, deterministic=True)
    assert np.abs(actions - last)[0].max() > 0.01
    assert np.abs(actions - last)[1:].max() <= 0.01 + 1e-7
    np.testing.assert_array_equal(actions[0], linear.chunks(far)[0, 0])


@pytest.fixture
def copying(make_policy):
    """Every action number is the first observation number."""
    first = np.zeros((3, 8))
    first[0] = 1
    return make_policy(weight=first, noise_weight=np.zeros((8, 8)), execute_steps=1)


def test_held_and_neutral_actions_keep_the_rate(copying):
    limits = {"on_bad_observation": "neutral", "on_unfamiliar": "hold", "rate_limit": 0.25, "unfamiliarity_limit": 100}
    policy = copying.load(safety=SafetySettings(**limits))
    bad, far = [np.nan, 0, 0], [1e3, 0, 0]
    actions = act_along(policy, [[1, 0, 0], bad, bad, far, bad, bad, bad, [-1, 0, 0], far])
    np.testing.assert_array_equal(actions[:, 0], [1, 0.75, 0.5, 0.5, 0.25, 0, 0, -0.25, -0.25])
    assert policy.health().rate_limited == 4
    assert policy.health().replaced == 7


@settings(max_examples=60, deadline=None)
@given(
    rows=hnp.arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32)),
    mean=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    std=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    limit=st.floats(0.1, 1e3),
)
def test_unfamiliarity_is_the_largest_distance_in_standard_deviations(rows, mean, std, limit):
    health = Health()
    spec = replace(PLAIN_SPEC, observation_mean=tuple(mean), observation_std=tuple(std))
    shell = SafetyShell(spec, SafetySettings(on_unfamiliar=None, unfamiliarity_limit=limit), health)
    expected = [max(abs(float(o) - m) / s for o, m, s in zip(row, mean, std, strict=True)) for row in rows]
    for number, row in enumerate(rows):
        assert shell.judge(row[None]) == {}
        assert health.unfamiliarity == pytest.approx(expected[number], rel=1e-12)
        assert health.max_unfamiliarity == pytest.approx(max(expected[: number + 1]), rel=1e-12)
    shell.judge(rows)
    assert health.unfamiliarity == pytest.approx(max(expected), rel=1e-12)
    assert health.unfamiliar == 2 * sum(distance > limit for distance in expected)


def test_the_last_action_is_held_at_an_unfamiliar_observation_by_default(linear):
    policy = linear.load(seed=0)
    before = policy.act([1, 0, 0])
    np.testing.assert_array_equal(policy.act([11, 0, 0]), before)
    assert (policy.health().unfamiliar, policy.health().replaced) == (1, 1)


def test_unfamiliar_observation_is_only_counted_if_asked(linear):
    safety = SafetySettings(on_unfamiliar=None, unfamiliarity_limit=1.5)
    plain, policy = linear.load(seed=0), linear.load(seed=0, safety=safety)
    np.testing.assert_array_equal(act_along(policy, OBSERVATIONS), act_along(plain, OBSERVATIONS))
    expected = int((np.abs(OBSERVATIONS) > 1.5).any(axis=2).sum())
    assert 0 < expected < 120
    assert (policy.health().unfamiliar, policy.health().replaced) == (expected, 0)
    assert policy.health().max_unfamiliarity == 2
    assert plain.health().unfamiliar == 0


def test_observation_exactly_at_the_limit_is_familiar(linear):
    policy = linear.load(safety=SafetySettings(on_unfamiliar="raise", unfamiliarity_limit=2))
    policy.act([2, -2, 0])
    with pytest.raises(ObservationError, match="2.25 standard deviations from the training data; expected at most 2"):
        policy.act([2, -2.25, 0])
    assert policy.health().unfamiliar == 1


@pytest.mark.parametrize("reaction", ["hold", "neutral"])
def test_reaction_to_an_unfamiliar_observation_stops_only_its_slot(linear, reaction):
    rows = np.clip(OBSERVATIONS[:8], -1, 1)
    plain = act_along(linear.load(seed=0), rows)
    rows[3:5, 1, 0] = 7
    policy = linear.load(seed=0, safety=SafetySettings(on_unfamiliar=reaction, unfamiliarity_limit=5))
    actions = act_along(policy, rows)
    np.testing.assert_array_equal(actions[:, [0, 2]], plain[:, [0, 2]])
    np.testing.assert_array_equal(actions[3:5, 1], [plain[2, 1] if reaction == "hold" else [0, 0]] * 2)
    assert (policy.health().unfamiliar, policy.health().replaced, policy.health().unfamiliarity) == (2, 2, 1)


def test_refused_observation_changes_nothing_but_the_counters(linear):
    safety = SafetySettings(on_unfamiliar="raise", unfamiliarity_limit=5, rate_limit=0.5)
    plain, policy = linear.load(seed=0, safety=safety), linear.load(seed=0, safety=safety)
    for row in OBSERVATIONS[:6, 0]:
        for bad in ([9, 0, 0], [np.nan, 0, 0]):
            with pytest.raises(ObservationError):
                policy.predict(bad)
        np.testing.assert_array_equal(policy.act(row), plain.act(row))
    assert policy.health().inferences == plain.health().inferences == 3


def test_health_is_a_copy_and_json_data(linear):
    policy = linear.load(seed=0)
    before = policy.health()
    assert before == Health()
    assert before.to_json()["value"] is None
    assert before.to_json()["unfamiliarity"] is None
    act_along(policy, OBSERVATIONS[:5])
    seen = policy.health()
    assert before.steps == 0
    assert (seen.steps, seen.inferences, seen.replaced) == (15, 3, 0)
    assert json.loads(json.dumps(seen.to_json())) == {**vars(seen), "value": None, "disagreement": None}
    seen.steps = 0
    assert policy.health().steps == 15


def test_health_as_a_dictionary_is_json_before_and_after_acting(linear, make_policy):
    for policy in (linear.load(), make_policy(best_of=3).load()):
        for _ in range(2):
            found = dataclasses.asdict(policy.health())
            assert json.loads(json.dumps(found, allow_nan=False)) == found == policy.health().to_json()
            policy.act(OBSERVATIONS[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_none(value):
    health = Health(value=1.0, disagreement=1.0)
    note_values(health, np.array([1, value, -value], np.float32), np.array([value], np.float32))
    assert (health.value, health.disagreement) == (None, None)
    note_values(health, np.array([1, 2], np.float32), np.array([0.5, 0.25], np.float32))
    assert (health.value, health.disagreement) == (1.0, 0.5)


def test_sampled_chunks_are_not_counted(linear):
    policy = linear.load()
    policy.sample(OBSERVATIONS[0])
    assert policy.health() == Health()
    policy.predict_action_chunk(OBSERVATIONS[0])
    assert policy.health().inferences == 1


def test_graph_that_chooses_by_value_tells_value_and_disagreement(make_policy):
    linear = make_policy(best_of=3)
    policy = linear.load(seed=0)
    assert policy.health().value is None
    noise = np.random.default_rng(0).integers(-8, 9, (3, 24)) / 8
    policy.select_action(OBSERVATIONS[0], noise=noise)
    sums = linear.samples(OBSERVATIONS[0], noise).sum(axis=(2, 3))
    assert policy.health().value == sums.max(axis=1).min()
    assert policy.health().disagreement == np.ptp(sums, axis=1).max()
    assert policy.health().to_json()["value"] == policy.health().value


def test_graph_that_does_not_choose_has_no_value(linear):
    policy = linear.load()
    policy.act(OBSERVATIONS[0])
    assert policy.health().value is None
    assert policy.health().disagreement is None

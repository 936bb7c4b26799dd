import contextlib
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.errors import DatasetError, MeamError, NotFoundError
from meam_policy.spec import BoxSpec
from meam_training.data.action_range import action_range
from meam_training.data.dataset import OfflineDataset
from meam_training.networks.policy_module import PolicyModule
from meam_training.trainer import make_spec, train

UNBOUNDED = spaces.Box(-np.inf, np.inf, (3,), np.float64)
UNIT = spaces.Box(-1, 1, (2,), np.float32)
TASK = "pointmaze-medium-navigate-singletask-task3-v0"


def arrays(**changes):
    """Two episodes, of three and four steps."""
    generator = np.random.default_rng(0)
    valid = {
        "observations": generator.normal(size=(7, 3)),
        "actions": generator.uniform(-1, 1, size=(7, 2)),
        "rewards": generator.normal(size=7),
        "next_observations": generator.normal(size=(7, 3)),
        "terminations": np.array([0, 0, 1, 0, 0, 0, 0], bool),
        "truncations": np.array([0, 0, 0, 0, 0, 0, 1], bool),
    }
    return {**valid, **changes}


def spoiled(field, row, value):
    given = arrays()
    given[field] = given[field].copy()
    given[field][row] = value
    return given


class Gadget:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


# From arrays


def test_arrays_are_kept_as_they_are():
    given = arrays()
    data = OfflineDataset.from_arrays(**given, dataset_id="a", environment_id="b", control_rate_hz=20.0)
    for name in ("observations", "actions", "rewards", "next_observations"):
        assert getattr(data, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(data, name), given[name].astype(np.float32))
    np.testing.assert_array_equal(data.terminations, given["terminations"])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [2, 6])
    assert (len(data), data.observation_dim, data.action_dim) == (7, 3, 2)
    assert (data.dataset_id, data.environment_id, data.control_rate_hz) == ("a", "b", 20.0)
    assert data.action_box.low == (-1, -1)
    assert set(data.observation_boxes[0].high) == {np.inf}


def test_a_data_set_shows_itself_in_one_line(dataset):
    assert repr(dataset) == (
        "OfflineDataset('tests/tiny-v0', transitions=120, episodes=6, observation_dim=3, action_dim=2)"
    )


def test_a_trailing_open_episode_ends_at_the_last_row_as_a_truncation():
    data = OfflineDataset.from_arrays(**arrays(truncations=np.zeros(7, bool)))
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [2, 6])
    assert not data.terminations[6]


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=30))
def test_episode_returns_are_sums_of_rewards(rows):
    rewards, ends = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    data = OfflineDataset.from_arrays(np.zeros(n), np.zeros(n), rewards, np.zeros(n), np.zeros(n, bool), ends)
    expected = [float(part.sum()) for part in np.split(rewards, np.flatnonzero(ends) + 1) if len(part)]
    np.testing.assert_allclose(data.episode_returns, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_episode_and_step(field, value):
    with pytest.raises(DatasetError, match=rf"{field} is {value} at episode 1, step 1, index 0; .*1 of 7 rows"):
        OfflineDataset.from_arrays(**spoiled(field, 4, value))


def test_a_number_too_large_for_float32_is_refused():
    with pytest.raises(DatasetError, match=r"rewards is 1e\+300 at episode 0, step 2.*finite"):
        OfflineDataset.from_arrays(**spoiled("rewards", 2, 1e300))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("observations", (7, 4)),
        ("observations", (7,)),
        ("observations", (7, 3, 1)),
        ("next_observations", (7, 2)),
        ("actions", (7, 3)),
        ("actions", (2, 7)),
        ("actions", ()),
        ("rewards", (7, 2)),
        ("rewards", ()),
    ],
)
def test_a_shape_that_differs_from_its_space_is_refused(field, shape):
    given = arrays(**{field: np.zeros(shape)})
    with pytest.raises(DatasetError, match=rf"{field} has shape \({', '.join(map(str, shape))}"):
        OfflineDataset.from_arrays(**given, observation_space=UNBOUNDED, action_space=UNIT)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("length", [0, 6, 8])
def test_lengths_that_differ_are_refused(field, length):
    given = arrays(**{field: np.zeros((length, *arrays()[field].shape[1:]))})
    with pytest.raises(DatasetError, match=rf"{field} has shape \({length}.*expected \(7"):
        OfflineDataset.from_arrays(**given)


def test_flags_of_different_lengths_are_refused():
    with pytest.raises(DatasetError, match="terminations has 7 rows and truncations 6"):
        OfflineDataset.from_arrays(**arrays(truncations=np.zeros(6, bool)))


@pytest.mark.parametrize("flags", [np.full(7, 2), np.full(7, np.nan), np.zeros((7, 1)), np.float64(1), ["yes"] * 7])
def test_flags_other_than_zero_and_one_are_refused(flags):
    with pytest.raises(DatasetError, match="terminations has"):
        OfflineDataset.from_arrays(**arrays(terminations=flags))


def test_empty_data_is_refused():
    with pytest.raises(DatasetError, match="no transitions"):
        OfflineDataset.from_arrays(**{name: values[:0] for name, values in arrays().items()})


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("space", [UNBOUNDED, None])
def test_ragged_rows_are_refused(field, space):
    with pytest.raises(DatasetError, match=f"{field} is ragged"):
        OfflineDataset.from_arrays(**arrays(**{field: [[1.0, 2.0], [1.0]] * 3 + [[0.0]]}), observation_space=space)


@pytest.mark.parametrize(
    "values", [np.zeros((7, 3), complex), np.full((7, 3), "a"), np.full((7, 3), None), np.zeros((7, 3), "M8[s]")]
)
def test_what_is_no_real_number_is_refused(values):
    with pytest.raises(DatasetError, match="observations has type .*; expected real numbers"):
        OfflineDataset.from_arrays(**arrays(observations=values))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.float16, ">f8"])
def test_integers_booleans_and_other_floats_are_taken_by_value(dtype):
    values = np.array([[0, 1, 1], [1, 0, 1]] * 4)[:7]
    data = OfflineDataset.from_arrays(
        **arrays(observations=values.astype(dtype), rewards=values[:, 0].astype(dtype), actions=values.astype(dtype))
    )
    np.testing.assert_array_equal(data.observations, values)
    np.testing.assert_array_equal(data.actions, values)
    np.testing.assert_array_equal(data.rewards, values[:, 0])


def test_lists_and_strided_arrays_are_taken_by_value():
    given = arrays()
    wide = np.repeat(given["observations"], 2, axis=1)[:, ::2]
    from_lists = OfflineDataset.from_arrays(**{name: values.tolist() for name, values in given.items()})
    from_strided = OfflineDataset.from_arrays(**arrays(observations=wide))
    np.testing.assert_array_equal(from_lists.observations, from_strided.observations)
    np.testing.assert_array_equal(from_lists.episode_ends, from_strided.episode_ends)


@pytest.mark.parametrize("field", ["observations", "next_observations", "actions"])
def test_a_value_out_of_its_space_is_named(field):
    given = arrays(observations=np.zeros((7, 3)), next_observations=np.zeros((7, 3)))
    given[field] = given[field].copy()
    given[field][5, 1] = 1.01 if field == "actions" else 3.01
    with pytest.raises(DatasetError, match=rf"{field} is \d.01 at episode 1, step 2, index 1; .*\[-1.0, 1.0\]"):
        OfflineDataset.from_arrays(**given, observation_space=spaces.Box(-1, 1, (3,)), action_space=UNIT)


def test_rounding_beyond_the_bounds_is_accepted():
    data = OfflineDataset.from_arrays(**spoiled("actions", 0, 1 + 1e-5))
    assert data.actions[0, 0] > 1


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-3e38, 3e38, (2,)),
        spaces.Discrete(3),
        spaces.MultiBinary(2),
    ],
)
def test_an_action_space_without_a_finite_box_is_refused(space):
    with pytest.raises(DatasetError, match="action space"):
        OfflineDataset.from_arrays(**arrays(actions=np.zeros((7, 2))), action_space=space)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.Tuple((UNBOUNDED,)),
        spaces.Dict({"a": spaces.Discrete(2)}),
        spaces.Dict({"a": spaces.Dict({"b": UNBOUNDED})}),
        spaces.Dict({}),
    ],
)
def test_an_observation_space_other_than_boxes_is_refused(space):
    with pytest.raises(DatasetError, match=r"(?s)observation space.*expected"):
        OfflineDataset.from_arrays(**arrays(), observation_space=space)


def test_a_dict_observation_is_flattened_in_the_order_of_its_space_not_of_its_letters():
    z, a = np.arange(14.0).reshape(7, 2), np.arange(7.0)[:, None, None] + 100
    space = spaces.Dict([("z", spaces.Box(-np.inf, np.inf, (2,))), ("a", spaces.Box(-np.inf, np.inf, (1, 1)))])
    observations = {"a": a, "z": z}
    data = OfflineDataset.from_arrays(
        **arrays(observations=observations, next_observations=observations), observation_space=space
    )
    assert [(box.key, box.shape) for box in data.observation_boxes] == [("z", (2,)), ("a", (1, 1))]
    np.testing.assert_array_equal(data.observations, np.concatenate([z, a[:, 0]], axis=1))
    space = make_spec_of(data).observation_space
    assert isinstance(space, spaces.Dict)
    assert list(space) == ["z", "a"]


def test_a_dict_observation_without_a_space_keeps_its_own_order():
    observations = {"z": np.zeros((7, 2)), "a": np.ones(7)}
    data = OfflineDataset.from_arrays(**arrays(observations=observations, next_observations=observations))
    assert [box.key for box in data.observation_boxes] == ["z", "a"]
    np.testing.assert_array_equal(data.observations, [[0, 0, 1]] * 7)


@pytest.mark.parametrize("keys", [["z"], ["z", "a", "b"], []])
def test_missing_and_extra_keys_are_refused(keys):
    space = spaces.Dict([("z", UNBOUNDED), ("a", UNBOUNDED)])
    observations = dict.fromkeys(keys, np.zeros((7, 3)))
    with pytest.raises(DatasetError, match=r"observations has \[.*expected a mapping with the keys \['z', 'a'\]"):
        OfflineDataset.from_arrays(**arrays(observations=observations), observation_space=space)


def test_arrays_for_a_dict_and_mappings_for_a_box_are_refused():
    with pytest.raises(DatasetError, match="expected a mapping"):
        OfflineDataset.from_arrays(**arrays(), observation_space=spaces.Dict({"a": UNBOUNDED}))
    with pytest.raises(DatasetError, match="observations is a mapping"):
        OfflineDataset.from_arrays(**arrays(observations={"a": np.zeros((7, 3))}), observation_space=UNBOUNDED)


# Statistics


def make_spec_of(data, **overrides):
    from meam_training.config import TrainConfig

    return make_spec(TrainConfig.preset("bc", **overrides), data)


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.3, 1e-9, 123456.789, 1e30])
def test_a_constant_observation_has_unit_scale(constant):
    observations = arrays()["observations"]
    observations[:, 1] = constant
    spec = make_spec_of(OfflineDataset.from_arrays(**arrays(observations=observations)))
    assert spec.observation_std[1] == 1.0
    offset = (spec.observation_offset or (0, 0, 0))[1]
    assert offset + spec.observation_mean[1] == pytest.approx(constant, rel=1e-7, abs=1e-9)
    assert spec.observation_std[0] == pytest.approx(observations[:, 0].astype(np.float32).std(dtype=np.float64))


def test_data_with_a_constant_observation_trains(make_config, tmp_path):
    observations = arrays()["observations"]
    observations[:, 1] = 123456.789
    data = OfflineDataset.from_arrays(**arrays(observations=observations))
    networks = train(make_config(steps=2), data, tmp_path).load_networks()
    assert all(value.isfinite().all() for value in networks.state_dict().values())


def test_actions_that_fill_their_box_are_normalised_by_it():
    space = spaces.Box(np.array([0, -4], np.float32), np.array([10, -2], np.float32))
    actions = np.random.default_rng(0).uniform([0, -4], [10, -2], (7, 2))
    actions[:2] = [0.5, -2.1], [9.5, -3.9]
    spec = make_spec_of(OfflineDataset.from_arrays(**arrays(actions=actions), action_space=space), chunk_size=3)
    assert spec.action_offset == (5, -3)
    assert spec.action_scale == (5, 1)
    assert (spec.chunk_size, spec.execute_steps, spec.noise_dim) == (3, 3, 6)


def test_actions_are_scaled_by_their_range_in_a_box_that_is_far_wider():
    actions = np.random.default_rng(0).uniform([0, -4], [10, -2], (7, 2))
    space = spaces.Box(-100, 100, (2,))
    data = OfflineDataset.from_arrays(**arrays(actions=actions), action_space=space)
    low, high = actions.min(axis=0), actions.max(axis=0)
    spec = make_spec_of(data, chunk_size=3)
    np.testing.assert_allclose(spec.action_offset, (low + high) / 2, rtol=1e-6)
    np.testing.assert_allclose(spec.action_scale, 0.6 * (high - low), rtol=1e-6)
    assert spec.action.high == (100, 100)
    assert make_spec_of(data, chunk_size=3, action_scaling="box").action_scale == (100, 100)


def test_unbounded_actions_are_taken_with_given_bounds():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(DatasetError, match=r"index 0: \[-inf, inf\]; .*action_low= .*--action-low"):
        OfflineDataset.from_arrays(**arrays(), action_space=space)
    data = OfflineDataset.from_arrays(**arrays(), action_space=space, action_low=-2, action_high=[1, 3])
    assert (data.action_box.low, data.action_box.high) == ((-2, -2), (1, 3))
    assert OfflineDataset.from_arrays(**spoiled("actions", 0, 1.5), action_high=2).action_box.high == (2, 2)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"action_low": 0.5, "action_high": 0.25}, r"contradict each other at index 0: low is 0.5, high is 0.25"),
        ({"action_low": [-1, -2]}, r"\[-2.0, 1.0\] at index 1, beyond those of the action space, \[-1.0, 1.0\]"),
        ({"action_high": [1, 1, 1]}, "action_high is .*; expected one number, or 2"),
        ({"action_high": float("nan")}, "no usable bounds at index 0"),
    ],
)
def test_contradictory_action_bounds_are_refused(bounds, message):
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_arrays(**arrays(), action_space=UNIT, **bounds)


def test_actions_beyond_the_bounds_are_clipped_if_asked():
    with pytest.raises(DatasetError, match=r"actions is 1.5 .*clip_actions=True \(--clip-actions"):
        OfflineDataset.from_arrays(**spoiled("actions", 1, 1.5))
    data = OfflineDataset.from_arrays(**spoiled("actions", 1, 1.5), clip_actions=True)
    np.testing.assert_array_equal(data.actions[1], 1)
    np.testing.assert_array_equal(data.actions[2:], arrays()["actions"][2:].astype(np.float32))


def test_clipped_actions_are_counted_by_episode():
    given = arrays()  # episodes of 3 and 4 rows
    given["actions"][:] = 0
    given["actions"][1, 0], given["actions"][2] = -1.25, (1.5, 1.75)
    given["actions"][5, 1], given["actions"][6, 0] = 1.00005, 3  # the first is rounding
    data = OfflineDataset.from_arrays(**given, clip_actions=True)
    assert data.clipped == ((0, 2, 0.75, 1), (1, 1, 2.0, 0))
    assert data.choose_episodes([1]).clipped == ((0, 1, 2.0, 0),)
    assert data.choose_episodes(slice(0, 1)).clipped == ((0, 2, 0.75, 1),)
    assert [tuple(each) for each in OfflineDataset.joined([data, data]).clipped][2:] == [
        (2, 2, 0.75, 1),
        (3, 1, 2.0, 0),
    ]


def test_observations_slightly_beyond_their_space_are_taken_as_they_are_with_a_warning():
    given = arrays(observations=np.zeros((7, 3)), next_observations=np.zeros((7, 3)))
    given["observations"][5, 1] = 1.25
    with pytest.warns(UserWarning, match=r"observations is 1.25 at episode 1, step 2, index 1, outside") as warned:
        data = OfflineDataset.from_arrays(**given, observation_space=spaces.Box(-1, 1, (3,)))
    assert len(warned) == 1
    assert data.observations[5, 1] == 1.25


def map_coordinates(rows=200) -> tuple[dict[str, Any], np.ndarray]:
    """Arrays whose second number is a northing that moves by metres."""
    given = {name: np.repeat(values[:1], rows, axis=0) for name, values in arrays().items()}
    moves = np.random.default_rng(0).normal([0, 3.14159, 0], [1, 5, 100], (rows, 3))
    far = moves + np.array([0, 4.5e6, 0])
    return {**given, "observations": far, "next_observations": far.copy()}, moves


def test_observations_far_from_zero_are_kept_less_an_offset_with_all_their_digits():
    given, moves = map_coordinates()
    data = OfflineDataset.from_arrays(**given)
    first, second, third = data.observation_offset
    assert (first, third) == (0, 0)
    assert second == pytest.approx(4.5e6, abs=10)
    assert second == round(second, -1)  # few digits
    expected = moves + np.array([0, 4.5e6 - second, 0])
    np.testing.assert_allclose(data.observations, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(data.next_observations, expected, rtol=1e-7, atol=1e-8)
    rounded = given["observations"].astype(np.float32)
    assert np.abs(rounded - given["observations"]).max() > 0.2  # what float32 alone does
    assert make_spec_of(data, chunk_size=1).observation_offset == data.observation_offset
    spec = make_spec_of(data, chunk_size=1)
    assert spec.observation_mean[1] == pytest.approx(given["observations"][:, 1].mean() - second, abs=1e-6)


def test_ordinary_observations_have_no_offset():
    given: dict[str, Any] = {name: np.repeat(values, 30, axis=0) for name, values in arrays().items()}
    given["observations"] = np.random.default_rng(0).normal([90, -40, 3], [0.01, 0.1, 0], (210, 3))
    assert OfflineDataset.from_arrays(**given).observation_offset == ()


def test_a_position_that_stood_still_in_the_first_rows_has_an_offset_too():
    given, _ = map_coordinates()
    given["observations"][:, 1] = 4.5e6 + 0.25
    data = OfflineDataset.from_arrays(**given)
    assert data.observation_offset[1] == pytest.approx(4.5e6, abs=1)
    assert make_spec_of(data, chunk_size=1).observation_std[1] == 1  # and stands still


def test_the_jitter_of_a_position_that_stands_still_far_from_zero_is_no_movement():
    given, _ = map_coordinates()
    given["observations"][:, 1] = 4.5e6 + 2e-5 * np.random.default_rng(0).normal(size=200)
    assert make_spec_of(OfflineDataset.from_arrays(**given), chunk_size=1).observation_std[1] == 1


def test_an_offset_tells_data_apart_that_would_be_the_same_without_it():
    given, _ = map_coordinates()
    data = OfflineDataset.from_arrays(**given)
    moved = {name: given[name] + [0, 1e6, 0] for name in ("observations", "next_observations")}
    other = OfflineDataset.from_arrays(**{**given, **moved})
    np.testing.assert_array_equal(data.observations, other.observations)
    assert data.fingerprint != other.fingerprint


def test_digits_that_were_lost_in_recording_are_told():
    given = arrays()
    given["observations"] = (given["observations"] * 0.01 + [0, 5e6, 0]).astype(np.float32)
    given["observations"][0, 1] += 1
    with pytest.warns(UserWarning, match=r"observations at index 1 are about 500000.* recorded as float32, .* float64"):
        OfflineDataset.from_arrays(**given)


@pytest.mark.parametrize("first_is_map", [True, False])
def test_joined_data_sets_have_one_offset(first_is_map):
    given, moves = map_coordinates()
    here = OfflineDataset.from_arrays(**given)
    elsewhere = {name: given[name] + [0, 700.0, 0] for name in ("observations", "next_observations")}
    other = OfflineDataset.from_arrays(**{**given, **elsewhere})
    assert here.observation_offset != other.observation_offset
    joined = OfflineDataset.joined([here, other] if first_is_map else [other, here])
    positions = joined.observations[:, 1] + joined.observation_offset[1]
    expected = [moves[:, 1] + 4.5e6, moves[:, 1] + 4.5e6 + 700]
    np.testing.assert_allclose(positions, np.concatenate(expected if first_is_map else expected[::-1]), atol=1e-4)
    plain = OfflineDataset.from_arrays(**{**given, "observations": moves, "next_observations": moves})
    both = OfflineDataset.joined([plain, here])
    assert both.observation_offset == here.observation_offset
    np.testing.assert_allclose(both.observations[:200, 1] + both.observation_offset[1], moves[:, 1], atol=0.5)


def test_a_number_that_only_jitters_has_unit_scale():
    generator = np.random.default_rng(0)
    observations = generator.normal([0, 1.57, 0], [1, 2e-5, 2e-5], (4000, 3))
    rows = {name: np.repeat(values[:1], 4000, axis=0) for name, values in arrays().items()}
    data = OfflineDataset.from_arrays(**{**rows, "observations": observations})
    assert make_spec_of(data, chunk_size=1).observation_std[1] == 1
    assert make_spec_of(data, chunk_size=1).observation_std[2] == pytest.approx(2e-5, rel=0.05)  # of no known size
    declared = spaces.Box(-3, 3, (3,))
    rows["next_observations"] = np.zeros((4000, 3))
    with pytest.warns(UserWarning, match="outside its declared space"):
        data = OfflineDataset.from_arrays(**{**rows, "observations": observations}, observation_space=declared)
    assert make_spec_of(data, chunk_size=1).observation_std[1:] == (1, 1)


def test_a_flag_that_is_rarely_set_is_within_ten_scales_and_a_single_spike_is_not():
    observations = np.random.default_rng(0).normal(size=(20000, 3))
    observations[:, 1] = np.arange(20000) % 1000 == 7
    observations[11, 2] = 500
    rows = {name: np.repeat(values[:1], 20000, axis=0) for name, values in arrays().items()}
    spec = make_spec_of(OfflineDataset.from_arrays(**{**rows, "observations": observations}), chunk_size=1)
    distance = (observations - spec.observation_mean) / np.array(spec.observation_std)
    assert np.abs(distance[:, 1]).max() == pytest.approx(10)
    assert np.abs(distance[:, 2]).max() > 50


def test_a_single_spike_of_an_action_leaves_the_range_to_the_others():
    actions = np.random.default_rng(0).normal(0, 0.1, (5000, 2))
    actions[7, 0], actions[100:103, 1] = 90, -0.6
    low, high = action_range(actions.astype(np.float32), BoxSpec((2,), "float32", (-100,) * 2, (100, 0.2)))
    assert -1 < low[0] < -0.3
    assert 0.3 < high[0] < 1
    assert low[1] < -0.6
    assert high[1] == 0.2


def test_a_locked_joint_is_always_given_its_value(tmp_path, make_config):
    space = spaces.Box(np.array([-1, 0.3], np.float32), np.array([1, 0.3], np.float32))
    actions = np.column_stack([arrays()["actions"][:, 0], np.full(7, np.float32(0.3))])
    data = OfflineDataset.from_arrays(**arrays(actions=actions), action_space=space)
    for scaling in ("data", "box"):
        config = make_config("bc", steps=2, action_scaling=scaling)
        checkpoint = train(config, data, tmp_path / scaling)
        policy = PolicyModule(checkpoint.load_networks(), checkpoint.spec)
        given = policy(torch.zeros(5, 3), torch.randn(5, checkpoint.spec.noise_dim))
        assert (given[..., 1] == np.float32(0.3)).all()


# From Minari


def episode(length, seed=0, observations=None):
    generator = np.random.default_rng(seed)
    return {
        "observations": list(generator.normal(size=(length + 1, 3))) if observations is None else observations,
        "actions": list(generator.uniform(-1, 1, (length, 2)).astype(np.float32)),
        "rewards": list(generator.normal(size=length)),
        "terminations": [False] * length,
        "truncations": [False] * (length - 1) + [True],
    }


def edit(folder, change):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        change(file)


def replace_values(file, name, values):
    del file[name]
    file[name] = values


@pytest.fixture
def minari_folder(make_minari, tmp_path):
    first, second = episode(4, seed=1), episode(3, seed=2)
    first["terminations"] = [False, True, True, False]
    second["terminations"] = [False, False, True]
    second["truncations"] = [False, False, False]
    return make_minari(tmp_path, "tests/small-v0", [first, second], UNBOUNDED, UNIT)


def test_minari_episodes_become_rows_and_terminations_within_them_are_kept(minari_folder):
    data = OfflineDataset.from_minari(minari_folder)
    first, second = episode(4, seed=1), episode(3, seed=2)
    for name, part in (("observations", slice(None, -1)), ("next_observations", slice(1, None))):
        expected = np.concatenate([np.array(e["observations"])[part] for e in (first, second)])
        np.testing.assert_array_equal(getattr(data, name), expected.astype(np.float32))
    for name in ("actions", "rewards"):
        expected = np.concatenate([first[name], second[name]])
        np.testing.assert_array_equal(getattr(data, name), expected.astype(np.float32))
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), [1, 2, 6])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [3, 6])
    assert (data.dataset_id, data.environment_id, data.control_rate_hz) == ("tests/small-v0", None, None)
    assert data.observation_boxes[0].dtype == "float64"


def test_every_column_of_a_minari_dict_observation_belongs_to_its_key(make_minari, tmp_path):
    space = spaces.Dict([("z", spaces.Box(-9, 9, (2,), np.float64)), ("a", spaces.Box(-9, 9, (1,), np.float64))])
    steps = np.arange(4.0)[:, None]
    observations = {"z": steps * [1.0, 2.0], "a": -steps}
    folder = make_minari(tmp_path, "tests/dict-v0", [episode(3, observations=observations)], space, UNIT)
    data = OfflineDataset.from_minari(folder)
    columns, first = {}, 0
    for box in data.observation_boxes:
        columns[box.key] = data.observations[:, first : first + box.size]
        first += box.size
    np.testing.assert_array_equal(columns["z"], [[0, 0], [1, 2], [2, 4]])
    np.testing.assert_array_equal(columns["a"], [[0], [-1], [-2]])


@pytest.mark.parametrize(("name", "rows"), [("observations", 4), ("actions", 3), ("rewards", 3)])
def test_a_minari_number_that_is_not_finite_is_named_with_episode_and_step(minari_folder, name, rows):
    edit(minari_folder, lambda file: file[f"episode_1/{name}"].__setitem__(1, np.nan))
    with pytest.raises(DatasetError, match=rf"{name} is nan at episode 1, step 1"):
        OfflineDataset.from_minari(minari_folder)


def test_as_many_observations_as_actions_are_refused(minari_folder):
    edit(minari_folder, lambda file: replace_values(file, "episode_0/observations", np.zeros((4, 3))))
    with pytest.raises(DatasetError, match="episode 0 has 4 observations and 4 rewards; expected 5 observations"):
        OfflineDataset.from_minari(minari_folder)


@pytest.mark.parametrize("name", ["actions", "terminations", "truncations"])
def test_minari_fields_of_another_length_are_refused(minari_folder, name):
    edit(minari_folder, lambda file: replace_values(file, f"episode_1/{name}", file[f"episode_1/{name}"][:-1]))
    with pytest.raises(DatasetError, match=f"episode 1 has 2 {name} and 3 rewards; expected 3 {name}"):
        OfflineDataset.from_minari(minari_folder)


def test_an_episode_without_steps_is_refused(minari_folder):
    def empty(file):
        for name in ("actions", "rewards", "terminations", "truncations"):
            replace_values(file, f"episode_0/{name}", file[f"episode_0/{name}"][:0])
        replace_values(file, "episode_0/observations", np.zeros((1, 3)))

    edit(minari_folder, empty)
    with pytest.raises(DatasetError, match="episode 0 has no steps"):
        OfflineDataset.from_minari(minari_folder)


@pytest.mark.parametrize("shape", [(5, 2), (5,), (5, 3, 1)])
def test_a_minari_episode_of_another_shape_than_the_others_is_refused(minari_folder, shape):
    edit(minari_folder, lambda file: replace_values(file, "episode_0/observations", np.zeros(shape)))
    with pytest.raises(DatasetError, match="observations"):
        OfflineDataset.from_minari(minari_folder)


def test_minari_actions_outside_their_space_are_refused(minari_folder):
    edit(minari_folder, lambda file: file["episode_1/actions"].__setitem__((2, 1), 1.5))
    with pytest.raises(DatasetError, match="actions is 1.5 at episode 1, step 2, index 1"):
        OfflineDataset.from_minari(minari_folder)


@pytest.mark.parametrize(
    ("observation_space", "observations", "action_space", "message"),
    [
        (spaces.Discrete(5), [0, 1, 2, 3], UNIT, "observation space is Discrete"),
        (spaces.Tuple((UNBOUNDED,)), (np.zeros((4, 3)),), UNIT, "observation space is Tuple"),
        (spaces.Dict({"a": spaces.Dict({"b": UNBOUNDED})}), {"a": {"b": np.zeros((4, 3))}}, UNIT, 'space of "a"'),
        (UNBOUNDED, list(np.zeros((4, 3))), spaces.MultiBinary(2), "action space is MultiBinary"),
    ],
)
def test_minari_spaces_other_than_boxes_are_refused(
    make_minari, tmp_path, observation_space, observations, action_space, message
):
    recorded = episode(3, observations=observations)
    if action_space is not UNIT:
        recorded["actions"] = [np.array([0, 1], np.int8)] * 3
    folder = make_minari(tmp_path, "tests/odd-v0", [recorded], observation_space, action_space)
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_minari(folder)


CAMERA = spaces.Box(0, 255, (4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("space", "named"),
    [(CAMERA, "The observation space has images"), (spaces.Dict({"q": UNBOUNDED, "cam": CAMERA}), 'space of "cam"')],
)
def test_images_are_refused_by_name(make_minari, tmp_path, space, named):
    frames = np.zeros((4, 4, 5, 3), np.uint8)
    observations = {"q": np.zeros((4, 3)), "cam": frames} if isinstance(space, spaces.Dict) else list(frames)
    folder = make_minari(tmp_path, "tests/camera-v0", [episode(3, observations=observations)], space, UNIT)
    with pytest.raises(DatasetError, match=rf"{named}.*uint8 of shape \(4, 5, 3\)\. .*the 60 values of the pixels"):
        OfflineDataset.from_minari(folder)


@pytest.mark.parametrize("mapped", [False, True])
def test_images_without_a_space_are_refused(mapped):
    frames = np.zeros((7, 4, 5, 3), np.uint8)
    observations = {"cam": frames} if mapped else frames
    with pytest.raises(DatasetError, match="images: uint8 of shape"):
        OfflineDataset.from_arrays(**arrays(observations=observations, next_observations=observations))


def test_minari_actions_are_bounded_and_clipped_as_asked(make_minari, tmp_path):
    unbounded = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    recorded = episode(6)
    recorded["actions"][2][1] = 1.5
    folder = make_minari(tmp_path, "tests/unbounded-v0", [recorded], UNBOUNDED, unbounded)
    with pytest.raises(DatasetError, match="action_low="):
        OfflineDataset.from_minari(folder)
    wide = OfflineDataset.from_minari(folder, action_low=-2, action_high=2)
    clipped = OfflineDataset.from_minari(folder, action_low=-1, action_high=1, clip_actions=True)
    assert (wide.actions[2, 1], clipped.actions[2, 1]) == (1.5, 1)
    assert (wide.action_box.high, clipped.action_box.high) == ((2, 2), (1, 1))


# From OGBench


def ogbench_arrays(**changes):
    """Trajectories of three, two and four rows: five transitions."""
    generator = np.random.default_rng(0)
    data = {
        "observations": generator.normal(size=(9, 2)).astype(np.float32),
        "actions": generator.uniform(-1, 1, size=(9, 2)).astype(np.float32),
        "terminals": np.array([0, 0, 1, 0, 1, 0, 0, 0, 1], bool),
        "rewards": np.arange(9.0, dtype=np.float32),
    }
    return {**data, **changes}


def write_npz(folder, data):
    path = folder / "maze-v0.npz"
    np.savez(path, **{name: values for name, values in data.items() if values is not None})
    return path


def test_the_images_of_a_visual_ogbench_file_are_refused(tmp_path):
    path = write_npz(tmp_path, ogbench_arrays(observations=np.zeros((9, 4, 5, 3), np.uint8)))
    with pytest.raises(DatasetError, match=r"images: uint8 of shape \(4, 5, 3\)"):
        OfflineDataset.from_ogbench(path)


def test_an_ogbench_row_is_followed_by_the_next_but_at_the_end_of_a_trajectory(tmp_path):
    given = ogbench_arrays()
    data = OfflineDataset.from_ogbench(write_npz(tmp_path, given))
    kept = np.array([0, 1, 3, 5, 6, 7])
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(data, name), given[name][kept])
    np.testing.assert_array_equal(data.next_observations, given["observations"][kept + 1])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [1, 2, 5])
    assert not data.terminations.any()
    assert (data.dataset_id, data.environment_id) == ("maze-v0", None)


def test_ogbench_masks_mark_terminations_within_a_trajectory(tmp_path):
    masks = np.ones(9)
    masks[[1, 6]] = 0
    data = OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(masks=masks)))
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), [1, 4])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [1, 2, 5])


def test_the_rewards_of_a_pointmaze_task_are_zero_within_one_unit_of_its_goal(pointmaze_goal, tmp_path):
    goal = pointmaze_goal(TASK)
    angles = np.linspace(0, 6, 30)
    distances = np.tile([0.0, 0.5, 0.99, 1.01, 3.0], 6)
    positions = goal + distances[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    terminals = np.arange(30) % 10 == 9
    path = write_npz(
        tmp_path,
        {
            "observations": positions.astype(np.float32),
            "actions": np.zeros((30, 2), np.float32),
            "terminals": terminals,
            "qpos": positions,
            "rewards": np.full(30, 7.0),
        },
    )
    data = OfflineDataset.from_ogbench(path, TASK)
    reached = (np.linalg.norm(positions - goal, axis=1) <= 1.0)[~terminals]
    assert 0 < reached.sum() < len(reached)
    np.testing.assert_array_equal(data.rewards, -1.0 + reached)
    np.testing.assert_array_equal(data.terminations, reached)
    assert data.environment_id == TASK


def test_an_ogbench_task_needs_recorded_states(tmp_path):
    pytest.importorskip("ogbench")
    with pytest.raises(DatasetError, match="no 'qpos', which the rewards of pointmaze"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays()), TASK)


def test_an_ogbench_environment_without_a_task_is_refused(tmp_path):
    pytest.importorskip("ogbench")
    path = write_npz(tmp_path, ogbench_arrays(qpos=np.zeros((9, 2))))
    with pytest.raises(DatasetError, match="has no fixed task"):
        OfflineDataset.from_ogbench(path, "pointmaze-medium-navigate-v0")


def test_an_unknown_ogbench_environment_is_not_found(tmp_path):
    pytest.importorskip("ogbench")
    with pytest.raises(NotFoundError, match="no environment"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays()), "pointmaze-mediun-singletask-v0")


def test_an_ogbench_file_without_rewards_needs_an_environment(tmp_path):
    with pytest.raises(DatasetError, match="holds no rewards; pass environment_id="):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(rewards=None)))


@pytest.mark.parametrize("name", ["observations", "actions", "terminals"])
def test_an_ogbench_file_without_its_arrays_is_refused(tmp_path, name):
    with pytest.raises(DatasetError, match=rf"has no \['{name}'\]"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(**{name: None})))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "masks"])
@pytest.mark.parametrize("shape", [(), (4,), (8, 2), (12, 2)])
def test_ogbench_arrays_of_another_length_are_refused(tmp_path, name, shape):
    with pytest.raises(DatasetError, match=f"{name} has"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(**{name: np.zeros(shape)})))


def test_an_ogbench_trajectory_without_an_end_is_refused(tmp_path):
    terminals = ogbench_arrays()["terminals"].copy()
    terminals[-1] = False
    with pytest.raises(DatasetError, match="last row is not terminal"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(terminals=terminals)))


@pytest.mark.parametrize("rows", [0, 9])
def test_an_ogbench_file_without_transitions_is_refused(tmp_path, rows):
    given = {name: values[:rows] for name, values in ogbench_arrays(terminals=np.ones(9, bool)).items()}
    with pytest.raises(DatasetError):
        OfflineDataset.from_ogbench(write_npz(tmp_path, given))


def test_an_ogbench_number_that_is_not_finite_is_named_with_episode_and_step(tmp_path):
    observations = ogbench_arrays()["observations"].copy()
    observations[6, 1] = np.nan
    with pytest.raises(DatasetError, match="observations is nan at episode 2, step 1, index 1"):
        OfflineDataset.from_ogbench(write_npz(tmp_path, ogbench_arrays(observations=observations)))


def test_a_pickled_object_in_an_ogbench_file_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "executed"
    path = write_npz(tmp_path, ogbench_arrays(rewards=np.array([Gadget(marker)], object)))
    with pytest.raises(DatasetError, match="not an .npz file of plain arrays"):
        OfflineDataset.from_ogbench(path)
    assert not marker.exists()
    with np.load(path, allow_pickle=True) as file, warnings.catch_warnings():
        _ = file["rewards"]
    assert marker.exists()  # the gadget does work


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", "truncated", "deflate", "npy"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = write_npz(tmp_path, ogbench_arrays())
    if content == "truncated":
        content = path.read_bytes()[:-30]
    elif content == "deflate":
        np.savez_compressed(path, **ogbench_arrays())
        whole = path.read_bytes()
        content = whole[:80] + bytes(b ^ 0xFF for b in whole[80:120]) + whole[120:]
    elif content == "npy":
        np.save(tmp_path / "array.npy", np.zeros(3))
        content = (tmp_path / "array.npy").read_bytes()
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="not an .npz file"):
        OfflineDataset.from_ogbench(path)


@given(st.binary(min_size=1, max_size=3), st.floats(0, 1))
def test_a_changed_byte_never_gives_an_error_of_another_library(tmp_path_factory, patch, position):
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    np.savez_compressed(path, **ogbench_arrays())
    whole = path.read_bytes()
    start = int(position * (len(whole) - len(patch)))
    path.write_bytes(whole[:start] + patch + whole[start + len(patch) :])
    with contextlib.suppress(MeamError):
        OfflineDataset.from_ogbench(path)


def test_a_missing_ogbench_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no file .*nowhere.npz"):
        OfflineDataset.from_ogbench(tmp_path / "nowhere.npz")


def test_actions_that_are_whole_numbers_are_refused():
    space = spaces.Box(0, 3, (2,), np.int64)
    with pytest.raises(DatasetError, match="whole numbers; a flow policy needs a float Box"):
        OfflineDataset.from_arrays(**arrays(actions=np.ones((7, 2), np.int64)), action_space=space)

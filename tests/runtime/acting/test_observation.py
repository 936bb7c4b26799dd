import re
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meam_policy import BoxSpec, ObservationError, PolicySpec
from meam_policy.acting.observation import LOST, flatten_observation, lost_digits, require_finite
from meam_policy.spec import Integration

UNIT = BoxSpec((1,), "float32", (-1.0,), (1.0,))
BOX = BoxSpec((2, 3), "float32", (-np.inf,) * 6, (np.inf,) * 6)
# For the property tests, which cannot take a fixture per example.
PLAIN_SPEC = PolicySpec(
    (BOX,), UNIT, 1, 1, (0.0,) * 6, (1.0,) * 6, (0.0,), (1.0,), integration=Integration(1), method="by hand"
)
PLAIN = np.arange(6, dtype=np.float32).reshape(2, 3)
ARM = BoxSpec((3,), "float64", (-np.inf,) * 3, (np.inf,) * 3, "arm")
IMAGE = BoxSpec((2, 2), "uint8", (0.0,) * 4, (255.0,) * 4, "Image")
GRIPPER = BoxSpec((), "float32", (0.0,), (1.0,), "gripper")


@pytest.fixture
def box_spec(make_spec):
    return make_spec([BOX])


@pytest.fixture
def dict_spec(make_spec):
    return make_spec([ARM, IMAGE, GRIPPER])


def dict_observation(**changes):
    return {"Image": np.arange(4).reshape(2, 2), "arm": [0.5, 1.5, 2.5], "gripper": 0.25, **changes}


@pytest.mark.parametrize(
    "same",
    [
        PLAIN,
        PLAIN.astype(np.float64),
        PLAIN.astype(np.float16),
        PLAIN.astype(np.int64),
        PLAIN.astype(np.uint8),
        PLAIN.astype(">f4"),
        PLAIN.astype(">f8"),
        PLAIN.astype(">i2"),
        PLAIN.tolist(),
        tuple(map(tuple, PLAIN.astype(int).tolist())),
        np.asfortranarray(PLAIN),
        np.repeat(PLAIN, 2, axis=1)[:, ::2],
        PLAIN[::-1, ::-1].copy()[::-1, ::-1],
        np.ma.masked_array(PLAIN),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_every_form_of_the_same_numbers_gives_the_same_row(box_spec, same):
    rows, batched = flatten_observation(box_spec, same)
    assert not batched
    assert rows.dtype == np.dtype("=f4")
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 5]])
    batch, batched = flatten_observation(box_spec, np.stack([np.asarray(same)] * 2))
    assert batched
    np.testing.assert_array_equal(batch, [[0, 1, 2, 3, 4, 5]] * 2)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<i4", ">i4", "u1", "?"]),
        st.sampled_from([(2, 3), (1, 2, 3), (4, 2, 3)]),
        elements={"min_value": 0, "max_value": 100},
    ).filter(lambda array: array.size > 0)
)
def test_rows_are_the_numbers_in_c_order_as_float32(array):
    rows, batched = flatten_observation(PLAIN_SPEC, array)
    assert batched == (array.ndim == 3)
    np.testing.assert_array_equal(rows, array.astype("=f8").reshape(-1, 6).astype(np.float32))
    assert not np.shares_memory(rows, array)


def test_bool_observation_is_zeros_and_ones(box_spec):
    rows, _ = flatten_observation(box_spec, PLAIN > 2)
    np.testing.assert_array_equal(rows, [[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("batch", [False, True])
def test_rows_never_alias_the_observation(box_spec, batch):
    observation = np.stack([PLAIN, PLAIN]) if batch else PLAIN.copy()
    before = observation.copy()
    rows, _ = flatten_observation(box_spec, observation)
    rows[:] = -1
    np.testing.assert_array_equal(observation, before)


def test_dict_is_flattened_in_the_recorded_key_order(dict_spec):
    rows, batched = flatten_observation(dict_spec, dict_observation())
    assert not batched
    np.testing.assert_array_equal(rows, [[0.5, 1.5, 2.5, 0, 1, 2, 3, 0.25]])


def test_an_offset_is_taken_off_before_digits_are_rounded_away(box_spec, dict_spec):
    offset = np.array([4.5e6, 0, -1e9, 0, 0, 7])
    spec = replace(box_spec, observation_offset=tuple(offset))
    for same in (PLAIN + offset.reshape(2, 3), (PLAIN + offset.reshape(2, 3)).astype(">f8")):
        rows, _ = flatten_observation(spec, same)
        np.testing.assert_array_equal(rows, PLAIN.reshape(1, 6))
        assert rows.dtype == np.float32
    whole = np.array([[4_500_001, 1, -1_000_000_000, 0, 0, 8]]).reshape(2, 3)
    np.testing.assert_array_equal(flatten_observation(spec, whole)[0], [[1, 1, 0, 0, 0, 1]])
    spec = replace(dict_spec, observation_offset=(0.0, 1e9, 0.0, 0.0, 0.0, 0.0, 0.0, -0.75))
    rows, _ = flatten_observation(spec, dict_observation(arm=[0.5, 1e9 + 1.5, 2.5]))
    np.testing.assert_array_equal(rows, [[0.5, 1.5, 2.5, 0, 1, 2, 3, 1.0]])


def test_the_number_whose_digits_are_lost_is_named_with_its_step_and_unit(box_spec, dict_spec):
    offset = (0.0, 447_120.0, 5_411_840.0, 0.0, 0.0, 0.0)
    spec = replace(box_spec, observation_offset=offset, observation_std=(1.0, 2.0, 3.0, 1.0, 1.0, 1.0))
    here = PLAIN + np.array(offset).reshape(2, 3)
    lost = lost_digits(spec, here.astype(np.float32))
    assert lost == (
        "Observation is float32, in which the number at index 2 near 5411840 has steps of 0.5: 0.17 standard "
        "deviations of the training data. The policy cannot tell smaller differences. Give observations in "
        "float64, from the sensor on."
    )
    named = replace(spec, observation_names=("a", "east [m]", "north [m]", "d", "e", "f"))
    lost = lost_digits(named, here[None].astype(">f4"))
    assert lost is not None
    assert 'index 2, "north", near 5411840 has steps of 0.5 m:' in lost
    for enough in (here, here.tolist(), here.astype(np.int64), here.astype(">f8")):
        assert lost_digits(spec, enough) is None
    assert lost_digits(box_spec, here.astype(np.float32)) is None
    spec = replace(dict_spec, observation_offset=(0.0, 1e9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert lost_digits(spec, dict_observation(gripper=np.float32(0.25))) is None
    lost = lost_digits(spec, dict_observation(arm=np.array([0.5, 1e9, 2.5], np.float32)))
    assert lost is not None
    assert lost.startswith(
        'Observation "arm" is float32, in which the number at index 1 near 1000000000 has steps of 64'
    )


@given(st.floats(1e-3, 1e3), st.floats(1e2, 1e9))
def test_digits_are_lost_where_the_next_number_is_a_hundredth_of_a_deviation_away(deviation, place):
    spec = replace(PLAIN_SPEC, observation_offset=(place,) * 6, observation_std=(deviation,) * 6)
    step = float(np.nextafter(np.float32(place), np.float32(np.inf))) - float(np.float32(place))
    assert (lost_digits(spec, np.full((2, 3), place, np.float32)) is not None) == (step / deviation > LOST)


def test_dict_of_batches_is_a_batch(dict_spec):
    single = dict_observation()
    rows, batched = flatten_observation(dict_spec, {key: np.stack([np.asarray(v)] * 3) for key, v in single.items()})
    assert batched
    np.testing.assert_array_equal(rows, [[0.5, 1.5, 2.5, 0, 1, 2, 3, 0.25]] * 3)


def test_scalar_box_is_batched_by_one_axis(make_spec):
    spec = make_spec([BoxSpec((), "float32", (0.0,), (1.0,))])
    rows, batched = flatten_observation(spec, 0.5)
    assert (rows.tolist(), batched) == ([[0.5]], False)
    rows, batched = flatten_observation(spec, [0.5, 0.25])
    assert (rows.tolist(), batched) == ([[0.5], [0.25]], True)


@pytest.mark.parametrize("shape", [(), (3,), (6,), (3, 2), (0, 2, 3), (1, 1, 2, 3), (2, 3, 1), (2, 4)])
def test_wrong_shape_is_refused_with_both_shapes(box_spec, shape):
    with pytest.raises(ObservationError, match=re.escape(f"shape {shape}, expected (2, 3)")):
        flatten_observation(box_spec, np.zeros(shape))


def test_wrong_shape_inside_a_dict_names_the_key(dict_spec):
    with pytest.raises(ObservationError, match=re.escape('"arm" has shape (2,), expected (3,)')):
        flatten_observation(dict_spec, dict_observation(arm=[1, 2]))


@pytest.mark.parametrize(
    ("observation", "fragment"),
    [
        ({"Image": 0, "gripper": 0}, "missing ['arm'], unknown []"),
        (dict_observation(camera=0), "missing [], unknown ['camera']"),
        ({"Arm": 0, "Image": 0, "gripper": 0}, "missing ['arm'], unknown ['Arm']"),
        ({}, "missing ['Image', 'arm', 'gripper']"),
        (np.zeros(8), "is a ndarray; expected a mapping"),
        (None, "is a NoneType; expected a mapping"),
    ],
)
def test_dict_with_other_keys_is_refused_by_key(dict_spec, observation, fragment):
    with pytest.raises(ObservationError) as caught:
        flatten_observation(dict_spec, observation)
    assert fragment in str(caught.value)
    assert "['arm', 'Image', 'gripper']" in str(caught.value)


def test_dict_with_keys_that_are_not_text_is_refused(dict_spec):
    with pytest.raises(ObservationError, match="keys"):
        flatten_observation(dict_spec, {1: 0, None: 0, "arm": 0})


@pytest.mark.parametrize(
    "parts",
    [
        {"arm": np.zeros((2, 3)), "Image": np.zeros((3, 2, 2)), "gripper": np.zeros(2)},
        {"arm": np.zeros((2, 3)), "Image": np.zeros((2, 2, 2)), "gripper": 0.0},
        {"arm": np.zeros(3), "Image": np.zeros((1, 2, 2)), "gripper": 0.0},
    ],
)
def test_parts_with_different_batch_sizes_are_refused(dict_spec, parts):
    with pytest.raises(ObservationError, match=r"different batch sizes: \"arm\""):
        flatten_observation(dict_spec, parts)


@pytest.mark.parametrize(
    "value", [None, "text", ["a", "b"], [None] * 6, PLAIN.astype(complex), PLAIN.astype(object), PLAIN.astype("M8[s]")]
)
def test_values_that_are_not_real_numbers_are_refused(box_spec, value):
    with pytest.raises(ObservationError, match="expected real numbers"):
        flatten_observation(box_spec, value)


def test_ragged_list_is_refused(box_spec):
    with pytest.raises(ObservationError, match="ragged") as caught:
        flatten_observation(box_spec, [[1, 2, 3], [4, 5]])
    assert isinstance(caught.value.__cause__, ValueError)


def test_mapping_for_a_box_is_refused(box_spec):
    with pytest.raises(ObservationError):
        flatten_observation(box_spec, {"observation": PLAIN})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_value_that_is_not_finite_is_named_by_its_index(row, column, batch_row, value):
    observation = np.zeros((3, 2, 3))
    observation[batch_row, row, column] = value
    with pytest.raises(ObservationError, match=re.escape(f"index [{row}, {column}] of batch row {batch_row}")):
        flatten_observation(PLAIN_SPEC, observation)
    with pytest.raises(ObservationError, match=re.escape(f"index [{row}, {column}];")):
        flatten_observation(PLAIN_SPEC, observation[batch_row])


@pytest.mark.parametrize(("value", "seen"), [(1e300, "1e+300"), (-4e38, "-4e+38")])
def test_number_that_is_too_large_for_float32_is_not_called_infinite(value, seen):
    observation = np.zeros((3, 2, 3))
    observation[2, 1, 0] = value
    with pytest.raises(ObservationError) as caught:
        flatten_observation(PLAIN_SPEC, observation)
    assert str(caught.value) == (
        f"Observation is {seen} at index [1, 0] of batch row 2, too large for float32; expected a number within "
        "±3.4e+38. Check the sensor, and its unit."
    )


def test_infinity_beside_a_number_that_is_too_large_is_still_infinite():
    with pytest.raises(ObservationError, match=re.escape("Observation is inf at index [0, 0]; expected a finite")):
        flatten_observation(PLAIN_SPEC, [[np.inf, 1e300, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (10**400, "about 1e400"),
        (-(10**400), "about -1e400"),
        (2**64, "18446744073709551616"),
        (10**5000, "about 1e5000"),
    ],
    ids=["400 digits", "negative", "20 digits", "5000 digits"],
)
def test_whole_number_that_no_array_holds_is_named_by_its_size(number, shown):
    with pytest.raises(ObservationError) as caught:
        flatten_observation(PLAIN_SPEC, [[0, number, 0], [0, 0, 0]])
    assert str(caught.value) == (
        f"Observation has the whole number {shown}, too large for an array of whole numbers; expected an array of "
        "shape (2, 3), larger ones as floats."
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"arm": [0, np.nan, 0]}, '"arm" is nan at index [1]'),
        ({"arm": [0, 0, -np.inf]}, '"arm" is -inf at index [2]'),
        ({"Image": [[0, 0], [np.inf, 0]]}, '"Image" is inf at index [1, 0]'),
        ({"gripper": np.nan}, '"gripper" is nan at index []'),
    ],
)
def test_value_that_is_not_finite_in_a_dict_is_named_by_key_and_index(dict_spec, change, where):
    with pytest.raises(ObservationError, match=re.escape(where)):
        flatten_observation(dict_spec, dict_observation(**change))


def test_values_that_are_not_finite_may_be_let_through_and_named_later(dict_spec):
    observation = {key: np.stack([np.asarray(value)] * 3) for key, value in dict_observation().items()}
    rows, _ = flatten_observation(dict_spec, observation, finite=False)
    require_finite(dict_spec, rows)
    observation["Image"] = np.array([[[0, 0], [0, 0]], [[0, 0], [0, np.nan]], [[np.inf, 0], [0, 0]]])
    rows, _ = flatten_observation(dict_spec, observation, finite=False)
    np.testing.assert_array_equal(rows[:, 3:7], observation["Image"].reshape(3, 4))
    with pytest.raises(ObservationError, match=re.escape('"Image" is nan at index [1, 1] of batch row 1')):
        require_finite(dict_spec, rows)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint32, 0x7FA00000), (np.uint64, 0x7FF4000000000000)])
def test_signalling_nan_is_refused_like_any_other(box_spec, dtype, bits):
    observation = np.zeros((2, 3), dtype)
    observation[1, 2] = bits
    observation = observation.view(f"f{observation.itemsize}")
    with pytest.raises(ObservationError, match=re.escape("nan at index [1, 2]")):
        flatten_observation(box_spec, observation)


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_batch_are_contiguous_in_every_memory_order(make_spec, order):
    batch = np.array(np.arange(12).reshape(4, 3), np.float32, order=order)
    rows, _ = flatten_observation(make_spec(), batch)
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, batch)


def test_pair_returned_by_reset_is_refused_with_the_fix(make_spec):
    env = gymnasium.make("Pendulum-v1")
    spec = make_spec([BoxSpec((3,), "float32", (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0))])
    pair = env.reset(seed=0)
    with pytest.raises(ObservationError, match=r"observation, info = env\.reset\(\)"):
        flatten_observation(spec, pair)
    flatten_observation(spec, pair[0])


def test_tuple_of_two_rows_is_not_mistaken_for_a_reset(box_spec):
    rows, batched = flatten_observation(box_spec, (PLAIN, PLAIN))
    assert (rows.shape, batched) == ((2, 6), True)


def test_masked_numbers_are_refused_rather_than_read():
    masked = np.ma.masked_array(PLAIN, mask=[[False, True, False], [False, False, False]])
    with pytest.raises(ObservationError, match="has masked numbers; expected that none is missing"):
        flatten_observation(PLAIN_SPEC, masked)

"""Policies that take a prefix: what `predict_action_chunk` takes, refuses and returns."""

import numpy as np
import pytest

from meam_policy import ActionError, BoxSpec, ConfigError, FormatError, MeamPolicy, ObservationError
from meam_policy.loop.chunk_schedule import prefix_weights

BOX = BoxSpec(shape=(2,), dtype="float32", low=(-1.0, -4.0), high=(1.0, 12.0))
OFFSET, SCALE = (0.0, 4.0), (1.0, 8.0)


@pytest.fixture
def folder(make_policy):
    """A policy, and its variant rtc."""
    linear = make_policy(action=BOX, action_offset=OFFSET, action_scale=SCALE)
    linear.add_continuing()
    return linear


@pytest.fixture
def rtc(folder) -> MeamPolicy:
    return folder.load(variant="rtc", seed=0)


def rows_of(count, seed=0):
    """Observations, noise, prefixes in environment units, and weights."""
    random = np.random.default_rng(seed)
    rows, noise = random.integers(-8, 9, (count, 3)) / 8, random.integers(-8, 9, (count, 8)) / 8
    prefix = np.array(OFFSET) + np.array(SCALE) * random.integers(-8, 9, (count, 4, 2)) / 8
    return rows, noise, prefix, random.integers(0, 5, (count, 4)) / 4


def continued(folder, rows, noise, prefix, weight):
    share = np.asarray(weight)[..., None]
    own = (rows @ folder.weight.astype(float) + noise @ folder.noise_weight.astype(float)).reshape(-1, 4, 2)
    return np.clip((1 - share) * own + share * prefix, BOX.low, BOX.high)


def test_only_the_variant_takes_a_prefix(folder, rtc):
    assert rtc.takes_prefix is True
    assert folder.load().takes_prefix is False
    assert rtc.variant == "rtc"
    assert rtc.spec.variants["rtc"].takes_prefix


def test_a_variant_that_takes_a_prefix_unsaid_is_refused(folder):
    folder.add_variant("k3", (folder.folder / "rtc.onnx").read_bytes())
    with pytest.raises(FormatError, match=r"k3\.onnx takes a prefix, but config\.json says takes_prefix false"):
        folder.load(variant="k3")


def test_the_prefix_is_in_environment_units_and_every_row_has_its_own(folder, rtc):
    rows, noise, prefix, weight = rows_of(6)
    chunks = rtc.predict_action_chunk(rows, noise=noise, prefix=prefix, prefix_weight=weight)
    assert (chunks.dtype, chunks.shape) == (np.float32, (6, 4, 2))
    np.testing.assert_allclose(chunks, continued(folder, rows, noise, prefix, weight), rtol=0, atol=1e-6)
    for row in range(6):
        alone = rtc.predict_action_chunk(
            rows[row], noise=noise[row], prefix=prefix[row], prefix_weight=weight[row].tolist()
        )
        assert alone.shape == (4, 2)
        np.testing.assert_array_equal(alone, chunks[row])


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_what_is_executed_meanwhile_comes_back_as_it_is(rtc, delay):
    rows, noise, prefix, _ = rows_of(1)
    weight = prefix_weights(4, delay, 2)
    chunk = rtc.predict_action_chunk(rows[0], noise=noise[0], prefix=prefix[0], prefix_weight=weight)
    np.testing.assert_array_equal(chunk[:delay], prefix[0, :delay])
    free = rtc.predict_action_chunk(rows[0], noise=noise[0])
    np.testing.assert_allclose(chunk[2:], free[2:], rtol=0, atol=1e-6)


def test_without_a_prefix_it_acts_as_the_policy_itself(folder, rtc):
    plain = folder.load(seed=0)
    rows, noise, prefix, _ = rows_of(5)
    expected = folder.chunks(rows, noise)
    for policy in (plain, rtc):
        np.testing.assert_array_equal(policy.predict_action_chunk(rows, noise=noise), expected)
        np.testing.assert_array_equal(policy.sample(rows, noise), expected)
    zero = rtc.predict_action_chunk(rows, noise=noise, prefix=prefix, prefix_weight=np.zeros((5, 4)))
    np.testing.assert_array_equal(zero, expected)
    for row in rows:
        np.testing.assert_array_equal(rtc.act(row), plain.act(row))


def test_zero_noise_and_drawn_noise_go_with_a_prefix_too(folder, rtc):
    rows, _, prefix, weight = rows_of(5)
    given = {"prefix": prefix, "prefix_weight": weight}
    fixed = rtc.predict_action_chunk(rows, deterministic=True, **given)
    np.testing.assert_allclose(fixed, continued(folder, rows, np.zeros((5, 8)), prefix, weight), rtol=0, atol=1e-6)
    drawn = [rtc.predict_action_chunk(rows, **given) for _ in range(2)]
    assert not np.array_equal(*drawn)
    again = folder.load(variant="rtc", seed=0)
    for chunks in drawn:
        np.testing.assert_array_equal(again.predict_action_chunk(rows, **given), chunks)


@pytest.mark.parametrize("fixed_batch", [1, 2, 7])
def test_a_fixed_batch_gives_the_same_chunks(folder, rtc, fixed_batch):
    rows, noise, prefix, weight = rows_of(5)
    given = {"noise": noise, "prefix": prefix, "prefix_weight": weight}
    fixed = folder.load(variant="rtc", fixed_batch=fixed_batch)
    np.testing.assert_array_equal(fixed.predict_action_chunk(rows, **given), rtc.predict_action_chunk(rows, **given))


@pytest.mark.parametrize("kind", [list, np.float32, np.float64, "read only"])
def test_a_prefix_of_any_real_type_is_taken_and_left_as_it_is(rtc, kind):
    rows, noise, prefix, weight = rows_of(3)
    expected = rtc.predict_action_chunk(rows, noise=noise, prefix=prefix, prefix_weight=weight)
    given = [prefix.copy(), weight.copy()]
    if kind is list:
        given = [array.tolist() for array in given]
    elif kind == "read only":
        for array in given:
            array.flags.writeable = False
    else:
        given = [array.astype(kind) for array in given]
    chunks = rtc.predict_action_chunk(rows, noise=noise, prefix=given[0], prefix_weight=given[1])
    np.testing.assert_array_equal(chunks, expected)
    np.testing.assert_array_equal(np.array(given[0], float), prefix)
    np.testing.assert_array_equal(np.array(given[1], float), weight)


def test_a_prefix_leaves_the_action_queue_alone(rtc, folder):
    rows, _, prefix, weight = rows_of(1)
    undisturbed = folder.load(variant="rtc", seed=0)
    first = rtc.act(rows[0], deterministic=True)
    rtc.predict_action_chunk(rows[0], noise=np.ones(8), prefix=prefix[0], prefix_weight=weight[0])
    second = rtc.act(rows[0], deterministic=True)
    for action in (first, second):
        np.testing.assert_array_equal(action, undisturbed.act(rows[0], deterministic=True))


@pytest.mark.parametrize("given", [("prefix", "prefix_weight"), ("prefix",), ("prefix_weight",)])
def test_a_plain_graph_given_a_prefix_is_a_configuration_error_with_the_remedy(folder, given):
    rows, _, prefix, weight = rows_of(1)
    values = {"prefix": prefix[0], "prefix_weight": weight[0]}
    policy = folder.load()
    with pytest.raises(ConfigError, match=r"takes no prefix.*rtc"):
        policy.predict_action_chunk(rows[0], **{name: values[name] for name in given})
    np.testing.assert_array_equal(policy.act(rows[0], deterministic=True), folder.chunks(rows)[0, 0])


@pytest.mark.parametrize("missing", ["prefix", "prefix_weight"])
def test_one_without_the_other_is_refused(rtc, missing):
    rows, _, prefix, weight = rows_of(1)
    values = {"prefix": prefix[0], "prefix_weight": weight[0], missing: None}
    with pytest.raises(ObservationError, match=missing):
        rtc.predict_action_chunk(rows[0], **values)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("prefix", (3, 2)),
        ("prefix", (4, 1)),
        ("prefix", (8,)),
        ("prefix", (1, 4, 2, 1)),
        ("prefix_weight", (3,)),
        ("prefix_weight", (4, 2)),
        ("prefix_weight", ()),
    ],
)
def test_a_prefix_of_another_shape_is_refused_with_both_shapes(rtc, batched, name, shape):
    rows, _, prefix, weight = rows_of(2)
    values = {"prefix": prefix, "prefix_weight": weight}
    expected = values[name].shape if batched else values[name].shape[1:]
    if not batched:
        rows, values = rows[0], {key: value[0] for key, value in values.items()}
    values[name] = np.zeros((2, *shape) if batched else shape)
    with pytest.raises(ObservationError) as caught:
        rtc.predict_action_chunk(rows, **values)
    for fragment in (name, str(values[name].shape), str(expected)):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prefix_of_another_number_of_rows_is_refused(rtc, rows):
    observations, *_ = rows_of(2)
    _, _, prefix, weight = rows_of(rows)
    with pytest.raises(ObservationError, match="prefix has shape"):
        rtc.predict_action_chunk(observations, prefix=prefix, prefix_weight=weight)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["prefix", "prefix_weight"])
def test_numbers_that_are_not_finite_are_refused_even_where_the_weight_is_zero(rtc, name, value):
    rows, _, prefix, _ = rows_of(1)
    values = {"prefix": prefix[0], "prefix_weight": np.zeros(4)}
    values[name].flat[-1] = value
    with pytest.raises(ObservationError, match=f"{name} .*expected finite numbers"):
        rtc.predict_action_chunk(rows[0], **values)


@pytest.mark.parametrize("value", [-0.01, 1.01, 7, -1e30])
def test_weights_beyond_zero_and_one_are_refused(rtc, value):
    rows, _, prefix, _ = rows_of(1)
    with pytest.raises(ObservationError, match=r"prefix_weight .* from 0 to 1"):
        rtc.predict_action_chunk(rows[0], prefix=prefix[0], prefix_weight=[0, 0, 0, value])


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_numbers_beyond_float32_are_refused(rtc, value):
    rows, _, prefix, _ = rows_of(1)
    prefix[0, 0, 0] = value
    with pytest.raises(ObservationError, match="prefix"):
        rtc.predict_action_chunk(rows[0], prefix=prefix[0], prefix_weight=np.ones(4))


@pytest.mark.parametrize("given", ["left", [["a", "b"]] * 4, [[None, 1]] * 4, [[1], [1, 2]], {"a": 1}, 1j])
@pytest.mark.parametrize("name", ["prefix", "prefix_weight"])
def test_what_is_no_number_is_refused(rtc, name, given):
    rows, _, prefix, weight = rows_of(1)
    values = {"prefix": prefix[0], "prefix_weight": weight[0], name: given}
    with pytest.raises(ObservationError, match=name):
        rtc.predict_action_chunk(rows[0], **values)


def test_a_refused_prefix_draws_no_noise(rtc, folder):
    rows, _, prefix, weight = rows_of(1)
    with pytest.raises(ObservationError):
        rtc.predict_action_chunk(rows[0], prefix=prefix[0, :2], prefix_weight=weight[0])
    expected = folder.load(variant="rtc", seed=0).predict_action_chunk(rows[0])
    np.testing.assert_array_equal(rtc.predict_action_chunk(rows[0]), expected)


def test_actions_beyond_the_bounds_are_clipped(rtc):
    rows, noise, _, _ = rows_of(1)
    for sign, bound in ((1, BOX.high), (-1, BOX.low)):
        prefix = np.full((4, 2), sign * 1e6)
        chunk = rtc.predict_action_chunk(rows[0], noise=noise[0], prefix=prefix, prefix_weight=np.ones(4))
        np.testing.assert_array_equal(chunk, np.broadcast_to(np.array(bound, np.float32), (4, 2)))


def test_a_network_that_overflows_is_an_action_error_even_under_a_prefix_of_weight_one(make_policy):
    linear = make_policy(action=BOX, action_offset=OFFSET, action_scale=SCALE)
    huge = np.full_like(linear.weight, np.finfo(np.float32).max)
    linear.add_continuing(weight=huge)
    policy = linear.load(variant="rtc")
    with pytest.raises(ActionError):
        policy.predict_action_chunk(np.full(3, 3.0), prefix=np.zeros((4, 2)), prefix_weight=np.ones(4))

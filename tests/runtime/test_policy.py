import copy
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from meam_policy import (
    ActionError,
    BoxSpec,
    ConfigError,
    ControlLoop,
    FormatError,
    Health,
    IntegrityError,
    MeamPolicy,
    NotFoundError,
    ObservationError,
    SafetySettings,
)
from meam_policy.inference.session import PolicySession

OBSERVATIONS = np.random.default_rng(3).integers(-8, 9, (40, 3, 3)).astype(np.float32) / 4


@pytest.fixture
def linear(make_policy):
    """3 observation numbers, chunks of 4 actions of 2 numbers, of which 2 are executed."""
    return make_policy()


def act_along(policy, observations, **arguments):
    return np.stack([policy.act(observation, **arguments) for observation in observations])


def test_sample_computes_what_numpy_computes(make_policy):
    random = np.random.default_rng(0)
    linear = make_policy(weight=random.normal(size=(3, 8)), noise_weight=random.normal(size=(8, 8)))
    rows, noise = random.normal(size=(5, 3)), random.normal(size=(5, 8))
    chunks = linear.load().sample(rows, noise)
    np.testing.assert_allclose(chunks, linear.chunks(rows, noise), rtol=1e-5, atol=1e-6)
    assert (np.abs(chunks) == 1).any(), "no action reaches its bound"
    assert (np.abs(chunks) < 1).any(), "every action is at its bound"


def test_deterministic_chunks_come_from_zero_noise(linear):
    rows = OBSERVATIONS[:, 0]
    policy = linear.load(seed=0)
    for row in rows:
        policy.reset()
        np.testing.assert_array_equal(policy.act(row, deterministic=True), linear.chunks([row])[0, 0])


@pytest.mark.parametrize("execute_steps", [1, 3, 4])
def test_actions_of_a_chunk_are_executed_in_order_until_execute_steps(make_policy, execute_steps):
    linear = make_policy(execute_steps=execute_steps)
    policy = linear.load()
    observations = OBSERVATIONS[:, 0]
    actions = act_along(policy, observations, deterministic=True)
    expected = [
        linear.chunks([observations[step - step % execute_steps]])[0, step % execute_steps]
        for step in range(len(observations))
    ]
    np.testing.assert_array_equal(actions, expected)
    assert policy.inferences == -(-len(observations) // execute_steps)


def test_first_action_after_reset_comes_from_the_new_observation(linear):
    policy = linear.load()
    old, new = OBSERVATIONS[0, 0], OBSERVATIONS[1, 0]
    policy.act(old, deterministic=True)
    policy.reset()
    np.testing.assert_array_equal(policy.act(new, deterministic=True), linear.chunks([new])[0, 0])


def test_without_reset_the_rest_of_the_chunk_is_executed(linear):
    policy = linear.load()
    old, new = OBSERVATIONS[0, 0], OBSERVATIONS[1, 0]
    policy.act(old, deterministic=True)
    np.testing.assert_array_equal(policy.act(new, deterministic=True), linear.chunks([old])[0, 1])


@pytest.mark.parametrize("deterministic", [True, False])
def test_episode_start_drops_only_the_chunks_of_its_rows(make_policy, deterministic):
    linear = make_policy(chunk_size=5, execute_steps=5, weight=np.eye(3, 10), noise_weight=np.eye(10) / 8)
    scale = 0 if deterministic else 1
    undisturbed, disturbed = (linear.load(seed=0, noise_scale=scale) for _ in range(2))
    start_at = {0: [True, True, True], 3: [False, True, False], 7: [False, True, False], 12: [True, False, False]}
    none = [False, False, False]
    plain = [
        undisturbed.predict(row, episode_start=np.array(start_at[0] if t == 0 else none), deterministic=deterministic)
        for t, row in enumerate(OBSERVATIONS)
    ]
    other = [
        disturbed.predict(row, episode_start=np.array(start_at.get(t, none)), deterministic=deterministic)
        for t, row in enumerate(OBSERVATIONS)
    ]
    plain, other = (np.stack([action for action, _ in pairs]) for pairs in (plain, other))
    np.testing.assert_array_equal(other[:, 2], plain[:, 2])
    np.testing.assert_array_equal(other[:12, 0], plain[:12, 0])
    np.testing.assert_array_equal(other[:3, 1], plain[:3, 1])
    assert not np.array_equal(other[3, 1], plain[3, 1])
    if deterministic:
        np.testing.assert_array_equal(other[3, 1], linear.chunks([OBSERVATIONS[3, 1]])[0, 0])
        np.testing.assert_array_equal(other[4, 1], linear.chunks([OBSERVATIONS[3, 1]])[0, 1])
        np.testing.assert_array_equal(other[7, 1], linear.chunks([OBSERVATIONS[7, 1]])[0, 0])
        np.testing.assert_array_equal(other[12, 0], linear.chunks([OBSERVATIONS[12, 0]])[0, 0])


def test_restarted_slots_leave_the_bits_of_wide_networks_alone(make_policy):
    random = np.random.default_rng(1)
    observation = BoxSpec((29,), "float32", (-np.inf,) * 29, (np.inf,) * 29)
    linear = make_policy(
        observation=[observation],
        chunk_size=5,
        execute_steps=5,
        weight=random.normal(size=(29, 10)) / 30,
        noise_weight=random.normal(size=(10, 10)) / 30,
    )
    rows = random.normal(size=(15, 4, 29))
    plain, disturbed = linear.load(seed=0), linear.load(seed=0)
    for step, batch in enumerate(rows):
        expected, _ = plain.predict(batch, episode_start=np.full(4, step == 0))
        starts = np.full(4, step == 0)
        starts[1:] |= step in (2, 3)
        actual, _ = disturbed.predict(batch, episode_start=starts)
        np.testing.assert_array_equal(actual[0], expected[0])


def test_a_batch_acts_like_its_rows_alone(linear):
    batch = linear.load()
    actions = act_along(batch, OBSERVATIONS, deterministic=True)
    for slot in range(3):
        alone = act_along(linear.load(), OBSERVATIONS[:, slot], deterministic=True)
        np.testing.assert_array_equal(actions[:, slot], alone)


def test_slots_of_a_batch_have_noise_of_their_own(linear):
    actions = linear.load(seed=0).act(np.zeros((3, 3)))
    assert len(np.unique(actions, axis=0)) == 3


def test_noise_of_a_slot_does_not_depend_on_the_number_of_slots(linear):
    few, many = linear.load(seed=5), linear.load(seed=5)
    np.testing.assert_array_equal(few.act(np.zeros((2, 3))), many.act(np.zeros((4, 3)))[:2])


def test_batch_size_may_change_only_with_a_reset(linear):
    policy = linear.load()
    policy.act(np.zeros((3, 3)))
    for other in (np.zeros((2, 3)), np.zeros(3)):
        with pytest.raises(ObservationError, match=r"began with 3\. Call policy\.reset"):
            policy.act(other)
    policy.reset()
    assert policy.act(np.zeros((2, 3))).shape == (2, 2)


def test_batch_size_may_change_when_every_episode_starts(linear):
    policy = linear.load()
    policy.predict(np.zeros((3, 3)), episode_start=np.ones(3, bool))
    actions, _ = policy.predict(np.zeros((2, 3)), episode_start=np.ones(2, bool))
    assert actions.shape == (2, 2)
    with pytest.raises(ObservationError, match="reset"):
        policy.predict(np.zeros((3, 3)), episode_start=np.array([True, False, True]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask", [[True], [True, True], [False] * 4, [[True] * 3]])
def test_episode_start_of_another_length_is_refused(linear, first, mask):
    policy = linear.load()
    if not first:
        policy.act(np.zeros((3, 3)))
    with pytest.raises(ObservationError, match=r"episode_start has shape .* expected \(3,\)"):
        policy.predict(np.zeros((3, 3)), episode_start=np.array(mask))


def test_refused_observation_leaves_the_queue_as_it_was(linear):
    policy = linear.load()
    old = OBSERVATIONS[0, 0]
    policy.act(old, deterministic=True)
    for bad in (np.zeros(4), [np.nan, 0, 0], {"a": 1}):
        with pytest.raises(ObservationError):
            policy.act(bad)
    np.testing.assert_array_equal(policy.act(old, deterministic=True), linear.chunks([old])[0, 1])


def test_nothing_of_an_old_episode_is_executed_after_a_refused_first_observation(linear):
    policy, (old, new) = linear.load(), OBSERVATIONS[:2, 0]
    policy.act(old, deterministic=True)
    with pytest.raises(ObservationError):
        policy.predict([np.nan, 0, 0], episode_start=np.array([True]))
    np.testing.assert_array_equal(policy.act(new, deterministic=True), linear.chunks([new])[0, 0])


def test_predict_returns_the_action_of_act_and_no_state(linear):
    first, second = linear.load(seed=1), linear.load(seed=1)
    for step in range(6):
        start = np.array([step == 0])
        action, state = first.predict(OBSERVATIONS[step, 0], state="ignored", episode_start=start)
        np.testing.assert_array_equal(action, second.act(OBSERVATIONS[step, 0]))
        assert state is None


def test_same_seed_gives_the_same_actions(linear):
    runs = [act_along(linear.load(seed=seed), OBSERVATIONS) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_unseeded_policies_differ(linear):
    assert not np.array_equal(linear.load().sample(np.zeros(3)), linear.load().sample(np.zeros(3)))


def test_reset_with_a_seed_repeats_and_without_one_goes_on(linear):
    policy = linear.load(seed=0)
    first = act_along(policy, OBSERVATIONS)
    policy.reset(seed=0)
    np.testing.assert_array_equal(act_along(policy, OBSERVATIONS), first)
    policy.reset()
    assert not np.array_equal(act_along(policy, OBSERVATIONS), first)


def test_noise_of_act_is_standard_normal(make_policy):
    linear = make_policy(
        chunk_size=1,
        execute_steps=1,
        weight=np.zeros((3, 2)),
        noise_weight=np.eye(2),
        action=BoxSpec((2,), "float32", (-np.inf,) * 2, (np.inf,) * 2),
    )
    policy = linear.unchecked(seed=0)
    draws = act_along(policy, np.zeros((500, 4, 3))).reshape(-1, 2)
    # 2000 draws: five standard errors of the mean, of the variance and of the correlation.
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=5 / np.sqrt(2000))
    np.testing.assert_allclose(draws.var(axis=0), 1, atol=5 * np.sqrt(2 / 2000))
    assert abs(np.corrcoef(draws.T)[0, 1]) < 5 / np.sqrt(2000)


def test_sample_leaves_the_action_queue_alone(linear):
    policy = linear.load()
    old, new = OBSERVATIONS[0, 0], OBSERVATIONS[1, 0]
    policy.act(old, deterministic=True)
    before = policy.inferences
    policy.sample(new, seed=0)
    policy.sample(OBSERVATIONS[:, 0], seed=0)
    assert policy.inferences == before
    np.testing.assert_array_equal(policy.act(new, deterministic=True), linear.chunks([old])[0, 1])


def test_sample_with_a_seed_is_reproducible_and_leaves_the_stream_of_act_alone(linear):
    plain, other = linear.load(seed=0), linear.load(seed=0)
    rows = OBSERVATIONS[:, 0]
    np.testing.assert_array_equal(other.sample(rows, seed=3), plain.sample(rows, seed=3))
    assert not np.array_equal(other.sample(rows, seed=3), other.sample(rows, seed=4))
    np.testing.assert_array_equal(other.act(rows[0]), linear.load(seed=0).act(rows[0]))


def test_sample_without_a_seed_goes_on_drawing(linear):
    policy = linear.load(seed=0)
    assert not np.array_equal(policy.sample(np.zeros(3)), policy.sample(np.zeros(3)))


def test_sample_takes_noise_of_any_real_type(linear):
    noise = np.arange(8) - 4
    expected = linear.chunks([OBSERVATIONS[0, 0]], noise)[0]
    policy = linear.load()
    for same in (noise, noise.tolist(), noise.astype(">f8"), noise.astype(np.float32)):
        np.testing.assert_array_equal(policy.sample(OBSERVATIONS[0, 0], same), expected)
    np.testing.assert_array_equal(policy.sample(OBSERVATIONS[:1, 0], noise[None]), expected[None])


@pytest.mark.parametrize("noise", [np.zeros(7), np.zeros((1, 8)), np.zeros((4, 2)), 0.0])
def test_noise_of_another_shape_is_refused(linear, noise):
    with pytest.raises(ObservationError, match=re.escape("expected (8,)")):
        linear.load().sample(np.zeros(3), noise)


@pytest.mark.parametrize("noise", ["noise", np.zeros(8, complex), np.zeros(8, bool), [None] * 8, [[1], [1, 2]]])
def test_noise_that_is_no_array_of_real_numbers_is_refused(linear, noise):
    policy = linear.load()
    for call in (policy.sample, policy.select_action):
        with pytest.raises(ObservationError, match=r"Noise .*; expected an array of real numbers"):
            call(np.zeros(3), noise)


def test_noise_that_is_too_large_for_float32_is_said_to_be(linear):
    with pytest.raises(ObservationError, match=r"Noise has 1e\+300, too large for float32; expected numbers within"):
        linear.load().sample(np.zeros(3), np.full(8, 1e300))


@pytest.mark.parametrize("where", ["act", "sample", "predict_action_chunk", "predict"])
def test_an_observation_that_is_too_large_for_float32_is_said_to_be(linear, where):
    with pytest.raises(ObservationError, match=r"Observation is 1e\+300 at index \[1\], too large for float32"):
        getattr(linear.load(), where)([0, 1e300, 0])


def test_an_observation_that_is_too_large_for_float32_is_held_like_any_bad_one(linear):
    policy = linear.load(safety=SafetySettings(on_bad_observation="neutral"))
    np.testing.assert_array_equal(policy.act([0, 1e300, 0]), np.zeros(2))
    assert policy.health().bad_observations == 1


@pytest.mark.parametrize(
    ("seeds", "seen"),
    [
        ([], "empty"),
        ((), "empty"),
        (np.zeros(0, int), "empty"),
        (range(10**9), "1,000,000,000 numbers"),
        (range(10**30), "[0-9,]+ numbers"),
        (range(65_537), "65,537 numbers"),
    ],
)
@pytest.mark.parametrize("mask", [None, np.ones(2, bool)])
def test_no_seeds_and_far_too_many_are_refused_before_any_is_looked_at(linear, seeds, seen, mask):
    with pytest.raises(ConfigError, match=f"seed is {seen}; expected .* one for each of at most 65,536 slots"):
        linear.load().reset(seed=seeds, mask=mask)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_noise_that_is_not_finite_is_refused(linear, value):
    with pytest.raises(ObservationError, match="Noise holds NaN or infinity"):
        linear.load().sample(np.zeros(3), np.full(8, value))


def test_a_policy_that_chooses_among_several_chunks_takes_the_noise_of_all_of_them(make_policy):
    linear = make_policy(best_of=3)
    policy = linear.load(seed=0)
    assert policy.spec.noise_dim == 24
    noise = np.random.default_rng(0).normal(size=(3, 24))
    chunks = policy.sample(OBSERVATIONS[0], noise)
    assert chunks.shape == (3, 4, 2)
    np.testing.assert_allclose(chunks, linear.chunks(OBSERVATIONS[0], noise), rtol=1e-5, atol=1e-6)
    with pytest.raises(ObservationError, match=r"expected \(24,\)"):
        policy.sample(OBSERVATIONS[0, 0], noise[0, :8])
    assert policy.act(OBSERVATIONS[0]).shape == (3, 2)


def test_variant_acts_as_its_graph_and_says_which_it_is(linear, make_policy):
    other = make_policy(weight=-np.ones((3, 8)) / 4)
    linear.add_variant("k3", other.graph, nfe=4, solver="midpoint", time_grid=(0.0, 0.25, 1.0))
    row = OBSERVATIONS[0, 0]
    trained, variant = linear.load(), linear.load(variant="k3")
    assert (trained.variant, variant.variant) == (None, "k3")
    np.testing.assert_array_equal(trained.act(row, deterministic=True), linear.chunks([row])[0, 0])
    np.testing.assert_array_equal(variant.act(row, deterministic=True), other.chunks([row])[0, 0])
    seen = (variant.spec.integration.nfe, variant.spec.integration.solver, variant.spec.integration.time_grid)
    assert seen == (4, "midpoint", (0.0, 0.25, 1.0))
    assert trained.spec.integration.solver == "euler"


def test_variant_that_chooses_among_chunks_takes_more_noise_than_the_policy(linear, make_policy):
    choosing = make_policy(best_of=3)
    linear.add_variant("best-of-3", choosing.graph, best_of=3)
    policy = linear.load(variant="best-of-3", seed=0)
    noise = np.random.default_rng(0).integers(-8, 9, (3, 24)) / 8
    np.testing.assert_array_equal(policy.sample(OBSERVATIONS[0], noise), choosing.chunks(OBSERVATIONS[0], noise))
    assert (linear.load().spec.noise_dim, policy.spec.noise_dim) == (8, 24)


def test_unknown_variant_is_refused_with_the_known_ones(linear):
    with pytest.raises(ConfigError, match='no variant "k3"; it has: none'):
        linear.load(variant="k3")
    linear.add_variant("k1", linear.graph)
    with pytest.raises(ConfigError, match='no variant "k3"; it has: k1'):
        linear.load(variant="k3")


@pytest.mark.parametrize("change", ["damage", "remove"])
def test_broken_variant_is_refused_by_its_file_and_the_policy_itself_still_loads(linear, change):
    linear.add_variant("k3", linear.graph)
    path = linear.folder / "k3.onnx"
    if change == "damage":
        path.write_bytes(linear.graph[:-1] + b"?")
    else:
        path.unlink()
    with pytest.raises((IntegrityError, NotFoundError), match=r"k3\.onnx"):
        linear.load(variant="k3")
    linear.load()


def test_graph_of_a_variant_is_named_in_what_is_wrong_with_it(linear, make_policy):
    linear.add_variant("k3", make_policy(graph_dims=(5, 8, 4, 2)).graph)
    linear.add_variant("k1", b"not a graph")
    with pytest.raises(FormatError, match=r'^k3\.onnx: "observation" is .* as config\.json says'):
        linear.load(variant="k3")
    with pytest.raises(FormatError, match=r"^k1\.onnx is not a valid ONNX file"):
        linear.load(variant="k1")


def test_noise_and_seed_exclude_each_other(linear):
    with pytest.raises(ObservationError, match="at most one"):
        linear.load().sample(np.zeros(3), np.zeros(8), seed=0)


BOUNDS = [
    BoxSpec((2,), "float64", (-0.1, -0.3), (0.1, 0.7)),
    BoxSpec((2,), "float32", (-0.1, 0.2), (0.1, 0.2)),
    BoxSpec((2,), "float16", (-0.1, -1.0), (0.1, 1.0)),
    BoxSpec((1, 2), "float64", (-0.1, -1e12), (0.1, 1e12)),
    BoxSpec((), "float64", (-0.1,), (0.1,)),
]


@pytest.mark.parametrize("action", BOUNDS, ids=lambda box: f"{box.dtype} {box.shape}")
def test_actions_are_members_of_the_action_space(make_policy, action):
    observation = BoxSpec((3,), "float32", (-np.inf,) * 3, (np.inf,) * 3)
    size = 4 * action.size
    linear = make_policy(
        observation=[observation], action=action, weight=np.full((3, size), 50.0), noise_weight=np.eye(size)
    )
    policy = linear.load(seed=0)
    space = policy.spec.action_space
    for sign in (-1, 1):
        policy.reset()
        for _ in range(4):
            single = policy.act(np.full(3, sign))
            assert isinstance(single, np.ndarray)
            assert (single.dtype, single.shape) == (space.dtype, space.shape)
            assert space.contains(single)
        policy.reset()
        batch = policy.act(np.full((3, 3), sign))
        assert batch.shape == (3, *action.shape)
        assert all(space.contains(np.asarray(row)) for row in batch)


def test_float64_bound_that_rounds_outwards_in_float32_is_kept(make_policy):
    outwards = np.float64(np.float32(0.1))
    assert outwards > 0.1
    action = BoxSpec((2,), "float64", (-0.1, -0.1), (0.1, 0.1))
    policy = make_policy(action=action, weight=np.full((3, 8), 9.0)).load()
    np.testing.assert_array_equal(policy.act(np.ones(3), deterministic=True), [0.1, 0.1])
    policy.reset()
    np.testing.assert_array_equal(policy.act(-np.ones(3), deterministic=True), [-0.1, -0.1])


def test_returned_arrays_never_alias(linear):
    policy = linear.load()
    observation = np.zeros((2, 3))
    actions = [policy.act(observation, deterministic=True) for _ in range(4)]
    copies = [action.copy() for action in actions]
    for action in actions:
        action[:] = 77
    later = [policy.act(observation, deterministic=True) for _ in range(4)]
    np.testing.assert_array_equal(later, copies)
    chunks = [policy.sample(observation, seed=0) for _ in range(2)]
    chunks[0][:] = 77
    np.testing.assert_array_equal(chunks[1], policy.sample(observation, seed=0))
    single = policy.sample(observation[0], seed=0)
    single[:] = 77
    assert not np.array_equal(single, policy.sample(observation[0], seed=0))


def test_single_observation_gives_a_single_action_and_chunk(linear):
    policy = linear.load()
    assert policy.act(np.zeros(3)).shape == (2,)
    assert policy.sample(np.zeros(3)).shape == (4, 2)
    policy.reset()
    assert policy.act(np.zeros((1, 3))).shape == (1, 2)
    assert policy.sample(np.zeros((1, 3))).shape == (1, 4, 2)


def test_graph_that_produces_nan_gives_an_action_error_and_no_action(make_policy):
    policy = make_policy(weight=-np.ones((3, 8)), noise_weight=np.zeros((8, 8)), through="Sqrt").load()
    for call in (policy.act, policy.sample, policy.predict):
        with pytest.raises(ActionError, match="NaN or infinity"):
            call(np.ones(3))


def test_infinity_on_an_unbounded_side_is_an_action_error(make_policy):
    action = BoxSpec((2,), "float32", (-1.0, -1.0), (np.inf, np.inf))
    policy = make_policy(action=action, weight=np.full((3, 8), 3e38)).unchecked()
    with pytest.raises(ActionError, match="NaN or infinity"):
        policy.act(np.ones(3))
    np.testing.assert_array_equal(policy.act(-np.ones(3)), [-1, -1])


def test_policy_goes_on_after_an_action_error(make_policy):
    policy = make_policy(weight=np.eye(3, 8) + 1, through="Sqrt").load()
    with pytest.raises(ActionError):
        policy.act([-1, -1, -1], deterministic=True)
    np.testing.assert_array_equal(policy.act([0, 0, 0.25], deterministic=True), [0.5, 0.5])


def test_dict_observation_reaches_the_graph_in_the_recorded_order(make_policy):
    boxes = [
        BoxSpec((2,), "float32", (-np.inf,) * 2, (np.inf,) * 2, "wrist"),
        BoxSpec((1,), "float32", (-np.inf,), (np.inf,), "arm"),
    ]
    linear = make_policy(observation=boxes)
    action = linear.load().act({"arm": [0.75], "wrist": [0.25, -0.5]}, deterministic=True)
    np.testing.assert_array_equal(action, linear.chunks([[0.25, -0.5, 0.75]])[0, 0])


def test_observation_forms_make_no_difference_to_the_action(linear):
    policy = linear.load()
    expected = linear.chunks([[1, 2, -1]])[0, 0]
    for same in (
        [1, 2, -1],
        (1, 2, -1),
        np.array([1, 2, -1]),
        np.array([1, 2, -1], np.float64),
        np.array([1, 2, -1], np.float16),
        np.array([1, 2, -1], ">f4"),
        np.array([1, 2, -1], ">f8"),
        np.array([1, 2, -1], ">i2"),
        np.array([1, 9, 2, 9, -1, 9], np.float32)[::2],
        np.array([-1, 2, 1], np.float32)[::-1],
    ):
        policy.reset()
        np.testing.assert_array_equal(policy.act(same, deterministic=True), expected)


def test_forms_of_a_batch_make_no_difference_to_actions_and_chunks(linear):
    policy = linear.load()
    batch = OBSERVATIONS[0]
    actions, chunks = policy.act(batch, deterministic=True), policy.sample(batch, seed=0)
    wide = np.repeat(batch, 2, axis=1)
    for same in (batch.tolist(), np.asfortranarray(batch), batch.astype(">f8"), wide[:, ::2], list(batch)):
        policy.reset()
        np.testing.assert_array_equal(policy.act(same, deterministic=True), actions)
        np.testing.assert_array_equal(policy.sample(same, seed=0), chunks)


def test_same_folder_can_be_loaded_twice_and_used_side_by_side(linear):
    one, two = linear.load(seed=0), MeamPolicy.from_pretrained(str(linear.folder), seed=0)
    for observation in OBSERVATIONS[:6]:
        np.testing.assert_array_equal(one.act(observation), two.act(observation))


def test_negative_seeds_are_refused(make_policy):
    policy = MeamPolicy.from_pretrained(make_policy().folder)
    for call in (lambda: policy.reset(seed=-1), lambda: policy.sample(np.zeros(3), seed=-1)):
        with pytest.raises(ConfigError, match="seed is -1"):
            call()


@pytest.mark.parametrize("seed", [1.0, 1.5, "1", True, [1, -2], [1, None], ["1"], np.array([0.5]), "12"])
def test_seeds_that_are_no_whole_numbers_are_refused(linear, seed):
    with pytest.raises(ConfigError, match=r"seed is .*; expected a whole number of 0 or more"):
        linear.load().reset(seed=seed)


def test_seeds_may_be_numpy_numbers_and_arrays(linear):
    expected = linear.load(seed=3).act(OBSERVATIONS[0, 0])
    policy = linear.load()
    for seed in (np.int64(3), np.uint8(3)):
        policy.reset(seed=seed)
        np.testing.assert_array_equal(policy.act(OBSERVATIONS[0, 0]), expected)
    policy.reset(seed=np.array([3, 4]))
    np.testing.assert_array_equal(policy.act(OBSERVATIONS[0, :2])[0], expected)


def test_slot_with_a_seed_draws_what_a_policy_for_it_alone_draws(linear):
    policy = linear.load(seed=9)
    act_along(policy, OBSERVATIONS[:5])
    policy.reset(seed=[4, 7, 4])
    actions = act_along(policy, OBSERVATIONS)
    for slot, seed in enumerate([4, 7, 4]):
        alone = linear.load(seed=1)
        alone.reset(seed=seed)
        np.testing.assert_array_equal(actions[:, slot], act_along(alone, OBSERVATIONS[:, slot]))


@pytest.mark.parametrize("seed", [None, 5, [5, 6, 7]])
def test_reset_of_some_slots_leaves_the_others_as_they_are(linear, seed):
    plain, policy = linear.load(seed=0), linear.load(seed=0)
    expected = act_along(plain, OBSERVATIONS)
    first = act_along(policy, OBSERVATIONS[:5])
    policy.reset(seed=seed, mask=np.array([False, True, True]))
    later = act_along(policy, OBSERVATIONS[5:])
    actions = np.concatenate([first, later])
    np.testing.assert_array_equal(actions[:, 0], expected[:, 0])
    if seed is None:
        # One more chunk began: the noise goes on where it was.
        policy, resets = linear.load(seed=0), np.array([True, True, True])
        act_along(policy, OBSERVATIONS[:5])
        policy.reset(mask=resets)
        np.testing.assert_array_equal(later[:, 1:], act_along(policy, OBSERVATIONS[5:])[:, 1:])
        return
    policy.reset(seed=seed)
    np.testing.assert_array_equal(later[:, 1:], act_along(policy, OBSERVATIONS[5:])[:, 1:])


def test_reset_of_some_slots_with_seeds_before_the_first_action_counts(linear):
    policy = linear.load(seed=0)
    policy.reset(seed=[5, 6, 7], mask=np.array([True, False, True]))
    actions = policy.act(OBSERVATIONS[0])
    plain = linear.load(seed=0).act(OBSERVATIONS[0])
    np.testing.assert_array_equal(actions[1], plain[1])
    for slot, seed in ((0, 5), (2, 7)):
        np.testing.assert_array_equal(actions[slot], linear.load(seed=seed).act(OBSERVATIONS[0, slot]))


@pytest.mark.parametrize("mask", [[True], [True, True], [True] * 4, [False] * 2, [[True] * 3], [], True])
def test_mask_of_another_length_is_refused_and_changes_nothing(linear, mask):
    plain, policy = linear.load(seed=0), linear.load(seed=0)
    for number, rows in enumerate(OBSERVATIONS[:7]):
        if number == 3:
            for seed in (None, 1, [1, 2, 3]):
                with pytest.raises(
                    ConfigError, match=r"mask has shape .* for .*3 .*; expected one entry for each slot"
                ):
                    policy.reset(seed=seed, mask=np.array(mask, bool))
        np.testing.assert_array_equal(policy.act(rows), plain.act(rows))


def test_mask_and_seeds_of_different_lengths_are_refused(linear):
    policy = linear.load()
    with pytest.raises(ConfigError, match=r"mask has shape \(3,\), for 2 seeds"):
        policy.reset(seed=[1, 2], mask=np.array([True, False, True]))
    policy.act(OBSERVATIONS[0])
    with pytest.raises(ConfigError, match="for 2 seeds and 3 slots of this episode"):
        policy.reset(seed=[1, 2], mask=np.array([True, False]))


def test_batch_must_have_as_many_rows_as_seeds_were_given(linear):
    policy = linear.load()
    policy.reset(seed=[1, 2])
    with pytest.raises(ObservationError, match="Observation batch is 3, but this episode began with 2"):
        policy.act(OBSERVATIONS[0])
    assert policy.act(OBSERVATIONS[0, :2]).shape == (2, 2)


def test_select_action_uses_the_noise_only_for_chunks_that_begin(linear):
    policy = linear.load(seed=0)
    noises = np.random.default_rng(0).integers(-8, 9, (6, 3, 8)) / 8
    actions = []
    for number, (rows, noise) in enumerate(zip(OBSERVATIONS, noises, strict=False)):
        if number == 3:
            policy.reset(mask=np.array([False, True, False]))
        actions.append(policy.select_action(rows, noise=noise))
    starts = {0: [0, 2, 4], 1: [0, 2, 3, 5], 2: [0, 2, 4]}
    for slot, begins in starts.items():
        for step, action in enumerate(np.stack(actions)[:, slot]):
            begin = max(b for b in begins if b <= step)
            chunk = linear.chunks([OBSERVATIONS[begin, slot]], noises[begin, slot])[0]
            np.testing.assert_array_equal(action, chunk[step - begin])


def test_select_action_without_noise_is_act(linear):
    one, two = linear.load(seed=0), linear.load(seed=0)
    for rows in OBSERVATIONS[:5]:
        np.testing.assert_array_equal(one.select_action(rows), two.act(rows))
    one.reset()
    with pytest.raises(ObservationError, match=re.escape("expected (3, 8)")):
        one.select_action(OBSERVATIONS[0], noise=np.zeros(8))


@pytest.mark.parametrize("best_of", [1, 3])
def test_deterministic_chunk_is_that_of_zero_noise(make_policy, best_of):
    linear = make_policy(best_of=best_of)
    policy = linear.load(seed=0)
    for rows in (OBSERVATIONS[0, 0], OBSERVATIONS[0]):
        chunks = policy.predict_action_chunk(rows, deterministic=True)
        expected = linear.chunks(np.atleast_2d(rows))
        np.testing.assert_array_equal(chunks, expected if rows.ndim == 2 else expected[0])
        noise = np.ones((*rows.shape[:-1], policy.spec.noise_dim))
        given = policy.predict_action_chunk(rows, noise=noise)
        np.testing.assert_array_equal(given, policy.sample(rows, noise))
        assert not np.array_equal(given, chunks)
    np.testing.assert_array_equal(
        policy.predict_action_chunk(OBSERVATIONS[0]), linear.load(seed=0).sample(OBSERVATIONS[0])
    )


def test_number_of_samples_may_be_changed_where_the_graph_chooses(make_policy):
    linear = make_policy(best_of=3)
    noise = np.random.default_rng(0).integers(-8, 9, (3, 40)) / 8
    policy = linear.load(best_of=5, seed=0)
    assert (policy.spec.integration.best_of, policy.spec.noise_dim) == (5, 40)
    assert linear.load().spec.integration.best_of == 3
    every = noise.reshape(3, 5, 8)
    one = np.stack([linear.chunks(OBSERVATIONS[0], np.tile(every[:, k], 3)) for k in range(5)])
    best = one.sum(axis=(2, 3)).argmax(axis=0)
    np.testing.assert_array_equal(policy.sample(OBSERVATIONS[0], noise), one[best, np.arange(3)])
    assert policy.act(OBSERVATIONS[0]).shape == (3, 2)


@pytest.mark.parametrize("best_of", [-1, 0, 1, 10_001])
def test_number_of_samples_out_of_range_is_refused(make_policy, best_of):
    with pytest.raises(ConfigError, match=f"best_of is {best_of}; expected 2 to 10000"):
        make_policy(best_of=3).load(best_of=best_of)


def test_number_of_samples_is_refused_where_the_graph_does_not_choose(linear):
    with pytest.raises(ConfigError, match="of a graph that chooses by value"):
        linear.load(best_of=4)


def test_eight_threads_sampling_with_given_noise_give_the_serial_results(make_policy):
    random = np.random.default_rng(0)
    linear = make_policy(weight=random.normal(size=(3, 8)), noise_weight=random.normal(size=(8, 8)))
    policy = linear.load()
    rows = [random.normal(size=(size, 3)) for size in range(1, 41)]
    noises = [random.normal(size=(len(row), 8)) for row in rows]
    serial = [policy.sample(row, noise) for row, noise in zip(rows, noises, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for chunks, expected in zip(pool.map(policy.sample, rows, noises), serial, strict=True):
                np.testing.assert_array_equal(chunks, expected)


def test_threads_that_act_take_the_actions_of_one_queue_in_turn(linear):
    serial = linear.load(seed=0)
    expected = [serial.act(OBSERVATIONS[0]) for _ in range(400)]
    policy = linear.load(seed=0)
    with ThreadPoolExecutor(8) as pool:
        actions = list(pool.map(lambda _: policy.act(OBSERVATIONS[0]), range(400)))
    assert sorted(map(np.ndarray.tolist, actions)) == sorted(map(np.ndarray.tolist, expected))
    assert policy.health() == serial.health()


def test_health_is_readable_while_another_thread_acts(linear):
    policy = linear.load()
    with policy._lock:
        reader = threading.Thread(target=policy.health, daemon=True)
        reader.start()
        reader.join(5)
        assert not reader.is_alive()


def test_loading_leaves_counters_and_noise_untouched(make_policy):
    linear = make_policy(observation_mean=(0.5, -1.0, 2.0))
    policy = linear.load(seed=3)
    by_hand = MeamPolicy(linear.spec, PolicySession(linear.graph, linear.spec), seed=3)
    assert policy.health() == Health()
    assert policy.inferences == 0
    np.testing.assert_array_equal(act_along(policy, OBSERVATIONS), act_along(by_hand, OBSERVATIONS))
    np.testing.assert_array_equal(policy.sample(OBSERVATIONS[0]), by_hand.sample(OBSERVATIONS[0]))
    assert policy.health() == by_hand.health()


def test_graph_that_fails_at_the_mean_observation_is_loaded_and_fails_where_it_acts(linear, monkeypatch):
    def fail(*_, **__):
        raise ActionError("the graph failed")

    monkeypatch.setattr(PolicySession, "run_all", fail)
    policy = linear.load()
    with pytest.raises(ActionError, match="the graph failed"):
        policy.act(np.zeros(3))


def box(low, high):
    return BoxSpec((len(low),), "float32", low, high)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"observation_mean": (1e300, 0.0, 0.0)}, "observation_mean[0] is 1e+300; expected a number from -1e+18"),
        ({"observation_mean": (0.0, -1e19, 0.0)}, "observation_mean[1] is -1e+19"),
        ({"observation_std": (1.0, 1e-40, 1.0)}, "observation_std[1] is 1e-40; expected a number from 1e-18 to 1e+18"),
        ({"observation_std": (1.0, 1.0, 1e30)}, "observation_std[2] is 1e+30"),
        ({"action_scale": (1e-45, 1.0)}, "action_scale[0] is 1e-45"),
        ({"action_scale": (1.0, 1e38)}, "action_scale[1] is 1e+38"),
        ({"action": box((-np.inf, -1.0), (1.0, 1.0))}, "action.low[0] is null; expected a bound from -1e+18 to 1e+18"),
        ({"action": box((-1.0, -1.0), (1.0, np.inf))}, "action.high[1] is null"),
        ({"action": box((-1.0, -1.0), (3.4e38, 1.0))}, "action.high[0] is 3.4e+38"),
        (
            {"action": box((1.0, 0.0), (1.0, 0.0))},
            "action is a box whose bounds are equal; expected at least one number",
        ),
        ({"action": box((1.0, 1e9), (1.0, 1e9 + 1))}, "action is a box whose bounds are equal"),
    ],
)
def test_numbers_that_no_machine_may_be_moved_by_are_refused(make_policy, changes, named):
    with pytest.raises(FormatError, match=re.escape(f"config.json: {named}")):
        make_policy(**changes).load()


def test_a_locked_joint_and_small_and_large_units_are_loaded(make_policy):
    action = box((-1e15, 0.3), (1e15, 0.3))
    made = make_policy(action=action, observation_std=(1e-12, 1.0, 1e12), observation_mean=(-1e15, 0.0, 0.0))
    assert made.load().act(np.zeros(3))[1] == np.float32(0.3)


def test_repr_is_one_line_with_source_network_and_spaces(linear, make_policy):
    linear.add_variant("best-of-3", make_policy(best_of=3).graph, best_of=3)
    shown = "provider='CPUExecutionProvider', observation=(3,), action=(2,), chunk=4)"
    assert repr(linear.load()) == f"MeamPolicy('{linear.folder}', method='by hand', variant=None, {shown}"
    assert f"variant='best-of-3', {shown}" in repr(linear.load(variant="best-of-3"))
    by_hand = MeamPolicy(linear.spec, PolicySession(linear.graph, linear.spec))
    assert repr(by_hand) == f"MeamPolicy(method='by hand', variant=None, {shown}"
    boxes = [BoxSpec((n,), "float32", (-np.inf,) * n, (np.inf,) * n, key) for key, n in (("joints", 3), ("goal", 1))]
    keyed = make_policy(observation=boxes)
    assert "observation={'joints': (3,), 'goal': (1,)}" in repr(keyed.load())


def test_pickle_says_only_where_the_policy_is(linear):
    policy = linear.load(seed=3, token="hf_secret", safety=SafetySettings(rate_limit=[0.5, 0.5]))
    act_along(policy, OBSERVATIONS[:3])
    data = pickle.dumps(policy)
    assert len(data) < 1000
    assert str(linear.folder).encode() in data
    for secret in (b"hf_secret", linear.weight.tobytes(), linear.weight[:, 0].tobytes()):
        assert secret not in data
    copied = pickle.loads(data)
    fresh = linear.load(seed=3, safety=SafetySettings(rate_limit=[0.5, 0.5]))
    np.testing.assert_array_equal(act_along(copied, OBSERVATIONS), act_along(fresh, OBSERVATIONS))
    assert copied.health().rate_limited > 0


def test_copy_of_a_policy_shares_nothing_with_it(linear):
    policy = linear.load(seed=3)
    other = copy.deepcopy(policy)
    expected = act_along(linear.load(seed=3), OBSERVATIONS)
    np.testing.assert_array_equal(act_along(policy, OBSERVATIONS), expected)
    np.testing.assert_array_equal(act_along(other, OBSERVATIONS), expected)


def test_pickle_keeps_variant_and_options(linear, make_policy):
    linear.add_variant("best-of-3", make_policy(best_of=3).graph, best_of=3)
    policy = linear.load(variant="best-of-3", best_of=4, fixed_batch=3, seed=0)
    copied = pickle.loads(pickle.dumps(policy))
    assert (copied.variant, copied.spec) == ("best-of-3", policy.spec)
    np.testing.assert_array_equal(copied.act(OBSERVATIONS[0]), policy.act(OBSERVATIONS[0]))


def test_pickle_of_a_relative_folder_is_read_elsewhere(linear, tmp_path, monkeypatch):
    monkeypatch.chdir(linear.folder.parent)
    data = pickle.dumps(MeamPolicy.from_pretrained(linear.folder.name, seed=0))
    monkeypatch.chdir(tmp_path)
    expected = linear.load(seed=0).act(OBSERVATIONS[0])
    np.testing.assert_array_equal(pickle.loads(data).act(OBSERVATIONS[0]), expected)


def test_pickle_of_a_folder_that_has_vanished_is_refused(linear):
    data = pickle.dumps(linear.load())
    shutil.rmtree(linear.folder)
    with pytest.raises(NotFoundError, match=re.escape(f"{linear.folder} does not exist")):
        pickle.loads(data)


def test_pickle_that_finds_another_export_is_refused(linear, make_policy):
    policy = linear.load(seed=0)
    data = pickle.dumps(policy)
    other = make_policy(weight=np.ones((3, 8)) / 8)
    for name in ("config.json", "policy.onnx"):
        (linear.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(IntegrityError, match=r"holds another export now: config\.json has SHA-256 .*Load it again"):
        pickle.loads(data)
    with pytest.raises(IntegrityError, match="holds another export now"):
        copy.copy(policy)
    np.testing.assert_array_equal(linear.load(seed=0).act(OBSERVATIONS[0]), other.load(seed=0).act(OBSERVATIONS[0]))


def test_policy_made_by_hand_refuses_to_be_pickled(linear):
    policy = MeamPolicy(linear.spec, PolicySession(linear.graph, linear.spec), seed=0)
    np.testing.assert_array_equal(policy.act(OBSERVATIONS[0]), linear.load(seed=0).act(OBSERVATIONS[0]))
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match=r"not made by from_pretrained.*MeamPolicy\.from_pretrained"):
            write(policy)


@pytest.fixture
def hub_cache(linear, tmp_path):
    """A Hub cache that holds robots/pockets at one commit, without a network."""
    commit = "a1" * 20
    repository = tmp_path / "models--robots--pockets"
    shutil.copytree(linear.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path, commit


def test_pickle_of_a_hub_policy_is_its_repository_and_commit(linear, make_policy, hub_cache, monkeypatch):
    cache, commit = hub_cache
    monkeypatch.chdir(cache.parent)
    policy = MeamPolicy.from_pretrained(
        "robots/pockets", cache_dir=cache.name, local_files_only=True, token="hf_secret", seed=0
    )
    data = pickle.dumps(policy)
    assert len(data) < 1000
    assert b"robots/pockets" in data
    assert commit.encode() in data
    assert b"hf_secret" not in data
    # The branch moves on; the pickle stays with its commit, and needs no network for it.
    newer = "b2" * 20
    repository = cache / "models--robots--pockets"
    shutil.copytree(make_policy(weight=np.ones((3, 8))).folder, repository / "snapshots" / newer)
    (repository / "refs" / "main").write_text(newer)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(data).act(OBSERVATIONS[0]), linear.load(seed=0).act(OBSERVATIONS[0]))


FORKED = """
import os, sys, threading
from meam_policy import ForkError, MeamPolicy

policy = MeamPolicy.from_pretrained(sys.argv[1], seed=0)
expected = policy.act([0.5, 0, 0]).tolist()
holding, held = threading.Event(), threading.Event()

def hold():
    with policy._lock:
        held.set()
        holding.wait()

# A lock that another thread holds while the process is forked is never released in the child.
if sys.argv[2] == "locked":
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
child = os.fork()
if child == 0:
    refused = 0
    calls = policy.act, policy.sample, policy.predict, policy.select_action, policy.predict_action_chunk
    for call in (*calls, lambda _: policy.reset()):
        try:
            call([0.5, 0, 0])
        except ForkError as error:
            refused += f"in process {os.getppid()} and is used in process {os.getpid()}" in str(error)
            refused += "spawn" in str(error) and "os._exit()" in str(error)
    policy.health()
    own = MeamPolicy.from_pretrained(sys.argv[1], seed=0) if sys.argv[2] == "load" else None
    os._exit(0 if refused == 12 and (own is None or own.act([0.5, 0, 0]).tolist() == expected) else 1)
holding.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
policy.reset(seed=0)
print(policy.act([0.5, 0, 0]).tolist() == expected)
"""


@pytest.mark.parametrize("how", ["plain", "locked", "load"])
def test_use_after_a_fork_is_refused_in_the_child_and_the_parent_goes_on(linear, run_python, tmp_path, how):
    script = tmp_path / "forked.py"
    script.write_text(FORKED)
    result = run_python("-W", "ignore::DeprecationWarning", str(script), str(linear.folder), how, timeout=30)
    assert (result.returncode, result.stdout) == (0, "0\nTrue\n"), result.stderr


@pytest.fixture
def unbounded(make_policy):
    """A policy whose graph returns actions of any size, where -1 to 1 are allowed."""
    linear = make_policy(weight=np.eye(3, 8), noise_weight=np.zeros((8, 8)))
    linear.leave_out_bounds()
    return linear.load(safety=SafetySettings(unfamiliarity_limit=np.inf))


@pytest.mark.parametrize("way", ["act", "select_action", "predict", "sample", "predict_action_chunk"])
def test_actions_beyond_the_bounds_are_clamped_and_counted_in_every_path(unbounded, way):
    observation = np.array([3.0, -7.0, 0.5], np.float32)
    assert unbounded.health().out_of_bounds == 0
    found = getattr(unbounded, way)(observation)
    found = found[0] if way == "predict" else found
    np.testing.assert_array_equal(found if found.ndim == 1 else found[0], [1, -1])
    assert unbounded.health().out_of_bounds == 1
    getattr(unbounded, way)(np.stack([observation, observation / 100]) if way == "sample" else observation)
    assert unbounded.health().out_of_bounds == (1 if way in ("act", "select_action", "predict") else 2)


def test_actions_within_the_bounds_are_not_counted(linear):
    policy = linear.load()
    policy.sample(OBSERVATIONS[:, 0])
    act_along(policy, OBSERVATIONS[:, 0])
    assert policy.health().out_of_bounds == 0


def test_control_loop_counts_actions_beyond_the_bounds_too(unbounded):
    with ControlLoop(unbounded, 10, chunking="naive", simulated_delay=0) as loop:
        np.testing.assert_array_equal(loop.step(np.array([3.0, -7.0, 0.5], np.float32)), [1, -1])
    assert unbounded.health().out_of_bounds == 1


def test_infinity_is_refused_not_clamped(make_policy):
    linear = make_policy(weight=np.eye(3, 8), noise_weight=np.zeros((8, 8)))
    linear.leave_out_bounds(through="Exp")
    policy = linear.load(safety=SafetySettings(unfamiliarity_limit=np.inf))
    for way in (policy.act, policy.sample, policy.predict_action_chunk):
        with pytest.raises(ActionError, match="infinity"):
            way(np.array([1000.0, 0, 0], np.float32))

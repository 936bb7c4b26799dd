import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from meam_policy.errors import DatasetError
from meam_training.data.action_chunk import check_chunk_size, chunk_targets


@st.composite
def recordings(draw):
    """Rewards, terminations, episode ends, chunk size and discount; the last row ends an episode."""
    rows = draw(st.integers(1, 25))
    rewards = draw(npst.arrays(np.float32, rows, elements=st.floats(-100, 100, width=32)))
    terminations = draw(npst.arrays(np.bool_, rows))
    ends = draw(npst.arrays(np.bool_, rows))
    ends[-1] = True
    return rewards, terminations, ends, draw(st.integers(1, 8)), draw(st.floats(0.01, 1.0))


def longest_episode(ends):
    rows = np.flatnonzero(ends)
    return np.diff(rows, prepend=-1).max()


def counted_by_hand(rewards, terminations, ends, chunk_size, discount):
    """The definition, one chunk and one step at a time."""
    results = []
    for start in range(len(rewards) - chunk_size + 1):
        earned, mask, last, valid = 0.0, 1.0, start, 0.0
        for i in range(chunk_size):
            last = start + i
            earned += discount**i * float(rewards[last])
            if terminations[last]:
                mask = 0.0
            if i == chunk_size - 1:
                valid = 1.0
            if ends[last]:
                break
        results.append((earned, mask, valid, last))
    return [np.array(column) for column in zip(*results, strict=True)]


def all_starts(recording):
    return np.arange(len(recording[0]) - recording[3] + 1)


def targets_at(recording, starts):
    rewards, terminations, ends, chunk_size, discount = recording
    return chunk_targets(rewards, terminations, ends, chunk_size, discount, starts)


@given(recordings())
def test_targets_equal_those_counted_by_hand(recording):
    assume(len(all_starts(recording)) > 0)
    targets = targets_at(recording, all_starts(recording))
    rewards, masks, valid, last_rows = counted_by_hand(*recording)
    np.testing.assert_allclose(targets.rewards, rewards, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(targets.masks, masks)
    np.testing.assert_array_equal(targets.valid, valid)
    np.testing.assert_array_equal(targets.last_rows, last_rows)
    np.testing.assert_array_equal(targets.steps, recording[3] * valid)
    assert [array.dtype for array in targets] == [np.float32, np.float32, np.float32, np.int64, np.int64]


@given(recordings(), st.booleans())
def test_padded_targets_equal_those_counted_by_hand_at_every_row(recording, recording_goes_on):
    rewards, terminations, ends, chunk_size, discount = recording
    ends[-1] = not recording_goes_on  # as of an episode that is still being recorded
    targets = chunk_targets(rewards, terminations, ends, chunk_size, discount, np.arange(len(rewards)), pad=True)
    for start in range(len(rewards)):
        own = [start]
        while len(own) < chunk_size and not ends[own[-1]] and own[-1] + 1 < len(rewards):
            own.append(own[-1] + 1)
        earned = sum(discount**i * float(rewards[row]) for i, row in enumerate(own))
        assert targets.rewards[start] == pytest.approx(earned, rel=1e-6, abs=1e-5)
        assert targets.masks[start] == (not terminations[own].any())
        assert targets.valid[start] == (len(own) == chunk_size or terminations[own[-1]])
        assert (targets.last_rows[start], targets.steps[start]) == (own[-1], len(own))


@given(recordings(), st.randoms(use_true_random=False))
def test_targets_of_some_starts_are_those_of_all_to_the_bit(recording, random):
    starts = all_starts(recording)
    assume(len(starts) > 0)
    some = np.array(random.choices(starts, k=random.randint(1, 9)))
    for drawn, expected in zip(targets_at(recording, some), targets_at(recording, starts), strict=True):
        assert drawn.tobytes() == expected[some].tobytes()


def test_rewards_after_a_termination_within_the_episode_still_count_but_nothing_beyond_the_chunk_does():
    rewards = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    terminations = np.array([False, True, False, False])
    ends = np.array([False, False, False, True])
    targets = chunk_targets(rewards, terminations, ends, 3, 0.5, np.arange(2))
    np.testing.assert_allclose(targets.rewards, [1 + 1 + 1, 2 + 2 + 2])
    np.testing.assert_array_equal(targets.masks, [0, 0])


def test_a_truncated_episode_keeps_its_bootstrap():
    ends = np.array([0, 1, 0, 1], bool)
    targets = chunk_targets(np.ones(4, np.float32), np.zeros(4, bool), ends, 2, 0.9, np.arange(3))
    np.testing.assert_array_equal(targets.masks, [1, 1, 1])
    np.testing.assert_array_equal(targets.valid, [1, 0, 1])


@given(recordings())
def test_a_chunk_size_is_refused_if_no_episode_is_as_long(recording):
    _, _, ends, chunk_size, _ = recording
    if longest_episode(ends) >= chunk_size:
        check_chunk_size(chunk_size, ends)
        return
    with pytest.raises(DatasetError, match=f"No episode has chunk_size = {chunk_size} transitions"):
        check_chunk_size(chunk_size, ends)


def test_a_chunk_without_actions_is_refused():
    with pytest.raises(DatasetError, match="chunk_size is 0; expected 1 or more"):
        check_chunk_size(0, np.ones(3, bool))


def test_a_sampler_needs_an_episode_as_long_as_a_chunk(dataset):
    with pytest.raises(DatasetError, match="No episode has chunk_size = 21"):
        dataset.chunk_sampler(21, 0.99)


def test_every_row_of_a_batch_is_the_recording_at_its_start(dataset):
    sampler = dataset.chunk_sampler(4, 0.9)
    starts = np.arange(len(sampler))
    batch = sampler.batch(starts)
    rewards, masks, valid, last_rows = counted_by_hand(
        dataset.rewards, dataset.terminations, dataset.episode_ends, 4, 0.9
    )
    assert len(sampler) == len(dataset) - 3
    for start in starts:
        np.testing.assert_array_equal(batch.observations[start], dataset.observations[start])
        np.testing.assert_array_equal(batch.actions[start], dataset.actions[start : start + 4])
        np.testing.assert_array_equal(batch.next_observations[start], dataset.next_observations[last_rows[start]])
    np.testing.assert_allclose(batch.rewards, rewards, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(batch.masks, masks)
    np.testing.assert_array_equal(batch.valid, valid)


def test_a_padded_sampler_starts_at_every_row(dataset):
    sampler = dataset.chunk_sampler(4, 0.9, pad=True)
    batch, plain = sampler.batch(np.arange(120)), dataset.chunk_sampler(4, 0.9).batch(np.arange(117))
    assert len(sampler) == 120
    np.testing.assert_array_equal(batch.actions, dataset.actions[(np.arange(120)[:, None] + np.arange(4)) % 120])
    np.testing.assert_array_equal(batch.within.sum(axis=1), np.minimum(4, 20 - np.arange(120) % 20))
    np.testing.assert_array_equal(plain.within, np.tile(plain.valid[:, None], 4))
    # Every other episode terminates, whose last chunks then have a target.
    np.testing.assert_array_equal(batch.valid, (np.arange(120) % 20 <= 16) | (np.arange(120) % 40 < 20))


def test_sampled_rows_are_chunks_of_the_recording_and_cover_all_starts(dataset):
    sampler = dataset.chunk_sampler(3, 0.99)
    batch = sampler.sample(5000, np.random.default_rng(1))
    assert batch.actions.shape == (5000, 3, 2)
    starts = [int(np.flatnonzero((dataset.observations == o).all(axis=1))[0]) for o in batch.observations]
    assert set(starts) == set(range(len(sampler)))
    for drawn, expected in zip(batch, sampler.batch(np.array(starts)), strict=True):
        np.testing.assert_array_equal(drawn, expected)


def test_the_generator_decides_the_batch(dataset):
    sampler = dataset.chunk_sampler(2, 0.99)
    one, same, other = (sampler.sample(64, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.observations, same.observations)
    assert not np.array_equal(one.observations, other.observations)

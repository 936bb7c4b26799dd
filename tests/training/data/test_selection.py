"""Chosen episodes, chosen keys, and joined data sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from meam_policy.errors import CheckpointError, DatasetError
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import DeviceChunks, HostChunks
from meam_training.trainer import make_spec, train

LENGTHS = (3, 5, 4, 6)
CPU = torch.device("cpu")


def recording(offset=0.0, lengths=LENGTHS, bound=1.0, **about):
    """Episodes whose rows are numbered from the offset on."""
    rows = sum(lengths)
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    numbers = offset + np.arange(rows, dtype=np.float32)
    return OfflineDataset.from_arrays(
        observations=np.stack([numbers, np.ones(rows)], axis=1),
        actions=np.full((rows, 1), 0.5),
        rewards=numbers,
        next_observations=np.stack([numbers + 1, np.ones(rows)], axis=1),
        terminations=np.zeros(rows),
        truncations=ends,
        action_space=spaces.Box(-bound, bound, (1,)),
        **about,
    )


@pytest.mark.parametrize(
    ("episodes", "rows"),
    [
        (slice(1, 3), range(3, 12)),
        (slice(None), range(18)),
        (slice(2, None), range(8, 18)),
        ([1, 2], range(3, 12)),
        (np.array([3]), range(12, 18)),
        ([3, 0], [*range(12, 18), *range(3)]),
    ],
)
def test_chosen_episodes_are_their_rows_in_the_chosen_order(episodes, rows):
    data = recording(dataset_id="tests/arm-v0")
    chosen = data.choose_episodes(episodes)
    np.testing.assert_array_equal(chosen.rewards, np.array(rows))
    np.testing.assert_array_equal(chosen.observations[:, 0], np.array(rows))
    assert chosen.episode_ends[-1]
    kept = np.count_nonzero(chosen.episode_ends)
    assert chosen.dataset_id == ("tests/arm-v0" if kept == 4 else f"tests/arm-v0 ({kept} of 4 episodes)")
    np.testing.assert_allclose(chosen.observation_moments[0][0], np.mean(rows))
    assert (chosen.fingerprint == data.fingerprint) == (list(rows) == list(range(18)))


def test_episodes_that_follow_each_other_are_not_copied():
    data = recording()
    assert np.shares_memory(data.choose_episodes([1, 2]).observations, data.observations)


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        (slice(0, 5), r"Episodes 0:5 are chosen, but the data has 4"),
        (slice(2, 2), "Episodes 2:2"),
        (slice(-1, 4), "Episodes -1:4"),
        (slice(0, 4, 2), "Episodes 0:4:2 .*with no step"),
        ([4], "4 is not there"),
        ([-1], "-1 is not there"),
        ([1, 1], "one is given twice"),
        ([], "expected numbers from 0 to 3"),
        ([0.5], "expected numbers from 0 to 3"),
    ],
)
def test_episodes_that_are_not_there_are_refused(episodes, message):
    with pytest.raises(DatasetError, match=message):
        recording().choose_episodes(episodes)


def test_a_filtered_minari_data_set_is_read_as_it_was_filtered(make_minari, tmp_path):
    from minari import MinariDataset

    space = spaces.Box(-99, 99, (2,), np.float32)
    made = [
        {
            "observations": list(np.full((length + 1, 2), number, np.float32)),
            "actions": list(np.zeros((length, 2), np.float32)),
            "rewards": [float(number)] * length,
            "terminations": [False] * length,
            "truncations": [False] * (length - 1) + [True],
        }
        for number, length in enumerate(LENGTHS)
    ]
    folder = make_minari(tmp_path, "tests/arm-v0", made, space, space)
    whole = MinariDataset(folder)
    long = whole.filter_episodes(lambda episode: len(episode.rewards) > 4)
    data = OfflineDataset.from_minari(long)
    assert data.rewards.tolist() == [1.0] * 5 + [3.0] * 6
    assert OfflineDataset.from_minari(whole).fingerprint == OfflineDataset.from_minari(folder).fingerprint


def test_keys_of_a_minari_data_set_are_chosen_and_images_left_out(make_minari, tmp_path):
    parts = {
        "arm": spaces.Box(-9, 9, (2,), np.float32),
        "camera": spaces.Box(0, 255, (4, 4, 3), np.uint8),
        "target": spaces.Box(-9, 9, (1,), np.float32),
    }
    episode = {
        "observations": {
            "arm": list(np.arange(6, dtype=np.float32).reshape(3, 2)),
            "camera": list(np.full((3, 4, 4, 3), 200, np.uint8)),
            "target": list(np.full((3, 1), 7, np.float32)),
        },
        "actions": list(np.zeros((2, 2), np.float32)),
        "rewards": [1.0, 2.0],
        "terminations": [False, True],
        "truncations": [False, False],
    }
    folder = make_minari(tmp_path, "tests/arm-v0", [episode], spaces.Dict(parts), parts["arm"])
    data = OfflineDataset.from_minari(folder, observation_keys=["target", "arm"])
    np.testing.assert_array_equal(data.observations, [[7, 0, 1], [7, 2, 3]])
    np.testing.assert_array_equal(data.next_observations, [[7, 2, 3], [7, 4, 5]])
    with pytest.raises(DatasetError, match="has no observation legs; its observation has the keys arm, camera, target"):
        OfflineDataset.from_minari(folder, observation_keys=["legs"])


def test_joined_data_sets_follow_each_other_and_are_named_with_their_shares():
    parts = [recording(dataset_id="a", control_rate_hz=20), recording(100, (3, 3), dataset_id="b")]
    data = OfflineDataset.joined(parts)
    np.testing.assert_array_equal(data.rewards, [*range(18), *range(100, 106)])
    np.testing.assert_array_equal(data.next_observations[:, 0], data.rewards + 1)
    assert np.flatnonzero(data.episode_ends).tolist() == [2, 7, 11, 17, 20, 23]
    assert (data.dataset_id, data.control_rate_hz, data.parts) == ("0.75 a + 0.25 b", 20, ())
    shared = OfflineDataset.joined(parts, [1, 3])
    assert (shared.dataset_id, shared.parts) == ("0.25 a + 0.75 b", ((18, 0.25), (6, 0.75)))
    assert len({data.fingerprint, shared.fingerprint, OfflineDataset.joined(parts, [3, 1]).fingerprint}) == 3


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("source", [DeviceChunks, HostChunks])
def test_batches_have_the_given_shares_and_no_row_of_a_part_is_preferred(source, pad, make_config):
    parts = [recording(0, (20,)), recording(100, (10,)), recording(200, (12,))]
    data = OfflineDataset.joined(parts, [1, 2, 1])
    config = make_config("bc", chunk_size=3, pad_chunks=pad)
    chunks = source(config, data, make_spec(config, data), CPU)
    drawn = chunks.sample(100_000, torch.Generator().manual_seed(0)).observations[:, 0].numpy()
    part = np.digitize(drawn, [100, 200])
    np.testing.assert_allclose(np.bincount(part) / len(drawn), [0.25, 0.5, 0.25], atol=0.005)
    # Without padding those of the last part but its last two rows, at which no whole chunk starts.
    for number, rows in enumerate((20, 10, 12 if pad else 10)):
        counts = np.unique(drawn[part == number], return_counts=True)[1]
        assert len(counts) == rows
        np.testing.assert_allclose(counts / counts.sum(), 1 / rows, atol=5 / np.sqrt(counts.sum() * rows))


def test_data_without_shares_draws_as_before(make_config):
    data, config = recording(), make_config("bc")
    chunks = DeviceChunks(config, data, make_spec(config, data), CPU)
    starts = torch.randint(len(chunks), (50,), generator=torch.Generator().manual_seed(3))
    drawn = chunks.sample(50, torch.Generator().manual_seed(3)).observations[:, 0]
    assert torch.equal(drawn, starts.float())


def test_cached_data_sets_are_joined_in_a_cache(tmp_path):
    for name, offset in (("a", 0), ("b", 50)):
        rows = np.arange(offset, offset + 20, dtype=np.float32)
        np.savez(
            tmp_path / f"{name}.npz",
            observations=rows[:, None],
            actions=np.zeros((20, 1), np.float32),
            rewards=rows,
            terminals=(np.arange(20) % 10 == 9).astype(np.float32),
        )
    parts = [OfflineDataset.from_ogbench(tmp_path / f"{name}.npz") for name in "ab"]
    joined = [OfflineDataset.joined(parts, [1, 2]) for _ in range(2)]
    assert all(isinstance(each.observations, np.memmap) for each in joined)
    assert len(list(tmp_path.glob(".meam-cache/joined-*/*/metadata.json"))) == 1
    assert len(list(tmp_path.glob(".meam-cache/*.npz/*/metadata.json"))) == 2
    plain = OfflineDataset.joined([replace(each, observations=np.array(each.observations)) for each in parts], [1, 2])
    assert {each.fingerprint for each in joined} == {plain.fingerprint}
    np.testing.assert_allclose(joined[0].observation_moments, plain.observation_moments)
    chosen = OfflineDataset.joined([parts[0].choose_episodes([1]), parts[1]])
    assert chosen.rewards.tolist() == [*range(10, 19), *range(50, 59), *range(60, 69)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bound": 2.0}, r"The actions of 1: a are bounded by \['-1'\] to \['1'\] and those of 2: b"),
        ({"control_rate_hz": 50}, "control rate differs: 20 in 1: a, 50 in 2: b"),
        ({"environment_id": "Hopper-v5"}, r"environment differs: Ant-v5 in 1: a, Hopper-v5 in 2: b.*--env-id"),
    ],
)
def test_data_sets_that_contradict_each_other_are_not_joined(other, message):
    first = recording(dataset_id="a", control_rate_hz=20, environment_id="Ant-v5")
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.joined([first, recording(dataset_id="b", **other)])


def test_data_sets_of_other_observations_are_not_joined():
    nothing, arm = np.zeros(4), {"arm": np.zeros((4, 2))}
    keyed = OfflineDataset.from_arrays(arm, np.zeros((4, 1)), nothing, arm, nothing, nothing)
    with pytest.raises(DatasetError, match=r"has \[2\] and 2: arrays has arm \[2\]; expected the same keys and shapes"):
        OfflineDataset.joined([recording(), keyed])


def test_ranges_that_nobody_declared_are_joined_to_the_wider_one():
    parts = [replace(recording(bound=bound), measured_bounds=True) for bound in (1.0, 2.0)]
    assert OfflineDataset.joined(parts).action_box.high == (2.0,)


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, -1], [1, float("inf")], [1, 1, 1]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(DatasetError, match="expected 2 numbers above 0"):
        OfflineDataset.joined([recording(), recording()], shares)


def test_nothing_is_not_joined_and_shares_do_not_outlive_a_choice():
    with pytest.raises(DatasetError, match="no data sets to join"):
        OfflineDataset.joined([])
    with pytest.raises(DatasetError, match="Choose episodes before joining"):
        OfflineDataset.joined([recording(), recording(50)], [1, 2]).choose_episodes([0])


def test_a_run_is_not_resumed_with_other_shares_or_episodes(make_config, tmp_path):
    parts, config = [recording(), recording(50)], make_config("bc", steps=2)
    train(config, OfflineDataset.joined(parts, [1, 2]), tmp_path / "run")
    longer = replace(config, steps=3)
    for other in ([2, 1], None):
        with pytest.raises(CheckpointError, match="other data"):
            train(longer, OfflineDataset.joined(parts, other), tmp_path / "run", resume=True)
    fewer = OfflineDataset.joined([parts[0].choose_episodes(slice(0, 3)), parts[1]], [1, 2])
    with pytest.raises(CheckpointError, match="other data"):
        train(longer, fewer, tmp_path / "run", resume=True)
    assert train(longer, OfflineDataset.joined(parts, [1, 2]), tmp_path / "run", resume=True).step == 3

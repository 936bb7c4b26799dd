"""Files in the layouts of D4RL and of robomimic."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from meam_policy.errors import DatasetError, NotFoundError
from meam_training.data import dataset as dataset_module
from meam_training.data.dataset import OfflineDataset


def write(file, arrays):
    with h5py.File(file, "w") as opened:
        for name, array in arrays.items():
            opened[name] = array
    return file


def d4rl(**changes):
    """Three recordings of 4, 3 and 3 steps: cut off, terminated, and cut off by the end of the file."""
    rows = np.arange(10, dtype=np.float32)
    terminals, timeouts = np.zeros(10, bool), np.zeros(10, bool)
    terminals[6] = timeouts[3] = True
    arrays = {
        "observations": np.stack([rows, -rows], axis=1),
        "actions": (rows[:, None] / 10).astype(np.float32),
        "rewards": 10 * rows,
        "terminals": terminals,
        "timeouts": timeouts,
        "metadata/algorithm": np.bytes_("SAC"),
        "infos/qpos": np.zeros((10, 3)),
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def test_rows_of_d4rl_are_paired_with_their_successors_as_in_qlearning_dataset(tmp_path):
    data = OfflineDataset.from_hdf5(write(tmp_path / "hopper.hdf5", d4rl()), environment_id="Hopper-v5")
    # Without next_observations, the last row before a timeout has no successor, nor has the last one of the file.
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(data.observations[:, 0], kept)
    np.testing.assert_array_equal(data.rewards, 10 * np.array(kept))
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 3, 5, 6, 6, 8, 9])
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), [5])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [2, 5, 7])
    assert (data.dataset_id, data.environment_id) == ("hopper", "Hopper-v5")
    assert data.action_box.low == (-1.0,)


def test_recorded_successors_keep_the_last_rows(tmp_path):
    after = np.stack([np.arange(10) + 1.0, -np.arange(10) - 1.0], axis=1)
    after[[3, 6]] = [[103, 0], [106, 0]]
    data = OfflineDataset.from_hdf5(write(tmp_path / "a.hdf5", d4rl(next_observations=after)))
    np.testing.assert_array_equal(data.observations[:, 0], np.arange(10))
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 3, 103, 5, 6, 106, 8, 9, 10])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [3, 6, 9])


def test_without_timeouts_an_episode_ends_where_the_next_row_does_not_follow(tmp_path, monkeypatch):
    after = np.stack([np.arange(10) + 1.0, -np.arange(10) - 1.0], axis=1)
    after[[3, 6]] = [[103, 0], [106, 0]]
    monkeypatch.setattr("meam_training.data.hdf5_source.FLAGS_AT_A_TIME", 3)
    data = OfflineDataset.from_hdf5(write(tmp_path / "a.hdf5", d4rl(next_observations=after, timeouts=None)))
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [3, 6, 9])
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), [6])


def test_the_second_opening_reads_the_cache_and_other_choices_have_their_own(tmp_path, monkeypatch):
    file = write(tmp_path / "a.hdf5", d4rl())
    first = OfflineDataset.from_hdf5(file)
    monkeypatch.setattr(dataset_module, "hdf5_recording", None)
    again = OfflineDataset.from_hdf5(file)
    assert again.fingerprint == first.fingerprint
    assert isinstance(again.observations, np.memmap)
    monkeypatch.undo()
    wide = OfflineDataset.from_hdf5(file, action_space=spaces.Box(-2, 2, (1,)))
    assert wide.action_box.low == (-2.0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeouts": None}, "neither timeouts nor next_observations"),
        ({"rewards": None}, "rewards"),
        ({"rewards": np.zeros(9)}, r"rewards has shape \(9,\)"),
        ({"observations": np.zeros((10, 8, 8, 3), np.uint8)}, r"images are not supported"),
        ({"terminals": np.full(10, 2)}, "terminals has shape"),
        ({"actions": np.full((10, 1), 3.0)}, r"actions is 3.0 at episode 0, step 0"),
        ({"observations": np.full((10, 2), np.nan)}, "expected a finite number"),
        ({"actions": np.full((10, 1), b"x")}, "actions has type"),
    ],
)
def test_broken_d4rl_files_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_hdf5(write(tmp_path / "a.hdf5", d4rl(**changes)))
    assert not list(tmp_path.glob(".meam-cache/*/*/metadata.json"))


def test_choices_that_d4rl_does_not_leave_are_refused(tmp_path):
    file = write(tmp_path / "a.hdf5", d4rl())
    choices: list[dict[str, Any]] = [{"observation_keys": ["arm"]}, {"action_key": "torque"}, {"reward": "end"}]
    for choice in choices:
        with pytest.raises(DatasetError, match=rf"{next(iter(choice))} is .*leave it out"):
            OfflineDataset.from_hdf5(file, **choice)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"observations/qpos": np.zeros((3, 2)), "action": np.zeros((3, 2))}, "ALOHA"),
        ({"episode_0/actions": np.zeros((3, 2))}, "main_data.hdf5 of a Minari data set"),
        ({"measured": np.zeros(3)}, "unknown layout .it holds measured."),
        ({"data/something": np.zeros(3)}, "unknown layout"),
    ],
)
def test_other_hdf5_files_are_refused_with_their_kind(tmp_path, arrays, message):
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_hdf5(write(tmp_path / "a.hdf5", arrays))


def test_what_is_no_hdf5_file_is_refused(tmp_path):
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(DatasetError, match="is not an HDF5 file"):
        OfflineDataset.from_hdf5(tmp_path / "text.hdf5")
    with pytest.raises(NotFoundError, match="There is no file"):
        OfflineDataset.from_hdf5(tmp_path / "nothing.hdf5")


def test_a_file_that_links_to_another_is_refused(tmp_path):
    write(tmp_path / "other.hdf5", {"observations": np.zeros((10, 2))})
    file = write(tmp_path / "a.hdf5", d4rl(observations=None))
    with h5py.File(file, "a") as opened:
        opened["observations"] = h5py.ExternalLink("other.hdf5", "observations")
    with pytest.raises(DatasetError, match="link to elsewhere"):
        OfflineDataset.from_hdf5(file)


def robomimic(file, *, images=False, rewards=True, after=False, lengths=(3, 4), extra=0):
    """Demonstrations 0, 1, …, 10 and so on: of the given lengths; the last row of every one is done."""
    with h5py.File(file, "w") as opened:
        data = opened.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for number, length in enumerate(lengths):
            demo: Any = data.create_group(f"demo_{number}")
            rows = 100.0 * number + np.arange(length)
            demo["obs/robot"] = np.stack([rows, rows], axis=1)
            demo["obs/object"] = -rows[:, None]
            if images:
                demo["obs/agentview_image"] = np.random.default_rng(0).integers(0, 255, (length, 4, 4, 3), np.uint8)
            if after:
                demo["next_obs/robot"] = demo["obs/robot"][()] + 1
                demo["next_obs/object"] = demo["obs/object"][()] - 1
            demo["actions"] = np.full((length, 2), 0.5)
            demo["actions_abs"] = np.full((length, 3), 0.25)
            demo["dones"] = (np.arange(length) == length - 1).astype(int) if not extra else np.zeros(length, int)
            if rewards:
                demo["rewards"] = demo["dones"][()].astype(float)
    return file


def test_demonstrations_of_robomimic_are_joined_in_the_order_of_their_numbers(tmp_path):
    data = OfflineDataset.from_hdf5(robomimic(tmp_path / "lift.hdf5", lengths=(3,) * 11))
    assert [box.key for box in data.observation_boxes] == ["object", "robot"]
    assert data.control_rate_hz == 20
    np.testing.assert_array_equal(data.observations[::3, 1], 100 * np.arange(11))
    np.testing.assert_array_equal(data.observations[:3], [[0, 0, 0], [-1, 1, 1], [-2, 2, 2]])
    # Done at the end: nothing depends on what came after, which the file does not hold.
    np.testing.assert_array_equal(data.next_observations[:3, 1], [1, 2, 2])
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), np.arange(2, 33, 3))
    assert data.episode_returns.tolist() == [1.0] * 11


def test_keys_and_actions_are_chosen_and_their_order_is_that_of_the_choice(tmp_path):
    file = robomimic(tmp_path / "lift.hdf5", images=True, after=True)
    data = OfflineDataset.from_hdf5(file, observation_keys=["robot", "object"], action_key="actions_abs")
    np.testing.assert_array_equal(data.observations[1], [1, 1, -1])
    np.testing.assert_array_equal(data.next_observations[2], [3, 3, -3])
    assert data.action_dim == 3
    assert len(data) == 7


def test_images_are_refused_by_name_with_the_choice_that_leaves_them_out(tmp_path):
    file = robomimic(tmp_path / "lift.hdf5", images=True)
    for keys in (None, ["agentview_image"]):
        with pytest.raises(DatasetError, match=r"agentview_image is an image, uint8 \[4, 4, 3\].*'object', 'robot'"):
            OfflineDataset.from_hdf5(file, observation_keys=keys)


def test_demonstrations_without_rewards_need_a_choice_by_name(tmp_path):
    file = robomimic(tmp_path / "lift.hdf5", rewards=False, extra=1)
    with pytest.raises(DatasetError, match=r'has no rewards. Choose reward="end"'):
        OfflineDataset.from_hdf5(file)
    ended = OfflineDataset.from_hdf5(file, reward="end")
    assert ended.episode_returns.tolist() == [1.0, 1.0]
    assert np.flatnonzero(ended.terminations).tolist() == [2, 6]
    plain = OfflineDataset.from_hdf5(file, reward="none")
    # Not done: the last action, of which nobody knows what came, is left out.
    assert (len(plain), plain.rewards.any(), plain.terminations.any()) == (5, False, False)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"observation_keys": ["robt"]}, r"no observation robt; expected of object, robot"),
        ({"observation_keys": []}, "expected one key or more"),
        ({"observation_keys": ["robot", "robot"]}, "each once"),
        ({"action_key": "torque"}, "has no torque"),
        ({"reward": "score"}, "has no score"),
        ({"action_space": spaces.Discrete(2)}, "expected a Box"),
    ],
)
def test_choices_that_a_robomimic_file_lacks_are_refused_by_name(tmp_path, choices, message):
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_hdf5(robomimic(tmp_path / "lift.hdf5"), **choices)


def test_a_demonstration_that_lacks_an_array_is_refused_by_name(tmp_path):
    file = robomimic(tmp_path / "lift.hdf5")
    with h5py.File(file, "a") as opened:
        del opened["data/demo_1/obs/object"]
    with pytest.raises(DatasetError, match="data/demo_1 has no obs/object"):
        OfflineDataset.from_hdf5(file)
    with h5py.File(file, "a") as opened:
        opened["data/demo_1/obs/object"] = np.zeros((9, 1))
    with pytest.raises(DatasetError, match="Episode demo_1 has 4 actions and 9 object"):
        OfflineDataset.from_hdf5(file)


def test_a_file_without_extracted_observations_says_how_to_extract_them(tmp_path):
    file = write(
        tmp_path / "raw.hdf5", {"data/demo_0/actions": np.zeros((3, 2)), "data/demo_0/states": np.zeros((3, 9))}
    )
    with pytest.raises(DatasetError, match="dataset_states_to_obs.py"):
        OfflineDataset.from_hdf5(file)

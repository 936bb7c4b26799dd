"""Data sets in LeRobot's documented layouts 2.1 and 3.0."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meam_policy.errors import DatasetError, MissingExtraError, NotFoundError
from meam_training.data import dataset as dataset_module
from meam_training.data import parquet_files
from meam_training.data.dataset import OfflineDataset

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTHS = (4, 3, 5)
FEATURES: dict[str, Any] = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["shoulder.pos", "gripper.pos"]},
    "observation.images.front": {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": [2], "names": ["shoulder.pos", "gripper.pos"]},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "next.success": {"dtype": "bool", "shape": [1], "names": None},
    **{
        name: {"dtype": kind, "shape": [1], "names": None}
        for name, kind in (("timestamp", "float32"), ("frame_index", "int64"), ("episode_index", "int64"))
    },
}


def table(episodes, features):
    """Rows of episodes: state and action are 100 e + t; only episode 0 succeeds."""
    names = [name for name in features if features[name]["dtype"] != "video"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for episode in episodes:
        for t in range(LENGTHS[episode]):
            last = t == LENGTHS[episode] - 1
            row: dict[str, Any] = {
                "observation.state": [100.0 * episode + t, 7.0],
                "observation.environment_state": [float(t)],
                "observation.images.top": {"bytes": b"png", "path": None},
                "action": [100.0 * episode + t, 50.0],
                "next.reward": float(t),
                "next.done": last,
                "next.success": last and episode == 0,
                "timestamp": t / 30,
                "frame_index": t,
                "episode_index": episode,
            }
            for name in names:
                columns[name].append(row[name])
    kinds = {"float32": pyarrow.float32(), "int64": pyarrow.int64(), "bool": pyarrow.bool_()}
    arrays = {}
    for name, values in columns.items():
        if features[name]["dtype"] == "image":
            arrays[name] = pyarrow.array(values)
            continue
        kind = kinds[features[name]["dtype"]]
        arrays[name] = pyarrow.array(values, pyarrow.list_(kind) if isinstance(values[0], list) else kind)
    return pyarrow.table(arrays)


def write(folder, version, features=FEATURES, files=((0, 1), (2,))):
    """A data set of three episodes, whose rows are all different; version 3.0 has two files of rows."""
    paths = {
        "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }
    info = {"codebase_version": version, "total_episodes": 3, "total_frames": 12, "fps": 30, "chunks_size": 2}
    info |= {"data_path": paths[version], "features": features}
    (folder / "meta").mkdir(parents=True)
    (folder / "videos").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    if version == "v3.0":
        place = {episode: number for number, held in enumerate(files) for episode in held}
        rows = {
            "episode_index": [0, 1, 2],
            "length": list(LENGTHS),
            "tasks": [["push"]] * 3,
            "data/chunk_index": [0, 0, 0],
            "data/file_index": [place[episode] for episode in range(3)],
        }
        (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        parquet.write_table(pyarrow.table(rows), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        (folder / "data" / "chunk-000").mkdir(parents=True)
        for number, held in enumerate(files):
            parquet.write_table(table(held, features), folder / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    else:
        lines = [json.dumps({"episode_index": e, "tasks": ["push"], "length": n}) for e, n in enumerate(LENGTHS)]
        (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
        for episode in range(3):
            chunk = folder / "data" / f"chunk-{episode // 2:03d}"
            chunk.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table([episode], features), chunk / f"episode_{episode:06d}.parquet")
    return folder


@pytest.fixture(params=["v2.1", "v3.0"])
def folder(request, tmp_path):
    return write(tmp_path / "pusht", request.param)


def test_rows_are_transitions_and_the_last_of_an_episode_counts_only_where_the_task_ended(folder):
    data = OfflineDataset.from_lerobot(folder, environment_id="gym_pusht/PushT-v0")
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 3, 100, 101, 200, 201, 202, 203])
    np.testing.assert_array_equal(data.next_observations[:, 0], [1, 2, 3, 3, 101, 102, 201, 202, 203, 204])
    np.testing.assert_array_equal(data.rewards, [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])
    np.testing.assert_array_equal(np.flatnonzero(data.terminations), [3])
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [3, 5, 9])
    assert data.observation_boxes[0].key is None  # observation.state alone, as docs/lerobot.md has it
    assert (data.control_rate_hz, data.dataset_id) == (30, "pusht")
    assert data.environment_id == "gym_pusht/PushT-v0"
    assert data.left_out == ("observation.images.front",)


def test_the_box_of_the_actions_is_their_range_or_the_one_that_is_given(folder):
    box = OfflineDataset.from_lerobot(folder).action_box
    assert (box.low, box.high) == ((0, 50), (204, 50))  # a gripper that never moved
    bounded = OfflineDataset.from_lerobot(folder, action_low=-300, action_high=[300, 60]).action_box
    assert (bounded.low, bounded.high) == ((-300, -300), (300, 60))
    clipped = OfflineDataset.from_lerobot(folder, action_high=[100, 60], clip_actions=True)
    assert (clipped.action_box.low, clipped.action_box.high, clipped.actions[:, 0].max()) == ((0, 50), (100, 60), 100)
    given = OfflineDataset.from_lerobot(folder, action_space=spaces.Box(-300, 300, (2,))).action_box
    assert given.high == (300, 300)
    with pytest.raises(DatasetError, match=r"actions is 50.0 at episode 0, step 0, index 1"):
        OfflineDataset.from_lerobot(
            folder, action_space=spaces.Box(np.zeros(2, np.float32), np.array([300, 1], np.float32))
        )


def test_several_columns_become_a_dict_in_the_order_of_the_choice(tmp_path):
    features = {
        "observation.images.top": {"dtype": "image", "shape": [4, 4, 3], "names": None},
        "observation.environment_state": {"dtype": "float32", "shape": [1], "names": None},
        **FEATURES,
    }
    folder = write(tmp_path / "a", "v3.0", features)
    data = OfflineDataset.from_lerobot(folder)
    assert [box.key for box in data.observation_boxes] == ["environment_state", "state"]
    assert data.left_out == ("observation.images.top", "observation.images.front")
    chosen = OfflineDataset.from_lerobot(folder, observation_keys=["state", "observation.environment_state"])
    assert [box.key for box in chosen.observation_boxes] == ["state", "environment_state"]
    np.testing.assert_array_equal(chosen.observations[5], [101, 7, 1])


def test_rewards_and_terminations_are_chosen_by_name(folder):
    success = OfflineDataset.from_lerobot(folder, reward="next.success", termination="next.done")
    np.testing.assert_array_equal(success.rewards, np.arange(12) == 3)
    np.testing.assert_array_equal(np.flatnonzero(success.terminations), [3, 6, 11])
    ended = OfflineDataset.from_lerobot(folder, reward="end")
    np.testing.assert_array_equal(np.flatnonzero(ended.rewards), [3, 6, 11])
    assert not OfflineDataset.from_lerobot(folder, reward="none").rewards.any()


def test_demonstrations_without_rewards_need_a_choice(tmp_path):
    features = {name: feature for name, feature in FEATURES.items() if not name.startswith("next.")}
    folder = write(tmp_path / "a", "v3.0", features)
    with pytest.raises(DatasetError, match=r'neither next.reward nor next.success. Choose reward="end"'):
        OfflineDataset.from_lerobot(folder)
    assert OfflineDataset.from_lerobot(folder, reward="end").rewards.sum() == 3
    assert len(OfflineDataset.from_lerobot(folder, reward="none")) == 9


def test_the_second_opening_reads_the_cache_and_a_changed_file_does_not(folder, monkeypatch):
    first = OfflineDataset.from_lerobot(folder)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "lerobot_recording", None)
        again = OfflineDataset.from_lerobot(folder)
    assert (again.fingerprint, again.left_out) == (first.fingerprint, first.left_out)
    next((folder / "data").glob("*/*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="is not a Parquet file"):
        OfflineDataset.from_lerobot(folder)


def test_a_missing_shard_is_named(folder):
    shard = max((folder / "data").glob("*/*.parquet"))
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name} is missing"):
        OfflineDataset.from_lerobot(folder)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match=r"git-lfs pointer.*git lfs pull"):
        OfflineDataset.from_lerobot(folder)


def test_rows_that_meta_does_not_describe_are_refused(folder):
    shards = sorted((folder / "data").glob("*/*.parquet"))
    shutil.copy(shards[0], shards[-1])
    with pytest.raises(DatasetError, match=r"rows of episodes 0 to .*; meta/episodes describes 5 of 2 to 2"):
        OfflineDataset.from_lerobot(folder)


def change(folder, **changes):
    file = folder / "meta" / "info.json"
    info = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in info.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, r"version v1.6; expected one of v2.0, v2.1, v3.0. Convert it"),
        ({"codebase_version": None}, "version None"),
        ({"data_path": "../{episode_index.__class__}"}, "data_path is"),
        ({"data_path": "{episode_index:9999999999}"}, "data_path is"),
        ({"total_episodes": 4}, "counts 4 episodes and meta/episodes describes 3.*number 3 differs"),
        ({"total_episodes": 10**12}, "total_episodes is"),
        ({"features": []}, "describes no features"),
        ({"features": {"action": 3}}, "describes no features"),
        ({"features": {**FEATURES, "action": {"dtype": "float32", "shape": [3]}}}, "has .* numbers in .* rows"),
        ({"features": {**FEATURES, "action": {"dtype": "float32", "shape": [2**40]}}}, "has the shape"),
        ({"features": {**FEATURES, "observation.torque": {"dtype": "float32", "shape": [1]}}}, "no column obs.*torque"),
    ],
)
def test_a_wrong_description_is_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_lerobot(folder)
    assert not list(folder.parent.glob(".meam-cache/*/*/metadata.json"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"observation_keys": ["observation.images.front"]}, r"images.front, chosen as observation, is an image"),
        ({"observation_keys": ["velocity"]}, r"velocity, chosen as observation, is not among its columns"),
        ({"action_key": "torque"}, "torque, chosen as action"),
        ({"reward": "score"}, "score, chosen as reward"),
        ({"termination": "end"}, "end, chosen as termination"),
    ],
)
def test_columns_that_are_not_there_are_refused_by_name(folder, choices, message):
    with pytest.raises(DatasetError, match=message):
        OfflineDataset.from_lerobot(folder, **choices)


def test_a_data_set_of_images_alone_is_refused(tmp_path):
    features = {name: feature for name, feature in FEATURES.items() if name != "observation.state"}
    with pytest.raises(DatasetError, match="no observation but images"):
        OfflineDataset.from_lerobot(write(tmp_path / "a", "v3.0", features))


@pytest.mark.parametrize("values", [[[1.0, 2.0], None], [[1.0, 2.0], [1.0, None]], [[1.0, 2.0], [1.0]]])
def test_gaps_and_ragged_rows_are_refused(tmp_path, values):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"action": pyarrow.array(values, pyarrow.list_(pyarrow.float32()))}), file)
    with pytest.raises(DatasetError, match="has gaps|numbers in 2 rows"):
        parquet_files.read_columns(file, {"action": (2,)})


def test_text_is_no_number_and_a_file_of_nothing_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"action": ["up", "down"], "still": [0.0, 0.0]}), file)
    with pytest.raises(DatasetError, match="holds string; expected numbers"):
        parquet_files.read_columns(file, {"action": ()})
    parquet.write_table(pyarrow.table({"action": np.zeros(10**7)}), file, compression="zstd")
    with pytest.raises(DatasetError, match="claims 80000000 bytes and stores"):
        parquet_files.read_columns(file, {"action": ()})


def test_what_is_no_data_set_and_a_lack_of_pyarrow_are_named(folder, tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match="is no LeRobot data set"):
        OfflineDataset.from_lerobot(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(MissingExtraError, match=r"meam-policy\[arrow\]"):
        OfflineDataset.from_lerobot(folder)

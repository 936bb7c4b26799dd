import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import meam_training.data.dataset_cache as dataset_cache
import meam_training.data.minari_source as minari_source
import meam_training.data.ogbench_source as ogbench_source
from meam_policy.errors import DatasetError
from meam_training.data.dataset import OfflineDataset

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")
SPACE = spaces.Box(-9, 9, (3,), np.float32)
UNIT = spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def trajectories(lengths, seed=0):
    """OGBench's arrays of trajectories with the given numbers of rows."""
    generator, rows = np.random.default_rng(seed), sum(lengths)
    return {
        "observations": generator.normal(size=(rows, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, size=(rows, 2)).astype(np.float16),
        "terminals": np.isin(np.arange(rows), np.cumsum(lengths) - 1),
        "rewards": generator.normal(size=rows),
        "masks": (generator.random(rows) < 0.7).astype(np.float32),
    }


def write_npz(folder, seed=0):
    np.savez(folder / "maze-v0.npz", **trajectories([4, 2, 6], seed))
    return folder / "maze-v0.npz"


def episode(length, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "observations": list(generator.uniform(-9, 9, (length + 1, 3)).astype(np.float32)),
        "actions": list(generator.uniform(-1, 1, (length, 2)).astype(np.float32)),
        "rewards": list(generator.normal(size=length)),
        "terminations": [False] * (length - 1) + [True],
        "truncations": [False] * length,
    }


@pytest.fixture(params=["npz", "hdf5"])
def source(request, tmp_path, make_minari):
    """Opens a data set, and the file of its numbers."""
    if request.param == "npz":
        path = write_npz(tmp_path)
        return lambda: OfflineDataset.from_ogbench(path), path
    folder = make_minari(tmp_path, "tests/small-v0", [episode(3), episode(5, seed=1)], SPACE, UNIT)
    return lambda: OfflineDataset.from_minari(folder), folder / "main_data.hdf5"


@pytest.fixture
def maze(tmp_path):
    """The file of an OGBench data set."""
    return write_npz(tmp_path)


def folder_of(data):
    return Path(data.observations.filename).parent


def caches(root):
    return sorted(path.parent for path in root.rglob(".meam-cache/*/*/metadata.json"))


def assert_same(data, expected):
    for name in COLUMNS:
        seen, right = getattr(data, name), getattr(expected, name)
        assert (seen.dtype, seen.shape) == (right.dtype, right.shape)
        np.testing.assert_array_equal(seen, right)
    for name in ("observation_boxes", "action_box", "dataset_id", "environment_id", "control_rate_hz", "fingerprint"):
        assert getattr(data, name) == getattr(expected, name)
    for seen, right in zip(data.observation_moments, expected.observation_moments, strict=True):
        np.testing.assert_array_equal(seen, right)


def in_memory(open_data, monkeypatch):
    """The same data without a cache."""
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        patch.setattr(dataset_cache, "_places", lambda source: [])
        data = open_data()
    assert not isinstance(data.observations, np.memmap)
    return data


def test_the_second_opening_maps_what_the_first_one_wrote_and_reads_nothing_else(source, monkeypatch):
    open_data, _ = source
    expected = in_memory(open_data, monkeypatch)
    assert_same(open_data(), expected)
    for module, name in ((minari_source, "open_minari"), (ogbench_source, "NpzFile")):
        monkeypatch.setattr(module, name, None)
        monkeypatch.setattr(module, "RowCheck", None)
    again = open_data()
    assert_same(again, expected)
    assert all(isinstance(getattr(again, name), np.memmap) for name in COLUMNS)
    with pytest.raises(ValueError, match="read-only"):
        again.rewards[0] = 1.0


def test_the_fingerprint_and_the_moments_are_those_of_the_numbers(source):
    open_data, _ = source
    data = open_data()
    numbers = b"".join(getattr(data, name).tobytes() for name in COLUMNS[:4])
    flags = b"".join(np.packbits(getattr(data, name)).tobytes() for name in COLUMNS[4:])
    assert data.fingerprint == hashlib.sha256(numbers + flags).hexdigest()
    wide = data.observations.astype(np.float64)
    np.testing.assert_allclose(data.observation_moments, [wide.mean(axis=0), wide.std(axis=0)], rtol=1e-12)


def test_an_offset_and_what_was_clipped_are_kept_in_the_cache(tmp_path, monkeypatch):
    given_arrays = trajectories([20, 9], 0)
    given_arrays["observations"] = given_arrays["observations"].astype(np.float64) + 4.5e6
    given_arrays["actions"][[3, 24]] *= 1.5 / np.abs(given_arrays["actions"][[3, 24]]).max(axis=1, keepdims=True)
    np.savez(tmp_path / "data.npz", **given_arrays)

    def open_data():
        return OfflineDataset.from_ogbench(tmp_path / "data.npz", clip_actions=True)

    expected = in_memory(open_data, monkeypatch)
    assert set(expected.observation_offset) == {4.5e6}
    assert [each[:2] for each in expected.clipped] == [(0, 1), (1, 1)]
    assert [each.excess for each in expected.clipped] == pytest.approx([0.5, 0.5], rel=1e-6)
    for data in (open_data(), open_data()):
        assert_same(data, expected)
        assert (data.observation_offset, data.clipped) == (expected.observation_offset, expected.clipped)


@pytest.mark.slow
@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(0, 2**31))
def test_data_of_many_blocks_are_those_of_one(tmp_path_factory, lengths, seed):
    given_arrays = trajectories(lengths, seed)
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    np.savez_compressed(path, **given_arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_cache, "BLOCK_NUMBERS", 29)
        data = OfflineDataset.from_ogbench(path)
    kept = np.flatnonzero(~given_arrays["terminals"])
    expected = OfflineDataset(
        observations=given_arrays["observations"][kept],
        actions=given_arrays["actions"][kept].astype(np.float32),
        rewards=given_arrays["rewards"][kept].astype(np.float32),
        next_observations=given_arrays["observations"][kept + 1],
        terminations=given_arrays["masks"][kept] == 0,
        episode_ends=given_arrays["terminals"][kept + 1],
        observation_boxes=data.observation_boxes,
        action_box=data.action_box,
        dataset_id="data",
    )
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(data, name), getattr(expected, name))
    assert data.fingerprint == expected.fingerprint
    np.testing.assert_allclose(data.observation_moments, expected.observation_moments, rtol=1e-12, atol=1e-15)


def test_episodes_of_many_blocks_are_those_of_one(source, monkeypatch):
    open_data, _ = source
    expected = in_memory(open_data, monkeypatch)
    monkeypatch.setattr(dataset_cache, "BLOCK_NUMBERS", 1)
    data = open_data()
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(data, name), getattr(expected, name))
    assert data.fingerprint == expected.fingerprint


@pytest.mark.parametrize("row", [0, 7, 8, 9, 23, 39])
def test_a_broken_number_in_a_later_block_is_named_with_its_episode_and_step(tmp_path, monkeypatch, row):
    monkeypatch.setattr(dataset_cache, "BLOCK_NUMBERS", 24)  # blocks of eight rows
    arrays = trajectories([10, 30])
    arrays["rewards"][row] = np.nan
    np.savez(tmp_path / "data.npz", **arrays)
    kept = row not in (9, 39)  # the last row of a trajectory is no transition
    if not kept:
        assert len(OfflineDataset.from_ogbench(tmp_path / "data.npz")) == 38
        return
    where = f"episode {row // 10 and 1}, step {row if row < 10 else row - 10}"
    with pytest.raises(DatasetError, match=f"rewards is nan at {where}, index 0; .* 1 of .* rows read are affected"):
        OfflineDataset.from_ogbench(tmp_path / "data.npz")


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_source_that_changed_is_converted_anew_and_the_old_cache_deleted(source, monkeypatch, keep_times):
    open_data, file = source
    before, stat = open_data(), file.stat()
    old = folder_of(before)
    if file.suffix == ".npz":
        write_npz(file.parent, seed=7)
    else:
        with h5py.File(file, "r+") as opened:
            rewards = opened["episode_0/rewards"]
            assert isinstance(rewards, h5py.Dataset)
            rewards[:] = 5.0
    assert file.stat().st_size == stat.st_size
    if keep_times:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = open_data()
    assert not np.array_equal(after.rewards, before.rewards)
    assert_same(after, in_memory(open_data, monkeypatch))
    assert caches(file.parents[3] if file.suffix == ".hdf5" else file.parent) == [folder_of(after)]
    assert not old.exists()


def test_settings_have_caches_of_their_own_and_leave_each_other_be(maze):
    link = maze.with_name("other-v0.npz")
    link.symlink_to(maze.name)
    one, other = OfflineDataset.from_ogbench(maze), OfflineDataset.from_ogbench(link)
    assert (one.dataset_id, other.dataset_id) == ("maze-v0", "other-v0")
    assert caches(maze.parent) == sorted([folder_of(one), folder_of(other)])


def cut(name, left):
    return lambda folder: os.truncate(folder / name, left)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def save(name, array):
    return lambda folder: np.save(folder / name, array)


def edit(**changes):
    def damage(folder):
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata["about"].update(changes)
        (folder / "metadata.json").write_text(json.dumps(metadata))

    return damage


def link(folder):
    (folder / "rewards.npy").rename(folder.parent / "elsewhere.npy")
    (folder / "rewards.npy").symlink_to(folder.parent / "elsewhere.npy")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        cut("observations.npy", -1 % 200),
        cut("rewards.npy", 0),
        lambda folder: (folder / "actions.npy").unlink(),
        lambda folder: (folder / "metadata.json").unlink(),
        write("metadata.json", b"{"),
        write("metadata.json", b"[]"),
        write("metadata.json", b"\xff"),
        write("metadata.json", b"[" * 100_000),
        write("rewards.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4',"),
        save("rewards.npy", np.zeros(3, np.float32)),
        save("rewards.npy", np.zeros(9, np.float64)),
        save("terminations.npy", np.zeros(9, np.uint8)),
        save("actions.npy", np.array([{}] * 9, object)),
        edit(observation_boxes=[]),
        edit(action_box=None),
        edit(moments="none"),
        edit(fingerprint=None, moments=None),
        link,
    ],
)
def test_a_broken_cache_is_written_anew(maze, monkeypatch, damage):
    expected = in_memory(lambda: OfflineDataset.from_ogbench(maze), monkeypatch)
    folder = folder_of(OfflineDataset.from_ogbench(maze))
    damage(folder)
    data = OfflineDataset.from_ogbench(maze)
    assert_same(data, expected)
    assert folder_of(data) == folder
    assert not any(path.is_symlink() for path in folder.iterdir())
    monkeypatch.setattr(ogbench_source, "NpzFile", None)
    assert_same(OfflineDataset.from_ogbench(maze), expected)


def test_a_place_that_cannot_be_written_is_replaced_by_the_users_cache(maze, user_cache, monkeypatch):
    (maze.parent / ".meam-cache").touch()
    data = OfflineDataset.from_ogbench(maze)
    assert folder_of(data).is_relative_to(user_cache / "meam-policy")
    monkeypatch.setattr(ogbench_source, "NpzFile", None)
    assert_same(OfflineDataset.from_ogbench(maze), data)


def test_a_cache_that_is_a_link_is_neither_followed_nor_emptied(maze, user_cache):
    elsewhere = maze.parent / "elsewhere"
    precious = elsewhere / "maze-v0.npz" / ("0" * 64) / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    (maze.parent / ".meam-cache").symlink_to(elsewhere)
    assert folder_of(OfflineDataset.from_ogbench(maze)).is_relative_to(user_cache)
    assert precious.exists()


def test_data_that_cannot_be_cached_anywhere_are_held_in_memory_with_a_warning(maze, user_cache, monkeypatch):
    expected = in_memory(lambda: OfflineDataset.from_ogbench(maze), monkeypatch)
    (maze.parent / ".meam-cache").touch()
    user_cache.touch()
    with pytest.warns(UserWarning, match=r"maze-v0\.npz is held in memory.*set XDG_CACHE_HOME") as caught:
        data = OfflineDataset.from_ogbench(maze)
    assert caught[0].filename == __file__
    assert not isinstance(data.observations, np.memmap)
    assert_same(data, expected)


def test_a_full_disk_leaves_nothing_behind_and_a_warning_that_says_so(maze, user_cache, monkeypatch):
    append = dataset_cache._ColumnFile.append

    def full(self, block):
        append(self, block)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dataset_cache._ColumnFile, "append", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(OfflineDataset.from_ogbench(maze)) == 9
    for place in (maze.parent, user_cache):
        assert not list(place.rglob("*.npy"))


def test_broken_data_leave_no_cache(maze):
    arrays = trajectories([4, 4])
    arrays["observations"][6, 0] = np.inf
    np.savez(maze, **arrays)
    with pytest.raises(DatasetError, match="episode 1, step 2"):
        OfflineDataset.from_ogbench(maze)
    assert [path.name for path in maze.parent.rglob(".meam-cache/*/*")] in ([], [".lock"])


def test_what_an_interrupted_conversion_left_is_deleted_by_the_next(maze):
    left = maze.parent / ".meam-cache" / "maze-v0.npz" / ".x.123.tmp"
    left.mkdir(parents=True)
    (left / "observations.npy").touch()
    OfflineDataset.from_ogbench(maze)
    assert not left.exists()


def test_a_source_that_changes_while_it_is_read_is_refused(maze, monkeypatch):
    read = ogbench_source._ogbench_blocks

    def disturbed(*arguments):
        yield from read(*arguments)
        os.utime(maze)

    monkeypatch.setattr(ogbench_source, "_ogbench_blocks", disturbed)
    with pytest.raises(DatasetError, match=r"maze-v0\.npz changed while it was read"):
        OfflineDataset.from_ogbench(maze)
    assert not caches(maze.parent)


def test_of_two_that_open_the_data_at_once_one_converts_and_the_other_waits(maze, monkeypatch):
    read, conversions, opened = ogbench_source._ogbench_blocks, [], []
    both_here = threading.Barrier(2, timeout=30)
    places = dataset_cache._places

    def counted(*arguments):
        conversions.append(arguments)
        yield from read(*arguments)

    def meet(source):
        both_here.wait()
        return places(source)

    monkeypatch.setattr(ogbench_source, "_ogbench_blocks", counted)
    monkeypatch.setattr(dataset_cache, "_places", meet)
    threads = [threading.Thread(target=lambda: opened.append(OfflineDataset.from_ogbench(maze))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert_same(*opened)


SMALL_MEMORY = """
import re, resource, sys
import torch
from meam_training import OfflineDataset, TrainConfig
from meam_training.learning.chunk_source import HostChunks
from meam_training.trainer import make_spec
torch.set_num_threads(1)
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
budget = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))
data = OfflineDataset.from_ogbench(sys.argv[1])
config = TrainConfig.preset("bc", chunk_size=5)
chunks = HostChunks(config, data, make_spec(config, data), torch.device("cpu"))
for seed in range(50):
    chunks.sample(256, torch.Generator().manual_seed(seed))
print(len(data), sum(getattr(data, name).nbytes for name in ("observations", "actions", "next_observations")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_data_of_300_megabytes_are_converted_opened_and_sampled_in_a_fraction_of_it(tmp_path):
    rows = 600_000
    numbers = np.random.default_rng(0).random((rows, 60), np.float32)
    np.savez(
        tmp_path / "large.npz",
        observations=numbers,
        actions=numbers[:, :5],
        terminals=np.arange(rows) % 100 == 99,
        rewards=numbers[:, 0],
    )
    for budget in (220, 60):  # megabytes: to convert, and to map
        command = [sys.executable, "-c", SMALL_MEMORY, str(tmp_path / "large.npz"), str(budget)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        transitions, size = map(int, done.stdout.split())
        assert transitions == rows * 99 // 100
        assert size > 290e6

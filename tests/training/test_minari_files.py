import contextlib
import json
import shutil
from itertools import pairwise

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meam_policy.errors import DatasetError, NotFoundError
from meam_training.dataset import OfflineDataset
from meam_training.minari_files import minari_root, open_minari

SPACE = spaces.Box(-9, 9, (2,), np.float32)


@pytest.fixture(scope="module")
def recorded(make_minari, tmp_path_factory):
    """The folder of the data sets, with one in it."""
    root = tmp_path_factory.mktemp("datasets")
    episode = {
        "observations": list(np.ones((4, 2), np.float32)),
        "actions": list(np.zeros((3, 2), np.float32)),
        "rewards": [1.0, 2.0, 3.0],
        "terminations": [False] * 3,
        "truncations": [False, False, True],
    }
    make_minari(root, "tests/real-v0", [episode, episode], SPACE, SPACE)
    return root


@pytest.fixture
def folder(recorded, tmp_path):
    """A copy to spoil."""
    copy = tmp_path / "copy"
    shutil.copytree(recorded / "tests/real-v0/data", copy)
    return copy


def change_metadata(folder, remove=(), **changes):
    file = folder / "metadata.json"
    metadata = {k: v for k, v in json.loads(file.read_text()).items() if k not in remove} | changes
    file.write_text(json.dumps(metadata))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """An env_spec naming a module on the path that writes a marker file when it is imported or called."""
    marker = tmp_path / "executed"
    module = tmp_path / "modules" / "hostile_environment.py"
    module.parent.mkdir()
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    module.write_text(f"{code}def make(**kwargs):\n    raise SystemExit\n")
    monkeypatch.syspath_prepend(module.parent)
    return {"id": "Hostile-v0", "entry_point": "hostile_environment:make"}, marker


def spec_json(spec):
    defaults = {"reward_threshold": None, "nondeterministic": False, "max_episode_steps": None}
    defaults |= {"disable_env_checker": False, "kwargs": {}, "additional_wrappers": [], "vector_entry_point": None}
    return json.dumps({**spec, "order_enforce": True, **defaults})


def test_a_data_set_opens_by_id_and_by_folder(recorded, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded))
    whole = recorded / "tests/real-v0"
    for name in ("tests/real-v0", whole, str(whole), whole / "data"):
        source = open_minari(name)
        assert source.dataset_id == "tests/real-v0"
        assert (source.observation_space, source.action_space) == (SPACE, SPACE)
        assert source.environment_id is source.control_rate_hz is None
        assert [list(episode.rewards) for episode in source.episodes] == [[1, 2, 3]] * 2


def test_the_root_is_minaris_own(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "there"))
    assert minari_root() == tmp_path / "there"
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert minari_root() == tmp_path / ".minari" / "datasets"


@pytest.mark.parametrize("name", ["tests/nothing-v0", "/nowhere/at/all", "tests"])
def test_a_missing_data_set_is_not_found(recorded, monkeypatch, name):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded))
    with pytest.raises(NotFoundError, match=f"no Minari data set {name}"):
        open_minari(name)


@pytest.mark.parametrize("missing", [["observation_space"], ["action_space"], ["observation_space", "action_space"]])
def test_metadata_that_would_run_code_is_refused_and_nothing_runs(folder, hostile, missing):
    spec, marker = hostile
    change_metadata(folder, remove=missing, env_spec=spec_json(spec))
    with pytest.raises(DatasetError, match=f"records no {missing[0]}.*would run"):
        OfflineDataset.from_minari(folder)
    assert not marker.exists()


def test_an_environment_that_would_run_code_is_only_a_name(folder, hostile):
    spec, marker = hostile
    change_metadata(folder, env_spec=spec_json(spec))
    assert OfflineDataset.from_minari(folder).environment_id == "Hostile-v0"
    assert not marker.exists()


def test_minari_itself_would_run_that_code(folder, hostile):
    from minari import MinariDataset

    spec, marker = hostile
    change_metadata(folder, remove=["action_space"], env_spec=spec_json(spec))
    with pytest.raises(SystemExit):
        MinariDataset(folder)
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b'"text"', b"[" * 100_000])
def test_metadata_that_is_no_json_object_is_refused(folder, content):
    (folder / "metadata.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"metadata\.json"):
        open_minari(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"observation_space": "[]"},
        {"observation_space": "{}"},
        {"observation_space": "not json"},
        {"observation_space": '{"type": "Unheard"}'},
        {"observation_space": '{"type": "Box", "dtype": "nonsense", "shape": [1], "low": [0], "high": [1]}'},
        {"observation_space": '{"type": "Box", "dtype": "float32", "shape": [-1], "low": [0], "high": [1]}'},
        {"observation_space": '{"type":"Dict","subspaces":{"a":' * 2000},
        {"action_space": 3},
        {"data_format": "unheard"},
        {"data_format": None},
        {"minari_version": "99.0"},
        {"minari_version": 3},
        {"total_episodes": "many"},
        {"total_episodes": 99},
        {"total_episodes": -1},
        {"total_episodes": 10**12},
        {"env_spec": "{"},
        {"env_spec": "[1]"},
        {"env_spec": 3},
        {"env_spec": "{}"},
    ],
)
def test_metadata_with_impossible_values_is_refused(folder, changes):
    change_metadata(folder, **changes)
    with pytest.raises(DatasetError):
        OfflineDataset.from_minari(folder)


@pytest.mark.parametrize("name", ["observation_space", "dataset_id", "data_format", "minari_version", "total_episodes"])
def test_metadata_that_lacks_a_field_is_refused(folder, name):
    change_metadata(folder, remove=[name])
    with pytest.raises(DatasetError, match=name):
        OfflineDataset.from_minari(folder)


@pytest.mark.parametrize("rate", [20, 12.5])
def test_a_recorded_rate_and_environment_are_read(folder, rate):
    change_metadata(folder, control_rate_hz=rate, meam_environment_id="meam/Pockets-v0")
    data = OfflineDataset.from_minari(folder)
    assert (data.control_rate_hz, data.environment_id) == (rate, "meam/Pockets-v0")


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf"), "fast", None])
def test_an_impossible_rate_is_unknown(folder, rate):
    change_metadata(folder, control_rate_hz=rate)
    assert OfflineDataset.from_minari(folder).control_rate_hz is None


def external_link(file, tmp_path):
    file["episode_0/observations"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "/secret")


def soft_link(file, tmp_path):
    file["episode_0/observations"] = h5py.SoftLink("/episode_1/observations")


def external_storage(file, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    file.create_dataset("episode_0/observations", (4, 2), np.float32, external=[(str(tmp_path / "secret.bin"), 0, 32)])


def virtual_storage(file, tmp_path):
    layout = h5py.VirtualLayout((4, 2), np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "secret", (4, 2))
    file.create_virtual_dataset("episode_0/observations", layout)


@pytest.mark.parametrize("replace", [external_link, soft_link, external_storage, virtual_storage])
def test_hdf5_that_reaches_elsewhere_is_refused(folder, tmp_path, replace):
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["secret"] = np.zeros((4, 2), np.float32)
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file["episode_0/observations"]
        replace(file, tmp_path)
    with pytest.raises(DatasetError, match="/episode_0/observations is .*refused"):
        open_minari(folder)


def test_hdf5_that_reaches_elsewhere_where_minari_does_not_look_is_refused_too(folder, tmp_path):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        file["episode_1/infos/deep/down"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DatasetError, match="/episode_1/infos/deep/down is a link"):
        open_minari(folder)


def test_hdf5_groups_that_hold_themselves_are_visited_once(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        group = file.create_group("episode_0/odd")
        group["itself"] = group
        levels = [file.create_group(f"level_{n}") for n in range(40)]
        for above, below in pairwise(levels):  # each holds the next one twice: 2^39 paths
            above["left"], above["right"] = below, below
    assert len(list(open_minari(folder).episodes)) == 2


def test_hdf5_groups_nested_very_deeply_are_checked(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        group = file.create_group("deep")
        for _ in range(2000):
            group = group.create_group("g")
    assert len(list(open_minari(folder).episodes)) == 2


def test_hdf5_that_claims_more_than_it_stores_is_refused(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file["episode_0/rewards"]
        file.create_dataset("episode_0/rewards", (10**12,), np.float64, chunks=(1000,))
    with pytest.raises(DatasetError, match="/episode_0/rewards claims 8000000000000 bytes and stores 0"):
        open_minari(folder)


def test_compressed_hdf5_is_read(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file["episode_0/rewards"]
        file.create_dataset("episode_0/rewards", data=np.zeros(3), compression="gzip", compression_opts=9)
    np.testing.assert_array_equal(OfflineDataset.from_minari(folder).rewards[:3], 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=3), st.floats(0, 1))
def test_changed_bytes_never_give_an_error_of_another_library(recorded, folder, patch, position):
    whole = (recorded / "tests/real-v0/data/main_data.hdf5").read_bytes()
    start = int(position * (len(whole) - len(patch)))
    (folder / "main_data.hdf5").write_bytes(whole[:start] + patch + whole[start + len(patch) :])
    with contextlib.suppress(DatasetError):
        OfflineDataset.from_minari(folder)


@pytest.mark.parametrize("content", [b"", b"not hdf5", None])
def test_broken_hdf5_is_refused(folder, content):
    file = folder / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(DatasetError, match=r"main_data\.hdf5 is not an HDF5 file"):
        open_minari(folder)


def test_missing_data_is_refused(folder):
    (folder / "main_data.hdf5").unlink()
    with pytest.raises(DatasetError, match="not a data set that Minari can open"):
        open_minari(folder)


@pytest.mark.parametrize("name", ["rewards", "observations"])
def test_an_episode_without_a_field_is_refused(folder, name):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        del file[f"episode_1/{name}"]
    with pytest.raises(DatasetError, match="an episode cannot be read"):
        OfflineDataset.from_minari(folder)


@pytest.mark.parametrize("name", ["main_data.hdf5", "extra/notes.txt"])
def test_a_symbolic_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    link = folder / name
    if link.exists():
        shutil.move(link, outside)
    else:
        link.parent.mkdir()
        outside.write_text("secret")
    link.symlink_to(outside)
    with pytest.raises(DatasetError, match=f"{link} links to {outside}, outside the data set"):
        open_minari(folder)


def test_a_symbolic_link_within_the_folder_is_fine(folder):
    shutil.move(folder / "main_data.hdf5", folder / "real.hdf5")
    (folder / "main_data.hdf5").symlink_to("real.hdf5")
    assert len(list(open_minari(folder).episodes)) == 2

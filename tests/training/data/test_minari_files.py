import contextlib
import json
import os
import shutil
import sys
from itertools import pairwise

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meam_policy.errors import DatasetError, MissingExtraError, NotFoundError
from meam_training.data.dataset import OfflineDataset
from meam_training.data.minari_files import minari_root, open_minari

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["main_data.hdf5", "notes.txt"])
def test_a_named_pipe_in_the_folder_is_refused_and_not_waited_for(folder, no_waiting, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DatasetError, match=f"{folder / name} is neither a file nor a folder; expected only these"):
        open_minari(folder)


def test_a_symbolic_link_within_the_folder_is_fine(folder):
    shutil.move(folder / "main_data.hdf5", folder / "real.hdf5")
    (folder / "main_data.hdf5").symlink_to("real.hdf5")
    assert len(list(open_minari(folder).episodes)) == 2


def test_many_hdf5_episodes_are_checked_in_little_memory(folder):
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        for n in range(300):
            file.create_group(f"more_{n}").create_group("inner")["link"] = h5py.SoftLink("/") if n == 299 else n
    with pytest.raises(DatasetError, match="/more_299/inner/link is a link"):
        open_minari(folder)


# Arrow and Parquet


def episodes_of(lengths):
    generator = np.random.default_rng(0)
    return [
        {
            "observations": list(generator.uniform(-9, 9, (n + 1, 2)).astype(np.float32)),
            "actions": list(generator.uniform(-9, 9, (n, 2)).astype(np.float32)),
            "rewards": list(generator.normal(size=n)),
            "terminations": [False] * n,
            "truncations": [False] * (n - 1) + [True],
        }
        for n in lengths
    ]


@pytest.fixture(params=["arrow", "parquet"])
def columnar(request, make_minari, tmp_path):
    """A data set in a columnar format."""
    pytest.importorskip("pyarrow")
    return make_minari(tmp_path, "tests/columnar-v0", episodes_of([3, 4, 2]), SPACE, SPACE, request.param)


def data_file(folder, episode):
    (file,) = (path for path in (folder / str(episode)).iterdir() if path.name != "metadata.json")
    return file


def rewrite(file, change):
    import pyarrow.dataset

    data_format = file.suffix[1:]
    table = change(pyarrow.dataset.dataset(file, format=data_format).to_table())
    if data_format == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def test_columnar_data_are_the_same_as_those_in_hdf5(columnar, make_minari, tmp_path):
    hdf5 = make_minari(tmp_path, "tests/hdf5-v0", episodes_of([3, 4, 2]), SPACE, SPACE)
    one, other = OfflineDataset.from_minari(columnar), OfflineDataset.from_minari(hdf5)
    assert len(one) == 9
    assert one.fingerprint == other.fingerprint
    assert (one.observation_boxes, one.action_box) == (other.observation_boxes, other.action_box)


def test_a_columnar_number_that_is_not_finite_is_named(columnar):
    import pyarrow

    def spoil(table):
        rewards = table["rewards"].to_numpy().copy()
        rewards[1] = np.nan
        return table.set_column(table.column_names.index("rewards"), "rewards", pyarrow.array(rewards))

    rewrite(data_file(columnar, 1), spoil)
    with pytest.raises(DatasetError, match="rewards is nan at episode 1, step 1"):
        OfflineDataset.from_minari(columnar)


def test_a_columnar_episode_longer_than_minari_reads_is_refused(columnar):
    file = data_file(columnar, 0)
    rewrite(file, lambda table: table.take(np.zeros(131_073, np.int64)).combine_chunks())
    with pytest.raises(DatasetError, match="has 131073 rows; expected at most 131072"):
        open_minari(columnar)


def test_a_second_data_file_of_an_episode_is_refused(columnar):
    file = data_file(columnar, 2)
    shutil.copy(file, file.with_name(f"part-1{file.suffix}"))
    with pytest.raises(DatasetError, match=f"{columnar / '2'} has several data files; expected one per episode"):
        open_minari(columnar)


def test_an_arrow_file_of_several_batches_is_refused(make_minari, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    folder = make_minari(tmp_path, "tests/columnar-v0", episodes_of([3]), SPACE, SPACE, "arrow")
    rewrite(data_file(folder, 0), lambda table: pyarrow.concat_tables([table, table]))
    with pytest.raises(DatasetError, match="has 2 record batches; expected one"):
        open_minari(folder)


def test_columnar_data_that_claim_more_than_they_store_are_refused(columnar):
    import pyarrow
    import pyarrow.parquet

    file = data_file(columnar, 0)
    zeros = pyarrow.table({f"column_{n}": np.zeros(131_072) for n in range(50)})
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(zeros, file, compression="zstd", compression_level=19, use_dictionary=False)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, zeros.schema, options=options) as out:
            out.write_table(zeros)
    with pytest.raises(DatasetError, match=rf"{file} claims \d+ bytes and stores {file.stat().st_size}, so it is refu"):
        open_minari(columnar)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"PAR1", None])
def test_broken_columnar_data_are_refused(columnar, content):
    file = data_file(columnar, 1)
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(DatasetError, match=f"{file} is not an (arrow|parquet) file"):
        open_minari(columnar)


def test_a_columnar_file_that_is_a_link_out_of_the_folder_is_refused(columnar, tmp_path):
    file = data_file(columnar, 1)
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(DatasetError, match="outside the data set"):
        open_minari(columnar)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*outside its declared space:UserWarning")  # a changed number is learned from
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.binary(min_size=1, max_size=3), st.floats(0, 1))
def test_changed_bytes_of_columnar_data_never_give_an_error_of_another_library(columnar, patch, position):
    file = data_file(columnar, 0)
    original = file.read_bytes()
    start = int(position * (len(original) - len(patch)))
    file.write_bytes(original[:start] + patch + original[start + len(patch) :])
    with contextlib.suppress(DatasetError):
        OfflineDataset.from_minari(columnar)
    file.write_bytes(original)


def test_columnar_data_need_pyarrow(columnar, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'meam-policy\[arrow\]'"):
        open_minari(columnar)

"""Data as the command line names it."""

from __future__ import annotations

import json
import os

import h5py
import numpy as np
import pytest

from meam_policy.cli import run as meam
from meam_policy.errors import ConfigError, DatasetError, NotFoundError
from meam_training.data.opening import OTHER_FOLDERS, OTHER_SUFFIXES, DataArguments, open_dataset
from meam_training.runs.checkpoint import Checkpoint


def write_npz(file, offset=0.0):
    rows = offset + np.arange(40, dtype=np.float32)
    np.savez(
        file,
        observations=np.stack([rows, -rows], axis=1),
        actions=np.full((40, 2), 0.5, np.float32),
        rewards=rows,
        terminals=(np.arange(40) % 10 == 9).astype(np.float32),
    )


def write_d4rl(file):
    rows = np.arange(30, dtype=np.float32)
    with h5py.File(file, "w") as opened:
        opened["observations"] = np.stack([rows, rows], axis=1)
        opened["actions"] = np.zeros((30, 2))
        opened["rewards"] = rows
        opened["terminals"] = np.zeros(30, bool)
        opened["timeouts"] = np.arange(30) % 10 == 9


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz", 100)
    write_d4rl(tmp_path / "d.hdf5")
    return tmp_path


def test_files_are_opened_by_their_kind_joined_and_cut_to_their_episodes(here):
    data = open_dataset(DataArguments(("a.npz", "d.hdf5"), shares=(1.0, 3.0), episodes=("1:2", ":"), env_id=None))
    assert data.rewards.tolist() == [*range(10, 19), *range(9), *range(10, 19), *range(20, 29)]
    assert data.parts == ((9, 0.25), (27, 0.75))
    assert open_dataset(DataArguments(("d.hdf5",), env_id="Hopper-v5")).environment_id == "Hopper-v5"


@pytest.mark.parametrize("suffix", OTHER_SUFFIXES)
def test_a_file_of_another_kind_is_refused_with_its_kind(here, suffix):
    (here / f"log{suffix}").write_bytes(b"\x80\x04")
    with pytest.raises(DatasetError) as refused:
        open_dataset(DataArguments((f"log{suffix}",)))
    assert f"log{suffix} is {OTHER_SUFFIXES[suffix]}, which is not read as data" in str(refused.value)


@pytest.mark.parametrize("file", OTHER_FOLDERS)
def test_a_folder_of_another_kind_is_refused_with_its_kind(here, file):
    (here / "folder" / file).parent.mkdir(parents=True)
    (here / "folder" / file).write_text("{}")
    with pytest.raises(DatasetError) as refused:
        open_dataset(DataArguments(("folder",)))
    assert f"folder is {OTHER_FOLDERS[file]}, which is not read as data" in str(refused.value)


def test_other_files_and_folders_are_refused_too(here):
    (here / "notes.xyz").write_text("")
    (here / "demos").mkdir()
    write_d4rl(here / "demos" / "one.hdf5")
    for name, kind in (("notes.xyz", "a file ending in '.xyz'"), ("demos", "a folder of HDF5 files")):
        with pytest.raises(DatasetError, match=f"{name} is {kind}"):
            open_dataset(DataArguments((name,)))
    with pytest.raises(NotFoundError, match="There is no file"):
        open_dataset(DataArguments(("gone.hdf5",)))
    with pytest.raises(NotFoundError, match="There is no Minari data set arm/gone-v0"):
        open_dataset(DataArguments(("arm/gone-v0",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": (1.0,)}, "--shares has no effect with one data set"),
        ({"shares": (1.0, 2.0)}, "--shares has 2 values and --data 1"),
        ({"episodes": ("0:1", "0:2")}, "--episodes has 2 values and --data 1"),
        ({"episodes": ("3",)}, 'episodes is "3"; expected the first and the end of a range'),
        ({"episodes": ("0:9",)}, "Episodes 0:9 are chosen, but a has 4"),
        ({"reward": "end"}, "--reward is end, but has no effect on a.npz"),
        ({"observation_keys": ("arm",)}, "--observation-keys is .* has no effect on a.npz"),
    ],
)
def test_arguments_without_effect_are_refused(here, arguments, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(DataArguments(("a.npz",), **arguments))


TINY = ["--hidden-dims", "8", "--batch-size", "8", "--nfe", "2", "--device", "cpu", "--log-every", "1"]


def test_a_run_on_several_data_sets_is_resumed_without_repeating_them(here, monkeypatch, capsys):
    chosen = ["--data", "a.npz", "b.npz", "--shares", "1", "3", "--episodes", "0:2", ":"]
    assert meam(["train", "bc", *chosen, "--output-dir", "run", "--steps", "2", *TINY]) == 0
    origin = json.loads((here / "run" / "run.json").read_text())["origin"]
    assert origin["data"] == [str(here / "a.npz"), str(here / "b.npz")]
    assert (origin["shares"], origin["episodes"]) == ([1.0, 3.0], ["0:2", ":"])
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert meam(["train", "--resume", "--output-dir", "../run", "--steps", "3"]) == 0
    last = Checkpoint.load("../run")
    assert (last.step, last.spec.training_data) == (3, "0.25 a (2 of 4 episodes) + 0.75 b")
    capsys.readouterr()
    assert meam(["train", "--resume", "--output-dir", "../run", "--steps", "4", "--shares", "1", "1"]) == 2
    assert "was trained on other data" in " ".join(capsys.readouterr().err.split())
    assert meam(["info", "../run"]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert f"{here}/a.npz,{here}/b.npz" in shown


def test_a_wrong_kind_is_one_sentence_and_leaves_nothing_behind(here, capsys):
    (here / "drive.mcap").write_bytes(b"\x89MCAP")
    assert meam(["train", "bc", "--data", "drive.mcap", "--output-dir", "run", *TINY]) == 2
    assert "drive.mcap is an MCAP recording, as of ROS 2, which is not read" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", ["a" * 256, "a" * 256 + ".npz", "b" * 300 + ".hdf5", "a\0b", "a\ud800"])
def test_a_path_that_no_file_system_holds_is_refused(name):
    with pytest.raises(ConfigError, match="data is '.*expected one that a file system can hold"):
        open_dataset(DataArguments((name,)))


@pytest.mark.parametrize("name", ["data.npz", "data.hdf5"])
def test_a_named_pipe_is_no_file_of_data_and_is_not_waited_for(tmp_path, no_waiting, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(NotFoundError, match="There is no file"):
        open_dataset(DataArguments((str(tmp_path / name),)))

import contextlib
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import meam_training.runs.checkpoint as checkpoint_module
from meam_policy import atomic_files
from meam_policy.errors import CheckpointError, ConfigError, MeamError, NotFoundError, OutputError
from meam_training.networks.meam_networks import build_networks
from meam_training.runs.checkpoint import Checkpoint, TrainingState
from meam_training.runs.trained_policy import TrainedPolicy
from meam_training.trainer import make_spec, train

HASHES = "hashes.json"
FILES = {"policy_spec.json", "train_config.json", "model.safetensors", "trainer.safetensors", "trainer.json", HASHES}


class Gadget:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def state_of(checkpoint, step, networks, score=None):
    """A run like a checkpoint's at another step, with an optimiser that has not moved yet."""
    optimizer = torch.optim.Adam([p for p in networks.parameters() if p.requires_grad], lr=1.0)
    return TrainingState(step, checkpoint.config, checkpoint.spec, "ab", networks, optimizer, torch.Generator(), score)


def save(folder, checkpoint, step, score=None):
    return Checkpoint.save(folder, state_of(checkpoint, step, checkpoint.load_networks(), score))


@pytest.fixture(scope="module")
def run(dataset, make_config, tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("run")
    train(make_config(steps=5, pretrain_steps=0, checkpoint_every=2, fourier_features=4), dataset, folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run's last checkpoint to spoil."""
    return Path(shutil.copytree(run / "checkpoints/step_00000005", tmp_path / "checkpoints/step_00000005"))


def test_a_checkpoint_is_a_folder_of_plain_files(run):
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_0000000{n}" for n in (2, 4, 5)]
    for folder in (run / "checkpoints").iterdir():
        assert {file.name for file in folder.iterdir()} == FILES


def test_a_training_folder_opens_at_its_newest_checkpoint(run, dataset, make_config):
    checkpoint = Checkpoint.load(run)
    config = make_config(steps=5, pretrain_steps=0, checkpoint_every=2, fourier_features=4).resolved()
    assert checkpoint == Checkpoint.load(run / "checkpoints/step_00000005") == Checkpoint.latest(run)
    assert (checkpoint.step, checkpoint.config, checkpoint.spec) == (5, config, make_spec(config, dataset))
    assert Checkpoint.load(run / "checkpoints/step_00000002").step == 2


def test_folders_are_strings_or_paths_and_a_tilde_is_the_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for step, score in ((1, 2.0), (2, 1.0), (3, 0.0)):
        assert save("~/run", Checkpoint.load(str(run)), step, score).path.parent == tmp_path / "run/checkpoints"
    Checkpoint.prune("~/run", 1)
    for folder in ("~/run", str(tmp_path / "run"), tmp_path / "run"):
        latest, best = Checkpoint.latest(folder), Checkpoint.best(folder)
        assert latest is not None
        assert best is not None
        assert (Checkpoint.load(folder).step, latest.step, best.step) == (3, 3, 1)
    assert steps(tmp_path / "run") == [1, 3]


def test_a_checkpoint_and_a_state_show_themselves_in_one_line(run):
    checkpoint = Checkpoint.load(run)
    assert repr(checkpoint) == f"Checkpoint('{checkpoint.path}', step=5, method='me-am', score=None)"
    state = state_of(checkpoint, 7, checkpoint.load_networks(), 1.5)
    assert repr(state) == "TrainingState(step=7, method='me-am', score=1.5)"


def test_steps_are_ordered_as_numbers(run, tmp_path):
    for name in ("step_99999998", "step_100000000", "step_7", ".step_00000009.tmp", "step_x"):
        shutil.copytree(run / "checkpoints/step_00000004", tmp_path / "checkpoints" / name)
    newest = Checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.path.name == "step_100000000"


def test_the_networks_have_the_saved_weights(run):
    checkpoint = Checkpoint.load(run)
    saved = load_file(checkpoint.path / "model.safetensors")
    networks = checkpoint.load_networks().state_dict()
    assert networks.keys() == saved.keys()
    assert all(torch.equal(networks[name], saved[name]) for name in saved)
    fresh = build_networks(checkpoint.spec, checkpoint.config).state_dict()
    assert not torch.equal(fresh["policy.layers.0.weight"], saved["policy.layers.0.weight"])
    assert torch.equal(fresh["encoder.frequencies"], saved["encoder.frequencies"])


def test_the_seed_decides_the_first_weights_and_the_global_generator_is_left_alone(dataset, make_config):
    before = torch.random.get_rng_state()
    one, same, other = (
        build_networks(make_spec(config, dataset), config).state_dict()
        for config in (make_config(seed=seed, fourier_features=4) for seed in (1, 1, 2))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["prior.layers.0.weight"], other["prior.layers.0.weight"])
    assert not torch.equal(one["encoder.frequencies"], other["encoder.frequencies"])


def test_optimiser_and_generator_come_back_as_they_were(run, dataset):
    checkpoint = Checkpoint.load(run)
    state = state_of(checkpoint, 0, build_networks(checkpoint.spec, checkpoint.config))
    trained = [p for p in state.networks.parameters() if p.requires_grad]
    optimizer, generator = state.optimizer, state.generator
    restored = checkpoint.restore(state)
    assert (restored.step, restored.score, restored.online) == (5, None, None)
    assert (restored.networks, restored.optimizer, restored.generator) == (state.networks, optimizer, generator)
    saved = load_file(checkpoint.path / "trainer.safetensors")
    assert torch.equal(generator.get_state(), saved["generator"])
    assert optimizer.param_groups[0]["lr"] == checkpoint.config.adam_rate
    for i, parameter in enumerate(trained):
        assert optimizer.state[parameter]["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][name], saved[f"{i}.{name}"])


def test_a_missing_folder_and_a_folder_without_checkpoints_are_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no checkpoint folder .*nowhere"):
        Checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        Checkpoint.load(tmp_path)
    assert Checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["policy_spec.json", "train_config.json", "trainer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"null", b"[]", b"\xff", b"{}"])
def test_missing_and_broken_json_is_refused_with_the_folders_name(copy, name, content):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    for path in (copy, copy.parent.parent):
        with pytest.raises(CheckpointError, match=f"checkpoint {copy} is broken"):
            Checkpoint.load(path)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("name", ["policy_spec.json", "train_config.json", "trainer.json", "model.safetensors"])
def test_a_named_pipe_in_place_of_a_file_is_refused_and_not_waited_for(copy, no_waiting, name, hashed):
    if not hashed:
        (copy / "hashes.json").unlink()  # as in a checkpoint of an earlier version
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError, match="it is a named pipe, not a regular file"):
        Checkpoint.load(copy).load_networks()


@pytest.mark.parametrize("path", ["a" * 256, "a\0b", "a\ud800"])
def test_a_path_that_no_file_system_holds_is_refused(path):
    for call in (Checkpoint.load, Checkpoint.latest, TrainedPolicy.load):
        with pytest.raises(ConfigError, match="expected one that a file system can hold"):
            call(path)


@pytest.mark.parametrize("step", [None, "many", [1]])
def test_a_step_that_is_no_number_is_refused(copy, step):
    (copy / "trainer.json").write_text(json.dumps({"step": step, "optimizer": {}}))
    with pytest.raises(CheckpointError, match="is broken"):
        Checkpoint.load(copy)


@pytest.mark.parametrize("content", [None, b"", b"truncated", b"\xff" * 8, b"<html>"])
def test_missing_and_broken_weights_are_refused(copy, content):
    file = copy / "model.safetensors"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10] if content == b"truncated" else content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or broken"):
        Checkpoint.load(copy).load_networks()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_of_the_weights_is_refused_and_not_run(copy, dataset, tmp_path, name, zipped):
    marker = tmp_path / "executed"
    torch.save({"prior": torch.zeros(3), "gadget": Gadget(marker)}, copy / name, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.load(copy)
    with pytest.raises(CheckpointError, match=f"{name} is missing or broken"):
        train(checkpoint.config, dataset, copy.parent.parent, resume=True)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match=f"{name} is missing or broken"):
            checkpoint.load_networks()
    assert not marker.exists()
    torch.load(io.BytesIO((copy / name).read_bytes()), weights_only=False)
    assert marker.exists()  # the gadget does work


def change_weights(copy, change):
    (copy / HASHES).unlink()
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("prior.layers.0.weight"),
        lambda weights: weights.update(extra=torch.zeros(2)),
        lambda weights: weights.update({"prior.layers.0.bias": torch.zeros(3)}),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_of_other_networks_are_refused(copy, change):
    change_weights(copy, change)
    with pytest.raises(CheckpointError, match="does not fit"):
        Checkpoint.load(copy).load_networks()


@pytest.mark.parametrize("change", ["generator", "moments", "layout"])
def test_an_optimiser_state_of_another_run_is_refused(copy, dataset, change):
    (copy / HASHES).unlink()
    tensors, state = load_file(copy / "trainer.safetensors"), json.loads((copy / "trainer.json").read_text())
    if change == "generator":
        del tensors["generator"]
    elif change == "moments":
        tensors["no_number"] = torch.zeros(3)
    else:
        state["optimizer"]["param_groups"][0]["params"].pop()
    save_file(tensors, copy / "trainer.safetensors")
    (copy / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(Checkpoint.load(copy).config, dataset, copy.parent.parent, resume=True)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_flipped_byte_is_found_on_resume_and_on_export_with_the_older_one_that_is_whole(
    run, dataset, tmp_path, name, share
):
    shutil.copytree(run, tmp_path / "run")
    newest, middle, oldest = (tmp_path / "run/checkpoints" / f"step_0000000{n}" for n in (5, 4, 2))
    for folder in (newest, middle):
        data = bytearray((folder / name).read_bytes())
        data[int(share * len(data))] ^= 1
        (folder / name).write_bytes(data)
    expected = f"The newest older one that is whole is {oldest}: export that, or delete {newest} to resume from it."
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        train(Checkpoint.load(oldest).config, dataset, tmp_path / "run", resume=True)
    if name != "trainer.safetensors":  # an export does without the optimiser
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            Checkpoint.load(tmp_path / "run").load_networks()
    for folder in (newest, middle):
        shutil.rmtree(folder)
    assert Checkpoint.load(tmp_path / "run").is_whole()


def test_a_damaged_checkpoint_without_an_older_one_says_so(copy):
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"No older one is whole. Delete {copy}, and train anew"):
        Checkpoint.load(copy).load_networks()
    assert not Checkpoint.load(copy).is_whole()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_half_done(run, tmp_path):
    checkpoint = Checkpoint.load(run)
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path, checkpoint, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_what_an_interrupted_save_left_is_overwritten(run, tmp_path):
    left = tmp_path / f"checkpoints/.step_00000007.{os.getpid()}.tmp"
    left.mkdir(parents=True)
    (left / "junk").write_text("half a file")
    assert Checkpoint.latest(tmp_path) is None
    saved = save(tmp_path, Checkpoint.load(run), 7)
    assert saved == Checkpoint.load(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000007"]
    assert {file.name for file in saved.path.iterdir()} == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_file_never_gives_an_error_of_another_library(copy, dataset, name):
    whole = (copy / name).read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 25)):
        (copy / name).write_bytes(whole[:length])
        with pytest.raises(MeamError):
            train(Checkpoint.load(copy).config, dataset, copy.parent.parent, resume=True)


# Retention, and the best one


def steps(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([None, None, None, None], None, [3, 4]),
        ([None, 5.0, None, None], 2, [2, 3, 4]),
        ([-3.0, -5.0, None, None], 1, [1, 3, 4]),
        ([1.0, 1.0, 0.0, 1.0], 1, [1, 3, 4]),
        ([1.0, 2.0, 3.0, 4.0], 4, [3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(run, tmp_path, scores, best, kept):
    for step, score in enumerate(scores, 1):
        saved = save(tmp_path, Checkpoint.load(run), step, score)
        Checkpoint.prune(tmp_path, 2)
        assert saved == Checkpoint.latest(tmp_path)
    assert steps(tmp_path) == kept
    found = Checkpoint.best(tmp_path)
    assert (found and found.step) == best
    assert (found and found.score) == (best and scores[best - 1])


def test_the_newest_and_the_best_have_names_in_the_checkpoints_folder(run, tmp_path):
    for step, score in ((1, 0.5), (2, 7.0), (3, None)):
        save(tmp_path, Checkpoint.load(run), step, score)
    assert Checkpoint.load(tmp_path / "checkpoints/best").step == 2
    assert Checkpoint.load(tmp_path / "checkpoints/latest").step == 3
    with pytest.raises(NotFoundError, match="holds no checkpoint that was evaluated in an environment"):
        Checkpoint.load(run / "checkpoints/best")
    with pytest.raises(NotFoundError, match="nowhere holds no checkpoint"):
        Checkpoint.load(tmp_path / "nowhere/checkpoints/latest")


def test_what_killed_processes_left_is_deleted_and_never_taken_for_a_checkpoint(run, tmp_path):
    save(tmp_path, Checkpoint.load(run), 1)
    for name in (".step_00000001.deleted", ".step_00000002.tmp", ".step_00000009.deleted"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "junk").write_text("half a file")
    assert Checkpoint.load(tmp_path).step == 1
    Checkpoint.prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(run, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, Checkpoint.load(run), step)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: None)  # killed before the first file is gone
    Checkpoint.prune(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000003"]


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_deleted(run, tmp_path, monkeypatch):
    events = []
    flush, rename = atomic_files.flush_to_disk, Path.rename
    for module in (atomic_files, checkpoint_module):
        monkeypatch.setattr(module, "flush_to_disk", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"{self.name} to {to.name}"), rename(self, to)))
    save(tmp_path, Checkpoint.load(run), 1)
    events.clear()
    save(tmp_path, Checkpoint.load(run), 2)
    Checkpoint.prune(tmp_path, 1)
    assert set(events[: len(FILES)]) == FILES
    hidden = f".step_00000002.{os.getpid()}.tmp"
    assert events[len(FILES) :] == [
        hidden,
        f"{hidden} to step_00000002",
        "checkpoints",
        tmp_path.name,
        "step_00000001 to .step_00000001.deleted",
    ]


def test_a_checkpoint_that_vanishes_while_it_is_opened_gives_way_to_a_newer_one(run, tmp_path, monkeypatch):
    save(tmp_path, Checkpoint.load(run), 1)
    folder = tmp_path / "checkpoints/step_00000001"
    load = Checkpoint.load.__func__

    def vanish(cls, path):
        if path == folder:
            save(tmp_path, load(cls, run), 2)
            shutil.rmtree(folder)
        return load(cls, path)

    monkeypatch.setattr(Checkpoint, "load", classmethod(vanish))
    newest = Checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize("score", ["high", [1.0], {}])
def test_a_score_that_is_no_number_is_refused(copy, score):
    (copy / HASHES).unlink()
    state = json.loads((copy / "trainer.json").read_text())
    (copy / "trainer.json").write_text(json.dumps({**state, "score": score}))
    with pytest.raises(CheckpointError, match="is broken"):
        Checkpoint.load(copy)
    assert Checkpoint.best(copy.parent.parent) is None


def test_a_checkpoint_of_before_there_were_scores_and_hashes_opens(copy):
    (copy / HASHES).unlink()
    state = json.loads((copy / "trainer.json").read_text())
    del state["score"]
    (copy / "trainer.json").write_text(json.dumps(state))
    assert Checkpoint.load(copy).score is None


# Observations of the data


def read(path):
    rows = Checkpoint.load(path).read_observations()
    assert rows is not None
    return rows


def test_the_observations_of_the_run_are_found_from_every_checkpoint(run, monkeypatch):
    expected = load_file(run / "observations.safetensors")["observations"].numpy()
    assert expected.shape == (120, 3)
    for path in (run, run / "checkpoints/step_00000002", run / "checkpoints/latest"):
        assert np.array_equal(read(path), expected)
    # Wherever one stands.
    monkeypatch.chdir(run / "checkpoints/step_00000002")
    assert np.array_equal(read("."), expected)
    monkeypatch.chdir(run / "checkpoints")
    assert np.array_equal(read("step_00000002"), expected)


def test_a_run_of_before_observations_were_kept_has_none(copy):
    assert Checkpoint.load(copy).read_observations() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff" * 64,
        {"rows": torch.zeros(4, 3)},
        {"observations": torch.zeros(4, 2)},
        {"observations": torch.zeros(12)},
        {"observations": torch.zeros(0, 3)},
        {"observations": torch.zeros(4, 3, dtype=torch.float64)},
        {"observations": torch.zeros(4, 3, dtype=torch.bfloat16)},
        {"observations": torch.full((4, 3), torch.nan)},
        {"observations": torch.full((4, 3), torch.inf)},
    ],
    ids=["empty", "json", "bytes", "name", "width", "rank", "none", "double", "bfloat16", "nan", "infinite"],
)
def test_broken_observations_are_refused(copy, content):
    file = copy.parent.parent / "observations.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    with pytest.raises(CheckpointError, match=r"observations\.safetensors is broken.*Delete it to do without"):
        Checkpoint.load(copy).read_observations()


def test_truncated_observations_are_refused(run, copy):
    whole = (run / "observations.safetensors").read_bytes()
    for length in range(0, len(whole), 101):
        (copy.parent.parent / "observations.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is broken"):
            Checkpoint.load(copy).read_observations()


# A full disk


@contextlib.contextmanager
def files_of_at_most(size):
    """What the operating system refuses as it refuses a full disk, with another number."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1000, 5000])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_spares_the_old_one(run, tmp_path, size):
    old = save(tmp_path, Checkpoint.load(run), 1)
    before = {path.name: path.read_bytes() for path in old.path.iterdir()}
    with (
        files_of_at_most(size),
        pytest.raises(OutputError, match=r"step_00000002 cannot be written: .*File too large.*Earlier ones are intact"),
    ):
        save(tmp_path, Checkpoint.load(run), 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert {path.name: path.read_bytes() for path in old.path.iterdir()} == before
    assert Checkpoint.load(tmp_path).load_networks() is not None


def test_a_disk_that_turns_out_full_only_when_it_is_flushed_spares_the_old_checkpoint(run, tmp_path, monkeypatch):
    save(tmp_path, Checkpoint.load(run), 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device: \d{4,} bytes are needed, and \d+ are free\."):
        save(tmp_path, Checkpoint.load(run), 2)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("folder", [None, "", 3])
@pytest.mark.parametrize(
    "find", [Checkpoint.load, Checkpoint.latest, Checkpoint.best, lambda folder: Checkpoint.prune(folder, 1)]
)
def test_what_is_no_path_is_refused_by_its_value(find, folder):
    with pytest.raises(ConfigError, match=f"is {folder!r}; expected the path of a folder"):
        find(folder)


def test_a_run_of_an_earlier_version_is_loaded_and_resumed(dataset, make_config, tmp_path):
    """Settings without the fields that are new, and weights without the buffers."""
    settings = {"precondition": False, "normalise_values": False, "kl_budget": None}
    config = make_config(steps=3, pretrain_steps=0, objective="reweighted", **settings)
    last = train(config, dataset, tmp_path)
    (last.path / HASHES).unlink()
    for file in (tmp_path / "config.json", last.path / "train_config.json"):
        written = json.loads(file.read_text())
        new = {*settings, "kl_dual", "switch_time", "bridge_adjoint", "layer_norm"}
        file.write_text(json.dumps({name: value for name, value in written.items() if name not in new}))
    assert not [
        name
        for name in load_file(last.path / "model.safetensors")
        if name.endswith((".offset", ".scale")) or "preconditioner" in name or "trust_region" in name
    ]
    assert Checkpoint.load(tmp_path).config == config.resolved()
    assert Checkpoint.load(tmp_path).load_networks().prior.preconditioner is None
    assert train(config.changed(steps=5), dataset, tmp_path, resume=True).step == 5


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(run, tmp_path, keep):
    save(tmp_path, Checkpoint.load(run), 1)
    with pytest.raises(ConfigError, match=f"keep is {keep}; expected 1 or more"):
        Checkpoint.prune(tmp_path, keep)
    assert steps(tmp_path) == [1]

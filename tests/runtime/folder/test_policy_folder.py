import dataclasses
import errno
import logging
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from meam_policy import (
    ConfigError,
    FormatError,
    HubError,
    IntegrityError,
    MeamError,
    MeamPolicy,
    NotFoundError,
    OutputError,
    PolicySpec,
)
from meam_policy.commands.info import info
from meam_policy.diagnosis.verify import verify_policy
from meam_policy.folder.policy_folder import locate_policy, read_graph, read_spec, sha256


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever asks the Hub here fails at once, with HubError instead of NotFoundError."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "./missing",
        "/missing",
        "./missing/deeper",
        "/missing/deeper",
        "../missing",
        "a/b/c",
        "missing/",
        "~/no",
    ],
)
def test_missing_folder_is_not_found_and_never_asks_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        MeamPolicy.from_pretrained(path)
    message = str(caught.value)
    assert str(Path(path).expanduser()) in message
    assert "does not exist" in message
    assert "Repo id must be" not in message
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
@pytest.mark.parametrize("find", [locate_policy, MeamPolicy.from_pretrained])
def test_empty_name_is_not_this_folder(make_policy, monkeypatch, name, find):
    monkeypatch.chdir(make_policy().folder)
    with pytest.raises(NotFoundError, match="The policy's name is empty"):
        find(name)
    assert locate_policy(".") == Path(".")


@pytest.mark.parametrize("value", [None, 3, b"policies/pockets", ["policies/pockets"], False])
@pytest.mark.parametrize("find", [locate_policy, MeamPolicy.from_pretrained])
def test_what_is_no_text_and_no_path_is_refused_by_its_type(value, find):
    with pytest.raises(ConfigError, match=f"a {type(value).__name__}; expected the path of a folder"):
        find(value)


def test_missing_folder_given_as_a_path_object_is_not_a_repo_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError):
        MeamPolicy.from_pretrained(Path("owner/name"))


def test_missing_folder_inside_an_existing_one_is_not_a_repo_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policies").mkdir()
    with pytest.raises(NotFoundError, match="policies/pockets does not exist"):
        MeamPolicy.from_pretrained("policies/pockets")
    with pytest.raises(HubError):
        MeamPolicy.from_pretrained("owner/pockets", cache_dir=tmp_path)


def test_existing_folder_wins_over_a_repo_id(make_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_policy().folder, tmp_path / "owner/name")
    assert locate_policy("owner/name") == Path("owner/name")
    assert MeamPolicy.from_pretrained("owner/name").spec.method == "by hand"


def test_which_of_a_folder_and_a_repository_of_its_name_was_taken_is_logged_once(
    make_policy, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_policy().folder, tmp_path / "owner/logged")
    with caplog.at_level(logging.INFO, logger="meam_policy"):
        for _ in range(3):
            MeamPolicy.from_pretrained("owner/logged")
            MeamPolicy.from_pretrained(tmp_path / "owner" / "logged")
    where = tmp_path / "owner" / "logged"
    expected = f"owner/logged is the folder {where} on this machine, not the Hub's repository of that name."
    assert [record.getMessage() for record in caplog.records] == [expected]


@pytest.mark.parametrize("as_text", [True, False])
def test_file_in_place_of_the_folder_is_refused(make_policy, as_text):
    path = make_policy().folder / "policy.onnx"
    with pytest.raises(NotFoundError, match="is a file, not a folder"):
        MeamPolicy.from_pretrained(str(path) if as_text else path)


@pytest.mark.parametrize("name", ["config.json", "policy.onnx"])
def test_missing_file_is_named_with_what_is_there(make_policy, name):
    linear = make_policy()
    (linear.folder / "notes.txt").touch()
    (linear.folder / name).unlink()
    with pytest.raises(NotFoundError) as caught:
        linear.load()
    message = str(caught.value)
    assert f"has no {name}" in message
    assert "notes.txt" in message
    assert str(linear.folder) in message
    assert caught.value.__cause__ is not None


def test_empty_folder_is_said_to_hold_nothing(tmp_path):
    with pytest.raises(NotFoundError, match="holds: nothing"):
        MeamPolicy.from_pretrained(tmp_path)


def test_folder_in_place_of_a_file_is_refused(make_policy):
    linear = make_policy()
    (linear.folder / "config.json").unlink()
    (linear.folder / "config.json").mkdir()
    with pytest.raises(NotFoundError, match=r"config\.json cannot be read: Is a directory"):
        linear.load()


def test_every_flipped_byte_of_the_graph_is_an_integrity_error(make_policy):
    linear = make_policy()
    path = linear.folder / "policy.onnx"
    graph = path.read_bytes()
    spec = read_spec(linear.folder)
    for position in range(0, len(graph), 7):
        damaged = bytearray(graph)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError) as caught:
            read_graph(linear.folder, spec)
        message = str(caught.value)
        for fragment in (str(path), sha256(graph)[:16], sha256(bytes(damaged))[:16]):
            assert fragment in message


@pytest.mark.parametrize("change", [lambda graph: graph[:-1], lambda graph: graph + b"\0", lambda graph: b""])
def test_graph_of_another_length_is_an_integrity_error(make_policy, change):
    linear = make_policy()
    path = linear.folder / "policy.onnx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(IntegrityError, match="SHA-256"):
        linear.load()


def test_files_of_two_exports_do_not_mix(make_policy):
    one, two = make_policy(), make_policy(noise_weight=np.zeros((8, 8)))
    shutil.copy(two.folder / "policy.onnx", one.folder)
    with pytest.raises(IntegrityError, match="belongs to another export"):
        one.load()


def test_git_lfs_pointer_is_named_with_the_command(make_policy):
    linear = make_policy()
    oid = sha256((linear.folder / "policy.onnx").read_bytes())
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 4242\n"
    (linear.folder / "policy.onnx").write_text(pointer)
    with pytest.raises(FormatError, match=r"git-lfs pointer.*git lfs pull"):
        linear.load()


def test_config_without_the_graphs_hash_is_an_integrity_error(make_policy):
    linear = make_policy()
    (linear.folder / "config.json").write_text(linear.spec.to_json())
    with pytest.raises(IntegrityError, match=r"records no hash of policy\.onnx"):
        linear.load()


def test_broken_config_is_reported_before_the_graph_is_read(make_policy):
    linear = make_policy()
    (linear.folder / "config.json").write_text("{")
    (linear.folder / "policy.onnx").unlink()
    with pytest.raises(FormatError, match=r"config\.json is not JSON"):
        linear.load()


def test_sha256_is_that_of_the_standard():
    # FIPS 180-2, appendix B.1
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_errors_write_nothing(make_policy, capfd):
    linear = make_policy()
    before = sorted(linear.folder.iterdir())
    (linear.folder / "policy.onnx").write_bytes(b"damaged")
    with pytest.raises(MeamError):
        linear.load()
    assert sorted(linear.folder.iterdir()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["", "checkpoints/step_00000003", "checkpoints/best", "checkpoints/latest"])
@pytest.mark.parametrize("find", [locate_policy, MeamPolicy.from_pretrained])
def test_a_training_run_and_its_checkpoints_are_to_be_exported_first(tmp_path, part, find):
    run = tmp_path / "my run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "config.json").write_text('{"method": "qam"}')
    with pytest.raises(NotFoundError) as caught:
        find(run / part)
    kind = "a checkpoint" if part else "a training run"
    command = f"meam export '{run / part}' --output-dir DIR"
    assert str(caught.value) == (
        f"{run / part} is {kind}, not a policy folder. Export it first: `{command}`, then give DIR."
    )


def test_a_checkpoint_away_from_its_run_is_to_be_exported_first(tmp_path):
    (tmp_path / "trainer.json").write_text("{}")
    with pytest.raises(NotFoundError, match="is a checkpoint, not a policy folder"):
        locate_policy(tmp_path)


def test_a_policy_kept_beside_a_run_file_is_still_a_policy(make_policy):
    folder = make_policy().folder
    (folder / "run.json").write_text("{}")
    assert locate_policy(folder) == folder


@pytest.mark.parametrize("revision", ["", " "])
def test_an_empty_revision_is_refused_before_the_hub_is_asked(revision):
    with pytest.raises(ConfigError, match=r"revision is .*expected a branch, tag or commit"):
        MeamPolicy.from_pretrained("owner/name", revision=revision)


def test_a_revision_of_a_folder_on_this_machine_is_refused(make_policy):
    with pytest.raises(ConfigError, match='revision is "v1", but .* is a folder on this machine'):
        MeamPolicy.from_pretrained(make_policy().folder, revision="v1")


def test_config_of_50_megabytes_is_refused_unread(make_policy):
    policy = make_policy()
    with (policy.folder / "config.json").open("wb") as file:
        file.truncate(50 * 10**6)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="50000000 bytes; expected at most 4194304"):
            policy.load()
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_graph_above_what_protobuf_can_hold_is_refused_unread(make_policy):
    policy = make_policy()
    with (policy.folder / "policy.onnx").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(FormatError, match="2147483648 bytes"):
        policy.load()


@pytest.mark.parametrize("there", [False, True])
def test_policy_that_does_not_fit_on_the_disk_is_said_with_its_size(make_policy, tmp_path, monkeypatch, there):
    policy, target = make_policy().load(), tmp_path / "copy"
    if there:
        target.mkdir()
    rename = Path.rename

    def fill(self, to):
        if self.name == "config.json" or self.name.startswith(".copy"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fill)
    with pytest.raises(OutputError, match=r"No space left on device: \d{4} bytes are needed, and \d+ are free\."):
        policy.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == (["copy"] if there else [])
    assert not there or not list(target.iterdir())
    monkeypatch.undo()
    assert policy.save_pretrained(target) == target
    assert MeamPolicy.from_pretrained(target).spec == policy.spec


def load(folder):
    return MeamPolicy.from_pretrained(folder)


def save_a_copy(folder):
    return MeamPolicy.from_pretrained(folder).save_pretrained(folder.with_name("copy"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (load, ["config.json", "policy.onnx"]),
        (save_a_copy, ["README.md", "ladder.png"]),
        (verify_policy, ["config.json", "policy.onnx", "golden.safetensors", "model.safetensors"]),
        (lambda folder: info(str(folder)), ["config.json", "policy.onnx", "model.safetensors"]),
    ],
)
def test_a_named_pipe_in_place_of_a_file_is_refused_and_not_waited_for(make_policy, no_waiting, call, names):
    linear = make_policy()
    config = linear.folder / "config.json"
    text = config.read_bytes()
    for name in names:
        spec = PolicySpec.from_json(text)
        config.write_text(dataclasses.replace(spec, files={**spec.files, name: "0" * 64}).to_json())
        if name in ("config.json", "policy.onnx", "README.md", "ladder.png"):
            config.write_bytes(text)
        path = linear.folder / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(FormatError) as caught:
            call(linear.folder)
        seen = f"{path} cannot be read: it is a named pipe, not a regular file. Download or export the policy again."
        assert str(caught.value) == seen
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)


UNNAMEABLE = ["a" * 256, "a/" + "b" * 300, "a\0b", "a\ud800b"]


@pytest.mark.parametrize("path", UNNAMEABLE)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_no_file_system_holds_is_refused_wherever_one_is_given(make_policy, path, kind):
    policy = make_policy().load()
    calls = [
        lambda: locate_policy(kind(path)),
        lambda: MeamPolicy.from_pretrained(kind(path)),
        lambda: MeamPolicy.from_pretrained("owner/name", cache_dir=kind(path), local_files_only=True),
        lambda: policy.save_pretrained(kind(path)),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="expected one that a file system can hold"):
            call()


def test_a_subfolder_that_no_file_system_holds_is_refused():
    with pytest.raises(ConfigError, match="subfolder is 'aaa.*expected one that a file system can hold"):
        MeamPolicy.from_pretrained("owner/name", subfolder="a" * 256)
    with pytest.raises(ConfigError, match="subfolder is"):
        MeamPolicy.from_pretrained("owner/name", subfolder="a\ud800")


def test_a_model_card_that_is_not_utf_8_is_not_copied_silently(make_policy, tmp_path):
    linear = make_policy()
    (linear.folder / "README.md").write_bytes("# Café".encode("latin-1"))
    with pytest.raises(FormatError) as caught:
        linear.load().save_pretrained(tmp_path / "copy")
    assert str(caught.value) == (
        f"{linear.folder / 'README.md'} is not UTF-8 text (byte 5); expected a model card that others can read. Save "
        "it as UTF-8, or write it anew with `meam card`."
    )
    assert not (tmp_path / "copy").exists()

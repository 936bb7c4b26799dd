"""Writing policy folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from meam_export import export_policy
from meam_policy import CheckpointError, ConfigError, MeamPolicy, NotFoundError, OutputError
from meam_policy.cli import run
from meam_policy.folder import POLICY_FILES, sha256
from meam_training import Checkpoint, OfflineDataset, TrainConfig, train

TINY = {"steps": 2, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    generator = np.random.default_rng(0)
    observations = {"arm": generator.normal(size=(60, 2)), "ball": generator.normal(size=(60, 1))}
    dataset = OfflineDataset.from_arrays(
        observations=observations,
        actions=generator.uniform(-1, 1, (60, 2)),
        rewards=generator.normal(size=60),
        next_observations=observations,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
        dataset_id="tests/arm-v0",
        control_rate_hz=50.0,
    )
    return train(TrainConfig.preset("me-am", **TINY), dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_policy(checkpoint, tmp_path_factory.mktemp("policies") / "arm")


def test_the_folder_holds_the_files_of_the_format_and_their_hashes(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == set(POLICY_FILES)
    spec = MeamPolicy.from_pretrained(folder).spec
    hashed = {"policy.onnx", "model.safetensors", "golden.safetensors"}
    assert dict(spec.files) == {name: sha256((folder / name).read_bytes()) for name in hashed}


def test_a_dict_observation_is_flattened_in_the_recorded_order(folder: Path) -> None:
    policy = MeamPolicy.from_pretrained(folder)
    assert [box.key for box in policy.spec.observation] == ["arm", "ball"]
    golden = load_file(folder / "golden.safetensors")
    split = {"ball": golden["observation"][:, 2:], "arm": golden["observation"][:, :2]}
    assert np.abs(policy.sample(split, noise=golden["noise"]) - golden["actions"]).max() < 1e-5


def test_the_model_file_holds_the_trained_networks_without_their_averages(checkpoint: Checkpoint, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    networks = checkpoint.load_networks().state_dict()
    assert set(weights) == {name for name in networks if not name.startswith("target_")}
    assert all(np.array_equal(weights[name], networks[name].numpy()) for name in weights)


def test_the_model_card_says_what_goes_in_and_comes_out(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "meam-policy"
    assert card.data.to_dict()["pipeline_tag"] == "robotics"
    assert "me-am" in card.data.to_dict()["tags"]
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert [row.split("|")[2].strip() for row in rows] == ["name", "arm", "ball", "action"]
    assert "tests/arm-v0" in card.text
    assert "50.0 actions a second" in card.text
    assert "{{" not in card.text


def test_the_newest_checkpoint_of_a_training_folder_is_exported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    exported = export_policy(checkpoint.path.parent.parent, tmp_path / "policy")
    assert MeamPolicy.from_pretrained(exported).spec.method == "me-am"


@pytest.mark.parametrize("settings", [{"flow_steps": 0}, {"flow_steps": -3}, {"solver": "rk45"}])
def test_what_cannot_be_integrated_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"Cannot export with"):
        export_policy(checkpoint, tmp_path / "policy", **settings)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def occupy_with_file(path: Path) -> None:
    path.write_text("mine")


def occupy_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize("occupy", [occupy_with_file, occupy_with_notes])
def test_an_occupied_output_is_left_alone(
    checkpoint: Checkpoint, tmp_path: Path, occupy: Callable[[Path], None]
) -> None:
    occupy(tmp_path / "policy")
    with pytest.raises(OutputError, match="already holds something"):
        export_policy(checkpoint, tmp_path / "policy")
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_an_output_that_cannot_be_made_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    occupy_with_file(tmp_path / "file")
    with pytest.raises(OutputError, match="file/policy cannot be written"):
        export_policy(checkpoint, tmp_path / "file" / "policy")


def test_an_empty_folder_is_filled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    assert (export_policy(checkpoint, tmp_path / "policy") / "policy.onnx").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_missing_and_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint folder"):
        export_policy(tmp_path / "nowhere", tmp_path / "policy")
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        export_policy(tmp_path, tmp_path / "policy")
    (tmp_path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken"):
        export_policy(tmp_path, tmp_path / "policy")


def test_the_working_directory_itself_can_be_the_output(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_policy(checkpoint, ".")
    assert {file.name for file in Path().iterdir()} == set(POLICY_FILES)
    assert MeamPolicy.from_pretrained(".").act({"arm": [0.0, 0.0], "ball": [0.0]}).shape == (2,)


def test_info_notices_any_damaged_file(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_policy(checkpoint, tmp_path / "policy")
    assert run(["info", str(folder)]) == 0
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert run(["info", str(folder)]) == 2
    assert "model.safetensors has SHA-256" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert run(["info", str(folder)]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err
